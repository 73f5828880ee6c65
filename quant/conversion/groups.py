"""Weights that a storage must know together before it encodes any of them: gate and up of an expert, q k v.

    found = Measures();  found.add(build, step, measured(slab)) for every slab of the group;  found.given(build, step)

Groups that fit in memory are read once, and encoded from there; the weights of others are read once more before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ornith_moe.quant.builds.plan import Step
from ornith_moe.quant.conversion.stream import Unit
from ornith_moe.quant.conversion.workers import PlacedBuild
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.source import Source, weight_matrix

Key = tuple[str, str]


class Measures:
    """What slabs say of the groups that they belong to."""

    def __init__(self) -> None:
        self._found: dict[Key, Any] = {}

    def add(self, build: PlacedBuild, step: Step, measure: Any) -> None:
        """Take in what a slab says; None of one whose storage needs nothing."""
        if step.storage.needs:
            key = _key(build, step)
            self._found[key] = step.storage.merge(self._found[key], measure) if key in self._found else measure

    def given(self, build: PlacedBuild, step: Step) -> Step:
        """The step with a storage that knows what its group says, if that was taken in here."""
        key = _key(build, step)
        return replace(step, storage=step.storage.given(self._found[key])) if key in self._found else step


def measured(source: Source, step: Step, unit: Unit, slab: Slab) -> Any:
    """What a slab says to the storage of a step; None if it needs nothing."""
    if not step.storage.needs:
        return None
    taken = step.transform.taken(slab, unit.start, weight_matrix(source.weights[unit.weight])[0])
    return step.storage.measure(step.transform.forward(taken))


def find_groups(source: Source, placed: Sequence[PlacedBuild], most_bytes: int) -> tuple[list[set[int]], set[int]]:
    """Weights by groups of at most `most_bytes` of source, and the weights of larger ones.

    What two builds group in different ways is one group to a reader.
    """
    groups: dict[int, set[int]] = {}  # by weight
    keys: dict[Key, int] = {}  # to a weight of the group
    for build in placed:
        for step in build.plan.steps:
            if step.storage.needs:
                mine = groups.setdefault(step.weight, {step.weight})
                other = groups[keys.setdefault(_key(build, step), step.weight)]
                if other is not mine:
                    mine |= other
                    groups.update(dict.fromkeys(other, mine))
    distinct = {id(group): group for group in groups.values()}.values()
    small = [group for group in distinct if sum(held_bytes(source, index) for index in group) <= most_bytes]
    return small, groups.keys() - set().union(*small)


def held_bytes(source: Source, index: int) -> int:
    """Of a weight as its slabs hold it, decoded."""
    rows, columns = weight_matrix(source.weights[index])
    return rows * columns * ITEM_BYTES[source.dtype(index)]


def _key(build: PlacedBuild, step: Step) -> Key:
    return build.plan.name, step.group or f"weight {step.weight}"
