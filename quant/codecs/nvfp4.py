"""NVFP4 with a scale of the whole tensor, as ModelOpt and compressed-tensors store it, and its blocks in a GGUF.

    w = e2m1(code) * scale * scale_2          scale e4m3 of every 16 columns, scale_2 fp32 of the tensor

    scale_2   amax / 2688, amax of all that is fused with the tensor; 1 where that is zero       (2688 = 6 * 448)
    scale     e4m3(clamp(t, 2^-9, 448)), t = amax of the 16 / (6 * scale_2); t = 1 where the 16 are zero
    code      e2m1(w / (scale * scale_2)): the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, the even code on ties; bit 3 is
              the sign of what was rounded, so -0.1 becomes -0 and -0 becomes 0

All in fp32, every operation rounded once. Two codes share a byte, the first in its low bits. A GGUF has the same scales
and codes in blocks of 64: four scales, then 32 bytes, each with a code of the first and one of the second half of its
sixteen; `scale_2` lies beside it as a tensor of its own.

Source: modelopt 0.47, torch/quantization/qtensor/nvfp4_tensor.py; llama.cpp, conversion/base.py (`_nvfp4_pack`).
Letters: N rows, K columns.
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
from ornith_moe.quant.simd.small_floats import e4m3_value, load_e4m3, store_e4m3

GROUP = 16  # columns that share a scale
LARGEST = 2688  # of e2m1 times that of e4m3
LEAST_SCALE, MOST_SCALE = np.float32(2.0**-9), np.float32(448)
ZERO, ONE, SIX = np.float32(0), np.float32(1), np.float32(6)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def scale_2_of(amax: float) -> np.float32:
    """The scale of a tensor whose largest magnitude is `amax`: such that its blocks' scales reach up to 448."""
    return np.float32(amax) / np.float32(LARGEST) or ONE


def encode_nvfp4(rows: np.ndarray, scale_2: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows.

    Args:
        rows: ([N, K], float32, or uint16 as the bits of BF16), contiguous, finite; K a multiple of 16.
        scale_2: `scale_2_of` what is fused with them.
    Returns:
        codes: ([N, K / 2], uint8). scales: ([N, K / 16], uint8), the bits of e4m3.
    """
    n, k = rows.shape
    groups = n * k // GROUP
    padded = groups + -groups % LANES
    codes, scales = np.empty(padded * GROUP // 2, np.uint8), np.empty(padded, np.uint8)
    flat = rows.reshape(-1).view()
    flat.flags.writeable = False
    _encode(flat, groups, scale_2, codes, scales)
    return codes[: groups * GROUP // 2].reshape(n, k // 2), scales[:groups].reshape(n, k // GROUP)


def decode_nvfp4(codes: np.ndarray, scales: np.ndarray, scale_2: np.float32, *, divides: bool = False) -> np.ndarray:
    """e2m1(code) * (scale * scale_2), the inverse: float32 [N, K] of what `encode_nvfp4` gives.

    `divides`: e2m1(code) * (scale / scale_2), as compressed-tensors has it.
    """
    out = np.empty((codes.shape[0], 2 * codes.shape[1]), np.float32)
    _decode(codes.reshape(-1), scales.reshape(-1), np.full(LANES, scale_2), divides, out.reshape(-1))
    return out


def gguf_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The blocks of a GGUF's NVFP4, uint8 [N, K / 64 * 36], of codes and scales; K a multiple of 64."""
    out = np.empty((codes.shape[0], scales.shape[1] * 9), np.uint8)
    _to_blocks(np.ascontiguousarray(codes).reshape(-1), np.ascontiguousarray(scales).reshape(-1), out.reshape(-1))
    return out


def of_gguf_blocks(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a GGUF's blocks, the inverse."""
    rows, groups = blocks.shape[0], blocks.shape[1] // 9
    codes, scales = np.empty((rows, groups * GROUP // 2), np.uint8), np.empty((rows, groups), np.uint8)
    _from_blocks(np.ascontiguousarray(blocks).reshape(-1), codes.reshape(-1), scales.reshape(-1))
    return codes, scales


@compiled
def e2m1_code(v):
    """The code of the nearest e2m1, the even one on ties; its fourth bit is the sign of what is below zero."""
    a = absolute(v)
    code = select(a > np.float32(0.25), ONE, broadcast(ZERO))
    code = select(a >= np.float32(0.75), np.float32(2), code)
    code = select(a > np.float32(1.25), np.float32(3), code)
    code = select(a >= np.float32(1.75), np.float32(4), code)
    code = select(a > np.float32(2.5), np.float32(5), code)
    code = select(a >= np.float32(3.5), np.float32(6), code)
    code = select(a > np.float32(5), np.float32(7), code)
    return select(v < ZERO, code + np.float32(8), code)


@compiled
def _encode(x, groups, scale_2, codes, scales):
    """Sixteen groups at a time: their largest magnitudes are the lanes of which scales are made."""
    t, step = new_tile(1), new_tile(1)
    for first in range(0, groups, LANES):
        count = min(LANES, groups - first)
        for lane in range(count):
            t[lane] = highest(absolute(load(x, GROUP * (first + lane))))
        for lane in range(count, LANES):
            t[lane] = ZERO
        reach = load(t, 0) / (SIX * broadcast(scale_2))
        reach = select(reach > ZERO, reach, ONE)
        store_e4m3(scales, first, minimum(maximum(reach, LEAST_SCALE), MOST_SCALE))
        store(step, 0, load_e4m3(scales, first) * scale_2)
        for lane in range(0, count, 2):
            second = min(lane + 1, count - 1)
            a = e2m1_code(load(x, GROUP * (first + lane)) / load_broadcast(step, lane))
            b = e2m1_code(load(x, GROUP * (first + second)) / load_broadcast(step, second))
            store(codes, GROUP // 2 * (first + lane), evens(a, b) + odds(a, b) * np.float32(16))


@compiled
def _decode(codes, scales, scale_2, divides, out):
    step, all_of_them = new_tile(1), load(scale_2, 0)
    for group in range(scales.size):
        scale = broadcast(e4m3_value(scales[group]))
        store(step, 0, scale / all_of_them if divides else scale * all_of_them)
        for i in range(GROUP // 2):
            code = codes[GROUP // 2 * group + i]
            out[GROUP * group + 2 * i] = E2M1[code & 15] * step[0]
            out[GROUP * group + 2 * i + 1] = E2M1[code >> 4] * step[0]


@compiled
def _to_blocks(codes, scales, out):
    for group in range(scales.size):
        at, part = 36 * (group // 4), group % 4
        out[at + part] = scales[group] & 0x7F
        for i in range(8):
            shift = 4 * (i % 2)
            low, high = codes[8 * group + i // 2] >> shift & 15, codes[8 * group + 4 + i // 2] >> shift & 15
            out[at + 4 + 8 * part + i] = np.uint8(low | high << 4)


@compiled
def _from_blocks(blocks, codes, scales):
    for group in range(scales.size):
        at, part = 36 * (group // 4), group % 4
        scales[group] = blocks[at + part]
        for i in range(4):
            first, second = blocks[at + 4 + 8 * part + 2 * i], blocks[at + 4 + 8 * part + 2 * i + 1]
            codes[8 * group + i] = np.uint8(first & 15 | (second & 15) << 4)
            codes[8 * group + 4 + i] = np.uint8(first >> 4 | second >> 4 << 4)
