"""`ornith-moe compare`: how a build answers, against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ornith_moe.command.options import Json
from ornith_moe.command.terminal import out, print_json, say, shown
from ornith_moe.quant.errors import CheckpointError


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

    from ornith_moe.clients import encode, open_client
    from ornith_moe.compare import compare as run
    from ornith_moe.compare import held_out_windows, read_text

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
