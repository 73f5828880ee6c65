"""Measure what every type would do to every tensor of a model: one reading, each slab encoded in all of them.

    for each unit of the source:      w = rows as the GGUF holds them
        for each candidate type:      error += h * (w - decode(encode(w)))^2

What the figures mean is in quant/fitting/sensitivity.py. Rows are cut alike on every machine and whatever the number of
jobs, and sums are fp64 in the order of rows, so the same source gives the same file. A line of a journal beside the
output is written for each unit; the same command goes on after the last. Memory: a few slabs for each job.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.builds.build import Options, find_build
from ornith_moe.quant.builds.plan import Step
from ornith_moe.quant.conversion.convert import peak_rss_bytes
from ornith_moe.quant.conversion.noise import Sums, noise, storage_named
from ornith_moe.quant.conversion.pool import in_order
from ornith_moe.quant.conversion.resume import sample
from ornith_moe.quant.conversion.stream import Unit, read_unit, unit_bytes, units
from ornith_moe.quant.conversion.workers import Progress, silent
from ornith_moe.quant.errors import ConversionError, PlanError
from ornith_moe.quant.files import open_output, published
from ornith_moe.quant.fitting.sensitivity import Sensitivity, TensorErrors, read_sensitivity, sensitivity_bytes
from ornith_moe.quant.fitting.types import GGUF, OTHERS, SETS, parse_kind, standing
from ornith_moe.quant.gguf.imatrix import Imatrix
from ornith_moe.quant.gguf.mixtures import NEEDS_IMATRIX
from ornith_moe.quant.source.source import Source, weight_matrix

PLAIN = "gguf:Q8_0"  # a build that quantizes whatever one may
SLAB_BYTES = 4 << 20  # of source, on every machine
MAX_LINE_BYTES = 1 << 16
PARTIAL = ".partial"  # the journal is named after the output


@dataclass(frozen=True)
class SensitivityReport:
    path: Path
    sensitivity: Sensitivity
    bytes_read: int
    resumed_units: int
    seconds: float
    peak_rss_bytes: int


@budgeted
def measure_sensitivity(
    source: Source,
    output: str | Path,
    *,
    imatrix: Imatrix | None = None,
    types: Sequence[str] = GGUF,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> SensitivityReport:
    """Measure the error of every tensor of `source` in each of `types`, and write it to `output`.

    Args:
        source: an opened checkpoint.
        output: a JSON file. One of the same source, importance and types is read and left as it is.
        imatrix: importance of columns, which types below three bits need.
        types: of quant/fitting/types.py, in any case; GGUF types need an encoder. "gguf", "mlx" and "nvfp4" mean all
            that such fits choose out of.
        jobs: threads, default all cores.
        progress: called with phase "measure", bytes done and bytes in all.
    Returns:
        SensitivityReport.
    Raises:
        PlanError: a config alone, an importance matrix of another model, an unknown type, or `output` is something
            else. ConversionError: a weight that is not finite; a journal of another measurement.
    Numerics: equal bytes on every machine whose numpy sums alike, whatever `jobs`.
    """
    output, began = Path(output), time.monotonic()
    source.require("a sensitivity")
    if not output.absolute().parent.is_dir():
        raise PlanError(f"{output}: expected its folder to exist")
    named = [kind for name in types for kind in SETS.get(name.strip().lower(), (name,))]
    kinds = tuple(dict.fromkeys(parse_kind(kind, "--types") for kind in named))
    work = _Measurement(source, imatrix, kinds)
    made_of = source.name, sample(source), imatrix.digest if imatrix else None
    head = [*made_of, list(kinds)]
    if os.path.lexists(output):
        known = read_sensitivity(output)
        if [known.source, known.sample, known.imatrix, list(known.types)] != head:
            raise PlanError(
                f"{output}: is the sensitivity of another source, importance or types; move it away or name another "
                "with --output"
            )
        return SensitivityReport(output, known, 0, 0, 0.0, peak_rss_bytes())
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with _Journal(output.with_name(output.name + PARTIAL), head) as journal:
        journal.forget_unlike(work.lengths())
        resumed = len(journal.found)
        read = work.run(journal, jobs, progress or silent)
        found = Sensitivity(*made_of, kinds, work.tensors(journal.found))
        with published(output) as file:
            file.write(sensitivity_bytes(found))
        journal.path.unlink()
    return SensitivityReport(output, found, read, resumed, round(time.monotonic() - began, 3), peak_rss_bytes())


class _Measurement:
    """Units of a source, and what each says of the tensors that its rows go to."""

    def __init__(self, source: Source, imatrix: Imatrix | None, kinds: tuple[str, ...]):
        from ornith_moe.quant.codecs.gguf import ENCODERS

        if lacking := [kind for kind in kinds if kind not in ENCODERS and kind not in OTHERS]:
            raise PlanError(
                f"--types: {lacking[0]} has no encoder in this version; choose out of {', '.join(ENCODERS)}"
            )
        self.source, self.imatrix = source, imatrix
        plan = find_build(PLAIN).plan(source, Options())
        wanted = {tensor.name: tensor for tensor in plan.tensors if tensor.dtype != "F32"}
        shapes = {name: (tensor.shape, "Q4_K") for name, tensor in wanted.items()}
        covered = imatrix.match(shapes, source.architecture.gguf_architecture) if imatrix else []
        self.covered = {found.tensor for found in covered}
        self.shapes = {name: tensor.shape for name, tensor in wanted.items()}
        self.kinds = {name: self._candidates(name, kinds) for name in wanted}
        self.steps: dict[int, list[tuple[str, Step]]] = {}
        for step in plan.steps:
            name = plan.tensors[step.tensors[0]].name
            if name in wanted:
                self.steps.setdefault(step.weight, []).append((name, step))
        self.units = [unit for unit in units(source, SLAB_BYTES) if unit.weight in self.steps]

    def _candidates(self, name: str, kinds: Sequence[str]) -> tuple[str, ...]:
        usable = (kind for kind in kinds if name in self.covered or kind not in NEEDS_IMATRIX)
        found = {kind: standing(kind, self.shapes[name][-1]) for kind in usable}
        return tuple(dict.fromkeys(of for kind, of in found.items() if of == kind or kind not in OTHERS))

    def lengths(self) -> list[list[int]]:
        """How many sums each place of each unit has."""
        return [[1 + len(self.kinds[name]) for name, _ in self.steps[unit.weight]] for unit in self.units]

    def run(self, journal: _Journal, jobs: int, progress: Progress) -> int:
        """Measure the units that the journal lacks; returns bytes of source that were read."""
        from ornith_moe.quant.simd.compiled import compiling

        sizes = [unit_bytes(self.source, unit) for unit in self.units]
        total, done = sum(sizes), sum(sizes[number] for number in journal.found)
        before, left = done, [number for number in range(len(self.units)) if number not in journal.found]
        with compiling(lambda function: progress("compile", 0, 0)):
            for number, sums in in_order(lambda number: self._unit(self.units[number]), left, jobs):
                journal.record(number, sums)
                done += sizes[number]
                progress("measure", done, total)
        return done - before

    def _unit(self, unit: Unit) -> list[Sums]:
        """For each place of the unit's weight: energy and errors."""
        slab, weight = read_unit(self.source, unit), self.source.weights[unit.weight]
        if found := slab.first_non_finite():
            raise ConversionError(
                f"{weight.name}: row {unit.start + found[0]}, column {found[1]} is {found[2]}; expected finite "
                "weights, so mend the checkpoint first"
            )
        result = []
        for name, step in self.steps[unit.weight]:
            taken = step.transform.taken(slab, unit.start, weight_matrix(weight)[0])
            rows = step.transform.forward(taken).float32
            importance = None
            if self.imatrix and name in self.covered:
                importance = self.imatrix.importance(name, weight.expert or 0, rows.shape[1])
            result.append(noise(rows, importance, [storage_named(kind, importance) for kind in self.kinds[name]]))
        return result

    def tensors(self, found: dict[int, list[Sums]]) -> tuple[TensorErrors, ...]:
        """Sums of the units as those of tensors, in the order of units."""
        sums = {name: np.zeros(1 + len(kinds)) for name, kinds in self.kinds.items()}
        for number, unit in enumerate(self.units):
            expert = self.source.weights[unit.weight].expert
            for (name, _), of_place in zip(self.steps[unit.weight], found[number], strict=True):
                values = np.array([np.nan if value is None else value for value in of_place])
                sums[name] += self._share(name, expert) * values
        return tuple(
            TensorErrors(
                name,
                self.shapes[name],
                name in self.covered,
                float(sums[name][0]),
                {kind: float(e) for kind, e in zip(kinds, sums[name][1:], strict=True) if np.isfinite(e)},
            )
            for name, kinds in self.kinds.items()
        )

    def _share(self, name: str, expert: int | None) -> float:
        """Tokens that a matrix saw over those that one saw on average; 1 where nothing is known of them."""
        entry = self.imatrix.entry_of(name) if self.imatrix and name in self.covered else None
        if entry is None or entry.counts.size == 1 or not entry.counts.any():
            return 1.0
        return float(entry.counts[expert or 0]) / float(entry.counts.mean(dtype=np.float64))


class _Journal:
    """Lines of JSON: what is measured, then `[unit, sums of each place]`; a torn line ends it."""

    def __init__(self, path: Path, head: Sequence[object]):
        self.path = path
        self._file = os.fdopen(open_output(path), "r+b")
        self.found: dict[int, list[Sums]] = {}
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(head)
        except BlockingIOError:
            self._file.close()
            raise ConversionError(
                f"{path}: another measurement writes here; wait for it or choose another --output"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def _read(self, head: Sequence[object]) -> None:
        kept = 0
        for number, line in enumerate(iter(lambda: self._file.readline(MAX_LINE_BYTES), b"")):
            if not line.endswith(b"\n"):
                break
            try:
                value = json.loads(line)
                if number == 0 and value != list(head):
                    raise ConversionError(
                        f"{self.path}: is of another source, importance or types; drop it and run the command again"
                    )
                if number:
                    unit, sums = value
                    self.found[int(unit)] = sums
            except (ValueError, TypeError):
                break
            kept += len(line)
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            self._write(head)

    def forget_unlike(self, lengths: list[list[int]]) -> None:
        """Drop what a damaged journal says of units that do not exist or have other sums; they are measured again."""

        def sound(unit: int, sums: Any) -> bool:
            if not (0 <= unit < len(lengths) and isinstance(sums, list) and all(isinstance(s, list) for s in sums)):
                return False
            numbers = (value for of_place in sums for value in of_place)
            return [len(of_place) for of_place in sums] == lengths[unit] and all(
                value is None or (type(value) in (int, float) and 0 <= value < math.inf) for value in numbers
            )

        self.found = {unit: sums for unit, sums in self.found.items() if sound(unit, sums)}

    def record(self, unit: int, sums: list[Sums]) -> None:
        self.found[unit] = sums
        self._write([unit, sums])

    def _write(self, value: object) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
