"""A tensor of a live model while its weights are given: gathered on this rank, or the experts that lie here.

DTensor parameters, of FSDP2, tensor or expert parallelism, are gathered by `full_tensor()`, a collective on their mesh,
after they are rounded: BF16 crosses the wire, not the masters. A plain tensor is itself. Nothing here calls `numpy()`,
which would pin a storage that FSDP has to free.

A fused tensor of experts [E, N, K] is gathered a few experts at a time: that of the 397B has 8 GiB. Every rank takes
experts [i, j) of those that lie on it, and they are gathered as a DTensor of their own, placed as the large one is: of
B equal blocks of E / B experts, expert b * E / B + i + k arrives at b * (j - i) + k. Tensors that are not cut into
equal blocks are gathered whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.source.architectures.weight import Weight


@dataclass(frozen=True)
class Held:
    """A weight's tensor or a fused one [., N, K] of experts, with the scales of stored FP8 beside it.

    `experts`: {expert: its index in `tensor`} of those that are in it; None: all of them, in order.
    """

    tensor: torch.Tensor
    scale: torch.Tensor | None = None
    experts: dict[int, int] | None = None

    def rows_of(self, weight: Weight, row: int) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """A weight, whose rows begin at `row` of the whole tensor, and its scale; None if it lies on another rank."""
        if tuple(self.tensor.shape) == weight.shape:
            return self.tensor, self.scale
        assert weight.expert is not None
        height = self.tensor.shape[1]
        if self.experts is not None:
            if weight.expert not in self.experts:
                return None
            row += (self.experts[weight.expert] - weight.expert) * height
        rows = self.tensor.flatten(0, -2)[row : row + weight.shape[0]]
        if self.scale is None:
            return rows, None
        scale, total = self.scale.flatten(0, -2), self.tensor.shape[0] * height
        first, count = (n * len(scale) // total for n in (row, weight.shape[0]))
        return rows, scale[first : first + count]


@dataclass(frozen=True)
class Cut:
    """How a fused tensor is gathered: of `blocks` equal blocks of `block` experts, `taken` at a time from each."""

    blocks: int
    block: int
    taken: int

    def piece(self, expert: int) -> int:
        """With which piece an expert arrives."""
        return expert % self.block // self.taken

    def experts(self, piece: int) -> dict[int, int]:
        """{expert: its index} of a piece."""
        inner = range(piece * self.taken, min((piece + 1) * self.taken, self.block))
        return {b * self.block + i: b * len(inner) + k for b in range(self.blocks) for k, i in enumerate(inner)}


def cut_of(tensor: torch.Tensor, saved_as: torch.dtype | None, gather_bytes: int) -> Cut | None:
    """Pieces of at most `gather_bytes`, or of one expert per block; None of a tensor that is not gathered in pieces."""
    if not isinstance(tensor, DTensor) or tensor.dim() < 3:
        return None
    parts = [1] * tensor.dim()
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        if not placement.is_replicate():
            parts[getattr(placement, "dim", 0)] *= size
    if any(length % count for length, count in zip(tensor.shape, parts, strict=True)):
        return None
    here = _experts_here(tensor)
    if here != list(range(here[0], here[0] + len(here))) or here[0] % len(here):
        return None  # interleaved
    item = saved_as.itemsize if saved_as is not None and tensor.element_size() > 1 else tensor.element_size()
    blocks, block = parts[0], tensor.shape[0] // parts[0]
    taken = gather_bytes // (blocks * math.prod(tensor.shape[1:]) * item)
    return Cut(blocks, block, min(max(taken, 1), block))


def hold(
    tensor: torch.Tensor, scale: torch.Tensor | None, saved_as: torch.dtype | None, cut: Cut | None, piece: int
) -> Held:
    """Gather a tensor, or a piece of it: a collective. Rounded to `saved_as` first, unless it is stored FP8."""
    dtype = tensor.dtype if saved_as is None or scale is not None else saved_as
    scales = None if scale is None else _gathered(scale, scale.dtype, cut, piece)
    return Held(_gathered(tensor, dtype, cut, piece), scales, cut.experts(piece) if cut else None)


def hold_local(tensor: torch.Tensor, scale: torch.Tensor | None) -> Held:
    """The experts of a fused tensor that lie on this rank; nothing is gathered.

    Raises:
        PlanError: the tensor is cut otherwise than into experts.
    """
    if not isinstance(tensor, DTensor):
        return Held(tensor.detach(), scale)
    if not all(one.is_replicate() or getattr(one, "dim", None) == 0 for one in tensor.placements):
        raise PlanError(
            f"gather=False: experts are placed {tensor.placements}, which cuts them; shard them by Shard(0), or gather"
        )
    scales = scale.to_local() if isinstance(scale, DTensor) else scale
    return Held(tensor.to_local(), scales, {expert: index for index, expert in enumerate(_experts_here(tensor))})


def _experts_here(tensor: DTensor) -> list[int]:
    """Which experts lie on this rank, asked of torch: the numbers of all are distributed as the tensor is."""
    along = [one if getattr(one, "dim", None) == 0 else Replicate() for one in tensor.placements]
    ids = torch.arange(len(tensor), device=tensor.device_mesh.device_type)
    return distribute_tensor(ids, tensor.device_mesh, along, src_data_rank=None).to_local().tolist()


def _gathered(tensor: torch.Tensor, dtype: torch.dtype, cut: Cut | None, piece: int) -> torch.Tensor:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor  # rounded weight by weight
    mesh, device = tensor.device_mesh, tensor.device_mesh.device_type  # FSDP2 may offload shards to the CPU
    if cut is None:
        rounded = tensor.to(device, dtype)
    else:
        local = tensor.to_local()[piece * cut.taken : (piece + 1) * cut.taken].to(device, dtype)
        shape = torch.Size((cut.blocks * len(local), *tensor.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        rounded = DTensor.from_local(local, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)
    assert isinstance(rounded, DTensor)
    return rounded.full_tensor()
