"""What a suite is made of, and how one task becomes rows: correct first, then timed in turn.

    tasks(settings) -> [Task]        a file bench_<suite>.py; inputs are made when the task runs, not before
    Task.prepare() -> Work           inputs, and a function per implementation that makes its call and its check
    rows_of(task, names, bench)      every implementation called once and checked; those that are right are timed

A wrong result makes its row red and leaves it without a time; the others of the task are timed all the same.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ornith_moe.bench.limits import Limits
from ornith_moe.bench.peers import Unable
from ornith_moe.bench.rows import Row
from ornith_moe.bench.timing import Call, Clock, Times, clock_of, control_of, interleave, peak_bytes
from ornith_moe.quant.errors import OrnithError

SUITES = ("moe", "codecs", "convert", "rl")
BUDGET_S, QUICK_BUDGET_S = 2.0, 0.5  # of the rounds of a task
TASK, ROUND = "task", "round"  # what a process that is one of two asks its turn for
Turn = Callable[[str], None]
SLOWEST_S = 150.0  # of a whole command that takes longer, the call that is checked is the only one and its time


@dataclass(frozen=True)
class Settings:
    """What a run was asked for; plain values, as they go into its file.

    Attributes:
        suites: of SUITES. `quick`: fewer and smaller tasks, for less time. `device`: "cpu" or "cuda".
        models: of shapes.MODELS, cut or not, instead of the usual ones. `routing`: instead of "uniform".
        keyword: as pytest's -k, over the ids of the rows.
    """

    suites: tuple[str, ...] = SUITES
    quick: bool = False
    device: str = "cpu"
    models: tuple[str, ...] = ()
    routing: str = "uniform"
    keyword: str = ""


@dataclass(frozen=True)
class Side:
    """One implementation, ready.

    Attributes:
        call: what is timed. check: of what it gives the error, or AssertionError. setup: precedes each call, untimed.
        used: of a call that runs in processes of its own, what those used so far; see process_tree.py.
    """

    call: Call
    check: Callable[[Any], float]
    setup: Call | None = None
    used: Callable[[], dict[str, float]] | None = None


@dataclass(frozen=True)
class Work:
    """A task with its inputs made.

    Attributes:
        sides: makes an implementation by name; raises Unable where it does not stand.
        nbytes, flops, dtype: least traffic, useful arithmetic and what is multiplied; see `limits`.
        limit: seconds and name of a limit of the task's own. `note`: of a row, from its name and its times.
    """

    sides: Mapping[str, Callable[[], Side]]
    nbytes: int
    flops: int = 0
    dtype: torch.dtype = torch.float32
    limit: tuple[float, str] | None = None
    note: Callable[[str, Times], str] = lambda name, times: ""


@dataclass(frozen=True)
class Task:
    """One task on one set of inputs.

    Attributes:
        names: implementations, and whether each is a peer.
        threads: of torch on a CPU while it runs; None: all.
        budget: more or less time than other tasks get.
    """

    suite: str
    group: str
    case: dict[str, Any]
    names: dict[str, bool]
    prepare: Callable[[], Work]
    threads: int | None = None
    budget: float = 1.0

    @property
    def id(self) -> str:
        """The case as one word, which -k reads."""
        return id_of(self)


def id_of(what: Task | Row) -> str:
    """The suite and the case as one word of what pytest's -k takes for one."""
    words = (f"T{value}" if key == "tokens" else str(value) for key, value in what.case.items())
    return re.sub(r"[^\w.+-]+", "-", "-".join([what.suite, *words]))


class Bench:
    """The device of a run: its clock, its limits and its control; `turn` is called before each task and each round."""

    def __init__(self, settings: Settings, clock: Clock | None = None, turn: Turn = lambda what: None) -> None:
        if settings.device == "cuda" and clock is None and not torch.cuda.is_available():
            raise OrnithError(
                "bench: --device cuda needs a CUDA or ROCm device, torch sees none; leave it out for the CPU"
            )
        self.settings, self.clock, self.turn = settings, clock or clock_of(settings.device), turn
        self.limits = Limits(self.clock)
        self.control = control_of(settings.device)
        self.budget_s = QUICK_BUDGET_S if settings.quick else BUDGET_S

    def rows_of(self, task: Task, names: Sequence[str]) -> list[Row]:
        """A row of `task` for each of `names`."""
        self.turn(TASK)
        before = torch.get_num_threads()
        torch.set_num_threads(task.threads or before)
        try:
            torch.manual_seed(0)
            return self._rows(task, names)
        finally:
            torch.set_num_threads(before)

    def _rows(self, task: Task, names: Sequence[str]) -> list[Row]:
        sides: dict[str, Side] = {}
        estimates: dict[str, float] = {}
        shared: dict[str, Any] = {"suite": task.suite, "group": task.group, "case": task.case}
        shared["device"] = self.settings.device
        try:
            work = task.prepare()
        except OrnithError:
            raise
        except Exception as error:  # the run goes on
            why = f"inputs: {_sentence(error)}"
            return [Row(name=name, peer=task.names[name], status="red", why=why, **shared) for name in names]
        told = {name: self._checked(name, work, sides, estimates) for name in names}
        calls = {name: side.call for name, side in sides.items()}
        setups = {name: side.setup for name, side in sides.items() if side.setup}
        once = {name: side for name, side in sides.items() if side.used and estimates[name] > SLOWEST_S}
        for name in once:
            del calls[name]
        times = interleave(
            calls, self.clock, budget_s=self.budget_s * task.budget, control=self.control, setups=setups,
            estimates=estimates, turn=lambda: self.turn(ROUND),
        )  # fmt: skip
        times |= {name: Times((estimates[name],), (self.clock.seconds(self.control),)) for name in once}
        for name, found in times.items():
            told[name] |= self._timed(name, work, found)
            if used := sides[name].used:
                told[name] |= {"used": used(), "peak_bytes": used().get("peak_rss_bytes")}
        return [Row(name=name, peer=task.names[name], **shared, **told[name]) for name in names]

    def _checked(self, name: str, work: Work, sides: dict[str, Side], estimates: dict[str, float]) -> dict[str, Any]:
        """Make an implementation and call it: its error and peak memory, or why it has no time.

        Once where it says itself what it used, else again, for the memory.
        """
        peak: int | None = None
        try:
            side = work.sides[name]()
            if side.setup:
                side.setup()
            given: list[Any] = []
            estimates[name] = self.clock.seconds(lambda: given.append(side.call()))
            error = side.check(given[0])
            if side.used is None:
                if side.setup:
                    side.setup()
                peak = peak_bytes(lambda: estimates.update({name: self.clock.seconds(side.call)}), self.settings.device)
        except Unable as unable:
            return {"status": unable.status, "why": unable.why}
        except AssertionError as error:
            return {"status": "red", "why": _sentence(error).removeprefix("AssertionError: ")}
        except Exception as error:
            return {"status": "red", "why": _sentence(error)}
        sides[name] = side
        return {"error": error, "peak_bytes": peak}

    def _timed(self, name: str, work: Work, times: Times) -> dict[str, Any]:
        limit_s, limit = work.limit or self.limits.seconds(work.nbytes, work.flops, work.dtype)
        told = {"bytes": work.nbytes, "flops": work.flops, "limit_s": limit_s, "limit": limit}
        return times.summary | told | {"note": work.note(name, times)}


def _sentence(error: Exception) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"
