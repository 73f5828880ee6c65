"""`ornith-moe`: plan, convert, imatrix, sensitivity, verify, inspect, compare, card, kernels, bench, doctor.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 verification failed, 130 stopped by SIGINT or SIGTERM (a second one ends
it at once). A failure is one sentence on stderr, never a traceback; `--json` prints one object of strict JSON on stdout
and nothing else; how things are printed is command/terminal.py. A command is a file of command/, which imports what
quantizes when it runs, so `--help` and `plan` start at once.
"""

from __future__ import annotations

import atexit
import gc
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ornith_moe.command.bench import bench
from ornith_moe.command.card import card
from ornith_moe.command.compare import compare
from ornith_moe.command.convert import convert
from ornith_moe.command.doctor import doctor
from ornith_moe.command.imatrix import imatrix
from ornith_moe.command.inspect import inspect
from ornith_moe.command.kernels import kernels
from ornith_moe.command.plan import plan
from ornith_moe.command.sensitivity import sensitivity
from ornith_moe.command.terminal import Stopped, err, shown
from ornith_moe.command.verify import verify
from ornith_moe.quant.budget import one_budget
from ornith_moe.quant.errors import BRIEF, OrnithError, brief

_UsageError: Any = typer.BadParameter.__base__  # typer has no public name for it


class BriefUsage(TyperGroup):
    """Commands that pay for all they read from one budget, and whose usage errors, which repeat what was typed, stay
    one readable line."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with self._brief():
            return super().make_context(*arguments, **options)

    def invoke(self, *arguments: Any, **options: Any) -> Any:  # makes the context of the command that was chosen
        with self._brief(), one_budget():
            return super().invoke(*arguments, **options)

    @staticmethod
    @contextmanager
    def _brief() -> Iterator[None]:
        try:
            yield
        except _UsageError as error:
            error.message = shown(re.sub(rf"\S{{{BRIEF},}}", lambda word: brief(word[0]), error.message))
            raise


app = typer.Typer(
    cls=BriefUsage,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(__doc__ or "").split("\n")[0],
)


for command in (plan, convert, imatrix, sensitivity, verify, inspect, compare, card, kernels, bench, doctor):
    app.command()(command)


def _stop(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise Stopped("stopped")


def main() -> None:
    """Entry point: turns every expected failure into one sentence and an exit code."""
    atexit.register(_spare_the_search)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
            signal.signal(number, _stop)
    try:
        app()
    except OrnithError as error:
        _fail(error, error.exit_code)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error, 1)
    except Stopped as stopped:
        _fail(stopped, 130)


def _spare_the_search() -> None:
    """Python ends by looking for cycles among all objects, 0.3 s once numba is loaded; nanobind would tell of leaks."""
    if not {"triton", "mlx"} & sys.modules.keys():
        gc.freeze()


def _fail(reason: object, code: int) -> NoReturn:
    err.print(shown(f"ornith-moe: {reason}"), style="red", soft_wrap=True)
    sys.exit(code)
