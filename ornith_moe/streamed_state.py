"""The state of a streamed comparison: activations of every model after the last layer, and a journal of what was found.

    journal     a line of JSON for what is compared; then one for each layer, written after its activations
    x{m}.{0|1}  fp32 [W, L, H] of model m, the source being 0: two files in turn, so that a layer never overwrites
                what it reads

A line torn by a crash ends the journal there. A line holds digests of the activations that its layer left, so bytes
that a power cut lost are noticed and not computed with. The folder is locked while it is in use.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ornith_moe.quant.errors import CheckpointError, ConversionError, PlanError
from ornith_moe.quant.files import open_output, parse_json, reserve

JOURNAL = "journal"
MAX_LINE_BYTES = 4 << 20


class State:
    """What lies in `folder`, for a comparison described by `head`.

    Args:
        shape: of activations.
        resume: go on with what is there, which must be of the same head; otherwise what is there goes.
    Raises:
        PlanError: nothing to go on with, or other inputs, or files that are not of a comparison. ConversionError:
        another process works there. CheckpointError: the activations are not those of the journal.
    """

    def __init__(self, folder: Path, head: dict[str, Any], shape: tuple[int, ...], *, resume: bool = False):
        self.folder, self.shape = folder, shape
        self.lines: list[dict[str, Any]] = []  # of the stages that are done
        self._refuse(resume)
        folder.mkdir(exist_ok=True)
        self._file = os.fdopen(open_output(folder / JOURNAL), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConversionError(
                f"{folder}: another comparison is at work here; wait for it or name another folder with --state"
            ) from None
        try:
            self._begin(head, resume)
        except BaseException:
            self._file.close()
            raise

    def _refuse(self, resume: bool) -> None:
        there = os.path.lexists(self.folder)
        if there and (not self.folder.is_dir() or os.path.islink(self.folder)):
            raise PlanError(f"{self.folder}: is no folder; name another with --state")
        if there and any(self.folder.iterdir()) and not (self.folder / JOURNAL).is_file():
            raise PlanError(f"{self.folder}: holds files that are of no comparison; name another with --state")
        if resume and not (self.folder / JOURNAL).is_file():
            raise PlanError(f"{self.folder}: no comparison was begun here; leave --resume out")

    def _begin(self, head: dict[str, Any], resume: bool) -> None:
        kept = 0
        for number, line in enumerate(iter(lambda: self._file.readline(MAX_LINE_BYTES), b"")) if resume else ():
            if not line.endswith(b"\n"):
                break
            entry = parse_json(line, JOURNAL)
            if number == 0 and entry != head:
                changed = ", ".join(key for key in head if not isinstance(entry, dict) or entry.get(key) != head[key])
                raise PlanError(
                    f"{self.folder}: what was begun here had other {changed}; leave --resume out to begin anew"
                )
            kept += len(line)
            self.lines += [entry] if number else []
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            self._unlink()
            self._write(head)
        elif self.lines and self._digests(len(self.lines) - 1) != self.lines[-1].get("digests"):
            raise CheckpointError(
                f"{self.folder}: its activations are not those that its journal means; leave --resume out to begin anew"
            )

    def activations(self, model: int, stage: int) -> np.ndarray:
        """Those of a model after so many stages; the file is made if it is not there."""
        path = self.folder / f"x{model}.{stage % 2}"
        with os.fdopen(open_output(path), "r+b") as file:
            if os.fstat(file.fileno()).st_size != 4 * int(np.prod(self.shape)):
                os.truncate(file.fileno(), 0)
                reserve(file.fileno(), 4 * int(np.prod(self.shape)))
            return np.memmap(file, np.float32, "r+", shape=self.shape)

    def record(self, found: dict[str, Any]) -> None:
        """A stage is done, with its activations written."""
        self.lines.append(found | {"digests": self._digests(len(self.lines))})
        self._write(self.lines[-1])

    def _digests(self, stage: int) -> dict[str, str]:
        return {path.name: _digest(path) for path in sorted(self.folder.glob(f"x*.{stage % 2}"))}

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def remove(self) -> None:
        """Nothing of it is needed any more; what others have put there stays, and then the folder."""
        self._unlink()
        (self.folder / JOURNAL).unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _unlink(self) -> None:
        for path in self.folder.glob("x*.[01]"):
            path.unlink()

    def close(self) -> None:
        self._file.close()


def _digest(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
