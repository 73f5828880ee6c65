"""What a second thread adds to each GGUF encoder, beside what this machine's second core adds to anything.

    python bench/two_threads.py [--minutes 10] [--json]

Eight slabs of a matrix are encoded by one worker and by two, which take them as they come, as those of a conversion do.
The second core of a virtual machine is often another's: for seconds or minutes two threads share the units of one. So
the encoders are visited in turn, again and again, half a second each, one worker beside two, and the ratio is that of
the fastest rounds of all visits. The last row is a control, torch.mm in L2: it fills a core, so its median against its
best says for how much of the time there were two. (A loop of dependent additions leaves half a core idle: two of them
fit on one.) BF16 is a copy, and two workers are bound by memory.

Bytes of two workers must equal those of one call before anything is timed.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from pytest_benchmark.utils import get_commit_info

import ornith_moe as om
from ornith_moe.bench.limits import cpu_name
from ornith_moe.bench.shapes import SEARCHED
from ornith_moe.quant.codecs.gguf import ENCODERS
from ornith_moe.quant.codecs.grids import GridCodec

Pools = tuple[ThreadPoolExecutor, ThreadPoolExecutor]  # of one worker, of two
SLABS = 8
VISIT = 0.5  # seconds
# One to five ms for 1024x2048, where starting eight tasks would be part of what is measured.
QUICK = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0")


@dataclass
class Work:
    """`call` on each of `pieces`, `weights` in all, and the seconds of the rounds with one worker and with two."""

    name: str
    call: Callable
    pieces: list
    weights: int
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def visit(self, pools: Pools) -> None:
        until = time.monotonic() + VISIT
        while time.monotonic() < until:
            for pool, seconds in zip(pools, self.seconds, strict=True):
                began = time.perf_counter()
                list(pool.map(self.call, self.pieces))
                seconds.append(time.perf_counter() - began)

    def row(self) -> dict[str, Any]:
        one, two = self.seconds
        return {
            "name": self.name,
            "rounds": len(one),
            "mweights_s": [round(self.weights / min(seconds) / 1e6, 1) for seconds in self.seconds],
            "best_by_best": round(min(one) / min(two), 2),
            "median_of_pairs": round(median(a / b for a, b in zip(one, two, strict=True)), 2),
        }


def encoder(name: str, importance: bool, pools: Pools) -> Work:
    quick = name in QUICK and not importance
    matrix = "256x2048" if isinstance(ENCODERS[name], GridCodec) else "4096x4096" if quick else "1024x2048"
    rows = np.random.default_rng(0).standard_normal(SEARCHED[matrix], np.float32)
    drawn = np.random.default_rng(1).random((1, rows.shape[1]), np.float32)[0]
    imatrix = drawn if importance else None
    encode, slabs = partial(om.quantize_gguf, type_name=name, imatrix=imatrix), np.split(rows, SLABS)
    if not np.array_equal(np.concatenate(list(pools[1].map(encode, slabs))), encode(rows)):
        raise AssertionError(f"{name}: two workers give other bytes than one call")
    return Work(f"{name}{' with importance' * importance}, {matrix}", encode, slabs, rows.size)


def control(pools: Pools) -> Work:
    def square(a: torch.Tensor) -> None:
        torch.set_num_threads(1)  # of this thread
        for _ in range(12):  # four milliseconds
            a @ a

    work = Work("control, torch.mm 256^3", square, [torch.randn(256, 256) for _ in range(2)], 0)
    for pool in pools:
        list(pool.map(square, work.pieces))
    return work


def measure(minutes: float) -> list[dict[str, Any]]:
    """Rows of every encoder and of the control, after laps of visits for that many minutes, one lap at least."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as two:
        pools = one, two
        works = [
            encoder(name, False, pools) for name in ENCODERS if name != "F32" and not ENCODERS[name].needs_importance
        ]
        works += [encoder(name, True, pools) for name in ENCODERS if ENCODERS[name].important]
        works.append(control(pools))
        until = time.monotonic() + 60 * minutes
        while not works[-1].seconds[0] or time.monotonic() < until:
            for work in works:
                work.visit(pools)
    return [work.row() for work in works]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a second thread adds to each GGUF encoder.")
    parser.add_argument("--minutes", type=float, default=10, help="of visits (default 10)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    load, rows = os.getloadavg()[0], measure(arguments.minutes)
    if arguments.json:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "load_at_start": load}
        told = {"machine": machine, "commit_info": get_commit_info(), "minutes": arguments.minutes, "rows": rows}
        print(json.dumps(told, indent=2))
    else:
        print(f"{cpu_name()}, {os.cpu_count()} cores, load {load:.1f} at start")
        print(f"{'':44}  Mweights/s: one      two   best by best   median   rounds")
        for row in rows:
            one, two = row["mweights_s"]
            print(f"{row['name']:44} {one:16.1f} {two:8.1f} {row['best_by_best']:13.2f}x {row['median_of_pairs']:7.2f}x"
                  f" {row['rounds']:8}")  # fmt: skip


if __name__ == "__main__":
    main()
