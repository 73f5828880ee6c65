"""Self-scaffolding RL: a policy writes a scaffold for a task, then solutions under it, and learns both from one reward.

    credit.py      advantages of S scaffolds and S * R solutions from the rewards
    loss.py        token-level GRPO with asymmetric clipping, weights for staleness and for mismatch
    scaffolds.py   prompts of both stages, parsing, the scaffolds in use by category
    monitor.py     what a rollout may touch, and what strikes it out
    meter.py       how far the trainer's numbers are from the rollout engine's
    verl.py        verl's FSDP2 engine with replayed routing and synced builds; needs verl

Plain PyTorch but for adapters, no trainer in it: TRL and verl are the engines, and the adapters stand on these files.
docs/rl.md has the method on one page. Nothing is imported here, so the text-level files start without torch.
"""
