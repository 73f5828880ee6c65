"""Weights that a checkpoint holds in NVFP4, in ModelOpt's layout or in that of compressed-tensors.

    w = e2m1(code) * (scale * scale_2)        codes [N, K] two in a byte, scale e4m3 of every 16 columns, scale_2 of all
    w = e2m1(code) * (scale / global_scale)   of compressed-tensors, whose scale of all divides

| layout               | codes U8 [N, K / 2] | scales F8_E4M3 [N, K / 16] | scale of all F32          |
|----------------------|---------------------|----------------------------|---------------------------|
| ModelOpt             | X.weight            | X.weight_scale             | X.weight_scale_2 []       |
| nvfp4-pack-quantized | X.weight_packed     | X.weight_scale             | X.weight_global_scale [1] |

Every operation is rounded once to fp32, as both readers do. Storages of these codes copy them, the scale of all
inverted where it must be; every other is encoded from the product. Experts lie one by one, as every writer of these
layouts has them.

Sources: modelopt 0.47; compressed-tensors 0.20 (compressors/nvfp4, quantization/lifecycle/forward_helpers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.slab import NAN, Slab, e4m3_values

if TYPE_CHECKING:
    from ornith_moe.quant.source.checkpoint import Checkpoint, TensorInfo

NVFP4, NVFP4_PACKED = "NVFP4", "NVFP4, packed"  # ModelOpt's layout, that of compressed-tensors
PACKED, PACKED_SUFFIX = "U8", "_packed"
GROUP = 16  # columns that share a scale
LARGEST = np.float32(2688)  # of e2m1 times that of e4m3
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Nvfp4Scales(NamedTuple):
    """The scales of one NVFP4 tensor: of its groups of columns, and of all of it."""

    groups: TensorInfo
    whole: TensorInfo
    kind: str

    @property
    def divides(self) -> bool:
        """Whether the scale of all divides."""
        return self.kind == NVFP4_PACKED


class Nvfp4Slab(Slab):
    """Rows held as codes uint8 [rows, K / 2] and scales uint8 [rows, K / 16], with the scale of all; in F32 when asked.

    Scales are above zero, and every value is finite.
    """

    def __init__(self, codes: np.ndarray, scales: np.ndarray, whole: np.float32, divides: bool):
        self.codes, self.scales, self.whole, self.divides, self.dtype = codes, scales, whole, divides, "F32"

    def scale_of_all(self, divides: bool) -> np.float32:
        """The scale of all for a layout in which it `divides`, or not."""
        return self.whole if divides == self.divides else np.float32(1) / self.whole

    @cached_property
    def raw(self) -> np.ndarray:  # type: ignore[override]  # a Slab's is given, this one is made
        values = E2M1[np.stack([self.codes & 15, self.codes >> 4], axis=-1)].reshape(self.rows, -1, GROUP)
        scales = e4m3_values()[self.scales]
        values *= (scales / self.whole if self.divides else scales * self.whole)[..., None]
        return values.reshape(self.rows, -1).view(np.uint8)

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    def first_non_finite(self) -> tuple[int, int, float] | None:
        return None


def nvfp4_scales_of(
    key: str, tensor: TensorInfo, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo]
) -> tuple[set[str], Nvfp4Scales]:
    """(keys, scales) of the tensor `key` of packed codes, of a weight of `shape`, among `tensors` by canonical names.

    Raises:
        CheckpointError: it has none, or not of this layout.
    """
    kind = NVFP4_PACKED if key.endswith(PACKED_SUFFIX) else NVFP4
    owner = key.removesuffix(PACKED_SUFFIX)
    keys = [owner + "_scale", owner + ("_global_scale" if kind == NVFP4_PACKED else "_scale_2")]
    found = [tensors.get(each) for each in keys]
    rows, columns = shape if len(shape) == 2 else (0, 1)
    wanted = [("F8_E4M3", (rows, columns // GROUP)), ("F32", (1,) if kind == NVFP4_PACKED else ())]
    sound = columns % GROUP == 0 and tensor.shape == (rows, columns // 2)
    if not sound or [each and (each.dtype, each.shape) for each in found] != wanted:
        got = ", ".join(f"{each.dtype} {list(each.shape)}" if each else "none" for each in found)
        raise CheckpointError(
            f"{tensor.path.name}: tensor {bare(tensor.name)} is {PACKED} {list(tensor.shape)} with scales {got}; "
            f"NVFP4 of {list(shape)} has {wanted[0][0]} {list(wanted[0][1])} and F32 {list(wanted[1][1])}, so use its "
            "BF16 original"
        )
    groups, whole = found
    assert groups and whole
    return set(keys), Nvfp4Scales(groups, whole, kind)


def read_nvfp4(checkpoint: Checkpoint, tensor: TensorInfo, scales: Nvfp4Scales, start: int, rows: int) -> Nvfp4Slab:
    """Rows [start, start + rows) of an NVFP4 tensor.

    Raises:
        CheckpointError: a scale that is not above zero, or of all so large that a weight would overflow.
    """
    groups = checkpoint.read_rows(scales.groups, start, rows)
    whole = checkpoint.read_rows(scales.whole, 0, 1).view(np.float32)[0, 0]
    with np.errstate(all="ignore"):
        largest = LARGEST / whole if scales.divides else LARGEST * whole
    if (bad := (groups == 0) | (groups >= NAN)).any():
        row, column = map(int, np.argwhere(bad)[0])
        where, value = (
            f"{bare(scales.groups.name)}, row {start + row}, column {column}",
            e4m3_values()[groups[row, column]],
        )
    elif not (0 < whole < np.inf and 0 < largest < np.inf):
        where, value = bare(scales.whole.name), whole
    else:
        return Nvfp4Slab(checkpoint.read_rows(tensor, start, rows), groups, whole, scales.divides)
    raise CheckpointError(
        f"{scales.groups.path.name}: the scale {where} is {value:.4g}; expected a positive number, so fetch the "
        "checkpoint again"
    )
