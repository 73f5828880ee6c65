"""What kernels were started, while they run."""

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

MODULES = (combine, dswiglu, fp8_cast, gate_up, gguf_encode, grouped_wgrad, plan, project, routing)


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
