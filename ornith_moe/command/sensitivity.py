"""`ornith-moe sensitivity`: what each type would do to each tensor."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ornith_moe.command.compare import text_refused, windows_of
from ornith_moe.command.options import ImatrixOption, Json, Lora, MtpFrom, MtpOption, Name, SourceArgument
from ornith_moe.command.terminal import out, print_json, progress_bar, say

if TYPE_CHECKING:
    from ornith_moe.quant.conversion.sensitivity import SensitivityReport
    from ornith_moe.quant.fitting.sensitivity import Sensitivity
    from ornith_moe.quant.gguf.imatrix import Imatrix


def sensitivity(
    source: SourceArgument,
    output: Annotated[Path, typer.Option(metavar="OUT", help="JSON file to write, or to read again.")] = Path(
        "sensitivity.json"
    ),
    imatrix: ImatrixOption = None,
    types: Annotated[
        str | None,
        typer.Option(metavar="TYPE,TYPE", help="Candidates, or gguf, mlx, nvfp4 for all of such a fit; default gguf."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text on which to measure KL of each kind of tensor too, layer by layer."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, max=10_000, help="Windows of 256 tokens of it.")] = 8,
    layer_groups: Annotated[
        int, typer.Option(min=1, max=1024, metavar="N", help="Runs of layers that are measured apart.")
    ] = 4,
    jobs: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; default all cores.")] = None,
    mtp: MtpOption = None,
    mtp_from: MtpFrom = None,
    lora: Lora = None,
    name: Name = None,
    as_json: Json = False,
) -> None:
    """Measure what every type would do to every tensor, for `--to gguf:fit=SIZE` and the like; stopped, it goes on."""
    from ornith_moe.quant.conversion.sensitivity import measure_sensitivity
    from ornith_moe.quant.gguf.imatrix import open_imatrix
    from ornith_moe.quant.opening import open_any

    opened = open_any(source, mtp=mtp, name=name, mtp_from=mtp_from, lora=lora)
    importance = open_imatrix(imatrix) if imatrix else None
    wanted = types.split(",") if types is not None else ["gguf"]
    with progress_bar() as progress:
        report = measure_sensitivity(opened, output, imatrix=importance, types=wanted, jobs=jobs, progress=progress)
    found = report.sensitivity
    if text is not None:
        found = _with_effects(source, report, text, windows, layer_groups, importance)
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "tensors": len(found.tensors),
                "types": list(found.types),
                "imatrix": found.imatrix,
                "effects": [asdict(effect) for effect in found.effects],
                "bytes_read": report.bytes_read,
                "resumed_units": report.resumed_units,
                "seconds": report.seconds,
                "peak_rss_bytes": report.peak_rss_bytes,
            }
        )
        return
    say(f"{report.path}: {len(found.tensors)} tensors in {len(found.types)} types; noise in per mille of the output")
    _print_kinds(found)
    if found.effects:
        _print_effects(found)
    out.print(f"{report.seconds:.1f} s, peak memory {report.peak_rss_bytes / 2**20:.0f} MiB")


def _with_effects(
    source: str, report: SensitivityReport, text: Path, windows: int, groups: int, importance: Imatrix | None
) -> Sensitivity:
    """The sensitivity with effects on a text, kept in its file as they are found."""
    from ornith_moe.clients import require

    require("torch", "hf")
    from ornith_moe.effects import measure_effects
    from ornith_moe.quant.files import published
    from ornith_moe.quant.fitting.sensitivity import sensitivity_bytes
    from ornith_moe.quant.opening import open_any

    def keep(found: Sensitivity) -> None:
        with published(report.path, replace=True) as file:
            file.write(sensitivity_bytes(found))

    opened = open_any(source, mtp="drop")
    with text_refused(source, text), progress_bar(counted=True) as progress:
        tokens = windows_of(opened.folder, text, windows)
        return measure_effects(
            opened, tokens, report.sensitivity, imatrix=importance, groups=groups, keep=keep, progress=progress
        )


def _print_effects(found: Sensitivity) -> None:
    """KL of each kind alone, by the layers that have it."""
    say("KL of a kind of tensor that alone has a type, nats per token")
    table = Table("tensor", "layers", "type", "KL", "+-")
    for effect in found.effects:
        layers = [re.sub(r"^blk\.(\d+)\..*|.*", r"\1", name) for name in effect.tensors]
        kind = re.sub(r"^blk\.\d+\.|\.weight$", "", effect.tensors[0])
        error = "-" if effect.kl_se is None else f"{effect.kl_se:.6f}"
        table.add_row(kind, ", ".join(filter(None, layers)) or "-", effect.type, f"{effect.kl:.6f}", error)
    out.print(table)


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
