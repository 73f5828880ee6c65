"""`ornith-moe bench`: measure kernels, codecs, conversion and RL on this machine, beside what one would use instead."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ornith_moe.command.options import Json
from ornith_moe.command.terminal import print_json, progress_bar, say
from ornith_moe.quant.errors import OrnithError

if TYPE_CHECKING:
    from ornith_moe.bench.comparison import Verdict
    from ornith_moe.bench.rows import Row, Run
    from ornith_moe.bench.tasks import Settings

# A torch thread that waits spins for long by default; beside any other busy process that made a training step fifty
# times slower. Read when torch is imported, so they are set before.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


class Suite(StrEnum):
    """What can be measured."""

    moe = "moe"
    codecs = "codecs"
    convert = "convert"
    rl = "rl"


class Where(StrEnum):
    """Which device is measured."""

    cpu = "cpu"
    cuda = "cuda"


def bench(
    suite: Annotated[list[Suite] | None, typer.Option(help="Only this one; may be given again. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything: under 5 minutes on 2 cores.")] = False,
    device: Annotated[Where, typer.Option(help="What to measure.")] = Where.cpu,
    model: Annotated[
        list[str] | None, typer.Option(help="Experts of this model, cut to memory, instead of the usual ones.")
    ] = None,
    routing: Annotated[str, typer.Option(help="uniform, zipf, one-hot or a routing record in .npy.")] = "uniform",
    keyword: Annotated[str, typer.Option("-k", metavar="EXPRESSION", help="Rows by name, as pytest -k.")] = "",
    out: Annotated[Path | None, typer.Option(help="Of the JSON. Default: bench-DATE.json here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with figures here too.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="JSON|GITREF", help="Verdicts against a run, or a commit measured in turn."),
    ] = None,
    any_machine: Annotated[bool, typer.Option("--any-machine", help="Compare with another machine's run.")] = False,
    as_json: Json = False,
) -> None:
    """Measure kernels, codecs, conversion and RL here, each row checked first and beside its peers."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    from ornith_moe.bench.session import check_installed

    check_installed()
    from ornith_moe.bench.comparison import as_lines
    from ornith_moe.bench.rows import heading, table, to_json
    from ornith_moe.bench.tasks import SUITES, Settings

    settings = Settings(
        tuple(each.value for each in suite or ()) or SUITES, quick, device.value, tuple(model or ()), routing, keyword
    )
    path = out or Path(f"bench-{date.today().isoformat()}.json")
    run, verdicts = _compared(settings, path, compare, any_machine) if compare else (_measured(settings, path), [])
    if report:
        _write_report(run, report)
    if as_json:
        print_json(to_json(run) | ({"verdicts": [asdict(each) for each in verdicts]} if compare else {}))
    else:
        told = ["", *as_lines(verdicts)] if compare else []
        for line in [*heading(run), "", *table(run.rows), *told, "", f"Written to {path}."]:
            say(line)
    if run.red:
        names = "; ".join(f"{row.group}: {row.name}" for row in run.red[:3])
        raise OrnithError(
            f"bench: {len(run.red)} of {len(run.rows)} rows gave a wrong result and have no time: {names}"
        )


def _measured(settings: Settings, path: Path) -> Run:
    from ornith_moe.bench.session import run

    with progress_bar(counted=True) as progress:

        def told(row: Row, done: int, total: int) -> None:
            progress("rows", done, total)

        return run(settings, path, told)


def _compared(settings: Settings, path: Path, other: str, any_machine: bool) -> tuple[Run, list[Verdict]]:
    """Against a file, which is read before anything is measured, or against a commit."""
    from ornith_moe.bench.comparison import compare
    from ornith_moe.bench.in_turn import against_commit
    from ornith_moe.bench.rows import load, save

    if Path(other).suffix == ".json" or Path(other).is_file():
        then = load(Path(other))
        now = _measured(settings, path)
        return now, compare(then, now, any_machine=any_machine)
    with progress_bar(counted=True) as progress:
        now, verdicts = against_commit(other, settings, lambda done, of: progress("pairs", done, of))
    save(now, path)
    return now, verdicts


def _write_report(run: Run, path: Path) -> None:
    try:
        from ornith_moe.bench.report import write
    except ImportError as error:
        raise OrnithError(f"bench: --report needs {error.name}; pip install 'ornith-moe[bench]'") from None
    write(run, path)
