"""Decoders of the grid types, and IQ1_S and IQ1_M, which have no encoder here.

    IQ2_*, IQ3_*   +- point * (d * (s + 1/2) * unit)          a point of magnitudes; eight signs in a byte
    IQ1_*          (point - 1 +- 1/8) * (d * (s + 1/2) * 2)   a point of -1, 0 and 1, stored one higher; a sign a group

Types differ in where they lay the parts of a super-block: each `unpack` brings them to the same arrays. Source:
ggml-quants.c (`dequantize_row_iq*`); the points come from the `gguf` package.
"""

from __future__ import annotations

from functools import cached_property

import gguf
import numpy as np

from ornith_moe.quant.codecs.blocks32 import HALF
from ornith_moe.quant.codecs.codec import BlockCodec
from ornith_moe.quant.codecs.compiled import compiled
from ornith_moe.quant.codecs.lanes import LANES, load, mask_of, select, store
from ornith_moe.quant.codecs.search import ZERO
from ornith_moe.quant.codecs.tiles import SUPER, half_value
from ornith_moe.quant.gguf_types import block_shape

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
def fields(blocks, at, words, width, shift, step, count, bits):
    """`count` fields, `step` bits apart, of each of so many little-endian words of `width` bytes from byte `at` on."""
    out = np.empty((blocks.shape[0], words * count), np.uint8)
    for block in range(blocks.shape[0]):
        for i in range(words):
            word = np.uint64(0)
            for k in range(width):
                word |= np.uint64(blocks[block, at + width * i + k]) << np.uint64(8 * k)
            for k in range(count):
                field = word >> np.uint64(shift + step * k) & np.uint64((1 << bits) - 1)
                out[block, count * i + k] = np.uint8(field)
    return out


def even(signs):
    """Seven signs and the eighth that makes the number of minuses even."""
    parity = signs ^ signs >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return signs | parity << 7


def joined(low, high):
    return low | high.astype(np.uint16) << 8


def grid_values(name: str) -> np.ndarray:
    """float32 [points, group]."""
    source = getattr(gguf.quants, name)
    source.init_grid()
    return source.grid.reshape(source.grid_shape)


class GridDecoder(BlockCodec):
    """A type whose groups are points of a grid."""

    unit, delta = np.float32(0.25), ZERO

    def decode_blocks(self, blocks, out):
        blocks = blocks.reshape(-1, block_shape(self.name)[1])
        indices, signs, scales = self.unpack(blocks)
        signs = np.ascontiguousarray(signs)
        decode_grid(self.half(blocks), indices, signs, scales, self.unit, self.delta, self.points, out)

    def half(self, blocks):
        """The bits of d."""
        return blocks[:, :2].copy().view("<u2")[:, 0]

    def unpack(self, blocks):
        """Of uint8 [B, bytes]: indices uint16 [B, groups], signs uint8 [B, 32], scales uint8 [B, 8 or 16]."""
        raise NotImplementedError

    @cached_property
    def points(self) -> np.ndarray:
        values = grid_values(self.name) + np.float32(self.delta != 0)
        return values.astype(np.uint8).view(f"u{values.shape[1]}")[:, 0]


class IQ1_S(GridDecoder):
    name, unit, delta = "IQ1_S", np.float32(2), np.float32(0.125)

    def unpack(self, blocks):
        points = joined(blocks[:, 2:34], fields(blocks, 34, 8, 2, 0, 3, 4, 3))
        signs = fields(blocks, 34, 8, 2, 15, 0, 4, 1) * np.uint8(255)
        return points, signs, fields(blocks, 34, 8, 2, 12, 0, 1, 3)


class IQ1_M(GridDecoder):
    """The four quarters of d are the highest four bits of the scales' four words."""

    name, unit, delta = "IQ1_M", np.float32(2), np.float32(0.125)

    def half(self, blocks):
        quarters = blocks[:, 48:].copy().view("<u2") >> 12
        return quarters[:, 0] | quarters[:, 1] << 4 | quarters[:, 2] << 8 | quarters[:, 3] << 12

    def unpack(self, blocks):
        points = joined(blocks[:, :32], fields(blocks, 32, 16, 1, 0, 4, 2, 3))
        signs = fields(blocks, 32, 16, 1, 3, 4, 2, 1) * np.uint8(255)
        return points, signs, fields(blocks, 48, 4, 2, 0, 3, 4, 3)
