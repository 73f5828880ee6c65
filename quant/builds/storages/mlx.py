"""MLX's groups: packed codes as words of 32 bits, and for each group of a row a scale, and a bias where it is affine.

    X.weight  U32 [N, K * bits / 32]      X.scales  [N, K / group]      X.biases  [N, K / group]

Also the order in which MLX holds a convolution: its channels last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np

from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.storages.storage import Part, Scales, Storage, not_finite
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
MODES = {  # group, bits, floor and range of the scales of small floats; least SQNR: mxfp4 16, nvfp4 19, mxfp8 31
    "mxfp4": (32, 4, 10.0, Scales(2.0**-127, 6)),
    "nvfp4": (16, 4, 12.0, Scales(2.0**-9, 6)),
    "mxfp8": (32, 8, 20.0, Scales(2.0**-127, 448)),
}
MOST_E4M3, MOST_NVFP4 = 0x7E, 464.0 * 6  # the byte of 448; what rounds to it


class MlxAffine(Storage):
    """w = code * scale + bias over groups of 64, scales and biases in the dtype of the model."""

    suffixes = ("", ".scales", ".biases")

    def __init__(self, bits: int, dtype: str):
        self.bits, self.dtype = bits, dtype
        self.name = f"MLX affine {bits} bits"
        self.floor_db, self.scales = FLOOR_DB[bits], Scales(LEAST_SCALE, 2**bits - 1)

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return packed_parts(shape, self.bits, GROUP, self.dtype, self.suffixes[1:])

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


class MlxFloat(Storage):
    """w = code * scale in small floats, as quant/codecs/mlx_float.py says of each mode."""

    suffixes = ("", ".scales")

    def __init__(self, mode: str):
        self.mode, self.name = mode, f"MLX {mode}"
        self.group, self.bits, self.floor_db, self.scales = MODES[mode]

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return packed_parts(shape, self.bits, self.group, "U8", self.suffixes[1:])

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        from ornith_moe.quant.codecs.mlx_float import encode_float  # not at import: planning needs no numba

        rows = slab.raw.view(np.uint16) if slab.dtype == "BF16" else slab.float32
        codes, scales = encode_float(rows, self.group, self.bits)
        if self.mode == "nvfp4" and (scales == MOST_E4M3).any():
            values = slab.float32
            row, column = map(int, np.unravel_index(np.abs(values).argmax(), values.shape))
            if abs(value := values[row, column]) > MOST_NVFP4:
                raise UnstorableError(
                    f"row {row}, column {column}: {value:.4g} is beyond {MOST_NVFP4:.0f}, which scales in e4m3 reach"
                )
        return codes, scales

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.mlx_float import decode_float

        return decode_float(parts[0], parts[1], self.group, self.bits)

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, self.group

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        """Of codes, and of their scales, which are judged with them."""
        owner = name.removesuffix(".weight").removesuffix(cls.suffixes[1])
        codes, scales = found.get(f"{owner}.weight"), found.get(owner + cls.suffixes[1])
        if codes is None or scales is None or (codes.dtype, scales.dtype) != ("U32", "U8") or not codes.shape:
            return None
        words = codes.shape[-1] / max(matrix_shape(scales.shape)[1], 1)  # of a group
        return next((cls(mode) for mode, (group, bits, *_) in MODES.items() if group * bits / WORD == words), None)

    def problems(self, name: str, found: Mapping[str, FoundTensor]) -> Iterator[str]:
        from ornith_moe.quant.codecs.mlx_float import decode_float

        if name.endswith(self.suffixes[1]):
            return
        codes, scales = found[name], found[beside(name, self.suffixes[1])]
        columns = WORD * codes.shape[-1] // self.bits
        expected = (*codes.shape[:-1], columns // self.group)
        if scales.shape != expected:
            yield (
                f"{codes.path.name}: tensor {bare(name)} needs scales {list(expected)} in U8, got {list(scales.shape)}"
            )
            return
        size = self.group * self.bits // 8
        for start, some in codes.slabs(size, self.group):
            steps = scales.read(start // self.group, some.size // size).reshape(-1, 1)
            bad = ~np.isfinite(decode_float(some.reshape(-1, size), steps, self.group, self.bits))
            if bad.any():
                row = (start + int(bad.argmax())) // columns
                yield not_finite(name, codes, row * codes.shape[-1])
                return


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


@cache
def packed_parts(
    shape: tuple[int, ...], bits: int, group: int, dtype: str, suffixes: tuple[str, ...]
) -> tuple[Part, ...]:
    """Words of codes, and what each group has in `dtype`; experts of a shape share them."""
    rows, columns = shape
    size = columns // group * (1 if dtype == "U8" else ITEM_BYTES[dtype])
    words = Part("", "U32", (rows, columns * bits // WORD), columns * bits // 8)
    return words, *(Part(suffix, dtype, (rows, columns // group), size) for suffix in suffixes)


def beside(name: str, suffix: str) -> str:
    """Name of what belongs to tensor `name`."""
    return name.removesuffix(".weight") + suffix if suffix else name
