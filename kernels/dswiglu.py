"""Backward of w * down(silu(gate) * up) up to the pre-activation, rows sorted by expert.

    da' = dy[token of row] @ down[expert of row],  a' = silu(gate) * up from the saved pre = [gate, up]

    dweights = <da', a'>,  wa = w * a',  dpre = [w * da' * up * silu'(gate),  w * da' * silu(gate)]

a' is computed as in `gate_up`, rounded to d and, where the forward quantized it, cast and dequantized again: its bits
are the forward's. dweights comes as partial sums, one for each tile of columns. FP8 leaves from the epilogue: dpre may
be quantized 1x128 for the gradient of x.

Legend: T tokens, R rows (routed slots), E experts, H hidden, I expert intermediate. Source: the router gradient from
<da', a'> is SonicMoE's (Guo et al. 2025); products and operands are those of `mainloop`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import divide_by_scale, e4m3_code, e4m3_value, narrow, widen
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
from ornith_moe.quant.recipes import FP8_BLOCK, Cast

_FP8_BLOCK = tl.constexpr(FP8_BLOCK)


@triton.jit
def dswiglu_kernel(
    a, a_scale_ptr, b, b_scale_ptr, dpre_ptr, act_scale_ptr, pre_ptr, weights_ptr, wa_ptr, dweights_ptr,
    dpre_code_ptr, dpre_scale_ptr, plan, I, K, strides,
    QUANTIZE: tl.constexpr, SHIFT: tl.constexpr, SAVE: tl.constexpr, DPRE_FP8: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """The backward of the activation from rows of a = dy by b[e] [I, K], the transposed down projection.

    Grid: any; programs share the tiles. A program owns a tile of BLOCK_M rows of one expert by BLOCK_N columns of I. It
    writes once, without atomics, so runs are bitwise equal: the tile and its up half of dpre [R, 2I], its sums in
    dweights [R, ceil(I / BLOCK_N)], with SAVE the tile of wa [R, I], and with DPRE_FP8 e4m3 of dpre and its scales
    [R, 2 * ceil(I / 128)].
    """
    columns = tl.cdiv(I, CUT.block_n)
    for i in tl.range(tl.program_id(0), tiles_of(plan, columns, CUT), tl.num_programs(0)):
        e, row, column = tile_at(i, plan, columns, CUT)
        n = column * CUT.block_n
        if row < tl.load(plan.offsets + e + 1):
            offs_m = rows_of(plan, e, row, CUT)
            acc, _ = multiply(a, a_scale_ptr, b, b_scale_ptr, plan, strides, e, row, offs_m, n, 0, I, K, CUT)
            m, offs_n, mask_m, mask = place(plan, e, row, offs_m, n, I, CUT)
            first = row.to(tl.int64) * I + n
            dtype: tl.constexpr = pre_ptr.dtype.element_ty
            gate_ptr = pre_ptr + first + row.to(tl.int64) * I
            offs_2n = m * (2 * I) + offs_n
            gate = widen(tl.load(gate_ptr + offs_2n, mask=mask, other=0.0))
            up = widen(tl.load(gate_ptr + I + offs_2n, mask=mask, other=0.0))
            weight = tl.load(weights_ptr + tl.load(plan.row_to_slot + row + m))
            out = widen(narrow(gate / (1.0 + tl.exp(-gate)) * up, dtype))  # written as in gate_up, for the same bits
            if QUANTIZE is not None:
                if QUANTIZE == "group":
                    s = scale_of_rows(out, SHIFT)
                else:
                    s = tl.load(act_scale_ptr + row + m, mask=mask_m, other=1.0)
                out = widen(narrow(e4m3_value(e4m3_code(divide_by_scale(out, s))) * s, dtype))
            if SAVE:
                tl.store(wa_ptr + first + (m * I + offs_n), narrow(out * weight, dtype), mask=mask)
            # da' of a row past the last is another row's: it only reaches values that the masks drop.
            acc = tl.where(mask, acc, 0.0)
            tl.store(dweights_ptr + (row.to(tl.int64) + m) * columns + column,
                     tl.sum(acc * out, axis=1, keep_dims=True), mask=mask_m)  # fmt: skip
            acc *= weight
            # gate and up are read twice, from L1 the second time: kept in registers, sm90 and sm100 spill.
            gate = widen(tl.load(gate_ptr + offs_2n, mask=mask, other=0.0))
            sigmoid = 1.0 / (1.0 + tl.exp(-gate))
            silu = gate * sigmoid
            # The slope before `up` is there, `dup` after: else gfx950 takes 4 registers more, gfx942 17 or 32.
            slope = sigmoid + silu * (1.0 - sigmoid)
            up = widen(tl.load(gate_ptr + I + offs_2n, mask=mask, other=0.0))
            dup = narrow(acc * silu, dtype)
            dgate = narrow(acc * up * slope, dtype)
            dgate_ptr = dpre_ptr + first + row.to(tl.int64) * I
            tl.store(dgate_ptr + offs_2n, dgate, mask=mask)
            tl.store(dgate_ptr + I + offs_2n, dup, mask=mask)
            if DPRE_FP8:
                groups = tl.cdiv(I, _FP8_BLOCK)
                code_ptr = dpre_code_ptr + first + row.to(tl.int64) * I
                scale_ptr = dpre_scale_ptr + (2 * row.to(tl.int64) * groups + n // _FP8_BLOCK) + m * (2 * groups)
                s = scale_of_rows(widen(dgate), SHIFT)
                store_scale(scale_ptr, s, mask_m, SHIFT)
                tl.store(code_ptr + offs_2n, e4m3_code(divide_by_scale(widen(dgate), s)), mask=mask)
                s = scale_of_rows(widen(dup), SHIFT)
                store_scale(scale_ptr + groups, s, mask_m, SHIFT)
                tl.store(code_ptr + I + offs_2n, e4m3_code(divide_by_scale(widen(dup), s)), mask=mask)


def dswiglu(
    dy: torch.Tensor, dy_scale: torch.Tensor | None, weights: Operand, pre: torch.Tensor,
    routing_weights: torch.Tensor, plan: RoutingPlan, tile: Tile, *,
    save_wa: bool, quantize: Cast | None = None, a_scale: torch.Tensor | None = None, dpre_fp8: bool = False,
    ue8m0: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Backward of w * down(silu(gate) * up) up to the pre-activation.

    Args:
        dy: [T, H] in d or e4m3 with `dy_scale`.
        weights: [E, I, H], the transposed down projection.
        pre: [R, 2I] as `gate_up` saved it. routing_weights: [T * top_k] fp32.
        save_wa: also give wa = w * a'.
        quantize: how the forward quantized a', with its `a_scale` [R] if that was by row; then a' stands for the
            dequantized values, and the cast passes gradients through.
        dpre_fp8: also give dpre in e4m3, 1x128.
        ue8m0: scales of groups are UE8M0: those of a', as in the forward, and of dpre.
    Returns:
        dpre [R, 2I], wa [R, I] or None, partial dweights [R, tiles] to be summed, dpre in e4m3 and its scale, or None.
    """
    rows, inner = pre.shape[0], pre.shape[1] // 2
    block_n = group_of(tile) if quantize or dpre_fp8 else columns_of(tile, inner)
    dpre = torch.empty_like(pre)
    wa = pre.new_empty(rows if save_wa else 0, inner)
    partial = pre.new_empty(rows, triton.cdiv(inner, tile.block_n), dtype=torch.float32)
    code = pre.new_empty(rows, 2 * inner, dtype=torch.uint8) if dpre_fp8 else None
    code_scale = None if code is None else new_scale(code, 2 * inner, ue8m0)
    work = grouped(dy, dy_scale, weights, plan, tile, columns=inner, block_n=block_n, gather=True)
    launch(
        f"dswiglu {work.kind}", dswiglu_kernel, work.grid,
        reads={**work.reads, "act_scale_ptr": a_scale, "pre_ptr": pre, "weights_ptr": routing_weights},
        writes={"dpre_ptr": dpre, "wa_ptr": wa, "dweights_ptr": partial, "dpre_code_ptr": code,
                "dpre_scale_ptr": code_scale},
        product=work.product, I=inner, **work.arguments,
        QUANTIZE=None if quantize is None else "row" if quantize[1] is None else "group",
        SHIFT=23 if ue8m0 else 0, SAVE=save_wa, DPRE_FP8=dpre_fp8,
    )  # fmt: skip
    dpre_q = None if code is None else code.view(FP8)
    return dpre, wa if save_wa else None, partial, dpre_q, as_scale(code_scale)
