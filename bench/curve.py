"""Predicted KL against size, of builds fitted to a size and of named ones: what `ornith-moe plan --report` draws.

    write(path, "Ornith 35B", [alternatives of each fit], {names that were asked for})

One HTML file that stands alone, with the picture and its numbers, and the picture as a PNG beside it. Both axes are
logarithmic and carry their units; the builds that were fitted are joined by a line, named ones are points.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ornith_moe.bench.figures import COLOURS, MARKERS, OURS, STYLE
from ornith_moe.quant.errors import OrnithError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ornith_moe.quant.builds.build import Alternative

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 980px; margin: 0 auto; padding: 1rem; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #d5d9dd; }}
th:first-child, td:first-child {{ text-align: left; }} tr.asked td {{ font-weight: 700; }}</style></head><body>
"""
NOTE = (
    "KL is predicted from the errors of tensors and weights of their kinds; the order of builds is worth more than the "
    "figures. ornith-moe compare measures it."
)


def write(path: Path, source: str, curves: Sequence[Sequence[Alternative]], asked: Collection[str]) -> list[Path]:
    """Write the page to `path` and its picture beside it.

    Args:
        source: name of the model.
        curves: of each family of builds, what could be asked for.
        asked: names that were.
    Returns:
        What was written, the page first.
    Raises:
        OrnithError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise OrnithError(
            "plan: --report needs matplotlib, which is not installed; pip install 'ornith-moe[bench]'"
        ) from None
    title, buffer = f"{source}: predicted KL against size", io.BytesIO()
    with matplotlib.rc_context(STYLE):
        draw(title, curves, asked).savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    rows = [
        f"<tr{' class=asked' if each.build in asked else ''}><td>{html.escape(each.build)}</td>"
        f"<td>{each.nbytes:,}</td><td>{each.kl:.5f}</td></tr>"
        for curve in curves
        for each in curve
    ]
    shown, picture = html.escape(title), base64.b64encode(buffer.getvalue()).decode("ascii")
    page = [
        HEAD.format(title=shown),
        f"<h1>{shown}</h1>",
        f'<img alt="{shown}" src="data:image/png;base64,{picture}">',
        f"<p>{NOTE}</p>",
        "<table><tr><th>build</th><th>bytes</th><th>predicted KL, nats per token</th></tr>",
        *rows,
        "</table></body></html>\n",
    ]
    path.write_text("\n".join(page), encoding="utf-8")
    beside = path.with_suffix(".png")
    beside.write_bytes(buffer.getvalue())
    return [path, beside]


def draw(title: str, curves: Sequence[Sequence[Alternative]], asked: Collection[str]) -> Figure:
    """The figure: for each family the fits as a line, what was asked for filled, the others as named points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontweight="bold")
    axes = figure.subplots()
    largest = max((each.nbytes for curve in curves for each in curve), default=0)
    unit, size = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)

    def at(some: Sequence[Alternative]) -> tuple[list[float], list[float]]:
        return [each.nbytes / size for each in some], [each.kl for each in some]

    for number, curve in enumerate(curves):
        fits = [each for each in curve if "=" in each.build]
        named = [each for each in curve if "=" not in each.build]
        colour = OURS if number == 0 else COLOURS[(number - 1) % len(COLOURS)]
        family = curve[0].build.partition(":")[0]
        axes.plot(*at(fits), "o-", color=colour, markerfacecolor="white", label=f"{family}, fitted to a size")
        chosen = [each for each in fits if each.build in asked]
        axes.plot(*at(chosen), "o", color=colour, markersize=9, label=f"{family}, asked for")
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(*at(named), marker, color="black", markerfacecolor="white", label=f"{family}, named")
        for place, each in enumerate(named):  # in turn above and below: neighbours are near
            text = each.build.partition(":")[2].replace("$", r"\$")
            axes.annotate(
                text,
                (each.nbytes / size, each.kl),
                (5, -11 if place % 2 else 4),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set(xscale="log", yscale="log", xlabel=f"size of the files, {unit}", ylabel="predicted KL, nats per token")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    return figure
