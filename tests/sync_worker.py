"""What each of the two processes of test_sync_parallel runs; of its own, so that a new process can import it."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from ornith_moe.quant.errors import ConversionError, PlanError
from ornith_moe.sync import plan_sync, served_weights
from ornith_moe.sync.held import cut_of, hold

LAYOUTS = {  # name: arguments of transformers' DistributedConfig
    "fsdp2": {"fsdp_size": 2},
    "ep": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "ep_tp": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
}
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
PIECE_BYTES = 256 << 10  # of a fused tensor of 1 MiB in BF16
IDS = torch.arange(2 * 11).view(2, 11) % 97


def run(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {name: layout(folder, name) for name in LAYOUTS}
        results |= {
            "by hand": by_hand(folder),
            "odd": odd(folder),
            "cut": cut_experts(folder),
            "peak": peak_bytes(folder),
        }
        torch.save(results, f"{folder}/results-{rank}.pt")
    finally:
        dist.destroy_process_group()


def load(folder, dtype=torch.float32, **distributed):
    """The masters of `folder`, sharded as transformers does it."""
    config = DistributedConfig(**distributed) if distributed else None
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=dtype)


def given(model, build, **options):
    return [tuple(one) for one in served_weights(model, build, **options)]


def layout(folder, name):
    """Every weight on both ranks, by each build; then a step of the sharded model, which frees what it gathers."""
    made = load(f"{folder}/moe", **LAYOUTS[name])
    found = {build: given(made, build) for build in ("fp8-channel", "fp8-block", "bf16")}
    made(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    found["in pieces"] = given(made, "fp8-block", gather_bytes=1)
    found["own experts"] = given(made, "fp8-block", gather=False)
    found["to rank 0"] = given(made, "fp8-block", to_rank=0)
    return found | {"refused": refused(made)}


def refused(made):
    """A NaN stops both ranks, though only one has it and only the other is given tensors."""
    down = made.get_parameter("model.layers.0.mlp.experts.down_proj")
    with torch.no_grad():
        down.to_local()[-1, -1, -1] = float("nan") if dist.get_rank() else 0.0
    try:
        given(made, "fp8-channel", to_rank=0)
    except ConversionError as error:
        return str(error)


def by_hand(folder):
    """fully_shard of a trainer's own, layer by layer, with the tied embedding in the root."""
    made = load(f"{folder}/gemma")
    for layer in made.model.layers:
        fully_shard(layer)
    fully_shard(made)
    return given(made, "fp8-channel")


def odd(folder):
    """Seven experts on two ranks, which makes no equal blocks: gathered whole, or each rank its own; and eight a rank,
    gathered by threes."""
    made, wide = (load(f"{folder}/{name}", **LAYOUTS["fsdp2"]) for name in ("odd", "wide"))
    by_threes = plan_sync(wide, "fp8-block", gather_bytes=7 * wide.get_parameter(GATE_UP)[0].numel() * 2)
    assert by_threes.cuts[GATE_UP].taken == 3
    return {
        "whole": given(made, "fp8-block", gather_bytes=1),
        "own experts": given(made, "fp8-block", gather=False),
        "by threes": [tuple(one) for one in by_threes],
    }


def cut_experts(folder):
    """Tensor parallelism, which cuts each expert; and experts that lie on two ranks in turns, two by two."""
    made = load(f"{folder}/moe", tp_size=2)
    found = {"tp": given(made, "fp8-block", gather_bytes=1)}
    try:
        given(made, "fp8-block", gather=False)
    except PlanError as error:
        found["own experts"] = str(error)
    whole = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(0))
    mesh = init_device_mesh("cpu", (2,))
    in_turns = distribute_tensor(whole, mesh, [_StridedShard(0, split_factor=2)])
    cut = cut_of(in_turns, None, 1)
    return found | {"in turns": cut is None and torch.equal(hold(in_turns, None, None, cut, 0).tensor, whole)}


def peak_bytes(folder):
    """{(dtype, gather_bytes): most memory that a sync in shards takes besides the model}."""
    peaks = {}
    for dtype, sizes in ((torch.float32, [PIECE_BYTES]), (torch.bfloat16, [PIECE_BYTES, 1 << 30])):
        made = load(f"{folder}/wide", dtype, **LAYOUTS["fsdp2"])
        for size in sizes:
            sync = plan_sync(made, "fp8-block", gather_bytes=size)
            peaks[dtype, size] = peak_of(lambda sync=sync: [None for _ in sync])
    return peaks


def peak_of(run):
    """Most bytes of tensors that `run` has allocated at a time, buffers of collectives too.

    The least of five runs: on a busy machine gloo's thread frees a buffer after the next one is made, 1.07 MB for 0.57.
    """
    run()  # machine code and process groups once
    return min(_peak_once(run) for _ in range(5))


def _peak_once(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
