"""Vectors in numba against numpy, bit for bit: every operation in float32, one rounding each, nothing contracted.

The reference is numpy's elementwise arithmetic, and Python integers for ggml's rounding.
"""

import numpy as np
import pytest
from numba import njit

from ornith_moe.quant.codecs.block_tiles import gather, new_tile
from ornith_moe.quant.simd.lanes import (
    LANES,
    absolute,
    any_lane,
    bits,
    broadcast,
    first_lane,
    floor,
    highest,
    load,
    load_broadcast,
    load_field,
    low_byte,
    lowest,
    mask_of,
    maximum,
    minimum,
    nearest,
    nearest_within,
    root,
    select,
    store,
)

A = np.concatenate([[0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -2.5, 3.5], np.random.default_rng(0).normal(size=8)])
A, B = A.astype(np.float32), np.random.default_rng(1).normal(size=LANES).astype(np.float32)
OPERATIONS = {
    "a + b": (lambda a, b: a + b, lambda a, b: a + b),
    "a - b": (lambda a, b: a - b, lambda a, b: a - b),
    "a * b": (lambda a, b: a * b, lambda a, b: a * b),
    "a / b": (lambda a, b: a / b, lambda a, b: a / b),
    "a * b + a": (lambda a, b: a * b + a, lambda a, b: a * b + a),
    "2 - a": (lambda a, b: 2 - a, lambda a, b: 2 - a),
    "a * 0.1": (lambda a, b: a * 0.1, lambda a, b: a * np.float32(0.1)),
    "-a": (lambda a, b: -a, lambda a, b: -a),
    "a > b ? a : b": (lambda a, b: maximum(a, b), lambda a, b: np.where(a > b, a, b)),
    "b < a ? b : a": (lambda a, b: minimum(b, a), lambda a, b: np.where(b < a, b, a)),
    "abs": (lambda a, b: absolute(a), lambda a, b: np.abs(a)),
    "sqrt": (lambda a, b: root(absolute(a)), lambda a, b: np.sqrt(np.abs(a))),
    "floor": (lambda a, b: floor(b * 9), lambda a, b: np.floor(b * 9)),
    "select": (lambda a, b: select(a <= b, 1.0, b), lambda a, b: np.where(a <= b, np.float32(1), b)),
    "masks": (
        lambda a, b: select((a < b) & ~(a >= 0) | (b != b), a, 0),
        lambda a, b: np.where((a < b) & ~(a >= 0) | (b != b), a, np.float32(0)),
    ),
    "not equal": (lambda a, b: select(a != a, b, 0), lambda a, b: np.where(a != a, b, np.float32(0))),
    "broadcast": (lambda a, b: broadcast(0.1) + b, lambda a, b: np.float32(0.1) + b),
    "low byte": (lambda a, b: low_byte(floor(b * 500)), lambda a, b: np.floor(b * 500) % 256),
    "nearest": (lambda a, b: nearest(b * 100), lambda a, b: np.rint(b * 100)),
    "nearest within": (
        lambda a, b: nearest_within(b * 10, -4, 3),
        lambda a, b: np.clip(np.rint(b * 10), -4, 3),
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_numpy(name):
    ours, reference = OPERATIONS[name]
    ours = njit(ours)

    @njit
    def run(a, b, out):
        store(out, 0, ours(load(a, 0), load(b, 0)))

    out = np.full(LANES, np.nan, np.float32)
    run(A, B, out)
    expected = reference(A, B).astype(np.float32)
    assert np.array_equal(np.isnan(out), np.isnan(expected))
    numbers = ~np.isnan(out)
    assert np.array_equal(out[numbers].view(np.uint32), expected[numbers].view(np.uint32))


def test_nearest_beyond_its_range_gives_the_low_bits():
    """As C's nearest_int does: the mantissa of v + 1.5 * 2^23, less 2^22."""

    @njit
    def run(v, out):
        store(out, 0, nearest(load(v, 0)))

    v = np.array(
        [2**22 - 1, 2**22, 2**23 + 6, -(2**22) - 2, 1e30, -1e30, np.inf, -np.inf, np.nan, *range(7)], np.float32
    )
    out = np.empty(LANES, np.float32)
    run(v, out)
    low = ((v + np.float32(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000
    assert out.tolist() == low.tolist()


def test_across_lanes():
    @njit
    def run(v):
        lane = load(v, 0)
        return highest(lane), lowest(lane), bits(lane > 0), any_lane(lane > 9), any_lane(lane > -9)

    assert run(B) == (B.max(), B.min(), sum(int(v > 0) << lane for lane, v in enumerate(B)), False, True)


def test_first_lane_and_broadcast():
    @njit
    def run(v, out):
        lane, fifth = load(v, 0), load_broadcast(v, 5)
        store(out, 0, fifth)
        return first_lane(lane == fifth), first_lane(lane == load_broadcast(v, 0)), first_lane(lane != lane)

    out = np.zeros(LANES, np.float32)
    assert run(np.arange(3, 3 + LANES, dtype=np.float32), out) == (5, 0, LANES)
    assert (out == 8).all()


def test_codes_are_bytes():
    @njit
    def run(v, out):
        store(out, 1, load(v, 0))

    out = np.zeros(LANES + 2, np.uint8)
    run(np.arange(0, 256, 17, dtype=np.float32), out)
    assert out.tolist() == [0, *range(0, 256, 17), 0]

    @njit
    def read(codes, v):
        store(v, 0, load(codes, 1))

    v = np.zeros(LANES, np.float32)
    read(out, v)
    assert v.tolist() == list(range(0, 256, 17))


def test_fields_of_bytes():
    """Of any place and width, and of memory that may only be read."""

    @njit
    def run(codes, shift, mask, out):
        store(out, 0, load_field(codes, 1, shift, mask))

    codes = np.random.default_rng(0).integers(0, 256, LANES + 1).astype(np.uint8)
    codes.flags.writeable = False
    out = np.empty(LANES, np.float32)
    for shift in range(8):
        for mask in (1, 3, 7, 15, 255):
            run(codes, shift, mask, out)
            assert np.array_equal(out, codes[1:] >> shift & mask)


def test_a_mask_of_a_number_is_the_inverse_of_its_bits():
    @njit
    def run(number):
        return bits(mask_of(np.uint32(number)))

    assert [run(number) for number in (0, 1, 0x8001, 0xFFFF, 0xABCD1234)] == [0, 1, 0x8001, 0xFFFF, 0x1234]


def test_gather_swaps_rows_and_columns():
    """Lanes beyond the last block repeat it, and an importance matrix starts over at every row."""
    x = np.arange(20 * 32, dtype=np.float32)
    tile = new_tile(32)
    gather(x, 16, 20, 32, tile)
    blocks = [16, 17, 18, 19] + [19] * 12
    assert np.array_equal(tile.reshape(32, LANES), x.reshape(20, 32)[blocks].T)
    gather(x[:96], 16, 20, 32, tile)
    assert np.array_equal(tile.reshape(32, LANES), x[:96].reshape(3, 32)[[b % 3 for b in blocks]].T)
