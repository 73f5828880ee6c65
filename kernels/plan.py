"""The routing plan: slots sorted by expert, and the tiles that a grouped GEMM walks; built on the device.

    row_to_slot = the slots in a stable sort by expert      tile = up to block_m consecutive rows of one expert

Three launches, and none waits for the host: sizes and grids follow from T, top_k, E and block_m, so one captured CUDA
graph serves every routing. All of it is integers, in an order that is fixed: runs are equal bit for bit. (A histogram
adds up in shared memory, exactly; nothing else is atomic.)

1. `count`: per chunk of 256 slots, a histogram over experts, and each slot's rank: how many earlier slots of its chunk
   have its expert, by comparing all pairs.
2. `scan`: the chunks' histograms become exclusive prefix sums over chunks. Blocks of 8 experts are independent, and 256
   chunks are a step: 327,680 slots take 5.
3. `place`: row = offsets[expert] + prefix[chunk, expert] + rank. Every program sums the E counts for itself, which
   costs less than a launch. A tile belongs to the last expert whose tiles begin at it or before.

Experts are in order and the tiles of one are adjacent, so its weights are read while they are in cache. Slots whose id
is outside [0, E) are sentinels: no row, no tile.

Legend: T tokens, E experts, slots T * top_k, chunks of `_CHUNK` slots. Maps are named as in docs/notation.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.launch import launch, target

_CHUNK = 256  # slots of a program: comparing pairs grows with it, the scan shrinks
_PART = 8  # slots compared with all others at a time
_SCAN = 2048  # counts of a scan's tile
_TILES = 8  # tiles of a program, compared with all experts at once


@dataclass(frozen=True)
class RoutingPlan:
    """Who computes what, as int32 tensors on the device; unused entries at the end are -1.

    Attributes:
        counts: [E], rows of each expert.
        offsets: [E + 1], exclusive: expert e has rows offsets[e] to offsets[e + 1] - 1.
        row_to_slot: [T * top_k], the first offsets[E] entries in use.
        slot_to_row: [T * top_k], -1 for sentinels.
        tile_to_expert: [T * top_k // block_m + min(E, T * top_k)], what any routing needs at most.
        tile_to_row: the same shape, the first row of each tile; it ends after block_m rows or with its expert.
        num_tiles: [1], tiles in use.
        block_m: rows of a full tile. top_k: slots of a token; row_to_slot // top_k is the token.
    """

    counts: torch.Tensor
    offsets: torch.Tensor
    row_to_slot: torch.Tensor
    slot_to_row: torch.Tensor
    tile_to_expert: torch.Tensor
    tile_to_row: torch.Tensor
    num_tiles: torch.Tensor
    block_m: int
    top_k: int


def plan_reference(indices: torch.Tensor, experts: int, block_m: int) -> RoutingPlan:
    """`build_plan` in plain torch, with a host sync for every expert."""
    slots = indices.numel()
    expert = indices.reshape(-1).long()
    local = (expert >= 0) & (expert < experts)
    order = torch.where(local, expert, experts).argsort(stable=True)[: int(local.sum())]
    counts = expert[local].bincount(minlength=experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    tiles = [(e, row) for e in range(experts) for row in range(int(offsets[e]), int(offsets[e + 1]), block_m)]

    def padded(values: Sequence[int] | torch.Tensor, length: int) -> torch.Tensor:
        out = torch.full((length,), -1, dtype=torch.int32, device=indices.device)
        out[: len(values)] = torch.as_tensor(values, dtype=torch.int32, device=indices.device)
        return out

    slot_to_row = padded([], slots)
    slot_to_row[order] = torch.arange(len(order), dtype=torch.int32, device=indices.device)
    bound = max_tiles(slots, experts, block_m)
    return RoutingPlan(
        counts=counts.int(),
        offsets=offsets.int(),
        row_to_slot=padded(order, slots),
        slot_to_row=slot_to_row,
        tile_to_expert=padded([e for e, _ in tiles], bound),
        tile_to_row=padded([row for _, row in tiles], bound),
        num_tiles=padded([len(tiles)], 1),
        block_m=block_m,
        top_k=indices.shape[1],
    )


def max_tiles(slots: int, experts: int, block_m: int) -> int:
    """The most tiles any routing needs: every tile is full but one per expert, which needs a slot to exist."""
    return slots // block_m + min(experts, slots)


@triton.jit
def _local_expert(indices_ptr, slot, slots, E):
    """Expert of each slot, or -1: no slot, or not of these E."""
    expert = tl.load(indices_ptr + slot, mask=slot < slots, other=-1).to(tl.int64)
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit
def count_kernel(
    indices_ptr, rank_ptr, table_ptr, slots, E,
    CHUNK: tl.constexpr, PART: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: chunks. One program owns CHUNK slots, writes their ranks and the chunk's row of the table [chunks, E]."""
    chunk = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    slot = chunk * CHUNK + lane
    expert = _local_expert(indices_ptr, slot, slots, E)
    key = expert * CHUNK + lane
    earlier = tl.zeros([PART, CHUNK], tl.int32)
    for start in range(0, CHUNK, PART):
        other = start + tl.arange(0, PART)
        other_key = _local_expert(indices_ptr, chunk * CHUNK + other, slots, E) * CHUNK + other
        # An earlier slot of the same expert has a key 1 to `lane` smaller, and no other slot has.
        distance = (key[None, :] - other_key[:, None] - 1).to(tl.uint32, bitcast=True)
        earlier += (distance < lane.to(tl.uint32)[None, :]).to(tl.int32)
    tl.store(rank_ptr + slot, tl.sum(earlier, axis=0), mask=slot < slots)
    counts = tl.histogram(expert, E_PAD, mask=expert >= 0)
    offs_e = tl.arange(0, E_PAD)
    tl.store(table_ptr + chunk * E + offs_e, counts, mask=offs_e < E)


@triton.jit
def scan_kernel(table_ptr, counts_ptr, chunks, E, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr):
    """Grid: ceil(E / BLOCK_E). One program owns BLOCK_E columns of the table and makes them exclusive sums, in place;
    it writes their totals.
    """
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, chunks, BLOCK_C):
        chunk = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
        mask = (chunk < chunks) & (offs_e < E)[None, :]
        at = table_ptr + chunk * E + offs_e[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + offs_e, total, mask=offs_e < E)


@triton.jit
def place_kernel(
    indices_ptr, table_ptr, counts_ptr, offsets_ptr, row_to_slot_ptr, slot_to_row_ptr, tile_to_expert_ptr,
    tile_to_row_ptr, num_tiles_ptr, slots, E, block_m, max_tiles,
    CHUNK: tl.constexpr, TILES: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: enough for all slots and all tiles. One program owns CHUNK slots, whose ranks it finds in slot_to_row, as
    many entries at the end of row_to_slot, and TILES tiles. The first one writes offsets and num_tiles as well.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, E_PAD)
    counts = tl.load(counts_ptr + offs_e, mask=offs_e < E, other=0)
    ends = tl.cumsum(counts, axis=0)
    offsets = ends - counts
    rows = tl.sum(counts, axis=0)
    tiles = (counts + block_m - 1) // block_m
    tile_ends = tl.cumsum(tiles, axis=0)
    num_tiles = tl.sum(tiles, axis=0)
    if pid == 0:
        tl.store(offsets_ptr + offs_e, offsets, mask=offs_e < E)
        tl.store(offsets_ptr + E, rows)
        tl.store(num_tiles_ptr, num_tiles)

    # Before the slots: after them AMD takes eight registers more.
    tile = (pid * TILES + tl.arange(0, TILES)).to(tl.int32)
    tile_offsets = tile_ends - tiles
    expert = tl.max(tl.where(tile_offsets[None, :] <= tile[:, None], offs_e[None, :], 0), axis=1)
    used = tile < num_tiles
    row = tl.gather(offsets, expert, axis=0) + (tile - tl.gather(tile_offsets, expert, axis=0)) * block_m
    tl.store(tile_to_expert_ptr + tile, tl.where(used, expert, -1), mask=tile < max_tiles)
    tl.store(tile_to_row_ptr + tile, tl.where(used, row, -1), mask=tile < max_tiles)

    slot = pid * CHUNK + tl.arange(0, CHUNK)
    expert = _local_expert(indices_ptr, slot, slots, E)
    local = expert >= 0
    some = tl.maximum(expert, 0)
    row = tl.gather(offsets, some, axis=0) + tl.load(table_ptr + pid * E + some, mask=local, other=0)
    row = tl.where(local, row + tl.load(slot_to_row_ptr + slot, mask=local, other=0), -1)
    tl.store(slot_to_row_ptr + slot, row, mask=slot < slots)
    tl.store(row_to_slot_ptr + row, slot.to(tl.int32), mask=local)
    tl.store(row_to_slot_ptr + slot, tl.full([CHUNK], -1, tl.int32), mask=(slot >= rows) & (slot < slots))


def build_plan(indices: torch.Tensor, experts: int, block_m: int) -> RoutingPlan:
    """The plan of `experts` experts, without waiting for the device.

    Args:
        indices: [T, top_k] integers; those outside [0, experts) are sentinels.
        experts: E. block_m: rows of a tile.

    Raises:
        TypeError, ValueError: indices of another kind or shape; experts or block_m below 1; 2^31 slots or more.

    Determinism: rows of an expert are in slot order; bits are equal on every run and device.
    """
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"indices: expected integers, got {indices.dtype}")
    if indices.dim() != 2 or indices.numel() >= 2**31:
        raise ValueError(f"indices: expected [T, top_k] with fewer than 2^31 slots, got shape {list(indices.shape)}")
    if experts < 1 or block_m < 1:
        raise ValueError(f"experts and block_m: expected at least 1, got {experts} and {block_m}")
    indices = indices.contiguous()
    slots, top_k = indices.numel(), indices.shape[1]
    chunks, bound = triton.cdiv(slots, _CHUNK), max_tiles(slots, experts, block_m)
    e_pad = max(64, triton.next_power_of_2(experts))  # a histogram has a bin for every lane of a warp
    wide = target(indices.device).arch == "interpreter"  # what its programs cost is their number
    part, block_e, tiles = (_CHUNK, 256, 256) if wide else (_PART, 8, _TILES)

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=indices.device)

    table, counts, offsets = new(chunks, experts), new(experts), new(experts + 1)
    row_to_slot, slot_to_row = new(slots), new(slots)
    tile_to_expert, tile_to_row, num_tiles = new(bound), new(bound), new(1)

    launch(
        "plan count", count_kernel, (chunks,), reads={"indices_ptr": indices},
        writes={"rank_ptr": slot_to_row, "table_ptr": table}, slots=slots, E=experts, CHUNK=_CHUNK, PART=part,
        E_PAD=e_pad,
    )  # fmt: skip
    launch(
        "plan scan", scan_kernel, (triton.cdiv(experts, block_e),), reads={"table_ptr": table},
        writes={"table_ptr": table, "counts_ptr": counts}, chunks=chunks, E=experts, BLOCK_C=_SCAN // block_e,
        BLOCK_E=block_e,
    )  # fmt: skip
    launch(
        "plan place", place_kernel, (max(1, chunks, triton.cdiv(bound, tiles)),),
        reads={"indices_ptr": indices, "table_ptr": table, "counts_ptr": counts, "slot_to_row_ptr": slot_to_row},
        writes={
            "offsets_ptr": offsets, "row_to_slot_ptr": row_to_slot, "slot_to_row_ptr": slot_to_row,
            "tile_to_expert_ptr": tile_to_expert, "tile_to_row_ptr": tile_to_row, "num_tiles_ptr": num_tiles,
        },
        slots=slots, E=experts, block_m=block_m, max_tiles=bound, CHUNK=_CHUNK, TILES=tiles, E_PAD=e_pad,
    )  # fmt: skip
    return RoutingPlan(
        counts, offsets, row_to_slot, slot_to_row, tile_to_expert, tile_to_row, num_tiles, block_m, top_k
    )
