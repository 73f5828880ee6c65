"""What must be known of weights before they are encoded: one reading of them in slabs, on a few threads.

Which weights hold a NaN or an infinity decides files, headers and skip lists, which stand long before a conversion
meets such a weight: leave to keep it unquantized costs a reading of its own. So does a storage that needs to know a
whole weight, or all that is fused with it, before the first of its slabs, where that does not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

from ornith_moe.quant.builds.plan import Step
from ornith_moe.quant.conversion.groups import Measures, measured
from ornith_moe.quant.conversion.pool import in_order
from ornith_moe.quant.conversion.stream import Unit, read_unit, unit_bytes, units
from ornith_moe.quant.conversion.workers import PlacedBuild, Workers
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.source import Source

R = TypeVar("R")


def non_finite_weights(source: Source, workers: Workers) -> dict[int, str]:
    """{index into source.weights: where its first NaN or infinity is}, in the order of `source.weights`.

    `workers.progress` is called with phase "scan" and bytes.
    """
    found: dict[int, tuple[int, str]] = {}
    work = units(source, workers.slab_bytes)
    for unit, place in _read(source, work, "scan", workers, lambda unit, slab: slab.first_non_finite()):
        if place:
            row, column, value = unit.start + place[0], place[1], place[2]
            sentence = f"row {row}, column {column} is {value}"
            found[unit.weight] = min(found.get(unit.weight, (row, sentence)), (row, sentence))
    return {index: found[index][1] for index in sorted(found)}


def give_what_is_needed(
    source: Source, placed: Sequence[PlacedBuild], workers: Workers, weights: Collection[int]
) -> None:
    """Measure these weights, and give each storage of them what all of its group say together.

    `workers.progress` is called with phase "measure" and bytes.
    """
    if not weights:
        return
    steps: dict[int, list[tuple[PlacedBuild, Step]]] = {}
    for build in placed:
        for step in build.plan.steps:
            if step.weight in weights:
                steps.setdefault(step.weight, []).append((build, step))
    found = Measures()

    def measure(unit: Unit, slab: Slab) -> list[Any]:
        return [measured(source, step, unit, slab) for _, step in steps[unit.weight]]

    work = [unit for unit in units(source, workers.slab_bytes) if unit.weight in steps]
    for unit, measures in _read(source, work, "measure", workers, measure):
        for (build, step), one in zip(steps[unit.weight], measures, strict=True):
            found.add(build, step, one)
    for build in placed:
        build.plan.steps = [found.given(build, step) for step in build.plan.steps]


def _read(
    source: Source, work: Sequence[Unit], phase: str, workers: Workers, look: Callable[[Unit, Slab], R]
) -> Iterator[tuple[Unit, R]]:
    """(unit, what `look` sees in its slab) of all units, in order."""
    done, total = 0, sum(unit_bytes(source, unit) for unit in work)
    for unit, seen in in_order(lambda unit: look(unit, read_unit(source, unit)), work, workers.jobs):
        done += unit_bytes(source, unit)
        workers.progress(phase, done, total)
        yield unit, seen
