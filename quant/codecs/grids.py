"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: groups of 4 or 8 magnitudes are one point of a grid; signs lie apart.

              values of a scale   group, levels, points   signs           bits per weight
    IQ2_XXS   32                  8, 3, 256               7 of 8          2.06      needs importance
    IQ2_XS    16                  8, 3, 512               7 of 8          2.31      needs importance
    IQ2_S     16                  8, 3, 1024              8               2.56
    IQ3_XXS   32                  4, 8, 256               7 of 8          3.06
    IQ3_S     32                  4, 8, 512               8               3.44

A value is d * s * (2 q + 1), q in [0, levels), times its sign; s stands for (2 l + 1) / 4 or the like with a 4-bit l.
Where seven signs are stored the eighth makes their number of minuses even, so in a group with an odd number the value
that weighs least takes the wrong sign.

Search, for sixteen super-blocks at a time: scales near the obvious one are tried. Each rounds a group to levels; where
that is no point of the grid, the nearest of a list of neighbours is taken, by error with weights sqrt(w). The scale is
refitted to the codes by least squares with weights w; the best goes on, its groups are made once more from the refitted
scale, and it is refitted again. Weights w of a value v, with f = 1 for IQ2_XXS and IQ2_XS and 2 elsewhere:

    with importance a   a * sqrt(f * mean_256 v^2 + v^2)
    without             v^2;  IQ2_S mean_256 v^2 / 2 + v^2

The points come from the `gguf` package. The neighbours of a group that is no point are the points at its smallest
squared distances, one to three different ones; sixteen of them are weighed at a time. Source: ggml-quants.c
(`iq2xs_init_impl`, `iq3xs_init_impl`, `quantize_row_iq2_xxs_impl` and the like).
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from ornith_moe.quant.codecs.block_tiles import SUPER, gather, importance, new_tile, sum_of_squares
from ornith_moe.quant.codecs.blocks32 import HALF
from ornith_moe.quant.codecs.grid_decoders import GridDecoder, grid_values, number
from ornith_moe.quant.codecs.search import ZERO, clamp, positive_scale
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.fp16 import half_bits
from ornith_moe.quant.simd.lanes import (
    LANES,
    absolute,
    broadcast,
    first_lane,
    floor,
    load,
    load_broadcast,
    lowest,
    maximum,
    nearest,
    root,
    select,
    store,
)
from ornith_moe.quant.simd.packing import pack

F = np.float32
ONE, TWO = F(1), F(2)


def neighbours(points: np.ndarray, levels: int, distances: int) -> tuple[np.ndarray, ...]:
    """The grid as the search wants it; `points` is uint8 [P, group].

    Returns:
        starts: int32 [levels^group + 1]. Group g, as a number to the base of `levels` with its first value lowest, has
            the tiles starts[g] to starts[g + 1], none if it is a point.
        members: uint16 [16 * tiles], the points of each tile in order of distance and index, the last tile of a group
            filled up by its first member.
        places: uint8 [tiles * group * 16], 2 q + 1 of those.
    """
    group = points.shape[1]
    numbers = levels ** np.arange(group)
    every = np.arange(levels**group)[:, None] // numbers % levels
    on_grid = np.zeros(len(every), bool)
    on_grid[points @ numbers] = True
    squares = (points.astype(np.float32) ** 2).sum(1)
    counts, lists = np.zeros(len(every) + 1, np.int32), []
    for first in range(0, len(every), 512):
        some = every[first : first + 512].astype(np.float32)
        distance = (some**2).sum(1)[:, None] + squares - 2 * some @ points.T.astype(np.float32)  # whole numbers, exact
        distance = distance.astype(np.int16)
        order = np.argsort(distance, axis=1, kind="stable")
        ordered = np.take_along_axis(distance, order, 1)
        rank = np.cumsum(np.diff(ordered, axis=1, prepend=ordered[:, :1]) > 0, axis=1)  # 0 for the smallest distance
        for g in np.flatnonzero(~on_grid[first : first + 512]):
            near = order[g, : np.searchsorted(rank[g], distances)]
            tiles = -(-len(near) // LANES)
            counts[first + g + 1] = tiles
            lists.append(np.append(near, np.full(tiles * LANES - len(near), near[0])))
    members = np.concatenate(lists).astype(np.uint16)
    places = (2 * points[members] + 1).reshape(-1, LANES, group).transpose(0, 2, 1)
    return np.cumsum(counts, dtype=np.int32), members, np.ascontiguousarray(places, np.uint8).reshape(-1)


class Rule(NamedTuple):
    """What a type is to the search; numba compiles it once for all of them."""

    sub: int  # values that share a scale
    group: int  # values that share a point
    levels: int
    even: bool  # seven signs for eight values
    factor: np.float32  # of the mean square in sigma2
    mean_weight: np.float32  # of sigma2 in the weights without importance
    epsilon: np.float32  # sub-blocks whose largest value is below are zero
    steps: int  # scales to try on each side of the obvious one
    delta: np.float32
    linear: bool  # the obvious scale is that of evenly spaced codes, not of the largest value
    again: int  # the refitted scale makes anew 0: groups off the grid, 1: all if one is off, 2: all
    fudge: np.float32  # stored d over largest scale / 31
    clears: bool  # a super-block without scales is zero bytes; else its codes stay


class Grid(NamedTuple):
    points: np.ndarray  # uint8 [P, group]
    index_of: np.ndarray  # int32 [levels^group], the point that a group is
    starts: np.ndarray  # as `neighbours` returns them
    members: np.ndarray
    places: np.ndarray


@compiled
def group_number(rule, q, at):
    """The codes of a group as a number to the base of `levels`, in every lane."""
    number = broadcast(ZERO)
    for i in range(rule.group - 1, -1, -1):
        number = number * np.float32(rule.levels) + load(q, at + LANES * i)
    return number


@compiled
def to_grid(rule, grid, x, root_w, inverse, scale, wanted, q, on_grid, lane_of):
    """Codes q of all groups, on the grid where wanted, and whether rounding alone put them there.

    `wanted` and `on_grid` are 1 or 0 for every group and lane; `lane_of` is room for two values of each lane.
    """
    store(lane_of, LANES, scale)
    for k in range(rule.sub // rule.group):
        at = LANES * rule.group * k
        for i in range(at, at + LANES * rule.group, LANES):
            code = nearest(HALF * (inverse * load(x, i) - ONE))
            store(q, i, clamp(code, ZERO, np.float32(rule.levels - 1)))
        store(lane_of, 0, group_number(rule, q, at))
        for lane in range(LANES):
            number = int(lane_of[lane])
            first, last = int(grid.starts[number]), int(grid.starts[number + 1])
            on_grid[LANES * k + lane] = ONE if first == last else ZERO
            if first == last or wanted[LANES * k + lane] == 0:
                continue
            factor, best, where = load_broadcast(lane_of, LANES + lane), np.float32(np.inf), LANES * first
            for tile in range(first, last):
                error = broadcast(ZERO)
                for i in range(rule.group):
                    place = load(grid.places, LANES * (rule.group * tile + i))
                    difference = place * factor - load_broadcast(x, at + LANES * i + lane)
                    error = error + load_broadcast(root_w, at + LANES * i + lane) * difference * difference
                least = lowest(error)
                if least < best:
                    best, where = least, LANES * tile + first_lane(error == least)
            point = grid.members[where]
            for i in range(rule.group):
                q[at + LANES * i + lane] = grid.points[point, i]


@compiled
def refit(sub, x, w, q):
    """(sum w x p, sum w p p) with p = 2 q + 1."""
    sum_xp = sum_pp = broadcast(ZERO)
    for i in range(sub):
        place, weight = TWO * load(q, LANES * i) + ONE, load(w, LANES * i)
        sum_xp = sum_xp + weight * load(x, LANES * i) * place
        sum_pp = sum_pp + weight * place * place
    return sum_xp, sum_pp


@compiled
def magnitudes(sub, even, values, w, x, signs):
    """|value| into x and the signs of every eight as bits; where they must be even, one magnitude turns negative."""
    for k in range(sub // 8):
        at, bits, odd = LANES * 8 * k, broadcast(ZERO), broadcast(ZERO)
        least, weakest = broadcast(ZERO), broadcast(ZERO)
        for i in range(8):
            value = load(values, at + LANES * i)
            minus = value < ZERO
            bits = bits + select(minus, np.float32(1 << i), ZERO)
            odd = select(minus, ONE - odd, odd)
            store(x, at + LANES * i, select(minus, -value, value))
            weight = load(w, at + LANES * i) * value * value
            weaker = weight < least if i > 0 else odd == odd
            least, weakest = select(weaker, weight, least), select(weaker, np.float32(i), weakest)
        if even:
            for i in range(8):
                value, magnitude = load(values, at + LANES * i), load(x, at + LANES * i)
                negated = (odd == ONE) & (weakest == np.float32(i))
                store(x, at + LANES * i, select(negated, -magnitude, magnitude))
                bits = bits + select(negated, select(value < ZERO, -ONE, ONE), ZERO) * np.float32(1 << i)
            bits = bits - floor(bits / np.float32(128)) * np.float32(128)
        store(signs, LANES * k, bits)


@compiled
def grid_scale(rule, grid, x, w, q):
    """(scale, where there is nothing to code); q becomes the codes. The scale may be negative in theory."""
    sub, group, groups = rule.sub, rule.group, rule.sub // rule.group
    root_w, tried_q, lane_of = new_tile(sub), new_tile(sub), new_tile(2)
    wanted, tried_on_grid, on_grid = new_tile(groups), new_tile(groups), new_tile(groups)
    top, high = np.float32(2 * rule.levels - 1), load(x, 0)
    for i in range(sub):
        high = maximum(high, load(x, LANES * i))
        store(root_w, LANES * i, root(load(w, LANES * i)))
    zero = high < rule.epsilon
    if rule.linear:
        scale = positive_scale(sub, x, w, rule.levels + 1, tried_q)
        reach = scale * np.float32(rule.levels)
        zero = zero | (reach <= ZERO)
    else:
        scale, reach = high / top, high
    best = broadcast(ZERO)
    for i in range(sub):
        store(q, LANES * i, best)
    for k in range(groups):
        store(wanted, LANES * k, select(zero, ZERO, ONE))
        store(on_grid, LANES * k, broadcast(ZERO if rule.again == 1 else ONE))
    for step in range(-rule.steps, rule.steps + 1):
        inverse = (broadcast(top) + np.float32(step) * rule.delta) / reach
        to_grid(rule, grid, x, root_w, inverse, ONE / inverse, wanted, tried_q, tried_on_grid, lane_of)
        sum_xp, sum_pp = refit(sub, x, w, tried_q)
        better = (sum_pp > ZERO) & (sum_xp * sum_xp > best * sum_pp)
        scale = select(better, sum_xp / sum_pp, scale)
        best = select(better, scale * sum_xp, best)
        for i in range(0, LANES * sub, LANES):
            store(q, i, select(better, load(tried_q, i), load(q, i)))
        for k in range(0, LANES * groups, LANES):
            store(on_grid, k, select(better, load(tried_on_grid, k), load(on_grid, k)))
    refitted = scale > ZERO
    if rule.again < 2:
        refitted = refitted & any_off(groups, on_grid)
    for k in range(0, LANES * groups, LANES):
        remade = refitted
        if rule.again == 0:
            remade = remade & (load(on_grid, k) == ZERO)
        store(wanted, k, select(remade & ~zero, ONE, ZERO))
    to_grid(rule, grid, x, root_w, ONE / scale, scale, wanted, tried_q, tried_on_grid, lane_of)
    for k in range(groups):
        remade = load(wanted, LANES * k) > ZERO
        for i in range(LANES * group * k, LANES * group * (k + 1), LANES):
            store(q, i, select(remade, load(tried_q, i), load(q, i)))
    sum_xp, sum_pp = refit(sub, x, w, q)
    return select(refitted & (sum_pp > ZERO), sum_xp / sum_pp, scale), zero


@compiled
def any_off(groups, on_grid):
    off = broadcast(ZERO)
    for k in range(groups):
        off = off + (ONE - load(on_grid, LANES * k))
    return off > ZERO


@compiled
def encode_grid(x, columns, rule, grid, indices, signs, scales, d):
    """Points of the groups, signs of every eight values, l of every `sub` values and fp16 d of every super-block."""
    sub, group = rule.sub, rule.group
    blocks, count, groups, eights = x.size // SUPER, SUPER // sub, sub // group, sub // 8
    tile, a = new_tile(SUPER), new_tile(SUPER if columns.size else 0)
    w, v, q, sign = new_tile(sub), new_tile(sub), new_tile(sub), new_tile(eights)
    fit, lane_of, super_scale = new_tile(count), new_tile(1), new_tile(1)
    for block in range(0, blocks, LANES):
        some = min(LANES, blocks - block)
        gather(x, block, blocks, SUPER, tile)
        if columns.size:
            gather(columns, block, blocks, SUPER, a)
        sigma2 = rule.factor * sum_of_squares(SUPER, tile) / np.float32(SUPER)
        most = broadcast(ZERO)
        for j in range(count):
            start, stop = LANES * sub * j, LANES * sub * (j + 1)
            for i in range(0, LANES * sub, LANES):
                value = load(tile, start + i)
                if columns.size:
                    store(w, i, importance(sigma2, value, load(a, start + i)))
                elif rule.mean_weight > 0:
                    store(w, i, rule.mean_weight * sigma2 + value * value)
                else:
                    store(w, i, value * value)
            magnitudes(sub, rule.even, tile[start:stop], w, v, sign)
            scale, zero = grid_scale(rule, grid, v, w, q)
            for k in range(eights):
                s = load(sign, LANES * k)
                s = select(scale < ZERO, np.float32(127 if rule.even else 255) - s, s)
                store(sign, LANES * k, select(zero, ZERO, s))
            scale = select(zero, ZERO, absolute(scale))
            store(fit, LANES * j, scale)
            most = maximum(most, scale)
            for k in range(groups):
                store(lane_of, 0, select(zero, ZERO, group_number(rule, q, LANES * group * k)))
                for lane in range(some):
                    indices[(block + lane) * count * groups + groups * j + k] = grid.index_of[int(lane_of[lane])]
            for k in range(eights):
                for lane in range(some):
                    signs[(block + lane) * count * eights + eights * j + k] = np.uint8(sign[LANES * k + lane])
        step = most / np.float32(31)
        store(super_scale, 0, step * rule.fudge)
        for j in range(count):
            code = clamp(nearest(HALF * (ONE / step * load(fit, LANES * j) - ONE)), ZERO, np.float32(15))
            store(fit, LANES * j, select(most == ZERO, ZERO, code))
        for lane in range(some):
            b = block + lane
            d[b] = half_bits(super_scale[lane])
            for j in range(count):
                scales[b, j] = np.uint8(fit[LANES * j + lane])
            if rule.clears and super_scale[lane] == 0:
                indices[b * count * groups : (b + 1) * count * groups] = 0
                signs[b * count * eights : (b + 1) * count * eights] = 0


class GridCodec(GridDecoder):
    """One with an encoder; `distances` is how many different ones the neighbours of a group may have."""

    halves, important = (0,), True
    rule: Rule
    distances: int

    @property
    def sub(self) -> int:
        return self.rule.sub

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        groups, eights, count = SUPER // self.rule.group, SUPER // 8, SUPER // self.rule.sub
        indices, signs = np.empty(len(out) * groups, np.uint16), np.empty(len(out) * eights, np.uint8)
        scales, d = np.empty((len(out), count), np.uint8), np.empty((len(out), 1), np.uint16)
        encode_grid(x, columns, self.rule, self.grid, indices, signs, scales, d[:, 0])
        out[:, :2] = d.view(np.uint8)
        self.pack(indices.reshape(-1, groups), signs.reshape(-1, eights), scales, out)

    @cached_property
    def grid(self) -> Grid:
        values = grid_values(self.name)
        points = np.searchsorted(np.unique(values), values).astype(np.uint8)
        index_of = np.zeros(self.rule.levels**self.rule.group, np.uint16)
        index_of[points @ self.rule.levels ** np.arange(self.rule.group)] = np.arange(len(points))
        return Grid(points, index_of, *neighbours(points, self.rule.levels, self.distances))

    def pack(self, indices: np.ndarray, signs: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        raise NotImplementedError


def words(signs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Four times seven signs and four bits of scale, little-endian, of every 32 values."""
    signs = signs.reshape(len(signs), -1, 4).astype(np.uint32)
    word = (
        signs[..., 0] | signs[..., 1] << 7 | signs[..., 2] << 14 | signs[..., 3] << 21 | scales.astype(np.uint32) << 28
    )
    return word.astype("<u4").view(np.uint8).reshape(len(signs), -1, 4)


EVEN = np.array([s | s.bit_count() % 2 << 7 for s in range(128)], np.uint8)  # seven signs and the eighth they entail


@compiled
def unpack_iq2_xxs(blocks, d, indices, signs, scales):
    for b in range(d.size):
        at = 66 * b
        d[b] = number(blocks, at, 2)
        for j in range(8):
            word = number(blocks, at + 6 + 8 * j, 4)
            scales[b, j] = word >> 28
            for k in range(4):
                indices[b, 4 * j + k] = blocks[at + 2 + 8 * j + k]
                signs[b, 4 * j + k] = EVEN[word >> 7 * k & 127]


@compiled
def unpack_iq2_xs(blocks, d, indices, signs, scales):
    for b in range(d.size):
        at = 74 * b
        d[b] = number(blocks, at, 2)
        for k in range(32):
            both = number(blocks, at + 2 + 2 * k, 2)
            indices[b, k], signs[b, k] = both & 511, EVEN[both >> 9]
        unpack_nibbles(blocks, at + 66, scales[b])


@compiled
def unpack_iq2_s(blocks, d, indices, signs, scales):
    for b in range(d.size):
        at = 82 * b
        d[b] = number(blocks, at, 2)
        for k in range(32):
            indices[b, k] = blocks[at + 2 + k] | (blocks[at + 66 + k // 4] >> 2 * (k % 4) & 3) << 8
            signs[b, k] = blocks[at + 34 + k]
        unpack_nibbles(blocks, at + 74, scales[b])


@compiled
def unpack_iq3_xxs(blocks, d, indices, signs, scales):
    for b in range(d.size):
        at = 98 * b
        d[b] = number(blocks, at, 2)
        for k in range(64):
            indices[b, k] = blocks[at + 2 + k]
        for j in range(8):
            word = number(blocks, at + 66 + 4 * j, 4)
            scales[b, j] = word >> 28
            for k in range(4):
                signs[b, 4 * j + k] = EVEN[word >> 7 * k & 127]


@compiled
def unpack_iq3_s(blocks, d, indices, signs, scales):
    for b in range(d.size):
        at = 110 * b
        d[b] = number(blocks, at, 2)
        for k in range(64):
            indices[b, k] = blocks[at + 2 + k] | (blocks[at + 66 + k // 8] >> k % 8 & 1) << 8
        for k in range(32):
            signs[b, k] = blocks[at + 74 + k]
        unpack_nibbles(blocks, at + 106, scales[b])


@compiled
def unpack_nibbles(blocks, at, scales):
    for j in range(scales.size):
        scales[j] = blocks[at + j // 2] >> 4 * (j % 2) & 15


class IQ2_XXS(GridCodec):
    name, distances, needs_importance = "IQ2_XXS", 2, True
    unpack = staticmethod(unpack_iq2_xxs)
    rule = Rule(32, 8, 3, True, F(1), F(0), F(1e-15), 6, F(0.1), True, 2, F(1), True)

    def pack(self, indices: np.ndarray, signs: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        points = indices.reshape(len(out), -1, 4).astype(np.uint8)
        out[:, 2:] = np.concatenate([points, words(signs, scales)], axis=2).reshape(len(out), -1)


class IQ2_XS(GridCodec):
    name, distances, needs_importance = "IQ2_XS", 2, True
    unpack = staticmethod(unpack_iq2_xs)
    rule = Rule(16, 8, 3, True, F(1), F(0), F(1e-15), 9, F(0.1), False, 0, F(1), True)

    def pack(self, indices: np.ndarray, signs: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        out[:, 2:66] = (indices | signs.astype(np.uint16) << 9).astype("<u2").view(np.uint8)
        out[:, 66:] = scales[:, ::2] | scales[:, 1::2] << 4


class IQ2_S(GridCodec):
    name, distances = "IQ2_S", 1
    unpack = staticmethod(unpack_iq2_s)
    rule = Rule(16, 8, 3, False, F(2), F(0.25), F(1e-8), 9, F(0.1), False, 0, F(0.9875), False)

    def pack(self, indices: np.ndarray, signs: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        out[:, 2:34], out[:, 34:66] = indices & 255, signs
        pack((indices >> 8).astype(np.uint8).reshape(-1), 0, 2, 1, out, 66)
        out[:, 74:] = scales[:, ::2] | scales[:, 1::2] << 4


class IQ3_XXS(GridCodec):
    name, distances, unit = "IQ3_XXS", 2, F(0.5)
    unpack = staticmethod(unpack_iq3_xxs)
    rule = Rule(32, 4, 8, True, F(2), F(0), F(1e-8), 15, F(0.2), False, 0, F(1.0125), True)

    def pack(self, indices: np.ndarray, signs: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        out[:, 2:66] = indices
        out[:, 66:] = words(signs, scales).reshape(len(out), -1)


class IQ3_S(GridCodec):
    name, distances, unit = "IQ3_S", 3, F(2)
    unpack = staticmethod(unpack_iq3_s)
    rule = Rule(32, 4, 8, False, F(2), F(0), F(1e-45), 9, F(0.2), False, 1, F(1.033), False)

    def pack(self, indices: np.ndarray, signs: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        out[:, 2:66], out[:, 74:106] = indices & 255, signs
        pack((indices >> 8).astype(np.uint8).reshape(-1), 0, 1, 1, out, 66)
        out[:, 106:] = scales[:, ::2] | scales[:, 1::2] << 4
