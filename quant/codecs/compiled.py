"""numba: machine code that is kept on disk and never older than any file of the function's own folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from numba import njit
from numba.core import event


def compiled(function):
    """numba, cached on disk where there is a writable place for it (a read-only container has none).

    A kernel holds the code of the functions it calls, also of those in other files, while numba's cache asks only
    whether the kernel's own file has changed. Hence the stamp.
    """
    try:
        kernel = njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)
    index = kernel._cache._cache_file
    index._source_stamp = (index._source_stamp, _sources(Path(function.__code__.co_filename).parent))
    return kernel


@cache
def _sources(folder: Path) -> list[tuple[str, int]]:
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("*.py"))


@contextmanager
def compiling(tell: Callable[[str], None]) -> Iterator[None]:
    """Call tell(name) before machine code of the function `name` is made; what the disk has is not told.

    It takes seconds, once on a machine. The call comes from whichever thread needs the function first.
    """

    class Listener(event.Listener):
        def on_start(self, started: event.Event) -> None:
            tell(started.data["dispatcher"].py_func.__name__)

        def on_end(self, ended: event.Event) -> None:
            pass

    listener = Listener()
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
