"""Forward of the routed experts on one thread of many: two kernels, each taking tasks until none is left.

    gate_up    task: an expert and a strip of I     pre = x @ gate_up^T, rounded to d;  a' = d(silu(gate) * up)
    down       task: a strip of H
               y[t] = sum over the experts of t, in their order, of w * (a' @ down^T)

A task of `down` owns its columns of y for all experts, so nothing of size T * top_k * H exists, nothing is added by two
threads, and the order of the sum is that of the experts. Both read each weight once while its expert has no more than
`chunk` rows, in units of four rows, and ask memory for rows eight further on. Of x nothing is copied, except in BF16
where experts have hundreds of rows: `gate_up` transposes them into panels (`whole_panel`), which is a tenth faster.

Letters: T tokens, E experts, H hidden, I expert intermediate, R rows (slots sorted by expert), m rows of one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray

from ornith_moe.backend.cpu.register_tiles import (
    DOT_COLUMNS,
    DOT_ROWS,
    FP32,
    OUTER_ROWS,
    PANEL,
    STORE,
    dot_tile,
    outer_tile,
    pointer,
    take,
)
from ornith_moe.backend.cpu.rows import floats, int32s, integers, narrow, read_row, row_of
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import LANES, load, store
from ornith_moe.quant.simd.small_floats import rounded
from ornith_moe.quant.simd.transpose import transpose16

AHEAD = 2 * DOT_COLUMNS  # rows of a weight that are fetched ahead


class Thread(NamedTuple):
    """What one thread of a kernel has: the counter that all take tasks from, and memory of its own."""

    counter: int
    scratch: int
    scratch_bytes: int


class Rows(NamedTuple):
    """Slots sorted by expert; addresses of int32 [E + 1], int32 [R], int32 [E], and numbers."""

    offsets: int
    row_to_slot: int
    active: int  # experts that have rows
    active_count: int
    tokens: int
    top_k: int


@compiled
def group_by_expert(indices, offsets, row_to_slot, active):
    """Fill `offsets` [E + 1], `row_to_slot` [T * top_k] (-1 past the last row), `active`; returns how many are active.

    Stable; ids outside [0, E) are left out.
    """
    experts = len(offsets) - 1
    offsets[:] = 0
    for e in indices:
        if 0 <= e < experts:
            offsets[e + 1] += 1
    count = 0
    for e in range(experts):
        if offsets[e + 1]:
            active[count] = e
            count += 1
        offsets[e + 1] += offsets[e]
    place = offsets[:-1].copy()
    row_to_slot[offsets[experts] :] = -1
    for slot, e in enumerate(indices):
        if 0 <= e < experts:
            row_to_slot[place[e]] = slot
            place[e] += 1
    return count


@compiled
def share(rest, most):
    """How many of `rest` to take next, so that as few parts as `most` allows are about equal, and all but one even."""
    parts = (rest + most - 1) // most
    return min(rest, ((rest + parts - 1) // parts + 1) // 2 * 2)


@compiled
def sigmoid(x):
    """1 / (1 + exp(-x)) within 2e-7, in operations that a compiler can do on vectors; not NaN for NaN."""
    t = min(max(-x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(t * np.float32(1.44269504) + np.float32(0.5))
    r = t - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power = np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)
    denominator = np.float32(1.0) + p * power
    return np.divide(np.float32(1.0), denominator)  # `/` would look for zero, and no loop around it be vectorized


@compiled
def activate(gate, up, bf16, width, pre_gate, pre_up, a):
    """a' = d(silu(gate) * up) from float32 `gate` and `up`, rounded to d before; kept where pre_gate is not 0."""
    gates, ups = floats(gate, width), floats(up, width)
    if bf16:
        for i in range(width):
            gates[i], ups[i] = rounded(gates[i]), rounded(ups[i])
    if pre_gate:
        narrow(gate, bf16, pre_gate, width)
        narrow(up, bf16, pre_up, width)
    for i in range(width):
        ups[i] = gates[i] * sigmoid(gates[i]) * ups[i]
    narrow(up, bf16, a, width)


@compiled
def four_columns(kind, m, k, k_bytes, a_rows, matrix, expert, row, count, room, c_rows, c_offset, factors, add):
    """C[i][c_offset ...] (+)= factors[i] * <A[i], w[row + j]> for m rows of A and up to four rows of a weight.

    `room`: `four_columns_bytes`, for four addresses and, where the weight has to be decoded or padded, four rows.
    """
    size = 4 if kind == FP32 else 2
    b_rows = integers(room, DOT_COLUMNS)
    raw = matrix.scale == 0 and k * size == k_bytes
    for j in range(DOT_COLUMNS):
        source = row + min(j, count - 1)
        if raw:
            b_rows[j] = row_of(matrix, expert, source)
        else:
            b_rows[j] = room + 64 + j * k_bytes
            if j < count:
                read_row(matrix, expert, source, 0, k, kind != FP32, b_rows[j])
                carray(pointer(b_rows[j] + k * size), (k_bytes - k * size,), np.uint8)[:] = 0
    tiles = (m + DOT_ROWS - 1) // DOT_ROWS
    streams = 4 if tiles == 1 else 2 if tiles < 4 else 1
    done = 0
    for tile in range(tiles):
        rows = (m - done + tiles - tile - 1) // (tiles - tile)
        first = integers(a_rows, m)[done]
        ahead = first  # which is in cache: nothing to fetch
        if raw and tile * streams < DOT_COLUMNS:
            ahead = row_of(matrix, expert, row + AHEAD) + tile * streams * k_bytes
        dot_tile(kind, rows, streams, a_rows + 8 * done, room, k_bytes, ahead, c_rows + 8 * done, c_offset,
                 factors + 4 * done, add)  # fmt: skip
        done += rows


@compiled
def four_columns_bytes(k_bytes):
    return 64 + DOT_COLUMNS * k_bytes


@compiled
def outer_rows(kind, m, a_rows, a_step, panel, words, c_rows, c_offset, store):
    """C[i][c_offset ...] = A[i] @ panel, as `outer_tile` writes it, for m rows, in tiles of about equal height."""
    tiles, done = (m + OUTER_ROWS - 1) // OUTER_ROWS, 0
    for tile in range(tiles):
        rows = (m - done + tiles - tile - 1) // (tiles - tile)
        outer_tile(kind, rows, a_rows + 8 * done, a_step, panel, words, c_rows + 8 * done, c_offset, store)
        done += rows


@compiled
def words_of(kind, count):
    """Words of `count` numbers of d along the contraction."""
    return count if kind == FP32 else (count + 1) // 2


@compiled
def transpose_rows(starts, rows, words, out, step):
    """Word k of the row at starts[i] to word step * k + i of `out`; `rows` and `words` are multiples of sixteen."""
    a, b = np.empty(LANES * LANES, np.float32), np.empty(LANES * LANES, np.float32)
    for k in range(0, words, LANES):
        for i in range(0, rows, LANES):
            for lane in range(LANES):
                store(a, LANES * lane, load(floats(starts[i + lane] + 4 * k, LANES), 0))
            transpose16(a, b, a, 0)
            for lane in range(LANES):
                store(floats(out + 4 * (step * (k + lane) + i), LANES), 0, load(a, LANES * lane))


@compiled
def whole_panel(kind, starts, words, matrix, expert, column, half, width, room, c, strip):
    """<x, gate> and <x, up> for PANEL rows of x and `width` rows of each half: from columns 0 and `strip` of c on.

    x is transposed into a panel, which the rows of the weight meet where they lie: fewer loads than in `four_columns`,
    and a sum in the order of K instead of one split over lanes.
    """
    sources, places = integers(room, width), integers(room + 8 * width, width)
    panel = room + 16 * strip
    transposed = panel + 4 * PANEL * words
    for j in range(width):
        places[j] = transposed + 4 * PANEL * j
    transpose_rows(starts, PANEL, words, panel, PANEL)
    for part in range(2):
        for j in range(width):
            sources[j] = row_of(matrix, expert, part * half + column + j)
        outer_rows(kind, width, room, 4, panel, words, room + 8 * width, 0, STORE)
        transpose_rows(places, width, PANEL, c + 4 * strip * part, 2 * strip)


@compiled
def whole_panel_bytes(x_bytes, strip):
    return 16 * strip + PANEL * x_bytes + 4 * PANEL * strip


class GateUpScratch(NamedTuple):
    """Addresses in the memory of a thread."""

    a_rows: int  # int64 [chunk]: addresses, as all that ends in _rows
    c_rows: int
    factors: int  # float32 [chunk]
    c: int  # float32 [chunk, 2 * strip]
    room: int  # of `four_columns` or `whole_panel`
    end: int


@compiled
def gate_up_layout(scratch, x_bytes, strip, chunk, panels):
    c_rows = scratch + 8 * chunk
    factors = c_rows + 8 * chunk
    c = factors + 4 * chunk
    room = c + 8 * strip * chunk
    bytes_of_room = four_columns_bytes(x_bytes)
    if panels:
        bytes_of_room = max(bytes_of_room, whole_panel_bytes(x_bytes, strip))
    return GateUpScratch(scratch, c_rows, factors, c, room, room + bytes_of_room)


@compiled
def gate_up(thread, kind, x, x_bytes, rows, matrix, pre, a, a_row, strip, chunk, panels):
    """a' [R, a_row bytes] and, where `pre` is not 0, the pre-activation [R, 2I], both in d; `x_bytes` of a row of x.

    `panels`: whole panels of rows of an expert go through `whole_panel`, the rest of its rows through `four_columns`.
    """
    size, bf16 = 4 if kind == FP32 else 2, kind != FP32
    hidden, inner = matrix.columns, matrix.rows // 2
    strips = (inner + strip - 1) // strip
    active, offsets, slots = int32s(rows.active, rows.active_count), rows.offsets, rows.row_to_slot
    a_rows, c_rows, factors, c, room, end = gate_up_layout(thread.scratch, x_bytes, strip, chunk, panels)
    assert end - thread.scratch == thread.scratch_bytes
    floats(factors, chunk)[:] = 1
    while True:
        task = take(thread.counter)
        if task >= rows.active_count * strips:
            return
        e, column = active[task // strips], task % strips * strip
        width = min(strip, inner - column)
        bounds = int32s(offsets + 4 * e, 2)
        first = bounds[0]
        whole = first + (bounds[1] - first) // PANEL * PANEL if panels else first
        while first < bounds[1]:
            m = PANEL if first < whole else share(bounds[1] - first, chunk)
            row_to_slot = int32s(slots + 4 * first, m)
            starts, places = integers(a_rows, m), integers(c_rows, m)
            for i in range(m):
                starts[i] = x + row_to_slot[i] // rows.top_k * x_bytes
                places[i] = c + 8 * strip * i
            if first < whole:
                whole_panel(kind, starts, x_bytes // 4, matrix, e, column, inner, width, room, c, strip)
            else:
                for j in range(0, width, DOT_COLUMNS):
                    count = min(DOT_COLUMNS, width - j)
                    for half in range(2):
                        row = half * inner + column + j
                        four_columns(kind, m, hidden, x_bytes, a_rows, matrix, e, row, count, room, c_rows,
                                     4 * (half * strip + j), factors, False)  # fmt: skip
            for i in range(m):
                r = first + i
                kept = pre + (2 * inner * r + column) * size if pre else 0
                activate(places[i], places[i] + 4 * strip, bf16, width, kept, kept + inner * size,
                         a + a_row * r + column * size)  # fmt: skip
                if column + width == inner:
                    carray(pointer(a + a_row * r + inner * size), (a_row - inner * size,), np.uint8)[:] = 0
            first += m


class DownScratch(NamedTuple):
    """Addresses in the memory of a thread."""

    a_rows: int  # int64 [chunk]
    c_rows: int
    factors: int  # float32 [chunk]
    room: int  # of `four_columns`
    end: int


@compiled
def down_layout(scratch, a_row, chunk):
    c_rows = scratch + 8 * chunk
    factors = c_rows + 8 * chunk
    room = factors + 4 * chunk
    return DownScratch(scratch, c_rows, factors, room, room + four_columns_bytes(a_row))


@compiled
def down(thread, kind, a, a_row, rows, weights, matrix, y32, y32_row, y, strip, chunk):
    """y [T, H] in d where `y` is not 0; y32 [T, y32_row bytes] is float32, and columns past H are scratch."""
    tokens, hidden, inner = rows.tokens, matrix.rows, matrix.columns
    strips = (hidden + strip - 1) // strip
    active, offsets, slots = int32s(rows.active, rows.active_count), rows.offsets, rows.row_to_slot
    a_rows, c_rows, factors, room, end = down_layout(thread.scratch, a_row, chunk)
    assert end - thread.scratch == thread.scratch_bytes
    while True:
        task = take(thread.counter)
        if task >= strips:
            return
        column = task * strip
        width = min(strip, hidden - column)
        for t in range(tokens):
            floats(y32 + t * y32_row + 4 * column, width)[:] = 0
        for index in range(rows.active_count):
            e = active[index]
            bounds = int32s(offsets + 4 * e, 2)
            first = bounds[0]
            while first < bounds[1]:
                m = share(bounds[1] - first, chunk)
                row_to_slot = int32s(slots + 4 * first, m)
                starts, places, factor = integers(a_rows, m), integers(c_rows, m), floats(factors, m)
                for i in range(m):
                    starts[i] = a + a_row * (first + i)
                    places[i] = y32 + row_to_slot[i] // rows.top_k * y32_row
                    factor[i] = floats(weights + 4 * row_to_slot[i], 1)[0]
                for j in range(column, column + width, DOT_COLUMNS):
                    count = min(DOT_COLUMNS, column + width - j)
                    four_columns(kind, m, inner, a_row, a_rows, matrix, e, j, count, room, c_rows, 4 * j, factors, True)
                first += m
        if y:
            for t in range(tokens):
                narrow(y32 + t * y32_row + 4 * column, True, y + 2 * (hidden * t + column), width)
