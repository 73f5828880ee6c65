"""What one would use instead of the routed experts here: each installed, or the sentence why not, and how to call it.

A peer's `forward` takes a case and gives a function of no arguments that computes y. Peers of FP8 groups include
`grouped_mm` in BF16, which is what one uses where FP8 does not pay. None of those that need a GPU has been called by
the people who wrote this; a peer that raises is a red row with its words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from ornith_moe.bench.cases import Case

Forward = Callable[[], torch.Tensor]
LARGEST_GATHER_BYTES = 256 << 20  # batched_mm copies an expert per routed row
LARGEST_EAGER_BYTES = 64 << 20  # eager's backward fills a gradient of all experts per active expert
ROW_ALIGNMENT = 16  # rows of a group in an FP8 grouped product


class Unable(Exception):
    """Why a peer does not stand here; `status` is "missing" or "skipped"."""

    def __init__(self, status: str, why: str):
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class Peer:
    """An implementation by others.

    Attributes:
        module, package: what is imported, and what to install where it is missing.
        devices, recipes: where it stands. `gradients`: whether it has a backward.
        forward: see the module. `refuses`: why it does not stand beside a case, or "".
    """

    name: str
    module: str
    package: str
    devices: tuple[str, ...]
    recipes: tuple[str, ...]
    forward: Callable[[Case], Forward]
    gradients: bool = True
    refuses: Callable[[Case, bool], str] = lambda case, backward: ""

    def check(self, case: Case, backward: bool) -> None:
        """Raise Unable unless it can stand beside `case`."""
        if case.x.device.type not in self.devices:
            raise Unable("skipped", f"{self.name} runs on {' and '.join(self.devices)} only")
        if not installed(self.module):
            raise Unable("missing", f"{self.package} is not installed; pip install {self.package}")
        if backward and not self.gradients:
            raise Unable("skipped", f"{self.name} has no backward")
        if why := self.refuses(case, backward):
            raise Unable("skipped", why)


def installed(module: str) -> bool:
    """Whether `module`, dotted or not, can be found, without importing more than what holds it."""
    top, _, attribute = module.partition(":")
    if find_spec(top.split(".")[0]) is None:
        return False
    return not attribute or hasattr(__import__(top, fromlist=["_"]), attribute)


def _transformers(implementation: str) -> Callable[[Case], Forward]:
    def forward(case: Case) -> Forward:
        from transformers import Qwen3_5MoeTextConfig
        from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

        experts, hidden, inner = case.down_proj.shape
        config = Qwen3_5MoeTextConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=inner)
        config._experts_implementation = implementation
        with torch.device("meta"):
            module: Any = Qwen3_5MoeExperts(config)
        del module.gate_up_proj, module.down_proj
        module.gate_up_proj, module.down_proj = case.gate_up_proj, case.down_proj  # the very same tensors
        return lambda: module(case.x, case.indices, case.weights)

    return forward


def _no_gather(case: Case, backward: bool) -> str:
    per_expert = case.gate_up_proj[0].nbytes + case.down_proj[0].nbytes
    if backward or case.indices.numel() * per_expert > LARGEST_GATHER_BYTES:
        return "batched_mm copies an expert per routed row, which is out of proportion here"
    return ""


def _no_dense_gradients(case: Case, backward: bool) -> str:
    if backward and case.gate_up_proj.nbytes + case.down_proj.nbytes > LARGEST_EAGER_BYTES:
        return "eager's backward fills a gradient of all experts for each active one, which is out of proportion here"
    return ""


Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def grouped(case: Case, product: Product, alignment: int = 1) -> torch.Tensor:
    """y from `product(rows [R, K], weight [E, N, K], ends [E])`, over rows sorted by expert.

    With `alignment` each expert's rows are padded to a multiple of it, the total to what E experts need at most, so
    that nothing waits for the device.
    """
    slots = case.indices.flatten()
    order = slots.argsort(stable=True)
    counts = torch.zeros(len(case.down_proj), dtype=torch.long, device=slots.device)
    counts.scatter_add_(0, slots, torch.ones_like(slots))
    padded = (counts + alignment - 1) // alignment * alignment
    ends, token = padded.cumsum(0), order // case.indices.shape[1]
    place = (
        torch.arange(len(slots), device=slots.device) + ((ends - padded) - (counts.cumsum(0) - counts))[slots[order]]
    )
    rows = case.x[token]
    if alignment > 1:
        rows = rows.new_zeros(len(slots) + len(counts) * alignment, rows.shape[1]).index_copy(0, place, rows)
    gate, up = product(rows, case.gate_up_proj, ends.int()).chunk(2, -1)
    out = product(F.silu(gate) * up, case.down_proj, ends.int())
    out = out[place] * case.weights.flatten()[order, None]
    return torch.zeros_like(case.x).index_add(0, token, out.to(case.x.dtype))


def _grouped_mm(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _scaled_grouped_mm(case: Case) -> Forward:
    """A scale per row of the weights, made once, and per token, made on the way."""
    from torch.nn.functional import ScalingType

    from ornith_moe.quant.fp8 import quantize_fp8_channel

    made = {id(w): quantize_fp8_channel(w.detach(), scale="fp32") for w in (case.gate_up_proj, case.down_proj)}
    rowwise = ScalingType.RowWise

    def product(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        q, scale = made[id(weight)]
        row_scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
        q_rows = (rows / row_scale).to(torch.float8_e4m3fn)
        return F.scaled_grouped_mm(  # type: ignore[attr-defined]
            q_rows, q.transpose(1, 2), row_scale.squeeze(-1), rowwise, scale.squeeze(-1), rowwise, offs=ends,
            output_dtype=torch.bfloat16,
        )  # fmt: skip

    return lambda: grouped(case, product, ROW_ALIGNMENT)


def _torchao(case: Case) -> Forward:
    from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm as scaled

    def product(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return scaled(rows, weight.transpose(1, 2), ends, pad_token_groups_for_grouped_mm=False)

    return lambda: grouped(case, product, ROW_ALIGNMENT)


def _liger(case: Case) -> Forward:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    indices = case.indices.int()
    return lambda: LigerFusedMoEFunction.apply(case.x, case.gate_up_proj, case.down_proj, indices, case.weights)


BOTH, GPU = ("cpu", "cuda"), ("cuda",)
FP8_RECIPES = ("fp8", "fp8_full", "fp8_channel")
ALL_RECIPES = ("bf16", *FP8_RECIPES)
MOE_PEERS = {
    peer.name: peer
    for peer in (
        Peer("grouped_mm", "transformers", "transformers", BOTH, ALL_RECIPES, _transformers("grouped_mm")),
        Peer("eager", "transformers", "transformers", BOTH, ("bf16",), _transformers("eager"),
             refuses=_no_dense_gradients),
        Peer("batched_mm", "transformers", "transformers", BOTH, ("bf16",), _transformers("batched_mm"),
             refuses=_no_gather),
        Peer("F.grouped_mm", "torch.nn.functional:grouped_mm", "'torch>=2.10'", BOTH, ("bf16",),
             lambda case: lambda: grouped(case, _grouped_mm)),
        Peer("F.scaled_grouped_mm", "torch.nn.functional:scaled_grouped_mm", "'torch>=2.10'", GPU, FP8_RECIPES,
             _scaled_grouped_mm, gradients=False),
        Peer("torchao", "torchao", "torchao", GPU, FP8_RECIPES, _torchao),
        Peer("liger", "liger_kernel", "liger-kernel", GPU, ("bf16",), _liger),
    )
}  # fmt: skip


def moe_peers(recipe: str) -> list[Peer]:
    """The peers of a group of `recipe`."""
    return [peer for peer in MOE_PEERS.values() if recipe in peer.recipes]
