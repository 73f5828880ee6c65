"""numba: machine code that is kept on disk and never older than any source it may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

Sources = list[tuple[str, int, int]]  # name, size and time of change of files
_HERE = Path(__file__).parent
_folders: dict[Any, set[Path]] = {}  # of every kernel: where the code that it may hold comes from


def compiled(function: Callable) -> Callable:
    """numba, cached on disk where there is a writable place for it (a read-only container has none).

    A kernel holds the code of the functions it calls, also of those in other files and folders, while numba asks only
    whether the kernel's own file has changed. Hence the stamp: all files of its own folder, of this one, and of the
    folders that the kernels in its module bring along.
    """
    folders = {Path(function.__code__.co_filename).parent, _HERE}
    folders.update(*(_folders[value] for value in list(function.__globals__.values()) if _is_kernel(value)))
    kernel = _cached(function, folders) or njit(nogil=True)(function)
    _folders[kernel] = folders
    return kernel


def _is_kernel(value: Any) -> bool:
    return hasattr(value, "py_func") and value in _folders


def _cached(function: Callable, folders: set[Path]) -> Callable | None:
    """The kernel, or None where this numba, or this machine, has no place for its code."""
    try:
        kernel = njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return None
    files = getattr(getattr(kernel, "_cache", None), "_cache_file", None)  # private: another numba may not have it
    if not all(hasattr(files, method) for method in ("load", "save", "flush")):
        return None
    kernel._cache._cache_file = StampedFiles(files, [s for folder in sorted(folders) for s in _sources(folder)])
    return kernel


class StampedFiles:
    """numba's files of one kernel, each with the sources that its code was made from.

    Code of other sources is not there, and neither is what cannot be read: a type in it whose module has moved, a file
    cut short. The stamp is in the file of the code, because numba writes the index first: after a process has been
    killed in between, a fresh index names old code.
    """

    def __init__(self, files: Any, sources: Sources) -> None:
        self.files, self.sources = files, sources

    def load(self, key: Any) -> Any:
        try:
            sources, code = self.files.load(key)
        except Exception:  # whatever unpickling raises; TypeError if there is none
            return None
        return code if sources == self.sources else None

    def save(self, key: Any, code: Any) -> None:
        try:
            self.files.save(key, (self.sources, code))
        except Exception:  # numba reads the old index first
            self.files.flush()
            self.files.save(key, (self.sources, code))

    def flush(self) -> None:
        self.files.flush()


@cache
def _sources(folder: Path) -> Sources:
    files = [(f"{folder.name}/{path.name}", path.stat()) for path in sorted(folder.glob("*.py"))]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]


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
