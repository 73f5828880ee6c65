"""The K loop that the grouped products share: rows sorted by expert times the weights of their expert.

    acc[row] = a[row] @ b[expert of row]^T          fp32

`gate_up`, `project` and `dswiglu` are this loop and an epilogue each. A row of `a` may be gathered while it is loaded
(row r reads token row_to_slot[r] // top_k), so the T * top_k rows of x or dy never exist in memory.

What the operands are, and so how they multiply (d is the dtype of `a`):

| a, b | product | used for |
|---|---|---|
| d, d | d x d | BF16 training |
| e4m3 1x128, e4m3 128x128 | acc = fma(partial over 128 of K, scale_a * scale_b, acc) | FP8 forward, FP8 dgrad |
| e4m3 per row, e4m3 per row of b | acc += partial over 128 of K; times both scales at the end | channel FP8 forward |
| d, e4m3 | d x narrow(e4m3 * scale), as `dequantize_fp8` gives it | BF16 dgrad on dequantized weights |

FP8 partial sums leave the matrix unit every 128 of K on every target, because Ada's and Hopper's keeps about 14 bits
(`Report.unbroken_k` reads it in compiled code). The order of K is that of memory, BLOCK_K follows from the dtypes alone
and no K is split: a row's bits depend neither on the other rows nor on the tile.

Schedule: program p takes tiles p, p + grid, ... of the plan, columns innermost, so one expert's weights are read while
they are in cache. With `swap` the weights take the matrix unit's M side and the rows its N side, which may be 16: few
rows per expert do not leave the unit idle. `b` comes through a host tensor descriptor (TMA on sm90 and sm100) where
its strides allow one, otherwise through pointers.

A kernel takes `plan` and `strides` as named tuples, and all that is constant in a launch as one `Cut`.

Legend: R rows (routed slots), E experts, M N K of the product, I expert intermediate. Source: 1x128 by 128x128 is
DeepSeek-V3's, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ornith_moe.kernels.arithmetic import (
    bits_of,
    dot,
    float_of,
    narrow,
    scale_bits,
    stored_scale,
    widen,
)
from ornith_moe.kernels.launch import Product, target
from ornith_moe.kernels.plan import RoutingPlan
from ornith_moe.kernels.tiles import Tile
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import FP8_BLOCK

_FP8_BLOCK = tl.constexpr(FP8_BLOCK)
FP8 = torch.float8_e4m3fn


class PlanPointers(NamedTuple):
    """What a kernel reads of a `RoutingPlan`."""

    row_to_slot: torch.Tensor
    offsets: torch.Tensor
    tile_to_expert: torch.Tensor
    tile_to_row: torch.Tensor
    num_tiles: torch.Tensor


class Strides(NamedTuple):
    """Of `a` and its scale by rows; of `b` and its scale by expert, row and column. 0 where there is no scale."""

    a_m: int
    a_scale_m: int
    b_e: int
    b_n: int
    b_k: int
    b_scale_e: int
    b_scale_n: int
    b_scale_k: int


@dataclass(frozen=True)
class Cut:
    """The constants of a launch: how its product is cut into tiles, and how they are loaded and multiplied.

    Attributes:
        plan_m: rows of the plan's tiles; block_m divides it.
        block_m, block_n, block_k: rows, columns and depth of a product of the matrix unit.
        pair: a tile has a second half of block_n columns, with an accumulator of its own.
        top_k: rows of `a` are tokens, each gathered for that many slots; 0: they are in the plan's order.
        scales: "block", "channel", or for FP8 weights of a wider `a` "dequantize block" or "dequantize channel"; None.
        swap, late: see `tiles.Tile`.
        even: tiles divide the product, so loads of `a` and `b` need no mask.
        a_tma: `a` is a descriptor. b_tma: the side that the descriptor `b` is contiguous in, "k" or "n", or None for a
            pointer.
        wide: offsets into `a` need 64 bits.
    """

    plan_m: int
    block_m: int
    block_n: int
    block_k: int
    pair: bool
    top_k: int
    scales: str | None
    swap: bool
    late: bool
    even: bool
    a_tma: bool
    b_tma: str | None
    wide: bool


@triton.jit
def tiles_of(plan, columns, CUT: tl.constexpr):
    """How many tiles the programs share, where each row of tiles has `columns`."""
    PARTS: tl.constexpr = CUT.plan_m // CUT.block_m
    return tl.load(plan.num_tiles) * PARTS * columns


@triton.jit
def tile_at(i, plan, columns, CUT: tl.constexpr):
    """(expert, first row, which column) of tile i. Of a tile that is cut into parts the last may lie past the rows."""
    PARTS: tl.constexpr = CUT.plan_m // CUT.block_m
    tile = i // (PARTS * columns)
    e = tl.load(plan.tile_to_expert + tile)
    row = tl.load(plan.tile_to_row + tile) + i // columns % PARTS * CUT.block_m
    return e, row, i % columns


@triton.jit
def rows_of(plan, e, row, CUT: tl.constexpr):
    """[BLOCK_M] rows of the expert from `row` on.

    Those past its last repeat it: loads need no mask, and what they give is not stored.
    """
    return tl.minimum(row + tl.arange(0, CUT.block_m), tl.load(plan.offsets + e + 1) - 1)


@triton.jit
def place(plan, e, row, offs_m, n, N, CUT: tl.constexpr):
    """Rows m [BLOCK_M, 1] and columns [1, BLOCK_N] counted from the tile's first, the mask of the rows, and of both.

    Offsets from the tile's first row and column have 32 bits. The rows that are left are read from the plan again, so
    that the compiler does not hold them through the K loop.
    """
    offs_n = tl.arange(0, CUT.block_n)[None, :]
    mask_m = tl.arange(0, CUT.block_m)[:, None] < tl.load(plan.offsets + e + 1) - row
    mask = mask_m if CUT.even else mask_m & (n + offs_n < N)
    return (offs_m - row)[:, None], offs_n, mask_m, mask


@triton.jit
def _load_a(a, a_offs, row, k, K, CUT: tl.constexpr):
    if CUT.a_tma:
        return a.load([row, k])
    elif CUT.even:
        return tl.load(a + k + a_offs)
    else:
        return tl.load(a + k + a_offs, mask=(k + tl.arange(0, CUT.block_k) < K)[None, :], other=0.0)


@triton.jit
def _load_b(b, e, n, k, N, K, strides, CUT: tl.constexpr):
    """b[e] at rows n, columns k, as [BLOCK_K, BLOCK_N]."""
    if CUT.b_tma == "k":
        return b.load([e * N + n, k]).T
    elif CUT.b_tma == "n":
        return b.load([e * K + k, n])
    else:
        offs_n, offs_k = n + tl.arange(0, CUT.block_n), k + tl.arange(0, CUT.block_k)
        ptrs = b + e.to(tl.int64) * strides.b_e + offs_k[:, None] * strides.b_k + offs_n[None, :] * strides.b_n
        if CUT.even:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs_k < K)[:, None] & (offs_n < N)[None, :], other=0.0)


@triton.jit
def _load_block_scale(ptr, n, k, strides):
    return stored_scale(tl.load(ptr + n // _FP8_BLOCK * strides.b_scale_n + k // _FP8_BLOCK * strides.b_scale_k))


@triton.jit
def _multiply_add(a, b, acc, CUT: tl.constexpr):
    if CUT.swap:
        return dot(b.T, a.T, acc)
    else:
        return dot(a, b, acc)


@triton.jit
def _scaled_add(partial, row_scale, acc, CUT: tl.constexpr):
    """acc + partial * scale of its row, rounded once."""
    s = row_scale[None, :] if CUT.swap else row_scale[:, None]
    return tl.fma(partial, tl.broadcast_to(s, partial.shape), acc)


@triton.jit
def _promoted_add(partial, acc):
    """acc + partial, outside the matrix unit. Triton folds `acc += dot(a, b)` into dot(a, b, acc), but no fma."""
    return tl.fma(partial, tl.full(partial.shape, 1.0, tl.float32), acc)


@triton.jit
def multiply(
    a, a_scale_ptr, b, b_scale_ptr, plan, strides, e, row, offs_m, n, second, N, K, CUT: tl.constexpr
):  # fmt: skip
    """(acc, up) [BLOCK_M, BLOCK_N] fp32: the rows `offs_m`, from `row` on, by rows n, n + 1, ... of b[e] [N, K], and
    with `pair` by those from n + second on; without, acc twice.
    """
    SCALES: tl.constexpr = CUT.scales
    source = tl.load(plan.row_to_slot + offs_m) // CUT.top_k if CUT.top_k else offs_m
    if CUT.wide:
        source = source.to(tl.int64)
    offs_k = tl.arange(0, CUT.block_k)
    a_offs = source[:, None] * strides.a_m + offs_k[None, :]
    sb_ptr = b_scale_ptr + e * strides.b_scale_e if SCALES is not None else b_scale_ptr

    shape: tl.constexpr = [CUT.block_n, CUT.block_m] if CUT.swap else [CUT.block_m, CUT.block_n]
    acc = tl.zeros(shape, tl.float32)
    if CUT.pair:
        up = tl.zeros(shape, tl.float32)
    if CUT.late:
        # A shape with a name of its own: within the call Triton 3.6 makes a plain int of it, and asks that for a type.
        rows: tl.constexpr = [CUT.block_m]
        partial, partial_scale = tl.zeros(shape, tl.float32), tl.zeros(rows, tl.float32)
    for k in range(0, K, CUT.block_k):
        tile_a = _load_a(a, a_offs, row, k, K, CUT)
        tile_b = _load_b(b, e, n, k, N, K, strides, CUT)
        if CUT.pair:
            tile_up = _load_b(b, e, n + second, k, N, K, strides, CUT)
        if SCALES == "block":
            row_scale = stored_scale(tl.load(a_scale_ptr + source * strides.a_scale_m + k // _FP8_BLOCK))
            scale = row_scale * _load_block_scale(sb_ptr, n, k, strides)
            if CUT.pair:
                scale_up = row_scale * _load_block_scale(sb_ptr, n + second, k, strides)
            if CUT.late:  # a partial sum is added while the next product runs; the order of the sums is the same
                partial_gate = _multiply_add(tile_a, tile_b, None, CUT)
                up = _scaled_add(partial, partial_scale, up, CUT)
                partial = _multiply_add(tile_a, tile_up, None, CUT)
                acc = _scaled_add(partial_gate, scale, acc, CUT)
                partial_scale = scale_up
            else:
                acc = _scaled_add(_multiply_add(tile_a, tile_b, None, CUT), scale, acc, CUT)
                if CUT.pair:
                    up = _scaled_add(_multiply_add(tile_a, tile_up, None, CUT), scale_up, up, CUT)
        elif SCALES == "channel":
            acc = _promoted_add(_multiply_add(tile_a, tile_b, None, CUT), acc)
            if CUT.pair:
                up = _promoted_add(_multiply_add(tile_a, tile_up, None, CUT), up)
        else:
            if SCALES == "dequantize block":
                tile_b = narrow(widen(tile_b) * _load_block_scale(sb_ptr, n, k, strides), tile_a.dtype)
                if CUT.pair:
                    tile_up = narrow(widen(tile_up) * _load_block_scale(sb_ptr, n + second, k, strides), tile_a.dtype)
            elif SCALES == "dequantize channel":
                sb = stored_scale(tl.load(sb_ptr + (k + offs_k) * strides.b_scale_k, mask=k + offs_k < K, other=0.0))
                tile_b = narrow(widen(tile_b) * sb[:, None], tile_a.dtype)
                if CUT.pair:
                    tile_up = narrow(widen(tile_up) * sb[:, None], tile_a.dtype)
            acc = _multiply_add(tile_a, tile_b, acc, CUT)
            if CUT.pair:
                up = _multiply_add(tile_a, tile_up, up, CUT)

    if CUT.late:
        up = _scaled_add(partial, partial_scale, up, CUT)
    if CUT.swap:
        acc = acc.T
        if CUT.pair:
            up = up.T
    if SCALES == "channel":
        row_scale = _row_scale(a_scale_ptr, plan, strides, e, row, offs_m, CUT)
        acc *= row_scale * _column_scale(sb_ptr, n, N, strides, CUT)
        if CUT.pair:
            up *= row_scale * _column_scale(sb_ptr, n + second, N, strides, CUT)
    if CUT.pair:
        return acc, up
    else:
        return acc, acc


@triton.jit
def _row_scale(a_scale_ptr, plan, strides, e, row, offs_m, CUT: tl.constexpr):
    """[BLOCK_M, 1]"""
    if CUT.top_k:
        source = tl.load(plan.row_to_slot + row + (offs_m - row)[:, None]) // CUT.top_k
    else:  # `project`, which reads its rows again too
        source = rows_of(plan, e, row, CUT)[:, None]
    return tl.load(a_scale_ptr + source * strides.a_scale_m)


@triton.jit
def _column_scale(sb_ptr, n, N, strides, CUT: tl.constexpr):
    """[1, BLOCK_N]"""
    offs_n = n + tl.arange(0, CUT.block_n)[None, :]
    return stored_scale(tl.load(sb_ptr + offs_n * strides.b_scale_n, mask=offs_n < N, other=0.0))


@triton.jit
def scale_of_rows(x, SHIFT: tl.constexpr):
    """fp32 [rows, 1] scales of the rows of fp32 `x`."""
    return float_of(scale_bits(tl.max(bits_of(x) & 0x7FFFFFFF, axis=1, keep_dims=True), SHIFT))


@triton.jit
def store_scale(ptr, s, mask, SHIFT: tl.constexpr):
    tl.store(ptr, (bits_of(s) >> SHIFT).to(ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Grouped:
    """What the launch of a grouped product consists of, apart from its epilogue."""

    kind: str  # of operands, for labels
    grid: tuple[int]
    reads: dict[str, Any]
    arguments: dict[str, Any]  # strides, K, CUT, and the launch options
    product: Product


def grouped(
    a: torch.Tensor, a_scale: torch.Tensor | None, weights: Operand, plan: RoutingPlan, tile: Tile, *,
    columns: int, block_n: int, gather: bool, pair: bool = False, first: int = 0,
) -> Grouped:  # fmt: skip
    """The product of rows with `columns` rows of each expert's weights from `first` on.

    Args:
        a: [R, K] in the plan's order or with `gather` [T, K]; `a_scale` where it is e4m3.
        block_n, pair: a tile owns block_n columns, with `pair` twice as many.
    """
    _, rows_b, k = weights.value.shape
    scales = _scales(a, weights)
    step, block_m = block_k(a.dtype, weights.value.dtype), min(tile.block_m or plan.block_m, plan.block_m)
    width = block_n * (1 + pair)
    # Without TMA a descriptor becomes pointers whose masks take four times the instructions of the product.
    tma = _contiguous_side(weights.value, step) if target(a.device).tma else None
    # Rows in the order of the plan are a matrix; a tile that reaches past its expert reads rows that it does not store.
    a_tma = tma is not None and not gather and len(a) > 0 and a.stride(1) == 1
    a_tma = a_tma and a.stride(0) * a.element_size() % 16 == 0
    cut = Cut(
        plan_m=plan.block_m, block_m=block_m, block_n=block_n, block_k=step, pair=pair,
        top_k=plan.top_k if gather else 0, scales=scales, swap=tile.swap, late=tile.late and pair and scales == "block",
        even=k % step == 0 and columns % width == 0, a_tma=a_tma, b_tma=tma, wide=a.numel() >= 2**31,
    )  # fmt: skip
    strides = Strides(
        a.stride(0), 0 if a_scale is None else a_scale.stride(0), *weights.value.stride(),
        *((0, 0, 0) if weights.scale is None else weights.scale.stride()),
    )  # fmt: skip
    processors = target(a.device).processors * max(1, 8 // tile.num_warps)
    product = Product(
        size=(None, columns, k), tile=(block_m, width, step), operands=("a", "b"), unit_bytes=a.element_size(),
        gathered={"a": cut.top_k}, of_experts=dict.fromkeys(("b", "b_scale_ptr"), columns / rows_b), first=first,
    )  # fmt: skip
    return Grouped(
        kind=_kind(a, weights.value),
        grid=(min(processors, plan.tile_to_expert.numel() * triton.cdiv(columns, width)),),
        reads={
            "a": TensorDescriptor(a, list(a.shape), [a.stride(0), 1], [block_m, step]) if a_tma else a,
            "a_scale_ptr": _bits(a_scale),
            "b": _descriptor(weights.value, tma, block_n, step),
            "b_scale_ptr": _bits(weights.scale),
            "plan": PlanPointers(plan.row_to_slot, plan.offsets, plan.tile_to_expert, plan.tile_to_row, plan.num_tiles),
        },
        arguments={"strides": strides, "K": k, "CUT": cut, "num_warps": tile.num_warps, "num_stages": tile.num_stages},
        product=product,
    )


def _kind(a: torch.Tensor, b: torch.Tensor) -> str:
    return "fp8" if a.dtype == FP8 else "fp8 weights" if b.dtype == FP8 else {2: "bf16", 4: "fp32"}[a.element_size()]


def _scales(a: torch.Tensor, weights: Operand) -> str | None:
    if weights.scale is None:
        return None
    scales = ("" if a.dtype == FP8 else "dequantize ") + ("channel" if weights.per_row else "block")
    if scales == "dequantize channel" and weights.scale.shape[2] != weights.value.shape[2]:
        raise AssertionError(f"weights are dequantized by a scale per column of K, got {list(weights.scale.shape)}")
    return scales


def columns_of(tile: Tile, columns: int) -> int:
    """Columns of an accumulator, of a product that may have fewer."""
    return max(min(tile.block_n, triton.next_power_of_2(columns)), 16)


def group_of(tile: Tile) -> int:
    """Columns of an accumulator whose epilogue quantizes: those that share a scale."""
    if tile.block_n != FP8_BLOCK:
        raise AssertionError(f"an epilogue that quantizes owns {FP8_BLOCK} columns, the tile has {tile.block_n}")
    return FP8_BLOCK


def block_k(a_dtype: torch.dtype, b_dtype: torch.dtype) -> int:
    """Columns of K per step, from the dtypes alone: it is part of the numerics."""
    return 128 if a_dtype == b_dtype == FP8 else 64 if a_dtype.itemsize < 4 else 32


def new_scale(rows: torch.Tensor, columns: int, ue8m0: bool) -> torch.Tensor:
    """Memory for a scale per row and 128 columns, in the integers that carry its bits."""
    return rows.new_empty(rows.shape[0], triton.cdiv(columns, FP8_BLOCK), dtype=torch.uint8 if ue8m0 else torch.int32)


def as_scale(scale: torch.Tensor | None) -> torch.Tensor | None:
    """The scales whose bits such memory carries."""
    if scale is None:
        return None
    return scale.view(torch.float8_e8m0fnu if scale.dtype == torch.uint8 else torch.float32)


def _contiguous_side(b: torch.Tensor, step: int) -> str | None:
    """ "k" or "n" where a descriptor can load [E, N, K] weights whole, None where pointers must."""
    aligned = b.data_ptr() % 16 == 0
    if b.stride(2) == 1 and b.stride(0) == b.shape[1] * b.stride(1):
        return "k" if aligned and b.stride(1) * b.element_size() % 16 == 0 else None
    # A tile that leaves the K of its expert would multiply the next one's weights, NaN included, by zero.
    if b.stride(1) == 1 and b.stride(0) == b.shape[2] * b.stride(2) and b.shape[2] % step == 0:
        return "n" if aligned and b.stride(2) * b.element_size() % 16 == 0 else None
    return None


def _descriptor(b: torch.Tensor, side: str | None, block_n: int, step: int) -> torch.Tensor | TensorDescriptor:
    experts, n, k = b.shape
    if side == "k":
        return TensorDescriptor(b, [experts * n, k], [b.stride(1), 1], [block_n, step])
    if side == "n":
        return TensorDescriptor(b, [experts * k, n], [b.stride(2), 1], [step, block_n])
    return b


def _bits(scale: torch.Tensor | None) -> torch.Tensor | None:
    """UE8M0 as bytes: Triton has no such type."""
    return scale.view(torch.uint8) if scale is not None and scale.dtype == torch.float8_e8m0fnu else scale
