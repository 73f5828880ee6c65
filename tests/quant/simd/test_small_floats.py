"""float32 rounded to BF16 in machine code, against torch's cast; the same for Triton is in kernels/test_arithmetic.py.

torch's payload of a NaN depends on the processor (0x7fc0 or 0xffff), so NaN is held against what ggml stores: the upper
half, quiet.
"""

import numpy as np
import pytest
import torch
from numba import njit
from numeric import bits_at_the_edges_of_bf16

from ornith_moe.backend.cpu.register_tiles import PANEL
from ornith_moe.backend.cpu.rows import narrow, widen
from ornith_moe.quant.codecs.gguf import dequantize_gguf, quantize_gguf
from ornith_moe.quant.simd.lanes import LANES, load, store
from ornith_moe.quant.simd.small_floats import bf16_bits, bf16_value, rounded

BITS = bits_at_the_edges_of_bf16()
VALUES = BITS.view(np.float32)
NAN = np.isnan(VALUES)
EXPECTED = torch.from_numpy(VALUES).bfloat16().view(torch.int16).numpy().view(np.uint16)


@njit
def by_lanes(values, halves, back):
    for i in range(0, values.size, LANES):
        store(halves, i, load(values, i))
        store(back, i, rounded(load(values, i)))


@njit
def by_numbers(values, halves, back):
    for i in range(values.size):
        halves[i], back[i] = bf16_bits(values[i]), rounded(values[i])


def by_rows(count):
    """As the CPU experts do it, `count` numbers at a time."""

    @njit
    def run(values, halves, back):
        size = values.size // count * count
        for i in range(0, size, count):
            narrow(values.ctypes.data + 4 * i, True, halves.ctypes.data + 2 * i, count)
            widen(halves.ctypes.data + 2 * i, True, back.ctypes.data + 4 * i, count)
        for i in range(size, values.size):
            halves[i], back[i] = bf16_bits(values[i]), rounded(values[i])

    return run


def by_codec(values, halves, back):
    rows = quantize_gguf(values[None], "BF16")
    halves[:] = rows.view(np.uint16)[0]
    back[:] = dequantize_gguf(rows, "BF16")[0]


WAYS = {"lanes": by_lanes, "numbers": by_numbers, "panels": by_rows(PANEL), "odd rows": by_rows(7), "codec": by_codec}


@pytest.mark.parametrize("way", WAYS)
def test_numba_rounds_as_torch_and_keeps_nan_as_ggml(way):
    halves, back = np.zeros(BITS.size, np.uint16), np.zeros(BITS.size, np.float32)
    WAYS[way](VALUES, halves, back)
    assert np.array_equal(halves[~NAN], EXPECTED[~NAN])
    assert np.array_equal(halves[NAN], BITS[NAN] >> 16 | 0x40)
    assert np.array_equal(back.view(np.uint32), halves.astype(np.uint32) << 16)


def test_every_nan_stays_nan():
    """All 2^24 - 2 of them."""
    payloads = np.arange(1, 1 << 23, dtype=np.uint32) | 0x7F800000
    for bits in (payloads, payloads | 0x80000000):
        halves = quantize_gguf(bits.view(np.float32)[None], "BF16").view(np.uint16)[0]
        assert np.array_equal(halves, bits >> 16 | 0x40)


def test_every_bf16_is_widened_and_back():
    @njit
    def run(halves, back):
        for i in range(halves.size):
            back[i] = bf16_bits(bf16_value(halves[i]))

    halves, back = np.arange(65536, dtype=np.uint16), np.zeros(65536, np.uint16)
    run(halves, back)
    assert np.array_equal(back, np.where(halves & 0x7FFF > 0x7F80, halves | 0x40, halves))
