"""The main job, end to end, on real input: `make demo`.

    train ornith-nano -> convert it to all builds in one pass -> verify each -> run each in a client we did not write
                      -> measure an importance matrix -> convert two builds again with it -> are they nearer?

The commands are the ones a user types; this script only calls them, measures (demo/measure.py) and prints a line as
soon as a build has run. Each runs in transformers, llama.cpp or mlx-lm, unmodified, on text that training never saw:

    KL          mean over positions of KL(P_bf16 || P_build), nats per token, P_bf16 the checkpoint in transformers
    top-1       share of positions where both have the same likeliest token
    perplexity  exp of the mean negative log-probability of the true next token

The row of the BF16 GGUF tells what the other client alone costs: the same weights, computed by llama.cpp. KL is
expected to rise along `LADDER`, and to fall with importance; the demo says so if it does not. What importance gains is
a few per cent, so that comparison has more positions, in pairs, in one pass over the layers (ornith_moe/streamed.py).
The importance matrix comes from text that training saw, not from the held-out text that measures. FP8 and int4
run with dequantized weights and unquantized activations, since no CPU here has FP8 arithmetic: their figures tell what
the stored weights lost. nvfp4 runs as gguf:NVFP4, its codes and scales as llama.cpp's converter repacks them; that
converter is in no package, and tests/quant/builds/test_gguf_nvfp4.py holds ours to its bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from measure import (
    POSITIONS,
    PROMPT,
    Measured,
    decompressed_by_its_library,
    err,
    gains,
    importance,
    on_one_core,
    ornith_moe,
    verified,
)
from nano import Settings, heldout_tokens, make_nano, quiet

from ornith_moe.compare import held_out_windows
from ornith_moe.quant.conversion.convert import PARTIAL
from ornith_moe.quant.errors import OrnithError
from ornith_moe.quant.source.weights import open_source

ROOT = Path(__file__).resolve().parent.parent
MLX = "mlx:4"  # run where mlx has a wheel, which the Makefile tries to install
LADDER = ("gguf:Q8_0", "gguf:Q6_K", "gguf:Q5_K_M", "gguf:Q4_K_M", "gguf:Q3_K_M", "gguf:Q2_K")
REPACKED = {"nvfp4": "gguf:NVFP4"}  # build -> what runs in its place: no client on a CPU reads ModelOpt's layout
DEQUANTIZED = ("fp8-channel", "fp8-block", "int4-ct")  # transformers runs them with dense weights
BUILDS = ("fp8-channel", "fp8-block", "nvfp4", "int4-ct", MLX, "gguf:BF16", *LADDER, "gguf:IQ4_XS", "gguf:NVFP4")
WITH_IMPORTANCE = ("gguf:Q3_K_M", "gguf:Q2_K")
WINDOWS, WINDOW_TOKENS = 16, 128
PAIR_WINDOWS = 64  # of the comparison with and without importance
BESIDE = 2  # builds that are measured at a time, each on one core

Row = dict[str, Any]


def remove_builds(out: Path, name: str) -> None:
    """Remove what an earlier run of this script made in `out`, and nothing else."""
    for build in BUILDS:
        shutil.rmtree(out / build.replace(":", "-"), ignore_errors=True)
        for path in out.glob(f"{name}-{build.removeprefix('gguf:')}.gguf*"):
            path.unlink()
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def run(folder: Path, steps: int, tell: Callable[[Row], None]) -> dict[str, Any]:
    """The whole demo in `folder`, each row told when it is known; returns what `--json` prints."""
    started = time.monotonic()
    nano = folder / "ornith-nano"
    trained = make_nano(nano, steps=steps)
    err.print(
        f"ornith-nano: {trained['parameters'] / 1e6:.1f} M parameters, held-out perplexity "
        f"{trained['ppl_before']:.0f} -> {trained['ppl_after']:.1f} in {trained['steps']} steps",
        highlight=False,
    )
    began = time.monotonic()
    out = folder / "builds"
    remove_builds(out, nano.name)
    shutil.rmtree(folder / "imatrix", ignore_errors=True)
    to = [word for build in BUILDS for word in ("--to", build)]
    report = ornith_moe("convert", str(nano), str(out), *to, "--json")
    tokens = heldout_tokens(nano, Settings.heldout_tokens)
    windows = held_out_windows(tokens, windows=WINDOWS, length=WINDOW_TOKENS)
    rows = []
    with ProcessPoolExecutor(BESIDE, multiprocessing.get_context("spawn"), on_one_core) as pool:
        builds = Builds(pool, nano, report, windows)
        for row in builds.rows():
            rows.append(row | {"after_s": round(time.monotonic() - started, 1)})
            tell(rows[-1])
        made, important = builds.important.result()
        pairs = {build: (builds.paths[build], path) for build, path in important.items()}
        found = gains(nano, held_out_windows(tokens, windows=PAIR_WINDOWS, length=WINDOW_TOKENS), pairs)
        decompressed = pool.submit(decompressed_by_its_library, builds.paths["fp8-channel"]).result()
    return {
        "nano": trained,
        "positions": WINDOWS * POSITIONS,
        "builds": rows,
        "decompressed_by_compressed_tensors": decompressed,
        "imatrix": {key: made[key] for key in ("chunks", "ctx", "seconds", "peak_rss_bytes")},
        "importance": found,
        "surprises": surprises({row["build"]: row["kl"] for row in rows if "kl" in row}, found),
        "convert": {key: report[key] for key in ("bytes_read", "peak_rss_bytes")},
        "seconds_after_training": round(time.monotonic() - began, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


class Builds:
    """The source and its builds, each verified and run by a process of the pool, in the order of `report`."""

    def __init__(self, pool: Executor, nano: Path, report: Row, windows: np.ndarray):
        self.nano, self.report = nano, report
        self.paths = {build["build"]: Path(build["path"]) for build in report["builds"]}
        self.source = pool.submit(Measured, nano, windows)
        self.verified, self.ran = {}, {}
        for number, (build, path) in enumerate(self.paths.items()):
            self.verified[build] = pool.submit(verified, path, nano)
            twin = REPACKED.get(build, build)
            if twin not in self.ran and (build != MLX or find_spec("mlx_lm")):
                self.ran[twin] = pool.submit(Measured, self.paths[twin], windows)
            if number == BESIDE:  # long, and on one core: beside the others rather than after them
                self.important = pool.submit(importance, nano, nano.parent / "imatrix", WITH_IMPORTANCE)

    def rows(self) -> Iterator[Row]:
        """What the table and `--json` say of each."""
        weights = sum(math.prod(weight.shape) for weight in open_source(self.nano).weights)
        source = self.source.result()
        size = self.report["bytes_read"]
        yield {"build": "bf16 source", "files": 1, **_size(size, weights), **source.row()}
        for build in self.report["builds"]:
            name = build["build"]
            row = {"build": name, "files": build["files"], "tensors": build["tensors"]}
            row |= _size(build["tensor_bytes"], weights)
            row["expert_sqnr_db"] = self.verified[name].result()["roles"]["expert"]["sqnr_db"]
            ran = self.ran.get(REPACKED.get(name, name))
            yield row | (ran.result().row(source) if ran else {"client": "none: mlx-lm is not installed"})


def _size(tensor_bytes: int, weights: int) -> Row:
    return {"tensor_bytes": tensor_bytes, "bits_per_weight": 8 * tensor_bytes / weights}


def surprises(kl: dict[str, float], gained: list[Row]) -> list[str]:
    """Where KL does not go as fewer bits and importance promise."""
    pairs = [pair for pair in pairwise(LADDER) if not kl[pair[0]] < kl[pair[1]]]
    unlike = [f"KL of {low} is {kl[low]:.6f}, of {high} {kl[high]:.6f}" for low, high in pairs]
    return unlike + [f"importance does not lower the KL of {pair['build']}" for pair in gained if pair["change"] >= 0]


COLUMNS = {"build": 12, "files": 5, "bytes": 11, "bits/weight": 11, "expert SQNR": 11, "KL": 8, "top-1": 6}
COLUMNS |= {"perplexity": 10, "after": 6, "client that ran it": 0}


def line(cells: Iterable[str]) -> str:
    """Cells below the names of COLUMNS: the first and the last begin there, the others end there."""
    first, *inner, last = cells
    widths = list(COLUMNS.values())
    return "  ".join([first.ljust(widths[0]), *map(str.rjust, inner, widths[1:]), last])


def cells(row: Row) -> Iterator[str]:
    def cell(key: str, form: str) -> str:
        if key not in row:
            return "-"
        return "exact" if row[key] is None else form.format(row[key])

    how = dict.fromkeys(DEQUANTIZED, ", weights dequantized")
    how |= {build: f", as {twin}" for build, twin in REPACKED.items()}
    yield row["build"]
    for key, form in (
        ("files", "{}"),
        ("tensor_bytes", "{:,}"),
        ("bits_per_weight", "{:.2f}"),
        ("expert_sqnr_db", "{:.1f} dB"),
        ("kl", "{:.6f}"),
        ("top1", "{:.1%}"),
        ("perplexity", "{:.2f}"),
        ("after_s", "{:.0f} s"),
    ):
        yield cell(key, form)
    yield row["client"] + how.get(row["build"], "")


def print_rest(result: dict[str, Any]) -> None:
    """What there is to say once all rows are there."""
    for row in result["builds"]:
        if "completion" in row:
            print(f"{row['build']:20} {PROMPT!r} -> {row['completion']!r}")
    for pair in result["importance"]:
        print(
            f"{pair['build']} with importance: KL {pair['kl']:.6f} -> {pair['kl_with_importance']:.6f}, "
            f"{pair['change']:+.1%} +- {pair['standard_error']:.1%} over {pair['positions']} positions"
        )
    for surprise in result["surprises"]:
        print(f"surprise: {surprise}")
    print(
        f"fp8-channel: compressed-tensors' own dequantizer reads all {result['decompressed_by_compressed_tensors']} "
        f"quantized weights; transformers runs the build with dequantized weights. "
        f"{result['seconds']:.0f} s, {result['seconds_after_training']:.0f} s of them after training."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Ornith, convert it, run its builds in foreign clients.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="where nano and its builds live")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps of nano")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    quiet()
    shown = [line(COLUMNS)]

    def tell(row: Row) -> None:
        shown.append(line(cells(row)))
        while shown and not arguments.json:
            print(shown.pop(0), flush=True)

    try:
        result = run(arguments.folder, arguments.steps, tell)
    except (OrnithError, OSError, RuntimeError) as error:
        err.print(f"demo: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print_rest(result)


if __name__ == "__main__":
    main()
