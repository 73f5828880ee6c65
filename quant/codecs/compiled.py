"""numba: machine code that is kept on disk and never older than any file of the function's own folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from numba import njit


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
def _sources(folder):
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("*.py"))
