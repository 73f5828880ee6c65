"""Rows times weights, and nothing else: down in the forward, the gradient of x in the backward.

    out[row] = a[row] @ weights[expert of row]^T          in the dtype of out

Legend: R rows (routed slots), E experts, N K of the weights, W columns of a strip. Source: "original"; products and
operands are those of `mainloop`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import narrow
from ornith_moe.kernels.launch import launch
from ornith_moe.kernels.mainloop import columns_of, grouped, multiply, place, rows_of, tile_at, tiles_of
from ornith_moe.kernels.plan import RoutingPlan
from ornith_moe.kernels.tiles import Tile
from ornith_moe.quant.operand import Operand


@triton.jit
def project_kernel(
    a, a_scale_ptr, b, b_scale_ptr, out_ptr, plan, W, N, K, n_first, strides, CUT: tl.constexpr
):  # fmt: skip
    """out = rows of a by the W rows of b[e] [N, K] from n_first on.

    Grid: any; programs share the tiles. A program owns a tile of BLOCK_M rows of one expert by BLOCK_N columns, with
    `pair` 2 * BLOCK_N, and writes it to out [R, W] once, without atomics, so runs are bitwise equal.
    """
    BLOCK_N: tl.constexpr = CUT.block_n
    STEP_N: tl.constexpr = 2 * CUT.block_n if CUT.pair else CUT.block_n
    columns = tl.cdiv(W, STEP_N)
    for i in tl.range(tl.program_id(0), tiles_of(plan, columns, CUT), tl.num_programs(0)):
        e, row, column = tile_at(i, plan, columns, CUT)
        n = column * STEP_N
        if row < tl.load(plan.offsets + e + 1):
            offs_m = rows_of(plan, e, row, CUT)
            acc, more = multiply(
                a, a_scale_ptr, b, b_scale_ptr, plan, strides, e, row, offs_m, n_first + n, BLOCK_N, N, K, CUT
            )
            if CUT.scales == "channel":  # held through the K loop, the rows take 41 registers more (sm90)
                offs_m = rows_of(plan, e, row, CUT)
            m, offs_n, mask_m, mask = place(plan, e, row, offs_m, n, W, CUT)
            tile_ptr = out_ptr + (row.to(tl.int64) * W + n)
            tl.store(tile_ptr + (m * W + offs_n), narrow(acc, out_ptr.dtype.element_ty), mask=mask)
            if CUT.pair:
                if not CUT.even:
                    mask = mask_m & (n + BLOCK_N + offs_n < W)
                more = narrow(more, out_ptr.dtype.element_ty)
                tl.store(tile_ptr + (m * W + BLOCK_N + offs_n), more, mask=mask)


def project(
    product: str, a: torch.Tensor, a_scale: torch.Tensor | None, weights: Operand, plan: RoutingPlan, tile: Tile,
    first: int, out: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """out = a @ weights[first : first + W]^T for every routed row; a [R, K], weights [E, N, K], out [R, W].

    `product` names what it is for, "down" or "dx".
    """
    width, block_n = out.shape[1], columns_of(tile, out.shape[1])
    work = grouped(
        a, a_scale, weights, plan, tile, columns=width, block_n=block_n, gather=False,
        pair=tile.pair and width >= 2 * block_n, first=first,
    )  # fmt: skip
    launch(
        f"{product} {work.kind}", project_kernel, work.grid, reads=work.reads, writes={"out_ptr": out},
        product=work.product, W=width, N=weights.value.shape[1], n_first=first, **work.arguments,
    )  # fmt: skip
    return out
