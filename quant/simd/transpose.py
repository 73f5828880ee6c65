"""Rows and columns of sixteen float32 exchanged, in registers."""

from __future__ import annotations

from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import LANES, interleave_first, interleave_second, load, store


@compiled
def transpose16(square, spare, out, at):
    """The transposed 16 x 16 values of `square`, row by row from out[at] on; `out` may be `square`, which is used up.

    A perfect shuffle of 256 values exchanges one bit of row and column; four of them exchange all.
    """
    _shuffle(square, spare, 0)
    _shuffle(spare, square, 0)
    _shuffle(square, spare, 0)
    _shuffle(spare, out, at)


@compiled
def _shuffle(values, out, at):
    """Both halves of 256 values, one by one in turn."""
    for row in range(8):
        a, b = load(values, LANES * row), load(values, LANES * (row + 8))
        store(out, at + 2 * LANES * row, interleave_first(a, b))
        store(out, at + 2 * LANES * row + LANES, interleave_second(a, b))
