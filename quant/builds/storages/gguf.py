"""The types of a GGUF as storages: float32 rows in, blocks out; floors and ranges of scales by type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import gguf
import numpy as np

from ornith_moe.quant.builds.storages.storage import Part, Scales, Storage, not_finite
from ornith_moe.quant.builds.stored import FoundTensor
from ornith_moe.quant.codecs.sizes import block_shape, row_bytes
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.slab import FLOAT_BITS, Slab, matrix_shape, to_float32

# Far below what a sound encoding reaches, and above what damage leaves. Least SQNR measured in dB over normal weights,
# Student's t of 3 and 2 degrees and columns of outliers, with and without a skewed importance matrix: F16 73, BF16 55,
# Q8_0 38, Q6_K 26, Q5_K 25, Q5_1 25, Q5_0 20, Q4_K 19, Q4_1 18, IQ4_XS 18, IQ4_NL 17, Q4_0 17, MXFP4 15, Q3_K 13,
# Q2_K 9, TQ1_0 and TQ2_0 1.8 (they are for ternary weights).
FLOOR_DB = {"F32": 100.0, "BF16": 40.0, "F16": 40.0, "Q8_0": 30.0, "Q6_K": 18.0, "Q5_K": 16.0}
FLOOR_DB |= {"Q5_1": 16.0, "Q5_0": 13.0, "Q4_K": 12.0, "Q3_K": 8.0, "TQ1_0": 0.5, "TQ2_0": 0.5}
FLOOR_DB |= dict.fromkeys(("Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS"), 10.0) | dict.fromkeys(("MXFP4", "NVFP4"), 9.0)
FLOOR_DB |= {"IQ3_S": 6.0, "IQ3_XXS": 6.0, "IQ2_S": 3.0, "IQ2_XS": 3.0, "IQ2_XXS": 3.0}
LEAST_FLOOR_DB = 4.0  # Q2_K and below
HALF, E8M0, UE4M3 = 2.0**-24, 2.0**-128, 2.0**-10
SCALES = {  # (step, reach) of each type
    "F16": (HALF, 6), "Q8_0": (HALF, 127), "Q4_0": (HALF, 8), "Q4_1": (HALF, 16), "Q5_0": (HALF, 16),
    "Q5_1": (HALF, 32), "Q2_K": (HALF, 15 * 3), "Q3_K": (HALF, 32 * 4), "Q4_K": (HALF, 63 * 15),
    "Q5_K": (HALF, 63 * 31), "Q6_K": (HALF, 128 * 32), "IQ4_NL": (HALF, 127), "IQ4_XS": (HALF, 32 * 127),
    "IQ3_S": (HALF, 31 * 15), "IQ3_XXS": (HALF, 15.5 * 0.5 * 62), "IQ2_S": (HALF, 15.5 * 0.25 * 43),
    "IQ2_XS": (HALF, 15.5 * 0.25 * 43), "IQ2_XXS": (HALF, 15.5 * 0.25 * 43), "TQ1_0": (HALF, 1), "TQ2_0": (HALF, 1),
    "MXFP4": (E8M0, 12), "NVFP4": (UE4M3, 12),
}  # fmt: skip
SECOND_BYTES = 16 << 10  # of each slab, decoded twice: the `gguf` package takes twenty times as long


class Gguf(Storage):
    """One GGUF type. `importance` gives that of the columns, float32 [K], when asked."""

    def __init__(self, type_name: str, importance: Callable[[], np.ndarray] | None = None):
        self.name, self.importance = type_name, importance
        self.floor_db = FLOOR_DB.get(type_name, LEAST_FLOOR_DB)
        self.scales = Scales(*SCALES[type_name]) if type_name in SCALES else None
        self.float_type = type_name if type_name in FLOAT_BITS else None

    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        return (Part("", self.name, shape, row_bytes(self.name, matrix_shape(shape)[1])),)

    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        from ornith_moe.quant.codecs.gguf import quantize_gguf  # not at import: planning needs no numba

        if self.name == slab.dtype:
            return (slab.raw,)
        rows = slab.raw.view(np.uint16) if slab.dtype == "BF16" else slab.float32
        return (quantize_gguf(rows, self.name, imatrix=self.importance() if self.importance else None),)

    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        from ornith_moe.quant.codecs.gguf import dequantize_gguf

        return dequantize_gguf(parts[0], self.name)

    def exact(self, dtype: str) -> bool:
        return dtype == self.name

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        """A block.

        In F16 up to 32 weights are looked at together: one that became zero among others that did not is rounding.
        """
        return 1, math.gcd(shape[1], 32) if self.name == "F16" else block_shape(self.name)[0]

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        from ornith_moe.quant.codecs.gguf import DECODERS

        return cls(found[name].dtype) if found[name].dtype in DECODERS else None

    def problems(self, name: str, found: Mapping[str, FoundTensor]) -> Iterator[str]:
        tensor = found[name]
        for start, codes in tensor.slabs(*block_shape(self.name)[::-1]):
            bad = ~np.isfinite(self._values(codes))
            if bad.any():
                yield not_finite(name, tensor, start + int(bad.argmax()))
                return
            if not self._decodes_alike(codes):
                row = start // matrix_shape(tensor.shape)[1]
                yield (
                    f"{tensor.path.name}: tensor {bare(name)}, {self.name} from row {row} on decodes to other values "
                    "with the gguf package than with ours; please report it, and trust neither until then"
                )
                return

    def _values(self, codes: np.ndarray) -> np.ndarray:
        return to_float32(codes, self.name) if self.float_type else self.decode((codes,), 0, self.name)

    def _decodes_alike(self, codes: np.ndarray) -> bool:
        """Whether the first of these codes mean to the `gguf` package what they mean to us."""
        size = block_shape(self.name)[1]
        codes = codes[: SECOND_BYTES // size * size]
        with np.errstate(all="ignore"):
            theirs = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[self.name])
        return np.array_equal(self.decode((codes,), 0, self.name), theirs, equal_nan=True)
