"""The stream: slabs of rows on their way from a source into the files of its builds, and back for verification.

    unit = rows [start, start + rows) of one weight      read once, encoded for every build
    extent = a run of bytes of an output file             what one unit leaves in one place

A unit holds whole groups of rows of every storage (128, the height of an FP8 block), so the bytes of a weight do not
depend on how it is cut. Reordered heads scatter a unit over several extents; everything else is one extent per part.
Nothing here needs a whole weight in memory, however large the tensor that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ornith_moe.quant.builds.plan import Step
from ornith_moe.quant.builds.storage import FP8_BLOCK
from ornith_moe.quant.source.architectures.weight import GgufPlace
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.weights import Source, weight_matrix


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [start, start + rows) of weight `weight`."""

    weight: int
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of one part: `rows` (indices into the unit's part) go to `target` (row of the output tensor)."""

    part: int
    rows: slice | np.ndarray
    target: int
    count: int


def units(source: Source, slab_bytes: int) -> list[Unit]:
    """The work of a conversion in the order in which it lies on disk, at most about `slab_bytes` of source each."""
    order = range(len(source.weights))
    if source.rows:
        order = sorted(order, key=lambda i: (source.rows[i][0].path.name, source.rows[i][0].offset, source.rows[i][1]))
    work = []
    for index in order:
        rows, columns = weight_matrix(source.weights[index])
        row_bytes = max(columns * ITEM_BYTES[source.dtype(index)], 1)
        slab = max(slab_bytes // row_bytes // FP8_BLOCK, 1) * FP8_BLOCK
        work.extend(Unit(index, start, min(slab, rows - start)) for start in range(0, rows, slab))
    return work


def read_unit(source: Source, unit: Unit) -> Slab:
    tensor, first = source.rows[unit.weight]
    return Slab(source.checkpoint.read_rows(tensor, first + unit.start, unit.rows), tensor.dtype)


def transform(place: GgufPlace | None, slab: Slab) -> Slab:
    """Values and columns as the build wants them; the order of rows is a matter of `runs`."""
    if place is None:
        return slab
    if place.values != "same":
        values = slab.float32 + np.float32(1) if place.values == "add_one" else _negative_exp(slab.float32)
        slab = Slab(values.view(np.uint8), "F32")
    if place.columns:
        item = {2: np.uint16, 4: np.uint32}[ITEM_BYTES[slab.dtype]]
        columns = slab.raw.view(item)
        columns = np.ascontiguousarray(columns[:, place.columns.source_index(columns.shape[1])])
        slab = Slab(columns.view(np.uint8), slab.dtype)
    return slab


def untransform(place: GgufPlace | None, values: np.ndarray) -> np.ndarray:
    """Inverse of `transform` on decoded fp32 rows."""
    if place is None:
        return values
    if place.columns:
        restored = np.empty_like(values)
        restored[:, place.columns.source_index(values.shape[1])] = values
        values = restored
    if place.values == "add_one":
        return values - np.float32(1)
    return np.log(-values.astype(np.float64)).astype(np.float32) if place.values == "negative_exp" else values


def _negative_exp(values: np.ndarray) -> np.ndarray:
    """-exp(values) correctly rounded to fp32: computed in fp64, whose error is far below an fp32 ulp, rounded once.

    fp32 exponentials are not: numpy's misses 2 values in 5 by an ulp, torch's 1 in 100, which ones depends on the CPU.
    """
    with np.errstate(over="ignore"):  # beyond 88.7 the result is -inf in fp32, as it is for torch
        return (-np.exp(values.astype(np.float64))).astype(np.float32)


def runs(step: Step, unit: Unit, weight_rows: int) -> Iterator[Run]:
    """Where each part of an encoded unit goes in its output tensor."""
    swap = step.place.rows if step.place else None
    if swap is None:
        for index, part in enumerate(step.parts):
            count = unit.rows // part.rows
            yield Run(index, slice(0, count), (step.row + unit.start) // part.rows, count)
        return
    assert all(part.rows == 1 for part in step.parts)
    target_of = np.argsort(swap.source_index(weight_rows))[unit.start : unit.start + unit.rows]
    order = np.argsort(target_of)
    targets = target_of[order]
    breaks = np.flatnonzero(np.diff(targets) != 1) + 1
    for piece in np.split(np.arange(unit.rows), breaks):
        for index in range(len(step.parts)):
            yield Run(index, order[piece], step.row + int(targets[piece[0]]), len(piece))
