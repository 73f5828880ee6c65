"""What storing a matrix does to it: sum over rows and columns of h[k] * (w - w')^2, w' = decode(encode(w)).

h is the importance of column k, the mean square of an input; over the same sum of w^2 it is the share of the matrix's
output that is noise, as long as inputs do not hang together. Sums are fp64 in the order of rows, so equal on machines
whose numpy sums alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ornith_moe.quant.builds.storages.fp8 import FP8Tensor
from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.storages.mlx import MlxAffine
from ornith_moe.quant.builds.storages.nvfp4 import NVFP4
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.errors import UnstorableError
from ornith_moe.quant.fitting.types import MLX, MODELOPT
from ornith_moe.quant.source.slab import Slab

CACHED_VALUES = 1 << 17  # compared at a time

Sums = list[float | None]  # energy, then the error in each storage; None: a value that it cannot hold


def storage_named(kind: str, importance: np.ndarray | None = None) -> Storage:
    """How a tensor of type `kind` (quant/fitting/types.py) is stored; only a GGUF's types encode with importance."""
    if kind in MLX:
        return MlxAffine(int(kind.removeprefix("MLX")), "BF16")
    if kind in MODELOPT:
        return FP8Tensor() if kind == "FP8" else NVFP4()
    return Gguf(kind, None if importance is None else lambda: importance)


def restored(rows: np.ndarray, storage: Storage) -> np.ndarray:
    """fp32 [R, K]: what `storage` makes of fp32 rows [R, K].

    One that needs to know a whole weight is given what these rows say: floats have nearly the same error at any scale.

    Raises:
        UnstorableError: a weight that it cannot hold.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    slab = Slab(rows.view(np.uint8), "F32")
    if storage.needs:
        storage = storage.given(storage.measure(slab))
    parts = storage.encode(slab)
    return storage.decode(parts, rows.shape[1], "F32")


def noise(rows: np.ndarray, importance: np.ndarray | None, storages: Sequence[Storage]) -> Sums:
    """Energy, and the error in each of `storages`, of fp32 rows [R, K] whose columns matter as `importance` [K]."""
    weights = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    step = max(CACHED_VALUES // rows.shape[1], 1)
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]

    def squares(storage: Storage | None = None) -> float:
        columns = np.zeros(rows.shape[1])
        for part in parts:
            left = part if storage is None else part - restored(part, storage)
            columns += np.square(left, dtype=np.float64).sum(0)
        return float((columns * weights).sum())

    result: Sums = [squares()]
    for storage in storages:
        try:
            result.append(squares(storage))
        except UnstorableError:
            result.append(None)
    return result
