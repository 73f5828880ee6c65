"""Everything the project wants to know of a GPU, on one H100 or H200 without network, in 900 seconds.

    python bench/gpu_day.py --out DIR [--wheels DIR] [--only a,b] [--budget SECONDS]
    python bench/gpu_day.py --dry --out DIR         no GPU: Triton's interpreter, toy sizes, every line of this
    python bench/gpu_day.py --record                the bits that a GPU must give, into bench/day/bits.json
    python bench/gpu_day.py --fetch                 wheels to carry along, into --wheels

DIR/gpu-day.json is a run of `bench.rows`, written after every row: a day that is cut leaves what it had. A failure is a
red row, and the day goes on. Beside it: constants.json (the model's, fitted) and tiles-<arch>.json (the best timed).

| part | seconds | what |
|---|---|---|
| 0 | 45 | limits of the device; every kernel compiled on all cores |
| a | 90 | casts, encoders, plan and routing bit for bit; every recipe against float64; again in memory full of NaN |
| b | 240 | a 35B layer beside everything that one would use instead |
| c | 180 | each launch by events beside the model's terms; the constants fitted |
| d | 180 | tile tables timed |
| e | 45 | FP8 and GGUF encoders at the bandwidth of the memory |
| f | 60 | a 397B layer |
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 840.0


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="no GPU: the interpreter, at toy sizes")
    parser.add_argument("--only", default="", metavar="a,b", help="some of the parts 0, a, b, c, d, e, f")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu-day", metavar="DIR", help="where results go")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels", metavar="DIR", help="what --fetch made")
    parser.add_argument("--commit", default=None, help="of this checkout, where git is not at hand")
    parser.add_argument("--record", action="store_true", help="record the bits that a GPU must give")
    parser.add_argument("--fetch", action="store_true", help="download wheels into --wheels and stop")
    return parser.parse_args(given)


def prepare(asked: argparse.Namespace) -> None:
    """What must be set before Triton and torch are imported."""
    sys.path[0] = str(ROOT)  # not bench/, where a script's imports begin
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # as in the processes that compile: one cache for both
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")  # its own tuning runs out of memory, says its docstring
    if asked.dry or asked.record:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main(given: list[str] | None = None) -> int:
    asked = arguments(given)
    prepare(asked)
    if asked.fetch:
        from ornith_moe.bench.day import wheels

        print("\n".join(wheels.fetch(asked.wheels)))
        return 0
    if asked.record:
        from ornith_moe.bench.day import bits

        bits.write()
        return 0
    return day(asked)


def parts() -> list:
    """Every part in order."""
    from ornith_moe.bench.day import correct, encoders, launches, layers, start, tiles
    from ornith_moe.bench.day.parts import Part

    return [
        Part("0", "start", "limits and kernels", 45, start.tasks),
        Part("a", "correct", "right or wrong", 90, correct.tasks),
        Part("b", "moe", "a 35B layer beside its peers", 240, layers.tasks),
        Part("c", "launches", "each launch", 180, launches.tasks),
        Part("d", "tiles", "tile tables", 180, tiles.tasks),
        Part("e", "encoders", "encoders", 45, encoders.tasks),
        Part("f", "moe", "a 397B layer", 60, partial(layers.tasks, large=True)),
    ]


def day(asked: argparse.Namespace) -> int:
    """Put what was carried where imports look, and work the parts; 1 where a row is red, else 0."""
    from ornith_moe.bench.day import wheels

    with tempfile.TemporaryDirectory() as site:
        carried = wheels.unpack(asked.wheels, Path(site)) if asked.wheels.is_dir() else []
        return work(asked, carried)


def work(asked: argparse.Namespace, carried: list[str]) -> int:
    """The parts that were asked for, one after the other."""
    from ornith_moe.bench.day import machine
    from ornith_moe.bench.day.parts import Journal, shared_out, supervise
    from ornith_moe.bench.rows import Run, table

    every = parts()
    letters = asked.only.split(",") if asked.only else [part.letter for part in every]
    if unknown := set(letters) - {part.letter for part in every}:
        raise SystemExit(f"--only: expected some of {', '.join(p.letter for p in every)}, got {sorted(unknown)[0]!r}")
    chosen = [part for part in every if part.letter in letters]
    asked.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    settings = {"dry": asked.dry, "only": letters, "budget_s": asked.budget, "wheels": carried}
    commit = asked.commit if asked.commit is not None else machine.commit()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run = Run(now, commit, machine.described(asked.dry), settings=settings)
    journal = Journal(run, asked.out / "gpu-day.json", partial(print, flush=True))
    journal.save()
    make = partial(machine.dry if asked.dry else machine.real, asked.out)
    seconds = shared_out(chosen, asked.budget)
    for part in chosen:
        gone = time.monotonic() - began
        left = asked.budget if asked.dry else min(seconds[part.letter], max(asked.budget - gone, 0.0))
        print(f"{gone:6.0f} s  part {part.letter}: {part.title}, {left:.0f} s", flush=True)
        supervise(part, make, journal, left)
    print("\n".join(["", *table(journal.run.rows)]))
    red = journal.run.red
    print(f"{len(journal.run.rows)} rows, {len(red)} red, {time.monotonic() - began:.0f} s: {journal.path}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
