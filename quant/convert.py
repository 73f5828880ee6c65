"""Convert a checkpoint into any number of builds in one pass over it.

    plan -> check -> reserve -> stream -> read back -> rename

Every build is planned and laid out from headers; disk space is checked and the files reserved at their final size in
`OUT/.ornith-partial/`; each slab of the source is read once, encoded for every build and written in place; then every
byte is read back and compared with the digest taken when it was encoded. Only then do the files get their final names,
so what carries a final name is complete. A run that dies leaves its partial folder; `resume` goes on after the last
journalled slab and gives the same bytes as an undisturbed run, whatever the slab size or the number of jobs.

Memory is bounded by slabs, not by tensors: jobs * slab_bytes * about 8, on top of the interpreter and its libraries.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from gguf import GGUFValueType

from ornith_moe.quant.build_plan import BuildPlan
from ornith_moe.quant.builds import plan_build
from ornith_moe.quant.checkpoint import ITEM_BYTES
from ornith_moe.quant.errors import ConversionError, PlanError
from ornith_moe.quant.files import own_folder
from ornith_moe.quant.gguf_codecs import ENCODERS
from ornith_moe.quant.gguf_header import Entry
from ornith_moe.quant.gguf_metadata import gguf_metadata
from ornith_moe.quant.gguf_tokenizer import tokenizer_entries
from ornith_moe.quant.gguf_types import FILE_TYPES
from ornith_moe.quant.imatrix import Coverage, Imatrix
from ornith_moe.quant.journal import JOURNAL, Journal
from ornith_moe.quant.layout import DEFAULT_MAX_SHARD_BYTES, gguf_layout, safetensors_layout
from ornith_moe.quant.pipeline import Encoders, Pass, PlacedBuild, Progress, one_thread_each, reserved
from ornith_moe.quant.publish import final_paths, finish, publish, side_files
from ornith_moe.quant.recipe import Recipe
from ornith_moe.quant.scan import non_finite_weights
from ornith_moe.quant.source import Source, weight_matrix
from ornith_moe.quant.storage import FP8_BLOCK, Gguf
from ornith_moe.quant.stream import units
from ornith_moe.quant.tokenizer_files import read_tokenizer

ENCODING = 2  # raised when a storage gives other bytes, so that two versions never share a conversion
PARTIAL = ".ornith-partial"
NON_FINITE = ("error", "keep-bf16")
_VALUE_TYPES = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32}
LIBRARIES_BYTES = 700 << 20  # interpreter, torch, numba: what a conversion holds besides slabs
STEP_BYTES = 2 << 10  # names, plan and journal of one weight in one build
MIN_SLAB_BYTES, MAX_SLAB_BYTES = 1 << 20, 32 << 20
COPIES_OF_A_SLAB = 8  # raw, fp32, transformed, and encoded for several builds


@dataclass(frozen=True)
class BuildReport:
    build: str
    path: Path
    tensors: int
    tensor_bytes: int
    files: int
    seconds: float  # of the whole pass: builds are made side by side
    fallbacks: tuple[str, ...]
    notes: tuple[str, ...]
    coverage: tuple[Coverage, ...]  # by the importance matrix


@dataclass(frozen=True)
class ConversionReport:
    builds: tuple[BuildReport, ...]
    bytes_read: int
    peak_rss_bytes: int
    resumed_units: int


def convert(
    source: Source,
    out: str | Path,
    builds: Sequence[str],
    *,
    jobs: int | None = None,
    max_memory: int = 2 << 30,
    resume: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    tokenizer_pre: str | None = None,
    recipe: Recipe | None = None,
    imatrix: Imatrix | None = None,
    non_finite: str = "error",
    encoders: Encoders | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write `builds` of `source` into the folder `out`.

    Args:
        source: an opened checkpoint, `open_source(folder)`.
        out: folder for the builds, made if needed: `fp8-channel/`, `fp8-block/`, `bf16/`, `<name>-<TYPE>.gguf`.
        builds: names as in `plan_build`.
        jobs: threads; default all cores that max_memory has room for.
        max_memory: bytes the process may hold. max_shard_bytes: largest payload of a shard.
        resume: go on with an unfinished conversion of the same source, builds and options.
        tokenizer_pre: llama.cpp's name of the pre-tokenizer, for a GGUF whose tokenizer is not recognized.
        recipe: types of a GGUF's tensors beyond its file type. imatrix: importance of their columns.
        non_finite: "error" stops at a NaN or an infinity; "keep-bf16" reads the checkpoint once before and keeps the
            tensors that hold one unquantized, with what is fused with them.
        encoders: `ornith_moe.gpu_encoders.gpu_encoders(device)`; the bytes are those of the CPU.
        progress: called with phase ("scan", "convert", "check"), bytes done and bytes in all; with ("compile", 0, 0)
            whenever machine code of a codec is made, which costs seconds once on a machine.
    Returns:
        ConversionReport.
    Raises:
        CheckpointError, PlanError: before anything is written.
        ConversionError: on the way; what was written stays in the partial folder.
    Numerics: a weight's bytes depend on nothing but the weight and the build.
    """
    out = Path(out)
    staging = out / PARTIAL
    if source.checkpoint is None:
        raise PlanError(f"{source.name}: is a config without weights; a conversion needs the checkpoint folder")
    if len(set(builds)) != len(builds) or not builds:
        raise PlanError(f"builds: expected each build once and at least one, got {', '.join(builds) or 'none'}")
    if non_finite not in NON_FINITE:
        raise ValueError(f"non_finite: expected one of {', '.join(NON_FINITE)}, got {non_finite!r}")
    jobs, slab_bytes = _slabs(source, len(builds), max_memory, jobs)

    def planned(kept: dict[int, str]) -> list[BuildPlan]:
        return [plan_build(source, name, recipe=recipe, imatrix=imatrix, kept=kept) for name in builds]

    plans = planned({})
    for plan in plans:
        _check_encoders(plan)
    _check_out(source, out, staging, resume)
    if non_finite == "keep-bf16":
        plans = planned(non_finite_weights(source, slab_bytes=slab_bytes, jobs=jobs, progress=progress))
    placed = _place(source, out, staging, plans, max_shard_bytes, tokenizer_pre)
    _check_space(out, staging, placed)
    if not resume:
        _check_names(placed)
    sides = [side_files(source, build) for build in placed]

    began = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
        own_folder(staging)
        with Journal(staging, _identity(source, placed, sides, imatrix), slab_bytes, resume=resume) as journal:
            resumed, bytes_read = len(journal.extents), 0
            if not journal.checked:
                _check_names(placed)
                with reserved(placed, fresh=not resumed) as files, one_thread_each(placed, encoders):
                    work = units(source, journal.slab_bytes)
                    run = Pass(source, placed, work, files, journal, jobs, progress, encoders)
                    run.write()
                    digests = run.check()
                    bytes_read = run.bytes_read
                if source.checkpoint.changed():
                    raise ConversionError(
                        f"{source.folder}: changed while it was converted; delete {staging} and convert again"
                    )
                for build, files in zip(placed, sides, strict=True):
                    finish(source, build, files, digests)
                journal.record_checked()
            for build in placed:
                publish(build)
            _remove(staging)
    except OSError as error:
        raise ConversionError(_disk_sentence(error, out, staging)) from error
    seconds = round(time.monotonic() - began, 3)
    reports = tuple(
        BuildReport(
            b.plan.build,
            b.final,
            len(b.plan.tensors),
            b.plan.tensor_bytes,
            len(b.layout.files),
            seconds,
            tuple(b.plan.fallbacks),
            tuple(b.plan.all_notes),
            tuple(b.plan.coverage),
        )
        for b in placed
    )
    return ConversionReport(reports, bytes_read, peak_rss_bytes(), resumed)


def peak_rss_bytes() -> int:
    """Most memory this process has held. Not getrusage's figure on Linux: a child inherits its parent's there."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Before the first byte


def _slabs(source: Source, builds: int, max_memory: int, jobs: int | None) -> tuple[int, int]:
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
        raise PlanError(
            f"{plan.build}: {plan.needs_imatrix[0]} and {len(plan.needs_imatrix) - 1} more tensors get a type that is "
            "noise without an importance matrix; give one that covers them with --imatrix"
        )


def _check_out(source: Source, out: Path, staging: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise PlanError(f"{out}: expected a folder for the builds, found a file")
    if out.resolve() == source.folder.resolve():
        raise PlanError(f"{out}: is the source itself; choose another folder for the builds")
    begun = (staging / JOURNAL).is_file()
    if staging.exists() and not begun:
        raise PlanError(f"{staging}: is left of a conversion that wrote nothing; delete that folder")
    if resume and not begun:
        raise PlanError(f"{out}: --resume, but no unfinished conversion is here; leave the option out")
    if begun and not resume:
        raise PlanError(f"{staging}: an unfinished conversion is here; pass --resume to go on, or delete that folder")


def _place(
    source: Source, out: Path, staging: Path, plans: list[BuildPlan], max_shard_bytes: int, tokenizer_pre: str | None
) -> list[PlacedBuild]:
    """Lay out every build."""
    placed, files = [], 0
    tokenizer, told = _tokenizer(source, tokenizer_pre) if any(plan.is_gguf for plan in plans) else ([], ())
    for plan in plans:
        if plan.is_gguf:
            plan.notes += told
            final = out / f"{source.name}-{plan.file_type}.gguf"
            metadata = gguf_metadata(
                source.config,
                source.folder,
                name=source.name,
                file_type=FILE_TYPES[plan.file_type].id,
                mtp_layers=source.architecture.mtp_layers if source.has_mtp else 0,
                shapes={tensor.name: tensor.shape for tensor in plan.tensors},
                tokenizer=tokenizer,
            ) + [Entry(key, value, _VALUE_TYPES[type(value)]) for key, value in plan.metadata.items()]
            layout = gguf_layout(plan, final.name, metadata)
        else:
            final, layout = out / plan.build, safetensors_layout(plan, max_shard_bytes)
        placed.append(PlacedBuild(plan, layout, staging / plan.build.replace(":", "-"), final, files))
        files += len(layout.files)
    return placed


def _tokenizer(source: Source, pre: str | None) -> tuple[list[Entry], tuple[str, ...]]:
    """Keys of the tokenizer, the same for every GGUF, and what is to be said of it."""
    rows = source.architecture.vocabulary
    files = read_tokenizer(source.folder, rows)
    return tokenizer_entries(files, source.config, rows, pre=pre), files.notes


def _check_names(placed: list[PlacedBuild]) -> None:
    """Refuse to begin what would have to replace a file, a folder or a link at the end."""
    for build in placed:
        for _, final in final_paths(build):
            if os.path.lexists(final):
                raise PlanError(f"{final}: exists already; move it away or choose another folder")


def _check_space(out: Path, staging: Path, placed: list[PlacedBuild]) -> None:
    needed = sum(file.size for build in placed for file in build.layout.files)
    present = sum(f.stat().st_blocks * 512 for f in staging.rglob("*") if f.is_file()) if staging.exists() else 0
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(parent).free + present
    if needed > free:
        raise ConversionError(
            f"{out}: the builds take {needed} bytes and {free} are free; free {needed - free} more or leave out a build"
        )


def _identity(source: Source, placed: list[PlacedBuild], sides: list[dict[str, bytes]], imatrix: Imatrix | None) -> str:
    """A digest of all that determines the bytes of a conversion: source, importance, builds, headers, side files."""
    importance = [imatrix.digest] if imatrix else []
    digest = xxhash.xxh3_128(json.dumps([ENCODING, source.checkpoint.fingerprint, *importance]).encode())
    for build, files in zip(placed, sides, strict=True):
        digest.update(build.plan.build.encode())
        for payload in [*(file.header for file in build.layout.files), *files.values()]:
            digest.update(f"{len(payload)}\0".encode() + payload)
    return digest.hexdigest()


def _remove(staging: Path) -> None:
    """Remove the partial folder, the journal last: until then a run that dies here can be resumed."""
    for path in staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    shutil.rmtree(staging)


def _disk_sentence(error: OSError, out: Path, staging: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{out}: the disk is full; free space and pass --resume, what is written stays in {staging.name}"
    where = f"{error.filename or out}: {error.strerror or error}"
    return f"{where}; what is written stays in {staging.name}, --resume goes on" if staging.exists() else where
