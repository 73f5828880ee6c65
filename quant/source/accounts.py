"""What a checkpoint folder holds and no build will, with the reason.

One line per reason and count, however many names: a folder of 30,000 leftovers is one line for people, and a list in
JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ornith_moe.quant.errors import brief


def bare(name: str) -> str:
    """`name`, taken from a file, in a sentence: as `brief`, without quotes."""
    return brief(name)[1:-1]


def some(what: str, names: Sequence[str]) -> str:
    """`names` in a few words: "tensor x", or "3 tensors, the first is x"."""
    first = bare(names[0])
    return f"{what} {first}" if len(names) == 1 else f"{len(names):,} {what}s, the first is {first}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors of a checkpoint, or files with all that is in them, that no build holds, and why."""

    reason: str
    names: tuple[str, ...]
    what: str = "tensor"  # or "file"

    def __str__(self) -> str:
        return f"left out: {some(self.what, self.names)}: {self.reason}"

    def json(self) -> dict[str, Any]:
        return {"what": self.what, "count": len(self.names), "reason": self.reason, "names": list(self.names)}
