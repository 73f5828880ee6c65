"""Weights without scales: the source's own bytes, and BF16."""

from __future__ import annotations

import math

import numpy as np

from ornith_moe.quant.builds.storages.storage import Part, Storage
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.slab import Slab, matrix_shape, to_float32
from ornith_moe.quant.source.source import Source


class Keep(Storage):
    """The source's own bytes; BF16 of what it computes."""

    name = "keep"
    floor_db = math.inf

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return (Part("", dtype, shape, matrix_shape(shape)[1] * ITEM_BYTES[dtype]),)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        return (slab.raw,)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        return to_float32(parts[0], dtype)

    def exact(self, dtype: str) -> bool:
        return True

    def taking(self, source: Source, index: int) -> Storage:
        return self if source.kept(index) == source.dtype(index) else ToBF16()


class ToBF16(Storage):
    """BF16, rounded to nearest even."""

    name = "BF16"
    floor_db = 40.0
    float_type = "BF16"
    uses_torch = True

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return (Part("", "BF16", shape, 2 * matrix_shape(shape)[1]),)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        import torch

        if slab.dtype == "BF16":
            return (slab.raw,)
        return (slab.tensor.to(torch.bfloat16).view(torch.uint8).numpy(),)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        return to_float32(parts[0], "BF16")

    def exact(self, dtype: str) -> bool:
        return dtype == "BF16"
