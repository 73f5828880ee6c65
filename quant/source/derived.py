"""A source with something changed: what the change does not touch is the base's.

Derived     the base, weight by weight
Grafted     multi-token prediction of another checkpoint (mtp_from.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ornith_moe.quant.source.quantized import Codes
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.source import Source


@dataclass(frozen=True, kw_only=True)
class Derived(Source):
    """`base`, whose weights come first; a subclass says what is otherwise."""

    base: Source

    def require(self, purpose: str) -> None:
        self.base.require(purpose)

    def dtype(self, index: int) -> str:
        return self.base.dtype(index)

    def kept(self, index: int) -> str:
        return self.base.kept(index)

    def codes(self, index: int) -> Codes | None:
        return self.base.codes(index)

    def read(self, index: int, start: int, rows: int) -> Slab:
        return self.base.read(index, start, rows)

    @property
    def fingerprint(self) -> str:
        return self.base.fingerprint

    @property
    def folder(self) -> Path:
        return self.base.folder

    def position(self, index: int) -> tuple[Any, ...]:
        return self.base.position(index)

    def changed(self) -> bool:
        return self.base.changed()

    def modified_ns(self) -> int:
        return self.base.modified_ns()

    def follow(self, follow: Callable[[int, int], None]) -> None:
        self.base.follow(follow)

    @property
    def held_bytes(self) -> int:
        return self.base.held_bytes

    def is_remote(self, index: int) -> bool:
        return self.base.is_remote(index)

    def tensor_of(self, index: int) -> str:
        return self.base.tensor_of(index)

    def tensor_sizes(self) -> Mapping[str, int]:
        return self.base.tensor_sizes()
