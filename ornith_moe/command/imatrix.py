"""`ornith-moe imatrix`: how much each column of each weight matters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ornith_moe.command.coverage import print_coverage
from ornith_moe.command.options import Json, Lora, SourceArgument
from ornith_moe.command.terminal import out, print_json, progress_bar, say


def imatrix(
    source: SourceArgument,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to run the model on, in UTF-8.")],
    output: Annotated[Path, typer.Option(metavar="OUT", help="GGUF file to write.")] = Path("imatrix.gguf"),
    chunks: Annotated[int | None, typer.Option(min=1, help="Chunks of text; default all of it.")] = None,
    ctx: Annotated[int, typer.Option(min=8, max=1 << 17, help="Tokens of a chunk.")] = 512,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="The output head too, which is better encoded without.")
    ] = False,
    lora: Lora = None,
    as_json: Json = False,
) -> None:
    """Measure how much each column of each weight matters, for `convert --imatrix`, one layer in memory at a time."""
    from dataclasses import asdict

    from ornith_moe.imatrix import make_imatrix
    from ornith_moe.quant.opening import open_any

    opened = open_any(source, mtp="drop", lora=lora)
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
