"""What a run measured: one `Row` per implementation and task, one `Run` around them, as JSON and as a table.

    share = limit_s / median_s                                     of what the device can do
    ratio = median_s of the fastest peer of the group / median_s   above 1: faster than every peer
    spread = (p80_s - p20_s) / median_s

A row is one of four: "ok" was right and has a time; "red" gave a wrong result and has none; "missing" is a peer that is
not installed; "skipped" is out of proportion here or has no such device. The file is written after every row, to a
temporary name that is renamed, so a run that is cut keeps what it had; it is strict JSON, one row a line.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ornith_moe.quant.errors import OrnithError, brief

STATUSES = ("ok", "red", "missing", "skipped")
COLUMNS = ("", "median ms", "spread", "GB/s", "GFLOP/s", "of limit", "vs best peer", "peak MiB", "error", "")


@dataclass(frozen=True)
class Row:
    """One implementation of one task on one device.

    Attributes:
        suite: "moe", "codecs", "convert", "rl"; other scripts add their own.
        group: rows of one group do the same task on the same inputs and are compared with one another.
        name: the implementation: "ours", "grouped_mm", "ggml", ...
        peer: whether it is what one would use instead of ours.
        status: one of STATUSES. `why`: one sentence, "" where it is "ok".
        case: model, tokens, routing, dtype, recipe, pass ("forward" | "forward+backward"), matrix, type: what applies.
        device: "cpu" or "cuda".
        median_s, p20_s, p80_s: seconds of a call over `rounds` rounds; None unless "ok".
        bytes, flops: least traffic, every input read once and every output written once; useful arithmetic.
        limit_s: seconds at the device's measured limit. `limit`: which bound it, "copy" or "matrix".
        peak_bytes: how far one call raised the memory in use; of a whole command, all that its processes had.
        used: of a whole command, seconds and bytes by the names of process_tree.py.
        error: relative RMS against the reference, 0.0 where equal bits are asserted.
        seconds, control: each round, and torch.mm beside it in the same round; what `--compare` reads.
    """

    suite: str
    group: str
    name: str
    peer: bool
    status: str = "ok"
    why: str = ""
    case: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    rounds: int = 0
    bytes: int = 0
    flops: int = 0
    limit_s: float | None = None
    limit: str = ""
    share: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    note: str = ""
    used: dict[str, float] = field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    control: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status: expected one of {', '.join(STATUSES)}, got {brief(self.status)}")
        if (self.status == "ok") != (self.median_s is not None) or (self.status == "ok") != (not self.why):
            raise ValueError(f"{self.group}, {self.name}: a row that is ok has a time, any other says why it has none")

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells a row from the others of its run, and finds it in another run."""
        return self.suite, self.group, self.name, self.device


@dataclass
class Run:
    """Rows of one run, and what they were measured on.

    Attributes:
        date: ISO 8601, UTC. `commit`: of the checkout, "" where there is none, "+" at its end with uncommitted changes.
        machine: cpu, cores, versions, load at start, card and clocks.
        limits: what the device was measured to do, by a name with its unit.
        control: torch.mm over the whole run: median_s and spread.
        settings: what was asked for.
    """

    date: str
    commit: str
    machine: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def red(self) -> list[Row]:
        """The rows whose result was wrong."""
        return [row for row in self.rows if row.status == "red"]


def rated(rows: Iterable[Row]) -> list[Row]:
    """The rows with `share`, and `ratio` on those of ours whose group has a peer with a time."""
    rows = list(rows)
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row.peer and row.median_s:
            task = row.suite, row.group, row.device
            best[task] = min(row.median_s, best.get(task, math.inf))
    return [_rated(row, best.get((row.suite, row.group, row.device))) for row in rows]


def _rated(row: Row, best_peer_s: float | None) -> Row:
    if not row.median_s:
        return row
    share = row.limit_s / row.median_s if row.limit_s else None
    return replace(row, share=share, ratio=None if row.peer or not best_peer_s else best_peer_s / row.median_s)


def to_json(run: Run) -> dict[str, Any]:
    """One object with a run's fields; what is not given of a row is null."""
    told = {each.name: getattr(run, each.name) for each in fields(run)}
    return told | {"rows": [asdict(row) for row in rated(run.rows)]}


def from_json(told: Any, where: str) -> Run:
    """A run from what `to_json` gave.

    Raises:
        OrnithError: `told`, which came from `where`, is no run.
    """
    if not isinstance(told, dict) or not isinstance(told.get("rows"), list):
        raise OrnithError(f"{where}: expected a run of ornith-moe bench, an object with rows; got {brief(told)}")
    try:
        known = {each.name for each in fields(Row)}
        rows = [Row(**{k: _back(v) for k, v in row.items() if k in known}) for row in told["rows"]]
        return Run(**{each.name: told[each.name] for each in fields(Run) if each.name != "rows"}, rows=rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OrnithError(f"{where}: not a run of ornith-moe bench ({brief(str(error))}); measure it again") from None


def _back(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def save(run: Run, path: Path) -> None:
    """Write `run` to `path` at once or not at all; ValueError for a NaN or an infinity, which JSON has no word for."""
    told = to_json(run)
    head = json.dumps(told | {"rows": []}, indent=1, allow_nan=False).removesuffix("[]\n}")
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in told["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(f"{head}[\n{rows}\n ]\n}}\n", encoding="utf-8")
    os.replace(temporary, path)


def load(path: Path) -> Run:
    """The run that `save` wrote; OrnithError where the file is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise OrnithError(f"{path}: expected the JSON of a run, got none ({error})") from None
    return from_json(told, str(path))


def heading(run: Run) -> list[str]:
    """Lines above the table: the machine, its limits and the control."""
    told, control = run.machine, run.control
    versions = told.get("versions", {})
    where = [told.get("card"), told.get("cpu"), f"{told.get('cores')} cores", told.get("capability")]
    where += [f"torch {versions.get('torch', 'unknown')}", f"load {told.get('load_at_start', 'unknown')} at start"]
    lines = [", ".join(str(word) for word in where if word)]
    lines += [f"{name} {value:g}" for name, value in run.limits.items()]
    if control.get("median_s"):
        lines.append(f"control {control['what']} {control['median_s'] * 1e3:.3f} ms, spread {control['spread']:.0%}")
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of the closing table, a title per group."""
    groups: dict[str, list[Row]] = {}
    for row in rated(rows):
        groups.setdefault(row.group, []).append(row)
    lines: list[tuple[str, ...]] = [COLUMNS]
    for group, members in groups.items():
        lines.append((group,))
        lines += [_line(row) for row in members]
    widths = [max(len(line[i]) for line in lines if len(line) > 1) for i in range(len(COLUMNS))]
    return [_join(line, widths) for line in lines]


def _line(row: Row) -> tuple[str, ...]:
    if row.median_s is None:
        return ("  " + row.name, *("-" for _ in COLUMNS[2:]), f"{row.status}: {row.why}")
    spread = (row.p80_s - row.p20_s) / row.median_s if row.p80_s and row.p20_s else None
    return (
        "  " + row.name,
        f"{row.median_s * 1e3:.3f}",
        _figure(spread, ".0%"),
        f"{row.bytes / row.median_s / 1e9:.2f}" if row.bytes else "-",
        f"{row.flops / row.median_s / 1e9:.1f}" if row.flops else "-",
        _figure(row.share, ".1%"),
        _figure(row.ratio, ".2f", "x"),
        f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes is not None else "-",
        _figure(row.error, ".1e"),
        row.note,
    )


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit


def _join(line: tuple[str, ...], widths: list[int]) -> str:
    if len(line) == 1:
        return line[0]
    numbers = (cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True))
    return "  ".join((line[0].ljust(widths[0]), *numbers, line[-1])).rstrip()
