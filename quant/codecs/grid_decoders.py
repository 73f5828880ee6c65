"""Decoders of the grid types, and IQ1_S and IQ1_M, which have no encoder here.

    IQ2_*, IQ3_*   +- point * (d * (s + 1/2) * unit)          a point of magnitudes; eight signs in a byte
    IQ1_*          (point - 1 +- 1/8) * (d * (s + 1/2) * 2)   a point of -1, 0 and 1, stored one higher; a sign a group

Types differ in where they lay the parts of a super-block, which an `unpack` of each brings to the same arrays. Source:
ggml-quants.c (`dequantize_row_iq*`); the points come from the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import gguf
import numpy as np

from ornith_moe.quant.codecs.block_tiles import SUPER
from ornith_moe.quant.codecs.blocks32 import HALF
from ornith_moe.quant.codecs.codec import BlockCodec
from ornith_moe.quant.codecs.search import ZERO
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.fp16 import half_value
from ornith_moe.quant.simd.lanes import LANES, load, mask_of, select, store

ONE = np.float32(1)


@compiled
def decode_grid(d, indices, signs, scales, unit, delta, points, out):
    """Rows are super-blocks; d is the bits of fp16, and `points` holds each point as the bytes of one number."""
    groups, count = indices.shape[1], scales.shape[1]
    chosen = np.empty(groups, points.dtype)
    magnitudes = chosen.view(np.uint8)
    for block in range(d.size):
        for g in range(groups):
            chosen[g] = points[indices[block, g]]
        step = half_value(d[block])
        for i in range(0, SUPER, LANES):
            scale = step * (HALF + np.float32(scales[block, i * count // SUPER])) * unit
            minus = mask_of(np.uint32(signs[block, i // 8] | signs[block, i // 8 + 1] << 8))
            v = load(magnitudes, i)
            if delta != ZERO:
                v = (v + select(minus, -ONE - delta, delta - ONE)) * scale
            else:
                v = v * select(minus, -scale, scale)
            store(out, SUPER * block + i, v)


@compiled
def number(blocks, at, count):
    """A little-endian number of `count` bytes."""
    value = 0
    for i in range(count):
        value |= int(blocks[at + i]) << 8 * i
    return value


def grid_values(name: str) -> np.ndarray:
    """float32 [points, group]."""
    source = getattr(gguf.quants, name)
    source.init_grid()
    return source.grid.reshape(source.grid_shape)


class GridDecoder(BlockCodec):
    """A type whose groups are points of a grid.

    `unpack(blocks, d, indices, signs, scales)` takes flat bytes apart: of every super-block the bits of d [1], points
    [32 or 64], eight signs in each of [32] bytes and scales [8 or 16].
    """

    unpack: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
    unit, delta = np.float32(0.25), ZERO

    @property
    def sub(self) -> int:
        """How many values share a scale."""
        raise NotImplementedError

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        count = out.size // SUPER
        d, indices = np.empty(count, np.uint16), np.empty((count, SUPER // self.points.itemsize), np.uint16)
        signs, scales = np.empty((count, SUPER // 8), np.uint8), np.empty((count, SUPER // self.sub), np.uint8)
        self.unpack(blocks, d, indices, signs, scales)
        decode_grid(d, indices, signs, scales, self.unit, self.delta, self.points, out)

    @cached_property
    def points(self) -> np.ndarray:
        values = grid_values(self.name) + np.float32(self.delta != 0)
        return values.astype(np.uint8).view(f"u{values.shape[1]}")[:, 0]


@compiled
def unpack_iq1_s(blocks, d, indices, signs, scales):
    """Words of 16 bits: four times the three high bits of a point, three bits of scale, a sign."""
    for b in range(d.size):
        at = 50 * b
        d[b] = number(blocks, at, 2)
        for j in range(8):
            word = number(blocks, at + 34 + 2 * j, 2)
            scales[b, j] = word >> 12 & 7
            for k in range(4 * j, 4 * j + 4):
                indices[b, k] = blocks[at + 2 + k] | (word >> 3 * (k % 4) & 7) << 8
                signs[b, k] = 255 * (word >> 15)


@compiled
def unpack_iq1_m(blocks, d, indices, signs, scales):
    """Nibbles: the three high bits of a point and its sign. Words of 16 bits: four scales and a quarter of d."""
    for b in range(d.size):
        at, half = 56 * b, 0
        for j in range(4):
            word = number(blocks, at + 48 + 2 * j, 2)
            half |= word >> 12 << 4 * j
            for k in range(4):
                scales[b, 4 * j + k] = word >> 3 * k & 7
        d[b] = half
        for k in range(32):
            nibble = blocks[at + 32 + k // 2] >> 4 * (k % 2) & 15
            indices[b, k] = blocks[at + k] | (nibble & 7) << 8
            signs[b, k] = 255 * (nibble >> 3)


class IQ1_S(GridDecoder):
    name, sub, unit, delta = "IQ1_S", 32, np.float32(2), np.float32(0.125)
    unpack = staticmethod(unpack_iq1_s)


class IQ1_M(GridDecoder):
    name, sub, unit, delta = "IQ1_M", 16, np.float32(2), np.float32(0.125)
    unpack = staticmethod(unpack_iq1_m)
