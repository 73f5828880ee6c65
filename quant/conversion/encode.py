"""Units of a source as the bytes of their builds: read, measured where a storage must know its group, encoded, placed.

An `Encoder` knows the source and the builds and nothing of files, so that it may be on another machine (cluster.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import xxhash

from ornith_moe.quant.builds.plan import Step
from ornith_moe.quant.builds.underflow import lost_weights
from ornith_moe.quant.conversion.groups import Measures, measured
from ornith_moe.quant.conversion.journal import Failure, Lost
from ornith_moe.quant.conversion.stream import Unit, read_unit, runs
from ornith_moe.quant.conversion.workers import Encoders, PlacedBuild
from ornith_moe.quant.conversion.writer import Piece
from ornith_moe.quant.errors import UnstorableError
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.source import Source, weight_matrix


@dataclass
class Encoded:
    """What became of a unit: bytes for files, weights that became zero, and builds that cannot hold it."""

    pieces: list[Piece] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Encoder:
    """`work` of `source` for the builds of `placed`; weights of `groups` are read together.

    A build that is in `failed` is encoded and not written, one in `given_up` neither.
    """

    def __init__(
        self,
        source: Source,
        placed: Sequence[PlacedBuild],
        work: Sequence[Unit],
        groups: Sequence[Collection[int]],
        encoders: Encoders,
    ):
        self.source, self.placed, self.work, self.encoders = source, placed, work, encoders
        self.groups = {weight: number for number, group in enumerate(groups) for weight in group}
        self.kept = frozenset().union(*(build.plan.kept for build in placed))  # by the user's leave
        self.steps: list[list[tuple[PlacedBuild, Step]]] = [[] for _ in source.weights]
        for build in placed:
            for step in build.plan.steps:
                self.steps[step.weight].append((build, step))
        self.failed: set[str] = set()
        self.given_up: set[str] = set()

    def batches(self) -> list[list[int]]:
        """Units by their numbers, in order; those of a group are together, where its first is."""
        batches: list[list[int]] = []
        found: dict[int, list[int]] = {}
        for index, unit in enumerate(self.work):
            group = self.groups.get(unit.weight)
            if group is None:
                batches.append([index])
            elif group in found:
                found[group].append(index)
            else:
                batches.append(found.setdefault(group, [index]))
        return batches

    def encode(self, batch: list[int]) -> list[Encoded]:
        """What becomes of the units of a batch."""
        units = [self.work[index] for index in batch]
        slabs = [read_unit(self.source, unit) for unit in units]
        found = Measures()
        for unit, slab in zip(units, slabs, strict=True):
            if unit.weight in self.groups:
                for build, step in self.steps[unit.weight]:
                    found.add(build, step, measured(self.source, step, unit, copy(slab)))
        return [  # copies: a slab keeps what was made of it, and all of a group are here at once
            self._unit(unit, copy(slab), [(build, found.given(build, step)) for build, step in self.steps[unit.weight]])
            for unit, slab in zip(units, slabs, strict=True)
        ]

    def _unit(self, unit: Unit, slab: Slab, steps: list[tuple[PlacedBuild, Step]]) -> Encoded:
        weight = self.source.weights[unit.weight]
        result = Encoded()
        bad = None if unit.weight in self.kept else _non_finite(weight, unit, slab)
        rows = weight_matrix(weight)[0]
        for build, step in steps:
            name = build.plan.name
            if name in self.given_up:
                continue
            if bad:
                result.failures.append(Failure(name, unit.weight, bad, final=True))
                continue
            taken = step.transform.taken(slab, unit.start, rows)
            try:
                changed = step.transform.forward(taken)
                encoded = self._encode(step, changed)
            except UnstorableError as error:
                reason = f"{weight.name}, from row {unit.start}: {error}"
                result.failures.append(Failure(name, unit.weight, reason, final=False))
                continue
            if name not in self.failed:
                result.pieces += self._pieces(build, step, unit, encoded)
                if lost := lost_weights(step.storage, changed, encoded):
                    result.lost.append((self.placed.index(build), step.tensors[0], lost))
        return result

    def _encode(self, step: Step, slab: Slab) -> tuple[np.ndarray, ...]:
        encoded = self.encoders.get(step.storage.name, type(step.storage).encode)(step.storage, slab)
        stored = step.storage.float_type
        changed = not step.transform.exact
        rounded = changed or not step.storage.exact(slab.dtype)
        if stored and rounded and step.weight not in self.kept:
            found = Slab(encoded[0], stored).first_non_finite()
            if found:
                row, column, _ = found
                value = "what becomes of it here" if changed else f"{slab.float32[row, column]:.4g}"
                raise UnstorableError(f"row {row}, column {column}: {value} is beyond {stored}")
        return encoded

    def _pieces(self, build: PlacedBuild, step: Step, unit: Unit, encoded: tuple[np.ndarray, ...]) -> Iterator[Piece]:
        for run in runs(step, unit, weight_matrix(self.source.weights[unit.weight])[0]):
            part = step.parts[run.part]
            if part.rows is None and unit.start:
                continue  # of the whole weight, written with its first rows
            file, offset = build.layout.places[step.tensors[run.part]]
            view = np.ascontiguousarray(encoded[run.part][run.rows]).data.cast("B")
            assert len(view) == run.count * part.row_bytes
            place = build.first_file + file, offset + run.target * part.row_bytes
            yield Piece(build.plan.name, *place, len(view), xxhash.xxh3_128_hexdigest(view), view)


def _non_finite(weight: Weight, unit: Unit, slab: Slab) -> str | None:
    found = slab.first_non_finite()
    if not found:
        return None
    row, column, value = found
    return (
        f"{weight.name}: row {unit.start + row}, column {column} is {value}; expected finite weights, "
        "so mend the checkpoint first, or keep its tensor unquantized with --non-finite keep-bf16"
    )
