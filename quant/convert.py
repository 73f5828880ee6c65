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
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from ornith_moe.quant.architectures.weight import Weight
from ornith_moe.quant.builds import BuildPlan, Step, plan_build
from ornith_moe.quant.checkpoint import ITEM_BYTES, inside
from ornith_moe.quant.errors import ConversionError, OrnithError, PlanError
from ornith_moe.quant.gguf_codecs import ENCODERS
from ornith_moe.quant.gguf_metadata import gguf_metadata
from ornith_moe.quant.gguf_types import FILE_TYPES
from ornith_moe.quant.journal import Extent, Journal
from ornith_moe.quant.layout import DEFAULT_MAX_SHARD_BYTES, Layout, gguf_layout, safetensors_index, safetensors_layout
from ornith_moe.quant.source import Source, weight_matrix
from ornith_moe.quant.storage import FP8_BLOCK, Gguf, Slab
from ornith_moe.quant.stream import Unit, read_unit, runs, transform, units

ENCODING = 1  # raised when a storage gives other bytes, so that two versions never share a conversion
PARTIAL = ".ornith-partial"
MANIFEST = "ornith_manifest.json"
LIBRARIES_BYTES = 700 << 20  # interpreter, torch, numba: what a conversion holds besides slabs
STEP_BYTES = 2 << 10  # names, plan and journal of one weight in one build
MIN_SLAB_BYTES, MAX_SLAB_BYTES = 1 << 20, 32 << 20
COPIES_OF_A_SLAB = 8  # raw, fp32, transformed, and encoded for several builds
SIDE_FILES = (  # what a served model needs besides weights and config
    "*token*.json", "vocab.json", "merges.txt", "*.model", "generation_config.json", "chat_template.*",
    "*processor_config.json", "LICENSE*",
)  # fmt: skip
MAX_SIDE_FILE_BYTES = 64 << 20

Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in all


@dataclass(frozen=True)
class BuildReport:
    build: str
    path: Path
    tensors: int
    tensor_bytes: int
    files: int
    seconds: float  # of the whole pass: builds are made side by side


@dataclass(frozen=True)
class ConversionReport:
    builds: tuple[BuildReport, ...]
    bytes_read: int
    peak_rss_bytes: int
    resumed_units: int


@dataclass(frozen=True)
class _Build:
    """A planned build with its place: staging folder, final path, first of its files in the list of all files."""

    plan: BuildPlan
    layout: Layout
    staging: Path
    final: Path
    first_file: int


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
    progress: Progress | None = None,
) -> ConversionReport:
    """Write `builds` of `source` into the folder `out`.

    Args:
        source: an opened checkpoint, `open_source(folder)`.
        out: folder for the builds, made if needed: `fp8-channel/`, `fp8-block/`, `bf16/`, `<name>-<TYPE>.gguf`.
        builds: names as in `plan_build`.
        jobs: threads, default all cores. max_memory: bytes the process may hold. max_shard_bytes: size of a shard.
        resume: go on with an unfinished conversion of the same source, builds and options.
        tokenizer_pre: llama.cpp's name of the pre-tokenizer, for a GGUF whose tokenizer is not recognized.
        progress: called with phase ("convert", "check"), bytes done and bytes in all.
    Returns:
        ConversionReport.
    Raises:
        CheckpointError, PlanError: before anything is written.
        ConversionError: on the way; what was written stays in the partial folder.
    Numerics: a weight's bytes depend on nothing but the weight and the build.
    """
    out = Path(out)
    if source.checkpoint is None:
        raise PlanError(f"{source.name}: is a config without weights; a conversion needs the checkpoint folder")
    if len(set(builds)) != len(builds) or not builds:
        raise PlanError(f"builds: expected each build once and at least one, got {', '.join(builds) or 'none'}")
    jobs = jobs or os.cpu_count() or 1
    slab_bytes = _slab_bytes(source, len(builds), max_memory, jobs)
    plans = [plan_build(source, name) for name in builds]
    for plan in plans:
        _check_encoders(plan)
    staging = out / PARTIAL
    _check_out(source, out, staging, resume)
    placed = _place(source, out, staging, plans, max_shard_bytes, tokenizer_pre, resume)

    began = time.monotonic()
    try:
        staging.mkdir(parents=True, exist_ok=True)
        headers = [xxhash.xxh3_128_hexdigest(file.header) for build in placed for file in build.layout.files]
        identity = [ENCODING, source.checkpoint.fingerprint, list(builds), headers]
        with Journal(staging, _digest_json(identity), slab_bytes, resume=resume) as journal:
            resumed, bytes_read = len(journal.extents), 0
            if not journal.checked:
                with _reserved(placed, fresh=not resumed) as files, _one_thread_each():
                    work = units(source, journal.slab_bytes)
                    run = _Run(source, placed, work, files, journal, jobs, progress)
                    run.write()
                    digests = run.check()
                    bytes_read = run.bytes_read
                if source.checkpoint.changed():
                    raise ConversionError(
                        f"{source.folder}: changed while it was converted; delete {staging} and convert again"
                    )
                for build in placed:
                    _finish(source, build, digests)
                journal.record_checked()
            for build in placed:
                _publish(build)
            shutil.rmtree(staging)
    except OSError as error:
        raise ConversionError(_disk_sentence(error, out, staging)) from error
    seconds = round(time.monotonic() - began, 3)
    reports = tuple(
        BuildReport(b.plan.build, b.final, len(b.plan.tensors), b.plan.tensor_bytes, len(b.layout.files), seconds)
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


def _slab_bytes(source: Source, builds: int, max_memory: int, jobs: int) -> int:
    """Source bytes per unit that keep `jobs` threads within `max_memory`; PlanError if even the smallest do not."""
    matrices = zip(source.weights, range(len(source.weights)), strict=True)
    widest = max(weight_matrix(weight)[1] * ITEM_BYTES[source.dtype(index)] for weight, index in matrices)
    smallest = max(MIN_SLAB_BYTES, FP8_BLOCK * widest)
    fixed = LIBRARIES_BYTES + STEP_BYTES * len(source.weights) * builds
    slab = (max_memory - fixed) // (jobs * COPIES_OF_A_SLAB)
    if slab < smallest:
        least = (fixed + smallest * COPIES_OF_A_SLAB * jobs) / 2**30
        raise PlanError(f"max_memory: {jobs} jobs need at least {least:.2f} GiB, got {max_memory / 2**30:.2f} GiB")
    return min(slab, MAX_SLAB_BYTES)


def _check_encoders(plan: BuildPlan) -> None:
    lacking = sorted({s.storage.name for s in plan.steps if isinstance(s.storage, Gguf)} - ENCODERS.keys())
    if lacking:
        raise PlanError(
            f"{plan.build}: needs {', '.join(lacking)}, which this version can plan but not encode yet; "
            f"it encodes {', '.join(ENCODERS)}"
        )


def _check_out(source: Source, out: Path, staging: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise PlanError(f"{out}: expected a folder for the builds, found a file")
    if out.resolve() == source.folder.resolve():
        raise PlanError(f"{out}: is the source itself; choose another folder for the builds")
    if resume and not (staging / "journal").is_file():
        raise PlanError(f"{out}: --resume, but no unfinished conversion is here; leave the option out")
    if staging.exists() and not resume:
        raise PlanError(f"{staging}: an unfinished conversion is here; pass --resume to go on, or delete that folder")


def _place(
    source: Source,
    out: Path,
    staging: Path,
    plans: list[BuildPlan],
    max_shard_bytes: int,
    tokenizer_pre: str | None,
    resume: bool,
) -> list[_Build]:
    """Lay out every build, and refuse what would overwrite a file or not fit on the disk."""
    placed, files = [], 0
    for plan in plans:
        if plan.is_gguf:
            final = out / f"{source.name}-{plan.file_type}.gguf"
            layout = gguf_layout(
                plan, final.name, source.architecture.gguf_architecture, _metadata(source, plan, tokenizer_pre)
            )
        else:
            final, layout = out / plan.build, safetensors_layout(plan, max_shard_bytes)
        staged = staging / plan.build.replace(":", "-")
        published = resume and not (staged / final.name if plan.is_gguf else staged).exists()
        if final.exists() and not published:
            raise PlanError(f"{final}: exists already; move it away or choose another folder")
        placed.append(_Build(plan, layout, staged, final, files))
        files += len(layout.files)
    needed = sum(file.size for build in placed for file in build.layout.files)
    present = sum(f.stat().st_blocks * 512 for f in staging.rglob("*") if f.is_file()) if staging.exists() else 0
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(parent).free + present
    if needed > free:
        raise ConversionError(
            f"{out}: the builds take {needed} bytes and {free} are free; free {needed - free} more or leave out a build"
        )
    return placed


def _metadata(source: Source, plan: BuildPlan, pre: str | None):
    mtp_layers = source.architecture.mtp_layers if source.has_mtp else 0
    file_type = FILE_TYPES[plan.file_type].id
    return gguf_metadata(
        source.config, source.folder, name=source.name, file_type=file_type, mtp_layers=mtp_layers, pre=pre
    )


@contextmanager
def _reserved(placed: list[_Build], *, fresh: bool):
    """File descriptors of all output files, at their final size with the header written."""
    descriptors: list[int] = []
    try:
        for build in placed:
            build.staging.mkdir(exist_ok=True)
            for file in build.layout.files:
                path = build.staging / file.name
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                descriptors.append(descriptor)
                if fresh or os.fstat(descriptor).st_size != file.size:
                    os.ftruncate(descriptor, 0)
                    os.posix_fallocate(descriptor, 0, file.size)  # a full disk fails here, not hours later
                os.pwrite(descriptor, file.header, 0)
            for tensor, (file, offset) in zip(build.plan.tensors, build.layout.places, strict=True):
                if tensor.constant:
                    payload = np.array(tensor.constant, "<f4").tobytes()
                    os.pwrite(descriptors[build.first_file + file], payload, offset)
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


# The pass


@contextmanager
def _one_thread_each():
    """torch on one thread per worker: the workers are the parallelism, and pools of their own would fight for cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """One pass over the source: units are encoded by a few threads, each extent goes straight to its place."""

    def __init__(self, source, placed, work, files, journal, jobs, progress):
        self.source: Source = source
        self.placed: list[_Build] = placed
        self.work: list[Unit] = work
        self.files: list[int] = files
        self.journal: Journal = journal
        self.jobs: int = jobs
        self.progress: Progress = progress or (lambda phase, done, total: None)
        self.bytes_read = 0
        self.steps: list[list[tuple[_Build, Step]]] = [[] for _ in source.weights]
        for build in placed:
            for step in build.plan.steps:
                self.steps[step.weight].append((build, step))

    def write(self) -> None:
        """Write every unit that the journal does not know."""
        done = sum(self._size(self.work[index]) for index in self.journal.extents)
        total = sum(map(self._size, self.work))
        for index, extents in self._map(
            self._convert, [i for i in range(len(self.work)) if i not in self.journal.extents]
        ):
            self.journal.record(index, extents)
            done += self._size(self.work[index])
            self.bytes_read += self._size(self.work[index])
            self.progress("convert", done, total)

    def check(self) -> list[str]:
        """Read every file back, compare with the digests, mend what a power cut lost; returns sha256 of each file."""
        for descriptor in self.files:
            os.fsync(descriptor)
        digests, damaged = self._read_back()
        if damaged:
            for index in damaged:
                del self.journal.extents[index]
            self.write()
            for descriptor in self.files:
                os.fsync(descriptor)
            digests, damaged = self._read_back()
        if damaged:
            weight = self.source.weights[self.work[min(damaged)].weight]
            raise ConversionError(f"{weight.name}: the disk does not give back what was written to it; check the disk")
        return digests

    def _read_back(self) -> tuple[list[str], set[int]]:
        extents: list[list[tuple[int, int, str, int]]] = [[] for _ in self.files]
        for unit, written in self.journal.extents.items():
            for file, offset, length, digest in written:
                extents[file].append((offset, length, digest, unit))
        sizes = [file.size for build in self.placed for file in build.layout.files]
        starts = [len(file.header) for build in self.placed for file in build.layout.files]
        digests, damaged, done = [""] * len(self.files), set(), 0
        jobs = [(descriptor, sorted(extents[i])) for i, descriptor in enumerate(self.files)]
        for index, (digest, bad, covered) in self._map(lambda i: _digest_file(*jobs[i], sizes[i]), range(len(jobs))):
            digests[index] = digest
            damaged |= bad
            expected = sizes[index] - starts[index] - self._padding(index)
            assert covered == expected, f"file {index}: extents cover {covered} bytes of {expected}"
            done += sizes[index]
            self.progress("check", done, sum(sizes))
        return digests, damaged

    def _padding(self, file: int) -> int:
        """Bytes of a file's payload that no unit writes: alignment, and tensors that are constants."""
        build = next(b for b in reversed(self.placed) if b.first_file <= file)
        tensors = zip(build.plan.tensors, build.layout.places, strict=True)
        written = sum(t.nbytes for t, (f, _) in tensors if f == file - build.first_file and not t.constant)
        own = build.layout.files[file - build.first_file]
        return own.size - len(own.header) - written

    def _convert(self, index: int) -> list[Extent]:
        unit = self.work[index]
        weight = self.source.weights[unit.weight]
        slab = read_unit(self.source, unit)
        _refuse_non_finite(weight, unit, slab)
        extents = []
        for build, step in self.steps[unit.weight]:
            try:
                encoded = step.storage.encode(transform(step.place, slab))
            except OrnithError as error:
                raise ConversionError(
                    f"{weight.name}, from row {unit.start}: {error} (build {build.plan.build})"
                ) from None
            for run in runs(step, unit, weight_matrix(weight)[0]):
                payload = np.ascontiguousarray(encoded[run.part][run.rows])
                file, offset = build.layout.places[step.tensors[run.part]]
                file, offset = build.first_file + file, offset + run.target * step.parts[run.part].row_bytes
                view = memoryview(payload).cast("B")
                assert len(view) == run.count * step.parts[run.part].row_bytes
                _write_all(self.files[file], view, offset)
                extents.append((file, offset, len(view), xxhash.xxh3_128_hexdigest(view)))
        return extents

    def _size(self, unit: Unit) -> int:
        return (
            unit.rows * weight_matrix(self.source.weights[unit.weight])[1] * ITEM_BYTES[self.source.dtype(unit.weight)]
        )

    def _map(self, function, indices):
        """(index, function(index)) for all indices, a few at a time; the first failure stops the rest."""
        with ThreadPoolExecutor(self.jobs) as pool:
            pending: deque[tuple[int, Future]] = deque()
            try:
                for index in indices:
                    pending.append((index, pool.submit(function, index)))
                    if len(pending) >= 2 * self.jobs:
                        done, future = pending.popleft()
                        yield done, future.result()
                while pending:
                    done, future = pending.popleft()
                    yield done, future.result()
            finally:
                for _, future in pending:
                    future.cancel()


def _refuse_non_finite(weight: Weight, unit: Unit, slab: Slab) -> None:
    found = slab.first_non_finite()
    if found:
        row, column, value = found
        raise ConversionError(
            f"{weight.name}: row {unit.start + row}, column {column} is {value}; expected finite weights, "
            "so mend the checkpoint first"
        )


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _digest_file(descriptor: int, extents: list, size: int) -> tuple[str, set[int], int]:
    """sha256 of a file, units whose bytes are not what was written, and bytes that extents cover; one reading."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)  # ask the disk, not the page cache
    sha256, damaged, position, covered = hashlib.sha256(), set(), 0, 0
    for offset, length, digest, unit in [*extents, (size, 0, "", -1)]:
        assert offset >= position, f"extents overlap at byte {offset}"
        sha256.update(os.pread(descriptor, offset - position, position))
        payload = os.pread(descriptor, length, offset)
        sha256.update(payload)
        if unit >= 0 and xxhash.xxh3_128_hexdigest(payload) != digest:
            damaged.add(unit)
        position, covered = offset + length, covered + length
    return sha256.hexdigest(), damaged, covered


# After the last byte


def _finish(source: Source, build: _Build, digests: list[str]) -> None:
    """Side files and the manifest of a build, still in its staging folder."""
    files = {
        file.name: {"bytes": file.size, "sha256": digests[build.first_file + i]}
        for i, file in enumerate(build.layout.files)
    }
    if not build.plan.is_gguf:
        sides = _side_files(source, build)
        for name, payload in sides.items():
            _write_file(build.staging / name, payload)
            files[name] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    manifest = {
        "build": build.plan.build,
        "source": source.name,
        "mtp": source.has_mtp,
        "tensors": len(build.plan.tensors),
        "tensor_bytes": build.plan.tensor_bytes,
        "files": files,
    }
    _write_file(build.staging / MANIFEST, _json_bytes(manifest))
    _sync_folder(build.staging)


def _side_files(source: Source, build: _Build) -> dict[str, bytes]:
    """config.json with the build's quantization, the index of its shards, and the source's tokenizer files."""
    sides = {}
    for path in sorted(source.folder.iterdir()):
        wanted = any(path.match(pattern) for pattern in SIDE_FILES)
        if wanted and path.is_file() and path.stat().st_size <= MAX_SIDE_FILE_BYTES:
            sides[path.name] = inside(source.folder, path.name).read_bytes()
    config = json.loads(json.dumps(source.config))
    text = config.get("text_config", config)
    if build.plan.config:
        config["quantization_config"] = build.plan.config
    elif build.plan.build == "bf16":
        config["dtype"] = text["dtype"] = "bfloat16"
    if not source.has_mtp and any(name.startswith("mtp.") for name in source.checkpoint.tensors):
        text["mtp_num_hidden_layers"] = 0  # dropped on request: do not announce it
    sides["config.json"] = _json_bytes(config)
    index = safetensors_index(build.plan, build.layout)
    if index:
        sides["model.safetensors.index.json"] = _json_bytes(index)
    return sides


def _publish(build: _Build) -> None:
    """Give a checked build its final name in one rename, unless a run that died has done so."""
    moves = [(build.staging, build.final)]
    if build.plan.is_gguf:  # the manifest first: without the file it promises nothing
        manifest = build.final.with_name(build.final.name + ".manifest.json")
        moves = [(build.staging / MANIFEST, manifest), (build.staging / build.final.name, build.final)]
    for staged, final in moves:
        if staged.exists():
            os.rename(staged, final)
    _sync_folder(build.final.parent)


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _digest_json(value: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _write_file(path: Path, payload: bytes) -> None:
    with open(path, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_sentence(error: OSError, out: Path, staging: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{out}: the disk is full; free space and pass --resume, what is written stays in {staging.name}"
    return (
        f"{error.filename or out}: {error.strerror or error}; what is written stays in {staging.name}, --resume goes on"
    )
