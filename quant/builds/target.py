"""What the name of a fit asks for: so many bytes of files, or bits of a weight.

FAMILY:fit=16GB     all files together, headers too, have at most 16e9 bytes; GiB is 2^30
FAMILY:bpw=4.5      tensors have at most 4.5 bits for each weight
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ornith_moe.quant.builds.build import Alternative, Build
from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.fitting.fit import Fitted

NEIGHBOURS = (0.7, 0.8, 0.9, 1.1, 1.25)  # sizes beside the one that is asked for
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Target:
    """So many bytes of files (`fit`), or bits of a weight (`bpw`), of builds called FAMILY:..."""

    family: str
    kind: str
    value: float
    unit: str = ""  # of bytes

    @property
    def number(self) -> str:
        return f"{self.value:.9f}".rstrip("0").rstrip(".")

    @property
    def name(self) -> str:
        return f"{self.family}:{self.kind}={self.number}{self.unit}"

    @property
    def label(self) -> str:
        """In the name of a file."""
        return f"{self.number}{self.unit or 'bpw'}"

    def bytes(self, weights: int, other: int) -> int:
        """Of the tensors that are chosen, where there are `weights` and all else takes `other` bytes."""
        if self.kind == "bpw":
            return math.floor(self.value * weights / 8)
        return math.floor(self.value * UNITS[self.unit.upper().removesuffix("B")]) - other

    def times(self, share: float) -> Target:
        """Three digits of so much of it."""
        return replace(self, value=float(f"{share * self.value:.3g}"))

    def alternatives(
        self,
        within: Callable[[Target], Fitted | None],
        other: int,
        progress: Callable[[str, int, int], None],
        *,
        itself: bool = True,
    ) -> list[Alternative]:
        """What is chosen `within` this and neighbouring sizes, where anything is; all else takes `other` bytes."""
        found, shares = [], (*((1.0,) if itself else ()), *NEIGHBOURS)
        for number, share in enumerate(shares):
            progress("solve", number, len(shares))
            target = self if share == 1 else self.times(share)
            if chosen := within(target):
                found.append(Alternative(target.name, chosen.nbytes + other, chosen.kl))
        progress("solve", len(shares), len(shares))
        return found

    def at_least(self, least: int, weights: int, other: int) -> Target:
        """The smallest that `least` bytes of chosen tensors fit in."""
        if self.kind == "bpw":
            return replace(self, value=math.ceil(800 * least / weights) / 100)
        return replace(self, value=math.ceil((least + other) / 1e6), unit="MB")


class Fits:
    """The builds of a family that `make` makes of a target."""

    def __init__(self, family: str, make: Callable[[Target], Build], hears: frozenset[str]):
        self.family, self.make, self.hears = family, make, hears
        self.form = f"{family}:fit=SIZE, {family}:bpw=BITS"

    def build(self, name: str) -> Build | None:
        found = re.fullmatch(rf"\s*{self.family}:(fit|bpw)=(.*)", name, re.IGNORECASE)
        if not found:
            return None
        kind, text = found[1].lower(), found[2].strip()
        value = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([KMGT]?I?B?)", text, re.IGNORECASE)
        sound = value and float(value[1]) > 0 and (value[2] == "" or kind == "fit")
        if not value or not sound:
            example = f"{self.family}:fit=16GB" if kind == "fit" else f"{self.family}:bpw=4.5"
            raise PlanError(f"build {brief(name)}: expected a number as in {example}, got {brief(text)}")
        prefix = re.sub("[kmgt]", lambda letter: letter[0].upper(), value[2].lower().removesuffix("b"))
        return self.make(Target(self.family, kind, float(value[1]), f"{prefix}B" if kind == "fit" else ""))
