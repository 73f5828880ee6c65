"""The numbers of README.md and docs, written from bench/results and held against it: `make figures`.

    python -m ornith_moe.bench.published            write every marked part of the documents anew
    python -m ornith_moe.bench.published --check    exit code 1 if a part differs from what its files say

A part stands between two comments of its document; the first names what it is (parts.py) and the files of bench/results
that it is taken from:

    <!-- figures: experts 2026-11-25-epyc.json -->  ...  <!-- end -->

Files are runs as rows.py saves them, older ones as pytest-benchmark did, and what `ornith-moe kernels --json` prints.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ornith_moe.bench.parts import PARTS
from ornith_moe.bench.rows import Row, Run, from_json
from ornith_moe.quant.errors import OrnithError

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- figures: ([\w-]+)((?: [\w.-]+)+) -->\n)(?:.*?\n)??(<!-- end -->)", re.S)
OLDER_MODELS = {"35b": "ornith-35b", "35b/8": "ornith-35b/8"}


def read(path: Path) -> Any:
    """A `Run` from either format of runs; anything else as JSON has it."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OrnithError(f"{path}: expected a result as JSON, got none ({error})") from None
    if "benchmarks" in told:
        return _older(told)
    return from_json(told, str(path)) if {"commit", "limits", "rows"} <= told.keys() else told


def _older(told: dict[str, Any]) -> Run:
    """A file of pytest-benchmark's own format. Its quartiles are no 20th and 80th percentile and stay away."""
    rows = []
    for each in told["benchmarks"]:
        info, seconds = each["extra_info"], each["stats"]["median"]
        suite = re.sub(r".*bench_(\w+)\.py.*", r"\1", each["fullname"])
        rows.append(Row(suite, each["group"], info["name"], info["peer"], case=_older_case(each), median_s=seconds,
                        rounds=each["stats"]["rounds"], bytes=info["bytes"], flops=info["flops"],
                        limit_s=info["limit_ms"] / 1e3, note=info["note"]))  # fmt: skip
    info = told["machine_info"]
    machine = {"cpu": info["cpu"].get("brand_raw", ""), "cores": info.get("cores"), "torch": info.get("torch"),
               "load_at_start": info.get("load_at_start")}  # fmt: skip
    commit = told["commit_info"]["id"] + "+" * bool(told["commit_info"].get("dirty"))
    return Run(told["datetime"], commit, machine, told.get("limits", {}), rows=rows)


def _older_case(each: dict[str, Any]) -> dict[str, Any]:
    said = dict(each["params"] or {})
    case = {key: said[key] for key in ("tokens", "dtype", "matrix", "recipe") if key in said}
    if "shape" in said:
        case["model"] = OLDER_MODELS.get(said["shape"], said["shape"])
    if "name" in said:
        case["type"] = said["name"]
    if "backward" in said:
        case["pass"] = "forward+backward" if said["backward"] else "forward"
    return case


def rewritten(text: str, results: Path) -> str:
    """A document with every marked part as its files have it.

    Raises:
        OrnithError: a part is of an unknown name, or one of its files is missing or of the wrong kind.
    """

    def part(match: re.Match[str]) -> str:
        opening, name, files, closing = match.groups()
        if name not in PARTS:
            raise OrnithError(f"<!-- figures: {name} -->: expected one of {', '.join(PARTS)}, got {name}")
        try:
            return f"{opening}{PARTS[name](*(read(results / file) for file in files.split()))}\n{closing}"
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OrnithError(f"<!-- figures: {name}{files} -->: not files for such a part ({error!r})") from None

    opened, parts = text.count("<!-- figures: "), len(PART.findall(text))
    if opened != parts:
        raise OrnithError(f"expected {opened} parts that open with <!-- figures: NAME FILE --> to close, {parts} do")
    return PART.sub(part, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the numbers of README.md and docs from bench/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a number differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: the one this file is in)")
    arguments = parser.parse_args(argv)
    root: Path = arguments.root
    results = root / "bench" / "results"
    if not results.is_dir():
        raise SystemExit(f"--root: expected a checkout with bench/results, got {root}; an install has no results")
    differ = []
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        try:
            new = rewritten(text, results)
        except OrnithError as error:
            raise SystemExit(f"{path.name}: {error}") from None
        if new != text:
            differ.append(path.relative_to(root).as_posix())
            if not arguments.check:
                path.write_text(new, encoding="utf-8")
    if differ:
        print(("differs from bench/results, make figures: " if arguments.check else "written: ") + ", ".join(differ))
    return 1 if differ and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
