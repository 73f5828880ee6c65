"""Weight gradients of a grouped GEMM: one product per expert over its rows, however many they are.

    dw[e] = sum over rows r of expert e of g[r]^T x[r]          [N, K] per expert, fp32 accumulation

g is the gradient of the product's output, x its input; either may be gathered while it is loaded, like the rows of
`mainloop`. Rows are summed in order, so runs are equal bit for bit; an expert without rows gets zeros.

With `fp8` both operands are quantized to e4m3 as they are loaded, each column over 128 rows of its expert counted from
its first (the bits of `quantize_fp8_tokens` on the transposed rows), and partial sums leave the matrix unit every 128
rows. No quantized copy of T * top_k rows is written; the price is that each tile casts its operands again.

Legend: R rows, E experts, N K of the weights.
"""

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import (
    bits_of,
    divide_by_scale,
    dot,
    e4m3_code,
    float_of,
    narrow,
    scale_bits,
    widen,
)  # fmt: skip
from ornith_moe.kernels.launch import Product, launch, target
from ornith_moe.kernels.plan import RoutingPlan
from ornith_moe.kernels.tiles import Tile


@triton.jit
def _quantize_columns(x):
    """fp32 [rows, columns] as e4m3 and its scale [1, columns]."""
    s = float_of(scale_bits(tl.max(bits_of(x) & 0x7FFFFFFF, axis=0, keep_dims=True), 0))
    return e4m3_code(divide_by_scale(x, s)).to(tl.float8e4nv, bitcast=True), s


@triton.jit
def grouped_wgrad_kernel(
    g_ptr, x_ptr, dw_ptr, row_to_slot_ptr, offsets_ptr, E, N, K, stride_g, stride_x,
    TOP_K_G: tl.constexpr, TOP_K_X: tl.constexpr, QUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: any; programs share the E * ceil(N / BLOCK_N) * ceil(K / BLOCK_K) tiles of dw [E, N, K], contiguous."""
    grid_n, grid_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    for i in tl.range(tl.program_id(0), E * grid_n * grid_k, tl.num_programs(0)):
        e = i // (grid_n * grid_k)
        n = i // grid_k % grid_n * BLOCK_N
        k = i % grid_k * BLOCK_K
        start, end = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
        offs_n, offs_k = n + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r in range(start, end, BLOCK_R):
            rows = r + tl.arange(0, BLOCK_R)
            inside = (rows < end)[:, None]
            rows = tl.minimum(rows, end - 1)
            slots = tl.load(row_to_slot_ptr + rows)
            from_g = slots // TOP_K_G if TOP_K_G else rows
            from_x = slots // TOP_K_X if TOP_K_X else rows
            if WIDE:
                from_g, from_x = from_g.to(tl.int64), from_x.to(tl.int64)
            if EVEN:
                g = tl.load(g_ptr + from_g[:, None] * stride_g + offs_n[None, :], mask=inside, other=0.0)
                x = tl.load(x_ptr + from_x[:, None] * stride_x + offs_k[None, :], mask=inside, other=0.0)
            else:
                mask = inside & (offs_n < N)[None, :]
                g = tl.load(g_ptr + from_g[:, None] * stride_g + offs_n[None, :], mask=mask, other=0.0)
                mask = inside & (offs_k < K)[None, :]
                x = tl.load(x_ptr + from_x[:, None] * stride_x + offs_k[None, :], mask=mask, other=0.0)
            if QUANTIZE:
                g8, scale_g = _quantize_columns(widen(g))
                x8, scale_x = _quantize_columns(widen(x))
                acc = tl.fma(dot(g8.T, x8), scale_g.T * scale_x, acc)
            else:
                acc = dot(g.T, x, acc)
        ptrs = dw_ptr + e.to(tl.int64) * N * K + (offs_n[:, None] * K + offs_k[None, :])
        mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        tl.store(ptrs, narrow(acc, dw_ptr.dtype.element_ty), mask=mask)


def wgrad(
    product: str, g: torch.Tensor, x: torch.Tensor, plan: RoutingPlan, tile: Tile, dw: torch.Tensor, *,
    gather_g: bool = False, gather_x: bool = False, fp8: bool = False,
) -> torch.Tensor:  # fmt: skip
    """dw[e] = sum of g[r]^T x[r] over the rows of each expert.

    Args:
        product: what it is for, "dgate_up" or "ddown".
        g: [R or T, N]; with `gather_g` its rows are tokens. x: [R or T, K], likewise.
        dw: [E, N, K] contiguous, fp32, fp16 or BF16; written.
        fp8: quantize both operands in columns of 128 rows first.
    """
    experts, n, k = dw.shape
    block_k, num_warps = (64, 8) if fp8 else (tile.block_n, tile.num_warps)  # casting wider operands spills
    block_n = 128 if num_warps >= 8 else 64
    block_r = 128 if fp8 else 64 if g.element_size() < 4 else 32
    top_k_g, top_k_x = plan.top_k if gather_g else 0, plan.top_k if gather_x else 0
    processors = target(g.device).processors * max(1, 8 // num_warps)
    tiles = experts * triton.cdiv(n, block_n) * triton.cdiv(k, block_k)
    launch(
        f"{product} {'fp8' if fp8 else 'fp32' if g.dtype == torch.float32 else 'bf16'}", grouped_wgrad_kernel,
        (min(processors, tiles),),
        reads={"g_ptr": g, "x_ptr": x, "row_to_slot_ptr": plan.row_to_slot, "offsets_ptr": plan.offsets},
        writes={"dw_ptr": dw},
        product=Product(
            size=(n, k, None), tile=(block_n, block_k, block_r), operands=("g_ptr", "x_ptr"),
            unit_bytes=1 if fp8 else g.element_size(), gathered={"g_ptr": top_k_g, "x_ptr": top_k_x}, of_experts={},
        ),
        E=experts, N=n, K=k, stride_g=g.stride(0), stride_x=x.stride(0), TOP_K_G=top_k_g, TOP_K_X=top_k_x,
        QUANTIZE=fp8, BLOCK_R=block_r, BLOCK_N=block_n, BLOCK_K=block_k,
        EVEN=n % block_n == 0 and k % block_k == 0, WIDE=max(g.numel(), x.numel()) >= 2**31,
        num_warps=num_warps, num_stages=2 if fp8 else tile.num_stages,
    )  # fmt: skip
    return dw
