"""e4m3 values with scales beside them: BF16, one per output row or per 128 x 128 block, or F32, one per matrix.

Where the source holds a weight in the same layout, its codes and scales are copied, whatever made them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from ornith_moe.quant.builds.storages.storage import Part, Scales, Storage, largest_magnitude, not_finite
from ornith_moe.quant.builds.stored import FoundTensor
from ornith_moe.quant.recipes import BLOCK, FP8_BLOCK, ROW, Cast
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.quantized import E4M3
from ornith_moe.quant.source.slab import MAGNITUDE, NAN, QuantizedSlab, Slab, matrix_shape, to_float32
from ornith_moe.quant.source.source import Source


class FP8(Storage):
    """What both have in common; `block` are the rows and columns that share a scale, `suffix` is the scales' name."""

    floor_db = 20.0  # of normal weights 31
    scales = Scales(2.0**-133, 448)
    block: Cast
    suffix: str

    @abstractmethod
    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of a matrix."""

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        from ornith_moe.quant.codecs.fp8_slabs import encode_fp8  # not at import: planning needs no numba

        rows = slab.raw.view(np.uint16) if slab.dtype == "BF16" else slab.float32
        codes, scale = encode_fp8(rows, self.block, scale="bf16")
        return codes, scale.view(np.uint8)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.fp8_slabs import decode_fp8

        return decode_fp8(parts[0], parts[1].view(np.uint16), self.block)

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.block[0], self.block[1] or shape[1]

    def taking(self, source: Source, index: int) -> Storage:
        codes = source.codes(index)
        if codes is None:
            return self
        same = codes.kind == E4M3 and codes.whole and codes.block == self.block and codes.scale_dtype in ("BF16", "F32")
        return Copied(self, codes.scale_dtype) if same else self

    def problems(self, name: str, found: Mapping[str, FoundTensor]) -> Iterator[str]:
        tensor, scale = found[name], found.get(name + self.suffix)
        expected = self.scale_shape(*matrix_shape(tensor.shape))
        if scale is None or scale.shape != expected or scale.dtype not in ("BF16", "F32"):
            got = f"{scale.dtype} {list(scale.shape)}" if scale else "none"
            yield f"{tensor.path.name}: tensor {bare(name)} is FP8 and needs a scale {list(expected)}, got {got}"
        elif not all((to_float32(values, scale.dtype) > 0).all() for _, values in scale.slabs(scale.item_bytes)):
            yield f"{scale.path.name}: the scale of {name} is not positive everywhere"
        for start, codes in tensor.slabs(1):
            bad = (codes & MAGNITUDE) == NAN
            if bad.any():
                yield not_finite(name, tensor, start + int(bad.argmax()))
                return


class Copied(Storage):
    """The codes and scales of the source, which has the layout of `storage`; the scales keep their dtype."""

    floor_db = math.inf
    copies = True

    def __init__(self, storage: FP8, scale_dtype: str):
        self.storage, self.scale_dtype = storage, scale_dtype
        self.name = f"{storage.name}, copied"

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        codes, scale = self.storage.parts(shape, dtype)
        return codes, replace(scale, dtype=self.scale_dtype, row_bytes=scale.shape[1] * ITEM_BYTES[self.scale_dtype])

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        assert isinstance(slab, QuantizedSlab)  # or `Source.codes` was wrong
        return slab.parts

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.fp8_slabs import decode_fp8

        return decode_fp8(parts[0], to_float32(parts[1], self.scale_dtype), self.storage.block)

    def exact(self, dtype: str) -> bool:
        return True

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.storage.tile(shape)


class FP8Channel(FP8):
    """One scale per output row, as compressed-tensors stores them (`weight_scale`)."""

    name = "F8_E4M3 per channel"
    block, suffix = ROW, "_scale"

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        rows, columns = shape
        return Part("", E4M3, shape, columns), Part(self.suffix, "BF16", (rows, 1), 2)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, 1

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        scale = found.get(name + cls.suffix)
        return cls() if found[name].dtype == E4M3 and scale is not None and scale.shape != () else None


class FP8Block(FP8):
    """One scale per 128 x 128 block, as Qwen's FP8 builds store them (`weight_scale_inv`).

    Only for matrices of whole blocks: transformers cannot dequantize a partial one.
    """

    name = "F8_E4M3 per 128x128 block"
    block, suffix = BLOCK, "_scale_inv"

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        rows, columns = shape
        grid = (rows // FP8_BLOCK, columns // FP8_BLOCK)
        return Part("", E4M3, shape, columns), Part(self.suffix, "BF16", grid, 2 * grid[1], FP8_BLOCK)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        """Of FP8 without scales of rows: that it has no scales at all is told as a problem."""
        if found[name].dtype != E4M3 or name.endswith(FP8Channel.suffix):  # those of NVFP4
            return None
        return cls() if name + FP8Channel.suffix not in found else None


class FP8Tensor(FP8):
    """One F32 scale for the matrix, amax / 448, as ModelOpt stores it (`weight_scale`, shape []).

    The quotient of a BF16 weight is rounded to BF16 before it becomes e4m3, as torch's division does.
    """

    name = "F8_E4M3 per tensor"
    suffix = "_scale"
    needs = True

    def __init__(self, scale: np.float32 | None = None):
        self.scale = scale
        if scale is not None:
            self.scales = Scales(float(scale) * 2.0**-9, 1)

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return Part("", E4M3, shape, shape[1]), Part(self.suffix, "F32", (), 4, rows=None)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return ()

    def taking(self, source: Source, index: int) -> Storage:
        return self

    def measure(self, slab: Slab) -> float:
        return largest_magnitude(slab)

    def merge(self, first: float, second: float) -> float:
        return max(first, second)

    def given(self, found: float) -> Storage:
        return FP8Tensor(np.float32(found) / np.float32(448) or np.float32(1))

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        from ornith_moe.quant.codecs.fp8_slabs import encode_fp8_with  # not at import: planning needs no numba

        assert self.scale is not None, "the weight was not measured"
        rows = slab.raw.view(np.uint16) if slab.dtype == "BF16" else slab.float32
        return encode_fp8_with(rows, self.scale), self.scale.reshape(1, 1).view(np.uint8)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.fp8_slabs import decode_fp8

        return decode_fp8(parts[0], parts[1].view(np.float32), (max(len(parts[0]), 1), None))

    def as_stored(self, parts: tuple[np.ndarray, ...]) -> Storage:
        return FP8Tensor(parts[1].view(np.float32)[0, 0])

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, math.gcd(shape[1], 16)

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        scale = found.get(name + cls.suffix)
        return cls() if found[name].dtype == E4M3 and scale is not None and scale.shape == () else None
