"""Rows of a weight as they lie in a checkpoint, and what they mean.

Slab            numbers in BF16, F16 or F32
QuantizedSlab   codes and scales: w[i, j] = code[i, j] * factor[i, j // width], one product in fp32
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

FLOAT_BITS = {  # dtype: the integer that carries it, mask of its magnitude, infinity
    "BF16": (np.uint16, np.uint16(0x7FFF), 0x7F80),
    "F16": (np.uint16, np.uint16(0x7FFF), 0x7C00),
    "F32": (np.uint32, np.uint32(0x7FFFFFFF), 0x7F800000),
}
MAGNITUDE, NAN = 0x7F, 0x7F  # of an e4m3 code; the only codes that are no number
CACHED_VALUES = 1 << 18  # of a slab, at a time: what is made of them stays in a core's cache


class Slab:
    """Rows of a weight as read: uint8 [rows, row_bytes], and the same as fp32 (numpy) or in their dtype (torch)."""

    def __init__(self, raw: np.ndarray, dtype: str):
        self.raw, self.dtype = raw, dtype

    @property
    def rows(self) -> int:
        return self.raw.shape[0]

    @cached_property
    def float32(self) -> np.ndarray:
        return to_float32(self.raw, self.dtype)

    @cached_property
    def tensor(self) -> torch.Tensor:
        import torch  # not at import: planning needs no torch

        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[self.dtype]
        return torch.from_numpy(self.raw).view(dtype)

    def first_non_finite(self) -> tuple[int, int, float] | None:
        """Row, column and value of the first NaN or Inf."""
        dtype, magnitude, infinity = FLOAT_BITS[self.dtype]
        bits = self.raw.view(dtype).reshape(-1)
        pieces = (bits[start : start + CACHED_VALUES] for start in range(0, bits.size, CACHED_VALUES))
        if all((piece & magnitude).max() < infinity for piece in pieces):
            return None
        values = self.float32
        row, column = map(int, np.argwhere(~np.isfinite(values))[0])
        return row, column, float(values[row, column])


class QuantizedSlab(Slab):
    """Rows held as e4m3 codes and scales; to all who do not ask for these, rows in F32, decoded when they are needed.

    Args:
        parts: uint8, as stored: codes [rows, K], scales [their rows, bytes].
        factors: fp32 [rows, ceil(K / width)]: what those scales are for each row.
        width: columns that share a factor.
    """

    def __init__(self, parts: tuple[np.ndarray, np.ndarray], factors: np.ndarray, width: int):
        self.parts, self.factors, self.width, self.dtype = parts, factors, width, "F32"

    @cached_property
    def raw(self) -> np.ndarray:  # type: ignore[override]  # a Slab's is given, this one is made
        codes, table = self.parts[0], e4m3_values()
        rows, columns = codes.shape
        values = np.empty((rows, columns), np.float32)
        step = max(CACHED_VALUES // max(columns, 1), 1)
        for start in range(0, rows, step):
            some = values[start : start + step]
            np.take(table, codes[start : start + step], out=some, mode="clip")
            factors = self.factors[start : start + step]
            some *= factors if factors.shape[1] == 1 else np.repeat(factors, self.width, axis=1)[:, :columns]
        return values.view(np.uint8)

    @property
    def rows(self) -> int:
        return self.parts[0].shape[0]

    def first_non_finite(self) -> tuple[int, int, float] | None:
        """As of a `Slab`; factors are finite, and no product with one overflows."""
        codes = self.parts[0]
        if not codes.size or (codes & MAGNITUDE).max() < NAN:
            return None
        row, column = map(int, np.argwhere((codes & MAGNITUDE) == NAN)[0])
        return row, column, math.nan


@cache
def e4m3_values() -> np.ndarray:
    """fp32 [256]: what each code of F8_E4M3 (e4m3fn) is: sign, 4 bits of exponent with bias 7, 3 of mantissa."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(mantissa * 1.0, -9))
    values = np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)
    values[(codes & MAGNITUDE) == NAN] = np.nan
    values.flags.writeable = False
    return values


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """uint8 [rows, row_bytes] of safetensors dtype `dtype` as fp32 [rows, K]."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32, copy=False)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor as the stream sees it: [n] is n rows of one value, [E, N, K] is E*N rows of K."""
    if len(shape) < 2:
        return (math.prod(shape), 1)
    return math.prod(shape[:-1]), shape[-1]
