"""What a type can hold at all: how well it is expected to encode, and weights too small for the range of its scales.

    lost:  a block of weights w, read back as w', with 0 < max |w| < limit  and  sum (w' - w)^2 >= sum w^2 / 2

A block's scale is an fp16 (GGUF), a BF16 (FP8) or a power of two. Below `step`, the least number above zero that it can
be, there is only zero, and shortly above it the scale has few digits. With weights of up to `reach` times the scale and
a floor of F dB, the digits suffice from  limit = reach * step * 10^(F / 20)  on. Blocks below it are no fault of an
encoding: a conversion counts their weights where they are lost, and a verification holds them against

    |w' - w| <= 2 * max |w| + reach * step

instead of the floor. BF16, F32 and what is kept have no scales. Bytes are ggml's all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ornith_moe.quant.builds.storage import FP8_BLOCK, Storage
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.source.slab import Slab

# Far below what a sound encoding reaches, and above what damage leaves. Least SQNR measured in dB over normal weights,
# Student's t of 3 and 2 degrees and columns of outliers, with and without a skewed importance matrix: F16 73, BF16 55,
# Q8_0 38, Q6_K 26, Q5_K 25, Q5_1 25, Q5_0 20, Q4_K 19, Q4_1 18, IQ4_XS 18, IQ4_NL 17, Q4_0 17, MXFP4 15, Q3_K 13,
# Q2_K 9, TQ1_0 and TQ2_0 1.8 (they are for ternary weights); FP8 of normal weights 31.
FLOOR_DB = {"keep": math.inf, "F32": 100.0, "BF16": 40.0, "F16": 40.0, "Q8_0": 30.0, "Q6_K": 18.0, "Q5_K": 16.0}
FLOOR_DB |= {"Q5_1": 16.0, "Q5_0": 13.0, "Q4_K": 12.0, "Q3_K": 8.0, "TQ1_0": 0.5, "TQ2_0": 0.5}
FLOOR_DB |= dict.fromkeys(("Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS"), 10.0) | dict.fromkeys(("MXFP4", "NVFP4"), 9.0)
FLOOR_DB |= {"F8_E4M3 per channel": 20.0, "F8_E4M3 per 128x128 block": 20.0}
FLOOR_DB |= {"IQ3_S": 6.0, "IQ3_XXS": 6.0, "IQ2_S": 3.0, "IQ2_XS": 3.0, "IQ2_XXS": 3.0}
LEAST_FLOOR_DB = 4.0  # Q2_K and below
HALF, BF16, E8M0, UE4M3 = 2.0**-24, 2.0**-133, 2.0**-128, 2.0**-10
REACH = {  # type: (step, reach)
    "F16": (HALF, 6), "Q8_0": (HALF, 127), "Q4_0": (HALF, 8), "Q4_1": (HALF, 16), "Q5_0": (HALF, 16),
    "Q5_1": (HALF, 32), "Q2_K": (HALF, 15 * 3), "Q3_K": (HALF, 32 * 4), "Q4_K": (HALF, 63 * 15),
    "Q5_K": (HALF, 63 * 31), "Q6_K": (HALF, 128 * 32), "IQ4_NL": (HALF, 127), "IQ4_XS": (HALF, 32 * 127),
    "IQ3_S": (HALF, 31 * 15), "IQ3_XXS": (HALF, 15.5 * 0.5 * 62), "IQ2_S": (HALF, 15.5 * 0.25 * 43),
    "IQ2_XS": (HALF, 15.5 * 0.25 * 43), "IQ2_XXS": (HALF, 15.5 * 0.25 * 43), "TQ1_0": (HALF, 1), "TQ2_0": (HALF, 1),
    "MXFP4": (E8M0, 12), "NVFP4": (UE4M3, 12), "F8_E4M3 per channel": (BF16, 448),
    "F8_E4M3 per 128x128 block": (BF16, 448),
}  # fmt: skip


def floor_db(name: str) -> float:
    """Least SQNR of a sound encoding in storage `name`."""
    return FLOOR_DB.get(name, LEAST_FLOOR_DB)


def limit(name: str) -> float:
    """Magnitude below which a block of storage `name` is out of the range of its scale; 0 where there is no scale."""
    step, reach = REACH.get(name, (0.0, 0.0))
    return step * reach * 10 ** (floor_db(name) / 20) if reach else 0.0


def small_blocks(weights: np.ndarray, name: str) -> np.ndarray | None:
    """Largest magnitude of the blocks below the limit of `name`, 0 in others: fp32 [rows, K]; None if none is below."""
    shape, below = _block(name, weights.shape), limit(name)
    if not below or not weights.size:
        return None
    largest = np.abs(_tiled(weights, shape)).max(axis=(1, 3), keepdims=True)
    largest = np.where(largest < below, largest, 0).astype(np.float32)
    if not largest.any():
        return None
    return np.broadcast_to(largest, _tiled(weights, shape).shape).reshape(weights.shape)


def lost_weights(storage: Storage, slab: Slab, encoded: tuple[np.ndarray, ...]) -> int:
    """How many weights above zero of `slab` are lost in `encoded`, being below the range of the scales of `storage`."""
    from ornith_moe.quant.codecs.small_blocks import has_small  # not at import: planning needs no numba

    name, below = storage.name, limit(storage.name)
    rows, columns = slab.raw.shape[0], slab.raw.shape[1] // (4 if slab.dtype == "F32" else 2)
    shape = _block(name, (rows, columns))
    if not below or name == slab.dtype or not has_small(slab.raw, slab.dtype, shape[1], below):
        return 0
    weights = slab.float32
    small = small_blocks(weights, name)
    if small is None:
        return 0
    with np.errstate(all="ignore"):
        error = storage.decode(encoded, columns, slab.dtype).astype(np.float64) - weights
    tiles = (_tiled(array.astype(np.float64), shape) for array in (error, weights, small))
    noise, signal, small = ((tile**2).sum(axis=(1, 3)) for tile in tiles)
    lost = (small > 0) & (2 * noise >= signal)
    return int((_tiled(weights, shape) != 0).sum(axis=(1, 3))[lost].sum())


def underflow_notes(types: Mapping[str, str], lost: Mapping[str, int]) -> list[str]:
    """One line for each type of which weights are lost; `lost` counts them by tensor, `types` are those of tensors."""
    names: dict[str, list[str]] = {}
    for name in lost:
        names.setdefault(types[name], []).append(name)
    return [
        f"{sum(lost[name] for name in found):,} weights of {len(found):,} tensors, the first {found[0]}, are too small "
        f"for the range of {kind} and its scales, and became zero or noise"
        for kind, found in names.items()
    ]


def _block(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of weights that share a scale.

    In F16 up to 32 are looked at together: one that became zero among others that did not is rounding.
    """
    if name == "F16":
        return 1, math.gcd(shape[1], 32)
    if name == "F8_E4M3 per channel":
        return 1, shape[1]
    if name == "F8_E4M3 per 128x128 block":
        return FP8_BLOCK, FP8_BLOCK
    return 1, block_shape(name)[0] if name in REACH else 1


def _tiled(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[rows, K] as [rows / r, r, K / c, c]."""
    rows, columns = array.shape
    return array.reshape(rows // shape[0], shape[0], columns // shape[1], shape[1])
