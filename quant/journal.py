"""The journal of a conversion: which units are written, and a digest of every extent they left.

One line of JSON per unit, appended after its bytes are written: `[unit, [[file, offset, length, digest], ...]]`. The
first line names what is being converted; a conversion resumes only if it is the same. The last one says that everything
was read back and may get its final name. A line torn by a crash ends the journal there.

A journal is a claim, not a proof: bytes of a journalled unit may have been lost in a power cut, so every extent is read
back and compared before anything gets its final name. Digests are xxh3-128: they guard against accidents, not attacks.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from threading import Lock

from ornith_moe.quant.errors import ConversionError
from ornith_moe.quant.files import open_output

Extent = tuple[int, int, int, str]  # file, offset, length, digest
CHECKED = {"checked": True}
JOURNAL = "journal"


class Journal:
    """Append-only record in `folder`; holds a lock that dies with the process."""

    def __init__(self, folder: Path, identity: str, slab_bytes: int, *, resume: bool):
        self.path = folder / JOURNAL
        self.extents: dict[int, list[Extent]] = {}
        self.checked = False  # every byte was read back; what is left to do is to rename
        self.slab_bytes = slab_bytes  # cuts the units; a resumed conversion keeps the cut it began with
        self._mutex = Lock()
        self._file = os.fdopen(open_output(self.path), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(
                f"{folder}: another conversion is writing here; wait for it or choose another OUT"
            ) from None
        kept = self._read(identity) if resume else 0
        self._file.truncate(kept)
        if kept == 0:
            self._write({"identity": identity, "slab_bytes": slab_bytes})

    def _read(self, identity: str) -> int:
        """Load lines up to the first damaged one; returns the length of what is kept."""
        self._file.seek(0)
        kept = 0
        for number, line in enumerate(self._file):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
                if number == 0:
                    begun, self.slab_bytes = entry["identity"], int(entry["slab_bytes"])
                elif entry == CHECKED:
                    self.checked = True
                else:
                    unit, extents = entry
                    self.extents[int(unit)] = [(int(f), int(o), int(n), str(d)) for f, o, n, d in extents]
            except (ValueError, TypeError, KeyError):
                break
            if begun != identity:
                raise ConversionError(
                    f"{self.path.parent}: was begun from another source, other builds or other options; "
                    "delete that folder to begin anew"
                )
            kept += len(line)
        return kept

    def forget_all_beyond(self, units: int, sizes: list[int]) -> None:
        """Drop what a damaged journal says of units and bytes that do not exist; they are written again."""

        def sound(unit: int, extents: list[Extent]) -> bool:
            inside = (0 <= f < len(sizes) and 0 <= o and 0 < n <= sizes[f] - o for f, o, n, _ in extents)
            return 0 <= unit < units and all(inside)

        self.extents = {unit: extents for unit, extents in self.extents.items() if sound(unit, extents)}

    def record(self, unit: int, extents: list[Extent]) -> None:
        with self._mutex:
            self.extents[unit] = extents
            self._write([unit, extents])

    def record_checked(self) -> None:
        self.checked = True
        self._write(CHECKED)
        os.fsync(self._file.fileno())

    def _write(self, entry: object) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
