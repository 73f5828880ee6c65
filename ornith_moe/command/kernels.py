"""`ornith-moe kernels`: what the GPU kernels compile to, and their modelled time."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.table import Table

from ornith_moe.command.options import Json
from ornith_moe.command.terminal import out, print_json, progress_bar, say
from ornith_moe.quant.errors import OrnithError, brief


def kernels(
    arch: Annotated[
        str | None, typer.Option(metavar="ARCH[,ARCH]", help="Of sm89, sm90, sm100, gfx942 and gfx950. Default: all.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that compile. Default: one per core.")
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
        compiled, modelled = catalog(archs, progress, workers=workers or os.cpu_count() or 1)
    rows, layers = [row_json(row) for row in compiled], [layer_json(layer) for layer in modelled]
    if as_json:
        print_json({"rows": rows, "layers": layers})
    else:
        _print(rows, layers)


def _print(rows: list[dict[str, Any]], layers: list[dict[str, Any]]) -> None:
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
