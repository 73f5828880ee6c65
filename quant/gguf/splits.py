"""A GGUF in several files, as llama.cpp writes and loads it.

    NAME-00001-of-00003.gguf   all keys, and tensors up to a size or a number
    NAME-00002-of-00003.gguf   tensors; of the keys only split.no, split.count and split.tensors.count, which all have

llama.cpp is given the first and finds the others by name. Sizes are those of aligned tensors, without headers, as
llama-gguf-split counts them. Source: llama.cpp, tools/gguf-split; the files are its own, byte for byte, but that it
writes a shape [1, K] as [K] (tests/quant/gguf/test_splits.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType as Type
from gguf import Keys

from ornith_moe.quant.errors import CheckpointError, PlanError, brief
from ornith_moe.quant.gguf.header import Entry
from ornith_moe.quant.source.accounts import bare

NUMBER, COUNT = Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT
TENSORS = Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT
MOST_PARTS = (1 << 16) - 1  # `split.count` has 16 bits
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Split:
    """Where a file ends: before it would hold more than so many bytes, or so many tensors."""

    max_bytes: int | None = None
    max_tensors: int | None = None

    def __post_init__(self) -> None:
        given = [limit for limit in (self.max_bytes, self.max_tensors) if limit is not None]
        if len(given) != 1 or given[0] < 1:
            raise PlanError(
                f"split: expected one limit above 0, of bytes or of tensors, got {self.max_bytes} and "
                f"{self.max_tensors}; leave --split-max-size or --split-max-tensors out"
            )

    def cut(self, sizes: Sequence[int]) -> list[range]:
        """Which tensors each file holds, of these aligned sizes; one that is larger than the limit has its own.

        Raises:
            PlanError: more files than the format counts.
        """
        starts, filled = [0], 0
        for index, size in enumerate(sizes):
            full = filled + size > self.max_bytes if self.max_bytes else index - starts[-1] == self.max_tensors
            if full and index > starts[-1]:
                starts.append(index)
                filled = 0
            filled += size
        if len(starts) > MOST_PARTS:
            raise PlanError(f"split: would give {len(starts)} files, at most {MOST_PARTS} can be numbered")
        return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def part_name(name: str, number: int, count: int) -> str:
    """Of part `number`, from 0, of the file that alone would be called `name`.

    Example:
        >>> part_name("tiny-Q8_0.gguf", 0, 3)
        'tiny-Q8_0-00001-of-00003.gguf'
    """
    return f"{name.removesuffix('.gguf')}-{number + 1:05}-of-{count:05}.gguf"


def first_part(path: Path) -> Path:
    """The first of the files that `path` is one of, by its name; `path` itself where that does not say so."""
    found = _NAME.fullmatch(path.name)
    return path.with_name(f"{found[1]}-00001-of-{found[3]}.gguf") if found else path


def split_entries(number: int, count: int, tensors: int) -> list[Entry]:
    """The keys that every part of a split GGUF has, the last of its keys, in llama-gguf-split's order."""
    return [
        Entry(NUMBER, number, Type.UINT16),
        Entry(TENSORS, tensors, Type.INT32),
        Entry(COUNT, count, Type.UINT16),
    ]


def parts_of(path: Path, keys: dict[str, Any]) -> list[Path]:
    """All files of the GGUF that `path`, whose keys these are, is or is a part of.

    Raises:
        CheckpointError: its name is not that of such a part, or a part is missing.
    """
    number, count = keys.get(NUMBER, 0), keys.get(COUNT, 1)
    if count == 1:
        return [path]
    if type(number) is not int or type(count) is not int or not 0 <= number < count <= MOST_PARTS:
        raise CheckpointError(
            f"{path.name}: expected to be a part of a GGUF, got part {brief(number)} of {brief(count)}"
        )
    found = _NAME.fullmatch(path.name)
    if not found or (int(found[2]), int(found[3])) != (number + 1, count):
        raise CheckpointError(
            f"{path.name}: is part {number + 1} of {count} of a GGUF, which its name must say; rename it to "
            f"{bare(part_name(found[1] if found else path.name, number, count))}"
        )
    parts = [path.with_name(part_name(found[1], part, count)) for part in range(count)]
    missing = [part for part in parts if not part.exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{missing[0]}: is missing{more}, of the {count} files of this GGUF; fetch it again")
    return parts
