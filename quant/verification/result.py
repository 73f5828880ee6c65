"""What a verification found, for people and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ornith_moe.quant.source.accounts import LeftOut

MAX_PROBLEMS = 50
Progress = Callable[[str, int, int], None]


@dataclass
class Verification:
    build: str
    tensors: int = 0
    roles: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)  # of the source, for a reason

    @property
    def ok(self) -> bool:
        return not self.problems

    def problem(self, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)

    def note(self, text: str) -> None:
        if len(self.notes) < MAX_PROBLEMS:
            self.notes.append(text)


def verification_json(result: Verification) -> dict[str, Any]:
    """A verification as `ornith-moe verify --json` prints it."""
    return {
        "ok": result.ok,
        "build": result.build,
        "tensors": result.tensors,
        "roles": result.roles,
        "problems": result.problems,
        "notes": result.notes,
        "left_out": [entry.json() for entry in result.left_out],
    }
