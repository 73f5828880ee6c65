"""What a checkpoint folder holds and a build does not: every tensor is in the build, or here with its reason.

    values in the build + values left out for a reason = values of the folder's tensors

One line per reason and count, however many names: a folder of 30,000 leftovers is one line for people, and a list in
JSON.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ornith_moe.quant.errors import brief

VISION = "the vision tower has no place in a text GGUF (an mmproj file would have one)"


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


def account(source, plan) -> tuple[list[LeftOut], list[str]]:
    """What `plan` leaves out of `source` for a reason, and the tensors that it loses without one.

    Args:
        source: an opened checkpoint, `Source`. plan: of one build of it, `BuildPlan`.
    """
    values: Counter[str] = Counter()
    for step in plan.steps:
        values[source.rows[step.weight][0].name] += math.prod(source.weights[step.weight].shape)
    left_out = list(source.left_out)
    if plan.is_gguf:
        parts = zip(source.weights, source.rows, strict=True)
        tower = [info.name for weight, (info, _) in parts if weight.role == "vision"]
        if tower:
            left_out.append(LeftOut(VISION, tuple(tower)))
    known = {name for entry in left_out if entry.what == "tensor" for name in entry.names}
    tensors = source.checkpoint.tensors.items()
    lost = [name for name, info in tensors if name not in known and values[name] != math.prod(info.shape)]
    return left_out, lost
