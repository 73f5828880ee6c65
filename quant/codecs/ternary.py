"""TQ1_0, TQ2_0: one scale and a trit for each of 256 values.

    d = amax;   t = round(x * (1 / d)) + 1, half away from zero, so 0, 1 or 2;   value d * (t - 1)

TQ2_0 stores four trits in a byte. TQ1_0 stores five: as digits of base 3, first digit highest, n of 243 is written as
ceil(n * 256 / 243), from which a multiplication by 3 pushes out digit after digit. Where 1 / d is infinite, d is stored
as zero and t is 1. Source: ggml-quants.c (`quantize_row_tq1_0_ref`, `quantize_row_tq2_0_ref`).
"""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.codecs.block_tiles import SUPER
from ornith_moe.quant.codecs.blocks32 import HALF, reciprocal
from ornith_moe.quant.codecs.codec import BlockCodec
from ornith_moe.quant.codecs.search import ZERO
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.fp16 import half_at, half_bits
from ornith_moe.quant.simd.lanes import (
    LANES,
    absolute,
    broadcast,
    floor,
    highest,
    load,
    low_byte,
    maximum,
    select,
    store,
)
from ornith_moe.quant.simd.packing import pack, unpack

ONE = np.float32(1)


@compiled
def encode_trits(x, trits, d):
    for block in range(x.size // SUPER):
        start = SUPER * block
        largest = broadcast(ZERO)
        for i in range(0, SUPER, LANES):
            largest = maximum(largest, absolute(load(x, start + i)))
        amax = highest(largest)
        d[block] = half_bits(amax)
        inverse = reciprocal(amax)
        if np.isinf(inverse):
            inverse = ZERO
        for i in range(0, SUPER, LANES):
            v = load(x, start + i) * inverse
            store(trits, start + i, select(v >= HALF, ONE, select(v <= -HALF, -ONE, ZERO)) + ONE)


@compiled
def pack_digits(trits, start, run, digits, out, at):
    """Bytes of five trits that lie `run` apart, those beyond `digits` being zero, into out[:, at:]."""
    for block in range(out.shape[0]):
        for i in range(run):
            n = 0
            for digit in range(5):
                n = 3 * n + (trits[SUPER * block + start + run * digit + i] if digit < digits else 0)
            out[block, at + i] = (n * 256 + 242) // 243


@compiled
def decode_tq1_0(blocks, out):
    for block in range(out.size // SUPER):
        at, to = 54 * block, SUPER * block
        d, power = half_at(blocks, at + 52), np.float32(1)
        for digit in range(5):
            for i in range(0, 48, LANES):
                place = 32 * digit + i if i < 32 else 160 + 16 * digit
                rest = low_byte(load(blocks, at + i) * power)  # the digits that follow, as a fraction of 256
                store(out, to + place, (floor(rest * np.float32(3 / 256)) - ONE) * d)
            for i in range(4 if digit < 4 else 0):
                rest = int(blocks[at + 48 + i]) * int(power) & 255
                out[to + 240 + 4 * digit + i] = np.float32((3 * rest >> 8) - 1) * d
            power *= np.float32(3)


@compiled
def decode_tq2_0(blocks, out):
    for block in range(out.size // SUPER):
        d = half_at(blocks, 66 * block + 64)
        for i in range(0, SUPER, LANES):
            store(out, SUPER * block + i, (unpack(blocks, 66 * block, 2, 32, i) - ONE) * d)


class Ternary(BlockCodec):
    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        trits, d = np.empty(x.size, np.uint8), np.empty(len(out), np.uint16)
        encode_trits(x, trits, d)
        self.pack(trits, out)
        out[:, -2:] = d[:, None].view(np.uint8)

    def pack(self, trits: np.ndarray, out: np.ndarray) -> None:
        raise NotImplementedError


class TQ1_0(Ternary):
    name, halves = "TQ1_0", (52,)

    def pack(self, trits: np.ndarray, out: np.ndarray) -> None:
        """32 bytes of trits 32 apart, 16 of trits 16 apart, and 4 of four trits 4 apart with a fifth that is zero."""
        for at, start, run, digits in ((0, 0, 32, 5), (32, 160, 16, 5), (48, 240, 4, 4)):
            pack_digits(trits, start, run, digits, out, at)

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_tq1_0(blocks, out)


class TQ2_0(Ternary):
    name, halves = "TQ2_0", (64,)

    def pack(self, trits: np.ndarray, out: np.ndarray) -> None:
        pack(trits, 0, 2, 32, out, 0)

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_tq2_0(blocks, out)
