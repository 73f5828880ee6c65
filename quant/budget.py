"""What input that nobody vouches for may cost: bytes of memory and seconds, counted down as readers spend them.

A file of a few hundred kilobytes can ask for gigabytes: a count in a header, 20,000 patterns of a recipe, a thousand
side files that are each within their limit. So limits on single things are not enough: one `Budget` pays for all that
a command reads, and each reader takes a cost from it before paying.

A command, and each public function that reads files, is `budgeted`: what it calls finds the same budget with
`budget()`. The inner one of two does not begin anew. A reader that nobody called from such a door has one of its own,
as has each thread; weights are read by threads, within the memory that a conversion may hold.

Example:
    >>> with one_budget(Budget(memory_bytes=1 << 20)):
    ...     budget().take(1 << 19, "index.json")
    ...     budget().take(1 << 20, "index.json")
    Traceback (most recent call last):
    ornith_moe.quant.errors.CheckpointError: index.json: would take 1048576 bytes of memory, and 524288 are left ...
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from ornith_moe.quant.errors import CheckpointError, OrnithError

MEMORY_BYTES = 3 << 29  # the tables of the largest checkpoint of the family, beside those of a build, take 0.4 of it
SECONDS = 10.0
P = ParamSpec("P")
R = TypeVar("R")


class Budget:
    """Memory and time that are left."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES, seconds: float = SECONDS, *, within: Budget | None = None):
        self.memory_bytes, self.seconds, self.all_seconds = memory_bytes, seconds, seconds
        self._within = within

    def part(self, memory_bytes: int) -> Budget:
        """At most `memory_bytes` of this budget, for things of one kind."""
        return Budget(memory_bytes, self.seconds, within=self)

    def take(self, nbytes: int, where: str, error: type[OrnithError] = CheckpointError) -> None:
        """Count `nbytes` that stay in memory.

        Raises:
            OrnithError: of the kind `error`, before they are asked of the machine.
        """
        if nbytes > self.memory_bytes:
            kind = "that is read" if self._within is None else "of its kind"
            raise error(
                f"{where}: would take {nbytes} bytes of memory, and {self.memory_bytes} are left for all {kind}; "
                "sound files need far less"
            )
        if self._within is not None:
            self._within.take(nbytes, where, error)
        self.memory_bytes -= nbytes

    @contextmanager
    def clock(self) -> Iterator[float]:
        """Count the time of a block; gives the seconds that are left for it, at least a millisecond."""
        began = time.monotonic()
        try:
            yield max(self.seconds, 1e-3)
        finally:
            self.seconds -= time.monotonic() - began


_CURRENT: ContextVar[Budget | None] = ContextVar("budget", default=None)


def budget() -> Budget:
    """The budget of the command or function that is running, or a new one where there is none."""
    return _CURRENT.get() or Budget()


@contextmanager
def one_budget(given: Budget | None = None) -> Iterator[None]:
    """Within this block everything is paid from one budget: `given`, else that of the block around, else a new one."""
    token = _CURRENT.set(given or budget())
    try:
        yield
    finally:
        _CURRENT.reset(token)


def budgeted(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, everything in a call of which is paid from one budget."""

    @functools.wraps(function)
    def paid(*arguments: P.args, **options: P.kwargs) -> R:
        with one_budget():
            return function(*arguments, **options)

    return paid
