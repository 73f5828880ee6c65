"""Figures of a run, as matplotlib draws them: one function per question, `Run -> Figure | None`.

    figures(run)     every figure that applies, with its name and question; of the others, why they are left out

Axes are logarithmic where rows differ by orders, and always carry their unit. Colours are Okabe and Ito's, which people
who confuse red and green can tell apart; ours is blue, and a marker says the same as a colour. A row without a time is
named with its status, and hatched where it is red or missing; of what was skipped the legend tells how often.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from ornith_moe.bench.rows import Row, Run, rated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

OURS, WORSE, GREY = "#0072B2", "#D55E00", "#6e6e6e"
COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#b3a100")
MARKERS = ("s", "^", "D", "v", "P", "X", "*", "<", ">")
STYLE: Any = {"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3,
         "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "hatch.linewidth": 0.6}  # fmt: skip
GROUPS_A_FIGURE, PANELS_A_FIGURE = 32, 12
USUAL = {("recipe", "bf16"), ("routing", "uniform")}  # of a case, not worth a word
AXES = {"tokens": "tokens T", "experts": "experts E, top_k as each model has it", "cores": "cores"}


class Drawn(NamedTuple):
    """A figure with its name, which is that of its file, and its question; or, without one, why there is none.

    `suite`: whose rows it shows, "" where it goes across suites.
    """

    name: str
    question: str
    figure: Figure | None
    why: str = ""
    suite: str = ""


def figures(run: Run) -> list[Drawn]:
    """Every figure of the rows of `run`, in the order of a report."""
    drawn = []
    for suite in dict.fromkeys(row.suite for row in run.rows):
        groups = list(dict.fromkeys(row.group for row in run.rows if row.suite == suite))
        pages = math.ceil(len(groups) / GROUPS_A_FIGURE)
        per_page = math.ceil(len(groups) / pages)
        for page in range(pages):
            shown = groups[page * per_page : (page + 1) * per_page]
            rivals = any(row.peer for row in run.rows if row.suite == suite)
            asked = "where are we faster than every peer, where slower?" if rivals else "how long does each task take?"
            question = f"{suite}: {asked}{_page(page, pages)}"
            name = f"peers-{suite}" + (f"-{page + 1}" if pages > 1 else "")
            draw = partial(peers, run, suite, shown, question)
            drawn.append(_drawn(name, question, draw)._replace(suite=suite))
    question = "How near does arithmetic come to the limits of the machine?"
    drawn.append(_drawn("roofline", question, partial(roofline, run, question), "no row counts arithmetic"))
    for axis, label in AXES.items():
        drawn += _scaling_pages(run, axis, f"How does time grow with {label.split(',')[0]}?")
    question = "Is speed paid for with error?"
    why = "no row has a time, an error and a peer"
    drawn.append(_drawn("error", question, partial(error_beside_speed, run, question), why))
    question = "How far does a build stray from its source for its size?"
    why = "the run holds no builds; the JSON of make demo or of ornith-moe compare goes into its settings as builds"
    drawn.append(_drawn("builds", question, partial(kl_against_size, run, question), why))
    return drawn


def _drawn(name: str, question: str, draw: Callable[[], Figure | None], why: str = "") -> Drawn:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = draw()
    return Drawn(name, question, figure, "" if figure else why)


def _page(page: int, pages: int) -> str:
    return f" ({page + 1} of {pages})" if pages > 1 else ""


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def looks(names: Iterable[str], ours: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each implementation; the first of ours is a filled blue circle."""
    ours = list(dict.fromkeys(ours))
    found = {name: {"color": OURS, "marker": MARKERS[i - 1] if i else "o"} for i, name in enumerate(ours)}
    for i, name in enumerate(name for name in dict.fromkeys(names) if name not in ours):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        found[name] = {"color": colour, "marker": marker, "markerfacecolor": "white"}
    return found


def _looks_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    return looks((row.name for row in rows), (row.name for row in rows if not row.peer))


def peers(run: Run, suite: str, groups: Sequence[str], title: str) -> Figure | None:
    """Left the time of every implementation of each group, right the ratio of ours to the fastest peer."""
    rows = [row for row in rated(run.rows) if row.suite == suite and row.group in groups]
    if not rows:
        return None
    figure = _figure(10, 1.9 + 0.27 * len(groups), title)
    times, ratios = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    place, look = {group: i for i, group in enumerate(groups)}, _looks_of(rows)
    timed = [row for row in rows if row.median_s]
    for name, style in look.items():
        mine = [row for row in timed if row.name == name]
        at = [place[row.group] for row in mine]
        ends = [[1e3 * (s or row.median_s or 1) for s in (row.p20_s, row.p80_s)] for row in mine]
        times.hlines(at, [low for low, _ in ends], [high for _, high in ends], color=style["color"], linewidth=1)
        times.plot([1e3 * (row.median_s or 1) for row in mine], at, linestyle="", markersize=6, **style)
    somewhere = {row.name for row in timed}
    for group, y in place.items():
        members = [row for row in rows if row.group == group]
        _ratio(ratios, y, next((row.ratio for row in members if row.ratio), None))
        untimed = [row for row in members if row.status in ("red", "missing") and row.name in somewhere]
        untimed += [row for row in members if not row.median_s and not row.peer and row not in untimed]
        if untimed:
            _hatched(times, y, untimed)
    times.set(xscale="log", xlabel="median time of a call, ms (line: p20 to p80)")
    if timed and any(row.status == "red" for row in rows):
        low, high = times.get_xlim()
        times.set_xlim(low, high * (high / low) ** 0.4)  # a lane for the names
    times.set_yticks(range(len(groups)), [_short(group) for group in groups])
    times.set_ylim(len(groups) - 0.4, -0.6)
    ratios.set(xscale="log", xlabel="fastest peer's time / ours")
    ratios.axvline(1, color="black", linewidth=1)
    low, high = ratios.get_xlim()
    ratios.set_xlim(min(low, 0.5) / 1.1, max(high, 2) * 1.6)  # room for the labels
    _logarithmic(times.xaxis)
    _logarithmic(ratios.xaxis, "x")
    _legend(figure, look, rows)
    return figure


def _ratio(axes: Axes, y: int, ratio: float | None) -> None:
    if ratio is None:
        axes.text(1.03, y, "no peer with a time", va="center", color=GREY, fontsize=8)
        return
    colour = OURS if ratio >= 1 else WORSE
    axes.barh(y, ratio - 1, left=1, height=0.6, color=colour)
    axes.text(
        max(ratio, 1) * 1.04,
        y,
        f"{ratio:.2g}x" if ratio < 0.1 else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x",
        va="center",
        fontsize=8,
    )


def _logarithmic(axis: Axis, unit: str = "") -> None:
    """Plain numbers on a logarithmic axis, three a decade where there are few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 60 * low else (1,)))
    axis.set_major_formatter(lambda value, _position: f"{value:g}{unit}")
    axis.set_minor_formatter(NullFormatter())


def _hatched(axes: Axes, y: float, rows: Sequence[Row]) -> None:
    """The names of rows without a time at the right of their line, hatched unless they were only skipped."""
    colour = WORSE if any(row.status == "red" for row in rows) else GREY
    across = axes.get_yaxis_transform()
    if any(row.status != "skipped" for row in rows):
        axes.barh(
            y, 1, height=0.9, transform=across, alpha=0.5, color="none", edgecolor=colour, hatch="////", linewidth=0
        )
    label = _plain(", ".join(f"{row.name}: {row.status}" for row in rows))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.9}
    axes.text(0.99, y, label, transform=across, ha="right", va="center", color=colour, fontsize=8, bbox=box)


def _short(text: str, width: int = 52) -> str:
    """At most two lines of it."""
    return _plain("\n".join(wrap(text, width, max_lines=2, placeholder=" …")))


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would set what lies between two as mathematics


def _legend(figure: Figure, look: dict[str, dict[str, Any]], rows: Sequence[Row]) -> None:
    """Every implementation; hatched if it has no time at all, and with the number of its rows that have none."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for name, style in look.items():
        mine = [row for row in rows if row.name == name]
        untimed = Counter(row.status for row in mine if not row.median_s)
        states = ", ".join(f"{status} in {count} of {len(mine)}" for status, count in untimed.items())
        if mine and untimed.total() == len(mine):
            colour, states = WORSE if untimed["red"] else GREY, ", ".join(untimed)
            handles.append(Patch(facecolor="none", edgecolor=colour, hatch="////"))
        else:
            handles.append(Line2D([], [], linestyle="", **style))
        handles[-1].set_label(_plain(f"{name} ({states})" if states else name))
    figure.legend(handles=handles, loc="outside lower left", ncols=min(4, len(handles)), fontsize=8)


def limits_of(run: Run, unit: str) -> dict[str, float]:
    """The measured limits of a run that are told in `unit`, by their names without it."""
    return {name.removesuffix(f", {unit}"): v for name, v in run.limits.items() if name.endswith(unit)}


def roofline(run: Run, title: str) -> Figure | None:
    """GFLOP/s reached over FLOP per byte, of every row that counts both, below the measured limits."""
    rows = [row for row in run.rows if row.median_s and row.flops and row.bytes]
    if not rows:
        return None
    figure = _figure(9, 5.4, title)
    axes = figure.subplots()
    look = _looks_of(rows)
    for name, style in look.items():
        mine = [row for row in rows if row.name == name]
        x, y = [r.flops / r.bytes for r in mine], [r.flops / (r.median_s or 1) / 1e9 for r in mine]
        axes.plot(x, y, linestyle="", markersize=5, alpha=0.8, **style)
    low, high = (f(row.flops / row.bytes for row in rows) for f in (min, max))
    _roofs(axes, run, low / 2, high * 4)
    axes.set(xscale="log", yscale="log", xlim=(low / 2, high * 4))
    _logarithmic(axes.xaxis)
    _logarithmic(axes.yaxis)
    axes.set(xlabel="arithmetic intensity, FLOP per byte of least traffic", ylabel="reached, GFLOP/s")
    _legend(figure, look, rows)
    return figure


def _roofs(axes: Axes, run: Run, low: float, high: float) -> None:
    """The fastest copy as a slope, up to each GEMM peak as a level with its name right of the axes."""
    copies, peaks = limits_of(run, "GB/s"), limits_of(run, "GFLOP/s")
    if not copies:
        return
    copy, top = max(copies.values()), max(peaks.values(), default=math.inf)
    end = min(high, top / copy)
    middle = math.sqrt(low * end)
    axes.plot([low, end], [low * copy, end * copy], color="black", linewidth=1)
    axes.annotate(f"copy: {copy:,.3g} GB/s", (middle, middle * copy), (-6, 6), textcoords="offset points", fontsize=8,
                  ha="right")  # fmt: skip
    free = 0.0
    for name, peak in sorted(peaks.items(), key=lambda item: item[1]):
        axes.plot([min(high, peak / copy), high], [peak, peak], color="black", linewidth=1, linestyle="--")
        free = max(1.4 * free, peak)  # where the next label does not meet the one below
        axes.annotate(f" {_plain(name)}: {peak:,.3g} GFLOP/s", (high, free), fontsize=8, va="center",
                      annotation_clip=False)  # fmt: skip


def sizes_of(row: Row) -> dict[str, int]:
    """hidden, inner, experts and top_k of the model that a case names; nothing where it names none of the suite's."""
    from ornith_moe.bench.shapes import experts_of
    from ornith_moe.quant.errors import OrnithError

    try:
        return experts_of(str(row.case.get("model")))._asdict()
    except OrnithError:
        return {}


def number_of(row: Row, axis: str) -> float | None:
    """The case's number along an axis of `scaling`."""
    value = row.case.get("threads" if axis == "cores" else axis)
    if value is None:
        value = sizes_of(row).get(axis)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def panels(run: Run, axis: str) -> dict[str, list[Row]]:
    """Rows by what else their case says, where at least two differ along the axis.

    Along E the name of the model gives way to the size of its experts; top_k is as each model has it. Along cores a row
    that names no number of threads had all of them.
    """
    apart = {axis, "threads"} if axis == "cores" else {axis, "model"} if axis == "experts" else {axis}
    found: dict[str, list[Row]] = {}
    for row in _with_threads(run) if axis == "cores" else run.rows:
        if number_of(row, axis) is not None:
            size = sizes_of(row) if axis == "experts" else {}
            label = [f"experts of {size['hidden']}x{size['inner']}"] if size else []
            label += [
                f"{value}" if isinstance(value, str) else f"{key} {value}"
                for key, value in row.case.items()
                if key not in apart and (key, value) not in USUAL
            ]
            label += [row.device] if row.device != "cpu" else []
            found.setdefault(", ".join(label) or row.suite, []).append(row)
    return {name: mine for name, mine in found.items() if len({number_of(row, axis) for row in mine}) > 1}


def _with_threads(run: Run) -> list[Row]:
    """Rows that name their threads, and those that differ from one of them in nothing else, with all of the machine."""
    told = [row for row in run.rows if "threads" in row.case]
    bare = [{key: value for key, value in row.case.items() if key != "threads"} for row in told]
    every = run.machine.get("threads", run.machine.get("cores"))
    alike = [row for row in run.rows if row.case in bare]
    return told + [replace(row, case=row.case | {"threads": every}) for row in alike]


def _scaling_pages(run: Run, axis: str, question: str) -> list[Drawn]:
    found = list(panels(run, axis).items())
    if not found:
        return [Drawn(f"scaling-{axis}", question, None, f"no two rows differ in nothing but {axis}")]
    pages, drawn = math.ceil(len(found) / PANELS_A_FIGURE), []
    for page in range(pages):
        shown = dict(found[page * PANELS_A_FIGURE : (page + 1) * PANELS_A_FIGURE])
        title = question + _page(page, pages)
        name = f"scaling-{axis}" + (f"-{page + 1}" if pages > 1 else "")
        drawn.append(_drawn(name, title, partial(scaling, shown, axis, title)))
    return drawn


def scaling(shown: dict[str, list[Row]], axis: str, title: str) -> Figure | None:
    """A panel per case: time of each implementation over `axis`; a hatched, named strip where a row has none."""
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = _figure(3.3 * max(columns, 2), 1.3 + 2.3 * lines, title)
    rows = [row for mine in shown.values() for row in mine]
    look, timed = _looks_of(rows), {row.name for row in rows if row.median_s}
    values = sorted({number_of(row, axis) or 0.0 for row in rows})
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for axes, (case, mine) in zip(grid.ravel(), shown.items(), strict=False):
        axes.set(xscale="log", yscale="log", title=_short(case, 40))
        for name, style in look.items():
            timed_rows = [row for row in mine if row.name == name and row.median_s]
            points = sorted((number_of(row, axis) or 0.0, 1e3 * (row.median_s or 0)) for row in timed_rows)
            axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.2, markersize=4.5, **style)
        for x in {number_of(row, axis) or 1 for row in mine}:
            failed = [row for row in mine if row.status in ("red", "missing") and row.name in timed]
            _strip(axes, x, [row for row in failed if number_of(row, axis) == x])
        _logarithmic(axes.yaxis)
        axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        axes.tick_params(axis="x", which="minor", bottom=False)
    for axes in grid.ravel()[len(shown) :]:
        axes.set_visible(False)
    for column in range(columns):
        last = [axes for axes in grid[:, column] if axes.get_visible()][-1]
        last.tick_params(labelbottom=True)
        last.set_xlabel(AXES[axis])
    for axes in grid[:, 0]:
        axes.set_ylabel("median time, ms")
    _legend(figure, look, rows)
    return figure


def _strip(axes: Axes, x: float, untimed: Sequence[Row]) -> None:
    if not untimed:
        return
    colour = WORSE if any(row.status == "red" for row in untimed) else GREY
    axes.axvspan(x / 1.25, x * 1.25, facecolor="none", edgecolor=colour, hatch="////", alpha=0.4, linewidth=0)
    label = _plain(", ".join(f"{row.name}: {row.status}" for row in untimed))
    axes.text(x, 0.02, label, transform=axes.get_xaxis_transform(), rotation=90, fontsize=7, ha="center", va="bottom",
              color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.9})  # fmt: skip


def error_beside_speed(run: Run, title: str) -> Figure | None:
    """A panel per suite: error of every row over its speed against the fastest peer of its group."""
    rows = [row for row in run.rows if row.median_s and row.error is not None]
    fastest = {key: min(seconds) for key, seconds in _seconds_of_peers(run.rows).items()}
    rows = [row for row in rows if (row.suite, row.group) in fastest]
    if not rows:
        return None
    suites = list(dict.fromkeys(row.suite for row in rows))
    floor = min((row.error for row in rows if row.error), default=1e-6) / 10
    figure = _figure(max(6, 4 * len(suites)), 4.6, title)
    look = _looks_of(rows)
    for axes, suite in zip(figure.subplots(1, len(suites), squeeze=False, sharey=True)[0], suites, strict=True):
        for name, style in look.items():
            mine = [row for row in rows if row.name == name and row.suite == suite]
            speed = [fastest[row.suite, row.group] / (row.median_s or 1) for row in mine]
            axes.plot(speed, [row.error or floor for row in mine], linestyle="", markersize=5, alpha=0.8, **style)
        axes.axvline(1, color="black", linewidth=1)
        axes.axhline(floor, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", title=suite, xlabel="fastest peer's time / this time (right: faster)")
        _logarithmic(axes.xaxis, "x")
    first = figure.axes[0]
    first.set_ylabel("relative RMS error against the reference (no unit)")
    first.annotate("equal bits", (0, floor), (3, 3), xycoords=("axes fraction", "data"), fontsize=8,
                   textcoords="offset points", color=GREY)  # fmt: skip
    _legend(figure, look, rows)
    return figure


def _seconds_of_peers(rows: Iterable[Row]) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.peer and row.median_s:
            found.setdefault((row.suite, row.group), []).append(row.median_s)
    return found


def kl_against_size(run: Run, title: str) -> Figure | None:
    """KL of each build over its bits per weight; builds are rows with `build`, `bits_per_weight` and `kl`."""
    builds = [b for b in run.settings.get("builds", ()) if b.get("kl") and b.get("bits_per_weight")]
    if not builds:
        return None
    figure = _figure(8, 5, title)
    axes = figure.subplots()
    for i, build in enumerate(sorted(builds, key=lambda build: build["bits_per_weight"])):
        fp8 = str(build["build"]).startswith("fp8")
        style: dict[str, Any] = {"color": COLOURS[0], "marker": "s"} if fp8 else {"color": OURS, "marker": "o"}
        at = build["bits_per_weight"], build["kl"]
        axes.plot(*at, linestyle="", **style)
        axes.annotate(_plain(str(build["build"])), at, (5, 4) if i % 2 else (-5, -11), fontsize=8,
                      textcoords="offset points", ha="left" if i % 2 else "right")  # fmt: skip
    axes.set(yscale="log", xlabel="size, bits per weight", ylabel="KL(source || build), nats per token")
    axes.margins(x=0.12)
    return figure
