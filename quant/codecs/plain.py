"""F32, F16, BF16: one value each, rounded to nearest even. Source: ggml.c (`ggml_fp32_to_*_row` and back)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from ornith_moe.quant.codecs.codec import GgufCodec, as_float32, beyond_half, frozen, not_finite
from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.fp16 import half_bits, half_value
from ornith_moe.quant.simd.small_floats import bf16_bits, bf16_value

HALF_INFINITY = 0x7C00  # bits


class F32(GgufCodec):
    name = "F32"

    def encode(self, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        return as_float32(rows).view(np.uint8)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        return _aligned(rows, np.float32)


class F16(GgufCodec):
    name = "F16"

    def encode(self, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        rows, codes = as_float32(rows), np.empty(rows.shape, np.uint16)
        if _f16(frozen(rows), codes.reshape(-1)) >= HALF_INFINITY:
            row, column = map(int, np.argwhere(codes & 0x7FFF >= HALF_INFINITY)[0])
            raise (beyond_half if np.isfinite(rows[row, column]) else not_finite)(rows[row, column], row, column)
        return codes.view(np.uint8)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        return _widened(rows, _from_f16)


class BF16(GgufCodec):
    name = "BF16"

    def encode(self, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        codes = np.empty(rows.shape, np.uint16)
        _bf16(frozen(as_float32(rows)), codes.reshape(-1))
        return codes.view(np.uint8)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        return _widened(rows, _from_bf16)


def _aligned(rows: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Rows of bytes as numbers; a copy only of those that lie askew in memory, which numba would compile anew for."""
    return np.require(rows.view(dtype), requirements="A")


def _widened(rows: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], None]) -> np.ndarray:
    bits = _aligned(rows, np.uint16)
    out = np.empty(bits.shape, np.float32)
    kernel(frozen(bits), out.reshape(-1))
    return out


@compiled
def _from_f16(bits, out):
    for i in range(bits.size):
        out[i] = half_value(bits[i])


@compiled
def _from_bf16(bits, out):
    for i in range(bits.size):
        out[i] = bf16_value(bits[i])


@compiled
def _f16(values, codes):
    """The largest magnitude of the codes."""
    largest = np.uint16(0)
    for i in range(values.size):
        codes[i] = half_bits(values[i])
        largest = max(largest, codes[i] & np.uint16(0x7FFF))
    return largest


@compiled
def _bf16(values, codes):
    for i in range(values.size):
        codes[i] = bf16_bits(values[i])
