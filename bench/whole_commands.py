"""Whole commands, from their start to their exit, on a checkpoint that is no toy: beside `cp` and what one would use.

Source: layers of the 35B with all 256 experts, random BF16, 8.8 GB in two shards, read before each call so that it is
in the page cache where that has room (`SMALL` of them where a run is to be quick). `cp -r` copies as many bytes; it
does not encode, hash, flush or read back. The tools that make the same are in real_tools.py.

Each command first runs with nothing in the page cache, untimed: so its bytes read are counted, and what it made is
checked. Ours passes `verify` against the source; a tool's tensors have the bytes of ours, or pass `verify` too.
The note says the CPU seconds of the last round, user and system.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ornith_moe.bench.command import Command, Step, digests
from ornith_moe.bench.real_tools import TOOLS, Place, Tool
from ornith_moe.bench.tasks import Settings, Side, Task, Work
from ornith_moe.bench.timing import Times
from ornith_moe.quant.source.preset import read_preset
from ornith_moe.quant.source.weights import open_source, source_from_config
from ornith_moe.quant.verification.verify import verify

PRESET, LAYERS = "ornith-1.0-35b", 4
THREE = "fp8-channel", "gguf:Q8_0", "gguf:Q4_K_M"
BUILDS = *((name,) for name in THREE), THREE, ("mlx:4",), ("nvfp4",)
SMALL = {"num_experts": 8, "vocab_size": 4096}
COPY = "cp -r"


def tasks(settings: Settings, scratch: Callable[[], Path], tokenizer: Callable[[Path], None]) -> list[Task]:
    """One for each of BUILDS, for the first alone in a quick run of everything; `tokenizer` puts one into a folder."""
    found, quick = [], settings.quick
    for builds in BUILDS[:1] if quick and not settings.keyword else BUILDS:
        names = {"ours": False, COPY: False} | {tool.name: True for tool in TOOLS if (tool.build,) == builds}
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
    folder = checkpoint(scratch() / "whole", quick, tokenizer)
    size = sum(path.stat().st_size for path in folder.iterdir())
    place, made = Place(folder, scratch() / "out"), Made(builds, folder, scratch() / "ours")
    commands: dict[str, Command] = {}

    def side(name: str, steps: list[Step], check: Callable[[str], float], **more: Any) -> Side:
        command = commands[name] = Command(steps, folder, place.out, **more)
        return Side(command, check, setup=command.prepare, used=lambda: command.used)

    def copied(told: str) -> float:
        sizes = [sorted((p.name, p.stat().st_size) for p in where.iterdir()) for where in (folder, place.out)]
        assert sizes[0] == sizes[1], "what it copied has other sizes"
        return 0.0

    def theirs(tool: Tool) -> Side:
        found = tool.find()
        more = {"versions": found.version, "into": tool.into}
        return side(tool.name, tool.steps(found, place), lambda told: tool.check(place, made.digests), **more)

    sides: dict[str, Callable[[], Side]] = {
        "ours": lambda: side("ours", [Step(_convert(folder, place.out, builds))], made.check),
        COPY: lambda: side(COPY, [Step(["cp", "-r", str(folder), str(place.out)])], copied),
    }
    sides |= {tool.name: partial(theirs, tool) for tool in TOOLS if (tool.build,) == builds}

    def note(name: str, times: Times) -> str:
        return f"{size / times.median_s / 1e9:.2f} GB/s of source, {commands[name].told}"

    return Work(sides, 2 * size, note=note)


def _convert(folder: Path, out: Path, builds: tuple[str, ...]) -> list[str]:
    options = [word for build in builds for word in ("--to", build)]
    return [sys.executable, "-m", "ornith_moe", "convert", str(folder), str(out), *options, "--device", "cpu", "--json"]


class Made:
    """What ours has made of a source: verified, and the digests of its tensors, which outlive its files."""

    def __init__(self, builds: tuple[str, ...], folder: Path, out: Path):
        self.builds, self.folder, self.out = builds, folder, out
        self._digests: dict[str, str] = {}

    def check(self, told: str) -> float:
        """Verify what the JSON of a conversion names."""
        source = open_source(self.folder)
        for build in json.loads(told)["builds"]:
            found = verify(build["path"], source)
            assert found.ok, str(found.problems[:1])
            if len(self.builds) == 1:
                self._digests = digests(Path(build["path"]))
        return 0.0

    def digests(self) -> Mapping[str, str]:
        """Of a build, which is made anew where ours did not run."""
        if not self._digests:
            command = Command([Step(_convert(self.folder, self.out, self.builds))], self.folder, self.out)
            command.prepare()
            self.check(command())
            shutil.rmtree(self.out)
        return self._digests
