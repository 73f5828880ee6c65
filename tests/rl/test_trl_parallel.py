"""`SelfScaffoldTrainer` in two processes over gloo: credit stays within a task, memory and weights are one.

Not covered: GPUs, vLLM, FSDP.
"""

import processes
import pytest
import rl_policy as policy
import torch
import trl_worker

pytest.importorskip("trl", reason="trl is not installed")

import ornith_moe.hf

assert ornith_moe.hf  # registers experts_implementation="ornith"


def test_processes_train_one_policy(tmp_path):
    torch.manual_seed(0)
    policy.save(tmp_path / "policy")
    processes.run(trl_worker.run, tmp_path)
    (weights, memory, seen, told), (others, memory_1, seen_1, told_1) = (
        torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert len(seen) == len(seen_1) == 1 and seen[0][0][0] != seen_1[0][0][0]  # one batch, a task each
    assert memory == memory_1 and len(memory["kept"]) == 2  # each knows the other's scaffolds
    assert told == told_1 and told["reward"][0] > 0  # means over both
    assert told["replay/flipped_share"][0] == told["clip_ratio/region_mean"][0] == 0  # the first update is exact
