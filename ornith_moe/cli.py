"""`ornith-moe`: plan, convert, imatrix, verify, inspect, compare, kernels, doctor.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 verification failed, 130 stopped by SIGINT or SIGTERM (a second one ends
it at once). A failure is one sentence on stderr, never a traceback; `--json` prints one object of strict JSON on stdout
and nothing else; how things are printed is ornith_moe/command/terminal.py.
The quantizing libraries are imported by the commands that need them, so `--help` and `plan` start at once.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.table import Table
from typer.core import TyperGroup

from ornith_moe.command.terminal import err, out, print_json, progress_bar, say, shown
from ornith_moe.quant.budget import one_budget
from ornith_moe.quant.errors import BRIEF, CheckpointError, OrnithError, VerificationError, brief


class BriefUsage(TyperGroup):
    """Commands that pay for all they read from one budget, and whose usage errors, which repeat what was typed, stay
    one readable line."""

    def make_context(self, *arguments, **options):
        with self._brief():
            return super().make_context(*arguments, **options)

    def invoke(self, *arguments, **options):  # makes the context of the command that was chosen
        with self._brief(), one_budget():
            return super().invoke(*arguments, **options)

    @staticmethod
    @contextmanager
    def _brief() -> Iterator[None]:
        try:
            yield
        except typer.BadParameter.__base__ as error:  # UsageError
            error.message = shown(re.sub(rf"\S{{{BRIEF},}}", lambda word: brief(word[0]), error.message))
            raise


app = typer.Typer(
    cls=BriefUsage,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=(__doc__ or "").split("\n")[0],
)


class Stopped(BaseException):
    """SIGINT or SIGTERM; not KeyboardInterrupt, which typer ends without a word."""


class NonFinite(StrEnum):
    """What to do with a weight that holds a NaN or an infinity."""

    error = "error"
    keep_bf16 = "keep-bf16"


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
        raise typer.BadParameter(f"expected a size such as 2GiB or 500MB, got {brief(str(text))}")
    unit = (found[2] or "").upper()
    power = " KMGT".index(unit[0]) if unit else 0
    return int(float(found[1]) * (1024 if unit.endswith("I") else 1000) ** power)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
To = Annotated[
    list[str], typer.Option("--to", metavar="BUILD", help="fp8-channel, fp8-block, bf16 or gguf:TYPE; repeat for more.")
]
MtpOption = Annotated[Mtp | None, typer.Option(help="Insist on the MTP tensors, or leave them out. Default: as found.")]
Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Of the model, in file names and metadata. Default: SRC's.")
]
Source = Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder, or hf://org/name[@revision].")]
MaxShard = Annotated[int, typer.Option(metavar="SIZE", parser=parse_size, help="Largest safetensors shard.")]
TokenizerPre = Annotated[
    str | None, typer.Option(metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where it is not recognized.")
]
ImatrixOption = Annotated[
    Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance of columns, of llama.cpp.")
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type", metavar="REGEX=TYPE", help="GGUF type of the tensors whose name it fits; the first that fits."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="More REGEX=TYPE, one a line, after those above.")
]
EmbeddingType = Annotated[str | None, typer.Option(metavar="TYPE", help="GGUF type of the token embedding.")]
OutputType = Annotated[str | None, typer.Option(metavar="TYPE", help="GGUF type of the output head.")]


@app.command()
def plan(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Checkpoint folder, config .json, preset or hf://org/name.")
    ],
    to: To,
    mtp: MtpOption = None,
    name: Name = None,
    max_shard_size: MaxShard = "5GB",
    imatrix: ImatrixOption = None,
    tensor_type: TensorType = None,
    recipe: RecipeFile = None,
    token_embedding_type: EmbeddingType = None,
    output_tensor_type: OutputType = None,
    as_json: Json = False,
) -> None:
    """Exact tensors and bytes of each build, from headers or a config alone, before anything is written."""
    from ornith_moe.quant.builds.layout import shard_tensors
    from ornith_moe.quant.builds.names import build_name
    from ornith_moe.quant.builds.plan import plan_json
    from ornith_moe.quant.builds.planning import plan_build
    from ornith_moe.quant.errors import PlanError
    from ornith_moe.quant.source.hub import open_any

    opened = open_any(source, mtp=mtp, name=name, config_only=True)
    asked, importance = _asked(imatrix, tensor_type, recipe, token_embedding_type, output_tensor_type)
    plans, failed = [], {}
    for build in map(build_name, to):
        try:
            plans.append(plan_build(opened, build, recipe=asked, imatrix=importance))
        except PlanError as error:
            failed[build] = error
    files = [1 if plan.is_gguf else len(shard_tensors(plan.tensors, max_shard_size)) for plan in plans]
    if as_json:
        builds = [plan_json(*pair) for pair in zip(plans, files, strict=True)]
        reasons = {build: str(error) for build, error in failed.items()}
        print_json({"builds": builds, "failed": reasons, "notes": list(opened.notes)})
    elif plans:
        from ornith_moe.command.conversion_report import print_plans

        print_plans(opened, plans, files)
    for error in failed.values():
        raise error


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the builds.")],
    to: To,
    jobs: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; default all cores.")] = None,
    max_memory: Annotated[
        int, typer.Option(metavar="SIZE", parser=parse_size, help="Memory the process may hold.")
    ] = "2GiB",
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; without it, an unfinished conversion goes on.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = False,  # goes without saying
    mtp: MtpOption = None,
    name: Name = None,
    max_shard_size: MaxShard = "5GB",
    tokenizer_pre: TokenizerPre = None,
    imatrix: ImatrixOption = None,
    tensor_type: TensorType = None,
    recipe: RecipeFile = None,
    token_embedding_type: EmbeddingType = None,
    output_tensor_type: OutputType = None,
    non_finite: Annotated[
        NonFinite,
        typer.Option(help="Stop at a NaN or an infinity, or read once more and leave such tensors unquantized."),
    ] = NonFinite.error,
    device: Annotated[
        Device, typer.Option(help="Encode FP8, Q8_0, Q4_K, Q5_K and Q6_K on a GPU, CUDA or ROCm, where there is one.")
    ] = Device.auto,
    as_json: Json = False,
) -> None:
    """Write every build in one pass over the checkpoint; the same command again goes on where it was."""
    from ornith_moe.command.conversion_report import conversion_json, print_conversion
    from ornith_moe.quant.conversion.convert import PARTIAL
    from ornith_moe.quant.conversion.convert import convert as run
    from ornith_moe.quant.errors import BuildsFailed
    from ornith_moe.quant.source.hub import open_any

    asked, importance = _asked(imatrix, tensor_type, recipe, token_embedding_type, output_tensor_type)
    opened = open_any(source, mtp=mtp, name=name)
    from ornith_moe.gpu_encoders import choose_device, gpu_encoders  # torch, with a GPU: after all that fails at once

    where, _ = choose_device(device)
    failure = None
    with _resumable(target / PARTIAL), progress_bar() as progress:
        try:
            report = run(
                opened,
                target,
                to,
                jobs=jobs,
                max_memory=max_memory,
                restart=restart,
                max_shard_bytes=max_shard_size,
                tokenizer_pre=tokenizer_pre,
                recipe=asked,
                imatrix=importance,
                non_finite=non_finite,
                encoders=gpu_encoders(where) if where == "cuda" else None,
                progress=progress,
            )
        except BuildsFailed as error:
            report, failure = error.report, error
    if as_json:
        print_json(conversion_json(report, where, opened.notes))
    else:
        print_conversion(report, opened)
    if failure:
        raise failure


@app.command()
def imatrix(
    source: Source,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to run the model on, in UTF-8.")],
    output: Annotated[Path, typer.Option(metavar="OUT", help="GGUF file to write.")] = Path("imatrix.gguf"),
    chunks: Annotated[int | None, typer.Option(min=1, help="Chunks of text; default all of it.")] = None,
    ctx: Annotated[int, typer.Option(min=8, max=1 << 17, help="Tokens of a chunk.")] = 512,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="The output head too, which is better encoded without.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure how much each column of each weight matters, for `convert --imatrix`, one layer in memory at a time."""
    from dataclasses import asdict

    from ornith_moe.command.conversion_report import print_coverage
    from ornith_moe.imatrix import make_imatrix
    from ornith_moe.quant.source.hub import open_any

    opened = open_any(source, mtp="drop")
    with progress_bar(counted=True) as progress:
        report = make_imatrix(
            opened, text, output, chunks=chunks, ctx=ctx, process_output=process_output, progress=progress
        )
    if as_json:
        print_json(asdict(report) | {"path": str(report.path), "notes": report.notes})
        return
    say(f"{report.path}: {len(report.coverage)} tensors from {report.chunks} chunks of {report.ctx} tokens")
    print_coverage([report.coverage])
    for note in report.notes:
        say(f"- {note}")
    out.print(f"{report.seconds:.1f} s, peak memory {report.peak_rss_bytes / 2**20:.0f} MiB")


def _asked(imatrix: Path | None, tensor_type, recipe: Path | None, embedding: str | None, output: str | None):
    """What the options ask of a GGUF: a recipe and an importance matrix, or None."""
    from ornith_moe.quant.gguf.imatrix import open_imatrix
    from ornith_moe.quant.gguf.tensor_types import parse_recipe

    asked = parse_recipe(tensor_type or (), file=recipe, token_embedding_type=embedding, output_tensor_type=output)
    return asked, open_imatrix(imatrix) if imatrix else None


@app.command()
def verify(
    build: Annotated[str, typer.Argument(metavar="BUILD", help="Folder of safetensors, or .gguf file.")],
    against: Annotated[
        str | None, typer.Option(metavar="SRC", help="Compare every weight with this checkpoint.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hashes, names, shapes and error per role of a finished build."""
    from ornith_moe.quant.verification.verify import open_against, verification_json
    from ornith_moe.quant.verification.verify import verify as run

    opened = None if against is None else open_against(build, against)
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
        for note in [*result.notes, *result.left_out]:
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
    from ornith_moe.quant.verification.inspect import inspect as run

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
def kernels(
    arch: Annotated[
        str | None, typer.Option(metavar="ARCH[,ARCH]", help="Of sm89, sm90, sm100, gfx942 and gfx950. Default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile every GPU kernel of a layer ahead of time: registers, spills, matrix instructions, modelled time."""
    if find_spec("triton") is None:
        raise OrnithError("kernels: Triton, which compiles them, is not installed; pip install 'ornith-moe[triton]'")
    from ornith_moe.kernels.examine.catalog import ARCHS, catalog, layer_json, row_json

    archs = arch.split(",") if arch else ARCHS
    if unknown := [name for name in archs if name not in ARCHS]:
        raise typer.BadParameter(f"--arch: expected names out of {', '.join(ARCHS)}, got {brief(unknown[0])}")
    with progress_bar(counted=True) as progress:
        rows, layers = catalog(archs, progress)
    rows, layers = [row_json(row) for row in rows], [layer_json(layer) for layer in layers]
    if as_json:
        print_json({"rows": rows, "layers": layers})
        return
    names = ("arch", "shape", "recipe", "pass", "kernel", "regs", "spills", "shared", "loop")
    table = Table(*names, "matrix instructions", "TMA", "us", "bound", "of limit")
    for row in rows:
        matrix = ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
        numbers = [row[key] for key in ("registers", "spills", "shared_bytes", "hot_loop_instructions")]
        table.add_row(
            *(row[key] for key in ("arch", "shape", "recipe", "pass", "kernel")),
            *(_figure(number, ",") for number in numbers),
            matrix or "-", "yes" if row["tma"] else "-", _figure(row["modelled_us"], ",.1f"), row["bound"],
            _figure(row["share_of_limit"], ".0%"),
        )  # fmt: skip
    out.print(table)
    table = Table("device", "shape", "recipe", "forward us", "of the bound", "forward + backward us", "TFLOP/s")
    for layer in layers:
        forward, backward = layer["modelled_forward_us"], layer["modelled_backward_us"]
        table.add_row(
            layer["device"], layer["shape"], layer["recipe"], f"{forward:,.0f}", f"{layer['share_of_bound']:.0%}",
            f"{forward + backward:,.0f}", f"{layer['modelled_tflop_s']:,.0f}",
        )  # fmt: skip
    out.print(table)
    say("Times are modelled from the compiled code and byte counts, none was measured; see docs/performance.md.")


def _figure(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, and which backend each op will use."""
    from ornith_moe.command.doctor import WIDTH, as_lines, examine

    found = examine()
    if as_json:
        print_json(found)
        return
    for line in as_lines(found, min(WIDTH, out.width)):
        say(line)


@contextmanager
def _resumable(partial: Path) -> Iterator[None]:
    """A conversion that is stopped once it has begun to write says how to go on."""
    try:
        yield
    except Stopped:
        raise Stopped("stopped; the same command goes on" if partial.is_dir() else "stopped") from None


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
