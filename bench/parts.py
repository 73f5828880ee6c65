"""What README.md and docs say of results: each part a function from files to Markdown, by name in PARTS.

    ratio = the fastest peer's median / ours, above 1: ours is faster          means of ratios are geometric

Files are runs (bench/rows.py); of some parts what another command printed as JSON. Of several runs the first that has a
row gives it. Nothing here reads or writes a file: see published.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from textwrap import fill
from typing import Any

from ornith_moe.bench.figures import number_of, panels, sizes_of
from ornith_moe.bench.rows import Row, Run, rated

LAYERS = {  # what a table calls a model; the last is of older files
    "ornith-35b": "35B layer (256 experts, top 8)",
    "ornith-397b": "397B layer (512 experts, top 10)",
    "397b/16": "32 experts of the 397B (top 10)",
}
CODECS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "IQ4_XS", "IQ3_S", "IQ2_S")
DECODED = ("Q8_0", "Q6_K", "Q4_K")
USED = {  # what a table of whole commands calls what process_tree.py counts
    "peak RSS, GB": "peak_rss_bytes",
    "of it no mapped files": "peak_own_bytes",
    "read from the disk": "read_bytes",
    "written": "write_bytes",
}


def experts(*runs: Run) -> str:
    """Ratios of the experts to the best peer: a line per layer, number format and direction, a column per T.

    Of several runs only the layers of LAYERS; the least ratio is that of all files, so that none hides another.
    """
    found: dict[tuple[str, ...], dict[int, float]] = {}
    least = (math.inf, "")
    for row in (row for run in runs for row in _ours([run])):
        if row.suite != "moe" or not row.ratio or not {"model", "tokens", "dtype", "pass"} <= row.case.keys():
            continue
        if {"threads", "weights"} & row.case.keys():  # fewer cores, and weights as a file stores them: tables apart
            continue
        model, recipe = row.case["model"], row.case.get("recipe", "bf16")
        if len(runs) == 1 or model in LAYERS:
            dtype = row.case["dtype"].upper() if recipe in ("bf16", "fp32") else f"`{recipe}`"
            line = model, dtype, row.case["pass"], row.case.get("routing", "uniform")
            found.setdefault(line, {}).setdefault(row.case["tokens"], row.ratio)
            least = min(least, (row.ratio, f"{LAYERS.get(model, model)}, {dtype}, T = {row.case['tokens']}"))
    tokens = sorted({t for ratios in found.values() for t in ratios})
    lines = [
        [f"{LAYERS.get(model, model)}, {dtype} {_way(way)}{'' if routing == 'uniform' else ', ' + routing}",
         *(_ratio(ratios.get(t)) for t in tokens)]
        for (model, dtype, way, routing), ratios in sorted(found.items(), key=lambda item: _model_order(item[0]))
    ]  # fmt: skip
    means = [
        f"{_mean(r for line, ratios in found.items() if (line[2] == 'forward') == alone for r in ratios.values()):.2f}x"
        for alone in (True, False)
    ]
    header = ["experts, all cores; the best peer's time over ours, T =", *map(str, tokens)]
    told = f"Geometric means {means[0]} forward and {means[1]} with backward; the least ratio in "
    told += f"{'the run' if len(runs) == 1 else 'any of the runs'} is {least[0]:.2f}x ({least[1]})."
    return _table(header, lines) + "\n\n" + _prose(told)


def fp8_experts(*runs: Run) -> str:
    """One sentence: experts of FP8 weights at one token, over all runs."""
    said = []
    for recipe, what in (("block", "128x128 blocks"), ("channel", "channels")):
        rows = [row for run in runs for row in _ours([run]) if row.suite == "moe" and f"FP8 {recipe}" in row.group]
        ratios = [row.ratio for row in rows if row.ratio]
        said.append(f"{_ratio(min(ratios))} to {_ratio(max(ratios))} ({what})")
    return _prose(
        f"FP8 experts at T = 1, {len(runs)} run{'s' * (len(runs) > 1)}: {' and '.join(said)} of torch's cast and mm."
    )


def codecs(*runs: Run) -> str:
    """Rates of the codecs on one core and their ratios to the best peer."""
    rows = {(row.group, row.name): row for row in _ours(runs)}
    peers = _best_peers(runs)
    lines = []
    for name in ("ours", "ours, for tensors"):
        for recipe in ("block", "channel"):
            for matrix in ("1024x2048", "4096x4096"):
                group = f"FP8 {recipe} encode, {matrix} from BF16"
                if row := rows.get((group, name)):
                    rate = f"{row.bytes / (row.median_s or 1) / 1e9:.1f} GB/s"
                    what = f"FP8 {recipe} encode{', for tensors' * (name != 'ours')}, {matrix}"
                    lines.append([what, rate, peers.get(group, "-"), _ratio(row.ratio), ""])
    for codec, what in [(c, "encode") for c in CODECS] + [(c, "decode") for c in DECODED]:
        found = next((r for (g, n), r in rows.items() if g.startswith(f"{codec} {what}, ") and n == "ours"), None)
        if found:
            wanted = f"{codec} {what} with importance, "
            important = next((r for (g, n), r in rows.items() if g.startswith(wanted) and n == "ours"), None)
            lines.append([f"{codec} {what}", _weights(found), peers.get(found.group, "-"), _ratio(found.ratio),
                          _ratio(important.ratio) if important else ""])  # fmt: skip
    return _table(["codec, one core", "ours", "best peer", "its time over ours", "with importance"], lines)


def verdict(ours: Row, peer: Row) -> str:
    """Won or lost where the 20th to 80th percentiles of the two do not meet, else even; without them by medians."""
    (low, high), (peers_low, peers_high) = _range(ours), _range(peer)
    return "won" if high < peers_low else "lost" if low > peers_high else "even"


def _range(row: Row) -> tuple[float, float]:
    median = row.median_s or 0.0
    return (row.p20_s or median), (row.p80_s or median)


def peers(*runs: Run) -> str:
    """Against each peer: tasks that both have a time for, won, even and lost, and the ratios."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    ours = {(row.suite, row.group, row.device): row for row in reversed(list(_ours(runs)))}
    for row in (row for run in runs for row in run.rows if row.peer and row.median_s):
        mine = ours.get((row.suite, row.group, row.device))
        if mine and mine.median_s and row.median_s:
            result = row.median_s / mine.median_s, verdict(mine, row)
            found.setdefault((row.suite, row.name), []).append(result)
    lines = []
    for (suite, name), results in found.items():
        ratios, said = [ratio for ratio, _ in results], Counter(word for _, word in results)
        counts = [str(said[word]) for word in ("won", "even", "lost")]
        lines.append([suite, f"`{name}`", str(len(ratios)), *counts, *map(_ratio, (_mean(ratios), min(ratios),
                      max(ratios)))])  # fmt: skip
    lines += [[row.suite, f"`{row.name}`", row.status, "", "", "", "", "", ""] for row in _absent(runs)]
    return _table(["suite", "peer", "tasks", "won", "even", "lost", "its time over ours, mean", "least", "most"], lines)


def losses(*runs: Run) -> str:
    """Every task on which a peer's median is lower, how near both come to the limit, and which limit that is."""
    best = {(r.suite, r.group): r for run in runs for r in sorted(rated(run.rows), key=lambda r: -(r.median_s or 0))
            if r.peer and r.median_s}  # fmt: skip
    lines = []
    for row in sorted(_ours(runs), key=lambda row: row.ratio or math.inf):
        if row.ratio and row.ratio < 1:
            peer = best[row.suite, row.group]
            lines.append([row.group, row.name, _ms(row), f"`{peer.name}`", _ms(peer), _ratio(row.ratio),
                          verdict(row, peer), _share(row), _share(peer), row.limit or "-"])  # fmt: skip
    if not lines:
        return "On no task of this run a peer's median is lower than ours."
    header = [
        "task",
        "ours",
        "ms",
        "faster peer",
        "ms",
        "ratio",
        "verdict",
        "of the limit, ours",
        "the peer's",
        "limit",
    ]
    return _table(header, lines)


def commands(*runs: Run) -> str:
    """Whole commands on one checkpoint, from start to exit, beside copying it, and what each used."""
    rows = [row for run in runs for row in rated(run.rows) if row.case.get("whole") == "command"]
    columns = {title: name for title, name in USED.items() if any(name in row.used for row in rows)}
    lines = []
    for row in rows:
        name = "ours" if row.name == "ours" else f"`{row.name}`"
        used = [f"{row.used[key] / 1e9:.2f}" if key in row.used else "-" for key in columns.values()]
        if row.status != "ok" or not row.median_s:
            lines.append([row.case["build"], name, row.status, "", *("" for _ in used), row.why])
            continue
        copied = next((r.median_s for r in rows if r.group == row.group and r.name.startswith("cp")), None)
        rate = f"{copied / row.median_s:.2f}x" if copied else "-"
        seconds = f"{row.median_s:.1f} ({row.rounds})" if columns else f"{row.median_s:.1f}"
        lines.append([row.case["build"], name, seconds, rate, *used, row.note])
    seconds = "seconds (rounds)" if columns else "seconds"
    return _table(["build", "command", seconds, "rate over that of `cp -r`", *columns, "of the last round"], lines)


def tools(*runs: Run) -> str:
    """A line for each tool that made the same as a whole command of ours, in the run of that command."""
    lines = []
    for run in runs:
        rows = [row for row in rated(run.rows) if row.case.get("whole") == "command" and row.median_s and row.used]
        ours = {row.group: row for row in rows if row.name == "ours"}
        for row in (row for row in rows if row.peer and row.group in ours):
            own = ours[row.group]
            seconds = own.median_s or 0.0
            memory = [f"{each.used['peak_rss_bytes'] / 1e9:.2g} GB" for each in (own, row)]
            times = f"{_number((row.median_s or 0.0) / seconds)}x"
            lines.append([row.case["build"], f"{seconds:.1f} s", memory[0], f"`{row.name}`", times, memory[1]])
    return _table(["build", "ours", "memory", "tool", "its time over ours", "its memory"], lines)


def growth(axis: str) -> Callable[..., str]:
    """How the time of ours grows along an axis of a case: a line per other case, a column per value."""

    def table(*runs: Run) -> str:
        found = panels(replace(runs[0], rows=list(_ours(runs))), axis)
        values = sorted({number_of(row, axis) or 0 for mine in found.values() for row in mine})
        lines = []
        for case, mine in found.items():
            for name in dict.fromkeys(row.name for row in mine):
                times = {number_of(r, axis) or 0.0: 1e3 * (r.median_s or 0) for r in mine if r.name == name}
                if len(times) > 1:
                    ends = min(times), max(times)
                    grown = f"{_number(times[ends[1]] / times[ends[0]])}x over {ends[1] / ends[0]:,.0f}x"
                    lines.append([case, name, *(_number(times[v]) if v in times else "-" for v in values), grown])
        if not lines:
            return f"This run has no two rows that differ in nothing but {axis}."
        return _table([f"ms; {axis} =", "", *(f"{v:g}" for v in values), "last over first"], lines)

    return table


def sizes(*runs: Run) -> str:
    """Experts of ours by the size of the model, forward, at the fewest and most tokens and where most models stand."""
    rows = [row for row in _ours(runs) if row.suite == "moe" and row.case.get("pass") == "forward"]
    rows = [row for row in rows if row.case.get("routing", "uniform") == "uniform" and "tokens" in row.case]
    models: dict[int, set[str]] = {}
    for row in rows:
        models.setdefault(row.case["tokens"], set()).add(str(row.case.get("model")))
    ends = {min(models, default=0), max(models, default=0), max(models, key=lambda t: len(models[t]), default=0)}
    lines = []
    for row in sorted(rows, key=lambda row: (row.case["tokens"], row.case.get("dtype", ""), row.bytes)):
        if row.case["tokens"] in ends and (size := sizes_of(row)):
            shape = [str(size["experts"]), str(size["top_k"]), f"{size['hidden']}x{size['inner']}"]
            lines.append([row.case["model"], *shape, row.case.get("recipe") or row.case.get("dtype", ""),
                          str(row.case["tokens"]), _ms(row), f"{row.bytes / 1e6:,.0f}", f"{row.flops / 1e9:,.1f}",
                          _share(row)])  # fmt: skip
    header = ["model", "E", "top_k", "H x I", "format", "T", "ms", "MB, least", "GFLOP", "of the limit"]
    return _table(header, lines) if lines else "This run has no experts of a model that the suite knows."


def two_threads(*told: dict[str, Any]) -> str:
    """What a second thread adds to each encoder, of one or more runs of two_threads.py."""
    rows = [row for each in told for row in each["rows"]]
    control = [row["median_of_pairs"] for row in rows if row["name"].startswith("control")]
    bf16 = [row["best_by_best"] for row in rows if row["name"].startswith("BF16")]
    encoders = [row for row in rows if not row["name"].startswith("control")]
    best = sorted(row["best_by_best"] for row in encoders)
    low, high = (best[round(q * (len(best) - 1))] for q in (0.1, 0.9))
    median = [row["median_of_pairs"] for row in encoders]
    return _prose(
        f"Two threads encode {low:.2f}x to {high:.2f}x as fast as one (10th and 90th percentile over all types, the "
        f"best of hundreds of rounds, {len(told)} runs) and at worst {best[0]:.2f}x; BF16, which memory binds, "
        f"{_and(bf16)}. In the median it is {min(median):.1f}x to {max(median):.1f}x, and {_and(control)} for "
        "`torch.mm`, because this virtual machine has its second core to itself only part of the time."
    )


def machine(*runs: Run) -> str:
    """Where, when and at which load each run was made."""
    lines = []
    for run in runs:
        m = run.machine
        load = m.get("load_at_start", m.get("load"))
        torch = m.get("torch") or m.get("versions", {}).get("torch")
        lines.append([run.date[:10], f"{m.get('cpu') or m.get('card')}, {m.get('cores')} cores", str(torch),
                      f"`{run.commit[:9]}`", f"{load:.2f}" if isinstance(load, int | float) else "-",
                      "; ".join(f"{name} {value:g}" for name, value in run.limits.items())])  # fmt: skip
    return _table(["date", "machine", "torch", "commit", "load at start", "measured limits"], lines)


def modelled(*told: dict[str, Any]) -> str:
    """The layers of `ornith-moe kernels --json`: no time of them was measured."""
    lines = []
    for layer in (layer for each in told for layer in each["layers"]):
        forward, both = layer["modelled_forward_us"], layer["modelled_forward_us"] + layer["modelled_backward_us"]
        name, tokens = _layer(layer["shape"])
        lines.append([layer["device"], name, tokens, f"`{layer['recipe']}`", f"{forward:,.0f}",
                      f"{layer['share_of_bound']:.0%}".replace("%", " %"), f"{both:,.0f}",
                      f"{layer['modelled_tflop_s']:,.0f}"])  # fmt: skip
    header = [
        "modelled: device",
        "layer",
        "T",
        "recipe",
        "forward us",
        "of the bound",
        "forward + backward us",
        "TFLOP/s",
    ]
    return _table(header, lines)


def modelled_share(*told: dict[str, Any]) -> str:
    """One sentence: the share of the bound at the 35B shape in FP8 on an H100."""
    layers = [layer for each in told for layer in each["layers"] if (layer["arch"], layer["recipe"]) == ("sm90", "fp8")]
    found = {tokens: layer["share_of_bound"] for layer in layers for name, tokens in [_layer(layer["shape"])]
             if name == "35B"}  # fmt: skip
    shares = [f"{100 * found[t]:.0f} % of the bound at T = {int(t):,}" for t in sorted(found, key=int)]
    return _prose(
        f"**At the 35B shape in FP8 the forward is modelled at {', '.join(shares)}**, not at the 75 % aimed at."
    )


def modelled_launches(*told: dict[str, Any]) -> str:
    """The forward of the 35B in FP8 on an H100, launch by launch."""
    columns = {"route, plan, cast": ("route", "plan", "fp8_cast"), "gate_up": ("gate_up",), "down": ("down",),
               "combine": ("combine",)}  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for row in (row for each in told for row in each["rows"]):
        if (row["arch"], row["recipe"], row["pass"]) == ("sm90", "fp8", "forward") and _layer(row["shape"])[0] == "35B":
            found.setdefault(_layer(row["shape"])[1], []).append(row)
    lines = []
    for tokens, rows in sorted(found.items(), key=lambda item: int(item[0])):
        us = [sum(r["modelled_us"] for r in rows if r["kernel"].startswith(names)) for names in columns.values()]
        if all(us):  # rows of small T that differ in nothing from others stand with those
            lines.append([f"{int(tokens):,}", *(f"{each:,.0f}" for each in us), f"{sum(us):,.0f}"])
    return _table(["modelled us: T", *columns, "forward"], lines)


PARTS: dict[str, Callable[..., str]] = {
    "codecs": codecs,
    "experts": experts,
    "fp8-experts": fp8_experts,
    "growth-cores": growth("cores"),
    "growth-experts": growth("experts"),
    "growth-tokens": growth("tokens"),
    "losses": losses,
    "commands": commands,
    "machine": machine,
    "modelled": modelled,
    "modelled-launches": modelled_launches,
    "modelled-share": modelled_share,
    "peers": peers,
    "sizes": sizes,
    "tools": tools,
    "two-threads": two_threads,
}


def _ours(runs: Iterable[Run]) -> Iterable[Row]:
    """Our rows that have a time; of rows with one key, that of the first file."""
    seen = set()
    for run in runs:
        for row in rated(run.rows):
            if not row.peer and row.median_s and row.key not in seen:
                seen.add(row.key)
                yield row


def _absent(runs: Iterable[Run]) -> list[Row]:
    """Peers without a time in any row, once per suite."""
    rows = [row for run in runs for row in run.rows if row.peer]
    timed = {(row.suite, row.name) for row in rows if row.median_s}
    return list({(row.suite, row.name): row for row in rows if (row.suite, row.name) not in timed}.values())


def _best_peers(runs: Sequence[Run]) -> dict[str, str]:
    found: dict[str, Row] = {}
    for row in (row for run in runs for row in run.rows if row.peer and row.median_s):
        if (row.median_s or 0) < (found[row.group].median_s or 0 if row.group in found else math.inf):
            found[row.group] = row
    return {group: f"`{row.name}`" for group, row in found.items()}


def _model_order(line: tuple[str, ...]) -> tuple[bool, str, bool, str, bool, bool, str]:
    model, dtype, way, routing = line
    return "397" in model, model, dtype != "BF16", dtype, way != "forward", routing != "uniform", routing


def _layer(shape: str) -> tuple[str, str]:
    """("35B", "8192") of "Qwen3.5 35B: T=8192 E=256 ..."."""
    tokens = re.search(r"T=(\d+)", shape)
    return shape.split(":")[0].split()[-1], tokens.group(1) if tokens else "0"


def _way(way: str) -> str:
    return way.replace("+", " + ")


def _mean(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    if ratio < 0.1:
        return f"{ratio:.2g}x"
    return f"{ratio:.2f}x" if ratio < 1.1 else f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def _and(ratios: Iterable[float]) -> str:
    return " and ".join(f"{ratio:.2f}x" for ratio in ratios)


def _prose(text: str) -> str:
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(row: Row) -> str:
    return _number(1e3 * (row.median_s or 0))


def _share(row: Row) -> str:
    return f"{100 * row.share:.0f} %" if row.share else "-"


def _weights(row: Row) -> str:
    """Mweights/s of a codec, from the matrix that its group names."""
    size = re.search(r"(\d+)x(\d+)", row.group)
    rate = int(size.group(1)) * int(size.group(2)) / (row.median_s or 1) / 1e6 if size else math.nan
    return f"{rate:,.0f} Mweights/s" if rate < 3000 else f"{rate / 1e3:.1f} Gweights/s"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
