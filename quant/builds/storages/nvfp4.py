"""NVFP4: e2m1 codes, an e4m3 scale for every 16 columns, and a scale of all that is fused with the tensor.

One encoding (quant/codecs/nvfp4.py) in three layouts: ModelOpt's (`weight`, `weight_scale`, `weight_scale_2`),
compressed-tensors' (`weight_packed`, `weight_scale`, `weight_global_scale`, which divides), and a GGUF's (blocks, and
`.scale`). The scale of all is known when all was seen: gate and up of an expert share one, because engines multiply
them as one matrix and take one of two. Codes and scales that a source holds in NVFP4 are copied, whatever made them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.storages.storage import Part, Scales, Storage, largest_magnitude
from ornith_moe.quant.builds.stored import FoundTensor
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.nvfp4 import NVFP4 as MODELOPT
from ornith_moe.quant.source.nvfp4 import NVFP4_PACKED, Nvfp4Slab
from ornith_moe.quant.source.slab import Slab, matrix_shape
from ornith_moe.quant.source.source import Source

CODES, BLOCK_SCALE = "U8", "F8_E4M3"
GROUP = 16  # columns that share a scale
LEAST_SCALE, LARGEST_CODE = 2.0**-9, 6  # of a block, of e2m1
NAN = 0x7F  # of e4m3


class NVFP4(Storage):
    """ModelOpt's layout. `scale_2` is None until the weight was measured."""

    name = "NVFP4"
    floor_db = 9.0  # of normal weights 20
    needs = True
    suffixes = ("", "_scale", "_scale_2")  # of the names of codes, scales of blocks, scale of all
    scale_2_shape: tuple[int, ...] = ()
    divides = False  # the scale of all, as it is stored

    def __init__(self, scale_2: np.float32 | None = None):
        self.scale_2 = scale_2
        if scale_2 is not None:
            self.scales = Scales(LEAST_SCALE * float(scale_2), LARGEST_CODE)

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part(self.suffixes[0], CODES, (rows, columns // 2), columns // 2),
            Part(self.suffixes[1], BLOCK_SCALE, (rows, columns // GROUP), columns // GROUP),
            Part(self.suffixes[2], "F32", self.scale_2_shape, 4, rows=None),
        )

    def measure(self, slab: Slab) -> float:
        return largest_magnitude(slab)

    def merge(self, first: float, second: float) -> float:
        return max(first, second)

    def given(self, found: float) -> Storage:
        from ornith_moe.quant.codecs.nvfp4 import scale_2_of  # not at import: planning needs no numba

        return type(self)(scale_2_of(found))

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        codes, scales, scale_2 = encoded(slab, self.scale_2)
        return self.laid_out(codes, scales, self.stored_scale(scale_2))

    def laid_out(self, codes: np.ndarray, scales: np.ndarray, stored: np.float32) -> tuple[np.ndarray, ...]:
        """The parts of codes and scales of blocks, with the scale of all as it is stored."""
        return codes, scales, stored.reshape(1, 1).view(np.uint8)

    def taking(self, source: Source, index: int) -> Storage:
        codes = source.codes(index)
        return CopiedNVFP4(self, codes.kind) if codes and is_nvfp4(source, index) else self

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.nvfp4 import decode_nvfp4

        return decode_nvfp4(parts[0], parts[1], self.scale_of(parts))

    def stored_scale(self, scale_2: np.float32) -> np.float32:
        """The scale of all as it is stored, and its own inverse."""
        return scale_2

    def scale_of(self, parts: tuple[np.ndarray, ...]) -> np.float32:
        """What multiplies all of a weight that is stored as `parts`."""
        return self.stored_scale(parts[2].view(np.float32)[0, 0])

    def as_stored(self, parts: tuple[np.ndarray, ...]) -> Storage:
        return type(self)(self.scale_of(parts))

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, GROUP

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        """Of codes, and of the scales of blocks, which are judged with their codes."""
        codes, blocks, scale = cls.suffixes
        for suffix, dtype in ((codes, CODES), (blocks, BLOCK_SCALE)):
            if name.endswith(f".weight{suffix}") and found[name].dtype == dtype:
                owner = name[: len(name) - len(suffix)]
                return cls() if {owner + codes, owner + scale} <= found.keys() else None
        return None

    def problems(self, name: str, found: Mapping[str, FoundTensor]) -> Iterator[str]:
        if found[name].dtype == BLOCK_SCALE:
            return
        codes, file = found[name], found[name].path.name
        owner, (rows, packed) = name.removesuffix(self.suffixes[0]), matrix_shape(codes.shape)
        blocks, scale = found.get(owner + self.suffixes[1]), found[owner + self.suffixes[2]]
        expected = (rows, 2 * packed // GROUP)
        if blocks is None or (blocks.dtype, blocks.shape) != (BLOCK_SCALE, expected):
            got = f"{blocks.dtype} {list(blocks.shape)}" if blocks else "none"
            yield f"{file}: tensor {bare(name)} is NVFP4 and needs scales {list(expected)} in {BLOCK_SCALE}, got {got}"
            return
        for start, values in blocks.slabs(1):
            bad = (values == 0) | (values >= NAN)  # 0x80 and beyond are negative
            if bad.any():
                row = (start + int(bad.argmax())) // expected[1]
                yield f"{blocks.path.name}: row {row} of the scales of {bare(name)} holds one that is not above zero"
                break
        if (scale.dtype, scale.shape) != ("F32", self.scale_2_shape):
            shape = list(self.scale_2_shape)
            yield f"{file}: the scale of tensor {bare(name)} is {scale.dtype} {list(scale.shape)}, expected F32 {shape}"
            return
        value = self.stored_scale(scale.read(0, 4).view(np.float32)[0])
        if not 0 < value < np.inf or not np.isfinite(np.float32(448 * LARGEST_CODE) * value):
            yield f"{scale.path.name}: the scale of {bare(name)} is {value}; expected a number above zero"


class NVFP4Packed(NVFP4):
    """compressed-tensors' layout of the same codes: the scale of all is its inverse and divides, as its reader does."""

    name = "NVFP4, packed"
    suffixes = ("_packed", "_scale", "_global_scale")
    scale_2_shape = (1,)
    divides = True

    def stored_scale(self, scale_2: np.float32) -> np.float32:
        with np.errstate(divide="ignore"):  # a stored zero is told as a problem
            return np.float32(1) / scale_2

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.nvfp4 import decode_nvfp4

        return decode_nvfp4(parts[0], parts[1], parts[2].view(np.float32)[0, 0], divides=True)


class NVFP4Blocks(NVFP4):
    """A GGUF's blocks, and the scale of all beside them: one for a matrix, one for each of a stack."""

    suffixes = ("", "", ".scale")

    def __init__(self, scale_2: np.float32 | None = None, stacked: bool = False):
        super().__init__(scale_2)
        self.stacked = stacked

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        columns = matrix_shape(shape)[1]
        scale = () if self.stacked else (1,)
        return Part("", self.name, shape, columns // 16 * 9), Part(".scale", "F32", scale, 4, rows=None)

    def given(self, found: float) -> Storage:
        from ornith_moe.quant.codecs.nvfp4 import scale_2_of

        return NVFP4Blocks(scale_2_of(found), self.stacked)

    def laid_out(self, codes: np.ndarray, scales: np.ndarray, stored: np.float32) -> tuple[np.ndarray, ...]:
        from ornith_moe.quant.codecs.nvfp4 import gguf_blocks

        return gguf_blocks(codes, scales), stored.reshape(1, 1).view(np.uint8)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.nvfp4 import decode_nvfp4, of_gguf_blocks

        return decode_nvfp4(*of_gguf_blocks(parts[0]), self.scale_of(parts))

    def scale_of(self, parts: tuple[np.ndarray, ...]) -> np.float32:
        return parts[1].view(np.float32)[0, 0]

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        return cls() if found[name].dtype == cls.name and name.removesuffix(".weight") + ".scale" in found else None

    def problems(self, name: str, found: Mapping[str, FoundTensor]) -> Iterator[str]:
        """What is wrong with the blocks, as with those that have no other scale, and with the scale of all."""
        yield from Gguf(self.name).problems(name, found)
        blocks, scale = found[name], found[name.removesuffix(".weight") + ".scale"]
        expected = blocks.shape[:-2] or (1,)
        if (scale.dtype, scale.shape) != ("F32", expected):
            got = f"{scale.dtype} {list(scale.shape)}"
            yield f"{scale.path.name}: the scale of tensor {bare(name)} is {got}, expected F32 {list(expected)}"
            return
        values = scale.read(0, scale.nbytes).view(np.float32)
        if not ((values > 0) & (values < np.inf)).all():
            yield f"{scale.path.name}: the scale of tensor {bare(name)} is not a number above zero everywhere"


class CopiedNVFP4(Storage):
    """The codes and scales of a source that is NVFP4, laid out by `storage`.

    The scale of all is copied where both layouts multiply by it or both divide; else it is the inverse, rounded, and
    weights differ in their last bits.
    """

    copies = True

    def __init__(self, storage: NVFP4, kind: str):
        self.storage, self.same = storage, storage.divides == (kind == NVFP4_PACKED)
        self.name = storage.name
        self.floor_db = math.inf if self.same else 120.0  # of two roundings in fp32 at least 138

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return self.storage.parts(shape, dtype)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        assert isinstance(slab, Nvfp4Slab)  # or `Source.codes` was wrong
        return self.storage.laid_out(slab.codes, slab.scales, slab.scale_of_all(self.storage.divides))

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        return self.storage.decode(parts, columns, dtype)

    def exact(self, dtype: str) -> bool:
        return self.same

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.storage.tile(shape)


def is_nvfp4(source: Source, index: int) -> bool:
    """Whether `source` holds weight `index` in NVFP4."""
    codes = source.codes(index)
    return codes is not None and codes.kind in (MODELOPT, NVFP4_PACKED)


def encoded(slab: Slab, scale_2: np.float32 | None) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Codes, scales of blocks and scale of all of a slab of a weight that was measured."""
    from ornith_moe.quant.codecs.nvfp4 import encode_nvfp4  # not at import: planning needs no numba

    assert scale_2 is not None, "the weight was not measured"
    rows = slab.raw.view(np.uint16) if slab.dtype == "BF16" else slab.float32
    return *encode_nvfp4(rows, scale_2), scale_2
