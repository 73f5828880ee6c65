"""Processes for torch.distributed or to be killed, forked from one that has imported what they do, and nothing else.

Never forked from the process of the tests: what its other threads hold at that moment, a fork waits for without end.
"""

import multiprocessing
import time

import torch

SECONDS = 300  # of a busy machine
IMPORTED = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.profiler",
    "transformers.models.gemma4.modeling_gemma4",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "ornith_moe.hf",
    "ornith_moe.sync",
]


def run(worker, folder, count=2):
    """`worker(rank, folder)` in each, whose errors are raised here; those that wait for one another are ended."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    started = torch.multiprocessing.start_processes(
        worker, (str(folder),), nprocs=count, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + SECONDS
    while not started.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"{worker.__module__}.{worker.__name__}: not ended after {SECONDS} s")
