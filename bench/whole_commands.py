"""Whole commands, from their start to their exit, on a checkpoint that is no toy: beside `cp` and what one would use.

Source: layers of the 35B with all 256 experts, random BF16, 8.8 GB in two shards, in the page cache where that has room
(`SMALL` of them where a run is to be quick). `cp -r` copies as many bytes; it does not encode, hash, flush or read
back. Each command runs before it is timed, and what ours has made passes `verify` against the source. The note says the
CPU seconds of the last round, user and system.
"""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np

from ornith_moe.bench.peers import Unable
from ornith_moe.bench.tasks import Side, Task, Work
from ornith_moe.bench.timing import Times
from ornith_moe.quant.source.preset import read_preset
from ornith_moe.quant.source.weights import open_source, source_from_config
from ornith_moe.quant.verification.verify import verify

PRESET, LAYERS = "ornith-1.0-35b", 4
BUILDS = ("fp8-channel",), ("gguf:Q8_0",), ("gguf:Q4_K_M",), ("fp8-channel", "gguf:Q8_0", "gguf:Q4_K_M"), ("mlx:4",)
SMALL = {"num_experts": 8, "vocab_size": 4096}
COPY, MLX = "cp -r", "mlx_lm.convert"


def tasks(quick: bool, scratch: Callable[[], Path], tokenizer: Callable[[Path], None]) -> list[Task]:
    """One for each of BUILDS; `tokenizer` puts a tokenizer into a folder."""
    found = []
    for builds in BUILDS[:1] if quick else BUILDS:
        names = {"ours": False, COPY: False} | ({MLX: True} if builds == ("mlx:4",) else {})
        case = {"model": "ornith-35b", "layers": LAYERS, "build": " + ".join(builds), "whole": "command"}
        group = f"the command, {LAYERS} layers of {PRESET}, to {case['build']}"
        prepare = partial(_prepare, builds, quick, scratch, tokenizer)
        found.append(Task("convert", group, case, names, prepare, budget=20))
    return found


@cache
def checkpoint(folder: Path, quick: bool, tokenizer: Callable[[Path], None]) -> Path:
    """Random BF16 weights of the sizes of PRESET, experts fused, under `folder`."""
    config = read_preset(PRESET)[0]
    text = config["text_config"]
    text |= {"num_hidden_layers": LAYERS, "layer_types": text["layer_types"][:LAYERS], **(SMALL if quick else {})}
    source = source_from_config(config, name="source", mtp="drop")
    shapes = {}
    for weight in source.weights:
        if weight.role != "vision":
            name, shape = (weight.packed.name, weight.packed.shape) if weight.packed else (weight.name, weight.shape)
            shapes[name] = shape
    folder.mkdir()
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)
    values = (noise.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * int(np.prod(known)) for known in shards[-1].values()) + 2 * int(np.prod(shape)) > 5e9:
            shards.append({})
        shards[-1][name] = shape
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _write(folder / file, shard, values)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tokenizer(folder)
    return folder


def _write(path: Path, shapes: dict[str, tuple[int, ...]], values: np.ndarray) -> None:
    """A safetensors file of such tensors, whose values repeat `values` from a place of their own on."""
    position, header = 0, {}
    for name, shape in shapes.items():
        stop = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(shapes.values()):
            left, start = int(np.prod(shape)), 997 * number
            while left:
                part = values[start : start + left]
                file.write(part.data)
                left, start = left - len(part), 0


def _prepare(
    builds: tuple[str, ...], quick: bool, scratch: Callable[[], Path], tokenizer: Callable[[Path], None]
) -> Work:
    folder, out = checkpoint(scratch() / "whole", quick, tokenizer), scratch() / "out"
    size = sum(path.stat().st_size for path in folder.iterdir())
    used: dict[str, str] = {}
    options = [word for build in builds for word in ("--to", build)]
    ours = [sys.executable, "-m", "ornith_moe", "convert", str(folder), str(out), *options, "--device", "cpu", "--json"]
    theirs = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(folder), "--mlx-path", str(out), "-q"]

    def run(name: str, command: list[str]) -> str:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, " ".join(done.stderr.split())[-300:]
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        used[name] = f"{user:.1f} s user, {system:.1f} s system"
        return done.stdout

    def side(name: str, command: list[str], check: Callable[[str], float] = lambda told: 0.0) -> Side:
        return Side(partial(run, name, command), check, setup=lambda: shutil.rmtree(out, ignore_errors=True))

    def check(told: str) -> float:
        source = open_source(folder)
        for build in json.loads(told)["builds"]:
            found = verify(build["path"], source)
            assert found.ok, str(found.problems[:1])
        return 0.0

    def mlx() -> Side:
        if subprocess.run([sys.executable, "-c", "import mlx_lm"], capture_output=True).returncode:
            raise Unable("missing", "mlx-lm is not installed; pip install 'ornith-moe[mlx]'")
        return side(MLX, theirs)

    sides = {
        "ours": lambda: side("ours", ours, check),
        COPY: lambda: side(COPY, ["cp", "-r", str(folder), str(out)]),
        MLX: mlx,
    }

    def note(name: str, times: Times) -> str:
        return f"{size / times.median_s / 1e9:.2f} GB/s of source, {used[name]}"

    return Work(sides, 2 * size, note=note)
