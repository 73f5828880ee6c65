"""The journal of a conversion: which units are written, and a digest of every extent they left.

One line of JSON per unit, appended after its bytes are written: `[unit, [[file, offset, length, digest], ...], lost]`,
lost being [[build, tensor, weights that became zero], ...]. The first line names what is being converted: the source,
and each build with the digest of all that determines its bytes. A line `{"failed": ...}` says that a build cannot hold
a weight, the last one that everything was read back and may get its final name. A line torn by a crash ends the journal
there.

A journal is a claim, not a proof: bytes of a journalled unit may have been lost in a power cut, so every extent is read
back and compared before anything gets its final name. Digests are xxh3-128: they guard against accidents, not attacks.

In memory is where the line of each unit begins, and what was lost: 94 bytes a unit, where ten extents would be 2,192;
the 397B in four builds has 190,000 units.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from ornith_moe.quant.budget import Budget, one_budget
from ornith_moe.quant.errors import CheckpointError, ConversionError
from ornith_moe.quant.files import open_output, parse_json

Extent = tuple[int, int, int, str]  # file, offset, length, digest
Lost = tuple[int, int, int]  # build, its tensor, weights that became zero
CHECKED = {"checked": True}
JOURNAL = "journal"
MAX_LINE_BYTES, MAX_SLAB_BYTES = 16 << 20, 64 << 20  # more is no journal of ours


@dataclass(frozen=True)
class Head:
    """What a conversion was begun for: the source's fingerprint, {build: digest of it}, and the bytes of a slab."""

    source: str
    builds: dict[str, str]
    slab_bytes: int  # cuts the units; a conversion that goes on keeps the cut it began with


@dataclass(frozen=True)
class Failure:
    """Why `build` cannot be made: it cannot store weight `weight`."""

    build: str
    weight: int
    reason: str
    final: bool  # nothing more can be said of the build; otherwise other weights may fail too


class Journal:
    """Append-only record in `folder`; holds a lock that dies with the process."""

    def __init__(self, folder: Path):
        self.path = folder / JOURNAL
        self.head: Head | None = None  # None: nothing is begun
        self.written: dict[int, int] = {}  # {unit: where its line begins}
        self.lost: dict[int, list[Lost]] = {}  # of units of which anything is
        self.failures: list[Failure] = []
        self.checked = False  # every byte was read back; what is left to do is to rename
        self._mutex = Lock()
        self._file = os.fdopen(open_output(self.path), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(
                f"{folder}: another conversion is writing here; wait for it or choose another OUT"
            ) from None
        kept = self._read()
        self._file.truncate(kept)
        self._file.seek(kept)

    def begin(self, head: Head) -> None:
        self.head = head
        self._write(asdict(head))

    def _read(self) -> int:
        """Load lines up to the first damaged one; returns the length of what is kept."""
        self._file.seek(0)
        kept = 0
        for number, line in enumerate(iter(lambda: self._file.readline(MAX_LINE_BYTES), b"")):
            try:
                self._take(number, kept, self._entry(line))
            except (ValueError, TypeError, KeyError, OverflowError, CheckpointError):
                break
            kept += len(line)
        return kept

    def _entry(self, line: bytes) -> Any:
        """What a line says; None if it is torn."""
        with one_budget(Budget()):  # for the line: many are no reason to drop the rest as damaged
            return parse_json(line, self.path.name) if line.endswith(b"\n") else None

    def _take(self, number: int, start: int, entry: Any) -> None:
        if number == 0:
            builds = {str(build): str(digest) for build, digest in dict(entry["builds"]).items()}
            if not 0 < entry["slab_bytes"] <= MAX_SLAB_BYTES:
                raise ValueError("slab_bytes")
            self.head = Head(str(entry["source"]), builds, int(entry["slab_bytes"]))
        elif entry == CHECKED:
            self.checked = True
        elif isinstance(entry, dict):
            self.failures.append(Failure(**entry["failed"]))
        else:
            unit, extents, lost = entry
            _extents(extents)  # raises what is wrong with them
            self._claim(int(unit), start, [(int(b), int(t), int(n)) for b, t, n in lost])

    def _claim(self, unit: int, start: int, lost: list[Lost]) -> None:
        self.forget(unit)
        self.written[unit] = start
        if lost:
            self.lost[unit] = lost

    def forget(self, unit: int) -> None:
        """As if it was not written."""
        self.written.pop(unit, None), self.lost.pop(unit, None)

    def extents(self, unit: int) -> list[Extent]:
        """What a unit that is written has left."""
        self._file.seek(self.written[unit])
        return _extents(self._entry(self._file.readline(MAX_LINE_BYTES))[1])

    def forget_all_beyond(self, units: int, sizes: list[int]) -> None:
        """Drop what a damaged journal says of units and bytes that do not exist; they are written again."""
        for unit in [*self.written]:
            inside = (0 <= f < len(sizes) and 0 <= o and 0 < n <= sizes[f] - o for f, o, n, _ in self.extents(unit))
            if not (0 <= unit < units and all(inside)):
                self.forget(unit)

    def record(self, unit: int, extents: list[Extent], lost: list[Lost]) -> None:
        with self._mutex:
            self._claim(unit, self._write([unit, extents, lost]), lost)

    def record_failure(self, failure: Failure) -> None:
        with self._mutex:
            self.failures.append(failure)
            self._write({"failed": asdict(failure)})

    def record_checked(self) -> None:
        self.checked = True
        self._write(CHECKED)
        os.fsync(self._file.fileno())

    def _write(self, entry: object) -> int:
        """Append a line; where it begins."""
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        return start

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _extents(found: Any) -> list[Extent]:
    return [(int(f), int(o), int(n), str(d)) for f, o, n, d in found]
