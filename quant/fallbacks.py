"""Weights that could not get the storage their build is named after: a sentence for each, and one line per kind.

A model of 30,720 experts that are 320 wide has 30,720 of them, for one reason.
"""

from __future__ import annotations

from collections.abc import Iterable


class Fallback(str):
    """A sentence about one tensor, as JSON holds it; `kind` is what it says of every tensor of its kind."""

    tensor: str
    kind: str

    def __new__(cls, tensor: str, kind: str, detail: str = "") -> Fallback:
        """`detail` is said of this tensor instead of `kind`, where there is more to say."""
        sentence = super().__new__(cls, f"{tensor}: {detail or kind}")
        sentence.tensor, sentence.kind = tensor, kind
        return sentence


def by_kind(fallbacks: Iterable[Fallback]) -> list[str]:
    """One line per kind, with how many and the first of them; a kind of one tensor is its own sentence.

    Example:
        >>> by_kind([Fallback("a", "320 columns"), Fallback("b", "320 columns"), Fallback("c", "no scale")])
        ['2 tensors, the first a: 320 columns', 'c: no scale']
    """
    kinds: dict[str, list[Fallback]] = {}
    for fallback in fallbacks:
        kinds.setdefault(fallback.kind, []).append(fallback)
    return [
        str(found[0]) if len(found) == 1 else f"{len(found):,} tensors, the first {found[0].tensor}: {kind}"
        for kind, found in kinds.items()
    ]
