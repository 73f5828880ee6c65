"""`ornith-moe card`: the README of a build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ornith_moe.command.options import Json
from ornith_moe.command.terminal import print_json, say


def card(
    path: Annotated[Path, typer.Argument(metavar="BUILD", help="A finished build, a folder or a .gguf file.")],
    base_model: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="The source on the Hub.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Default: that of the README beside the source.")
    ] = None,
    source: Annotated[Path | None, typer.Option(metavar="DIR", help="The source; its README says whose it is.")] = None,
    verified: Annotated[
        list[Path] | None, typer.Option("--verify", metavar="JSON", help="What verify --json has said of it.")
    ] = None,
    compared: Annotated[
        list[Path] | None,
        typer.Option("--compare", metavar="JSON", help="What compare --json has said of it."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, replacing what is there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The model card of a build: recipe, files, figures of verify and compare, commands that serve it."""
    from ornith_moe.quant.builds.card import model_card
    from ornith_moe.quant.files import read_json, write_file

    found = [[read_json(file, named=True) for file in files or ()] for files in (verified, compared)]
    text = model_card(path, base_model=base_model, licence=licence, source=source, verified=found[0], compared=found[1])
    if output:
        write_file(output, text.encode())
    if as_json:
        print_json({"card": text, "written": str(output) if output else None})
    elif not output:
        say(text)
