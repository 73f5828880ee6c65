"""Combine: each token adds the rows of its slots, in slot order.

    y[t] = sum over k = 0, 1, ... of weights[t, k] * rows[slot_to_row[t * top_k + k]]        fp32, one rounding

A token owns its sum, so there is no atomic and no other order. A sentinel (row -1) is not read and adds nothing. The
backward of the weighted sum has no kernel of its own: dy is gathered, and weighted, where `dswiglu` loads it, and
dweights = <dy, row> is taken there as <da', a'>; `sum_slots` only finishes its partial sums. Without weights the same
sum is the backward of the gather of x.

Legend: T tokens, R rows, W columns.
"""

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import narrow, widen
from ornith_moe.kernels.launch import launch, target
from ornith_moe.kernels.plan import RoutingPlan


@triton.jit
def combine_kernel(
    rows_ptr, slot_to_row_ptr, weights_ptr, y_ptr, T, W, stride_y,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Grid: ceil(T / BLOCK_T) * ceil(W / BLOCK_W). One program owns a tile of y. rows [R, W] is contiguous."""
    pid, columns = tl.program_id(0), tl.cdiv(W, BLOCK_W)
    t = pid // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    w = pid % columns * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    inside = (t < T)[:, None] & (w < W)
    acc = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
    for k in tl.static_range(TOP_K):
        slot = t * TOP_K + k
        row = tl.load(slot_to_row_ptr + slot, mask=t < T, other=-1)
        mask = inside & (row >= 0)[:, None]
        values = widen(tl.load(rows_ptr + row.to(tl.int64)[:, None] * W + w, mask=mask, other=0.0))
        if WEIGHTED:
            # A masked row is 0 and must stay so beside an infinite weight.
            weight = tl.load(weights_ptr + slot, mask=(t < T) & (row >= 0), other=0.0)
            values *= weight[:, None]
        acc += values
    tl.store(y_ptr + t.to(tl.int64)[:, None] * stride_y + w, narrow(acc, y_ptr.dtype.element_ty), mask=inside)


def combine(rows: torch.Tensor, plan: RoutingPlan, weights: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """y [T, W] (rows of any stride) from rows [R, W]; weights [T, top_k] fp32, or None for a plain sum."""
    (tokens, width), top_k = y.shape, plan.top_k
    block_w = min(256, triton.next_power_of_2(width))
    block_t = max(1, (8192 if target(y.device).arch == "interpreter" else 1024) // block_w)
    grid = triton.cdiv(tokens, block_t) * triton.cdiv(width, block_w)
    launch(
        "combine" if weights is not None else "combine dx", combine_kernel, (grid,),
        reads={"rows_ptr": rows, "slot_to_row_ptr": plan.slot_to_row, "weights_ptr": weights}, writes={"y_ptr": y},
        T=tokens, W=width, stride_y=y.stride(0), TOP_K=top_k, WEIGHTED=weights is not None, BLOCK_T=block_t,
        BLOCK_W=block_w,
    )  # fmt: skip
    return y


def sum_slots(partial: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """dweights [T, top_k] fp32 from partial sums [R, tiles] of rows; 0 for sentinels."""
    rows = plan.slot_to_row.long()
    total = partial.new_zeros(partial.shape[0] + 1)
    total[:-1] = partial.sum(1)
    return torch.where(rows >= 0, total[rows], 0.0).view(-1, plan.top_k)
