"""Whether any run of values in a row is small but not all zero: one look over the bits, before anything is decoded."""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.simd.compiled import compiled


@compiled
def any_small(bits, run, sign, limit):
    """Whether a run of `run` values has a largest magnitude, as bits without `sign`, above zero and below `limit`.

    Most runs show by their first value that they have not.
    """
    for start in range(0, bits.size, run):
        i, most = start, bits[start] & sign
        while most < limit:
            i += 1
            if i == start + run:
                if most:
                    return True
                break
            most = max(most, bits[i] & sign)
    return False


def has_small(raw: np.ndarray, dtype: str, run: int, limit: float) -> bool:
    """Whether uint8 [rows, row_bytes] of `dtype` has a run of values that are all below `limit` and not all zero."""
    bits, magnitude = (np.uint32, np.uint32(0x7FFFFFFF)) if dtype == "F32" else (np.uint16, np.uint16(0x7FFF))
    if dtype == "F16":
        top = np.float16(limit).view(bits)
    else:
        top = np.float32(limit).view(np.uint32) >> np.uint32(0 if dtype == "F32" else 16)
    flat = np.ascontiguousarray(raw).view(bits).reshape(-1)
    return bool(any_small(flat, min(run, flat.size), magnitude, bits(int(top) + 1))) if flat.size else False
