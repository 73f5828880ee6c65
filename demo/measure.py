"""What the rows of the demo take: verify a build, run it in a client on held-out text, measure importance.

Everything here runs in a process of the demo's pool, on one core: llama.cpp's answers pass through Python one by one,
so a client fills one core however many it is given, and two builds at a time fill two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from nano import _is_heldout, _read_library
from rich.console import Console

from ornith_moe.clients import LlamaCpp, open_client
from ornith_moe.compare import default_positions, kl_divergence, log_probs, perplexity, top1_agreement
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.decoded import open_decoded
from ornith_moe.streamed import compare_streamed

PROMPT = "def __init__(self, "
POSITIONS = 16  # of each window
TEXT_BYTES, CHUNKS, CHUNK_TOKENS = 8_000_000, 512, 256  # of the importance matrix

err = Console(stderr=True)


def on_one_core() -> None:
    """What a process of the pool does first."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands it runs


def ornith_moe(*arguments: str) -> dict[str, Any]:
    """Run the command as a user would; its JSON."""
    err.print("$ ornith-moe", *arguments[:-1], style="dim", highlight=False, soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "ornith_moe", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"ornith-moe {arguments[0]} ended with {done.returncode}, for the reason above")
    return json.loads(done.stdout)


class Measured:
    """What a client says of the held-out windows: log-probabilities, and a completion as a sign of life."""

    def __init__(self, path: Path, windows: np.ndarray):
        positions = default_positions(windows.shape[1], POSITIONS)
        began = time.monotonic()
        with LlamaCpp(path, threads=1) if path.suffix == ".gguf" else open_client(path) as client:
            self.client = client.name
            self.log_probs = log_probs(client, windows, positions)
            self.completion = client.complete(PROMPT, 12)
        self.targets = windows[:, [position + 1 for position in positions]].reshape(-1)
        self.perplexity = perplexity(self.log_probs, self.targets)
        self.seconds = time.monotonic() - began

    def row(self, reference: Measured | None = None) -> dict[str, Any]:
        row = {
            "perplexity": self.perplexity,
            "client": self.client,
            "client_seconds": round(self.seconds, 1),
            "completion": self.completion,
        }
        if reference:
            row["kl"] = float(kl_divergence(reference.log_probs, self.log_probs).mean())
            row["top1"] = top1_agreement(reference.log_probs, self.log_probs)
        return row


def verified(path: Path, nano: Path) -> dict[str, Any]:
    """`ornith-moe verify` of a build."""
    return ornith_moe("verify", str(path), "--against", str(nano), "--json")


def decompressed_by_its_library(folder: Path) -> int:
    """Weights that compressed-tensors' own dequantizer makes dense; it raises if one of the build is left over."""
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    quantized = {name.removesuffix("_scale") for name in stored if name.endswith("_scale")}
    dense = CompressedTensorsDequantizer(folder).validate(stored)
    return sum(dense[name].is_floating_point() and dense[name].element_size() > 1 for name in quantized)


def importance(nano: Path, folder: Path, builds: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Path]]:
    """An importance matrix in the new folder `folder`, from text that nano was trained on; `builds` made with it."""
    folder.mkdir(parents=True)
    text, matrix = folder / "text.txt", str(folder / "imatrix.gguf")
    text.write_text(_training_text(TEXT_BYTES), "utf-8")
    size = ("--chunks", str(CHUNKS), "--ctx", str(CHUNK_TOKENS))
    made = ornith_moe("imatrix", str(nano), "--text", str(text), "--output", matrix, *size, "--json")
    to = [word for build in builds for word in ("--to", build)]
    report = ornith_moe("convert", str(nano), str(folder), *to, "--imatrix", matrix, "--json")
    paths = {build["build"]: Path(build["path"]) for build in report["builds"]}
    for path in paths.values():
        verified(path, nano)
    return made, paths


def _training_text(limit_bytes: int) -> str:
    """About `limit_bytes` of what nano was trained on, at most 8 KB of each file so that many kinds take part."""
    parts, size = [], 0
    for name, text in _read_library():
        if not _is_heldout(name) and size < limit_bytes:
            parts.append(text[:8192])
            size += len(parts[-1])
    return "\n".join(parts)


def gains(nano: Path, windows: np.ndarray, pairs: dict[str, tuple[Path, Path]]) -> list[dict[str, Any]]:
    """What importance changes: {build: (without it, with it)}, all compared with the source in one pass."""
    source = open_source(nano, mtp="drop")
    found = compare_streamed(source, [open_decoded(path, source) for pair in pairs.values() for path in pair], windows)
    told = []
    for build, plain, important in zip(pairs, found.builds[::2], found.builds[1::2], strict=True):
        difference = (np.array(important.kl_windows) - plain.kl_windows) / plain.kl_mean
        told.append(
            {
                "build": build,
                "positions": found.positions,
                "kl": plain.kl_mean,
                "kl_with_importance": important.kl_mean,
                "change": float(difference.mean()),
                "standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
            }
        )
    return told
