"""MXFP4 as compressed-tensors stores it: e2m1 codes with a power of two for every 32 columns, a byte of UE8M0.

    w = e2m1(code) * 2^(scale - 127)

    scale   e - 2 + 127, amax = m * 2^e of the 32 with 1 <= m < 2; one more where m >= 1.75, whose values would be above
            7 and cost most when they are cut to 6; at least 0, as of zeros
    code    e2m1(w / 2^(scale - 127)): the nearest, the even code on ties, at most 6; signs as in codecs/nvfp4.py

MLX takes the next power of two above amax / 6 (codecs/mlx_float.py), a GGUF the one below amax / 4: three formats, one
name. Two codes share a byte, the first in its low bits.

Source: compressed-tensors 0.20, quantization/utils/mxfp_utils.py (`generate_mx_scales`), compressors/mxfp4.
Letters: N rows, K columns.
"""

from __future__ import annotations

import math

import numpy as np

from ornith_moe.quant.codecs.mlx_float import decode_float
from ornith_moe.quant.codecs.nvfp4 import e2m1_code
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import LANES, absolute, broadcast, evens, highest, load, maximum, odds, store

GROUP = 32  # columns that share a scale
BIAS = 127
UP = 1.75 / 2  # of `frexp`, whose m is from 0.5 to 1


def encode_mxfp4(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows.

    Args:
        rows: ([N, K], float32, or uint16 as the bits of BF16), contiguous, finite; K a multiple of 32.
    Returns:
        codes: ([N, K / 2], uint8). scales: ([N, K / 32], uint8).
    """
    n, k = rows.shape
    codes, scales = np.empty((n, k // 2), np.uint8), np.empty((n, k // GROUP), np.uint8)
    flat = rows.reshape(-1).view()
    flat.flags.writeable = False
    _encode(flat, codes.reshape(-1), scales.reshape(-1))
    return codes, scales


def decode_mxfp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """e2m1(code) * 2^(scale - 127), the inverse: float32 [N, K], exact."""
    return decode_float(codes, scales, GROUP, bits=4)


@compiled
def _encode(x, codes, scales):
    for g in range(scales.size):
        first, most = GROUP * g, absolute(load(x, GROUP * g))
        for at in range(first + LANES, first + GROUP, LANES):
            most = maximum(most, absolute(load(x, at)))
        mantissa, exponent = math.frexp(highest(most))
        scale = max(exponent - 3 + BIAS + (mantissa >= UP), 0) if mantissa else 0
        scales[g] = scale
        step = broadcast(np.float32(math.ldexp(1.0, scale - BIAS)))
        for at in range(first, first + GROUP, 2 * LANES):
            a, b = e2m1_code(load(x, at) / step), e2m1_code(load(x, at + LANES) / step)
            store(codes, at // 2, evens(a, b) + odds(a, b) * np.float32(16))
