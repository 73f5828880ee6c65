"""Where a kernel runs: on the device of its tensors, or nowhere, onto a list.

Every kernel of this folder starts through `launch`, and asks `target` what it starts on. Inside `recording("sm90")` the
same launchers run on meta tensors of any size, allocate nothing and fill a list with what they would have started. That
list is what `ornith-moe kernels` compiles and models, so what is examined is what a trainer runs. Inside `timing()`
they start as ever, between two events, and the list gets the time of each.

Contraction to fused multiply-add is off for every kernel: `ornith_moe.quant.fp8` and the CPU know none. Where one is
wanted, it is written `tl.fma`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Target:
    """What a kernel is tuned for: an architecture ("sm90", "gfx950") and its number of processors (SMs, CUs)."""

    arch: str
    processors: int

    @property
    def tma(self) -> bool:
        """Whether the hardware copies tiles: NVIDIA's from sm90 on, and the interpreter, which imitates it."""
        return not self.arch.startswith("gfx") and not (self.arch.startswith("sm") and int(self.arch[2:]) < 90)


TARGETS = {  # L40S, H100 SXM, B200, MI300X, MI355X
    name: Target(name, processors)
    for name, processors in {"sm89": 142, "sm90": 132, "sm100": 148, "gfx942": 304, "gfx950": 256}.items()
}
_INTERPRETER = Target("interpreter", 2)  # what it costs is the number of programs


@dataclass(frozen=True)
class Product:
    """What a launch multiplies, for `examine.model`: an [m, k] by a [k, n] of each expert, one tile after another.

    Attributes:
        size: m, n, k; None is the rows of the expert.
        tile: rows, columns and depth of one step of a program.
        operands: parameters that are loaded tile by tile, [m, k] first.
        unit_bytes: of an operand as the matrix unit multiplies it.
        gathered: how many slots read each row of a parameter, at different times.
        of_experts: parameters [E, ...] of which only experts with rows are read, and what share of their columns.
        first: where those columns begin.
    """

    size: tuple[int | None, int | None, int | None]
    tile: tuple[int, int, int]
    operands: tuple[str, str]
    unit_bytes: int
    gathered: dict[str, int]
    of_experts: dict[str, float]
    first: int = 0


@dataclass(frozen=True)
class Launch:
    """One recorded start: `arguments` by parameter name, constants included; `options` are num_warps and num_stages.

    `reads` and `writes` name the arguments that point to memory; what is updated in place is in both.
    """

    label: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    reads: frozenset[str]
    writes: frozenset[str]
    product: Product | None


_recorded: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Collect launches for `arch` instead of starting them; operands are meta tensors."""
    launches: list[Launch] = []
    token = _recorded.set((TARGETS[arch], launches))
    try:
        yield launches
    finally:
        _recorded.reset(token)


@dataclass(frozen=True)
class Time:
    """What one launch took on the device."""

    label: str
    seconds: float


class _WallClock:
    """An event of the interpreter, where a launch has ended when it returns."""

    def record(self) -> None:
        self.at = perf_counter()

    def elapsed_time(self, end: _WallClock) -> float:
        return 1e3 * (end.at - self.at)


_timed: ContextVar[list[tuple[str, Any, Any]] | None] = ContextVar("timed", default=None)


@contextmanager
def timing() -> Iterator[list[Time]]:
    """Time each launch of this thread by an event before and one after it on the current stream.

    The list is filled when the block ends, which waits for the device. A launch that the device had to wait for is
    timed with its wait: let the stream sleep first (`torch.cuda._sleep`), so that all launches of the block are queued
    when the first one starts. Autograd runs a backward on a GPU in a thread of its own, whose launches are not seen.

    Example:
        >>> with timing() as times:
        ...     build_plan(indices, experts, 64)
        >>> [time.label for time in times]
        ['plan count', 'plan scan', 'plan place']
    """
    times: list[Time] = []
    events: list[tuple[str, Any, Any]] = []
    token = _timed.set(events)
    try:
        yield times
    finally:
        _timed.reset(token)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times += [Time(label, start.elapsed_time(end) / 1e3) for label, start, end in events]


def _event() -> Any:
    interpreted = triton.knobs.runtime.interpret
    return _WallClock() if interpreted else torch.cuda.Event(enable_timing=True)


def target(device: torch.device) -> Target:
    """The target of kernels for tensors on `device`."""
    recorded = _recorded.get()
    if recorded:
        return recorded[0]
    return _INTERPRETER if triton.knobs.runtime.interpret else _of_device(device.index or 0)


@cache
def _of_device(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target(f"sm{properties.major}{properties.minor}", properties.multi_processor_count)


def launch(
    label: str, kernel: Any, grid: tuple[int, ...], *, reads: Mapping[str, Any], writes: Mapping[str, Any],
    product: Product | None = None, num_warps: int = 4, num_stages: int = 3, **values: Any,
) -> None:  # fmt: skip
    """Start `kernel` on `grid`, timed or not, or record it. `label` names this use of the kernel, say "gate_up fp8".

    `reads` and `writes` are the tensors (None where a kernel takes none) by the parameters that they go to, `values`
    all other arguments.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    arguments = {**reads, **writes, **values}
    recorded = _recorded.get()
    if recorded:
        arguments = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        start = Launch(label, kernel, grid, arguments, options, frozenset(reads), frozenset(writes), product)
        recorded[1].append(start)
    elif grid[0]:
        timed = _timed.get()
        if timed is None:
            kernel[grid](**arguments, **options, enable_fp_fusion=False)
            return
        start, end = _event(), _event()
        start.record()
        kernel[grid](**arguments, **options, enable_fp_fusion=False)
        end.record()
        timed.append((label, start, end))
