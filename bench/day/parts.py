"""A day of parts, each within its seconds; a row is on disk as soon as it is known, and nothing takes the rest with it.

    task      gives rows; what it raises is a red row with a sentence
    part      its tasks in order, until its seconds are over: what is left then are rows that say so
    day       its parts in order, each in a process of its own

A kernel that reads beyond its memory ends every later call of its process on a GPU, and one that never ends keeps it
for good. So a part is worked by a child: one that has lost its device leaves, and another goes on behind the task that
lost it; one that outlives its seconds is killed. Children are forked, which costs no import, from a parent that never
touches the device.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ornith_moe.bench import rows
from ornith_moe.bench.rows import Row, Run
from ornith_moe.quant.errors import brief

GRACE_S = 15.0  # that a task may take beyond the seconds of its part before its process is killed
LOST = 3  # exit code of a child whose device answers no more

Now = Callable[[], float]


class Task(NamedTuple):
    """One thing to find out: `run` gives its rows. The rest names the row of one that could not."""

    group: str
    name: str
    run: Callable[[], Iterable[Row]]
    case: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Part:
    """Tasks that belong together. `letter` is for --only; `tasks` touches the device and makes no work of its own."""

    letter: str
    suite: str
    title: str
    seconds: float
    tasks: Callable[[Any, Journal], Iterator[Task]]


@dataclass
class Journal:
    """The run on disk: every change is written at once."""

    run: Run
    path: Path
    said: Callable[[str], None] = field(default=lambda line: None)

    def add(self, row: Row) -> None:
        self.run.rows.append(row)
        self.said(told(row))
        self.save()

    def save(self) -> None:
        rows.save(self.run, self.path)

    def reload(self) -> None:
        """What a child has written since."""
        self.run = rows.load(self.path)

    @property
    def at(self) -> dict[str, Any]:
        """The task that is being worked, or was when its process ended: part, number, group, name."""
        return self.run.settings.get("at", {})

    def begin(self, part: Part, number: int, task: Task) -> None:
        self.run.settings["at"] = {"part": part.letter, "number": number, "group": task.group, "name": task.name}
        self.save()


def told(row: Row) -> str:
    """A row as a line of the log."""
    value = row.why if row.median_s is None else f"{row.median_s * 1e6:,.1f} us"
    return f"{row.status:8}{row.suite}: {row.group}, {row.name}: {value}{'; ' + row.note if row.note else ''}"


def sentence(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return brief(f"{type(error).__name__}: {text[0]}" if text else type(error).__name__, 300)


def work(
    part: Part, machine: Any, journal: Journal, deadline: float, *, first: int = 0, now: Now = time.monotonic
) -> bool:
    """Work the tasks of a part from number `first` on; False where the device was lost, and the next task may have it.

    After `deadline`, in seconds of `now`, the rest are rows that were not measured.
    """
    tasks = part.tasks(machine, journal)
    number = -1
    while True:
        number += 1
        try:
            task = next(tasks)
        except StopIteration:
            return True
        except Exception as error:  # of the part, not of a task
            journal.add(failed(part, Task(part.title, "the part itself", lambda: ()), sentence(error)))
            return True
        if number < first:
            continue
        if now() >= deadline:
            why = f"the {part.seconds:.0f} s of part {part.letter} were over"
            journal.add(failed(part, task, why, "skipped"))
            continue
        journal.begin(part, number, task)
        try:
            for row in task.run():
                journal.add(row)
        except Exception as error:  # whatever it is, the day goes on
            journal.add(failed(part, task, sentence(error)))
            if not machine.answers():
                return False


def failed(part: Part, task: Task, why: str, status: str = "red") -> Row:
    """The row of a task that gave none."""
    return Row(part.suite, task.group, task.name, peer=False, status=status, why=why, case=dict(task.case))


def supervise(
    part: Part, make_machine: Callable[[], Any], journal: Journal, seconds: float, *, now: Now = time.monotonic,
    grace_s: float = GRACE_S,
) -> None:  # fmt: skip
    """Work a part in children, until it is done or its seconds are over."""
    context = multiprocessing.get_context("fork")
    deadline, first = now() + seconds, 0
    while True:
        journal.run.settings["at"] = {}
        journal.save()
        child = context.Process(target=_child, args=(part, make_machine, journal, deadline, first, now))
        child.start()
        child.join(max(0.0, deadline + grace_s - now()))
        if child.is_alive():
            child.kill()
            child.join()
        journal.reload()
        if child.exitcode == 0:
            return
        at = journal.at
        task = Task(at.get("group", part.title), at.get("name", "the part itself"), lambda: ())
        if child.exitcode != LOST:
            overrun = now() >= deadline
            why = "it did not end and was killed" if overrun else f"its process ended with exit code {child.exitcode}"
            journal.add(failed(part, task, why))
            if overrun or not at:
                return
        first = at["number"] + 1


def _child(
    part: Part, make_machine: Callable[[], Any], journal: Journal, deadline: float, first: int, now: Now
) -> None:
    try:
        machine = make_machine()
    except Exception as error:
        task = Task(part.title, "the machine", lambda: ())
        journal.add(failed(part, task, sentence(error)))
        return
    if not work(part, machine, journal, deadline, first=first, now=now):
        raise SystemExit(LOST)


def shared_out(parts: Iterable[Part], budget: float) -> dict[str, float]:
    """Seconds of each part, by its letter: its own, less in proportion where together they exceed `budget`."""
    own = {part.letter: part.seconds for part in parts}
    factor = min(1.0, budget / (sum(own.values()) or 1.0))
    return {letter: seconds * factor for letter, seconds in own.items()}
