"""A build read as what it means: its weights in fp32 under the names of its source, decoded as they are asked for.

    w = f'(decode(the rows of its parts))        of each of its tensors that has rows of the weight

The plan of the build says where each weight lies and what happened to it on the way (`Build.as_stored`), its storages
decode, its transforms undo heads, norms and exponentials. So this is one class for folders and for GGUFs, and a new
build needs nothing here. Activations are not its business: of builds that quantize these too it gives the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from ornith_moe.quant.builds.build import find_build, recognize
from ornith_moe.quant.builds.plan import BuildPlan, Step
from ornith_moe.quant.builds.stored import FoundTensor, StoredBuild
from ornith_moe.quant.conversion.stream import Unit, group_rows, runs
from ornith_moe.quant.errors import CheckpointError, OrnithError
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.source import Source, weight_matrix

Parts = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class DecodedBuild:
    """The weights of a build of `source`; what the build holds besides, as MTP, is not looked at."""

    source: Source
    stored: StoredBuild
    plan: BuildPlan

    @property
    def name(self) -> str:
        return str(self.stored.path)

    @property
    def kind(self) -> str:
        """What it claims to be."""
        return self.plan.name

    def rows(self, name: str, start: int, count: int) -> np.ndarray:
        """fp32 [count, K]: rows [start, start + count) of the weight that the source calls `name`; from any thread.

        Raises:
            CheckpointError: a file of it ends early.
        """
        index = self._index[name]
        total, columns = weight_matrix(self.source.weights[index])
        first, stop = start // self._group * self._group, start + count
        unit = Unit(index, first, min(-(-stop // self._group) * self._group, total) - first)
        values = np.empty((unit.rows, columns), np.float32)
        for step in self._steps[index]:
            targets = step.transform.targets(unit.start, unit.rows, total)
            taken = slice(None) if targets is None else targets >= 0
            parts = read_parts(self.plan, step, unit, total, self.stored.tensors)
            values[taken] = decoded(step, parts, columns, self.source.dtype(index))
        return values[start - first : stop - first]

    def changes(self, name: str) -> bool:
        """Whether a weight may be another than the source's: only decoding tells."""
        return True

    @property
    def fingerprint(self) -> str:
        """Of its files, by names, sizes and times of change."""
        paths = sorted({tensor.path for tensor in self.stored.tensors.values()})
        state = [(path.name, at.st_size, at.st_mtime_ns) for path in paths if (at := path.stat())]
        return xxhash.xxh3_128_hexdigest(f"{self.kind} {state}".encode())

    @cached_property
    def _index(self) -> dict[str, int]:
        return {weight.name: number for number, weight in enumerate(self.source.weights)}

    @cached_property
    def _steps(self) -> dict[int, list[Step]]:
        steps: dict[int, list[Step]] = {}
        for step in self.plan.steps:
            steps.setdefault(step.weight, []).append(step)
        return steps

    @cached_property
    def _group(self) -> int:
        return group_rows(self.plan.steps)


def open_decoded(path: str | Path, source: Source) -> DecodedBuild:
    """The build at `path`, a folder or a .gguf file, as what it means for the weights of `source`.

    Raises:
        CheckpointError: no build lies there, or one that is not of `source`.
    """
    stored = StoredBuild(Path(path))
    try:
        plan = find_build(recognize(stored)).as_stored(source, stored)
    except OrnithError as refusal:
        raise CheckpointError(f"{path}: is no build of {source.name} that can be read: {refusal}") from None
    for tensor in plan.tensors:
        found = stored.tensors.get(tensor.name)
        want = tensor.dtype, tuple(tensor.shape), tensor.nbytes
        if found is None or (found.dtype, found.shape, found.nbytes) != want:
            got = f"got {found.dtype} {list(found.shape)}" if found else "it is not there"
            raise CheckpointError(
                f"{path}: is no build of {source.name}: tensor {bare(tensor.name)} should be {tensor.dtype} "
                f"{list(tensor.shape)}, {got}"
            )
    return DecodedBuild(source, stored, plan)


def read_parts(plan: BuildPlan, step: Step, unit: Unit, weight_rows: int, found: Mapping[str, FoundTensor]) -> Parts:
    """uint8 [rows, row_bytes] of each part of a step for the rows of `unit` that it takes, as they are stored."""
    targets = step.transform.targets(unit.start, unit.rows, weight_rows)
    rows = unit.rows if targets is None else int((targets >= 0).sum())
    parts = tuple(np.empty((part.rows_of(rows), part.row_bytes), np.uint8) for part in step.parts)
    for run in runs(step, unit, weight_rows):
        part, tensor = step.parts[run.part], found[plan.tensors[step.tensors[run.part]].name]
        stored = tensor.read(run.target * part.row_bytes, run.count * part.row_bytes)
        parts[run.part][run.rows] = stored.reshape(run.count, part.row_bytes)
    return parts


def decoded(step: Step, parts: Parts, columns: int, dtype: str) -> np.ndarray:
    """fp32 [rows, columns]: what parts mean for a weight that its source holds as `dtype`."""
    step = replace(step, storage=step.storage.as_stored(parts))
    return step.transform.inverse(step.storage.decode(parts, columns, dtype))
