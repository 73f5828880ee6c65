"""MLX's floating-point groups: small floats with one scale for 16 or 32 values, and none of the whole tensor.

           group   scale                                       code
    nvfp4     16   e4m3(amax / 6)                              e2m1(w / scale), 4 bits
    mxfp4     32   2^ceil(log2(amax / 6)), a byte of UE8M0     e2m1(w / scale), 4 bits
    mxfp8     32   2^ceil(log2(amax / 448))                    e4m3(w / scale), 8 bits

A group of zeros has the scale 1 of UE8M0, and 0 of e4m3, which is also what an amax below 6 * 2^-10 gets: its values
become zero. e2m1 takes the smaller code on ties and has no -0, unlike ModelOpt's NVFP4 (quant/codecs/nvfp4.py); e4m3 is
rounded to nearest even. In 4 bits two codes share a byte, the first in its low bits.

The bytes of mlx's kernel for the CPU, but for scales below 2^-127, which wrap there and decode to infinity. Source: mlx
0.32.4, mlx/backend/cpu/quantized.cpp (`fp_quantize`), run; its kernels for Metal take even codes on ties and keep -0.

Letters: R rows, K values in a row.
"""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.codecs.block_tiles import new_tile
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import (
    LANES,
    absolute,
    broadcast,
    evens,
    highest,
    load,
    load_broadcast,
    maximum,
    minimum,
    odds,
    select,
    store,
)
from ornith_moe.quant.simd.small_floats import load_e4m3, store_e4m3
from ornith_moe.quant.source.slab import e4m3_values

NVFP4 = 16  # its group; scales of others are powers of two
ZERO, SIX, MOST, NEVER = np.float32(0), np.float32(6), np.float32(448), np.float32(np.inf)
POWERS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))  # of the bytes of UE8M0
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
PAIRS = np.array([[(1, -1)[code >> 3] * E2M1[code & 7] for code in (b & 15, b >> 4)] for b in range(256)], np.float32)


def encode_float(rows: np.ndarray, group: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of finite rows.

    Args:
        rows: ([R, K], uint16 as the bits of BF16, or float32), contiguous, K a multiple of the group.
        group, bits: of a row of the table above.
    Returns:
        codes: ([R, K * bits / 8], uint8). scales: ([R, K / group], uint8).
    """
    count, columns = rows.shape
    groups, width = count * columns // group, columns * bits // 8
    padded = groups + -groups % LANES
    codes, scales = np.empty(padded * group * bits // 8, np.uint8), np.empty(padded, np.uint8)
    flat = rows.reshape(-1).view()
    flat.flags.writeable = False
    _encode(flat, groups, group, bits, codes, scales)
    return codes[: count * width].reshape(count, width), scales[:groups].reshape(count, columns // group)


def decode_float(codes: np.ndarray, scales: np.ndarray, group: int, bits: int) -> np.ndarray:
    """code * scale, float32 [R, K], the inverse; NaN of bytes that are no number."""
    values = np.take(e4m3_values(), codes) if bits == 8 else np.take(PAIRS, codes, axis=0)
    steps = np.take(e4m3_values() if group == NVFP4 else POWERS, scales)
    return (values.reshape(*scales.shape, group) * steps[..., None]).reshape(len(scales), -1)


@compiled
def _e2m1(v):
    """The code of the nearest e2m1, the smaller on ties; its fourth bit is the sign of what does not become zero."""
    a = absolute(v)
    code = select(a > np.float32(0.25), np.float32(1), broadcast(ZERO))
    code = select(a > np.float32(0.75), np.float32(2), code)
    code = select(a > np.float32(1.25), np.float32(3), code)
    code = select(a > np.float32(1.75), np.float32(4), code)
    code = select(a > np.float32(2.5), np.float32(5), code)
    code = select(a > np.float32(3.5), np.float32(6), code)
    code = select(a > np.float32(5), np.float32(7), code)
    return select((v < ZERO) & (code > ZERO), code + np.float32(8), code)


@compiled
def _power(reach):
    """The byte of the least power of two that is not below `reach`, by its bits; of zero that of 1."""
    bits = np.float32(reach).view(np.uint32)
    if bits == 0:
        return np.uint8(127)
    return np.uint8(0) if bits <= 0x400000 else np.uint8((bits + np.uint32(0x7FFFFF)) >> np.uint32(23))


@compiled
def _encode(x, groups, width, bits, codes, scales):
    """Sixteen groups at a time: their largest magnitudes are the lanes of which scales are made."""
    step, most = new_tile(1), SIX if bits == 4 else MOST
    for first in range(0, groups, LANES):
        count, start = min(LANES, groups - first), width * first
        step[:] = ZERO
        for lane in range(count):
            largest = absolute(load(x, start + width * lane))
            if width == 2 * LANES:
                largest = maximum(largest, absolute(load(x, start + width * lane + LANES)))
            step[lane] = highest(largest) / most
        if width != NVFP4:
            for lane in range(count):
                scales[first + lane] = _power(step[lane])
                power = np.uint32(scales[first + lane]) << np.uint32(23)
                step[lane] = np.uint32(max(power, np.uint32(0x400000))).view(np.float32)
        else:
            store_e4m3(scales, first, minimum(load(step, 0), MOST))
            values = load_e4m3(scales, first)
            store(step, 0, select(values > ZERO, values, NEVER))
        if bits == 8:
            for i in range(0, width * count, LANES):
                store_e4m3(codes, start + i, load(x, start + i) / load_broadcast(step, i // width))
        else:
            for i in range(0, width * count, 2 * LANES):
                j = i + LANES if i + LANES < width * count else i
                a = _e2m1(load(x, start + i) / load_broadcast(step, i // width))
                b = _e2m1(load(x, start + j) / load_broadcast(step, j // width))
                store(codes, (start + i) // 2, evens(a, b) + odds(a, b) * np.float32(16))
