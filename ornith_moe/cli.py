"""`ornith-moe`: plan, convert, verify, inspect, compare, doctor.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 verification failed, 130 stopped by SIGINT or SIGTERM (a second one ends
it at once). A failure is one sentence on stderr, never a traceback; `--json` prints one object of strict JSON on stdout
and nothing else. Progress goes to stderr, and only to a terminal. What comes from files is printed as `shown`: a name
can neither move the cursor nor forge a line. A reader that stops reading, as `| head` does, is no failure.
The quantizing libraries are imported by the commands that need them, so `--help` and `plan` start at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ornith_moe.quant.errors import CheckpointError, OrnithError, VerificationError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n")[0]
)
WIDEST = 1 << 16  # columns of a table where no terminal limits them


class Stopped(BaseException):
    """SIGINT or SIGTERM; not KeyboardInterrupt, which typer ends without a word."""


class _Out(Console):
    """stdout as plain text: no markup, no emoji, no truncation where it is no terminal."""

    def on_broken_pipe(self) -> None:
        _reader_gone()


out = _Out(markup=False, emoji=False, highlight=False, width=None if os.isatty(1) else WIDEST)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)


class Mtp(StrEnum):
    """What to do with multi-token-prediction tensors."""

    keep = "keep"
    drop = "drop"


class Device(StrEnum):
    """Where a conversion encodes; the bytes are the same."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def parse_size(text: str | int) -> int:
    """Bytes of "2GiB", "500 MB" or "1000000"; typer.BadParameter otherwise."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]i?)?B?\s*", str(text), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"expected a size such as 2GiB or 500MB, got {str(text)[:64]!r}")
    unit = (found[2] or "").upper()
    power = " KMGT".index(unit[0]) if unit else 0
    return int(float(found[1]) * (1024 if unit.endswith("I") else 1000) ** power)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
To = Annotated[
    list[str], typer.Option("--to", metavar="BUILD", help="fp8-channel, fp8-block, bf16 or gguf:TYPE; repeat for more.")
]
MtpOption = Annotated[Mtp | None, typer.Option(help="Insist on the MTP tensors, or leave them out. Default: as found.")]
Source = Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder, or hf://org/name[@revision].")]
MaxShard = Annotated[int, typer.Option(metavar="SIZE", parser=parse_size, help="Largest safetensors shard.")]
TokenizerPre = Annotated[
    str | None, typer.Option(metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where it is not recognized.")
]


@app.command()
def plan(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Checkpoint folder, config .json, preset or hf://org/name.")
    ],
    to: To,
    mtp: MtpOption = None,
    max_shard_size: MaxShard = "5GB",
    as_json: Json = False,
) -> None:
    """Exact tensors and bytes of each build, from headers or a config alone, before anything is written."""
    from ornith_moe.quant.builds import iterate_dtypes, plan_build, plan_json
    from ornith_moe.quant.hub import open_any
    from ornith_moe.quant.layout import shard_tensors

    opened = open_any(source, mtp=mtp, config_only=True)
    plans = [plan_build(opened, build) for build in to]
    files = [1 if plan.is_gguf else len(shard_tensors(plan.tensors, max_shard_size)) for plan in plans]
    if as_json:
        print_json(
            {"builds": [plan_json(*pair) for pair in zip(plans, files, strict=True)], "notes": list(opened.notes)}
        )
        return
    table = Table()
    for column in ("build", "tensors", "bytes", "files", "bits/weight", "max TP"):
        table.add_column(column, no_wrap=True, justify="left" if column == "build" else "right")
    table.add_column("stored as")
    weights = sum(math.prod(weight.shape) for weight in opened.weights)
    for plan, count in zip(plans, files, strict=True):
        kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, _, size in iterate_dtypes(plan))
        bits = f"{8 * plan.tensor_bytes / weights:.2f}"
        ranks = str(plan.max_tensor_parallel or "-")
        table.add_row(plan.build, f"{len(plan.tensors):,}", f"{plan.tensor_bytes:,}", str(count), bits, ranks, kinds)
    say(opened.name)
    out.print(table)
    for note in [*opened.notes, *(note for plan in plans for note in [*plan.notes, *plan.fallbacks])]:
        say(f"- {note}")


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the builds.")],
    to: To,
    jobs: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; default all cores.")] = None,
    max_memory: Annotated[
        int, typer.Option(metavar="SIZE", parser=parse_size, help="Memory the process may hold.")
    ] = "2GiB",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished conversion.")] = False,
    mtp: MtpOption = None,
    max_shard_size: MaxShard = "5GB",
    tokenizer_pre: TokenizerPre = None,
    device: Annotated[
        Device, typer.Option(help="Encode FP8, Q8_0, Q4_K, Q5_K and Q6_K on a GPU, CUDA or ROCm, where there is one.")
    ] = Device.auto,
    as_json: Json = False,
) -> None:
    """Write every build in one pass over the checkpoint."""
    from ornith_moe.quant.convert import PARTIAL
    from ornith_moe.quant.convert import convert as run
    from ornith_moe.quant.hub import open_any

    opened = open_any(source, mtp=mtp)
    from ornith_moe.gpu_encoders import choose_device, gpu_encoders  # torch: after all that can fail at once

    where, _ = choose_device(device)
    with _resumable(target / PARTIAL), progress_bar() as progress:
        report = run(
            opened,
            target,
            to,
            jobs=jobs,
            max_memory=max_memory,
            resume=resume,
            max_shard_bytes=max_shard_size,
            tokenizer_pre=tokenizer_pre,
            encoders=gpu_encoders(where) if where == "cuda" else None,
            progress=progress,
        )
    if as_json:
        builds = [
            {
                "build": build.build,
                "path": str(build.path),
                "files": build.files,
                "tensors": build.tensors,
                "tensor_bytes": build.tensor_bytes,
                "seconds": build.seconds,
            }
            for build in report.builds
        ]
        print_json(
            {
                "builds": builds,
                "device": where,
                "bytes_read": report.bytes_read,
                "peak_rss_bytes": report.peak_rss_bytes,
                "resumed_units": report.resumed_units,
                "notes": list(opened.notes),
            }
        )
        return
    say(f"{opened.name}: read {report.bytes_read:,} bytes once")
    table = Table("build", "path", "tensors", "bytes")
    for build in report.builds:
        table.add_row(build.build, shown(build.path), f"{build.tensors:,}", f"{build.tensor_bytes:,}")
    out.print(table)
    seconds = max(build.seconds for build in report.builds)
    out.print(f"{seconds:.1f} s, {report.bytes_read / 1e6 / max(seconds, 1e-9):.0f} MB/s of source, "
              f"peak memory {report.peak_rss_bytes / 2**20:.0f} MiB")  # fmt: skip


@app.command()
def verify(
    build: Annotated[str, typer.Argument(metavar="BUILD", help="Folder of safetensors, or .gguf file.")],
    against: Annotated[
        str | None, typer.Option(metavar="SRC", help="Compare every weight with this checkpoint.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hashes, names, shapes and error per role of a finished build."""
    from ornith_moe.quant.hub import open_any
    from ornith_moe.quant.verify import build_has_mtp, verification_json
    from ornith_moe.quant.verify import verify as run

    opened = None
    if against is not None:
        opened = open_any(against, mtp=None)
        if opened.has_mtp and not build_has_mtp(build):
            opened = open_any(against, mtp="drop")
    with progress_bar() as progress:
        result = run(build, opened, progress=progress)
    if as_json:
        print_json(verification_json(result))
    else:
        table = Table("role", "SQNR dB", "largest error")
        for role, error in result.roles.items():
            sqnr = "none" if error["sqnr_db"] is None else f"{error['sqnr_db']:.2f}"
            table.add_row(role, "exact" if error["exact"] else sqnr, f"{error['max_abs_error']:.3g}")
        say(f"{build}: {result.build}, {result.tensors:,} tensors")
        if result.roles:
            out.print(table)
        for note in result.notes:
            say(f"- {note}")
        if result.ok:
            compared = (
                f"{len(result.roles)} roles compared with {against}" if result.roles else "not compared with a source"
            )
            say(f"ok: {result.tensors:,} tensors, {compared}")
    if not result.ok:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        problem = result.problems[0].removeprefix(f"{Path(build).name}: ")
        where = "" if problem.startswith((f"{Path(build)}: ", f"{Path(build)}{os.sep}")) else f"{build}: "
        raise VerificationError(f"{where}{problem}{more}")


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="FILE|DIR", help="A checkpoint, a build, a .safetensors or .gguf file.")
    ],
    as_json: Json = False,
) -> None:
    """What a file or folder holds, from its headers."""
    from ornith_moe.quant.inspect import inspect as run

    found = run(path)
    if as_json:
        print_json(found)
        return
    say(f"{path}: {found['kind']}, {found['tensors']:,} tensors")
    table = Table("dtype", "tensors", "bytes")
    for dtype, entry in found["dtypes"].items():
        table.add_row(dtype, f"{entry['tensors']:,}", f"{entry['bytes']:,}")
    out.print(table)
    for key, value in found["metadata"].items():
        say(f"{key}: {value}")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference: a folder, usually the BF16 source.")],
    b: Annotated[str, typer.Argument(metavar="B", help="A build of it: a folder, or a .gguf file.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to compare on; default: Python's help.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, max=10_000, help="Windows of 256 tokens, 16 positions in each.")] = 8,
    as_json: Json = False,
) -> None:
    """KL divergence, top-1 agreement and perplexity of B against A, each run by its own client."""
    from dataclasses import asdict

    from ornith_moe.compare import compare as run
    from ornith_moe.compare import encode, held_out_windows, open_client, read_text

    folder = next((path for path in (a, b) if Path(path).is_dir()), None)
    if folder is None:
        raise CheckpointError(f"{a}: expected A or B to be a Hugging Face folder, whose tokenizer cuts the text")
    try:
        tokens = held_out_windows(encode(folder, read_text(text)), windows=windows)
        with open_client(a) as first, open_client(b) as second:
            found = run(first, second, tokens)
    except ValueError as error:  # a text too short, or a tokenizer that knows more tokens than the model
        raise CheckpointError(f"{a} and {b} on {text or 'the default text'}: {error}") from None
    if as_json:
        print_json(asdict(found))
        return
    say(f"{a} and {b}")
    table = Table("", "A", "B")
    table.add_row("client", shown(found.client_a), shown(found.client_b))
    table.add_row("perplexity", f"{found.perplexity_a:.3f}", f"{found.perplexity_b:.3f}")
    table.add_row("KL(A || B), nats per token", "", f"{found.kl_mean:.6f} (largest {found.kl_max:.4f})")
    table.add_row("same likeliest token", "", f"{found.top1:.1%} of {found.positions} positions")
    out.print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, and which backend each op will use."""
    from ornith_moe.doctor import examine

    found = examine()
    if as_json:
        print_json(found)
        return
    for title, rows in found.items():
        table = Table(title=title, show_header=False, title_justify="left")
        for key, value in rows.items():
            table.add_row(key, shown(value))
        out.print(table)


def shown(value: object) -> str:
    """`value` as one line that cannot move the cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


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
def _resumable(partial: Path) -> Iterator[None]:
    """A conversion that is stopped once it has begun to write says how to go on."""
    try:
        yield
    except Stopped:
        raise Stopped("stopped; --resume goes on" if partial.is_dir() else "stopped") from None


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callback that draws one bar per phase with rate and time left; silent when stderr is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal
    ) as bar:
        tasks: dict[str, Any] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield update


def _stop(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise Stopped("stopped")


def main() -> None:
    """Entry point: turns every expected failure into one sentence and an exit code."""
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


def _fail(reason: object, code: int) -> NoReturn:
    err.print(shown(f"ornith-moe: {reason}"), style="red", soft_wrap=True)
    sys.exit(code)
