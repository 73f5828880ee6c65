"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 values with one scale, and in the _1 types one minimum.

    Q4_0, Q5_0   value d * (q - n), n = 8 or 16      d = m / -n, m the signed value of largest magnitude
                                                     q = min(floor(x * (1 / d) + n + 0.5), 2n - 1)
    Q4_1, Q5_1   value d * q + low, q to 15 or 31    d = (high - low) / 15, q = floor((x - low) * (1 / d) + 0.5)
    Q8_0         value d * q, q int8                 d = amax / 127, q = round(x * (1 / d)), half away from zero

Codes come from the unrounded d; stored are fp16(d) and fp16(low). Where 1 / d is infinite, d is stored as zero; C casts
infinities and NaN to integers there, which x86 makes 0, and so do we.

With importance a, all but Q8_0 search (codecs/search.py) with weights a * sqrt(mean of the *row* of v^2 + v^2) and keep
the codes of the search. Source: ggml-quants.c (`quantize_row_q*_ref`, `_impl`).
"""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.codecs.block_tiles import gather, importance, new_tile
from ornith_moe.quant.codecs.codec import BlockCodec
from ornith_moe.quant.codecs.search import ZERO, affine_scale, signed_scale
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.fp16 import half_at, half_bits
from ornith_moe.quant.simd.lanes import (
    LANES,
    absolute,
    bits,
    broadcast,
    floor,
    highest,
    load,
    lowest,
    mask_of,
    maximum,
    minimum,
    select,
    store,
)
from ornith_moe.quant.simd.packing import pack, unpack

BLOCK = 32
HALF = np.float32(0.5)


@compiled
def first_of(x, start, magnitude):
    """The first value of the block with this magnitude."""
    for i in range(BLOCK):
        if abs(x[start + i]) == magnitude:
            return x[start + i]
    return magnitude


@compiled
def reciprocal(d):
    return np.float32(1) / d if d != 0 else ZERO


@compiled
def put(out, at, number, count):
    """A little-endian number of `count` bytes."""
    for i in range(count):
        out[at + i] = np.uint8(number >> (8 * i) & 255)


@compiled
def put_codes(out, at, a, b, code_bits):
    """Codes of the first and second half of a block as nibbles, the fifth bits before them."""
    if code_bits == 5:
        high_a, high_b = a >= np.float32(16), b >= np.float32(16)
        put(out, at, bits(high_a) | bits(high_b) << np.uint32(16), 4)
        a, b = select(high_a, a - np.float32(16), a), select(high_b, b - np.float32(16), b)
        at += 4
    store(out, at, a + b * np.float32(16))


@compiled
def encode_signed(x, code_bits, out, size):
    n = np.float32(2 ** (code_bits - 1))
    for block in range(x.size // BLOCK):
        start, at = BLOCK * block, size * block
        a, b = load(x, start), load(x, start + LANES)
        high, low = highest(maximum(a, b)), lowest(minimum(a, b))
        largest = high if high > -low else low
        if high == -low:
            largest = first_of(x, start, high) if high != 0 else ZERO
        d = largest / -n
        inverse = reciprocal(d)
        put(out, at, half_bits(d), 2)
        if np.isinf(inverse):
            a = b = broadcast(ZERO)
        else:
            a = floor(minimum(a * inverse + (n + HALF), n + n - np.float32(1)))
            b = floor(minimum(b * inverse + (n + HALF), n + n - np.float32(1)))
        put_codes(out, at + 2, a, b, code_bits)


@compiled
def encode_affine(x, code_bits, out, size):
    top = np.float32(2**code_bits - 1)
    for block in range(x.size // BLOCK):
        start, at = BLOCK * block, size * block
        a, b = load(x, start), load(x, start + LANES)
        high, low = highest(maximum(a, b)), lowest(minimum(a, b))
        if low == 0:
            low = first_of(x, start, low)  # C keeps the sign of the first zero
        d = (high - low) / top if high > low else ZERO
        inverse = reciprocal(d)
        put(out, at, half_bits(d), 2)
        put(out, at + 2, half_bits(low), 2)
        if np.isinf(inverse):
            a = b = broadcast(ZERO)
        else:
            a = floor(minimum((a - low) * inverse + HALF, top))
            b = floor(minimum((b - low) * inverse + HALF, top))
        put_codes(out, at + 4, a, b, code_bits)


@compiled
def half_away(v):
    """round(v), as a byte in two's complement; exact, unlike adding a half first."""
    magnitude = absolute(v)
    whole = floor(magnitude)
    whole = select(magnitude - whole >= HALF, whole + np.float32(1), whole)
    return select((v < ZERO) & (whole > ZERO), np.float32(256) - whole, whole)


@compiled
def encode_q8_0(x, out):
    for block in range(x.size // BLOCK):
        start, at = BLOCK * block, 34 * block
        a, b = load(x, start), load(x, start + LANES)
        d = highest(maximum(absolute(a), absolute(b))) / np.float32(127)
        inverse = reciprocal(d)
        if np.isinf(inverse):
            inverse = ZERO
        put(out, at, half_bits(d), 2)
        store(out, at + 2, half_away(a * inverse))
        store(out, at + 2 + LANES, half_away(b * inverse))


@compiled
def search_blocks(x, columns, code_bits, affine, codes, d):
    """Codes [32] and the fp16 bits of d and low of every block, with importance."""
    blocks, per_row = x.size // BLOCK, columns.size // BLOCK
    tile, a, w, q = new_tile(BLOCK), new_tile(BLOCK), new_tile(BLOCK), new_tile(BLOCK)
    scales, lows, sigma2 = new_tile(1), new_tile(1), new_tile(1)
    mean, row = ZERO, -1
    for block in range(0, blocks, LANES):
        gather(x, block, blocks, BLOCK, tile)
        gather(columns, block, blocks, BLOCK, a)
        for lane in range(LANES):
            if min(block + lane, blocks - 1) // per_row != row:
                row = min(block + lane, blocks - 1) // per_row
                mean = ZERO
                for i in range(columns.size * row, columns.size * (row + 1)):
                    mean += x[i] * x[i]
                mean /= np.float32(columns.size)
            sigma2[lane] = mean
        for i in range(BLOCK):
            store(w, LANES * i, importance(load(sigma2, 0), load(tile, LANES * i), load(a, LANES * i)))
        if affine:
            scale, low = affine_scale(
                BLOCK, tile, w, 2**code_bits - 1, np.float32(-0.9), np.float32(0.05), 36, False, True, q
            )
            store(lows, 0, -low)
        else:
            scale = signed_scale(BLOCK, tile, w, 2 ** (code_bits - 1), q)
        store(scales, 0, scale)
        for lane in range(min(LANES, blocks - block)):
            d[block + lane, 0], d[block + lane, 1] = half_bits(scales[lane]), half_bits(lows[lane])
            for i in range(BLOCK):
                codes[BLOCK * (block + lane) + i] = np.uint8(q[LANES * i + lane])


@compiled
def fifth(blocks, at, i):
    """Where the codes from i on have their fifth bit."""
    return mask_of(np.uint32(blocks[at + i // 8] | blocks[at + i // 8 + 1] << 8))


@compiled
def decode_signed(blocks, code_bits, size, out):
    n = np.float32(2 ** (code_bits - 1))
    for block in range(out.size // BLOCK):
        at = size * block
        d = half_at(blocks, at)
        for i in range(0, BLOCK, LANES):
            q = unpack(blocks, at + size - 16, 4, 16, i)
            if code_bits == 5:
                q = select(fifth(blocks, at + 2, i), q + np.float32(16), q)
            store(out, BLOCK * block + i, (q - n) * d)


@compiled
def decode_affine(blocks, code_bits, size, out):
    for block in range(out.size // BLOCK):
        at = size * block
        d, low = half_at(blocks, at), half_at(blocks, at + 2)
        for i in range(0, BLOCK, LANES):
            q = unpack(blocks, at + size - 16, 4, 16, i)
            if code_bits == 5:
                q = select(fifth(blocks, at + 4, i), q + np.float32(16), q)
            store(out, BLOCK * block + i, q * d + low)


@compiled
def decode_q8_0(blocks, out):
    for block in range(out.size // BLOCK):
        d = half_at(blocks, 34 * block)
        for i in range(0, BLOCK, LANES):
            q = load(blocks, 34 * block + 2 + i)
            store(out, BLOCK * block + i, select(q >= np.float32(128), q - np.float32(256), q) * d)


class Block32(BlockCodec):
    code_bits: int
    affine: bool
    important = True

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode = decode_affine if self.affine else decode_signed
        decode(blocks, self.code_bits, block_shape(self.name)[1], out)

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        if not columns.size:
            encode = encode_affine if self.affine else encode_signed
            return encode(x, self.code_bits, out.reshape(-1), out.shape[1])
        codes, d = np.empty(x.size, np.uint8), np.empty((len(out), 2), np.uint16)
        search_blocks(x, columns, self.code_bits, self.affine, codes, d)
        at = 2 * len(self.halves)
        out[:, :at] = d.view(np.uint8)[:, :at]
        if self.code_bits == 5:
            out[:, at : at + 4] = np.packbits(codes >> 4, bitorder="little").reshape(-1, 4)
        pack(codes, 0, 4, 16, out, out.shape[1] - 16)


class Q4_0(Block32):
    name, halves, code_bits, affine = "Q4_0", (0,), 4, False


class Q4_1(Block32):
    name, halves, code_bits, affine = "Q4_1", (0, 2), 4, True


class Q5_0(Block32):
    name, halves, code_bits, affine = "Q5_0", (0,), 5, False


class Q5_1(Block32):
    name, halves, code_bits, affine = "Q5_1", (0, 2), 5, True


class Q8_0(BlockCodec):
    name, halves = "Q8_0", (0,)

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        encode_q8_0(x, out.reshape(-1))

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_q8_0(blocks, out)
