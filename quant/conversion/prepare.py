"""What a conversion decides before the first byte: threads and slabs, plans and places of builds, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from gguf import GGUFValueType

from ornith_moe.quant.builds.layout import DEFAULT_MAX_SHARD_BYTES, gguf_layout, safetensors_layout
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.storage import FP8_BLOCK, Gguf
from ornith_moe.quant.codecs.gguf import ENCODERS
from ornith_moe.quant.conversion.pipeline import PlacedBuild
from ornith_moe.quant.conversion.publish import side_files
from ornith_moe.quant.errors import CheckpointError, ConversionError, PlanError
from ornith_moe.quant.gguf.header import Entry
from ornith_moe.quant.gguf.imatrix import Imatrix
from ornith_moe.quant.gguf.metadata import gguf_metadata
from ornith_moe.quant.gguf.mixtures import FILE_TYPES
from ornith_moe.quant.gguf.tensor_types import Recipe
from ornith_moe.quant.gguf.tokenizer import tokenizer_entries
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.tokenizer_files import read_tokenizer
from ornith_moe.quant.source.weights import Source, weight_matrix

TokenizerKeys = Callable[[], tuple[list[Entry], tuple[str, ...]]]
_VALUE_TYPES = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32}
LIBRARIES_BYTES = 700 << 20  # interpreter, torch, numba: what a conversion holds besides slabs
STEP_BYTES = 2 << 10  # names, plan and journal of one weight in one build
MIN_SLAB_BYTES, MAX_SLAB_BYTES = 1 << 20, 32 << 20
COPIES_OF_A_SLAB = 8  # raw, fp32, transformed, and encoded for several builds


@dataclass(frozen=True)
class Wishes:
    """Options of a conversion that decide bytes; see `convert`."""

    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    recipe: Recipe | None = None
    imatrix: Imatrix | None = None


def place_all(
    source: Source,
    staging: Path,
    builds: Sequence[str],
    wishes: Wishes,
    kept: Mapping[int, str],
    tokenizer: TokenizerKeys,
) -> tuple[dict[str, tuple[PlacedBuild, dict[str, bytes]]], dict[str, str]]:
    """Plan and lay out every build: ({build: (place, side files)}, {build: why it cannot be made}).

    Args:
        tokenizer: `tokenizer_keys` of the source, asked for if there is a GGUF.
    Raises:
        CheckpointError, PlanError: none of them can be made.
    """
    placed, failed, error = {}, {}, None
    for name in builds:
        try:
            plan = plan_build(source, name, recipe=wishes.recipe, imatrix=wishes.imatrix, kept=kept)
            _check_encoders(plan)
            build = _place(source, staging, plan, wishes, tokenizer)
            placed[name] = build, side_files(source, build)
        except (CheckpointError, PlanError) as reason:
            failed[name], error = str(reason), error or reason
    if not placed and error:
        raise error
    return placed, failed


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
    smallest = max(MIN_SLAB_BYTES, FP8_BLOCK * max(columns))
    fixed = LIBRARIES_BYTES + STEP_BYTES * len(source.weights) * builds
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


def _check_encoders(plan: BuildPlan) -> None:
    lacking = sorted({s.storage.name for s in plan.steps if isinstance(s.storage, Gguf)} - ENCODERS.keys())
    if lacking:
        raise PlanError(
            f"{plan.build}: needs {', '.join(lacking)}, which this version can plan but not encode yet; "
            f"it encodes {', '.join(ENCODERS)}"
        )
    if plan.needs_imatrix:
        raise PlanError(next(note for note in plan.notes if "noise without an importance matrix" in note))


def tokenizer_keys(source: Source, pre: str | None) -> TokenizerKeys:
    """Gives the keys of the tokenizer, the same for every GGUF, and what is to be said of it; read when first asked."""

    @cache
    def read() -> tuple[list[Entry], tuple[str, ...]]:
        rows = source.architecture.vocabulary
        files = read_tokenizer(source.folder, rows)
        return tokenizer_entries(files, source.config, rows, pre=pre), files.notes

    return read


def _place(
    source: Source,
    staging: Path,
    plan: BuildPlan,
    wishes: Wishes,
    tokenizer: TokenizerKeys,
) -> PlacedBuild:
    final = staging.parent / plan.build
    if plan.is_gguf:
        final = staging.parent / f"{source.name}-{plan.file_type}.gguf"
        entries, told = tokenizer()
        plan.notes += told
        metadata = gguf_metadata(
            source.config,
            source.folder,
            name=source.name,
            file_type=FILE_TYPES[plan.file_type].id,
            mtp_layers=source.architecture.mtp_layers if source.has_mtp else 0,
            shapes={tensor.name: tensor.shape for tensor in plan.tensors},
            tokenizer=entries,
        ) + [Entry(key, value, _VALUE_TYPES[type(value)]) for key, value in plan.metadata.items()]
        layout = gguf_layout(plan, final.name, metadata)
    else:
        layout = safetensors_layout(plan, wishes.max_shard_bytes)
    return PlacedBuild(plan, layout, staging / plan.build.replace(":", "-"), final, 0)


def check_space(out: Path, staging: Path, placed: list[PlacedBuild]) -> None:
    needed = sum(file.size for build in placed for file in build.layout.files)
    present = sum(f.stat().st_blocks * 512 for f in staging.rglob("*") if f.is_file()) if staging.exists() else 0
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(parent).free + present
    if needed > free:
        raise ConversionError(
            f"{out}: the builds take {needed} bytes and {free} are free; free {needed - free} more or leave out a build"
        )
