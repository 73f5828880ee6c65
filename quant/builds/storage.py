"""How one weight is stored in a build: the parts it becomes, their bytes, and back.

A `Storage` turns rows of a weight into rows of one output tensor (kept, BF16, a GGUF type) or of two (FP8 values and
scales). A part may need whole groups of rows (`Part.rows`), so a slab of whole groups gives the same bytes as the whole
weight; that is what lets a conversion see a weight in slabs and in any order.

Decoding is for verification, which has the `gguf` package, other people's code, decode the start of every slab too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ornith_moe.quant.codecs.sizes import row_bytes
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.slab import Slab, matrix_shape, to_float32

FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Part:
    """One output tensor of a weight: suffix of its name, dtype, shape, bytes of a row, and weight rows per row."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    row_bytes: int
    rows: int = 1

    @property
    def nbytes(self) -> int:
        return matrix_shape(self.shape)[0] * self.row_bytes


class Keep:
    """The source's own bytes."""

    name = "keep"

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return (Part("", dtype, shape, matrix_shape(shape)[1] * ITEM_BYTES[dtype]),)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        return (slab.raw,)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        return to_float32(parts[0], dtype)


class ToBF16:
    """BF16, rounded to nearest even."""

    name = "BF16"

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return (Part("", "BF16", shape, 2 * matrix_shape(shape)[1]),)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        import torch

        if slab.dtype == "BF16":
            return (slab.raw,)
        return (slab.tensor.to(torch.bfloat16).view(torch.uint8).numpy(),)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        return to_float32(parts[0], "BF16")


class FP8Channel:
    """e4m3 values and one BF16 scale per output row, as compressed-tensors stores them (`weight_scale`)."""

    name = "F8_E4M3 per channel"

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        rows, columns = shape
        return Part("", "F8_E4M3", shape, columns), Part("_scale", "BF16", (rows, 1), 2)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        return _encode_fp8(slab, (1, None))

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        return _decode_fp8(parts, (1, None))


class FP8Block:
    """e4m3 values and one BF16 scale per 128 x 128 block, as Qwen's FP8 builds store them (`weight_scale_inv`).

    Only for matrices of whole blocks: transformers cannot dequantize a partial one.
    """

    name = "F8_E4M3 per 128x128 block"

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        rows, columns = shape
        grid = (rows // FP8_BLOCK, columns // FP8_BLOCK)
        return Part("", "F8_E4M3", shape, columns), Part("_scale_inv", "BF16", grid, 2 * grid[1], FP8_BLOCK)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        return _encode_fp8(slab, (FP8_BLOCK, FP8_BLOCK))

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        return _decode_fp8(parts, (FP8_BLOCK, FP8_BLOCK))


class Gguf:
    """One GGUF type; float32 rows in, blocks out. `importance` gives that of the columns, float32 [K], when asked."""

    def __init__(self, type_name: str, importance: Callable[[], np.ndarray] | None = None):
        self.name, self.importance = type_name, importance

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return (Part("", self.name, shape, row_bytes(self.name, matrix_shape(shape)[1])),)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        from ornith_moe.quant.codecs.gguf import quantize_gguf

        if self.name == slab.dtype:
            return (slab.raw,)
        return (quantize_gguf(slab.float32, self.name, imatrix=self.importance() if self.importance else None),)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.gguf import dequantize_gguf

        return dequantize_gguf(parts[0], self.name)


Storage = Keep | ToBF16 | FP8Channel | FP8Block | Gguf


def _encode_fp8(slab: Slab, block: tuple[int, int | None]) -> tuple[np.ndarray, ...]:
    from ornith_moe.quant.codecs.fp8_slabs import encode_fp8  # not at import: planning needs no numba

    rows = slab.raw.view(np.uint16) if slab.dtype == "BF16" else slab.float32
    codes, scale = encode_fp8(rows, block, scale="bf16")
    return codes, scale.view(np.uint8)


def _decode_fp8(parts: tuple[np.ndarray, ...], block: tuple[int, int | None]) -> np.ndarray:
    from ornith_moe.quant.codecs.fp8_slabs import decode_fp8

    return decode_fp8(parts[0], parts[1].view(np.uint16), block)
