"""The first product of the experts and their activation: a' = silu(x @ gate^T) * (x @ up^T), rows sorted by expert.

    gate, up = x[token of row] @ gate_up[expert of row]^T,  pre = [gate, up] in d,  a' = silu(gate) * up in d

`pre` and a' are rounded to d, the dtype of x, before anything is computed from them. That makes the a' which backward
recomputes from the saved `pre` the forward's, and matches engines that store the activation in BF16. FP8 leaves from
the epilogue: a' may be quantized 1x128, because a program owns whole groups.

Legend: T tokens, R rows (routed slots), E experts, H hidden, I expert intermediate. Source: "original"; products and
operands are those of `mainloop`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import divide_by_scale, e4m3_code, narrow, widen
from ornith_moe.kernels.launch import launch
from ornith_moe.kernels.mainloop import (
    FP8,
    as_scale,
    columns_of,
    group_of,
    grouped,
    multiply,
    new_scale,
    place,
    rows_of,
    scale_of_rows,
    store_scale,
    tile_at,
    tiles_of,
)
from ornith_moe.kernels.plan import RoutingPlan
from ornith_moe.kernels.tiles import Tile
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import FP8_BLOCK

_FP8_BLOCK = tl.constexpr(FP8_BLOCK)


@triton.jit
def gate_up_kernel(
    a, a_scale_ptr, b, b_scale_ptr, out_ptr, out_scale_ptr, pre_ptr, plan, I, K, strides,
    QUANTIZE: tl.constexpr, SHIFT: tl.constexpr, SAVE: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """out = silu(gate) * up of rows of a by b[e] [2I, K], gate rows first.

    Grid: any; programs share the tiles. A program owns a tile of BLOCK_M rows of one expert by BLOCK_N columns of I. It
    writes once, without atomics, so runs are bitwise equal: that tile of out [R, I], with QUANTIZE as e4m3 with a scale
    for each row of the tile in out_scale [R, ceil(I / 128)], and with SAVE the tile and its up half of pre [R, 2I].
    """
    columns = tl.cdiv(I, CUT.block_n)
    for i in tl.range(tl.program_id(0), tiles_of(plan, columns, CUT), tl.num_programs(0)):
        e, row, column = tile_at(i, plan, columns, CUT)
        n = column * CUT.block_n
        if row < tl.load(plan.offsets + e + 1):
            offs_m = rows_of(plan, e, row, CUT)
            gate, up = multiply(a, a_scale_ptr, b, b_scale_ptr, plan, strides, e, row, offs_m, n, I, 2 * I, K, CUT)
            m, offs_n, mask_m, mask = place(plan, e, row, offs_m, n, I, CUT)
            first = row.to(tl.int64) * I + n
            dtype: tl.constexpr = pre_ptr.dtype.element_ty
            gate, up = narrow(gate, dtype), narrow(up, dtype)
            if SAVE:
                gate_ptr = pre_ptr + first + row.to(tl.int64) * I
                tl.store(gate_ptr + (m * (2 * I) + offs_n), gate, mask=mask)
                tl.store(gate_ptr + I + (m * (2 * I) + offs_n), up, mask=mask)
            gate = widen(gate)
            out = narrow(gate / (1.0 + tl.exp(-gate)) * widen(up), dtype)
            if QUANTIZE:
                groups = tl.cdiv(I, _FP8_BLOCK)
                s = scale_of_rows(tl.where(mask, widen(out), 0.0), SHIFT)
                store_scale(
                    out_scale_ptr + (row.to(tl.int64) * groups + n // _FP8_BLOCK) + m * groups, s, mask_m, SHIFT
                )
                tl.store(out_ptr + first + (m * I + offs_n), e4m3_code(divide_by_scale(widen(out), s)), mask=mask)
            else:
                tl.store(out_ptr + first + (m * I + offs_n), out, mask=mask)


def gate_up(
    x: torch.Tensor, x_scale: torch.Tensor | None, weights: Operand, plan: RoutingPlan, tile: Tile, *,
    save: bool, quantize: bool = False, ue8m0: bool = False, dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """a' = silu(x @ gate^T) * (x @ up^T) for every routed row of x.

    Args:
        x: [T, H] in d or e4m3, `x_scale` [T, H / 128] or [T, 1] with it, else None.
        weights: [E, 2I, H], gate rows first.
        plan, tile: what to compute and how.
        save: also give `pre` [R, 2I] in d.
        quantize: give a' in e4m3 with scales 1x128, UE8M0 ones with `ue8m0`, instead of in d.
        dtype: d; that of x unless x is e4m3.
    Returns:
        a' [R, I], its scale [R, I / 128] or None, pre [R, 2I] or None. R counts all slots; the rows past the routed
        ones are not written.
    """
    rows, inner = plan.row_to_slot.numel(), weights.value.shape[1] // 2
    dtype = dtype or x.dtype
    pre = x.new_empty(rows if save else 0, 2 * inner, dtype=dtype)
    a = x.new_empty(rows, inner, dtype=torch.uint8 if quantize else dtype)
    scale = new_scale(a, inner, ue8m0) if quantize else None
    block_n = group_of(tile) if quantize else columns_of(tile, inner)
    work = grouped(x, x_scale, weights, plan, tile, columns=2 * inner, block_n=block_n, gather=True, pair=True)
    launch(
        f"gate_up {work.kind}", gate_up_kernel, work.grid, reads=work.reads,
        writes={"out_ptr": a, "out_scale_ptr": scale, "pre_ptr": pre}, product=work.product, I=inner, **work.arguments,
        QUANTIZE=quantize, SHIFT=23 if quantize and ue8m0 else 0, SAVE=save,
    )  # fmt: skip
    return a.view(FP8) if quantize else a, as_scale(scale), pre if save else None
