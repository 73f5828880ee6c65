"""The pass of a conversion: reserve the files, write every unit in its place, read every byte back.

Files exist at their final size before the first weight is read, so units may be written in any order by any number of
threads. Each unit is read once, encoded for every build, written, and journalled with a digest per extent. The check
then reads each file once from front to back: extents must be what was encoded and must cover all that weights own; what
a power cut has lost is encoded again.

A build that cannot store a weight fails and costs the others nothing: the pass goes on without writing to it. It is
still encoded, so that all weights of the kind are known at the end, unless the weight was no number: then leave to keep
such weights is all that it needs.
"""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import xxhash

from ornith_moe.quant.builds.layout import Layout
from ornith_moe.quant.builds.plan import BuildPlan, Step
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.builds.underflow import lost_weights
from ornith_moe.quant.conversion.journal import Extent, Failure, Journal, Lost
from ornith_moe.quant.conversion.pool import in_order
from ornith_moe.quant.conversion.stream import Unit, read_unit, runs
from ornith_moe.quant.errors import ConversionError, PlanError, UnstorableError
from ornith_moe.quant.files import open_output, own_folder
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.source import Source, weight_matrix

SPARE_DESCRIPTORS = 64  # what a process has open besides the builds: libraries, source shards, journal
# phase, bytes done, bytes in all; ("compile", 0, 0) and "check" come from any thread, "check" one call at a time
Progress = Callable[[str, int, int], None]
Encoders = Mapping[str, Callable[[Storage, Slab], tuple[np.ndarray, ...]]]  # instead of a storage's own, by its name


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody follows."""


@dataclass(frozen=True)
class Workers:
    """How a conversion works, which decides no byte: threads, bytes of source in a slab, encoders, who follows."""

    jobs: int = 1
    slab_bytes: int = 1 << 20
    encoders: Encoders = field(default_factory=dict)
    progress: Progress = silent


@dataclass(frozen=True)
class PlacedBuild:
    """A planned build with its place: staging folder, final path, first of its files in the list of all files."""

    plan: BuildPlan
    layout: Layout
    sides: Mapping[str, bytes]  # what lies beside its tensors
    staging: Path
    final: Path
    first_file: int = 0


@dataclass
class Written:
    """What a unit left: extents in files, weights that became zero, and builds that cannot hold it."""

    extents: list[Extent]
    lost: list[Lost]
    failures: list[Failure]


@contextmanager
def reserved(placed: Sequence[PlacedBuild], *, fresh: bool) -> Iterator[list[int]]:
    """File descriptors of all output files, at their final size with header and constants written."""
    _allow_descriptors(sum(len(build.layout.files) for build in placed) + SPARE_DESCRIPTORS)
    descriptors: list[int] = []
    try:
        for build in placed:
            own_folder(build.staging)
            for file in build.layout.files:
                descriptor = open_output(build.staging / file.name)
                descriptors.append(descriptor)
                if fresh or os.fstat(descriptor).st_size != file.size:
                    os.ftruncate(descriptor, 0)
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(descriptor, 0, file.size)  # a full disk fails here, not hours later
                    os.ftruncate(descriptor, file.size)
                os.pwrite(descriptor, file.header, 0)
            for tensor, (number, offset) in zip(build.plan.tensors, build.layout.places, strict=True):
                if tensor.constant:
                    payload = np.array(tensor.constant, "<f4").tobytes()
                    os.pwrite(descriptors[build.first_file + number], payload, offset)
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _allow_descriptors(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise PlanError(
            f"the builds have {needed - SPARE_DESCRIPTORS} files and this process may open {hard}; "
            "raise 'ulimit -n' or pass a larger --max-shard-size"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextmanager
def one_thread_each(placed: Sequence[PlacedBuild], encoders: Encoders) -> Iterator[None]:
    """torch on one thread per worker: the workers are the parallelism, and pools of their own would fight for cores.

    Not imported for builds that do without it: that takes longer than a small conversion.
    """
    if not encoders and not any(step.storage.uses_torch for build in placed for step in build.plan.steps):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Pass:
    """One pass over the source: units are encoded by a few threads, each extent goes straight to its place."""

    def __init__(
        self,
        source: Source,
        placed: Sequence[PlacedBuild],
        work: Sequence[Unit],
        files: Sequence[int],
        journal: Journal,
        workers: Workers,
    ):
        self.source, self.placed, self.work, self.files = source, placed, work, files
        self.journal, self.workers = journal, workers
        self.bytes_read = 0
        self.kept = frozenset().union(*(build.plan.kept for build in placed))  # by the user's leave
        self.steps: list[list[tuple[PlacedBuild, Step]]] = [[] for _ in source.weights]
        for build in placed:
            for step in build.plan.steps:
                self.steps[step.weight].append((build, step))
        sizes = [file.size for build in placed for file in build.layout.files]
        journal.forget_all_beyond(len(work), sizes)
        self.failed = {failure.build for failure in journal.failures}
        self.given_up = {failure.build for failure in journal.failures if failure.final}

    @property
    def alive(self) -> list[PlacedBuild]:
        """The builds that nothing has failed."""
        return [build for build in self.placed if build.plan.name not in self.failed]

    def write(self) -> None:
        """Write every unit that the journal does not know."""
        from ornith_moe.quant.simd.compiled import compiling  # not at import: planning needs no numba

        with compiling(lambda function: self.workers.progress("compile", 0, 0)):
            self._write()

    def _write(self) -> None:
        sizes = [unit_bytes(self.source, unit) for unit in self.work]
        done, total = sum(sizes[index] for index in self.journal.extents), sum(sizes)
        missing = [index for index in range(len(self.work)) if index not in self.journal.extents]
        for index, written in in_order(self._convert, missing, self.workers.jobs):
            for failure in written.failures:
                self.journal.record_failure(failure)
                self.failed.add(failure.build)
                self.given_up |= {failure.build} if failure.final else set()
            if len(self.given_up) == len(self.placed):
                return
            self.journal.record(index, written.extents, written.lost)
            done += sizes[index]
            self.bytes_read += sizes[index]
            self.workers.progress("convert", done, total)

    def lost(self, build: PlacedBuild) -> dict[str, int]:
        """{tensor: weights that are below the range of its scales and became zero or noise} of a build."""
        counts = dict.fromkeys((tensor.name for tensor in build.plan.tensors), 0)
        for unit in self.journal.extents:
            for number, tensor, count in self.journal.lost.get(unit, ()):
                if self.placed[number] is build:
                    counts[build.plan.tensors[tensor].name] += count
        return {name: count for name, count in counts.items() if count}

    def check(self) -> list[str]:
        """Read every file back, compare with the digests, mend what a power cut lost; returns sha256 of each file."""
        digests, damaged = self._read_back()
        if damaged:
            for index in damaged:
                del self.journal.extents[index]
            self.write()
            digests, damaged = self._read_back()
        if damaged:
            weight = self.source.weights[self.work[min(damaged)].weight]
            raise ConversionError(f"{weight.name}: the disk does not give back what was written to it; check the disk")
        return digests

    def _read_back(self) -> tuple[list[str], set[int]]:
        """sha256 of each file, and the units whose bytes are not there or not what was encoded."""
        live = [build.first_file + i for build in self.alive for i in range(len(build.layout.files))]
        for file in live:
            os.fsync(self.files[file])
        extents: list[list[tuple[int, int, str, int]]] = [[] for _ in self.files]
        for unit, written in self.journal.extents.items():
            for file, offset, length, digest in written:
                extents[file].append((offset, length, digest, unit))
        sizes = [file.size for build in self.placed for file in build.layout.files]
        owned = self._owned_bytes()
        digests, damaged, done, lock = [""] * len(self.files), set(), 0, Lock()

        def tell(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                self.workers.progress("check", done, sum(sizes[file] for file in live))

        def read(index: int) -> tuple[str, set[int], int]:
            return _digest_file(self.files[index], sorted(extents[index]), sizes[index], tell)

        for index, (digest, bad, covered) in in_order(read, live, self.workers.jobs):
            if covered != owned[index] and not bad:
                raise ConversionError(
                    f"the journal covers {covered} bytes of file {index} and its weights own {owned[index]}; it is "
                    "damaged, so run the command again with --restart"
                )
            digests[index] = digest
            damaged |= bad
        return digests, damaged

    def _owned_bytes(self) -> list[int]:
        """Bytes of each file that weights own: all but header, alignment and constants."""
        owned = [0] * len(self.files)
        for build in self.placed:
            for tensor, (file, _) in zip(build.plan.tensors, build.layout.places, strict=True):
                owned[build.first_file + file] += 0 if tensor.constant else tensor.nbytes
        return owned

    def _convert(self, index: int) -> Written:
        unit = self.work[index]
        weight = self.source.weights[unit.weight]
        slab = read_unit(self.source, unit)
        written = Written([], [], [])
        bad = None if unit.weight in self.kept else _non_finite(weight, unit, slab)
        rows = weight_matrix(weight)[0]
        for build, step in self.steps[unit.weight]:
            name = build.plan.name
            if name in self.given_up:
                continue
            if bad:
                written.failures.append(Failure(name, unit.weight, bad, final=True))
                continue
            taken = step.transform.taken(slab, unit.start, rows)
            try:
                changed = step.transform.forward(taken)
                encoded = self._encode(step, changed)
            except UnstorableError as error:
                reason = f"{weight.name}, from row {unit.start}: {error}"
                written.failures.append(Failure(name, unit.weight, reason, final=False))
                continue
            if name not in self.failed:
                written.extents += self._write_out(build, step, unit, encoded)
                if lost := lost_weights(step.storage, changed, encoded):
                    written.lost.append((self.placed.index(build), step.tensors[0], lost))
        return written

    def _encode(self, step: Step, slab: Slab) -> tuple[np.ndarray, ...]:
        encoded = self.workers.encoders.get(step.storage.name, type(step.storage).encode)(step.storage, slab)
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

    def _write_out(self, build: PlacedBuild, step: Step, unit: Unit, encoded: tuple[np.ndarray, ...]) -> list[Extent]:
        extents = []
        for run in runs(step, unit, weight_matrix(self.source.weights[unit.weight])[0]):
            part = step.parts[run.part]
            if part.rows is None and unit.start:
                continue  # of the whole weight, written with its first rows
            payload = np.ascontiguousarray(encoded[run.part][run.rows])
            file, offset = build.layout.places[step.tensors[run.part]]
            file, offset = build.first_file + file, offset + run.target * part.row_bytes
            view = payload.data.cast("B")
            assert len(view) == run.count * part.row_bytes
            _write_all(self.files[file], view, offset)
            extents.append((file, offset, len(view), xxhash.xxh3_128_hexdigest(view)))
        return extents


def unit_bytes(source: Source, unit: Unit) -> int:
    """Bytes of a unit in the source; of codes, without their scales."""
    item_bytes = 1 if source.codes(unit.weight) else ITEM_BYTES[source.dtype(unit.weight)]
    return unit.rows * weight_matrix(source.weights[unit.weight])[1] * item_bytes


def _non_finite(weight: Weight, unit: Unit, slab: Slab) -> str | None:
    found = slab.first_non_finite()
    if not found:
        return None
    row, column, value = found
    return (
        f"{weight.name}: row {unit.start + row}, column {column} is {value}; expected finite weights, "
        "so mend the checkpoint first, or keep its tensor unquantized with --non-finite keep-bf16"
    )


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _digest_file(descriptor: int, extents: list, size: int, tell: Callable[[int], None]) -> tuple[str, set[int], int]:
    """sha256 of a file, units whose bytes are not what was written, and bytes that extents cover; one reading.

    `tell` hears of the bytes read as they come: a file may be hundreds of gigabytes.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)  # ask the disk, not the page cache
    sha256, damaged, position, covered = hashlib.sha256(), set(), 0, 0
    for offset, length, digest, unit in [*extents, (size, 0, "", -1)]:
        if offset < position:  # two units claim a byte: the journal lies of one of them
            damaged.add(unit)
            continue
        sha256.update(os.pread(descriptor, offset - position, position))
        payload = os.pread(descriptor, length, offset)
        sha256.update(payload)
        if unit >= 0 and xxhash.xxh3_128_hexdigest(payload) != digest:
            damaged.add(unit)
        tell(offset + length - position)
        position, covered = offset + length, covered + length
    return sha256.hexdigest(), damaged, covered
