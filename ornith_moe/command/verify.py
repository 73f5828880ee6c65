"""`ornith-moe verify`: whether a build is what it claims to be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ornith_moe.command.options import Json, Lora, MtpFrom
from ornith_moe.command.terminal import out, print_json, progress_bar, say
from ornith_moe.quant.errors import VerificationError


def verify(
    build: Annotated[str, typer.Argument(metavar="BUILD", help="Folder of safetensors, or .gguf file.")],
    against: Annotated[
        str | None, typer.Option(metavar="SRC", help="Compare every weight with this checkpoint.")
    ] = None,
    mtp_from: MtpFrom = None,
    lora: Lora = None,
    as_json: Json = False,
) -> None:
    """Hashes, names, shapes and error per role of a finished build."""
    from ornith_moe.quant.verification.result import verification_json
    from ornith_moe.quant.verification.verify import open_against
    from ornith_moe.quant.verification.verify import verify as run

    opened = None if against is None else open_against(build, against, mtp_from=mtp_from, lora=lora)
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
