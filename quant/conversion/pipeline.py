"""The pass of a conversion: reserve the files, write every unit in its place, read every byte back.

Files exist at their final size before the first weight is read, so units may be written in any order. Each unit is
read once and encoded for every build, by a few threads; one writes, for two would wait for each other in the same file,
and journals a digest per extent. What is whole of a file is read back meanwhile (quant/conversion/readback.py): extents
must be what was encoded and must cover all that weights own; what a power cut has lost is encoded again.

A build that cannot store a weight fails and costs the others nothing: the pass goes on without writing to it. It is
still encoded, so that all weights of the kind are known at the end, unless the weight was no number: then leave to keep
such weights is all that it needs.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain

import numpy as np

from ornith_moe.quant.conversion.encode import Encoded, Encoder
from ornith_moe.quant.conversion.journal import Extent, Failure, Journal, Lost
from ornith_moe.quant.conversion.pool import in_order
from ornith_moe.quant.conversion.readback import ReadBack
from ornith_moe.quant.conversion.stream import Unit, unit_bytes
from ornith_moe.quant.conversion.workers import Encoders, PlacedBuild, Workers
from ornith_moe.quant.conversion.writer import Writer
from ornith_moe.quant.errors import ConversionError, PlanError
from ornith_moe.quant.files import MOST_OPEN, open_output, own_folder
from ornith_moe.quant.source.source import Source

SPARE_DESCRIPTORS = 64 + MOST_OPEN  # what a process has open besides the builds: libraries, journal, source shards


@contextmanager
def reserved(placed: Sequence[PlacedBuild], *, fresh: bool) -> Iterator[list[int]]:
    """File descriptors of all output files, at their final size with header and constants written."""
    files = sum(len(build.layout.files) for build in placed)
    _allow_descriptors(3 * files + SPARE_DESCRIPTORS)  # each is also written and read back past the page cache
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
            f"the builds need {needed} open files and this process may open {hard}; "
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
    """One pass over the source: units are read and encoded by a few threads, and written by this one in their order."""

    def __init__(
        self,
        source: Source,
        placed: Sequence[PlacedBuild],
        work: Sequence[Unit],
        files: Sequence[int],
        journal: Journal,
        workers: Workers,
        groups: Sequence[Collection[int]] = (),
    ):
        self.source, self.placed, self.work, self.files = source, placed, work, files
        self.journal, self.workers = journal, workers
        self.encoder = Encoder(source, placed, work, groups, workers.encoders)
        self.bytes_read = 0
        self.sizes = [file.size for build in placed for file in build.layout.files]
        journal.forget_all_beyond(len(work), self.sizes)
        self.failed, self.given_up = self.encoder.failed, self.encoder.given_up
        self.failed.update(failure.build for failure in journal.failures)
        self.given_up.update(failure.build for failure in journal.failures if failure.final)

    @property
    def alive(self) -> list[PlacedBuild]:
        """The builds that nothing has failed."""
        return [build for build in self.placed if build.plan.name not in self.failed]

    def run(self) -> list[str]:
        """Write every unit that the journal does not know, read all files back, mend what a power cut lost.

        Returns: sha256 of each file.
        """
        digests, damaged = self._write_and_read_back()
        if damaged:
            for index in damaged:
                self.journal.forget(index)
            digests, damaged = self._write_and_read_back()
        if damaged:
            weight = self.source.weights[self.work[min(damaged)].weight]
            raise ConversionError(f"{weight.name}: the disk does not give back what was written to it; check the disk")
        return digests

    def _write_and_read_back(self) -> tuple[list[str], set[int]]:
        """sha256 of each file, and the units whose bytes are not there or not what was encoded."""
        from ornith_moe.quant.simd.compiled import compiling  # not at import: planning needs no numba

        def tell(done: int, total: int) -> None:
            self.workers.progress("check", done, total)

        with ReadBack(self.files, self.sizes, self._owned(), self.workers.jobs, tell) as back:
            for index in self.journal.written:
                back.written(index, self.journal.extents(index))
            with compiling(lambda function: self.workers.progress("compile", 0, 0)):
                self._write(back)
            live = [build.first_file + i for build in self.alive for i in range(len(build.layout.files))]
            digests, damaged = back.finish(live)
        return [digests.get(file, "") for file in range(len(self.files))], damaged

    def _write(self, back: ReadBack) -> None:
        sizes = [unit_bytes(self.source, unit) for unit in self.work]
        done, total = sum(sizes[index] for index in self.journal.written), sum(sizes)
        batches = [batch for batch in self.encoder.batches() if not self.journal.written.keys() >= set(batch)]
        encoded: dict[int, tuple[list[Extent], list[Lost]]] = {}  # of units whose bytes have not all left

        def left(index: int) -> None:
            self.journal.record(index, *encoded[index])
            back.written(index, encoded.pop(index)[0])

        with self._results(batches) as results_of, Writer(self.files, self.sizes, self._owned(), left) as writer:
            for batch, results in results_of:
                self._take_failures(failure for result in results for failure in result.failures)
                if len(self.given_up) == len(self.placed):
                    return
                for index, result in zip(batch, results, strict=True):
                    self.bytes_read += sizes[index]
                    if index in self.journal.written:
                        continue  # of a batch that was written in part
                    pieces = [piece for piece in result.pieces if piece.build not in self.failed]
                    extents = [(piece.file, piece.offset, piece.length, piece.digest) for piece in pieces]
                    encoded[index] = extents, result.lost
                    writer.write(index, pieces if self.workers.executor == "local" else ())
                    done += sizes[index]
                self.workers.progress("convert", done, total)

    def _results(self, batches: list[list[int]]) -> closing[Generator[tuple[list[int], list[Encoded]]]]:
        """(batch, what became of its units) in order; with Ray their bytes are in the files already."""
        if self.workers.executor == "local":
            return closing(in_order(self.encoder.encode, batches, self.workers.jobs))
        from ornith_moe.quant.conversion.cluster import encode_with_ray

        paths = [build.staging / file.name for build in self.placed for file in build.layout.files]
        return closing(encode_with_ray(self.encoder, paths, batches))

    def _take_failures(self, failures: Iterable[Failure]) -> None:
        for failure in failures:
            self.journal.record_failure(failure)
            self.failed.add(failure.build)
            self.given_up.update({failure.build} if failure.final else ())

    def lost(self, build: PlacedBuild) -> dict[str, int]:
        """{tensor: weights that are below the range of its scales and became zero or noise} of a build."""
        counts = dict.fromkeys((tensor.name for tensor in build.plan.tensors), 0)
        for number, tensor, count in chain.from_iterable(self.journal.lost.values()):
            if self.placed[number] is build:
                counts[build.plan.tensors[tensor].name] += count
        return {name: count for name, count in counts.items() if count}

    def _owned(self) -> list[list[tuple[int, int]]]:
        """The bytes of each file that weights own, (first, end) in order: all but header, alignment and constants."""
        owned: list[list[tuple[int, int]]] = [[] for _ in self.files]
        for build in self.placed:
            for tensor, (file, offset) in zip(build.plan.tensors, build.layout.places, strict=True):
                if tensor.nbytes and not tensor.constant:
                    owned[build.first_file + file].append((offset, offset + tensor.nbytes))
        return [_joined(sorted(ranges)) for ranges in owned]


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in their order, those that touch as one: most tensors lie one behind another."""
    joined = ranges[:1]
    for first, end in ranges[1:]:
        if first == joined[-1][1]:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((first, end))
    return joined
