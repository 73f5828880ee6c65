"""Rows of a weight as they lie in a checkpoint, and what they mean."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

FLOAT_BITS = {  # dtype: the integer that carries it, mask of its magnitude, infinity
    "BF16": (np.uint16, np.uint16(0x7FFF), 0x7F80),
    "F16": (np.uint16, np.uint16(0x7FFF), 0x7C00),
    "F32": (np.uint32, np.uint32(0x7FFFFFFF), 0x7F800000),
}


class Slab:
    """Rows of a weight as read: uint8 [rows, row_bytes], and the same as fp32 (numpy) or in their dtype (torch)."""

    def __init__(self, raw: np.ndarray, dtype: str):
        self.raw, self.dtype = raw, dtype

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
        bits, magnitude, infinity = FLOAT_BITS[self.dtype]
        if not self.raw.size or (self.raw.view(bits) & magnitude).max() < infinity:
            return None
        values = self.float32
        row, column = map(int, np.argwhere(~np.isfinite(values))[0])
        return row, column, float(values[row, column])


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
