"""The stream: slabs of rows on their way from a source into the files of its builds, and back for verification.

    unit = rows [start, start + rows) of one weight      read once, encoded for every build
    extent = a run of bytes of an output file             what one unit leaves in one place

A unit holds whole groups of rows of every storage (multiples of 128, the height of an FP8 block), so the bytes of a
weight do not depend on how it is cut. Reordered heads scatter a unit over several extents; everything else is one
extent per part. Nothing here needs a whole weight in memory, however large the tensor that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ornith_moe.quant.builds.plan import Step
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.source import Source, weight_matrix

SLAB_ROWS = 128  # the least group of rows that a unit is cut in


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


def group_rows(steps: Iterable[Step]) -> int:
    """What the rows of a unit must be a multiple of for all of these steps."""
    return math.lcm(SLAB_ROWS, *{part.rows for step in steps for part in step.parts if part.rows})


def units(source: Source, slab_bytes: int, group: int = SLAB_ROWS) -> list[Unit]:
    """The work of a conversion in the order of its builds, at most about `slab_bytes` of source each.

    Args:
        group: rows of a unit are a multiple of it, but for the last of a weight.
    """
    work: list[Unit] = []
    for index in _in_order(source):
        rows, columns = weight_matrix(source.weights[index])
        row_bytes = max(columns * ITEM_BYTES[source.dtype(index)], 1)
        slab = max(slab_bytes // row_bytes // group, 1) * group
        work.extend(Unit(index, start, min(slab, rows - start)) for start in range(0, rows, slab))
    return work


def _in_order(source: Source) -> list[int]:
    """Weights by layers as these lie on disk, and in a layer as an architecture lists them.

    That is how builds list them, so files grow from front to back. Checkpoints sort the experts of a layer by their
    digits, or hold all gates and ups before all downs: a layer is read in some other order, a few MB at a time.
    """
    blocks = [index if weight.layer is None else f"layer {weight.layer}" for index, weight in enumerate(source.weights)]
    first: dict[int | str, tuple[Any, ...]] = {}
    for index, block in enumerate(blocks):
        position = source.position(index)
        first[block] = min(first.get(block, position), position)
    return sorted(range(len(blocks)), key=lambda index: (first[blocks[index]], index))


def read_unit(source: Source, unit: Unit) -> Slab:
    return source.read(unit.weight, unit.start, unit.rows)


def unit_bytes(source: Source, unit: Unit) -> int:
    """Bytes of a unit in the source; of codes, without their scales."""
    codes, values = source.codes(unit.weight), unit.rows * weight_matrix(source.weights[unit.weight])[1]
    return values * codes.bits // 8 if codes else values * ITEM_BYTES[source.dtype(unit.weight)]


def runs(step: Step, unit: Unit, weight_rows: int) -> Iterator[Run]:
    """Where each part of an encoded unit goes in its output tensor: of the rows that the step's transform takes."""
    targets = step.transform.targets(unit.start, unit.rows, weight_rows)
    if targets is None:
        for index, part in enumerate(step.parts):
            count = part.rows_of(unit.rows)
            first = (step.row + unit.start) // part.rows if part.rows else step.row // weight_rows
            yield Run(index, slice(0, count), first, count)
        return
    assert all(part.rows == 1 for part in step.parts)
    targets = targets[targets >= 0]
    order = np.argsort(targets)
    targets = targets[order]
    breaks = np.flatnonzero(np.diff(targets) != 1) + 1
    for piece in np.split(np.arange(len(targets)), breaks):
        for index in range(len(step.parts) if len(piece) else 0):
            yield Run(index, order[piece], step.row + int(targets[piece[0]]), len(piece))
