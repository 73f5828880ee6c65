"""How the coverage of an importance matrix is printed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from ornith_moe.command.terminal import out, say, shown

if TYPE_CHECKING:
    from ornith_moe.quant.gguf.imatrix import Coverage


def print_coverage(coverages: Iterable[Iterable[Coverage]]) -> None:
    """What an importance matrix knows of each kind of tensor, and each tensor that it knows only in part."""
    tensors = {found.tensor: found for coverage in coverages for found in coverage}
    if not tensors:
        return
    kinds: dict[str, list] = {}
    for found in tensors.values():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", found.tensor, count=1), []).append(found)
    table = Table("importance of", "tensors", "experts reached", "tokens of an expert")
    for kind, members in kinds.items():
        reached, of = (sum(getattr(found, what) for found in members) for what in ("covered", "matrices"))
        least, most = min(found.least for found in members), max(found.most for found in members)
        experts = f"{reached:,} of {of:,}" if of > len(members) else "-"
        table.add_row(shown(kind), f"{len(members):,}", experts, f"{least:,} to {most:,}")
    out.print(table)
    for found in tensors.values():
        if found.covered < found.matrices:
            say(f"- {found.tensor}: {found.matrices - found.covered} of {found.matrices} experts were never reached "
                "and count all columns alike")  # fmt: skip
