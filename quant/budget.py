"""What input that nobody vouches for may cost: bytes of memory and seconds, counted down as a reader spends them.

A file of a few hundred kilobytes can ask for gigabytes: a count in a header, 20,000 patterns of a recipe, a thousand
side files that are each within their limit. So limits on single things are not enough; whoever reads more than one
holds a `Budget` and takes each cost from it before paying.

Example:
    >>> budget = Budget(memory_bytes=1 << 20)
    >>> budget.take(1 << 19, "index.json")
    >>> budget.take(1 << 20, "index.json")
    Traceback (most recent call last):
    ornith_moe.quant.errors.CheckpointError: index.json: would take 1048576 bytes of memory, and 524288 are left ...
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ornith_moe.quant.errors import CheckpointError, OrnithError

MEMORY_BYTES = 1 << 30  # the tables of the largest checkpoint of the family take a tenth of it
SECONDS = 5.0


@dataclass
class Budget:
    """Memory and time that are left; `error` is what is raised when they are not."""

    memory_bytes: int = MEMORY_BYTES
    seconds: float = SECONDS
    error: type[OrnithError] = CheckpointError

    def take(self, nbytes: int, where: str) -> None:
        """Count `nbytes` that stay in memory.

        Raises:
            OrnithError: of the kind `error`, before they are asked of the machine.
        """
        if nbytes > self.memory_bytes:
            raise self.error(
                f"{where}: would take {nbytes} bytes of memory, and {self.memory_bytes} are left for all of its kind; "
                "a sound one needs far less"
            )
        self.memory_bytes -= nbytes

    @contextmanager
    def clock(self) -> Iterator[float]:
        """Count the time of a block; gives the seconds that are left for it, at least a millisecond."""
        began = time.monotonic()
        try:
            yield max(self.seconds, 1e-3)
        finally:
            self.seconds -= time.monotonic() - began
