"""FP8 on a CPU: `ornith_moe.quant.fp8` in machine code, for its tensors and for slabs on their way to disk and back.

That module is the definition and this one gives its bits, NaN payloads of decoded values aside: IEEE division, twice;
the scale rounded before it divides; a block with NaN or Inf gets a NaN scale and code 0x7f throughout. A row of blocks
is read twice, for their largest magnitudes and for their codes, each time as it lies in memory: block by block, 128
short pieces a power of two apart, took almost twice as long. No block is padded or copied.

N rows, K columns; a block is (rows, columns), with None for whole rows: (128, 128), (1, None) and (1, 128).
"""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.codecs.block_tiles import new_tile
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import LANES, load, maximum, minimum, store
from ornith_moe.quant.simd.small_floats import larger_magnitude, largest_magnitude, load_e4m3, rounded, store_e4m3

SCALES = {"fp32": (0, np.float32), "bf16": (16, np.uint16), "ue8m0": (23, np.uint8)}  # bits below those of fp32, bits
MIN_SCALE, E4M3_MAX = np.float32(2.0**-126), np.float32(448)


def encode_fp8(
    rows: np.ndarray,
    block: tuple[int, int | None],
    *,
    scale: str,
    bf16_first: bool = True,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """q[i, j] = e4m3fn(rows[i, j] / s) with one scale s per block.

    Args:
        rows: ([N, K], uint16 as the bits of BF16, or float32 or float16), contiguous.
        block: rows and columns that share a scale; None for all columns. Columns a multiple of 16.
        scale: dtype of the scale, "fp32", "bf16" or "ue8m0".
        bf16_first: round to BF16 before anything else, as weights are; activations are taken as given.
        out: memory for q, contiguous.
    Returns:
        q: ([N, K], uint8).
        scale: ([ceil(N / rows), ceil(K / columns)], float32, or uint16 or uint8 as the bits of BF16 or UE8M0).
    Raises:
        ValueError: columns of a block that are no multiple of 16.
    Numerics: the bits of `quantize_fp8_block`, `quantize_fp8_channel` and `quantize_fp8_tokens`.
    """
    if rows.dtype == np.float16:
        rows = rows.astype(np.float32)
    n, k = rows.shape
    x, padded = _whole_lanes(rows)
    bn, bk = _block(block, padded)
    codes = np.empty((n, padded), np.uint8) if out is None or padded != k else out
    bits = np.empty((-(-n // bn), 1 if block[1] is None else -(-padded // bk)), np.uint32)
    shift, dtype = SCALES[scale]
    round_first = bf16_first and rows.dtype != np.uint16
    _encode(x, n, padded, bn, bk, round_first, shift, codes.reshape(-1), bits)
    if shift:
        bits = (bits >> shift).astype(dtype)
    return _without_padding(codes, k, out), bits.view(dtype)


def encode_fp8_with(rows: np.ndarray, scale: np.float32) -> np.ndarray:
    """e4m3fn(rows / scale), with the quotient rounded to BF16 before where rows are the bits of BF16.

    Args:
        rows: ([N, K], uint16 as the bits of BF16, or float32), contiguous. scale: at least the largest magnitude / 448.
    Returns: ([N, K], uint8).
    """
    x, padded = _whole_lanes(rows)
    codes = np.empty((rows.shape[0], padded), np.uint8)
    _encode_with(x, scale, rows.dtype == np.uint16, codes.reshape(-1))
    return _without_padding(codes, rows.shape[1], None)


def decode_fp8(
    codes: np.ndarray,
    scale: np.ndarray,
    block: tuple[int, int | None],
    *,
    dtype: str = "fp32",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """rows[i, j] = codes[i, j] * scale[i // block[0], j // block[1]], the inverse.

    Args:
        codes: ([N, K], uint8).
        scale, block: as `encode_fp8` returns and takes them.
        dtype: "fp32", or "bf16" for the bits of BF16 as uint16. out: memory for the result, contiguous.
    Returns: ([N, K], float32 or uint16).
    """
    factors = scale
    if scale.dtype == np.uint16:
        factors = (scale.astype(np.uint32) << 16).view(np.float32)
    elif scale.dtype == np.uint8:  # exponents; 0 is 2^-127, a subnormal, and 0xff is NaN
        powers = np.maximum(scale.astype(np.uint32) << 23, 0x400000)
        factors = np.where(scale == 0xFF, np.uint32(0x7FC00000), powers).view(np.float32)
    n, k = codes.shape
    x, padded = _whole_lanes(codes)
    bn, bk = _block(block, padded)
    if out is not None and padded == k:
        rows = out
    else:
        rows = np.empty((n, padded), {"fp32": np.float32, "bf16": np.uint16}[dtype])
    _decode(x, n, padded, bn, bk, np.ascontiguousarray(factors), rows.reshape(-1))
    return _without_padding(rows, k, out)


def _block(block: tuple[int, int | None], columns: int) -> tuple[int, int]:
    rows, width = block
    if width is not None and width % LANES:
        raise ValueError(f"block: expected columns in multiples of {LANES} or None, got {block}")
    return rows, width or max(columns, LANES)


def _whole_lanes(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Flat and read-only, with rows filled up by zeros to whole lanes, and the columns of that."""
    padding = -rows.shape[1] % LANES
    if padding:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    flat = rows.reshape(-1).view()
    flat.flags.writeable = False
    return flat, rows.shape[1]


def _without_padding(rows: np.ndarray, columns: int, out: np.ndarray | None) -> np.ndarray:
    """The columns that there are, in `out` where it is given."""
    if out is None or rows is out:
        return np.ascontiguousarray(rows[:, :columns])
    out[...] = rows[:, :columns]
    return out


@compiled
def _scale_of(amax, shift):
    """The scale that goes with `amax`, rounded to a dtype whose bits lie `shift` below those of fp32."""
    if not amax < np.float32(np.inf):
        return np.float32(np.nan)
    if amax == 0:
        return np.float32(1)
    s = max(np.float32(amax / E4M3_MAX), MIN_SCALE)
    if shift == 16:
        return rounded(s)
    if shift == 23:  # up: any mantissa bit carries into the exponent
        bits = (np.float32(s).view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)
        return np.uint32(bits).view(np.float32)
    return s


@compiled
def _encode(x, n, k, bn, bk, round_first, shift, codes, scales):
    blocks = scales.shape[1]
    largest, s = new_tile(blocks), np.empty(blocks, np.float32)
    for i in range(scales.shape[0]):
        first, last = bn * i, min(bn * (i + 1), n)
        largest[:] = 0
        for row in range(first, last):
            for j in range(blocks):
                most = load(largest, LANES * j)
                for at in range(k * row + bk * j, k * row + min(bk * (j + 1), k), LANES):
                    most = larger_magnitude(most, load(x, at))
                store(largest, LANES * j, most)
        for j in range(blocks):
            most = load(largest, LANES * j)
            if round_first:  # rounding keeps the order of magnitudes
                most = rounded(most)
            s[j] = _scale_of(largest_magnitude(most), shift)
            scales[i, j] = np.float32(s[j]).view(np.uint32)
        for row in range(first, last):
            for j in range(blocks):
                left, right, step = k * row + bk * j, k * row + min(bk * (j + 1), k), s[j]
                if np.isnan(step):
                    codes[left:right] = 0x7F
                elif round_first:
                    for at in range(left, right, LANES):
                        store_e4m3(codes, at, rounded(load(x, at)) / step)
                else:
                    for at in range(left, right, LANES):
                        store_e4m3(codes, at, load(x, at) / step)


@compiled
def _encode_with(x, scale, round_first, codes):
    for at in range(0, x.size, LANES):
        v = minimum(maximum(load(x, at) / scale, -E4M3_MAX), E4M3_MAX)
        store_e4m3(codes, at, rounded(v) if round_first else v)


@compiled
def _decode(codes, n, k, bn, bk, scales, out):
    for row in range(n):
        for j in range(scales.shape[1]):
            s = scales[row // bn, j]
            for at in range(k * row + bk * j, k * row + min(bk * (j + 1), k), LANES):
                store(out, at, load_e4m3(codes, at) * s)
