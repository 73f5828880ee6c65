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

from collections.abc import Mapping

import numpy as np

from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.slab import Slab


def limit(storage: Storage) -> float:
    """Magnitude below which a block of `storage` is out of the range of its scale; 0 where there is no scale."""
    return storage.scales.step * storage.scales.reach * 10 ** (storage.floor_db / 20) if storage.scales else 0.0


def small_blocks(weights: np.ndarray, storage: Storage) -> np.ndarray | None:
    """Largest magnitude of the blocks below the limit of `storage`, 0 in others: fp32 [rows, K]; None if none is."""
    below = limit(storage)
    if not below or not weights.size:
        return None
    shape = storage.tile(weights.shape)
    largest = np.abs(_tiled(weights, shape)).max(axis=(1, 3), keepdims=True)
    largest = np.where(largest < below, largest, 0).astype(np.float32)
    if not largest.any():
        return None
    return np.broadcast_to(largest, _tiled(weights, shape).shape).reshape(weights.shape)


def lost_weights(storage: Storage, slab: Slab, encoded: tuple[np.ndarray, ...]) -> int:
    """How many weights above zero of `slab` are lost in `encoded`, being below the range of the scales of `storage`."""
    from ornith_moe.quant.codecs.small_blocks import has_small  # not at import: planning needs no numba

    below = limit(storage)
    if not below or storage.exact(slab.dtype):
        return 0
    columns = slab.raw.shape[1] // ITEM_BYTES[slab.dtype]
    shape = storage.tile((slab.rows, columns))
    if not has_small(slab.raw, slab.dtype, shape[1], below):
        return 0
    weights = slab.float32
    small = small_blocks(weights, storage)
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


def _tiled(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[rows, K] as [rows / r, r, K / c, c]."""
    rows, columns = array.shape
    return array.reshape(rows // shape[0], shape[0], columns // shape[1], shape[1])
