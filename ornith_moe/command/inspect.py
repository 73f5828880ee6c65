"""`ornith-moe inspect`: what a file or folder holds."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ornith_moe.command.options import Json
from ornith_moe.command.terminal import out, print_json, say


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
