"""Q2_K, Q3_K, Q4_K, Q5_K, Q6_K: super-blocks of 256 values whose sub-blocks have scales of a few bits.

                sub-block   value                      codes   sub-scales             bytes
    Q2_K        16          d * s * q - dmin * m       2 bit   4 bit s, 4 bit m          84
    Q3_K        16          d * s * q                  3 bit   6 bit, signed            110
    Q4_K        32          d * s * q - dmin * m       4 bit   6 bit s, 6 bit m         144
    Q5_K        32          d * s * q - dmin * m       5 bit   6 bit s, 6 bit m         176
    Q6_K        16          d * s * q                  6 bit   8 bit, signed            210

Stages, for sixteen super-blocks at a time: weights of the values; the best scale (and minimum) of every sub-block;
sub-scales as codes of d (and dmin); codes once more, from the rounded scales a reader will see. Where such a scale is
zero ggml keeps the codes of the search, and so do we. Weights w of a value v, mean over n values:

    without importance   Q2_K |v|;  Q4_K, Q5_K sqrt(mean_32 v^2) + |v|;  Q3_K, Q6_K v^2
    with importance a    a * sqrt(f * mean_256 v^2 + v^2), f = 1 for Q2_K and 2 elsewhere;  Q6_K a alone

Source: ggml-quants.c (`quantize_row_q*_K_ref` without, `_impl` with importance).
"""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.codecs.block_tiles import SUPER, gather, importance, new_tile, sum_of_squares
from ornith_moe.quant.codecs.codec import BlockCodec
from ornith_moe.quant.codecs.search import (
    EPSILON,
    ZERO,
    affine_scale,
    clamp,
    largest,
    positive_scale,
    refined_scale,
    signed_scale,
)
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.fp16 import half_at, half_bits, half_value
from ornith_moe.quant.simd.lanes import (
    LANES,
    absolute,
    broadcast,
    load,
    low_byte,
    nearest,
    root,
    select,
    store,
)
from ornith_moe.quant.simd.packing import pack, unpack


@compiled
def affine_weights(sub, x, a, at, sigma2, w):
    """Weights of the sub-blocks that start at value `at`, and their sums; `a` is empty without importance."""
    mean = root(sum_of_squares(sub, x[LANES * at : LANES * (at + sub)]) / np.float32(sub))
    total = broadcast(ZERO)
    for i in range(sub):
        v = load(x, LANES * (at + i))
        if a.size:
            weight = importance(sigma2, v, load(a, LANES * (at + i)))
        elif sub == 32:
            weight = mean + absolute(v)
        else:
            weight = absolute(v)
        store(w, LANES * i, weight)
        total = total + weight
    return total


@compiled
def take(q, first, count, lane, codes, at):
    """Codes of the search, where there is no scale to make better ones with."""
    for i in range(first, first + count):
        codes[at + i] = np.uint8(q[LANES * i + lane])


@compiled
def stored(scales, lows, j, scale_limit):
    """s and m of sub-block j as a reader finds them: numbers too wide for their bits spill into their neighbours'."""
    s, m = int(scales[j]), int(lows[j])
    if scale_limit == 15:
        both = s | m << 4
        return both & 15, both >> 4 & 15
    if j < 4:
        return s & 63, m & 63
    return s & 15 | (s >> 4 << 6 | scales[j - 4]) >> 6 << 4 & 48, m & 15 | (m >> 4 << 6 | lows[j - 4]) >> 6 << 4 & 48


@compiled
def encode_affine(x, columns, sub, bits, scale_limit, most, first, delta, steps, codes, scales, lows, d):
    """Codes [256], s and m [256 / sub] and the fp16 bits of d and dmin of every super-block.

    `columns` is the importance matrix or empty; s and m are cut at `most`; first, delta and steps are of the search.
    """
    blocks, count = x.size // SUPER, SUPER // sub
    limit, top = 2**bits - 1, np.float32(scale_limit)
    tile, q, w = new_tile(SUPER), new_tile(SUPER), new_tile(sub)
    a = new_tile(SUPER if columns.size else 0)
    fit, fit_low, sums, fit_q, low_q = (
        new_tile(count), new_tile(count), new_tile(count), new_tile(count), new_tile(count)
    )  # fmt: skip
    super_scale, super_low = new_tile(1), new_tile(1)
    for block in range(0, blocks, LANES):
        gather(x, block, blocks, SUPER, tile)
        if columns.size:
            gather(columns, block, blocks, SUPER, a)
        factor = np.float32(1 if sub == 16 else 2)
        sigma2 = factor * sum_of_squares(SUPER, tile) / np.float32(SUPER)
        best = best_low = broadcast(ZERO)
        for j in range(count):
            start, stop = LANES * sub * j, LANES * sub * (j + 1)
            total = affine_weights(sub, tile, a, sub * j, sigma2, w)
            scale, low = affine_scale(
                sub, tile[start:stop], w, limit, first, delta, steps, sub == 16 and not columns.size, columns.size > 0,
                q[start:stop],
            )  # fmt: skip
            store(fit, LANES * j, scale)
            store(fit_low, LANES * j, low)
            store(sums, LANES * j, total)
            best, best_low = select(scale > best, scale, best), select(low > best_low, low, best_low)
        if columns.size:
            store(super_scale, 0, positive_scale(count, fit, sums, scale_limit, fit_q))
            store(super_low, 0, positive_scale(count, fit_low, sums, scale_limit, low_q))
        else:
            inverse = select(best > ZERO, top / best, ZERO)
            inverse_low = select(best_low > ZERO, top / best_low, ZERO)
            for j in range(count):
                store(fit_q, LANES * j, low_byte(nearest(inverse * load(fit, LANES * j))))
                store(low_q, LANES * j, low_byte(nearest(inverse_low * load(fit_low, LANES * j))))
            store(super_scale, 0, best / top)
            store(super_low, 0, best_low / top)
        for lane in range(min(LANES, blocks - block)):
            b = block + lane
            d[b, 0], d[b, 1] = half_bits(super_scale[lane]), half_bits(super_low[lane])
            for j in range(count):
                scales[b, j] = min(int(fit_q[LANES * j + lane]), most)
                lows[b, j] = min(int(low_q[LANES * j + lane]), most)
            for j in range(count):
                s, m = stored(scales[b], lows[b], j, scale_limit)
                step, low = half_value(d[b, 0]) * np.float32(s), half_value(d[b, 1]) * np.float32(m)
                for i in range(sub * j, sub * (j + 1), LANES):
                    code = clamp(nearest((load(x, SUPER * b + i) + low) / step), ZERO, np.float32(limit))
                    store(codes, SUPER * b + i, code)
                if step == 0:
                    take(q, sub * j, sub, lane, codes, SUPER * b)


@compiled
def encode_signed(x, columns, bits, codes, scales, d):
    """Codes [256], signed sub-scales [16] and the fp16 bits of d of every super-block, for Q3_K and Q6_K."""
    blocks, count, sub = x.size // SUPER, 16, 16
    limit = 2 ** (bits - 1)
    tile, q, w = new_tile(SUPER), new_tile(SUPER), new_tile(sub)
    a = new_tile(SUPER if columns.size else 0)
    fit, sums, fit_q, super_scale = new_tile(count), new_tile(count), new_tile(count), new_tile(1)
    for block in range(0, blocks, LANES):
        gather(x, block, blocks, SUPER, tile)
        if columns.size:
            gather(columns, block, blocks, SUPER, a)
        sigma2 = np.float32(2) * sum_of_squares(SUPER, tile) / np.float32(SUPER)
        for j in range(count):
            start, stop = LANES * sub * j, LANES * sub * (j + 1)
            total = broadcast(ZERO)
            for i in range(sub):
                v = load(tile, start + LANES * i)
                weight = v * v
                if columns.size:
                    weight = load(a, start + LANES * i)
                    if bits == 3:
                        weight = importance(sigma2, v, weight)
                store(w, LANES * i, weight)
                total = total + weight
            store(sums, LANES * j, total)
            if bits == 3 and not columns.size:
                scale = refined_scale(sub, tile[start:stop], limit, q[start:stop])
            else:
                scale = signed_scale(sub, tile[start:stop], w, limit, q[start:stop])
            store(fit, LANES * j, scale)
        if bits == 3 and columns.size:
            store(super_scale, 0, signed_scale(count, fit, sums, 32, fit_q))
            shift = np.float32(32)
        else:
            scale, magnitude = largest(count, fit)
            span, top = (np.float32(-32), np.float32(31)) if bits == 3 else (np.float32(-128), np.float32(127))
            inverse = span / scale
            zero = (scale == ZERO) if bits == 3 else (magnitude < EPSILON)
            none = span if bits == 3 else ZERO
            for j in range(count):
                code = clamp(nearest(inverse * load(fit, LANES * j)), span, top)
                store(fit_q, LANES * j, select(zero, none, code))
            store(super_scale, 0, select(zero, ZERO, np.float32(1) / inverse))
            shift = ZERO
        for lane in range(min(LANES, blocks - block)):
            b = block + lane
            d[b] = half_bits(super_scale[lane])
            for j in range(count):
                s = fit_q[LANES * j + lane] - shift
                scales[b, j] = np.int8(s)
                step = half_value(d[b]) * s
                code = clamp(nearest(load(x, SUPER * b + sub * j) / step), np.float32(-limit), np.float32(limit - 1))
                store(codes, SUPER * b + sub * j, code + np.float32(limit))
                if step == 0:
                    take(q, sub * j, sub, lane, codes, SUPER * b)
            if bits == 6 and super_scale[lane] == 0:
                codes[SUPER * b : SUPER * (b + 1)] = 0


@compiled
def decode_q2_k(blocks, out):
    for block in range(out.size // SUPER):
        at = 84 * block
        d, dmin = half_at(blocks, at + 80), half_at(blocks, at + 82)
        for j in range(16):
            s, m = blocks[at + j] & 15, blocks[at + j] >> 4
            q = unpack(blocks, at + 16, 2, 32, 16 * j)
            store(out, SUPER * block + 16 * j, q * (d * np.float32(s)) - dmin * np.float32(m))


@compiled
def decode_q3_k(blocks, out):
    for block in range(out.size // SUPER):
        at = 110 * block
        d = half_at(blocks, at + 108)
        for j in range(16):
            low, high = blocks[at + 96 + j % 8] >> 4 * (j // 8) & 15, blocks[at + 104 + j % 4] >> 2 * (j // 4) & 3
            s = np.float32(low + 16 * high - 32)
            q = unpack(blocks, at + 32, 2, 32, 16 * j) + unpack(blocks, at, 1, 32, 16 * j) * np.float32(4)
            store(out, SUPER * block + 16 * j, (q - np.float32(4)) * (d * s))


@compiled
def header(blocks, at, j):
    """s and m of sub-block j as `pack_header` laid them at `at`."""
    if j < 4:
        return blocks[at + j] & 63, blocks[at + j + 4] & 63
    both = blocks[at + j + 4]
    return both & 15 | blocks[at + j - 4] >> 6 << 4, both >> 4 | blocks[at + j] >> 6 << 4


@compiled
def decode_q45_k(blocks, bits, out):
    size = 144 if bits == 4 else 176
    for block in range(out.size // SUPER):
        at = size * block
        d, dmin = half_at(blocks, at), half_at(blocks, at + 2)
        for j in range(8):
            s, m = header(blocks, at + 4, j)
            step, low = d * np.float32(s), dmin * np.float32(m)
            for i in range(32 * j, 32 * (j + 1), LANES):
                q = unpack(blocks, at + size - 128, 4, 32, i)
                if bits == 5:
                    q = q + unpack(blocks, at + 16, 1, 32, i) * np.float32(16)
                store(out, SUPER * block + i, q * step - low)


@compiled
def decode_q6_k(blocks, out):
    for block in range(out.size // SUPER):
        at = 210 * block
        d = half_at(blocks, at + 208)
        for j in range(16):
            step = d * np.float32(np.int8(blocks[at + 192 + j]))
            q = unpack(blocks, at, 4, 64, 16 * j) + unpack(blocks, at + 128, 2, 32, 16 * j) * np.float32(16)
            store(out, SUPER * block + 16 * j, (q - np.float32(32)) * step)


@compiled
def pack_header(scales, lows, d, out):
    """d and dmin, then eight pairs of 6 bits: four whole with their spare bits, and the low halves of the others."""
    for block in range(out.shape[0]):
        for j in range(4):
            s, high_s = scales[block, j], scales[block, j + 4]
            m, high_m = lows[block, j], lows[block, j + 4]
            out[block, j] = d[block, j]
            out[block, 4 + j] = np.uint8(s | high_s >> 4 << 6)
            out[block, 8 + j] = np.uint8(m | high_m >> 4 << 6)
            out[block, 12 + j] = np.uint8(high_s & 15 | high_m << 4)


class Affine(BlockCodec):
    """A super-block with scales s and minimums m; `search` is first, delta and steps of the scales to try."""

    important = True
    bits: int
    sub: int
    scale_limit: int
    search: tuple[float, float, int]

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        codes, d = np.empty(x.size, np.uint8), np.empty((len(out), 2), np.uint16)
        scales, lows = (np.empty((len(out), SUPER // self.sub), np.uint8) for _ in range(2))
        first, delta, steps = (-0.9, 0.05, 36) if columns.size else self.search
        cut = self.bits == 5 or (self.bits == 4 and not columns.size)  # as ggml does; a negative scale is 128 to 255
        most = 63 if cut else 255
        encode_affine(
            x, columns, self.sub, self.bits, self.scale_limit, most, np.float32(first), np.float32(delta), steps,
            codes, scales, lows, d,
        )  # fmt: skip
        self.pack(codes, scales, lows, d.view(np.uint8), out)

    def pack(self, codes: np.ndarray, scales: np.ndarray, lows: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
        raise NotImplementedError


class Q2_K(Affine):
    name, halves = "Q2_K", (80, 82)
    bits, sub, scale_limit, search = 2, 16, 15, (-0.5, 0.1, 15)

    def pack(self, codes: np.ndarray, scales: np.ndarray, lows: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
        out[:, :16] = scales | lows << 4
        pack(codes, 0, 2, 32, out, 16)
        out[:, 80:] = d

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_q2_k(blocks, out)


class Q4_K(Affine):
    name, halves = "Q4_K", (0, 2)
    bits, sub, scale_limit, search = 4, 32, 63, (-1.0, 0.1, 20)

    def pack(self, codes: np.ndarray, scales: np.ndarray, lows: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
        pack_header(scales, lows, d, out)
        pack(codes, 0, 4, 32, out, 16)

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_q45_k(blocks, 4, out)


class Q5_K(Affine):
    name, halves = "Q5_K", (0, 2)
    bits, sub, scale_limit, search = 5, 32, 63, (-0.5, 0.1, 15)

    def pack(self, codes: np.ndarray, scales: np.ndarray, lows: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
        pack_header(scales, lows, d, out)
        pack(codes, 4, 1, 32, out, 16)
        pack(codes, 0, 4, 32, out, 48)

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_q45_k(blocks, 5, out)


class Q3_K(BlockCodec):
    name, halves, important = "Q3_K", (108,), True

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        codes, scales, d = signed(x, columns, 3, len(out))
        pack(codes, 2, 1, 32, out, 0)
        pack(codes, 0, 2, 32, out, 32)
        s = (scales + 32).view(np.uint8).reshape(-1)
        pack(s, 0, 4, 8, out, 96)
        pack(s, 4, 2, 4, out, 104)
        out[:, 108:] = d

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_q3_k(blocks, out)


class Q6_K(BlockCodec):
    name, halves, important = "Q6_K", (208,), True

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        codes, scales, d = signed(x, columns, 6, len(out))
        pack(codes, 0, 4, 64, out, 0)
        pack(codes, 4, 2, 32, out, 128)
        out[:, 192:208] = scales.view(np.uint8)
        out[:, 208:] = d

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        decode_q6_k(blocks, out)


def signed(x: np.ndarray, columns: np.ndarray, bits: int, blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales [blocks, 16] and bytes of d [blocks, 2]."""
    codes, d = np.empty(x.size, np.uint8), np.empty((blocks, 1), np.uint16)
    scales = np.empty((blocks, 16), np.int8)
    encode_signed(x, columns, bits, codes, scales, d[:, 0])
    return codes, scales, d.view(np.uint8)
