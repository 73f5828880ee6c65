"""Regular expressions of a user, compiled and searched within one budget of memory and time.

A pattern may be hostile, or merely unlucky: `(a+)+$` takes minutes on a name of thirty letters, and a recipe of 20,000
lines that are each quick takes as long. So one budget pays for all of them together:

- before a pattern is compiled, it is parsed, and its size with counted repeats written out is taken from the budget:
  compilers write them out, and `(?:(?:a{1000}){1000}){1000}` has 10^9 letters;
- a pattern with few ways through a name is searched by `re`, at a fifth of a microsecond; one that can backtrack for
  long by the `regex` package, which can be told to stop and is given what is left of the time.

The syntax is that of Python's `re`, which holds what llama.cpp's std::regex is used for; POSIX classes ([[:digit:]])
are `regex`'s.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Iterator
from re import _constants as op  # type: ignore[attr-defined]  # private: not in the stubs
from re import _parser as parser  # type: ignore[attr-defined]  # private: not in the stubs
from typing import Any

from ornith_moe.quant.budget import budget
from ornith_moe.quant.errors import PlanError, brief

MAX_PATTERN = 512
ITEM_BYTES = 4096  # of a pattern that `regex` compiled, by each of its items; measured up to 2.5 KB
LETTER_BYTES = 256  # of one that `re` compiled, which does not write repeats out
FEW_STEPS = 200_000  # items times ways through a name that `re` may have to try: a few milliseconds
LONGEST_NAME = 64  # of a tensor in a GGUF
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


class Patterns:
    """Patterns in the order in which they are asked; compiling, `first` and `unused` are paid from the budget.

    Raises:
        PlanError: no regular expression, longer than MAX_PATTERN, or more than the budget has.
    Example:
        >>> Patterns(["attn_.*", "ffn_down"]).first("blk.3.ffn_down.weight")
        1
    """

    def __init__(self, patterns: Iterable[str]):
        self.patterns = tuple(patterns)
        self._searched: dict[str, int | None] = {}
        with budget().clock() as left:
            end = time.monotonic() + left
            self._compiled = [self._compile(pattern, end) for pattern in self.patterns]

    def first(self, name: str) -> int | None:
        """Index of the first pattern found anywhere in `name`; None if none is."""
        if name not in self._searched:
            self._searched[name] = next(self._all([name], range(len(self.patterns))), None)
        return self._searched[name]

    def unused(self, names: Iterable[str]) -> list[str]:
        """Patterns that are found in none of `names`."""
        names = list(names)
        used = {self.first(name) for name in names}
        rest = [index for index in range(len(self.patterns)) if index not in used]
        found = {index for index in rest if next(self._all(names, [index]), None) is not None}
        return [self.patterns[index] for index in rest if index not in found]

    def _all(self, names: list[str], indices: Iterable[int]) -> Iterator[int]:
        with budget().clock() as left:
            end = time.monotonic() + left
            for index in indices:
                compiled, few = self._compiled[index]
                for name in names:
                    now = time.monotonic()
                    if now > end:
                        raise self._late(self.patterns[index])
                    try:
                        found = compiled.search(name) if few else compiled.search(name, timeout=end - now)
                    except (TimeoutError, MemoryError):
                        raise self._late(self.patterns[index]) from None
                    if found:
                        yield index

    def _compile(self, pattern: str, end: float) -> tuple[Any, bool]:
        """The compiled pattern, and whether it has few choices."""
        where = f"tensor type {brief(pattern, 80)}"
        if len(pattern) > MAX_PATTERN:
            raise PlanError(f"{where}: expected a pattern of at most {MAX_PATTERN} characters, got {len(pattern)}")
        if time.monotonic() > end:
            raise self._late(pattern)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `[[` may mean something else one day
                size, choices = _cost(parser.parse(pattern))
                if size * choices <= FEW_STEPS and "[:" not in pattern:
                    budget().take(LETTER_BYTES * len(pattern), where, PlanError)
                    return re.compile(pattern), True
                budget().take(ITEM_BYTES * size, where, PlanError)
                import regex  # `re` cannot be told to stop

                return regex.compile(pattern), False
        except (ValueError, OverflowError, RecursionError, re.error) as error:
            raise PlanError(f"{where}: is no regular expression: {str(error)[:120]}") from None
        except Exception as error:  # regex.error, without importing the package for it
            if type(error).__module__.partition(".")[0] != "regex":
                raise
            raise PlanError(f"{where}: is no regular expression: {str(error)[:120]}") from None

    def _late(self, pattern: str) -> PlanError:
        return PlanError(
            f"tensor type {brief(pattern, 80)}: {len(self.patterns)} patterns take more than "
            f"{budget().all_seconds:g} s in all, stopped at this one; write them without repeats inside repeats, or "
            "fewer of them"
        )


def _cost(items: Any) -> tuple[int, int]:
    """(items with counted repeats written out, ways to go through a name) of a parsed pattern."""
    size, choices = 1, 1
    for code, value in items:
        if code in _REPEATS:
            least, most, inside = value
            inner, ways = _cost(inside)
            times = int(least if most == op.MAXREPEAT else most)
            size += inner * max(times, 1)
            spread = LONGEST_NAME if most == op.MAXREPEAT else min(int(most) - int(least) + 1, LONGEST_NAME)
            # Each round chooses anew, and there are at most as many rounds as letters: far too many ways, or one.
            choices *= spread * (ways ** min(max(times, spread), LONGEST_NAME))
        elif code == op.BRANCH:
            costs = [_cost(branch) for branch in value[1]]
            size += sum(inner for inner, _ in costs)
            choices *= sum(ways for _, ways in costs)
        else:
            size += 1
            for inside in _inside(value):
                inner, ways = _cost(inside)
                size, choices = size + inner, choices * ways
        size, choices = min(size, 1 << 40), min(choices, FEW_STEPS + 1)
    return size, choices


def _inside(value: Any) -> list[Any]:
    """Parts of a group, a look around or a condition."""
    parts = value if isinstance(value, tuple) else (value,)
    return [part for part in parts if isinstance(part, parser.SubPattern)]
