"""What the processes of rl/test_trl_parallel.py and rl/test_trl.py run; a module that a new process can import."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "rl"))


def killed(rank, folder):
    """Trains in the folder until it kills itself."""
    torch.set_num_threads(1)
    import test_trl

    test_trl.killed(f"{folder}/policy", f"{folder}/killed")


def run(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    import test_trl

    seen = []

    def reward(completions, answer, **columns):
        made = test_trl.reward(completions, answer)
        seen.append((columns["prompt"] if "prompt" in columns else columns["prompts"], made))
        return made

    made = test_trl.trainer(
        f"{folder}/policy", f"{folder}/out", tasks=1, reward_funcs=reward, num_iterations=2, max_steps=2
    )
    made.train()
    weights = {name: p.detach().clone() for name, p in made.accelerator.unwrap_model(made.model).named_parameters()}
    told = {key: test_trl.figures(made, key) for key in ("reward", "replay/flipped_share", "clip_ratio/region_mean")}
    torch.save((weights, made.memory.state_dict(), seen, told), f"{folder}/rank-{rank}.pt")
    torch.distributed.barrier()
    # DDP's reducer holds the group. Freed here, with the interpreter's lock, that waits for gloo's thread, which may
    # wait for the lock to free a tensor (torch 2.13: one run of twenty had no end). So nothing is freed.
    sys.stdout.flush()
    os._exit(0)
