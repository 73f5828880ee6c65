"""What kernels were started, while they run; and what they compile to."""

from types import SimpleNamespace

from ornith_moe.kernels import (
    combine,
    dswiglu,
    fp8_cast,
    gate_up,
    gguf_encode,
    grouped_wgrad,
    launch,
    plan,
    project,
    routing,
)
from ornith_moe.kernels.examine.compile import PROCESSORS, compile_launches

MODULES = (combine, dswiglu, fp8_cast, gate_up, gguf_encode, grouped_wgrad, plan, project, routing)
FORMS = tuple(arch for arch in PROCESSORS if arch != "sm89")  # which runs sm90's form where nothing is multiplied


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


def compiled(arch, launches):
    """[(launch, report), ...] of what `launches(arch)` records."""
    started = launches(arch)
    return list(zip(started, compile_launches([(arch, one) for one in started]), strict=True))
