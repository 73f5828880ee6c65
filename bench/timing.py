"""Times of several implementations that take turns, with a control between them.

    round 1: A B C control    round 2: C B A control    round 3: A B C control    ...

A machine that slows down, or a neighbour that comes and goes, so meets every implementation alike, and the control,
`torch.mm` of a fixed size, shows that it did. Who takes longer than its share of the budget takes part in fewer rounds,
spread evenly over all. On a CPU each timed call of a short implementation follows an untimed one of its own, so that
it finds its own data in cache and not its neighbours', and calls of microseconds are timed several at a time. On a GPU
the L2 is overwritten before each call, and time is that between two events on the stream, as Triton's `do_bench` has
it. Garbage is not collected meanwhile.

Source: alternating orders against drift are the paired design of Kalibera and Jones, "Rigorous benchmarking in
reasonable time", ISMM 2013.
"""

import gc
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import torch

Call = Callable[[], object]
Ask = Callable[[list[str]], str]
FLUSHED_BYTES = 256 << 20  # twice the largest L2, a B200's
WARM_S = 0.02  # a shorter call gets an untimed one before it
SHORT_S = 2e-4  # calls are repeated until they take as long
LEAST, MOST = 5, 100  # rounds
LONG_S, LEAST_LONG = 0.3, 3  # least rounds of calls that take longer
SLOW_S, LEAST_SLOW = 45.0, 2


class Clock(Protocol):
    """Measures one device; `flushes`: calls find nothing in cache."""

    device: str
    flushes: bool

    def seconds(self, call: Call, repeat: int = 1) -> float:
        """Of one call, as a mean of `repeat`."""

    def state(self) -> dict[str, float]:
        """Clocks, power and temperature by name, as far as the device tells."""


class WallClock:
    """The CPU's: `time.perf_counter` around the call."""

    device, flushes = "cpu", False

    def seconds(self, call: Call, repeat: int = 1) -> float:
        began = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - began) / repeat

    def state(self) -> dict[str, float]:
        return {}


class CudaClock:
    """A GPU's: events around the call, after `flush` overwrote the L2.

    Args:
        cuda: `torch.cuda`, or what stands in for it in tests.
        flush: what overwrites the L2; default a buffer of FLUSHED_BYTES set to zero.
        ask: runs a command and gives its output; default nvidia-smi itself.
    """

    device, flushes = "cuda", True
    ASKED = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")  # MHz, MHz, W, degrees C

    def __init__(
        self, cuda: Any = torch.cuda, flush: Call | None = None, ask: Callable[[list[str]], str] | None = None
    ):
        if flush is None:
            flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda").zero_
        self.cuda, self.flush, self.ask = cuda, flush, ask or _output_of

    def seconds(self, call: Call, repeat: int = 1) -> float:
        began, ended = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        began.record()
        for _ in range(repeat):
            call()
        ended.record()
        ended.synchronize()  # the result is read
        return began.elapsed_time(ended) / 1e3 / repeat

    def state(self) -> dict[str, float]:
        """By the names of ASKED; empty where nvidia-smi is missing or does not know the card."""
        query = ["nvidia-smi", f"--query-gpu={','.join(self.ASKED)}", "--format=csv,noheader,nounits"]
        try:
            values = self.ask(query).splitlines()[self.cuda.current_device()].split(",")
            return {name: float(value) for name, value in zip(self.ASKED, values, strict=True)}
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return {}


def _output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def clock_of(device: str) -> Clock:
    """The clock of "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else WallClock()


def control_of(device: str) -> Call:
    """torch.mm as the control: 256^3 in FP32 on a CPU, 4096^3 in BF16 on a GPU; around a millisecond, or tenths."""
    size, dtype = (4096, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return lambda: torch.mm(a, b)


@dataclass(frozen=True)
class Times:
    """Seconds of each round an implementation took part in, and of the control in the same rounds."""

    seconds: tuple[float, ...]
    control: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def summary(self) -> dict[str, Any]:
        """The fields of a `Row` that these times fill."""
        cuts = quantiles(self.seconds, n=10, method="inclusive") if len(self.seconds) > 1 else [self.seconds[0]] * 9
        return {
            "median_s": cuts[4],
            "p20_s": cuts[1],
            "p80_s": cuts[7],
            "rounds": len(self.seconds),
            "seconds": tuple(float(f"{s:.5g}") for s in self.seconds),
            "control": tuple(float(f"{s:.5g}") for s in self.control),
        }


def interleave(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    budget_s: float,
    control: Call,
    setups: Mapping[str, Call] | None = None,
    estimates: Mapping[str, float] | None = None,
    turn: Call = lambda: None,
) -> dict[str, Times]:
    """Times of `calls`, which take turns for about `budget_s` seconds; every one has been called before, to be checked.

    `setups` run before each call of theirs, untimed; such a call gets no untimed one before it and is not repeated.
    `estimates` are rough seconds of calls, of which the long ones need not be measured again to plan their rounds.
    `turn` is called before each round.
    """
    setups, rough, each_s = setups or {}, estimates or {}, budget_s / max(1, len(calls))
    plans = {n: _Plan.of(call, clock, each_s, setups.get(n), rough.get(n, 0.0)) for n, call in calls.items()}
    total = max((plan.rounds for plan in plans.values()), default=0)
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    beside: dict[str, list[float]] = {name: [] for name in plans}
    clock.seconds(control)
    with no_collection():
        for number in range(total):
            names = [name for name, plan in plans.items() if plan.takes_part(number, total)]
            turn()
            for name in reversed(names) if number % 2 else names:
                seconds[name].append(plans[name].seconds(clock))
            control_s = clock.seconds(control)
            for name in names:
                beside[name].append(control_s)
    return {name: Times(tuple(seconds[name]), tuple(beside[name])) for name in plans}


@dataclass(frozen=True)
class _Plan:
    """How one implementation is timed: in how many rounds, how many calls in each."""

    call: Call
    setup: Call | None
    warm: bool
    repeat: int
    rounds: int

    @classmethod
    def of(cls, call: Call, clock: Clock, budget_s: float, setup: Call | None, rough: float) -> "_Plan":
        if setup and rough <= LONG_S:
            setup()
        once = rough if rough > LONG_S else max(clock.seconds(call), 1e-9)
        if setup or clock.flushes:
            warm, repeat = False, 1
        else:
            warm, repeat = once < WARM_S, max(1, min(1000, round(SHORT_S / once)))
        least = LEAST_SLOW if once > SLOW_S else LEAST_LONG if once > LONG_S else LEAST
        fitting = int(budget_s / (once * (repeat + warm)))
        return cls(call, setup, warm, repeat, max(least, min(MOST, fitting)))

    def takes_part(self, number: int, total: int) -> bool:
        return (number + 1) * self.rounds // total > number * self.rounds // total

    def seconds(self, clock: Clock) -> float:
        if self.setup:
            self.setup()
        if self.warm:
            self.call()
        return clock.seconds(self.call, self.repeat)


@contextmanager
def no_collection() -> Iterator[None]:
    """Without garbage collection, whose cost depends on what else was imported."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_bytes(call: Call, device: str) -> int | None:
    """How far one call raises the memory in use above what it is before; None where that cannot be told (not Linux).

    On a CPU the process's resident memory, all that ours keeps for reuse given back first; on a GPU torch's allocator.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    from ornith_moe.backend.cpu.memory import release

    release()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
        resident = _resident("VmRSS")
    except OSError:
        call()
        return None
    call()
    return max(_resident("VmHWM") - resident, 0)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10
