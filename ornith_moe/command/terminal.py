"""What the command prints: text and tables on stdout, progress and errors on stderr, JSON by itself.

What comes from files is printed as `shown`: a name can neither move the cursor nor forge a line. A reader that stops
reading, as `| head` does, is no failure. Progress is drawn on a terminal only.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console

LONGEST_LINE = 2_000  # characters of a message
WIDEST = 1 << 16  # columns of a table where no terminal limits them


class _Out(Console):
    """stdout as plain text: no markup, no emoji, no truncation where it is no terminal."""

    def on_broken_pipe(self) -> None:
        _reader_gone()


out = _Out(markup=False, emoji=False, highlight=False, width=None if os.isatty(1) else WIDEST)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)


class Stopped(BaseException):
    """SIGINT or SIGTERM; not KeyboardInterrupt, which typer ends without a word."""


def shown(value: object) -> str:
    """`value` as one line that cannot move the cursor, the middle of a very long one left out."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 500]} ... {text[-400:]}"


def say(text: str) -> None:
    """One line of text, never wrapped: a word that begins a line could pass for one of ours."""
    out.print(shown(text), soft_wrap=True)


def print_json(value: Any) -> None:
    """One object of strict JSON; an infinity or a NaN, which JSON lacks, becomes its name."""
    try:
        sys.stdout.write(json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _reader_gone()


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _reader_gone() -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered must not fail at exit
    sys.exit(0)


@contextmanager
def progress_bar(counted: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A callback that draws one bar per phase with time left, and the rate in bytes or, `counted`, how many are done;
    silent when stderr is no terminal. ("retry", n, 0) notes that blocks of "fetch" were asked for again, n times."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    amount = MofNCompleteColumn() if counted else TransferSpeedColumn()
    with Progress(*columns, amount, TimeRemainingColumn(), console=err, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase == "compile":
                if phase not in tasks and err.is_terminal:
                    tasks[phase] = None
                    bar.console.print("compile  machine code of the codecs, kept for the next run")
                return
            if phase == "retry":
                bar.update(tasks["fetch"], description=f"fetch, {done} again")
                return
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield update
