"""Weights that a checkpoint holds in NVFP4, in ModelOpt's layout: for a GGUF of the same codes, and nothing else.

    w = e2m1(code) * (scale * scale_2)        codes [N, K] two in a byte, scale e4m3 of every 16 columns, scale_2 of all

| X.weight U8 [N, K / 2] | X.weight_scale F8_E4M3 [N, K / 16] | X.weight_scale_2 F32 [] |

Four bits that are encoded again lose twice, so builds with an encoding of their own are refused (`BuildPlan.add`).
Experts lie one by one, as every writer of this layout has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.slab import NAN, Slab, e4m3_values

if TYPE_CHECKING:
    from ornith_moe.quant.source.checkpoint import Checkpoint, TensorInfo

NVFP4, PACKED = "NVFP4", "U8"
GROUP = 16  # columns that share a scale
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Nvfp4Scales(NamedTuple):
    """The scales of one NVFP4 tensor: of its groups of columns, and of all of it."""

    groups: TensorInfo
    whole: TensorInfo


class Nvfp4Slab(Slab):
    """Rows held as codes uint8 [rows, K / 2] and scales uint8 [rows, K / 16], with the scale of all; in F32 when asked.

    Scales are above zero, so every value is finite.
    """

    def __init__(self, codes: np.ndarray, scales: np.ndarray, scale_2: np.float32):
        self.codes, self.scales, self.scale_2, self.dtype = codes, scales, scale_2, "F32"

    @cached_property
    def raw(self) -> np.ndarray:  # type: ignore[override]  # a Slab's is given, this one is made
        values = E2M1[np.stack([self.codes & 15, self.codes >> 4], axis=-1)].reshape(self.rows, -1, GROUP)
        values *= (e4m3_values()[self.scales] * self.scale_2)[..., None]
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
    keys = [key + "_scale", key + "_scale_2"]
    found = [tensors.get(each) for each in keys]
    rows, columns = shape if len(shape) == 2 else (0, 1)
    wanted = [("F8_E4M3", (rows, columns // GROUP)), ("F32", ())]
    sound = columns % GROUP == 0 and tensor.shape == (rows, columns // 2)
    if not sound or [each and (each.dtype, each.shape) for each in found] != wanted:
        got = ", ".join(f"{each.dtype} {list(each.shape)}" if each else "none" for each in found)
        raise CheckpointError(
            f"{tensor.path.name}: tensor {bare(tensor.name)} is {PACKED} {list(tensor.shape)} with scales {got}; "
            f"NVFP4 of {list(shape)} has {wanted[0][0]} {list(wanted[0][1])} and F32 [], so use its BF16 original"
        )
    groups, whole = found
    assert groups and whole
    return set(keys), Nvfp4Scales(groups, whole)


def read_nvfp4(checkpoint: Checkpoint, tensor: TensorInfo, scales: Nvfp4Scales, start: int, rows: int) -> Nvfp4Slab:
    """Rows [start, start + rows) of an NVFP4 tensor.

    Raises:
        CheckpointError: a scale that is not above zero.
    """
    groups = checkpoint.read_rows(scales.groups, start, rows)
    scale_2 = checkpoint.read_rows(scales.whole, 0, 1).view(np.float32)[0, 0]
    if (bad := (groups == 0) | (groups >= NAN)).any():
        row, column = map(int, np.argwhere(bad)[0])
        where, value = (
            f"{bare(scales.groups.name)}, row {start + row}, column {column}",
            e4m3_values()[groups[row, column]],
        )
    elif not 0 < scale_2 < math.inf:
        where, value = bare(scales.whole.name), scale_2
    else:
        return Nvfp4Slab(checkpoint.read_rows(tensor, start, rows), groups, scale_2)
    raise CheckpointError(
        f"{scales.groups.path.name}: the scale {where} is {value:.4g}; expected a positive number, so fetch the "
        "checkpoint again"
    )
