"""A few threads that work through a list, with a bounded queue: results come in order, memory does not grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 4  # items of each thread, done or begun: whoever takes the results may stop for a while, as a disk does


def in_order(function: Callable[[T], R], items: Iterable[T], jobs: int) -> Generator[tuple[T, R]]:
    """(item, function(item)) for all items, at most AHEAD * `jobs` at a time; the first failure stops the rest."""
    with ThreadPoolExecutor(jobs) as pool:
        pending: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(function, item)))
                if len(pending) >= AHEAD * jobs:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()
