"""Where every byte of a build will lie, decided before the first is written.

A build's files have known sizes and each tensor a known place, so weights can be written in any order, by any number of
threads, and a file is complete exactly when its extents tile it. A layout is the header of each file plus the offset of
each tensor; the payload is not its business.

Safetensors: tensors in plan order, a new shard when the next would pass `max_shard_bytes`; header padded with spaces to
8 bytes, as the format asks. GGUF: one file, or several (quant/gguf/splits.py), headers from quant/gguf/header.py,
tensors aligned to 32 bytes.
Nothing of the machine, the date or a path enters a header: equal sources give equal bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ornith_moe.quant.builds.plan import BuildPlan, OutputTensor
from ornith_moe.quant.gguf.header import Entry, gguf_header, padded
from ornith_moe.quant.gguf.splits import Split, part_name, split_entries

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class OutputFile:
    """A file of a build: its name in the build, its first bytes, and its size."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Layout:
    """Files of a build and the place of each tensor: (file index, offset in that file), parallel to plan.tensors."""

    files: tuple[OutputFile, ...]
    places: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()  # what a user should know of what the headers hold


def shard_tensors(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> list[list[int]]:
    """Indices of `tensors` per shard, in order; a tensor larger than the limit gets a shard of its own."""
    shards: list[list[int]] = [[]]
    filled = 0
    for index, tensor in enumerate(tensors):
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += tensor.nbytes
    return shards


def safetensors_layout(plan: BuildPlan, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES, form: str = "pt") -> Layout:
    """Layout of a safetensors build, named as transformers names shards; `form`: what headers name as their format."""
    shards = shard_tensors(plan.tensors, max_shard_bytes)
    files, places = [], [(0, 0)] * len(plan.tensors)
    for number, shard in enumerate(shards):
        header: dict[str, object] = {"__metadata__": {"format": form}}
        position = 0
        for index in shard:
            tensor = plan.tensors[index]
            end = position + tensor.nbytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
            places[index] = (number, position)
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for index in shard:
            places[index] = (number, start + places[index][1])
        name = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        files.append(OutputFile(name, struct.pack("<Q", len(text)) + text, start + position))
    return Layout(tuple(files), tuple(places))


def safetensors_index(plan: BuildPlan, layout: Layout) -> dict[str, Any]:
    """model.safetensors.index.json of a build."""
    names = zip(plan.tensors, layout.places, strict=True)
    weight_map = {tensor.name: layout.files[file].name for tensor, (file, _) in names}
    return {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def gguf_layout(
    plan: BuildPlan,
    file_name: str,
    metadata: Sequence[Entry],
    notes: tuple[str, ...] = (),
    split: Split | None = None,
) -> Layout:
    """Layout of a GGUF build; `metadata` are the entries of `gguf_metadata`."""
    cuts = gguf_cuts(plan, split)
    files, places = [], []
    for number, cut in enumerate(cuts):
        tensors, name = [plan.tensors[index] for index in cut], file_name
        entries = list(metadata) if number == 0 else []
        if len(cuts) > 1:
            entries += split_entries(number, len(cuts), len(plan.tensors))
            name = part_name(file_name, number, len(cuts))
        header = gguf_header(entries, ((t.name, t.dtype, t.shape, t.nbytes) for t in tensors))
        position = len(header)
        for tensor in tensors:
            places.append((number, position))
            position += padded(tensor.nbytes)
        files.append(OutputFile(name, header, position))
    return Layout(tuple(files), tuple(places), notes)


def gguf_cuts(plan: BuildPlan, split: Split | None) -> list[range]:
    """Which tensors each file of a GGUF build holds."""
    return split.cut([padded(t.nbytes) for t in plan.tensors]) if split else [range(len(plan.tensors))]
