"""Convert a checkpoint into any number of builds in one pass over it.

    plan -> check -> reserve -> stream -> read back -> rename

Every build is planned and laid out from headers; disk space is checked and the files reserved at their final size in
`OUT/.ornith-partial/`; each slab of the source is read once, encoded for every build and written in place; then every
byte is read back and compared with the digest taken when it was encoded. Only then do the files get their final names,
so what carries a final name is complete. A run that dies leaves its partial folder; the same call goes on after the
last journalled slab and gives the same bytes as an undisturbed run, whatever the slab size or the number of jobs. A
build that cannot be made, by its plan or by its values, costs the others nothing.

Memory is bounded by slabs, not by tensors: jobs * slab_bytes * about 8, on top of the interpreter and its libraries.
"""

from __future__ import annotations

import errno
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.builds.build import AskedNvfp4, Options, find_build, refuse_unheard
from ornith_moe.quant.builds.underflow import underflow_notes
from ornith_moe.quant.conversion.groups import find_groups
from ornith_moe.quant.conversion.journal import Head, Journal
from ornith_moe.quant.conversion.pipeline import Pass, one_thread_each, reserved
from ornith_moe.quant.conversion.prepare import check_space, group_bytes, numbered, place_all, slabs
from ornith_moe.quant.conversion.publish import finish, publish, underflow
from ornith_moe.quant.conversion.remedies import why_failed
from ornith_moe.quant.conversion.resume import check_out, drop, goes_on, is_finished, made_from, refuse_taken, sample
from ornith_moe.quant.conversion.scan import give_what_is_needed, non_finite_weights
from ornith_moe.quant.conversion.stream import Unit, group_rows, unit_bytes, units
from ornith_moe.quant.conversion.workers import EXECUTORS, Encoders, PlacedBuild, Progress, Workers, silent
from ornith_moe.quant.errors import BuildsFailed, ConversionError, PlanError, brief
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.files import own_folder
from ornith_moe.quant.fitting.sensitivity import Sensitivity
from ornith_moe.quant.gguf.imatrix import Coverage, Imatrix
from ornith_moe.quant.gguf.splits import Split
from ornith_moe.quant.gguf.tensor_types import AskedTypes
from ornith_moe.quant.source.source import Source

PARTIAL = ".ornith-partial"
NON_FINITE = ("error", "keep-bf16")


@dataclass(frozen=True)
class BuildReport:
    build: str
    path: Path
    tensors: int
    tensor_bytes: int
    files: int
    seconds: float  # of the whole pass: builds are made side by side
    fallbacks: tuple[Fallback, ...]
    notes: tuple[str, ...]
    coverage: tuple[Coverage, ...]  # by the importance matrix
    warning: str = ""  # the first note, where a user must know it before all else
    underflow: Mapping[str, int] = field(default_factory=dict)  # {tensor: weights too small for its scales, and lost}
    was_finished: bool = False  # before this run, which left it as it is


@dataclass(frozen=True)
class ConversionReport:
    builds: tuple[BuildReport, ...]
    bytes_read: int
    peak_rss_bytes: int
    resumed_units: int
    failed: Mapping[str, str] = field(default_factory=dict)  # {build: why it cannot be made}


@budgeted
def convert(  # every option of the command line, by name: users need no object of ours to call it
    source: Source,
    out: str | Path,
    builds: Sequence[str],
    *,
    jobs: int | None = None,
    max_memory: int = 2 << 30,
    restart: bool = False,
    resume: bool = True,
    max_shard_bytes: int | None = None,
    split: Split | None = None,
    tokenizer_pre: str | None = None,
    asked: AskedTypes | None = None,
    imatrix: Imatrix | None = None,
    nvfp4: AskedNvfp4 | None = None,
    kv_cache: str = "bf16",
    sensitivity: Sensitivity | None = None,
    non_finite: str = "error",
    encoders: Encoders | None = None,
    executor: str = "local",
    progress: Progress | None = None,
) -> ConversionReport:
    """Write `builds` of `source` into the folder `out`.

    An unfinished conversion of the same source, builds and options goes on; builds that are finished stay as they are.

    Args:
        source: an opened checkpoint, `open_source(folder)`.
        out: folder for the builds, made if needed: `fp8-channel/`, `fp8-block/`, `bf16/`, `<name>-<TYPE>.gguf`.
        builds: names as in `plan_build`.
        jobs: threads; default all cores that max_memory has room for.
        max_memory: bytes the process may hold. max_shard_bytes: largest payload of a shard; default
            5 GB, and 5 GiB of MLX.
        split: where text GGUFs are cut into several files, of which `path` is the first.
        restart: drop what an unfinished conversion has left in `out`, and begin anew.
        resume: of earlier versions; going on goes without saying.
        tokenizer_pre: llama.cpp's name of the pre-tokenizer, for a GGUF whose tokenizer is not recognized.
        asked: types of a GGUF's tensors beyond its file type. imatrix: importance of their columns.
        nvfp4: what is asked of builds of NVFP4. kv_cache: "fp8" asks engines to keep keys and values so.
        sensitivity: what types do to tensors, `read_sensitivity(file)`, for builds that are fitted to a size.
        non_finite: "error" stops at a NaN or an infinity; "keep-bf16" reads the checkpoint once before and keeps the
            tensors that hold one unquantized, with what is fused with them.
        encoders: `ornith_moe.gpu_encoders.gpu_encoders(device)`; the bytes are those of the CPU.
        executor: "local", or "ray" for the machines of a Ray cluster that share the file system.
        progress: called with phase ("scan", "measure", "convert", "check"), bytes done and bytes in all; with
            ("compile", 0, 0) whenever machine code of a codec is made, which costs seconds once on a machine; of a
            source on the Hub with "fetch", bytes that have come and bytes that are read in all, and ("retry", n, 0).
    Returns:
        ConversionReport.
    Raises:
        CheckpointError, PlanError: before anything is written.
        BuildsFailed: some builds cannot be made; the others are finished, and its `report` tells of both.
        ConversionError: on the way; what was written stays in the partial folder.
    Numerics: a weight's bytes depend on nothing but the weight and the build.
    """
    out, names = Path(out), [find_build(build).name for build in builds]
    source.require("a conversion")
    if len(set(names)) != len(names) or not names:
        raise PlanError(f"builds: expected each build once and at least one, got {', '.join(builds) or 'none'}")
    if executor not in EXECUTORS:
        raise ValueError(f"executor: expected one of {', '.join(EXECUTORS)}, got {brief(executor)}")
    if non_finite not in NON_FINITE:
        raise ValueError(f"non_finite: expected one of {', '.join(NON_FINITE)}, got {brief(non_finite)}")
    jobs, slab_bytes = slabs(source, len(names), max_memory, jobs)
    together = group_bytes(source, len(names), max_memory, jobs)
    workers = Workers(jobs, slab_bytes, together, encoders or {}, progress or silent, executor)
    options = Options(
        asked, imatrix, max_shard_bytes, tokenizer_pre, nvfp4 or AskedNvfp4(), kv_cache, split, sensitivity
    )
    refuse_unheard(names, options)
    conversion = Conversion(source, out, names, options, workers)
    if non_finite == "keep-bf16":
        conversion.keep_non_finite()
    conversion.run(restart)
    return conversion.report()


class Conversion:
    """One command: the builds that are asked for, each with its place, and what has become of them.

    Raises:
        CheckpointError, PlanError: none of them can be made, or not in this folder.
    """

    def __init__(self, source: Source, out: Path, names: Sequence[str], options: Options, workers: Workers):
        self.source, self.out, self.staging, self.names = source, out, out / PARTIAL, names
        self.options, self.workers = options, workers
        self.placed, self.failed = place_all(source, self.staging, names, options)
        self.finished: set[str] = set()
        self.digests: dict[str, str] = {}
        self.bytes_read = self.resumed_units = 0
        self.began = time.monotonic()
        check_out(source, out, self.staging)

    def keep_non_finite(self) -> None:
        """Plan anew with the weights that hold a NaN or an infinity kept, if there are any."""
        self._follow(units(self.source, self.workers.slab_bytes))
        kept = non_finite_weights(self.source, self.workers)
        if kept:
            self.options = replace(self.options, kept=kept)
            self.placed, failed = place_all(self.source, self.staging, list(self.placed), self.options)
            self.failed |= failed

    def run(self, restart: bool = False) -> None:
        """Make what is not finished, going on where a run before has ended.

        Raises:
            PlanError: an unfinished conversion is another one, or a name is taken. ConversionError: on the way.
        """
        sampled = sample(self.source)
        self.digests = {name: made_from(sampled, place, self.options.imatrix) for name, place in self.placed.items()}
        self.finished = {n for n, place in self.placed.items() if is_finished(self.source, place, self.digests[n])}
        self.began = time.monotonic()
        with _told_of_the_disk(self.out, self.staging):
            self._go_on(restart)

    def _go_on(self, restart: bool) -> None:
        journal = Journal(self.staging) if self.staging.is_dir() else None
        if journal and restart:
            drop(self.staging, journal)
            journal = None
        head = journal.head if journal else None
        todo = [name for name in self.placed if name not in self.finished]
        if not todo:
            if journal and (head is None or head.builds.items() <= self.digests.items()):
                drop(self.staging, journal)  # left by a run that died at its very end
            return
        if head:
            todo = goes_on(head, self.source, self.digests, self.finished, self.staging)
        work = numbered([self.placed[name] for name in todo])
        if not (journal and journal.checked):
            refuse_taken(work)
            check_space(self.out, self.staging, work)
        self.out.mkdir(parents=True, exist_ok=True)
        own_folder(self.staging)
        with journal or Journal(self.staging) as journal:
            if head is None:
                digests = {name: self.digests[name] for name in todo}
                head = Head(self.source.fingerprint, digests, self.workers.slab_bytes)
                journal.begin(head)
            self.resumed_units = len(journal.written)
            if not journal.checked:
                self._make(work, journal, replace(self.workers, slab_bytes=head.slab_bytes))
            self.failed |= why_failed(self.source, [build.plan for build in work], journal.failures)
            for build in work:
                if build.plan.name not in self.failed:
                    publish(build)
            drop(self.staging, journal)

    def _make(self, work: Sequence[PlacedBuild], journal: Journal, workers: Workers) -> None:
        """Write every unit, read every byte back, and stage side files and manifests."""
        steps = [step for build in work for step in build.plan.steps]
        read = {step.weight for step in steps}  # of a vision tower alone, a thousandth of a checkpoint
        cut = [unit for unit in units(self.source, workers.slab_bytes, group_rows(steps)) if unit.weight in read]
        groups, apart = find_groups(self.source, work, workers.group_bytes)
        missing = [unit for index, unit in enumerate(cut) if index not in journal.written]
        self._follow([*missing, *(unit for unit in cut if unit.weight in apart)])
        give_what_is_needed(self.source, work, workers, apart)
        with reserved(work, fresh=not self.resumed_units) as files, one_thread_each(work, workers.encoders):
            run = Pass(self.source, work, cut, files, journal, workers, groups)
            sha256 = run.run()
            self.bytes_read = run.bytes_read
        if self.source.changed():
            raise ConversionError(
                f"{self.source.folder}: changed while it was converted; run the command again with --restart"
            )
        for build in run.alive:
            more: dict[str, object] = {"made_from": self.digests[build.plan.name]}
            if lost := run.lost(build):
                more["underflow"] = lost
            finish(self.source, build, sha256, more)
        journal.record_checked()

    def _follow(self, wanted: Iterable[Unit]) -> None:
        """Tell of the bytes that come from elsewhere for the units that are read next."""
        total = sum(unit_bytes(self.source, unit) for unit in wanted if self.source.is_remote(unit.weight))
        come, progress, lock = Counter[str](), self.workers.progress, Lock()

        def follow(count: int, again: int) -> None:
            with lock:
                come.update(fetch=count, retry=again)
                progress("fetch", min(come["fetch"], total), total)  # whole blocks, so more than is read
                if come["retry"]:
                    progress("retry", come["retry"], 0)

        self.source.follow(follow)

    def report(self) -> ConversionReport:
        """What was made.

        Raises:
            BuildsFailed: some builds could not be made; it holds the report.
        """
        seconds = round(time.monotonic() - self.began, 3)
        builds = tuple(
            self._build_report(place, 0.0 if name in self.finished else seconds)
            for name, place in self.placed.items()
            if name not in self.failed
        )
        failed = {name: self.failed[name] for name in self.names if name in self.failed}
        report = ConversionReport(builds, self.bytes_read, peak_rss_bytes(), self.resumed_units, failed)
        if failed:
            first, *others = failed.values()
            raise BuildsFailed(first + (f" (and {len(others)} more builds failed)" if others else ""), report)
        return report

    def _build_report(self, place: PlacedBuild, seconds: float) -> BuildReport:
        plan, lost = place.plan, underflow(place)
        return BuildReport(
            build=plan.name,
            path=place.final,
            tensors=len(plan.tensors),
            tensor_bytes=plan.tensor_bytes,
            files=len(place.layout.files),
            seconds=seconds,
            fallbacks=tuple(plan.fallbacks),
            notes=(*plan.all_notes, *underflow_notes(plan.types, lost)),
            coverage=tuple(plan.coverage),
            warning=plan.warning,
            underflow=lost,
            was_finished=plan.name in self.finished,
        )


def peak_rss_bytes() -> int:
    """Most memory this process has held. Not getrusage's figure on Linux: a child inherits its parent's there."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _told_of_the_disk(out: Path, staging: Path) -> Iterator[None]:
    """A failing disk as one sentence that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(
                f"{out}: the disk is full; free space and run the same command again, what is written stays in "
                f"{staging.name}"
            ) from error
        where = f"{error.filename or out}: {error.strerror or error}"
        left = f"; what is written stays in {staging.name}, the same command goes on" if staging.exists() else ""
        raise ConversionError(where + left) from error
