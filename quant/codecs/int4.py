"""int4 with one BF16 scale for a group of columns, eight to a word, as compressed-tensors packs them.

    w = (code - 8) * scale        scale = bf16(amax / 7.5) of the group, 2^-7 where that is zero
    code = clamp(rint(w / scale), -8, 7) + 8, the quotient of a BF16 weight rounded to BF16 before, as torch divides

Code k of eight lies at bit 4 k of its word, so two share a byte, the first in its low bits.

Source: compressed-tensors 0.20, quantization/utils/helpers.py (`calculate_qparams`), compressors/pack_quantized.
Letters: N rows, K columns.
"""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import (
    LANES,
    absolute,
    broadcast,
    evens,
    highest,
    load,
    maximum,
    nearest_within,
    odds,
    store,
)
from ornith_moe.quant.simd.small_floats import bf16_bits, bf16_value, rounded

EPS = np.float32(2.0**-7)  # of BF16
LOW, HIGH, MIDDLE = np.float32(-8), np.float32(7), np.float32(8)
STEPS = np.float32(7.5)


def encode_int4(rows: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows.

    Args:
        rows: ([N, K], float32, or uint16 as the bits of BF16), contiguous, finite.
        group: columns that share a scale, a multiple of 32 that divides K.
    Returns:
        codes: ([N, K / 2], uint8). scales: ([N, K / group], uint16), the bits of BF16.
    """
    n, k = rows.shape
    codes, scales = np.empty((n, k // 2), np.uint8), np.empty((n, k // group), np.uint16)
    flat = rows.reshape(-1).view()
    flat.flags.writeable = False
    _encode(flat, group, rows.dtype == np.uint16, codes.reshape(-1), scales.reshape(-1))
    return codes, scales


def decode_int4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(code - 8) * scale, float32 [N, K]: exact, and more digits than BF16, to which readers round it."""
    values = np.empty((codes.shape[0], codes.shape[1], 2), np.float32)
    values[..., 0], values[..., 1] = codes & 15, codes >> 4
    values -= MIDDLE
    grouped = values.reshape(*scales.shape, -1)
    grouped *= (scales.astype(np.uint32) << 16).view(np.float32)[..., None]
    return values.reshape(codes.shape[0], -1)


@compiled
def _encode(x, group, bf16_quotient, codes, scales):
    for g in range(scales.size):
        most = absolute(load(x, group * g))
        for at in range(group * g + LANES, group * (g + 1), LANES):
            most = maximum(most, absolute(load(x, at)))
        scales[g] = bf16_bits(np.float32(highest(most) / STEPS))
        if scales[g] == 0:
            scales[g] = bf16_bits(EPS)
        scale = broadcast(bf16_value(scales[g]))
        for at in range(group * g, group * (g + 1), 2 * LANES):
            a, b = load(x, at) / scale, load(x, at + LANES) / scale
            if bf16_quotient:
                a, b = rounded(a), rounded(b)
            a, b = nearest_within(a, LOW, HIGH) + MIDDLE, nearest_within(b, LOW, HIGH) + MIDDLE
            store(codes, at // 2, evens(a, b) + odds(a, b) * np.float32(16))
