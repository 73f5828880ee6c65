"""What must be known of weights before they are encoded: one reading of them in slabs, on a few threads.

Which weights hold a NaN or an infinity decides files, headers and skip lists, which stand long before a conversion
meets such a weight: leave to keep it unquantized costs a reading of its own. So does a storage that needs to know a
whole weight, or all that is fused with it, before the first of its slabs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ornith_moe.quant.builds.plan import Step
from ornith_moe.quant.conversion.pipeline import PlacedBuild, Workers, unit_bytes
from ornith_moe.quant.conversion.pool import in_order
from ornith_moe.quant.conversion.stream import Unit, read_unit, units
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.source import Source, weight_matrix

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


def give_what_is_needed(source: Source, placed: Sequence[PlacedBuild], workers: Workers) -> None:
    """Measure the weights whose storages need it, and give each storage what all weights of its group say together.

    `workers.progress` is called with phase "measure" and bytes.
    """
    steps: dict[int, list[tuple[PlacedBuild, Step]]] = {}
    for build in placed:
        for step in build.plan.steps:
            if step.storage.needs:
                steps.setdefault(step.weight, []).append((build, step))
    if not steps:
        return
    found: dict[tuple[str, str], Any] = {}

    def measure(unit: Unit, slab: Slab) -> list[tuple[tuple[str, str], Step, Any]]:
        return [
            (_group(build, step), step, step.storage.measure(step.transform.forward(_taken(source, step, unit, slab))))
            for build, step in steps[unit.weight]
        ]

    work = [unit for unit in units(source, workers.slab_bytes) if unit.weight in steps]
    for _, measures in _read(source, work, "measure", workers, measure):
        for group, step, measured in measures:
            found[group] = step.storage.merge(found[group], measured) if group in found else measured
    for build in placed:
        build.plan.steps = [
            replace(step, storage=step.storage.given(found[_group(build, step)])) if step.storage.needs else step
            for step in build.plan.steps
        ]


def _taken(source: Source, step: Step, unit: Unit, slab: Slab) -> Slab:
    return step.transform.taken(slab, unit.start, weight_matrix(source.weights[unit.weight])[0])


def _group(build: PlacedBuild, step: Step) -> tuple[str, str]:
    return build.plan.name, step.group or f"weight {step.weight}"


def _read(
    source: Source, work: Sequence[Unit], phase: str, workers: Workers, look: Callable[[Unit, Slab], R]
) -> Iterator[tuple[Unit, R]]:
    """(unit, what `look` sees in its slab) of all units, in order."""
    done, total = 0, sum(unit_bytes(source, unit) for unit in work)
    for unit, seen in in_order(lambda unit: look(unit, read_unit(source, unit)), work, workers.jobs):
        done += unit_bytes(source, unit)
        workers.progress(phase, done, total)
        yield unit, seen
