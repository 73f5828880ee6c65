"""`SelfScaffoldTrainer` in two processes over gloo: credit stays within a task, memory and weights are one.

Not covered: GPUs, vLLM, FSDP.
"""

import os
import sys
from pathlib import Path

import pytest
import rl_policy as policy
import torch

pytest.importorskip("trl", reason="trl is not installed")

import ornith_moe.hf

assert ornith_moe.hf  # registers experts_implementation="ornith"


def work(rank, folder, path):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    sys.path[:0] = path
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
    torch.distributed.destroy_process_group()


def test_two_processes_train_one_policy(tmp_path):
    torch.manual_seed(0)
    policy.save(tmp_path / "policy")
    path = [str(Path(__file__).parent), *sys.path]
    torch.multiprocessing.spawn(work, (str(tmp_path), path), nprocs=2)
    (weights, memory, seen, told), (others, memory_1, seen_1, told_1) = (
        torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert len(seen) == len(seen_1) == 1 and seen[0][0][0] != seen_1[0][0][0]  # one batch, a task each
    assert memory == memory_1 and len(memory["kept"]) == 2  # each knows the other's scaffolds
    assert told == told_1 and told["reward"][0] > 0  # means over both
    assert told["replay/flipped_share"][0] == told["clip_ratio/region_mean"][0] == 0  # the first update is exact
