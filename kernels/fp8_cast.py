"""FP8 casts on the GPU: per group of 128 columns of a token, per 128x128 block and per output row of a weight.

    amax  = max |x|,  scale = round(max(amax / 448, 2^-126)),  q = e4m3fn(x / scale)

The reference is `ornith_moe.quant.fp8`, which defines and explains every choice; these kernels give its codes and its
scales bit for bit, for every input value, NaN and Inf included. Roundings and divisions are those of `arithmetic`;
besides:

- amax is an integer maximum over the bits of |x|. Those order like the numbers do and NaN comes out on top, whereas a
  float maximum drops NaN on a GPU.
- Codes are stored as uint8 and scales as the top bits of their fp32 pattern: all of them, 16 (BF16) or 9 (UE8M0).

One program owns one tile and its scales, reads it once (per row: twice), and uses no atomics: runs are bitwise equal.

Legend: E experts (or 1), N rows (output channels or tokens), K columns (the contraction).
"""

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import bf16_bits, bits_of, e4m3_code, float_of, scale_bits, widen
from ornith_moe.kernels.launch import launch
from ornith_moe.quant.fp8 import FLOATS, SCALES


@triton.jit
def _load(ptr, mask, THROUGH_BF16: tl.constexpr):
    """x as fp32; with THROUGH_BF16 rounded to BF16 on the way."""
    x = tl.load(ptr, mask=mask, other=0.0)
    if THROUGH_BF16 and x.dtype != tl.bfloat16:
        return float_of(bf16_bits(bits_of(widen(x))))
    return widen(x)


@triton.jit
def quantize_tile_kernel(
    x_ptr, q_ptr, scale_ptr, N, K, stride_xe, stride_xn, stride_xk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_ROW: tl.constexpr,
    SHIFT: tl.constexpr, THROUGH_BF16: tl.constexpr,
):  # fmt: skip
    """Grid: E * ceil(N / BLOCK_N) * ceil(K / BLOCK_K). One program owns a tile and writes its codes and its scale, or
    with PER_ROW one scale for each of its rows. q [E, N, K] and scale [E, N or grid rows, grid columns] are contiguous.
    """
    grid_n, grid_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    j, i, e = pid % grid_k, pid // grid_k % grid_n, (pid // grid_k // grid_n).to(tl.int64)
    offs_n = (i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = (j * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_k < K)[None, :]

    x = _load(x_ptr + e * stride_xe + offs_n[:, None] * stride_xn + offs_k[None, :] * stride_xk, mask, THROUGH_BF16)
    amax_bits = tl.max(bits_of(x) & 0x7FFFFFFF, axis=1)  # [BLOCK_N]
    if not PER_ROW:
        amax_bits = tl.max(amax_bits, axis=0)
    s = scale_bits(amax_bits, SHIFT)
    stored = (s >> SHIFT).to(scale_ptr.dtype.element_ty)
    if PER_ROW:
        tl.store(scale_ptr + (e * N + offs_n) * grid_k + j, stored, mask=mask_n)
        codes = e4m3_code(tl.div_rn(x, float_of(s)[:, None]))
    else:
        tl.store(scale_ptr + (e * grid_n + i) * grid_k + j, stored)
        codes = e4m3_code(tl.div_rn(x, float_of(s)))
    tl.store(q_ptr + (e * N + offs_n[:, None]) * K + offs_k[None, :], codes, mask=mask)


@triton.jit
def quantize_row_kernel(
    x_ptr, q_ptr, scale_ptr, N, K, stride_xe, stride_xn, stride_xk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHIFT: tl.constexpr, THROUGH_BF16: tl.constexpr,
):  # fmt: skip
    """Grid: E * ceil(N / BLOCK_N). One program owns BLOCK_N whole rows and reads them twice: for amax, for the codes.
    Writes codes q [E, N, K] and one scale per row, scale [E, N]; both are contiguous.
    """
    grid_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    i, e = pid % grid_n, (pid // grid_n).to(tl.int64)
    offs_n = (i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    x_ptr += e * stride_xe + offs_n[:, None] * stride_xn
    q_ptr += (e * N + offs_n[:, None]) * K

    amax_bits = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for k in range(0, K, BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        x = _load(x_ptr + offs_k * stride_xk, mask_n[:, None] & (offs_k < K), THROUGH_BF16)
        amax_bits = tl.maximum(amax_bits, bits_of(x) & 0x7FFFFFFF)
    s = scale_bits(tl.max(amax_bits, axis=1), SHIFT)
    tl.store(scale_ptr + e * N + offs_n, (s >> SHIFT).to(scale_ptr.dtype.element_ty), mask=mask_n)

    for k in range(0, K, BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        mask = mask_n[:, None] & (offs_k < K)
        x = _load(x_ptr + offs_k * stride_xk, mask, THROUGH_BF16)
        tl.store(q_ptr + offs_k, e4m3_code(tl.div_rn(x, float_of(s)[:, None])), mask=mask)


def quantize_fp8_block(w, *, block=(128, 128), scale="fp32"):
    """`ornith_moe.quant.fp8.quantize_fp8_block` on the GPU, bit for bit; both sizes of `block` are powers of two."""
    return _launch("w", w, *block, scale, ("fp32", "bf16", "ue8m0"), weight=True)


def quantize_fp8_channel(w, *, scale="bf16"):
    """`ornith_moe.quant.fp8.quantize_fp8_channel` on the GPU, bit for bit."""
    return _launch("w", w, 1, None, scale, ("bf16", "fp32"), weight=True)


def quantize_fp8_tokens(x, *, group=128, scale="fp32"):
    """`ornith_moe.quant.fp8.quantize_fp8_tokens` on the GPU, bit for bit; `group` is None or a power of two."""
    return _launch("x", x, 1, group, scale, ("fp32", "ue8m0"), weight=False)


@torch.no_grad()
def _launch(name, x, bn, bk, scale, allowed, weight):
    """Check, allocate, choose the tile, launch. bk None: one scale per row."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {x.dtype}; convert it first")
    if x.dim() < (2 if weight else 1):
        raise ValueError(f"{name}: expected [..., {'N, ' * weight}K], got shape {list(x.shape)}; add a dimension")
    if scale not in allowed:
        raise ValueError(f"scale: expected one of {', '.join(allowed)}, got {scale!r}")
    for size in (bn, bk or 1):
        if size < 1 or size & (size - 1):
            raise ValueError(f"block or group: expected powers of two, got {size}; ornith_moe.quant.fp8 takes any size")
    *lead, N, K = x.shape if x.dim() > 1 else (1, *x.shape)
    if not weight:  # a token's scale does not see its neighbours, so all leading dimensions are rows
        lead, N = [], x.shape[:-1].numel()
    E = torch.Size(lead).numel()
    dtype, carrier, shift = SCALES[scale]
    grid_n, grid_k = triton.cdiv(N, bn), triton.cdiv(K, bk) if bk else 1
    q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    shape = (*lead, grid_n, grid_k) if weight else (*x.shape[:-1], grid_k)
    if not x.numel():
        return q.view(torch.float8_e4m3fn), torch.ones(shape, device=x.device).to(dtype)
    try:
        x = x.view(E, N, K)
    except RuntimeError:
        raise ValueError(
            f"{name}: leading dimensions of shape {list(x.shape)} and strides {list(x.stride())} do not collapse;"
            " pass a contiguous tensor"
        ) from None
    s = torch.empty(shape, dtype=carrier, device=x.device)
    args = (x, q, s, N, K, *x.stride())
    through_bf16 = weight and x.dtype != torch.bfloat16
    if bk is None:
        launch("fp8_cast row", quantize_row_kernel, (E * triton.cdiv(N, 16),), *args, 16, 256, shift, through_bf16)
    else:
        per_row = bn == 1
        tile_n = 32 if per_row else bn  # rows of a token tile are independent: 32 x 128 fills four warps
        warps = 8 if tile_n * bk > 8192 else 4
        programs = E * triton.cdiv(N, tile_n) * grid_k
        label = "fp8_cast tokens" if per_row else "fp8_cast block"
        tile = (tile_n, bk, per_row, shift, through_bf16)
        launch(label, quantize_tile_kernel, (programs,), *args, *tile, num_warps=warps)
    return q.view(torch.float8_e4m3fn), s.view(dtype)
