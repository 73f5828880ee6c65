"""MLX's affine quantization: groups of 64 values of a row, each with a scale and a bias, codes of 2 to 6 or 8 bits.

    n = 2^bits - 1;   s = max((max - min) / n, 1e-7), negative unless |min| > |max|;   edge = the end that is farther
    s, bias = edge / rint(edge / s), edge         or bias = 0 where that is rint(0)
    code = clip(rint((w - bias) / s), 0, n)       w' = code * s + bias

So the end of larger magnitude, and zero, are stored as they are. All in fp32, codes by the scale and bias before these
are rounded to the dtype of the model: the bytes of mlx's kernel for the CPU, whose rule this is because it can be run
anywhere. Its kernels for Metal and CUDA round halves away from zero and let max begin at 0, which gives other codes for
2 to 4 values in a thousand; readers are the same.

Code k of a group lies at bit k * bits, little endian, and groups follow one another. Source: mlx 0.32.4,
mlx/backend/cpu/quantized.cpp (`quantize`), run on random weights; tests/quant/codecs/test_mlx.py says which.

Letters: R rows, K values in a row.
"""

from __future__ import annotations

import numpy as np

import ornith_moe.quant.simd.small_floats  # noqa: F401, by which `load` knows BF16
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import LANES, highest, load, lowest, maximum, minimum, nearest_within, store

GROUP = 64
BITS = (2, 3, 4, 5, 6, 8)
WORD = np.uint64(64)  # bits
EPSILON, ZERO = np.float32(1e-7), np.float32(0)


def encode_affine(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and biases of finite rows.

    Args:
        rows: ([R, K], uint16 as the bits of BF16, or float32), contiguous, K a multiple of 64.
        bits: one of `BITS`.
    Returns:
        codes: ([R, K * bits / 8], uint8).
        scales, biases: ([R, K / 64], float32), which the model's dtype still rounds; infinite where max - min is.
    """
    groups = rows.shape[1] // GROUP
    codes = np.empty((rows.shape[0], groups * bits), np.uint64)
    scales, biases = (np.empty((rows.shape[0], groups), np.float32) for _ in range(2))
    _encode(_flat(rows), bits, _folds(bits), codes.reshape(-1), scales.reshape(-1), biases.reshape(-1))
    return codes.view(np.uint8), scales, biases


def decode_affine(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """code * scale + bias, float32 [R, K], of what `encode_affine` gives; the scales and biases may be rounded."""
    out = np.empty((scales.shape[0], scales.shape[1] * GROUP), np.float32)
    packed, scales, biases = map(np.ascontiguousarray, (codes, scales, biases))
    _decode(_flat(packed.view(np.uint64)), bits, _folds(bits), _flat(scales), _flat(biases), out.reshape(-1))
    return out


def _flat(array: np.ndarray) -> np.ndarray:
    """Flat and read-only: a kernel is compiled once for each kind of array."""
    flat = array.reshape(-1).view()
    flat.flags.writeable = False
    return flat


def _folds(bits: int) -> np.ndarray:
    """How eight codes, a byte each, close up: (shift, bits that stay, bits that come down) of each of three steps."""
    steps = []
    for width in (8, 16, 32):
        kept = bits * width // 8
        stays = sum(((1 << kept) - 1) << place for place in range(0, 64, 2 * width))
        steps.append((width - kept, stays, stays << kept))
    return np.array(steps, np.uint64)


@compiled
def _encode(x, bits, folds, out, scales, biases):
    top = np.float32(2**bits - 1)
    codes = np.empty(GROUP, np.uint8)
    words = codes.view(np.uint64)
    for group in range(scales.size):
        start = GROUP * group
        a, b, c, d = load(x, start), load(x, start + 16), load(x, start + 32), load(x, start + 48)
        high = highest(maximum(maximum(a, b), maximum(c, d)))
        low = lowest(minimum(minimum(a, b), minimum(c, d)))
        s, edge, bias = max((high - low) / top, EPSILON), low, ZERO
        if not abs(low) > abs(high):
            s, edge = -s, high
        steps = np.rint(edge / s)
        if steps != ZERO:
            s, bias = edge / steps, edge
        scales[group], biases[group] = s, bias
        for i in range(0, GROUP, LANES):
            store(codes, i, nearest_within((load(x, start + i) - bias) / s, ZERO, top))
        _pack(words, np.uint64(8 * bits), folds, out, bits * group)


@compiled
def _pack(words, wide, folds, out, at):
    """Eight words of a code in each byte, as runs of `wide` bits one after another from out[at] on."""
    word, filled = np.uint64(0), np.uint64(0)
    for j in range(8):
        run = words[j]
        for i in range(3):
            run = run & folds[i, 1] | run >> folds[i, 0] & folds[i, 2]
        word = word | run << filled
        filled = filled + wide
        if filled >= WORD:
            out[at] = word
            at += 1
            filled = filled - WORD
            word = run >> wide - filled if filled else np.uint64(0)


@compiled
def _unpack(packed, at, wide, folds, words):
    """The inverse of `_pack`."""
    taken = np.uint64(0)
    for j in range(8):
        run = packed[at] >> taken
        taken = taken + wide
        if taken >= WORD:
            at += 1
            taken = taken - WORD
            if taken:
                run = run | packed[at] << wide - taken
        for i in range(2, -1, -1):
            run = run & folds[i, 1] | (run & folds[i, 2]) << folds[i, 0]
        words[j] = run


@compiled
def _decode(packed, bits, folds, scales, biases, out):
    codes = np.empty(GROUP, np.uint8)
    words = codes.view(np.uint64)
    for group in range(scales.size):
        _unpack(packed, bits * group, np.uint64(8 * bits), folds, words)
        for i in range(0, GROUP, LANES):
            store(out, GROUP * group + i, load(codes, i) * scales[group] + biases[group])
