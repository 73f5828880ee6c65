"""What kernels were started, while they run."""

from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace

from ornith_moe import kernels
from ornith_moe.kernels import launch

_ALL = [import_module(f"{kernels.__name__}.{each.name}") for each in iter_modules(kernels.__path__)]
MODULES = tuple(module for module in _ALL if module is not launch and hasattr(module, "launch"))


def watch(monkeypatch, around=None):
    """A list that every launch joins with its label, kernel, reads, writes and other values, before it starts.

    `around(started, start)` runs in place of the launch and calls `start()`; what it puts into `started.values` is what
    the kernel gets.
    """
    every = []

    def spy(label, kernel, grid, *, reads, writes, **values):
        started = SimpleNamespace(label=label, kernel=kernel, reads=dict(reads), writes=dict(writes), values=values)
        every.append(started)

        def start():
            start_it(label, kernel, grid, reads=reads, writes=writes, **started.values)

        around(started, start) if around else start()

    start_it = launch.launch
    for module in MODULES:
        monkeypatch.setattr(module, "launch", spy)
    return every
