"""What lies between memory and the tiles: rows of weights and activations as the words that tiles multiply.

    float32 <-> BF16         widened by a shift, rounded to nearest even
    e4m3 * scale -> d        FP8 weights, decoded into cache when a tile needs them
    rows -> panel            PANEL columns of K rows, one row of words after the other; of BF16 two rows make one

d is the dtype of the activations, float32 or BF16; `bf16` says which. Addresses are integers.
A weight is a `Matrix`, whether it is stored in d or in e4m3.

Letters: E experts, N K rows and columns of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import carray

from ornith_moe.backend.cpu.register_tiles import FP32, PANEL, fetch, narrow_row, pack_row, pointer
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.small_floats import bf16_bits, bf16_value, e4m3_value

AHEAD = 32  # rows that packing asks memory for before it reads them


class Matrix(NamedTuple):
    """[E, N, K] of one weight, rows contiguous; all numbers, so that numba takes it as it is."""

    base: int
    rows: int
    columns: int
    expert_bytes: int
    row_bytes: int
    scale: int  # address of float32 [E, scale_rows, scale_columns], 0 where the values are stored in d
    scale_rows: int
    scale_columns: int
    block_rows: int
    block_columns: int


def scale_block(shape: Sequence[int], scales: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of an [N, K] weight that share a scale, from the shape of its scales: blocks of 128 or all."""
    rows, columns = (
        128 if count == -(-size // 128) else -(-size // count) for size, count in zip(shape, scales, strict=True)
    )
    return rows, columns


@compiled
def floats(address, count):
    return carray(pointer(address), (count,), np.float32)


@compiled
def halves(address, count):
    return carray(pointer(address), (count,), np.uint16)


@compiled
def int32s(address, count):
    return carray(pointer(address), (count,), np.int32)


@compiled
def integers(address, count):
    return carray(pointer(address), (count,), np.int64)


@compiled
def widen(source, bf16, out, count):
    """count values of d to float32."""
    target = floats(out, count)
    if bf16:
        values = halves(source, count)
        for i in range(count):
            target[i] = bf16_value(values[i])
    else:
        target[:] = floats(source, count)


@compiled
def narrow(source, bf16, out, count):
    """count float32 to d."""
    values = floats(source, count)
    if bf16 and count == PANEL:
        narrow_row(source, out)
    elif bf16:
        target = halves(out, count)
        for i in range(count):
            target[i] = bf16_bits(values[i])
    else:
        floats(out, count)[:] = values


@compiled
def decode(codes, scale, bf16, out, count):
    """d(e4m3 * scale), as `dequantize_fp8` gives it."""
    source = carray(pointer(codes), (count,), np.uint8)
    if bf16:
        target = halves(out, count)
        for i in range(count):
            target[i] = bf16_bits(e4m3_value(source[i]) * scale)
    else:
        wide = floats(out, count)
        for i in range(count):
            wide[i] = e4m3_value(source[i]) * scale


@compiled
def row_of(matrix, expert, row):
    return matrix.base + expert * matrix.expert_bytes + row * matrix.row_bytes


@compiled
def read_row(matrix, expert, row, column, count, bf16, out):
    """Columns [column, column + count) of a row in d, wherever and however they are stored."""
    size = 2 if bf16 else 4
    if matrix.scale == 0:
        start = row_of(matrix, expert, row) + column * size
        carray(pointer(out), (count * size,), np.uint8)[:] = carray(pointer(start), (count * size,), np.uint8)
        return
    start = row_of(matrix, expert, row)
    first = (expert * matrix.scale_rows + row // matrix.block_rows) * matrix.scale_columns
    done = 0
    while done < count:  # block by block of columns
        block = (column + done) // matrix.block_columns
        stop = min(count, (block + 1) * matrix.block_columns - column)
        scale = floats(matrix.scale + 4 * (first + block), 1)[0]
        decode(start + column + done, scale, bf16, out + done * size, stop - done)
        done = stop


@compiled
def pack(kind, rows, count, column, columns, out):
    """Columns [column, column + columns <= PANEL) of `count` rows of d at the addresses `rows`, as a panel."""
    addresses = integers(rows, count)
    lines = columns * (4 if kind == FP32 else 2) // 64
    if kind == FP32:
        for k in range(count):
            fetch(addresses[min(k + AHEAD, count - 1)] + 4 * column, lines)
            start, place = addresses[k] + 4 * column, out + 4 * PANEL * k
            if columns == PANEL:
                pack_row(kind, start, start, place)
            else:
                target = floats(place, PANEL)
                target[:columns] = floats(start, columns)
                target[columns:] = 0
    else:
        for k in range(0, count, 2):
            fetch(addresses[min(k + AHEAD, count - 1)] + 2 * column, lines)
            fetch(addresses[min(k + AHEAD + 1, count - 1)] + 2 * column, lines)
            low, place = addresses[k] + 2 * column, out + 4 * PANEL * (k // 2)
            high = addresses[min(k + 1, count - 1)] + 2 * column
            if columns == PANEL and k + 1 < count:
                pack_row(kind, low, high, place)
            else:
                words = carray(pointer(place), (PANEL,), np.uint32)
                first, second = halves(low, columns), halves(high, columns)
                words[:] = 0
                for i in range(columns):
                    words[i] = np.uint32(first[i])
                    if k + 1 < count:
                        words[i] |= np.uint32(second[i]) << np.uint32(16)


@compiled
def pack_weight(kind, matrix, expert, count, column, columns, rows, decoded, out):
    """`pack` of rows 0 ... count - 1 of a weight; `rows` has room for `count` addresses, `decoded` for two rows."""
    size = 4 if kind == FP32 else 2
    addresses = integers(rows, count)
    if matrix.scale == 0:
        for k in range(count):
            addresses[k] = row_of(matrix, expert, k)
        pack(kind, rows, count, column, columns, out)
        return
    addresses[0], addresses[1 if count > 1 else 0] = decoded, decoded + PANEL * size if count > 1 else decoded
    for k in range(0, count, 2):
        pair = min(2, count - k)
        for i in range(pair):
            read_row(matrix, expert, k + i, column, columns, kind != FP32, decoded + i * PANEL * size)
        pack(kind, rows, pair, 0, columns, out + 4 * PANEL * (k if kind == FP32 else k // 2))
