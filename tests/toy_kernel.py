"""A kernel outside the package, in one file, as CONTRIBUTING adds one: rows that are weighed.

    y[t] = weights[t] * x[t]          fp32, one rounding

Legend: T tokens, W columns.
"""

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import narrow, widen
from ornith_moe.kernels.launch import launch


def weigh_reference(x, weights):
    """`weigh` in plain torch."""
    return (x.float() * weights[:, None]).to(x.dtype)


@triton.jit
def weigh_kernel(x_ptr, weights_ptr, y_ptr, W, BLOCK_W: tl.constexpr):
    """Grid: T. One program owns a row of y and writes it once, without atomics, so runs are bitwise equal."""
    t = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + t)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        x = widen(tl.load(x_ptr + t * W + w, mask=w < W, other=0.0))
        tl.store(y_ptr + t * W + w, narrow(x * weight, y_ptr.dtype.element_ty), mask=w < W)


def weigh(x, weights):
    """x [T, W] in fp32, fp16 or BF16 times fp32 weights [T], row by row."""
    y = torch.empty_like(x)
    launch(
        "weigh", weigh_kernel, (len(x),), reads={"x_ptr": x, "weights_ptr": weights}, writes={"y_ptr": y},
        W=x.shape[1], BLOCK_W=256,
    )  # fmt: skip
    return y
