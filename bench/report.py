"""One HTML file of a run that stands alone, and PNGs of its figures beside it.

    write(run, Path("run.html"))                                      what `ornith-moe bench --report` writes
    python -m ornith_moe.bench.report run.json run.html               the same of a saved run
        [--kernels kernels.json] [--demo demo.json]                   with modelled layers, with KL of builds

Nothing is loaded from outside: pictures are in the file, there is no script, and the page forbids itself the rest.
Names come from files, so everything is escaped. Modelled times have a table of their own, which says so.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ornith_moe.bench.figures import figures
from ornith_moe.bench.parts import verdict
from ornith_moe.bench.rows import STATUSES, Row, Run, load, rated
from ornith_moe.quant.errors import OrnithError

TEMPLATE = Path(__file__).with_name("report.html")
QUIET = 0.5  # load per core at the start, above which times are worth nothing
STEADY = 0.2  # spread of the control


def write(run: Run, path: Path, modelled: Sequence[dict[str, Any]] = ()) -> list[Path]:
    """Write the report of `run` to `path` and each figure as a PNG beside it.

    Args:
        run: any run; without rows it is a page that says so.
        path: of the HTML file; figures are named `<stem>-<figure>.png`.
        modelled: `layers` of `ornith-moe kernels --json`.
    Returns:
        What was written, the page first.
    Raises:
        OrnithError: matplotlib, which draws, or jinja2, which fills the page, is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        from jinja2 import Environment
    except ImportError as error:
        raise OrnithError(f"report: {error.name}, which makes it, is not installed; pip install {error.name}") from None

    run = replace(run, rows=rated(run.rows))
    drawings = figures(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for drawn in drawings:
        if drawn.figure:
            buffer = io.BytesIO()
            drawn.figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
            pictures[drawn.name] = buffer.getvalue()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "ms": _ms,
        "ratio": _ratio,
        "percent": _percent,
        "figure": _figure,
        "told": _told,
        "fastest": _fastest,
    }
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        counts={status: Counter(row.status for row in run.rows)[status] for status in STATUSES},
        scores=scores(run.rows),
        warnings=_warnings(run),
        absent=_absent(run.rows),
        losses=[(ours, peer, verdict(ours, peer)) for ours, peer in _losses(run.rows)],
        suites=_suites(run.rows),
        drawings=drawings,
        images={name: base64.b64encode(png).decode("ascii") for name, png in pictures.items()},
        modelled=modelled,
    )
    path.write_text(page, encoding="utf-8")
    written = [path]
    for name, png in pictures.items():
        written.append(path.with_name(f"{path.stem}-{name}.png"))
        written[-1].write_bytes(png)
    return written


class Score(NamedTuple):
    """Of the tasks that a peer has a time for: our fastest against the fastest peer, and the geometric mean ratio."""

    suite: str
    won: int
    even: int
    lost: int
    mean: str


def scores(rows: Sequence[Row]) -> list[Score]:
    """A score per suite that has a peer."""
    found = []
    for suite, groups in _suites(rows).items():
        pairs = []
        for members in groups.values():
            timed = sorted((row for row in members if row.median_s), key=lambda row: row.median_s or 0)
            ours, theirs = ([row for row in timed if row.peer == peer] for peer in (False, True))
            pairs += [(ours[0], theirs[0])] if ours and theirs else []
        if pairs:
            said = Counter(verdict(*pair) for pair in pairs)
            mean = math.exp(sum(math.log(pair[0].ratio or 1) for pair in pairs) / len(pairs))
            found.append(Score(suite, said["won"], said["even"], said["lost"], f"{mean:.2f}x"))
    return found


def _absent(rows: Sequence[Row]) -> list[Row]:
    """Implementations that have no time in any task of their suite, once each."""
    timed = {(row.suite, row.name) for row in rows if row.median_s}
    return list({(row.suite, row.name): row for row in rows if (row.suite, row.name) not in timed}.values())


def _losses(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(ours, the fastest peer) where the peer is faster, the worst first."""
    found = []
    for row in sorted((row for row in rows if row.ratio and row.ratio < 1), key=lambda row: row.ratio or 0):
        rivals = [r for r in rows if (r.suite, r.group, r.device) == (row.suite, row.group, row.device)]
        found.append((row, min((r for r in rivals if r.peer and r.median_s), key=lambda r: r.median_s or 0)))
    return found


def _warnings(run: Run) -> list[str]:
    found = [f"Red: {row.suite}, {row.group}, {row.name}: {row.why}" for row in run.red]
    load_at_start = run.machine.get("load_at_start", run.machine.get("load"))
    cores, spread = run.machine.get("cores"), run.control.get("spread")
    if isinstance(load_at_start, int | float) and isinstance(cores, int) and load_at_start > QUIET * cores:
        found.append(f"The machine was not quiet: load {load_at_start:.2f} on {cores} cores at the start.")
    if isinstance(spread, int | float) and spread > STEADY:
        found.append(f"The machine was not steady: the control's times spread over {spread:.0%} of their median.")
    if not run.rows:
        found.append("This run has no rows.")
    return found


def _suites(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row.suite, {}).setdefault(row.group, []).append(row)
    return found


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.3f}"


def _figure(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2g}x" if ratio < 0.1 else f"{ratio:.2f}x"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(each)}" for name, each in value.items())
    return ", ".join(map(_told, value)) if isinstance(value, list | tuple) else str(value)


def _fastest(rows: Sequence[Row]) -> float:
    return min((row.median_s for row in rows if row.median_s), default=math.inf)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the report of a saved run.")
    parser.add_argument("run", type=Path, help="JSON of ornith-moe bench")
    parser.add_argument("html", type=Path, help="where the page goes; PNGs go beside it")
    parser.add_argument("--kernels", type=Path, help="JSON of ornith-moe kernels: modelled layers")
    parser.add_argument("--demo", type=Path, help="JSON of make demo: KL and size of builds")
    arguments = parser.parse_args(argv)
    try:
        run = load(arguments.run)
        if arguments.demo:
            run = replace(run, settings=run.settings | {"builds": _json(arguments.demo)["builds"]})
        layers = _json(arguments.kernels)["layers"] if arguments.kernels else ()
        written = write(run, arguments.html, layers)
    except (OrnithError, OSError, ValueError, KeyError) as error:
        raise SystemExit(f"report: {error}") from None
    print(*written, sep="\n")
    return 0


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
