"""The main job, end to end, on real input: `make demo`.

    train ornith-nano -> convert it to all builds in one pass -> verify each -> run each in a client we did not write
                      -> measure an importance matrix -> convert two builds again with it -> are they nearer?

The commands are the ones a user types; this script only calls them, measures and prints one table. Each build runs in
transformers, llama.cpp or mlx-lm, unmodified, on held-out text that training never saw:

    KL          mean over positions of KL(P_bf16 || P_build), nats per token, P_bf16 the checkpoint in transformers
    top-1       share of positions where both have the same likeliest token
    perplexity  exp of the mean negative log-probability of the true next token

The row of the BF16 GGUF tells what the other client alone costs: the same weights, computed by llama.cpp. KL is
expected to rise along `LADDER`, and to fall with importance; the demo says so if it does not. What importance gains is
a few per cent, so that comparison has more positions, in pairs, with fewer tokens listed at each (`compare.LlamaCpp`).
The importance matrix comes from text that training saw, not from the held-out text that measures. FP8 and int4
run with dequantized weights and unquantized activations, since no CPU here has FP8 arithmetic: their figures tell what
the stored weights lost. nvfp4 runs as gguf:NVFP4, its codes and scales as llama.cpp's converter repacks them; that
converter is in no package, and tests/quant/builds/test_gguf_nvfp4.py holds ours to its bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from nano import Settings, _is_heldout, _read_library, heldout_tokens, make_nano, quiet
from rich.console import Console
from rich.table import Table

from ornith_moe.clients import LlamaCpp, open_client
from ornith_moe.compare import default_positions, held_out_windows, kl_divergence, log_probs, perplexity, top1_agreement
from ornith_moe.quant.conversion.convert import PARTIAL
from ornith_moe.quant.errors import OrnithError
from ornith_moe.quant.source.weights import open_source

ROOT = Path(__file__).resolve().parent.parent
MLX = "mlx:4"  # run where mlx has a wheel, which the Makefile tries to install
LADDER = ("gguf:Q8_0", "gguf:Q6_K", "gguf:Q5_K_M", "gguf:Q4_K_M", "gguf:Q3_K_M", "gguf:Q2_K")
REPACKED = {"nvfp4": "gguf:NVFP4"}  # build -> what runs in its place: no client on a CPU reads ModelOpt's layout
DEQUANTIZED = ("fp8-channel", "fp8-block", "int4-ct")  # transformers runs them with dense weights
BUILDS = ("fp8-channel", "fp8-block", "nvfp4", "int4-ct", MLX, "gguf:BF16", *LADDER, "gguf:IQ4_XS", "gguf:NVFP4")
# Change of KL over 7,168 held-out positions, importance from 1024 chunks, nano after 200 | 800 steps, standard error 2
# to 5 %: Q4_0 -4 | -7 %, Q2_K -5 | -3 %, Q3_K_M -2 | -8 %, Q4_K_M -3 | -3 %, IQ4_XS -5 | -14 %, Q5_K_M 0 | -7 %. With
# 128 chunks Q4_K_M and IQ4_XS gained nothing after 200 steps.
WITH_IMPORTANCE = ("gguf:IQ4_XS", "gguf:Q2_K")
PROMPT = "def __init__(self, "
WINDOWS, WINDOW_TOKENS, POSITIONS = 16, 128, 16
TEXT_BYTES, CHUNKS, CHUNK_TOKENS = 8_000_000, 1024, 256  # of the importance matrix
PAIR_WINDOWS, PAIR_POSITIONS, PAIR_LISTED = 64, 56, 256  # of the comparison with and without it

err = Console(stderr=True)


def ornith_moe(*arguments: str) -> dict[str, Any]:
    """Run the command as a user would; its JSON."""
    err.print("$ ornith-moe", *arguments[:-1], style="dim", highlight=False, soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "ornith_moe", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def remove_builds(out: Path, name: str) -> None:
    """Remove what an earlier run of this script made in `out`, and nothing else."""
    for build in BUILDS:
        shutil.rmtree(out / build.replace(":", "-"), ignore_errors=True)
        for path in out.glob(f"{name}-{build.removeprefix('gguf:')}.gguf*"):
            path.unlink()
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


class Measured:
    """What a client says of the held-out windows: log-probabilities, and a completion as a sign of life."""

    def __init__(self, path: Path, windows):
        positions = default_positions(WINDOW_TOKENS, POSITIONS)
        began = time.monotonic()
        with open_client(path) as client:
            self.client = client.name
            self.log_probs = log_probs(client, windows, positions)
            self.completion = client.complete(PROMPT, 12)
        self.targets = windows[:, [position + 1 for position in positions]].reshape(-1)
        self.perplexity = perplexity(self.log_probs, self.targets)
        self.seconds = time.monotonic() - began

    def kl(self, reference: Measured) -> float:
        return float(kl_divergence(reference.log_probs, self.log_probs).mean())

    def top1(self, reference: Measured) -> float:
        return top1_agreement(reference.log_probs, self.log_probs)


class Pairs:
    """KL of two builds at the same positions of many windows, against the source."""

    def __init__(self, nano: Path, windows):
        self.windows, self.positions = windows, default_positions(WINDOW_TOKENS, PAIR_POSITIONS)
        self.source = self._log_probs(open_client(nano))

    def _log_probs(self, client):
        with client:
            return log_probs(client, self.windows, self.positions)

    def by_window(self, path: Path):
        """Mean KL of each window."""
        build = self._log_probs(LlamaCpp(path, listed=PAIR_LISTED))
        return kl_divergence(self.source, build).reshape(len(self.windows), -1).mean(1)

    def compare(self, build: str, plain: Path, important: Path) -> dict[str, Any]:
        without, with_importance = self.by_window(plain), self.by_window(important)
        difference = (with_importance - without) / without.mean()
        return {
            "build": build,
            "positions": len(self.windows) * len(self.positions),
            "kl": float(without.mean()),
            "kl_with_importance": float(with_importance.mean()),
            "change": float(difference.mean()),
            "standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
        }


def decompressed_by_its_library(folder: Path) -> int:
    """Weights that compressed-tensors' own dequantizer makes dense; it raises if one of the build is left over."""
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    quantized = {name.removesuffix("_scale") for name in stored if name.endswith("_scale")}
    dense = CompressedTensorsDequantizer(folder).validate(stored)
    return sum(dense[name].is_floating_point() and dense[name].element_size() > 1 for name in quantized)


def run(folder: Path, steps: int) -> dict[str, Any]:
    """The whole demo in `folder`; returns what `--json` prints."""
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
    report = ornith_moe("convert", str(nano), str(out), *_to(BUILDS), "--json")
    made = importance(nano, folder / "imatrix")
    again = ornith_moe(
        "convert", str(nano), str(folder / "imatrix"), *_to(WITH_IMPORTANCE), "--imatrix", made["path"], "--json"
    )
    tokens = heldout_tokens(nano, Settings.heldout_tokens)
    windows = held_out_windows(tokens, windows=WINDOWS, length=WINDOW_TOKENS)
    weights = sum(math.prod(weight.shape) for weight in open_source(nano).weights)

    source = Measured(nano, windows)
    rows = [
        {
            "build": "bf16 source",
            "files": 1,
            "tensor_bytes": report["bytes_read"],
            "bits_per_weight": 8 * report["bytes_read"] / weights,
            "perplexity": source.perplexity,
            "client": source.client,
            "completion": source.completion,
        }
    ]
    paths = {build["build"]: Path(build["path"]) for build in report["builds"]}
    ran: dict[str, Measured] = {}
    for build in report["builds"]:
        path = paths[build["build"]]
        verified = ornith_moe("verify", str(path), "--against", str(nano), "--json")
        rows.append(
            {
                "build": build["build"],
                "files": build["files"],
                "tensors": build["tensors"],
                "tensor_bytes": build["tensor_bytes"],
                "bits_per_weight": 8 * build["tensor_bytes"] / weights,
                "expert_sqnr_db": verified["roles"]["expert"]["sqnr_db"],
            }
        )
        if build["build"] == MLX and find_spec("mlx_lm") is None:
            rows[-1]["client"] = "none: mlx-lm is not installed"
            continue
        twin = REPACKED.get(build["build"], build["build"])
        measured = ran[twin] = ran.get(twin) or Measured(paths[twin], windows)
        rows[-1] |= {
            "kl": measured.kl(source),
            "top1": measured.top1(source),
            "perplexity": measured.perplexity,
            "client": measured.client,
            "client_seconds": round(measured.seconds, 1),
            "completion": measured.completion,
        }
        if build["build"] == "fp8-channel":
            rows[-1]["decompressed_by_compressed_tensors"] = decompressed_by_its_library(path)
    pairs = Pairs(nano, held_out_windows(tokens, windows=PAIR_WINDOWS, length=WINDOW_TOKENS))
    important = {build["build"]: Path(build["path"]) for build in again["builds"]}
    for path in important.values():
        ornith_moe("verify", str(path), "--against", str(nano), "--json")
    gains = [pairs.compare(build, paths[build], path) for build, path in important.items()]
    return {
        "nano": trained,
        "positions": WINDOWS * POSITIONS,
        "builds": rows,
        "imatrix": {key: made[key] for key in ("chunks", "ctx", "seconds", "peak_rss_bytes")},
        "importance": gains,
        "surprises": surprises({row["build"]: row["kl"] for row in rows if "kl" in row}, gains),
        "convert": {key: report[key] for key in ("bytes_read", "peak_rss_bytes")},
        "seconds_after_training": round(time.monotonic() - began, 1),
    }


def _to(builds) -> list[str]:
    return [word for build in builds for word in ("--to", build)]


def training_text(limit_bytes: int) -> str:
    """About `limit_bytes` of what nano was trained on, at most 8 KB of each file so that many kinds take part."""
    parts, size = [], 0
    for name, text in _read_library():
        if not _is_heldout(name) and size < limit_bytes:
            parts.append(text[:8192])
            size += len(parts[-1])
    return "\n".join(parts)


def importance(nano: Path, folder: Path) -> dict[str, Any]:
    """An importance matrix of `nano` in the new folder `folder`, from text that it was trained on."""
    folder.mkdir(parents=True)
    text = folder / "text.txt"
    text.write_text(training_text(TEXT_BYTES), "utf-8")
    size = ("--chunks", str(CHUNKS), "--ctx", str(CHUNK_TOKENS))
    return ornith_moe(
        "imatrix", str(nano), "--text", str(text), "--output", str(folder / "imatrix.gguf"), *size, "--json"
    )


def surprises(kl: dict[str, float], gains: list[dict[str, Any]]) -> list[str]:
    """Where KL does not go as fewer bits and importance promise."""
    pairs = [pair for pair in pairwise(LADDER) if not kl[pair[0]] < kl[pair[1]]]
    found = [f"KL of {low} is {kl[low]:.6f}, of {high} {kl[high]:.6f}" for low, high in pairs]
    return found + [f"importance does not lower the KL of {gain['build']}" for gain in gains if gain["change"] >= 0]


def print_table(result: dict[str, Any]) -> None:
    table = Table(title=f"ornith-nano: every build in a foreign client, {result['positions']} held-out positions")
    names = ("build", "files", "bytes", "bits/weight", "expert SQNR", "KL", "top-1", "perplexity")
    for name in names:
        table.add_column(name, justify="left" if name == "build" else "right", no_wrap=True)
    table.add_column("client that ran it")

    def cell(row: dict[str, Any], key: str, form: str) -> str:
        if key not in row:
            return "-"
        return "exact" if row[key] is None else form.format(row[key])

    how = dict.fromkeys(DEQUANTIZED, ", weights dequantized")
    how |= {build: f", as {twin}" for build, twin in REPACKED.items()}
    for row in result["builds"]:
        table.add_row(
            row["build"],
            str(row["files"]),
            f"{row['tensor_bytes']:,}",
            f"{row['bits_per_weight']:.2f}",
            cell(row, "expert_sqnr_db", "{:.1f} dB"),
            cell(row, "kl", "{:.6f}"),
            cell(row, "top1", "{:.1%}"),
            cell(row, "perplexity", "{:.2f}"),
            row["client"] + how.get(row["build"], ""),
        )
    out = Console(width=None if sys.stdout.isatty() else 160)
    out.print(table)
    for row in result["builds"]:
        if "completion" in row:
            out.print(f"{row['build']:20} {PROMPT!r} -> {row['completion']!r}", highlight=False, markup=False)
    for gain in result["importance"]:
        out.print(
            f"{gain['build']} with importance: KL {gain['kl']:.6f} -> {gain['kl_with_importance']:.6f}, "
            f"{gain['change']:+.1%} +- {gain['standard_error']:.1%} over {gain['positions']} positions",
            highlight=False,
        )
    for surprise in result["surprises"]:
        out.print(f"surprise: {surprise}", highlight=False)
    count = next(row["decompressed_by_compressed_tensors"] for row in result["builds"] if row["build"] == "fp8-channel")
    out.print(
        f"fp8-channel: compressed-tensors' own dequantizer reads all {count} quantized weights; transformers runs the "
        f"build with dequantized weights. After training: {result['seconds_after_training']:.0f} s.",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Ornith, convert it, run its builds in foreign clients.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="where nano and its builds live")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps of nano")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    quiet()
    try:
        result = run(arguments.folder, arguments.steps)
    except (OrnithError, OSError) as error:
        err.print(f"demo: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)


if __name__ == "__main__":
    main()
