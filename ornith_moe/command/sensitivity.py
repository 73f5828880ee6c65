"""`ornith-moe sensitivity`: what each GGUF type would do to each tensor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ornith_moe.command.options import ImatrixOption, Json, Lora, MtpFrom, MtpOption, Name, SourceArgument
from ornith_moe.command.terminal import out, print_json, progress_bar, say

if TYPE_CHECKING:
    from ornith_moe.quant.fitting.sensitivity import Sensitivity


def sensitivity(
    source: SourceArgument,
    output: Annotated[Path, typer.Option(metavar="OUT", help="JSON file to write, or to read again.")] = Path(
        "sensitivity.json"
    ),
    imatrix: ImatrixOption = None,
    types: Annotated[
        str | None, typer.Option(metavar="TYPE,TYPE", help="Candidates; default K and IQ types and Q8_0.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; default all cores.")] = None,
    mtp: MtpOption = None,
    mtp_from: MtpFrom = None,
    lora: Lora = None,
    name: Name = None,
    as_json: Json = False,
) -> None:
    """Measure what every GGUF type would do to every tensor, for `--to gguf:fit=SIZE`; stopped, it goes on."""
    from ornith_moe.quant.conversion.sensitivity import TYPES, measure_sensitivity
    from ornith_moe.quant.gguf.imatrix import open_imatrix
    from ornith_moe.quant.opening import open_any

    opened = open_any(source, mtp=mtp, name=name, mtp_from=mtp_from, lora=lora)
    importance = open_imatrix(imatrix) if imatrix else None
    wanted = types.split(",") if types is not None else TYPES
    with progress_bar() as progress:
        report = measure_sensitivity(opened, output, imatrix=importance, types=wanted, jobs=jobs, progress=progress)
    found = report.sensitivity
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "tensors": len(found.tensors),
                "types": list(found.types),
                "imatrix": found.imatrix,
                "bytes_read": report.bytes_read,
                "resumed_units": report.resumed_units,
                "seconds": report.seconds,
                "peak_rss_bytes": report.peak_rss_bytes,
            }
        )
        return
    say(f"{report.path}: {len(found.tensors)} tensors in {len(found.types)} types; noise in per mille of the output")
    _print_kinds(found)
    out.print(f"{report.seconds:.1f} s, peak memory {report.peak_rss_bytes / 2**20:.0f} MiB")


def _print_kinds(found: Sensitivity) -> None:
    """Mean of the tensors of a kind, whatever their layer."""
    kinds: dict[str, list] = {}
    for tensor in found.tensors:
        kinds.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", tensor.name), []).append(tensor)
    table = Table("tensor", *found.types)
    for kind, tensors in kinds.items():
        row = []
        for type_name in found.types:
            values = [tensor.relative(type_name) for tensor in tensors if type_name in tensor.errors]
            row.append(f"{1e3 * sum(values) / len(values):.3g}" if values else "-")
        table.add_row(kind, *row)
    out.print(table)
