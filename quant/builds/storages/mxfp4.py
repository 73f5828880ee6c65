"""MXFP4 in compressed-tensors' layout: codes in pairs, a power of two for every 32 columns as a byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ornith_moe.quant.builds.storages.storage import Part, Scales, Storage
from ornith_moe.quant.builds.stored import FoundTensor
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.slab import Slab, matrix_shape

CODES, SCALE, BYTES = "_packed", "_scale", "U8"
GROUP = 32  # columns that share a scale
NAN = 0xFF  # of UE8M0


class MXFP4(Storage):
    name = "MXFP4"
    floor_db = 9.0  # of normal weights 18
    scales = Scales(2.0**-127, 6)

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part(CODES, BYTES, (rows, columns // 2), columns // 2),
            Part(SCALE, BYTES, (rows, columns // GROUP), columns // GROUP),
        )

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        from ornith_moe.quant.codecs.mxfp4 import encode_mxfp4  # not at import: planning needs no numba

        return encode_mxfp4(slab.raw.view(np.uint16) if slab.dtype == "BF16" else slab.float32)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.mxfp4 import decode_mxfp4

        return decode_mxfp4(*parts)

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, GROUP

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        """Of codes, and of their scales, which are judged with them."""
        for suffix in (CODES, SCALE):
            if name.endswith(f".weight{suffix}") and found[name].dtype == BYTES:
                owner = name.removesuffix(suffix)
                return cls() if {owner + CODES, owner + SCALE} <= found.keys() else None
        return None

    def problems(self, name: str, found: Mapping[str, FoundTensor]) -> Iterator[str]:
        if name.endswith(SCALE):
            return
        codes, scales = found[name], found[name.removesuffix(CODES) + SCALE]
        rows, packed = matrix_shape(codes.shape)
        expected = rows, 2 * packed // GROUP
        if (scales.dtype, scales.shape) != (BYTES, expected):
            got = f"{scales.dtype} {list(scales.shape)}"
            needs = f"needs scales {list(expected)} in {BYTES}"
            yield f"{codes.path.name}: tensor {bare(name)} is MXFP4 and {needs}, got {got}"
        elif any((values == NAN).any() for _, values in scales.slabs(1)):
            yield f"{scales.path.name}: a scale of {bare(name)} is no number"
