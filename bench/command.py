"""A whole command as an implementation of a task: its steps one after another, what they used, and what they made.

The first call finds no input in the page cache, so that `read_bytes` counts what it reads, by calls or mapped; the
others find the source there. `used` adds up the steps and has the highest of the peaks of all calls so far.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path

from ornith_moe.bench.process_tree import Ended, evict, run, warm
from ornith_moe.quant.builds.stored import StoredBuild

SLAB_BYTES = 32 << 20


@dataclass(frozen=True)
class Step:
    """A command line, and what it reads of an earlier step's."""

    command: Sequence[str]
    reads: Sequence[Path] = ()


@dataclass
class Command:
    """Steps that make `out` of the folder `source`; `versions` of what is run, for the note.

    `into`: whether `out` is there before, as an empty folder.

    Raises when called:
        AssertionError: a step ended with an error; the end of what it said.
    """

    steps: Sequence[Step]
    source: Path
    out: Path
    versions: str = ""
    into: bool = False
    used: dict[str, float] = field(default_factory=dict)
    _last: list[dict[str, float]] = field(default_factory=list)  # of the last call's steps

    def prepare(self) -> None:
        """Before each call: nothing of an earlier one is left, and the source is where the module says."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.into:
            self.out.mkdir()
        (warm if self.used else evict)(_files(self.source))

    def __call__(self) -> str:
        """Run all steps; what the last one printed."""
        first, ended = not self.used, []
        for step in self.steps:
            if first:
                evict(iter(step.reads))
            ended.append(run(step.command))
            assert ended[-1].code == 0, _said(ended[-1])
        self._last = [each.used for each in ended]
        for name in dict.fromkeys(name for each in self._last for name in each if name != "seconds"):
            values = [each.get(name, 0) for each in self._last]
            if name.startswith("peak"):
                self.used[name] = max(*values, self.used.get(name, 0))
            elif first or name in ("user_s", "system_s"):
                self.used[name] = sum(values)
        return ended[-1].out

    @property
    def told(self) -> str:
        """CPU seconds of the last call, seconds of its steps if there are several, versions."""
        words = [f"{self.used['user_s']:.1f} s user", f"{self.used['system_s']:.1f} s system"]
        if len(self._last) > 1:
            words.append(" + ".join(f"{each['seconds']:.1f}" for each in self._last) + " s")
        return ", ".join([*words, self.versions] if self.versions else words)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def _said(ended: Ended) -> str:
    return f"exit code {ended.code}: " + " ".join((ended.errors or ended.out).split())[-300:]


def digests(path: Path) -> dict[str, str]:
    """{name: its dtype, shape and the SHA-256 of its bytes} of every tensor of the build at `path`, by our reader.

    Without leading ones of the shape, which llama-quantize drops.
    """
    found = {}
    for name, tensor in StoredBuild(path).tensors.items():
        hashed = hashlib.sha256()
        for start in range(0, tensor.nbytes, SLAB_BYTES):
            hashed.update(tensor.read(start, min(SLAB_BYTES, tensor.nbytes - start)).data)
        shape = list(dropwhile(lambda size: size == 1, tensor.shape))
        found[name] = f"{tensor.dtype} {shape} {hashed.hexdigest()}"
    return found
