"""Backward of the routed experts on one thread of many: three kernels, each taking tasks until none is left.

    activation_gradient   task: an expert and a panel of I
                          da' = dy @ down;  dweights = <da', a'>;  wa = w * a';  dpre = d(silu(gate) * up) * w * da'
    input_gradient        task: a panel of H
                          dx[t] = sum over the experts of t, in their order, of dpre @ gate_up
    weight_gradient       task: an expert and a block of rows of its gradient
                          ddown = dy^T @ wa, dgate_up = dpre^T @ x

The first two contract the rows of a weight, the last the rows of its expert; in all three the right operand is packed
into panels (`rows.pack`), the left one is read where it lies or from panels too. The gradient of an expert is written
once, into its place. a' is computed again from the saved pre. No sum is shared by two threads.

Letters: T tokens, E experts, H hidden, I expert intermediate, R rows (slots sorted by expert), m rows of one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ornith_moe.backend.cpu.forward import outer_rows, share, sigmoid, words_of
from ornith_moe.backend.cpu.register_tiles import ADD, BF16, FP32, PANEL, STORE, take
from ornith_moe.backend.cpu.rows import floats, int32s, integers, narrow, pack, pack_weight, widen
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.small_floats import rounded


class Wanted(NamedTuple):
    """Addresses of the results of `activation_gradient`, 0 for what is not wanted."""

    partial: int  # float32 [R, panels of I], whose row sums are dweights
    wa: int  # [R, I] in d
    dpre: int  # [R, 2I] in d


class ActivationScratch(NamedTuple):
    """Addresses in the memory of a thread."""

    a_rows: int  # int64 [chunk]: addresses, as all that ends in _rows
    c_rows: int
    c: int  # float32 [chunk, PANEL]: da'
    gate: int  # float32 [PANEL], as the next two
    up: int
    a: int
    decoded: int  # two rows of a panel
    weight_rows: int  # int64 [H]
    panel: int  # of H words
    end: int


@compiled
def activation_gradient_layout(scratch, hidden, chunk):
    c_rows = scratch + 8 * chunk
    c = c_rows + 8 * chunk
    gate = c + 4 * PANEL * chunk
    up, a = gate + 4 * PANEL, gate + 8 * PANEL
    decoded = a + 4 * PANEL
    weight_rows = decoded + 8 * PANEL
    panel = weight_rows + 8 * hidden
    end = panel + 4 * PANEL * (hidden + 1)
    return ActivationScratch(scratch, c_rows, c, gate, up, a, decoded, weight_rows, panel, end)


@compiled
def activation_gradient(thread, kind, dy, dy_row, rows, weights, matrix, pre, a_given, wanted, chunk):
    """What is `wanted`, from dy [T, dy_row bytes] and pre [R, 2I] in d.

    `a_given` [R, I] in d: a' where it is not silu(gate) * up, because it was quantized; else 0.
    """
    size, bf16 = 4 if kind == FP32 else 2, kind != FP32
    hidden, inner = matrix.rows, matrix.columns
    partial, wa, dpre = wanted
    needs_da, a_row = partial != 0 or dpre != 0, inner * size
    panels = (inner + PANEL - 1) // PANEL
    active, offsets, slots = int32s(rows.active, rows.active_count), rows.offsets, rows.row_to_slot
    layout = activation_gradient_layout(thread.scratch, hidden, chunk)
    assert layout.end - thread.scratch == thread.scratch_bytes
    a_rows, c_rows, c, gate_at, up_at, a_at, decoded, weight_rows, panel, _ = layout
    gate, up, a = floats(gate_at, PANEL), floats(up_at, PANEL), floats(a_at, PANEL)
    starts, places = integers(a_rows, chunk), integers(c_rows, chunk)
    for i in range(chunk):
        places[i] = c + 4 * PANEL * i
    while True:
        task = take(thread.counter)
        if task >= rows.active_count * panels:
            return
        e, column = active[task // panels], task % panels * PANEL
        width = min(PANEL, inner - column)
        if needs_da:
            pack_weight(kind, matrix, e, hidden, column, width, weight_rows, decoded, panel)
        bounds = int32s(offsets + 4 * e, 2)
        first = bounds[0]
        while first < bounds[1]:
            m = share(bounds[1] - first, chunk)
            row_to_slot = int32s(slots + 4 * first, m)
            if needs_da:
                for i in range(m):
                    starts[i] = dy + row_to_slot[i] // rows.top_k * dy_row
                outer_rows(kind, m, a_rows, 4, panel, words_of(kind, hidden), c_rows, 0, STORE)
            for i in range(m):
                r = first + i
                weight = floats(weights + 4 * row_to_slot[i], 1)[0]
                da = floats(places[i], PANEL)
                kept = pre + (2 * inner * r + column) * size
                widen(kept, bf16, gate_at, width)
                widen(kept + inner * size, bf16, up_at, width)
                if a_given:
                    widen(a_given + a_row * r + column * size, bf16, a_at, width)
                elif bf16:
                    for j in range(width):
                        a[j] = rounded(gate[j] * sigmoid(gate[j]) * up[j])
                else:
                    for j in range(width):
                        a[j] = gate[j] * sigmoid(gate[j]) * up[j]
                if needs_da:
                    if dpre:
                        for j in range(width):
                            s = sigmoid(gate[j])
                            silu = gate[j] * s
                            dgate = da[j] * weight * up[j] * (s + silu * (np.float32(1.0) - s))
                            gate[j] = dgate
                            up[j] = da[j] * weight * silu
                        target = dpre + (2 * inner * r + column) * size
                        narrow(gate_at, bf16, target, width)
                        narrow(up_at, bf16, target + inner * size, width)
                    if partial:
                        for j in range(width):
                            da[j] *= a[j]
                        da[width:] = 0
                        half = PANEL // 2
                        while half:
                            for j in range(half):
                                da[j] += da[j + half]
                            half //= 2
                        floats(partial + 4 * (panels * r + column // PANEL), 1)[0] = da[0]
                if wa:
                    for j in range(width):
                        a[j] *= weight
                    narrow(a_at, bf16, wa + a_row * r + column * size, width)
            first += m


class InputScratch(NamedTuple):
    """Addresses in the memory of a thread."""

    a_rows: int  # int64 [chunk]
    c_rows: int
    decoded: int  # two rows of a panel
    weight_rows: int  # int64 [2I]
    panel: int  # of 2I words
    end: int


@compiled
def input_gradient_layout(scratch, inner, chunk):
    c_rows = scratch + 8 * chunk
    decoded = c_rows + 8 * chunk
    weight_rows = decoded + 8 * PANEL
    panel = weight_rows + 16 * inner
    return InputScratch(scratch, c_rows, decoded, weight_rows, panel, panel + 4 * PANEL * (2 * inner + 1))


@compiled
def input_gradient(thread, kind, dpre, rows, matrix, dx32, dx32_row, dx, chunk):
    """dx [T, H] in d where `dx` is not 0; dx32 [T, dx32_row bytes] is float32, with room for whole panels."""
    size = 4 if kind == FP32 else 2
    tokens, hidden, inner = rows.tokens, matrix.columns, matrix.rows // 2
    panels = (hidden + PANEL - 1) // PANEL
    active, offsets, slots = int32s(rows.active, rows.active_count), rows.offsets, rows.row_to_slot
    layout = input_gradient_layout(thread.scratch, inner, chunk)
    assert layout.end - thread.scratch == thread.scratch_bytes
    a_rows, c_rows, decoded, weight_rows, panel, _ = layout
    starts, places = integers(a_rows, chunk), integers(c_rows, chunk)
    while True:
        task = take(thread.counter)
        if task >= panels:
            return
        column = task * PANEL
        width = min(PANEL, hidden - column)
        for t in range(tokens):
            floats(dx32 + t * dx32_row + 4 * column, PANEL)[:] = 0
        for index in range(rows.active_count):
            e = active[index]
            pack_weight(kind, matrix, e, 2 * inner, column, width, weight_rows, decoded, panel)
            bounds = int32s(offsets + 4 * e, 2)
            first = bounds[0]
            while first < bounds[1]:
                m = share(bounds[1] - first, chunk)
                row_to_slot = int32s(slots + 4 * first, m)
                for i in range(m):
                    starts[i] = dpre + 2 * inner * size * (first + i)
                    places[i] = dx32 + row_to_slot[i] // rows.top_k * dx32_row
                outer_rows(kind, m, a_rows, 4, panel, words_of(kind, 2 * inner), c_rows, 4 * column, ADD)
                first += m
        if dx:
            for t in range(tokens):
                narrow(dx32 + t * dx32_row + 4 * column, True, dx + 2 * (hidden * t + column), width)


class Side(NamedTuple):
    """One operand of `weight_gradient`: [R, columns] in d, or [T, columns] where a row is gathered by its token."""

    address: int
    columns: int
    row_bytes: int
    gathered: bool


class WeightScratch(NamedTuple):
    """Addresses in the memory of a thread."""

    left_rows: int  # int64 [chunk], as right_rows
    right_rows: int
    a_rows: int  # int64 [block], as c_rows
    c_rows: int
    c: int  # float32 [block, PANEL]
    right_panel: int  # of chunk words
    left_panels: int  # as many as a block has
    end: int


@compiled
def weight_gradient_layout(scratch, block, chunk):
    right_rows = scratch + 8 * chunk
    a_rows = right_rows + 8 * chunk
    c_rows = a_rows + 8 * block
    c = c_rows + 8 * block
    right_panel = c + 4 * PANEL * block
    left_panels = right_panel + 4 * PANEL * chunk
    end = left_panels + 4 * PANEL * chunk * (block // PANEL)
    return WeightScratch(scratch, right_rows, a_rows, c_rows, c, right_panel, left_panels, end)


@compiled
def weight_gradient(thread, kind, left, right, rows, gradient, bf16, block, chunk):
    """gradient [E, N, K] = left^T @ right over the rows of each active expert, float32 or BF16; `left` has N columns.

    A task is `block` (whole panels) rows of one gradient.
    """
    size = 2 if bf16 else 4
    columns_left, columns_right = left.columns, right.columns
    blocks = (columns_left + block - 1) // block
    active, offsets, slots = int32s(rows.active, rows.active_count), rows.offsets, rows.row_to_slot
    layout = weight_gradient_layout(thread.scratch, block, chunk)
    assert layout.end - thread.scratch == thread.scratch_bytes
    left_rows, right_rows, a_rows, c_rows, c, right_panel, left_panels, _ = layout
    panel_bytes = 4 * PANEL * chunk
    lefts, rights = integers(left_rows, chunk), integers(right_rows, chunk)
    starts, places = integers(a_rows, block), integers(c_rows, block)
    for i in range(block):
        starts[i] = left_panels + i // PANEL * panel_bytes + 4 * (i % PANEL)
    while True:
        task = take(thread.counter)
        if task >= rows.active_count * blocks:
            return
        e, row = active[task // blocks], task % blocks * block
        height = min(block, columns_left - row)
        bounds = int32s(offsets + 4 * e, 2)
        single = bounds[1] - bounds[0] <= chunk
        for column in range(0, columns_right, PANEL):
            width = min(PANEL, columns_right - column)
            target = gradient + ((e * columns_left + row) * columns_right + column) * size
            direct = single and width == PANEL
            for i in range(height):
                places[i] = target + i * columns_right * size if direct else c + 4 * PANEL * i
            first = bounds[0]
            while first < bounds[1]:
                m = share(bounds[1] - first, chunk)
                if column == 0 or not single:
                    row_to_slot = int32s(slots + 4 * first, m)
                    for i in range(m):
                        token = row_to_slot[i] // rows.top_k
                        lefts[i] = left.address + (token if left.gathered else first + i) * left.row_bytes
                        rights[i] = right.address + (token if right.gathered else first + i) * right.row_bytes
                    for p in range(0, height, PANEL):
                        place = left_panels + p // PANEL * panel_bytes
                        pack(kind, left_rows, m, row + p, min(PANEL, height - p), place)
                pack(kind, right_rows, m, column, width, right_panel)
                store = BF16 if direct and bf16 else ADD if first > bounds[0] else STORE
                outer_rows(kind, height, a_rows, 4 * PANEL, right_panel, words_of(kind, m), c_rows, 0, store)
                first += m
            for i in range(0 if direct else height):
                narrow(places[i], bf16, target + i * columns_right * size, width)
