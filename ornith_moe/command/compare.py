"""`ornith-moe compare`: how builds answer, against their source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ornith_moe.command.options import Json
from ornith_moe.command.terminal import Stopped, out, print_json, progress_bar, say, shown
from ornith_moe.quant.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from ornith_moe.streamed import BuildFigures, StreamedComparison

STATE = ".ornith-compare"


def compare(
    source: Annotated[str, typer.Argument(metavar="SRC", help="What the builds were made from.")],
    builds: Annotated[list[str], typer.Argument(metavar="BUILD...", help="Folders and .gguf files.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to compare on; default: Python's help.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, max=10_000, help="Windows of 256 tokens.")] = 8,
    client: Annotated[
        bool,
        typer.Option("--client", help="Run SRC and one BUILD whole, each by its own client, 16 positions a window."),
    ] = False,
    state: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the activations, gone when it is done.")
    ] = Path(STATE),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was interrupted.")] = False,
    as_json: Json = False,
) -> None:
    """KL divergence, top-1 agreement and perplexity of builds against SRC, one layer of one model in memory at a time.

    Stored weights are compared: activations are not quantized, whatever an engine would do to them.
    """
    from dataclasses import asdict

    if client:
        _compare_clients(source, builds, text, windows, as_json)
        return
    from ornith_moe.clients import require
    from ornith_moe.quant.opening import open_any

    require("torch", "hf")
    from ornith_moe.candidates import open_candidate
    from ornith_moe.streamed import compare_streamed

    opened = open_any(source, mtp="drop")
    opened.require("a comparison")
    with text_refused(source, text):
        tokens = windows_of(opened.folder, text, windows)
        candidates = [open_candidate(build, opened) for build in builds]
        with _going_on(state), progress_bar(counted=True) as progress:
            found = compare_streamed(opened, candidates, tokens, state=state, resume=resume, progress=progress)
    if as_json:
        print_json(asdict(found))
    else:
        _print(found)


@contextmanager
def text_refused(source: str, text: Path | None) -> Iterator[None]:
    """A text too short, or a tokenizer that knows more tokens than the model."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{source} on {text or 'the default text'}: {error}") from None


@contextmanager
def _going_on(state: Path) -> Iterator[None]:
    """A comparison that is stopped once it has begun says how to go on."""
    try:
        yield
    except Stopped:
        begun = state.is_dir()
        raise Stopped("stopped; the same command with --resume goes on" if begun else "stopped") from None


def windows_of(folder: Path, text: Path | None, windows: int):  # type: ignore[no-untyped-def]  # numpy is not imported yet
    """int64 [W, L] of the text in a file, or of Python's help, as the tokenizer in `folder` reads it."""
    from ornith_moe.clients import encode
    from ornith_moe.compare import begin_windows, held_out_windows, read_text

    return begin_windows(folder, held_out_windows(encode(folder, read_text(text)), windows=windows))


def _print(found: StreamedComparison) -> None:
    say(f"{found.source}: perplexity {found.perplexity:.3f} at {found.positions} positions of {found.windows} windows")
    table = Table(
        "build", "KL, nats", "99 %", "largest", "top-1", "perplexity", "its log", "activations", "other experts"
    )
    for build in found.builds:
        table.add_row(
            shown(Path(build.build).name),
            _with_error(build.kl_mean, build.kl_mean_se, 6),
            f"{build.kl_p99:.5f}",
            f"{build.kl_max:.4f}",
            _with_error(100 * build.top1, build.top1_se and 100 * build.top1_se, 1) + " %",
            f"{build.perplexity:.3f}",
            _with_error(build.log_perplexity_change, build.log_perplexity_change_se, 5),
            *_where(build),
        )
    out.print(table)
    say("+-: standard errors over windows. activations: their error after the last layer, and which layer added most.")
    say("experts: those that the source chose for a token and the build does not.")
    for note in found.notes:
        say(f"- {note}")
    out.print(f"{found.seconds:.1f} s, peak memory {found.peak_rss_bytes / 2**20:.0f} MiB")


def _where(build: BuildFigures) -> tuple[str, str]:
    """The error after the last layer and the layer that added most to it; the mean share of experts that flipped."""
    errors = [layer.error for layer in build.layers]
    added = [error - before for before, error in zip([0.0, *errors], errors, strict=False)]
    flipped = [layer.flipped for layer in build.layers if layer.flipped is not None]
    mean = f"{sum(flipped) / len(flipped):.1%}" if flipped else ""
    return f"{errors[-1]:.4f}, layer {added.index(max(added))}", mean


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def _compare_clients(a: str, builds: list[str], text: Path | None, windows: int, as_json: bool) -> None:
    from dataclasses import asdict

    from ornith_moe.clients import open_client
    from ornith_moe.compare import compare as run

    if len(builds) != 1:
        raise PlanError(f"--client runs SRC and one BUILD, got {len(builds)} of them; leave --client out for more")
    b = builds[0]
    folder = next((path for path in (a, b) if Path(path).is_dir()), None)
    if folder is None:
        raise CheckpointError(f"{a}: expected SRC or BUILD to be a Hugging Face folder, whose tokenizer cuts the text")
    with text_refused(f"{a} and {b}", text):
        tokens = windows_of(Path(folder), text, windows)
        with open_client(a) as first, open_client(b) as second:
            found = run(first, second, tokens)
    if as_json:
        print_json(asdict(found))
        return
    say(f"{a} and {b}")
    table = Table("", "SRC", "BUILD")
    table.add_row("client", shown(found.client_a), shown(found.client_b))
    table.add_row("perplexity", f"{found.perplexity_a:.3f}", f"{found.perplexity_b:.3f}")
    table.add_row("KL(SRC || BUILD), nats per token", "", f"{found.kl_mean:.6f} (largest {found.kl_max:.4f})")
    table.add_row("same likeliest token", "", f"{found.top1:.1%} of {found.positions} positions")
    out.print(table)
