"""What a conversion decides before the first byte: threads and slabs, plans and places of builds, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ornith_moe.quant.builds.build import Options, find_build
from ornith_moe.quant.conversion.stream import SLAB_ROWS
from ornith_moe.quant.conversion.workers import PlacedBuild
from ornith_moe.quant.errors import CheckpointError, ConversionError, PlanError
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.source import Source, weight_matrix

LIBRARIES_BYTES = 700 << 20  # interpreter, torch, numba: what a conversion holds besides slabs
STEP_BYTES = 2 << 10  # names, plan and journal of one weight in one build
MIN_SLAB_BYTES = 1 << 20
MAX_SLAB_BYTES = 4 << 20  # larger ones leave the cache, and their memory goes back to the system each time
COPIES_OF_A_SLAB = 10  # raw, fp32, transformed, and encoded for several builds, by this job and those that wait
COPIES_OF_A_GROUP = 6  # raw, and encoded for several builds by this job and by those that wait to be written


def place_all(
    source: Source, staging: Path, builds: Sequence[str], options: Options
) -> tuple[dict[str, PlacedBuild], dict[str, str]]:
    """Plan and lay out every build: ({build: its place}, {build: why it cannot be made}).

    Raises:
        CheckpointError, PlanError: none of them can be made.
    """
    placed: dict[str, PlacedBuild] = {}
    failed: dict[str, Exception] = {}
    for name in builds:
        try:
            placed[name] = place(source, staging, name, options)
        except (CheckpointError, PlanError) as reason:
            failed[name] = reason
    if failed and not placed:
        raise next(iter(failed.values()))
    return placed, {name: str(reason) for name, reason in failed.items()}


def place(source: Source, staging: Path, name: str, options: Options) -> PlacedBuild:
    """Plan and lay out one build.

    Raises:
        CheckpointError, PlanError: why it cannot be made.
    """
    build = find_build(name)
    plan = build.plan(source, options)
    layout = build.lay_out(source, plan, options)
    plan.notes += layout.notes
    sides = build.side_files(source, plan, layout)
    return PlacedBuild(plan, layout, sides, staging / name.replace(":", "-"), build.path(staging.parent, layout))


def numbered(placed: Sequence[PlacedBuild]) -> list[PlacedBuild]:
    """Builds with their files counted on from one another's."""
    result, files = [], 0
    for build in placed:
        result.append(replace(build, first_file=files))
        files += len(build.layout.files)
    return result


def slabs(source: Source, builds: int, max_memory: int, jobs: int | None) -> tuple[int, int]:
    """Threads, and source bytes per unit, that stay within `max_memory`."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    columns = [weight_matrix(weight)[1] * ITEM_BYTES[source.dtype(i)] for i, weight in enumerate(source.weights)]
    smallest = max(MIN_SLAB_BYTES, SLAB_ROWS * max(columns))
    fixed = fixed_bytes(source, builds)
    room = (max_memory - fixed) // (smallest * COPIES_OF_A_SLAB)
    if room < (jobs or 1):
        least = (fixed + smallest * COPIES_OF_A_SLAB * (jobs or 1)) / 2**30
        raise PlanError(
            f"max_memory: {jobs or 1} jobs need at least {least:.2f} GiB for this checkpoint, got "
            f"{max_memory / 2**30:.2f} GiB"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or min(cores, room)
    return jobs, min((max_memory - fixed) // (jobs * COPIES_OF_A_SLAB), MAX_SLAB_BYTES)


def group_bytes(source: Source, builds: int, max_memory: int, jobs: int) -> int:
    """The most bytes of source that may be read together, where a storage must know the weights of a group."""
    return max(max_memory - fixed_bytes(source, builds), 0) // (jobs * COPIES_OF_A_GROUP)


def fixed_bytes(source: Source, builds: int) -> int:
    """What a conversion holds besides slabs."""
    return LIBRARIES_BYTES + STEP_BYTES * len(source.weights) * builds + source.held_bytes


def check_space(out: Path, staging: Path, placed: Sequence[PlacedBuild]) -> None:
    needed = sum(file.size for build in placed for file in build.layout.files)
    present = sum(f.stat().st_blocks * 512 for f in staging.rglob("*") if f.is_file()) if staging.exists() else 0
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(parent).free + present
    if needed > free:
        raise ConversionError(
            f"{out}: the builds take {needed} bytes and {free} are free; free {needed - free} more or leave out a build"
        )
