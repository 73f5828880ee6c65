"""How far a build is from its source: its tensors against the plan, and every weight against its floor."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ornith_moe.quant.builds.build import find_build
from ornith_moe.quant.builds.plan import BuildPlan, Step
from ornith_moe.quant.builds.stored import SLAB_BYTES, FoundTensor, StoredBuild
from ornith_moe.quant.conversion.stream import Unit, group_rows, read_unit, units
from ornith_moe.quant.errors import OrnithError
from ornith_moe.quant.source.accounts import bare, some
from ornith_moe.quant.source.source import Source, weight_matrix
from ornith_moe.quant.verification.accounts import account
from ornith_moe.quant.verification.decoded import read_parts
from ornith_moe.quant.verification.measure import Error, unit_error
from ornith_moe.quant.verification.result import Progress, Verification


def compare(stored: StoredBuild, source: Source, result: Verification, progress: Progress) -> None:
    """Hold every tensor and every weight of a build against its source; `result.build` is what it claims to be."""
    found = stored.tensors
    try:
        plan = find_build(result.build).as_stored(source, stored)
    except OrnithError as refusal:
        result.problem(str(refusal))
        return
    for note in plan.notes:
        result.note(note)
    result.left_out, lost = account(source, plan)
    if lost:
        result.problem(f"{some('tensor', lost)}, of the source and nowhere in the build, for no reason known")
    if not _compare_tables(plan, found, result):
        return
    numbers: dict[int, list[int]] = {}  # of the steps of each weight
    for number, step in enumerate(plan.steps):
        numbers.setdefault(step.weight, []).append(number)
    cut = units(source, SLAB_BYTES, group_rows(plan.steps))
    work = [(unit, number) for unit in cut for number in numbers.get(unit.weight, ())]
    errors = [Error() for _ in plan.steps]
    with ThreadPoolExecutor() as pool:
        measured = pool.map(lambda one: _unit_error(source, plan, plan.steps[one[1]], one[0], found), work)
        for done, ((_, number), found_error) in enumerate(zip(work, measured, strict=True), 1):
            errors[number].add(found_error)
            progress("compare", done, len(work))
    _judge(source, plan, errors, result)


def _judge(source: Source, plan: BuildPlan, errors: list[Error], result: Verification) -> None:
    """Each weight against its floor, and the error of each role; `errors` are those of the plan's steps."""
    roles: dict[str, Error] = {}
    for step, error in zip(plan.steps, errors, strict=True):
        weight = source.weights[step.weight]
        roles.setdefault(weight.role, Error()).add(error)
        exact = step.transform.exact and step.storage.exact(source.dtype(step.weight))
        floor = math.inf if exact else step.storage.floor_db
        if error.judged_db is not None and not error.judged_db >= floor:
            result.problem(
                f"{weight.name}: SQNR {error.judged_db:.1f} dB as {step.storage.name}, below the floor of {floor} dB"
            )
    for role, error in roles.items():
        sqnr = error.sqnr_db
        result.roles[role] = {
            "sqnr_db": None if sqnr is None or math.isinf(sqnr) else round(sqnr, 3),
            "max_abs_error": error.largest,
            "exact": sqnr is None,
        }


def _compare_tables(plan: BuildPlan, found: dict[str, FoundTensor], result: Verification) -> bool:
    planned = {tensor.name: tensor for tensor in plan.tensors}
    for name in sorted(planned.keys() - found.keys()):
        result.problem(f"tensor {bare(name)} is missing from the build")
    for name in sorted(found.keys() - planned.keys()):
        result.problem(f"tensor {bare(name)} belongs to no weight of the source")
    for name in planned.keys() & found.keys():
        want, got = planned[name], found[name]
        if (want.dtype, tuple(want.shape), want.nbytes) != (got.dtype, got.shape, got.nbytes):
            result.problem(
                f"tensor {bare(name)}: expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
            )
        elif want.constant and not np.array_equal(got.read(0, got.nbytes).view("<f4"), np.array(want.constant, "<f4")):
            result.problem(f"tensor {bare(name)}: its values are not the constants the architecture asks for")
    return result.ok


def _unit_error(source: Source, plan: BuildPlan, step: Step, unit: Unit, found: dict[str, FoundTensor]) -> Error:
    rows = weight_matrix(source.weights[unit.weight])[0]
    slab = step.transform.taken(read_unit(source, unit), unit.start, rows)
    return unit_error(step, slab, read_parts(plan, step, unit, rows, found))
