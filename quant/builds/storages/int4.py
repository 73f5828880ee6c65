"""int4 in compressed-tensors' layout: words of eight codes, a BF16 scale for each group of columns, the shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ornith_moe.quant.builds.storages.storage import Part, Scales, Storage
from ornith_moe.quant.builds.stored import FoundTensor
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.slab import Slab, matrix_shape, to_float32

CODES, SCALE, SHAPE = "_packed", "_scale", "_shape"
IN_A_WORD = 8


class Int4(Storage):
    """`group` columns share a scale; `shape` is that of the weight, which is stored too."""

    floor_db = 9.0  # of normal weights 18
    scales = Scales(2.0**-133, 7.5)

    def __init__(self, group: int, shape: tuple[int, ...] = ()):
        self.group, self.shape = group, shape
        self.name = f"int4 in groups of {group}"

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part(CODES, "I32", (rows, columns // IN_A_WORD), columns // 2),
            Part(SCALE, "BF16", (rows, columns // self.group), columns // self.group * 2),
            Part(SHAPE, "I64", (2,), 16, rows=None),
        )

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        from ornith_moe.quant.codecs.int4 import encode_int4  # not at import: planning needs no numba

        rows = slab.raw.view(np.uint16) if slab.dtype == "BF16" else slab.float32
        codes, scales = encode_int4(rows, self.group)
        return codes, scales.view(np.uint8), np.array([self.shape], "<i8").view(np.uint8)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.int4 import decode_int4

        return decode_int4(parts[0], parts[1].view(np.uint16))

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        return 1, self.group

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        """Of codes, and of the shape beside them, which is judged with them."""
        for suffix, dtype in ((CODES, "I32"), (SHAPE, "I64")):
            if name.endswith(f".weight{suffix}") and found[name].dtype == dtype:
                return cls(0) if f"{name.removesuffix(suffix)}{CODES}" in found else None
        return None

    def problems(self, name: str, found: Mapping[str, FoundTensor]) -> Iterator[str]:
        if name.endswith(SHAPE):
            return
        codes, owner = found[name], name.removesuffix(CODES)
        rows, words = matrix_shape(codes.shape)
        scale, shape = found.get(owner + SCALE), found.get(owner + SHAPE)
        columns = words * IN_A_WORD
        sound = scale is not None and scale.dtype == "BF16" and scale.shape[:1] == (rows,) and len(scale.shape) == 2
        if scale is None or not sound or not scale.shape[1] or columns % scale.shape[1]:
            got = f"{scale.dtype} {list(scale.shape)}" if scale else "none"
            yield f"{codes.path.name}: tensor {bare(name)} is int4 and needs scales of {rows} rows in BF16, got {got}"
        elif not all((to_float32(values, "BF16") > 0).all() for _, values in scale.slabs(2)):
            yield f"{scale.path.name}: the scale of {bare(name)} is not positive everywhere"
        stated = shape.read(0, 16).view("<i8").tolist() if shape and shape.nbytes == 16 else None
        if stated != [rows, columns]:
            yield f"{codes.path.name}: tensor {bare(name)} holds {rows}x{columns}, its weight_shape says {stated}"
