"""FP8 casts on the GPU: per group of 128 columns of a token, per 128x128 block and per output row of a weight.

    amax  = max |x|,  scale = round(max(amax / 448, 2^-126)),  q = e4m3fn(x / scale),  x' = q * scale

The reference is `ornith_moe.quant.fp8`, which defines and explains every choice; these kernels give its codes, scales
and values bit for bit, for every input value, NaN and Inf included. Roundings and divisions are those of `arithmetic`;
besides:

- amax is an integer maximum over the bits of |x|. Those order like the numbers do and NaN comes out on top, whereas a
  float maximum drops NaN on a GPU.
- Codes are stored as uint8 and scales as the top bits of their fp32 pattern: all of them, 16 (BF16) or 9 (UE8M0).
- Hopper's matrix unit takes FP8 operands only with the contraction contiguous, so a gradient needs its weight
  transposed. `quantize_fp8_block_both` writes that copy too: a block has the same scale and codes in both directions.

One program owns one tile and its scales, reads it once (per row: twice), and uses no atomics: runs are bitwise equal.

Copies that are kept (`ornith_moe.fp8_weights`) are refreshed by the same kernels: a program whose expert is not active
ends at once, and one whose tile has the digest that it left there last time ends after reading it. Modulo 2^64,

    digest = sum over rows n of mix(sum over columns k of h(x[n, k]) * key(k)) * key(n)

h and mix are bijections and keys are odd, so that one changed element always changes it; others with the odds of 2^-60.

Legend: E experts (or 1), N rows (output channels or tokens), K columns (the contraction).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import (
    bf16_bits,
    bits_of,
    e4m3_code,
    e4m3_value,
    float_of,
    narrow,
    scale_bits,
    widen,
)
from ornith_moe.kernels.launch import launch
from ornith_moe.quant.fp8 import FLOATS, SCALES
from ornith_moe.quant.recipes import BLOCK, FP8_BLOCK, Cast

ROWS = 8  # of the row kernel's tile


@triton.jit
def _load(ptr, mask, THROUGH_BF16: tl.constexpr):
    """x as fp32; with THROUGH_BF16 rounded to BF16 on the way."""
    x = tl.load(ptr, mask=mask, other=0.0)
    if THROUGH_BF16 and x.dtype != tl.bfloat16:
        return float_of(bf16_bits(bits_of(widen(x))))
    return widen(x)


@triton.jit
def _scale_along(x, AXIS: tl.constexpr, SHIFT: tl.constexpr):
    """fp32 bits of the scales of tile x, one for all that lies along AXIS: [rows, 1] or, None, [1, 1]."""
    return scale_bits(tl.max(bits_of(x) & 0x7FFFFFFF, axis=AXIS, keep_dims=True), SHIFT)


@triton.jit
def _codes(x, s):
    return e4m3_code(tl.div_rn(x, float_of(s)))


@triton.jit
def _store(ptr, codes, s, mask):
    """Codes into uint8; into a floating dtype the values that they stand for."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if dtype == tl.uint8:
        tl.store(ptr, codes, mask=mask)
    else:
        tl.store(ptr, narrow(e4m3_value(codes) * float_of(s), dtype), mask=mask)


@triton.jit
def _store_scales(ptr, s, mask, SHIFT: tl.constexpr):
    tl.store(ptr, (s >> SHIFT).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mix(z):
    """The finalizer of splitmix64, a bijection of uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _key(index):
    """Odd uint64 that look random."""
    return _mix((index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15) | 1


@triton.jit
def _row_digests(x, k):
    """sum over columns of h(x) * key(k): uint64 [rows, 1]; padding is zero and adds nothing."""
    h = x.to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = h ^ (h >> 15)
    return tl.sum(h.to(tl.uint64) * _key(k), axis=1, keep_dims=True)


@triton.jit
def _digest_of(rows, n):
    """int64 digest of a tile from those of its rows; never 0, which stands for a tile that was not quantized yet."""
    digest = tl.sum(tl.sum(_mix(rows) * _key(n), axis=1), axis=0).to(tl.int64, bitcast=True)
    return tl.where(digest == 0, 1, digest)


@triton.jit
def quantize_tile_kernel(
    x_ptr, q_ptr, scale_ptr, q_t_ptr, scale_t_ptr, N, K, stride_xe, stride_xn, stride_xk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_ROW: tl.constexpr,
    SHIFT: tl.constexpr, THROUGH_BF16: tl.constexpr, active_ptr=None, digest_ptr=None,
):  # fmt: skip
    """Grid: E * ceil(N / BLOCK_N) * ceil(K / BLOCK_K). One program owns a tile of x and writes, all contiguous:

    q [E, N, K]: codes, or values if q_ptr points to a floating dtype.
    scale [E, grid rows, grid columns], with PER_ROW [E, N, grid columns]; not if scale_ptr is None.
    q_t [E, K, N] and scale_t: both transposed, without PER_ROW; not if q_t_ptr is None.

    active [E] uint8: which experts; all if None. digest, int64 per program: nothing is written where it is still that
    of the tile; always if None.
    """
    grid_n, grid_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    j, i, e = pid % grid_k, pid // grid_k % grid_n, (pid // grid_k // grid_n).to(tl.int64)
    if active_ptr is not None:
        if tl.load(active_ptr + e) == 0:
            return
    n = (i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (j * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    mask = (n < N) & (k < K)
    if PER_ROW:  # where the scales lie along N, and how many there are
        scale_n, scales_n = n, N
    else:
        scale_n, scales_n = tl.full([1, 1], i, tl.int64), grid_n

    x = _load(x_ptr + e * stride_xe + n * stride_xn + k * stride_xk, mask, THROUGH_BF16)
    if digest_ptr is not None:
        digest = _digest_of(_row_digests(x, k), n)
        if digest == tl.load(digest_ptr + pid):
            return
        tl.debug_barrier()  # every warp has read the old digest
        tl.store(digest_ptr + pid, digest)
    s = _scale_along(x, 1 if PER_ROW else None, SHIFT)
    if scale_ptr is not None:
        _store_scales(scale_ptr + (e * scales_n + scale_n) * grid_k + j, s, scale_n < scales_n, SHIFT)
    if q_t_ptr is not None:
        _store_scales(scale_t_ptr + (e * grid_k + j) * grid_n + scale_n, s, scale_n < scales_n, SHIFT)
    at = q_ptr + (e * N + n) * K + k  # before the codes: after them sm100 spills
    codes = _codes(x, s)
    _store(at, codes, s, mask)
    if q_t_ptr is not None:
        _store(q_t_ptr + (e * K + k) * N + n, codes, s, mask)


@triton.jit
def quantize_row_kernel(
    x_ptr, q_ptr, scale_ptr, N, K, stride_xe, stride_xn, stride_xk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHIFT: tl.constexpr, THROUGH_BF16: tl.constexpr,
    active_ptr=None, digest_ptr=None,
):  # fmt: skip
    """Grid: E * ceil(N / BLOCK_N). One program owns BLOCK_N whole rows and reads them twice: for amax, for the codes.
    Writes q [E, N, K], codes or values as above, and one scale per row, scale [E, N], not if scale_ptr is None; both
    are contiguous. active and digest: as above.
    """
    grid_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    i, e = pid % grid_n, (pid // grid_n).to(tl.int64)
    if active_ptr is not None:
        if tl.load(active_ptr + e) == 0:
            return
    n = (i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    x_ptr += e * stride_xe + n * stride_xn
    q_ptr += (e * N + n) * K

    amax_bits = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    rows = tl.zeros([BLOCK_N, 1], tl.uint64)
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        x = _load(x_ptr + k * stride_xk, (n < N) & (k < K), THROUGH_BF16)
        amax_bits = tl.maximum(amax_bits, bits_of(x) & 0x7FFFFFFF)
        if digest_ptr is not None:
            rows += _row_digests(x, k)
    if digest_ptr is not None:
        digest = _digest_of(rows, n)
        if digest == tl.load(digest_ptr + pid):
            return
        tl.debug_barrier()  # every warp has read the old digest
        tl.store(digest_ptr + pid, digest)
    s = _scale_along(float_of(amax_bits), 1, SHIFT)
    if scale_ptr is not None:
        _store_scales(scale_ptr + e * N + n, s, n < N, SHIFT)

    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        mask = (n < N) & (k < K)
        _store(q_ptr + k, _codes(_load(x_ptr + k * stride_xk, mask, THROUGH_BF16), s), s, mask)


def quantize_fp8_block(
    w: torch.Tensor, *, block: tuple[int, int] = BLOCK, scale: str = "fp32"
) -> tuple[torch.Tensor, ...]:
    """`ornith_moe.quant.fp8.quantize_fp8_block` on the GPU, bit for bit; both sizes of `block` are powers of two."""
    return _launch("w", w, *block, scale, ("fp32", "bf16", "ue8m0"), weight=True)


def quantize_fp8_block_both(
    w: torch.Tensor, *, block: tuple[int, int] = BLOCK, scale: str = "fp32"
) -> tuple[torch.Tensor, ...]:
    """`ornith_moe.quant.fp8.quantize_fp8_block_both` on the GPU, bit for bit; sizes of `block` as above."""
    return _launch("w", w, *block, scale, ("fp32", "bf16", "ue8m0"), weight=True, both=True)


def quantize_fp8_channel(w: torch.Tensor, *, scale: str = "bf16") -> tuple[torch.Tensor, ...]:
    """`ornith_moe.quant.fp8.quantize_fp8_channel` on the GPU, bit for bit."""
    return _launch("w", w, 1, None, scale, ("bf16", "fp32"), weight=True)


@torch.no_grad()
def quantize_fp8_experts(
    w: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, q_t: torch.Tensor | None, scale_t: torch.Tensor | None,
    experts: torch.Tensor | None, digests: torch.Tensor | None, *, block: Cast,
) -> None:  # fmt: skip
    """`ornith_moe.quant.fp8.quantize_fp8_experts` on the GPU, for those tiles whose digest differs; nothing waits.

    Args:
        w: [E, N, K] (or [..., N, K]). q, scale, q_t, scale_t: as `quantize_fp8_block_both` returns them (the last two
            may be None), or as `quantize_fp8_channel` does; written to.
        experts: [E] bool, or None for all. digests: of `new_digests`, written to; or None to quantize every tile.
        block: (128, 128) or (1, None).
    """
    if not w.numel():
        return
    *lead, N, K = w.shape
    _, carrier, shift = next(of for of in SCALES.values() if of[0] == scale.dtype)
    dtypes = (torch.uint8, carrier, torch.uint8, carrier)
    out = [None if t is None else t.view(dtype) for t, dtype in zip((q, scale, q_t, scale_t), dtypes, strict=True)]
    label = f"fp8_cast {'row' if block[1] is None else 'block'}{' both' if q_t is not None else ''}"
    label += "" if digests is None else " if changed"
    active = None if experts is None else experts.view(torch.uint8)
    w = _as_matrices("w", w, torch.Size(lead).numel(), N, K)
    _start(label, w, out, *block, False, shift, w.dtype != torch.bfloat16, active, digests)


def new_digests(w: torch.Tensor, block: Cast) -> torch.Tensor:
    """Digests for `quantize_fp8_experts` of tiles that were not quantized yet."""
    *lead, N, K = w.shape
    bn, bk = block
    tiles = triton.cdiv(N, bn if bk else ROWS) * (triton.cdiv(K, bk) if bk else 1)
    return torch.zeros(torch.Size(lead).numel() * tiles, dtype=torch.int64, device=w.device)


def quantize_fp8_tokens(
    x: torch.Tensor, *, group: int | None = FP8_BLOCK, scale: str = "fp32"
) -> tuple[torch.Tensor, ...]:
    """`ornith_moe.quant.fp8.quantize_fp8_tokens` on the GPU, bit for bit; `group` is None or a power of two."""
    return _launch("x", x, 1, group, scale, ("fp32", "ue8m0"), weight=False)


def roundtrip_fp8_tokens(x: torch.Tensor, *, group: int | None = FP8_BLOCK, scale: str = "fp32") -> torch.Tensor:
    """`ornith_moe.quant.fp8.roundtrip_fp8_tokens` on the GPU, bit for bit; `group` is None or a power of two."""
    (x_seen,) = _launch("x", x, 1, group, scale, ("fp32", "ue8m0"), weight=False, values=True)
    return x_seen


@torch.no_grad()
def _launch(
    name: str, x: torch.Tensor, bn: int, bk: int | None, scale: str, allowed: tuple[str, ...], *, weight: bool,
    both: bool = False, values: bool = False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Check, allocate, choose the tile, launch. bk None: one scale per row. `values`: codes * scales alone."""
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
    per_row = bn == 1 and not both  # the scale of a block serves the copy, whatever its shape
    tile_n = 32 if per_row else bn  # rows of a tile are independent: 32 x 128 fills four warps
    grid_n, grid_k = triton.cdiv(N, bn), triton.cdiv(K, bk) if bk else 1

    q = torch.empty(x.shape, dtype=x.dtype if values else torch.uint8, device=x.device)
    shape = (*lead, grid_n, grid_k) if weight else (*x.shape[:-1], grid_k)
    s = None if values else torch.empty(shape, dtype=carrier, device=x.device)
    q_t = s_t = None
    if both:
        q_t = torch.empty((*lead, K, N), dtype=torch.uint8, device=x.device)
        s_t = torch.empty((*lead, grid_k, grid_n), dtype=carrier, device=x.device)
    if x.numel():
        through_bf16 = weight and x.dtype != torch.bfloat16
        use = " both" if both else " round trip" if values else ""
        label = f"fp8_cast {'row' if bk is None else 'block' if weight else 'tokens'}{use}"
        _start(label, _as_matrices(name, x, E, N, K), (q, s, q_t, s_t), tile_n, bk, per_row, shift, through_bf16)
    else:
        for scales in (s, s_t):  # of partial blocks without elements
            if scales is not None:
                scales.fill_(0x3F800000 >> shift)
    if s is None:
        return (q,)
    pair = q.view(torch.float8_e4m3fn), s.view(dtype)
    if q_t is None or s_t is None:
        return pair
    return *pair, q_t.view(torch.float8_e4m3fn), s_t.view(dtype)


def _as_matrices(name: str, x: torch.Tensor, E: int, N: int, K: int) -> torch.Tensor:
    try:
        return x.view(E, N, K)
    except RuntimeError:
        raise ValueError(
            f"{name}: leading dimensions of shape {list(x.shape)} and strides {list(x.stride())} do not collapse;"
            " pass a contiguous tensor"
        ) from None


def _start(
    label: str, x: torch.Tensor, out: Sequence[torch.Tensor | None], tile_n: int, bk: int | None, per_row: bool,
    shift: int, through_bf16: bool, active: torch.Tensor | None = None, digests: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """One launch over x [E, N, K], into q, scale, q_t and scale_t of `out`."""
    q, s, q_t, s_t = out
    E, N, K = x.shape
    reads = {"x_ptr": x, "active_ptr": active, "digest_ptr": digests}
    writes = {"q_ptr": q, "scale_ptr": s, "digest_ptr": digests}
    sizes: dict[str, Any] = dict(
        zip(("N", "K", "stride_xe", "stride_xn", "stride_xk"), (N, K, *x.stride()), strict=True)
    )
    constants: dict[str, Any] = {"SHIFT": shift, "THROUGH_BF16": through_bf16}
    if bk is None:
        launch(
            label, quantize_row_kernel, (E * triton.cdiv(N, ROWS),), reads=reads, writes=writes, **sizes, **constants,
            BLOCK_N=ROWS, BLOCK_K=512,
        )  # fmt: skip
        return
    # with digests or a transposed copy one block fills a processor
    warps = 4 if tile_n * bk <= 8192 else 8 if q_t is None and digests is None else 16
    launch(
        label, quantize_tile_kernel, (E * triton.cdiv(N, tile_n) * triton.cdiv(K, bk),), reads=reads,
        writes={**writes, "q_t_ptr": q_t, "scale_t_ptr": s_t}, **sizes, **constants, BLOCK_N=tile_n, BLOCK_K=bk,
        PER_ROW=per_row, num_warps=warps,
    )  # fmt: skip
