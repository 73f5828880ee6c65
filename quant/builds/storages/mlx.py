"""MLX's groups: packed codes as words of 32 bits, and for each group of a row a scale, and a bias where it is affine.

    X.weight  U32 [N, K * bits / 32]      X.scales  [N, K / group]      X.biases  [N, K / group]

Also the order in which MLX holds a convolution: its channels last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.storages.storage import Part, Scales, Storage
from ornith_moe.quant.builds.stored import FoundTensor
from ornith_moe.quant.errors import UnstorableError
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.slab import FLOAT_BITS, Slab, matrix_shape, to_float32

GROUP, WORD = 64, 32
# Far below what a sound encoding reaches. Least SQNR measured in dB over normal weights, Student's t of 3 and 2 degrees
# and columns of outliers, scales in BF16: 2 bits 6, 3 bits 11, 4 bits 17, 5 bits 22, 6 bits 27, 8 bits 34.
FLOOR_DB = {2: 2.0, 3: 8.0, 4: 12.0, 5: 18.0, 6: 22.0, 8: 26.0}
LEAST_SCALE = 1e-7


class MlxAffine(Storage):
    """w = code * scale + bias over groups of 64, scales and biases in the dtype of the model."""

    suffixes = ("", ".scales", ".biases")

    def __init__(self, bits: int, dtype: str):
        self.bits, self.dtype = bits, dtype
        self.name = f"MLX affine {bits} bits"
        self.floor_db, self.scales = FLOOR_DB[bits], Scales(LEAST_SCALE, 2**bits - 1)

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        rows, columns = shape
        groups, size = columns // GROUP, ITEM_BYTES[self.dtype]
        words = Part("", "U32", (rows, columns * self.bits // WORD), columns * self.bits // 8)
        return words, *(Part(suffix, self.dtype, (rows, groups), groups * size) for suffix in self.suffixes[1:])

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        from ornith_moe.quant.codecs.gguf import quantize_gguf  # not at import: planning needs no numba
        from ornith_moe.quant.codecs.mlx import encode_affine

        rows = slab.raw.view(np.uint16) if slab.dtype == "BF16" else slab.float32
        codes, *others = encode_affine(rows, self.bits)
        stored = [quantize_gguf(each, self.dtype) for each in others]
        for each in stored:
            if found := Slab(each, self.dtype).first_non_finite():
                row, column = found[0], GROUP * found[1]
                raise UnstorableError(f"row {row}: columns {column} to {column + GROUP - 1} span more than a scale can")
        return codes, *stored

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.mlx import decode_affine

        scales, biases = (to_float32(part, self.dtype) for part in parts[1:])
        return decode_affine(parts[0], scales, biases, self.bits)

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, GROUP

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        tensor, scales, biases = (found.get(beside(name, suffix)) for suffix in cls.suffixes)
        if tensor is None or tensor.dtype != "U32" or scales is None or biases is None or not tensor.shape:
            return None
        bits = WORD * tensor.shape[-1] // max(GROUP * matrix_shape(scales.shape)[1], 1)
        return cls(bits, scales.dtype) if bits in FLOOR_DB and scales.dtype in FLOAT_BITS else None

    def problems(self, name: str, found: Mapping[str, FoundTensor]) -> Iterator[str]:
        tensor = found[name]
        columns = WORD * tensor.shape[-1] // self.bits
        expected = (*tensor.shape[:-1], columns // GROUP)
        for suffix in self.suffixes[1:]:
            other = found[beside(name, suffix)]
            if (other.dtype, other.shape) != (self.dtype, expected):
                yield (
                    f"{tensor.path.name}: tensor {bare(name)} needs {suffix[1:]} {list(expected)} in {self.dtype}, got "
                    f"{other.dtype} {list(other.shape)}"
                )


class ChannelsLast(Gguf):
    """The weight of a convolution [O, C, ...] as [O, ..., C], in a plain dtype."""

    def __init__(self, dtype: str, shape: tuple[int, ...]):
        super().__init__(dtype)
        self.shape, self.float_type = shape, None  # rows of what it stores are not those of the source

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        values, rows = math.prod(shape[1:]), math.prod(shape[1:-1])
        return (Part("", self.name, (shape[0], values), values * ITEM_BYTES[self.name], rows),)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        values = super().encode(slab)[0].view(FLOAT_BITS[self.name][0]).reshape(-1, *self.shape[1:])
        moved = np.ascontiguousarray(np.moveaxis(values, 1, -1))
        return (moved.reshape(len(moved), -1).view(np.uint8),)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        channels, *window = self.shape[1:]
        moved = super().decode(parts, columns, dtype).reshape(-1, *window, channels)
        return np.ascontiguousarray(np.moveaxis(moved, -1, 1)).reshape(-1, columns)


def beside(name: str, suffix: str) -> str:
    """Name of what belongs to tensor `name`."""
    return name.removesuffix(".weight") + suffix if suffix else name
