"""Two processes for torch.distributed, forked from one that has imported what they import and done nothing else."""

import multiprocessing

import torch

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


def run(worker, folder):
    """`worker(rank, folder)` in both, whose errors are raised here."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(worker, (str(folder),), nprocs=2, start_method="forkserver")
