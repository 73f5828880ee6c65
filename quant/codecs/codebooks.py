"""IQ4_NL, IQ4_XS, MXFP4, NVFP4: four-bit codes for the entries of a fixed table.

    IQ4_NL   32 values    d * table[q]                     fp16 d
    IQ4_XS   256 values   d * s * table[q]                 fp16 d, signed 6-bit s for every 32
    MXFP4    32 values    2^(e - 128) * doubled[q]         exponent e, one byte
    NVFP4    64 values    d * doubled[q]                   UE4M3 d for every 16

IQ4: scales near m / -127 (m the signed value of largest magnitude) are tried, each refitted to its codes; the one with
the least weighted error wins. Weights are v^2, or with importance a, a * sqrt(2 * mean of the block of v^2 + v^2).

MXFP4 and NVFP4 (doubled: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, that is twice E2M1) search nothing: the scale
follows from the largest magnitude and every value takes the nearest entry, the smaller one on ties. e is
floor(log2(amax)) + 125 with the logarithm rounded to float32, so an amax just below a power of two counts as it. Below
2^-125 C casts a negative number to a byte (a block of 1e-38 decodes as zeros, with the exponent of 2^127); here e is 0.

Source: ggml-quants.c (`quantize_row_iq4_nl_impl`, `quantize_row_mxfp4_ref`, `quantize_row_nvfp4_ref`).
"""

from __future__ import annotations

import math

import numpy as np

from ornith_moe.quant.codecs.block_tiles import SUPER, gather, importance, new_tile, sum_of_squares
from ornith_moe.quant.codecs.blocks32 import BLOCK, HALF, put, reciprocal
from ornith_moe.quant.codecs.codec import BlockCodec
from ornith_moe.quant.codecs.search import EPSILON, ZERO, largest
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.fp16 import half_at, half_bits
from ornith_moe.quant.simd.lanes import (
    LANES,
    absolute,
    broadcast,
    highest,
    load,
    maximum,
    select,
    store,
)
from ornith_moe.quant.simd.packing import pack, unpack

TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
BETWEEN = TABLE[:-1] + TABLE[1:]  # twice the middle, which rounds nothing
DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
SIGNED = np.append(DOUBLED, 0 - DOUBLED)


@compiled
def entry(v):
    """The entry of the table nearest to v, the larger one on ties."""
    twice = v + v
    nearest_entry = broadcast(TABLE[0])
    for k in range(15):
        nearest_entry = select(twice >= BETWEEN[k], TABLE[k + 1], nearest_entry)
    return nearest_entry


@compiled
def code_of(v):
    """The code of that entry; 15 for NaN, 0 times the reciprocal of a subnormal scale, where C's search ends too."""
    twice = v + v
    code = select(v == v, broadcast(ZERO), broadcast(np.float32(15)))
    for k in range(15):
        code = select(twice >= BETWEEN[k], np.float32(k + 1), code)
    return code


@compiled
def table_scale(n, x, w):
    """The scale d of x ~ d * table[q]."""
    value, magnitude = largest(n, x)
    scale = best = broadcast(ZERO)
    for step in range(-8, 8):
        if step == -8:  # the obvious scale is tried first
            tried = np.float32(1) / (-value / TABLE[0])
        else:
            tried = (broadcast(np.float32(step)) + TABLE[0]) / value
        sum_xq = sum_qq = broadcast(ZERO)
        for i in range(n):
            v = load(x, LANES * i)
            q = entry(tried * v)
            weighted = load(w, LANES * i) * q
            sum_xq = sum_xq + weighted * v
            sum_qq = sum_qq + weighted * q
        better = sum_qq > ZERO
        if step > -8:
            better = better & (sum_xq * sum_xq > best * sum_qq)
        scale = select(better, sum_xq / sum_qq, scale)
        best = select(better, scale * sum_xq, best)
    return select(magnitude < EPSILON, ZERO, scale)


@compiled
def table_scales(x, columns, width, scales):
    """The scale of every 32 values; `width` values share a sigma2."""
    blocks, count = x.size // width, width // BLOCK
    tile, w, fit = new_tile(width), new_tile(BLOCK), new_tile(1)
    a = new_tile(width if columns.size else 0)
    for block in range(0, blocks, LANES):
        gather(x, block, blocks, width, tile)
        if columns.size:
            gather(columns, block, blocks, width, a)
        sigma2 = sum_of_squares(width, tile) * (np.float32(2) / np.float32(width))
        for j in range(count):
            start = LANES * BLOCK * j
            for i in range(BLOCK):
                v = load(tile, start + LANES * i)
                if columns.size:
                    store(w, LANES * i, importance(sigma2, v, load(a, start + LANES * i)))
                else:
                    store(w, LANES * i, v * v)
            store(fit, 0, table_scale(BLOCK, tile[start : start + LANES * BLOCK], w))
            for lane in range(min(LANES, blocks - block)):
                scales[count * (block + lane) + j] = fit[lane]


@compiled
def encode_iq4_nl(x, scales, out):
    for block in range(scales.size):
        put(out, 18 * block, half_bits(scales[block]), 2)
        inverse = reciprocal(scales[block])
        a = code_of(load(x, BLOCK * block) * inverse)
        b = code_of(load(x, BLOCK * block + LANES) * inverse)
        store(out, 18 * block + 2, a + b * np.float32(16))


@compiled
def encode_iq4_xs(x, scales, out):
    """d, two high bits of eight s, four low bits of each, codes."""
    count = SUPER // BLOCK
    for block in range(scales.size // count):
        at, largest = 136 * block, ZERO
        for j in range(count):
            scale = scales[count * block + j]
            largest = scale if abs(scale) > abs(largest) else largest
        d = largest / np.float32(-32)
        inverse, high = reciprocal(d), 0
        put(out, at, half_bits(d), 2)
        for j in range(count):
            s = max(-32, min(31, int(np.rint(inverse * scales[count * block + j]))))
            step = reciprocal(d * np.float32(s))
            a = code_of(load(x, SUPER * block + BLOCK * j) * step)
            b = code_of(load(x, SUPER * block + BLOCK * j + LANES) * step)
            store(out, at + 8 + LANES * j, a + b * np.float32(16))
            high |= (s + 32) >> 4 << 2 * j
            if j % 2 == 0:
                out[at + 4 + j // 2] = (s + 32) & 15
            else:
                out[at + 4 + j // 2] |= ((s + 32) & 15) << 4
        put(out, at + 2, high, 2)


@compiled
def entries(table, q):
    """The entries of sixteen codes."""
    chosen = broadcast(table[0])
    for k in range(1, 16):
        chosen = select(q >= np.float32(k), table[k], chosen)
    return chosen


@compiled
def decode_iq4_nl(blocks, out):
    for block in range(out.size // BLOCK):
        d = half_at(blocks, 18 * block)
        for i in range(0, BLOCK, LANES):
            store(out, BLOCK * block + i, entries(TABLE, unpack(blocks, 18 * block + 2, 4, 16, i)) * d)


@compiled
def decode_iq4_xs(blocks, out):
    for block in range(out.size // SUPER):
        at = 136 * block
        d = half_at(blocks, at)
        for j in range(SUPER // BLOCK):
            low, high = blocks[at + 4 + j // 2] >> 4 * (j % 2) & 15, blocks[at + 2 + j // 4] >> 2 * (j % 4) & 3
            step = d * np.float32(low + 16 * high - 32)
            for i in range(BLOCK * j, BLOCK * (j + 1), LANES):
                store(out, SUPER * block + i, entries(TABLE, unpack(blocks, at + 8, 4, 16, i)) * step)


class IQ4_NL(BlockCodec):
    name, halves, important = "IQ4_NL", (0,), True

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        scales = np.empty(x.size // BLOCK, np.float32)
        table_scales(x, columns, BLOCK, scales)
        encode_iq4_nl(x, scales, out.reshape(-1))

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_iq4_nl(blocks, out)


class IQ4_XS(BlockCodec):
    name, halves, important = "IQ4_XS", (0,), True

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        scales = np.empty(x.size // BLOCK, np.float32)
        table_scales(x, columns, SUPER, scales)
        encode_iq4_xs(x, scales, out.reshape(-1))

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_iq4_xs(blocks, out)


@compiled
def doubled_code(v, d):
    """The code of the entry of d * doubled nearest to v, the smaller one on ties; its fourth bit is the sign."""
    code, error = broadcast(ZERO), absolute(v)
    for k in range(1, 8):
        other = absolute(d * DOUBLED[k] - absolute(v))
        better = other < error
        code, error = select(better, np.float32(k), code), select(better, other, error)
    return select((v < ZERO) & (code > ZERO), code + np.float32(8), code)


@compiled
def encode_mxfp4(x, out):
    for block in range(x.size // BLOCK):
        a, b = load(x, BLOCK * block), load(x, BLOCK * block + LANES)
        amax = highest(maximum(absolute(a), absolute(b)))
        e = 0
        if amax > 0:
            e = max(0, math.floor(np.float32(math.log2(np.float64(amax)))) + 125)
        d = np.float32(2.0 ** (e - 128))
        out[17 * block] = e
        store(out, 17 * block + 1, doubled_code(a, d) + doubled_code(b, d) * np.float32(16))


@compiled
def half_e8m0(e):
    """Half of 2^(e - 127): the table is doubled. The smallest two are subnormal."""
    return np.uint32(0x200000 << e if e < 2 else (e - 1) << 23).view(np.float32)


@compiled
def decode_mxfp4(blocks, out):
    for block in range(out.size // BLOCK):
        d = half_e8m0(int(blocks[17 * block]))
        for i in range(0, BLOCK, LANES):
            store(out, BLOCK * block + i, entries(SIGNED, unpack(blocks, 17 * block + 1, 4, 16, i)) * d)


class MXFP4(BlockCodec):
    name = "MXFP4"

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        encode_mxfp4(x, out.reshape(-1))

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_mxfp4(blocks, out)


@compiled
def ue4m3_bits(value):
    """The byte of an unsigned E4M3 of value > 0, halves up; from 248 on ggml writes 0x7E, which is 448."""
    if value >= np.float32(248):
        return 0x7E
    if value < np.float32(2.0**-6):  # steps of 2^-9
        return min(7, int(value * np.float32(512) + HALF))
    bits = np.float32(value).view(np.uint32)
    return (int(bits >> np.uint32(19)) + 1 >> 1) - (120 << 3)


@compiled
def half_ue4m3(byte):
    """Half of what the byte stands for: the table is doubled."""
    if byte < 8:
        return np.float32(byte) * np.float32(2.0**-10)
    return np.uint32((byte + (119 << 3)) << 20).view(np.float32)


@compiled
def encode_nvfp4(x, codes, d):
    for group in range(x.size // LANES):
        v = load(x, LANES * group)
        amax = highest(absolute(v))
        d[group] = ue4m3_bits(amax / np.float32(6)) if amax > 0 else 0
        store(codes, LANES * group, doubled_code(v, half_ue4m3(int(d[group]))))


@compiled
def decode_nvfp4(blocks, out):
    for group in range(out.size // LANES):
        at, part = 36 * (group // 4), group % 4
        byte = int(blocks[at + part])
        d = half_ue4m3(byte & 127) if byte != 127 else ZERO  # ggml has no NaN: 127 is 0, and 255 is 480
        for i in range(8):
            code = blocks[at + 4 + 8 * part + i]
            out[LANES * group + i], out[LANES * group + 8 + i] = SIGNED[code & 15] * d, SIGNED[code >> 4] * d


class NVFP4(BlockCodec):
    name = "NVFP4"

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        codes, d = np.empty(x.size, np.uint8), np.empty(x.size // LANES, np.uint8)
        encode_nvfp4(x, codes, d)
        out[:, :4] = d.reshape(-1, 4)
        pack(codes, 0, 4, 8, out, 4)

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_nvfp4(blocks, out)
