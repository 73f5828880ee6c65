"""What each of the two processes of test_parallel runs; a module of its own, so that a new process can import it."""

import os

import hf_models
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import ornith_moe.hf
from ornith_moe import replay

BATCHES = torch.arange(2 * 2 * 11).view(2, 2, 11) * 13 % 97  # [rank or micro-batch, B, S]
LAYOUTS = {  # name: (arguments of DistributedConfig, whether each rank has a batch of its own)
    "ep_all_reduce": ({"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"}, False),
    "ep_all_to_all_shared": ({"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}, False),
    "ep_all_to_all": ({"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}, True),
    "fsdp2": ({"fsdp_size": 2}, True),
}


def run(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {name: plain(folder, rank, name) for name in LAYOUTS}
        results |= {f"{name}, {case.__name__}": case(folder, rank, name) for name, case in EXTRA}
        torch.save(results, f"{folder}/results-{rank}.pt")
    finally:
        dist.destroy_process_group()


def load(folder, name, implementation="ornith"):
    arguments, own_batch = LAYOUTS[name]
    made = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{implementation}",
        distributed_config=DistributedConfig(**arguments),
        experts_implementation=implementation,
        dtype=torch.float32,
    )
    return made, own_batch


def batch_of(rank, own_batch):
    ids = BATCHES[rank] if own_batch else BATCHES[0]
    return {"input_ids": ids, "labels": ids}


def full(gradients):
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def plain(folder, rank, name):
    """Loss and every gradient, and whether this rank's experts were really ours."""
    made, own_batch = load(folder, name)
    loss, gradients = hf_models.loss_and_gradients(made, **batch_of(rank, own_batch))
    return {"loss": loss, "gradients": full(gradients), "why": set(ornith_moe.hf.explain(made).values())}


def recomputed_replay(folder, rank, name):
    """Every token to experts 0 to 2, so that rank 1 gets no row, with gradient checkpointing."""
    made, own_batch = load(folder, name)
    made.train()
    hf_models.checkpoint_activations(made, use_reentrant=False)
    batch = batch_of(rank, own_batch)
    record = torch.tensor([2, 0, 1]).expand(batch["input_ids"].numel(), made.config.num_hidden_layers, 3)
    with replay.replay(made, record) as report:
        loss, gradients = hf_models.loss_and_gradients(made, **batch)
    return {"loss": loss, "gradients": full(gradients), "load": report.load}


def two_fp8_steps(folder, rank, name):
    """The losses of three forward passes with a step of SGD between them: shards change, quantized copies must too."""
    made, own_batch = load(folder, name, "ornith_fp8")
    return {"losses": sgd(made, batch_of(rank, own_batch))}


def sgd(made, batch, others=()):
    """Losses of `batch` before and after two steps on the mean loss of `batch` and `others`."""
    optimizer = torch.optim.SGD(made.parameters(), 0.5)
    losses = []
    for _ in range(3):
        loss = made(**batch, use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        for each in [loss, *(made(**other, use_cache=False).loss for other in others)]:
            (each / (1 + len(others))).backward()
        optimizer.step()
    return losses


EXTRA = (
    ("ep_all_reduce", recomputed_replay),
    ("ep_all_to_all", recomputed_replay),
    ("fsdp2", recomputed_replay),
    ("fsdp2", two_fp8_steps),
    ("ep_all_to_all", two_fp8_steps),
)
