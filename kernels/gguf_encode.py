"""GGUF encoders on the GPU: Q8_0, Q4_K, Q5_K and Q6_K, with and without importance, in ggml's bytes.

    Q8_0          value d * q               d = amax / 127, q = round(x / d)
    Q4_K, Q5_K    value d * s * q - dmin * m      8 sub-blocks of 32, six bits for s and m
    Q6_K          value d * s * q                 16 sub-blocks of 16, int8 s

The reference is `ornith_moe.quant.codecs.gguf` and through it ggml's C: these kernels give their bytes for any finite
rows. A K-quant takes three kernels: the best scale and minimum of every sub-block (`gguf_search`, a lane each, nearly
all of the time); d, dmin, s and m of every super-block, a lane each; the codes from the rounded scales that a reader
will see, elementwise. Between them travel five floats per sub-block, `fits`: scale and low, later d * s and dmin * m;
the sum of the weights; inverse and shift, from which the codes of the search can be made again where d * s is zero.

One program owns its blocks, no atomics: runs are bitwise equal. No kernel can raise: each sets a flag per program of
the last stage where a value is not finite or a scale is beyond fp16, `quantize_gguf` reads the flags once, after the
last kernel, and lets the CPU's encoder name row and column.

Legend: R rows, K values in a row; L lanes; B blocks of a tile.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import bits_of, float_of, widen
from ornith_moe.kernels.gguf_search import (
    EPSILON,
    INFINITY,
    affine_scale,
    clamp,
    code,
    low_byte,
    mean_square,
    nearest,
    positive_scale,
    signed_scale,
    sum_of_squares,
    values,
)
from ornith_moe.kernels.launch import launch, target
from ornith_moe.quant.codecs.gguf import checked_imatrix
from ornith_moe.quant.codecs.gguf import quantize_gguf as quantize_on_cpu
from ornith_moe.quant.codecs.sizes import block_shape, row_bytes
from ornith_moe.quant.fp8 import FLOATS

SUPER = tl.constexpr(256)  # values of a super-block
_BEYOND = tl.constexpr(0x4E000000)  # 2^29, as the CPU has it: no fp16 * 128 * 32 is as large; NaN and Inf are above
_INF = tl.constexpr(0x7F800000)
SCALE, LOW, SUM, INVERSE, SHIFT = (tl.constexpr(i) for i in range(5))  # rows of `fits`
FITS = 5


@triton.jit
def _lanes(L: tl.constexpr, count):
    lane = tl.program_id(0).to(tl.int64) * L + tl.arange(0, L)
    return lane, lane < count


@triton.jit
def _importance(a_ptr, lane, mask, subs_of_matrix, K, N: tl.constexpr):
    """Importance of the columns of each lane's sub-block; `a_ptr` [E, K] has a row for every matrix of the stack."""
    return values(a_ptr, lane // subs_of_matrix * K + lane * N % K, mask, N)


@triton.jit
def affine_search_kernel(
    x_ptr, a_ptr, fits_ptr, subs, subs_of_matrix, K, BITS: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Grid: ceil(subs / L). A lane searches scale and minimum of 32 values of x and writes its five floats."""
    lane, mask = _lanes(L, subs)
    x = values(x_ptr, lane * 32, mask, 32)
    if a_ptr is None:
        mean = tl.sqrt_rn(sum_of_squares(x, 32) * 0.03125)
        w = [mean + tl.abs(v) for v in x]
        if BITS == 4:
            fit = affine_scale(x, w, 32, 15, -1.0, 0.1, 20, False)
        else:
            fit = affine_scale(x, w, 32, 31, -0.5, 0.1, 15, False)
    else:
        sigma2 = 2.0 * mean_square(x_ptr, lane // 8 * SUPER, mask, SUPER)
        a = _importance(a_ptr, lane, mask, subs_of_matrix, K, 32)
        w = ()  # type: ignore[assignment]  # Triton's tuples grow
        for i in tl.static_range(32):
            w += (a[i] * tl.sqrt_rn(sigma2 + x[i] * x[i]),)
        fit = affine_scale(x, w, 32, (1 << BITS) - 1, -0.9, 0.05, 36, True)
    for i in tl.static_range(5):
        tl.store(fits_ptr + i * subs.to(tl.int64) + lane, fit[i], mask=mask)


@triton.jit
def signed_search_kernel(x_ptr, a_ptr, fits_ptr, subs, subs_of_matrix, K, L: tl.constexpr):
    """Grid: ceil(subs / L). A lane searches the scale of 16 values of x and writes scale and inverse."""
    lane, mask = _lanes(L, subs)
    x = values(x_ptr, lane * 16, mask, 16)
    if a_ptr is None:
        w = [v * v for v in x]
    else:
        w = _importance(a_ptr, lane, mask, subs_of_matrix, K, 16)
    scale, inverse = signed_scale(x, w, 16, 32)
    tl.store(fits_ptr + SCALE * subs.to(tl.int64) + lane, scale, mask=mask)
    tl.store(fits_ptr + INVERSE * subs.to(tl.int64) + lane, inverse, mask=mask)


@triton.jit
def _half(v):
    """(bits of fp16(v), fp32 of them)"""
    half = v.to(tl.float16)
    return half.to(tl.uint16, bitcast=True).to(tl.int32), half.to(tl.float32)


@triton.jit
def _both(bits, L: tl.constexpr):
    """In each lane of a pair the bits of both; they do not overlap."""
    pairs = tl.reshape(bits, [L // 2, 2])
    return tl.reshape(tl.broadcast_to(tl.sum(pairs, axis=1, keep_dims=True), [L // 2, 2]), [L])


@triton.jit
def affine_scales_kernel(
    fits_ptr, out_ptr, blocks, WORDS: tl.constexpr, IMPORTANT: tl.constexpr, CUT: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Grid: ceil(2 * blocks / L). Of a pair of lanes the first makes d and eight s, the second dmin and eight m; they
    write the four words that begin a block of WORDS: d and dmin, then for each pair of s and m 6 bits, four whole with
    their spare bits, and the low halves of the others.

    Where ggml does not cut at 63, a number too wide for its bits spills into its neighbour's; a reader finds that, so
    `fits` gets it.
    """
    lane, mask = _lanes(L, 2 * blocks)
    block, side = lane // 2, (lane % 2).to(tl.int32)
    subs = blocks.to(tl.int64) * 8
    at = side * subs + block * 8  # rows SCALE and LOW
    fits = values(fits_ptr, at, mask, 8)
    if IMPORTANT:
        scale, q = positive_scale(fits, values(fits_ptr + SUM * subs, block * 8, mask, 8), 8, 63)
    else:
        best = tl.zeros([L], tl.float32)
        for j in tl.static_range(8):
            best = tl.where(fits[j] > best, fits[j], best)
        inverse = tl.where(best > 0.0, tl.div_rn(63.0, best), 0.0)
        scale, q = tl.div_rn(best, 63.0), [low_byte(nearest(inverse * fit)) for fit in fits]
    most: tl.constexpr = 63.0 if CUT else 255.0
    q = [tl.minimum(v, most).to(tl.int32) for v in q]
    whole = tl.zeros([L], tl.int32)
    low_half = whole
    for j in tl.static_range(4):
        whole |= ((q[j] | q[j + 4] >> 4 << 6) & 255) << 8 * j
        low_half |= (q[j + 4] & 15) << 8 * j + 4 * side
    half, d = _half(scale)
    halves, low_halves = _both(half << 16 * side, L), _both(low_half, L)
    tl.store(out_ptr + block * WORDS + 3 * side, tl.where(side == 0, halves, low_halves), mask=mask)
    tl.store(out_ptr + block * WORDS + 1 + side, whole, mask=mask)
    for j in tl.static_range(8):
        if j < 4:
            read = whole >> 8 * j & 63
        else:
            read = low_halves >> 8 * j - 32 + 4 * side & 15 | (whole >> 8 * j - 26 & 3) << 4
        tl.store(fits_ptr + at + j, d * read.to(tl.float32), mask=mask)


@triton.jit
def signed_scales_kernel(fits_ptr, out_ptr, blocks, SIZE: tl.constexpr, L: tl.constexpr):
    """Grid: ceil(blocks / L). A lane makes d and sixteen int8 s and writes the 18 bytes that end its block."""
    block, mask = _lanes(L, blocks)
    subs = blocks.to(tl.int64) * 16
    fits = values(fits_ptr + SCALE * subs, block * 16, mask, 16)
    value = tl.zeros([L], tl.float32)
    magnitude = value
    for j in tl.static_range(16):
        larger = tl.abs(fits[j]) > magnitude
        magnitude, value = tl.where(larger, tl.abs(fits[j]), magnitude), tl.where(larger, fits[j], value)
    zero = magnitude < EPSILON
    inverse = tl.div_rn(-128.0, value)
    d, d_value = _half(tl.where(zero, 0.0, tl.div_rn(1.0, inverse)))
    out_ptr += block * SIZE + SIZE - 18
    for j in tl.static_range(16):
        s = tl.where(zero, 0.0, clamp(nearest(inverse * fits[j]), -128.0, 127.0))
        tl.store(out_ptr + j, s.to(tl.int32).to(tl.uint8), mask=mask)
        tl.store(fits_ptr + SCALE * subs + block * 16 + j, d_value * s, mask=mask)
        tl.store(fits_ptr + INVERSE * subs + block * 16 + j, INFINITY, mask=mask & zero)
    tl.store(out_ptr + 16, (d & 255).to(tl.uint8), mask=mask)
    tl.store(out_ptr + 17, (d >> 8).to(tl.uint8), mask=mask)


@triton.jit
def _bad(v, limit):
    return (bits_of(v) & 0x7FFFFFFF) >= limit


@triton.jit
def _store_flag(flags_ptr, bad):
    tl.store(flags_ptr + tl.program_id(0), tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0))


@triton.jit
def _affine_codes(x_ptr, fits_ptr, subs, sub, mask, TOP: tl.constexpr, GUARDED: tl.constexpr):
    """(codes of 32 values for each of the sub-blocks [B, 1], what makes them invalid)"""
    x = widen(tl.load(x_ptr + sub * 32 + tl.arange(0, 32)[None, :], mask=mask, other=0.0))
    step = tl.load(fits_ptr + SCALE * subs + sub, mask=mask, other=0.0)
    low = tl.load(fits_ptr + LOW * subs + sub, mask=mask, other=0.0)
    inverse = tl.load(fits_ptr + INVERSE * subs + sub, mask=mask, other=0.0)
    shift = tl.load(fits_ptr + SHIFT * subs + sub, mask=mask, other=0.0)
    searched = code(inverse * (x - shift), TOP, GUARDED)
    q = tl.where(step == 0.0, searched, clamp(nearest(tl.div_rn(x + low, step)), 0.0, TOP))
    return q.to(tl.int32), _bad(x, _BEYOND) | _bad(step, _INF) | _bad(low, _INF)


@triton.jit
def affine_codes_kernel(
    x_ptr, fits_ptr, out_ptr, flags_ptr, blocks, BITS: tl.constexpr, SIZE: tl.constexpr, GUARDED: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Grid: ceil(blocks / B). A program writes the codes of B blocks: 64 nibbles of two sub-blocks to 32 bytes, and
    before them for Q5_K the fifth bits, one sub-block to a bit.
    """
    block = (tl.program_id(0).to(tl.int64) * B + tl.arange(0, B))[:, None]
    mask = block < blocks
    subs = blocks.to(tl.int64) * 8
    top: tl.constexpr = (1 << BITS) - 1.0
    at = out_ptr + block * SIZE + 16 + tl.arange(0, 32)[None, :]
    fifth = tl.zeros([B, 32], tl.int32)
    bad = fifth != 0
    for j in tl.static_range(0, 8, 2):
        a, bad_a = _affine_codes(x_ptr, fits_ptr, subs, block * 8 + j, mask, top, GUARDED)
        b, bad_b = _affine_codes(x_ptr, fits_ptr, subs, block * 8 + j + 1, mask, top, GUARDED)
        tl.store(at + (SIZE - 144) + 16 * j, (a & 15 | (b & 15) << 4).to(tl.uint8), mask=mask)
        fifth |= a >> 4 << j | b >> 4 << j + 1
        bad |= bad_a | bad_b
    if BITS == 5:
        tl.store(at, fifth.to(tl.uint8), mask=mask)
    _store_flag(flags_ptr, bad)


@triton.jit
def signed_codes_kernel(x_ptr, fits_ptr, out_ptr, flags_ptr, blocks, SIZE: tl.constexpr, B: tl.constexpr):
    """Grid: ceil(blocks / B). A program writes the codes of B blocks, for each half of 128 values: 64 bytes of low
    nibbles and 32 of high pairs of bits, in which the four quarters of 32 values meet. A row of a tile is one of the
    two sub-blocks of every quarter.
    """
    row = (tl.program_id(0).to(tl.int64) * 2 * B + tl.arange(0, 2 * B))[:, None]
    block, side = row // 2, row % 2
    mask = block < blocks
    subs = blocks.to(tl.int64) * 16
    i = tl.arange(0, 16)[None, :]
    out_ptr += block * SIZE + 16 * side + i
    bad = tl.zeros([2 * B, 16], tl.int32) != 0
    for half in tl.static_range(2):
        pairs = tl.zeros([2 * B, 16], tl.int32)
        nibbles = (pairs, pairs)
        for quarter in tl.static_range(4):
            sub = block * 16 + 8 * half + 2 * quarter + side
            x = widen(tl.load(x_ptr + sub * 16 + i, mask=mask, other=0.0))
            step = tl.load(fits_ptr + SCALE * subs + sub, mask=mask, other=0.0)
            inverse = tl.load(fits_ptr + INVERSE * subs + sub, mask=mask, other=0.0)
            v = tl.where(step == 0.0, inverse * x, tl.div_rn(x, step))
            q = (clamp(nearest(v), -32.0, 31.0) + 32.0).to(tl.int32)
            q = tl.where((step == 0.0) & (inverse == INFINITY), 0, q)
            bad |= _bad(x, _BEYOND) | _bad(step, _INF)
            pairs |= q >> 4 << 2 * quarter
            nibbles = (nibbles[1], nibbles[0] | (q & 15) << 4 * (quarter // 2))
        tl.store(out_ptr + 64 * half, nibbles[0].to(tl.uint8), mask=mask)
        tl.store(out_ptr + 64 * half + 32, nibbles[1].to(tl.uint8), mask=mask)
        tl.store(out_ptr + 128 + 32 * half, pairs.to(tl.uint8), mask=mask)
    _store_flag(flags_ptr, bad)


@triton.jit
def q8_0_kernel(x_ptr, out_ptr, flags_ptr, blocks, B: tl.constexpr):
    """Grid: ceil(blocks / B). A program reads and writes B blocks of 32: d as fp16, then round(x * (1 / d)) as int8."""
    block = (tl.program_id(0).to(tl.int64) * B + tl.arange(0, B))[:, None]
    mask = block < blocks
    i = tl.arange(0, 32)[None, :]
    x = widen(tl.load(x_ptr + block * 32 + i, mask=mask, other=0.0))
    amax = float_of(tl.max(bits_of(x) & 0x7FFFFFFF, axis=1, keep_dims=True))
    d = tl.div_rn(amax, 127.0)
    inverse = tl.div_rn(1.0, d)
    v = x * tl.where(inverse == INFINITY, 0.0, inverse)
    whole = tl.abs(v).to(tl.int32).to(tl.float32)
    whole += tl.where(tl.abs(v) - whole >= 0.5, 1.0, 0.0)  # half away from zero; exact, unlike adding a half first
    q = tl.where(v < 0.0, -whole, whole).to(tl.int32)
    half, d = _half(d)
    out_ptr += block * 34
    tl.store(out_ptr, (half & 255).to(tl.uint8), mask=mask)
    tl.store(out_ptr + 1, (half >> 8).to(tl.uint8), mask=mask)
    tl.store(out_ptr + 2 + i, q.to(tl.uint8), mask=mask)
    _store_flag(flags_ptr, _bad(x, _BEYOND) | _bad(d, _INF))


ENCODED = {"Q8_0": 8, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}  # bits of a code


@torch.no_grad()
def encode(
    x: torch.Tensor, type_name: str, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks [R, row_bytes] uint8, flags): launches and nothing else. Where a flag is set, the bytes are of no use.

    x is contiguous [R, K]; importance is fp32 [E, K], a row for each R / E rows of x, on the device of x.
    """
    R, K = x.shape
    bits, (values_of_block, size) = ENCODED[type_name], block_shape(type_name)
    blocks = R * K // values_of_block
    out = torch.empty((R, row_bytes(type_name, K)), dtype=torch.uint8, device=x.device)
    arch = target(x.device).arch
    lanes, rows = 4 * (64 if arch.startswith("gfx") else 32), 64 if type_name == "Q8_0" else 16
    if arch == "interpreter":  # what it costs is the number of programs
        lanes = rows = min(triton.next_power_of_2(max(8 * blocks, 2)), 1 << 14)

    flags = torch.empty(triton.cdiv(blocks, rows), dtype=torch.int32, device=x.device)
    label = f"gguf_encode {type_name}" + ("" if importance is None else " with importance")
    last: dict[str, Any] = {"writes": {"out_ptr": out, "flags_ptr": flags}, "blocks": blocks, "B": rows}
    if type_name == "Q8_0":
        launch(f"{label} blocks", q8_0_kernel, (len(flags),), reads={"x_ptr": x}, **last)
        return out, flags
    affine, guarded = type_name != "Q6_K", importance is not None
    subs = blocks * (8 if affine else 16)
    width: dict[str, Any] = {"BITS": bits} if affine else {}
    fits = torch.empty((FITS, subs), device=x.device)
    launch(
        f"{label} search", affine_search_kernel if affine else signed_search_kernel, (triton.cdiv(subs, lanes),),
        reads={"x_ptr": x, "a_ptr": importance}, writes={"fits_ptr": fits}, subs=subs,
        subs_of_matrix=subs // (1 if importance is None else len(importance)), K=K, L=lanes,
        **width,
    )  # fmt: skip
    scales: dict[str, Any] = {"reads": {"fits_ptr": fits}, "blocks": blocks, "L": lanes}
    last["reads"] = {"x_ptr": x, "fits_ptr": fits}
    if affine:
        launch(
            f"{label} scales", affine_scales_kernel, (triton.cdiv(2 * blocks, lanes),), **scales,
            writes={"fits_ptr": fits, "out_ptr": out.view(torch.int32)}, WORDS=size // 4, IMPORTANT=guarded,
            CUT=type_name == "Q5_K" or not guarded,  # as ggml does
        )  # fmt: skip
        launch(f"{label} codes", affine_codes_kernel, (len(flags),), **last, BITS=bits, SIZE=size, GUARDED=guarded)
    else:
        launch(
            f"{label} scales", signed_scales_kernel, (triton.cdiv(blocks, lanes),), **scales,
            writes={"fits_ptr": fits, "out_ptr": out}, SIZE=size,
        )  # fmt: skip
        launch(f"{label} codes", signed_codes_kernel, (len(flags),), **last, SIZE=size)
    return out, flags


def quantize_gguf(x: torch.Tensor, type_name: str, *, imatrix: np.ndarray | None = None) -> torch.Tensor:
    """`ornith_moe.quant.codecs.gguf.quantize_gguf` on the GPU, byte for byte.

    Args:
        x: ([..., K], float32, float16 or bfloat16), K a multiple of the type's block.
        type_name: a key of `ENCODED`.
        imatrix: as there, a NumPy array: ([K], float32) or one row for every matrix of a stack, [E, K].
    Returns:
        ([..., row_bytes], uint8) on the device of x.
    Raises:
        TypeError, ValueError: no encoder here for the type, K does not fill whole blocks, an imatrix of another shape.
        ConversionError: a value that is not finite, or a scale beyond fp16, with row and column.
    Numerics: IEEE fp32 without contraction in ggml's order; deterministic. Waits for the GPU once, to read the flags.
    Example:
        >>> from ornith_moe.kernels.gguf_encode import quantize_gguf                                  # doctest: +SKIP
        >>> quantize_gguf(torch.ones(2, 512, device="cuda"), "Q4_K").shape                            # doctest: +SKIP
        torch.Size([2, 288])
    """
    if type_name not in ENCODED:
        block_shape(type_name)
        raise ValueError(f"type_name: no GPU encoder for {type_name}; have {', '.join(ENCODED)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected float32, float16 or bfloat16, got {x.dtype}; convert it first")
    if not x.dim():
        raise ValueError("x: expected [..., K], got a scalar; add a dimension")
    width = row_bytes(type_name, x.shape[-1])
    importance = upload(imatrix, x.shape, x.device)
    rows = x.contiguous().view(-1, x.shape[-1])
    out, flags = encode(rows, type_name, importance)
    raise_if_set(flags, rows, type_name)
    return out.view(*x.shape[:-1], width)


def upload(imatrix: np.ndarray | None, shape: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    """Checked importance of a stack of matrices of this shape, [E, K] on `device`."""
    return None if imatrix is None else torch.from_numpy(checked_imatrix(imatrix, shape)).to(device)


def raise_if_set(flags: torch.Tensor, rows: torch.Tensor, type_name: str) -> None:
    """The error that the CPU's encoder has for `rows`, if a flag says that there is one. Waits for the GPU."""
    if flags.any():
        quantize_on_cpu(rows.float().cpu().numpy(), type_name)
        raise AssertionError(f"{type_name}: a flag is set for rows that the CPU encodes")
