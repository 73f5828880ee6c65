"""F32, F16, BF16: one value each, rounded to nearest even. Source: ggml.c (`ggml_fp32_to_*_row`)."""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.codecs.codec import GgufCodec, beyond_half, not_finite
from ornith_moe.quant.codecs.compiled import compiled


class F32(GgufCodec):
    name = "F32"

    def encode(self, rows, imatrix=None):
        return np.ascontiguousarray(rows, np.float32).view(np.uint8)


class F16(GgufCodec):
    name = "F16"

    def encode(self, rows, imatrix=None):
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        if not np.isfinite(half).all():
            row, column = map(int, np.argwhere(~np.isfinite(half))[0])
            raise (beyond_half if np.isfinite(rows[row, column]) else not_finite)(rows, row, column)
        return half.view(np.uint8)


class BF16(GgufCodec):
    name = "BF16"

    def encode(self, rows, imatrix=None):
        bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
        codes = np.empty(bits.shape, np.uint16)
        _bf16(bits.reshape(-1), codes.reshape(-1))
        return codes.view(np.uint8)


@compiled
def _bf16(bits, codes):
    for i in range(bits.size):
        b = bits[i]
        rounded = (b + (np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        quiet = (b >> np.uint32(16)) | np.uint32(64)
        codes[i] = quiet if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded
