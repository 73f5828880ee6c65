"""`ornith-moe convert`: every build in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ornith_moe.command.coverage import print_coverage
from ornith_moe.command.options import (
    DEFAULT_MEMORY,
    Device,
    EmbeddingType,
    Executor,
    ImatrixOption,
    Json,
    KvCache,
    KvCacheOption,
    Lora,
    MaxShard,
    MtpFrom,
    MtpOption,
    Name,
    NonFinite,
    Nvfp4Head,
    Nvfp4Rest,
    OutputType,
    RecipeFile,
    Rest,
    SensitivityFile,
    SourceArgument,
    SplitSize,
    SplitTensors,
    TensorType,
    To,
    TokenizerPre,
    asked_of_gguf,
    asked_of_nvfp4,
    parse_size,
    sensitivity_of,
    split_of,
)
from ornith_moe.command.terminal import Stopped, out, print_json, progress_bar, say, shown
from ornith_moe.quant.fallbacks import by_kind

if TYPE_CHECKING:
    from ornith_moe.quant.conversion.convert import ConversionReport
    from ornith_moe.quant.source.source import Source


def convert(
    source: SourceArgument,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the builds.")],
    to: To,
    download: Annotated[
        bool, typer.Option("--download", help="Store the weights of an hf:// source in the Hub's cache before.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; default all cores.")] = None,
    max_memory: Annotated[
        int, typer.Option(metavar="SIZE", parser=parse_size, help="Memory the process may hold.")
    ] = DEFAULT_MEMORY,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; without it, an unfinished conversion goes on.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = False,  # goes without saying
    mtp: MtpOption = None,
    mtp_from: MtpFrom = None,
    lora: Lora = None,
    name: Name = None,
    max_shard_size: MaxShard = None,
    split_max_size: SplitSize = None,
    split_max_tensors: SplitTensors = None,
    tokenizer_pre: TokenizerPre = None,
    imatrix: ImatrixOption = None,
    sensitivity: SensitivityFile = None,
    tensor_type: TensorType = None,
    recipe: RecipeFile = None,
    token_embedding_type: EmbeddingType = None,
    output_tensor_type: OutputType = None,
    nvfp4_head: Nvfp4Head = False,
    nvfp4_rest: Nvfp4Rest = Rest.bf16,
    kv_cache: KvCacheOption = KvCache.bf16,
    non_finite: Annotated[
        NonFinite,
        typer.Option(help="Stop at a NaN or an infinity, or read once more and leave such tensors unquantized."),
    ] = NonFinite.error,
    device: Annotated[
        Device, typer.Option(help="Encode FP8, Q8_0, Q4_K, Q5_K and Q6_K on a GPU, CUDA or ROCm, where there is one.")
    ] = Device.auto,
    executor: Annotated[
        Executor, typer.Option(help="Encode on threads here, or on a Ray cluster that shares the file system.")
    ] = Executor.local,
    as_json: Json = False,
) -> None:
    """Write every build in one pass over the checkpoint; the same command again goes on where it was."""
    from ornith_moe.quant.conversion.convert import PARTIAL, ConversionReport
    from ornith_moe.quant.conversion.convert import convert as run
    from ornith_moe.quant.errors import BuildsFailed
    from ornith_moe.quant.opening import open_any

    asked, importance = asked_of_gguf(imatrix, tensor_type, recipe, token_embedding_type, output_tensor_type)
    nvfp4 = asked_of_nvfp4(to, nvfp4_head, nvfp4_rest)
    split, measured = split_of(split_max_size, split_max_tensors), sensitivity_of(sensitivity)
    opened = open_any(source, mtp=mtp, name=name, ranges=not download, mtp_from=mtp_from, lora=lora)
    from ornith_moe.gpu_encoders import choose_device, gpu_encoders  # torch, with a GPU: after all that fails at once

    where, _ = choose_device(device)
    failure: BuildsFailed | None = None
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
                split=split,
                tokenizer_pre=tokenizer_pre,
                asked=asked,
                imatrix=importance,
                nvfp4=nvfp4,
                kv_cache=kv_cache.value,
                sensitivity=measured,
                non_finite=non_finite,
                encoders=gpu_encoders(where) if where == "cuda" and executor == Executor.local else None,
                executor=executor,
                progress=progress,
            )
        except BuildsFailed as error:
            assert isinstance(error.report, ConversionReport)
            report, failure = error.report, error
    if as_json:
        print_json(conversion_json(report, where, opened.notes))
    else:
        print_conversion(report, opened)
    if failure:
        raise failure


@contextmanager
def _resumable(partial: Path) -> Iterator[None]:
    """A conversion that is stopped once it has begun to write says how to go on."""
    try:
        yield
    except Stopped:
        raise Stopped("stopped; the same command goes on" if partial.is_dir() else "stopped") from None


def conversion_json(report: ConversionReport, where: str, notes: Sequence[str]) -> dict[str, Any]:
    """A `ConversionReport` as `ornith-moe convert --json` prints it."""
    builds = [
        {
            "build": build.build,
            "path": str(build.path),
            "files": build.files,
            "tensors": build.tensors,
            "tensor_bytes": build.tensor_bytes,
            "seconds": build.seconds,
            "was_finished": build.was_finished,
            "fallbacks": build.fallbacks,
            "notes": build.notes,
            "underflow": dict(build.underflow),
            "imatrix": [asdict(found) for found in build.coverage],
        }
        for build in report.builds
    ]
    return {
        "builds": builds,
        "failed": dict(report.failed),
        "device": where,
        "bytes_read": report.bytes_read,
        "peak_rss_bytes": report.peak_rss_bytes,
        "resumed_units": report.resumed_units,
        "notes": list(notes),
    }


def print_conversion(report: ConversionReport, opened: Source) -> None:
    """A `ConversionReport` for people."""
    made = [build for build in report.builds if not build.was_finished]
    if not made:
        if report.builds:
            names = ", ".join(f"{build.build} in {build.path}" for build in report.builds)
            say(f"{opened.name}: nothing to do, finished before: {names}")
        return
    for build in made:
        if build.warning:
            say(build.warning)
    say(f"{opened.name}: read {report.bytes_read:,} bytes once")
    table = Table("build", "path", "tensors", "bytes")
    for build in report.builds:
        where = f"{build.path} (finished before)" if build.was_finished else build.path
        table.add_row(build.build, shown(where), f"{build.tensors:,}", f"{build.tensor_bytes:,}")
    out.print(table)
    print_coverage(build.coverage for build in made)
    told = [note for build in made for note in [*build.notes, *by_kind(build.fallbacks)] if note != build.warning]
    for note in dict.fromkeys([*opened.notes, *told]):  # what is said of the tokenizer is said of every GGUF
        say(f"- {note}")
    seconds = max(build.seconds for build in made)
    out.print(f"{seconds:.1f} s, {report.bytes_read / 1e6 / max(seconds, 1e-9):.0f} MB/s of source, "
              f"peak memory {report.peak_rss_bytes / 2**20:.0f} MiB")  # fmt: skip
