"""Builds as they lie on a disk: what they say of themselves, their tensors by header, and the bytes of one in slabs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import open_file, read_json
from ornith_moe.quant.gguf.reader import read_gguf_header
from ornith_moe.quant.gguf.splits import COUNT, NUMBER, TENSORS, first_part, parts_of
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.checkpoint import ITEM_BYTES, TensorInfo, read_header, read_tables

MANIFEST = "ornith_manifest.json"
SLAB_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """A tensor of a build as its file describes it; `shape` in Hugging Face order."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    named: bool = False  # the user named this very file

    @property
    def item_bytes(self) -> int:
        """Bytes of a value of a safetensors dtype."""
        return ITEM_BYTES[self.dtype]

    def slabs(self, block_bytes: int, block: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first value, uint8 [n]) in whole blocks of so many bytes and values, whatever the shape."""
        slab = SLAB_BYTES // block_bytes * block_bytes
        for start in range(0, self.nbytes, slab):
            yield start // block_bytes * block, self.read(start, min(slab, self.nbytes - start))

    def read(self, start: int, length: int) -> np.ndarray:
        """uint8 [length] from byte `start` of the tensor on.

        Raises:
            CheckpointError: the file ends before.
        """
        with open_file(self.path, what="a file of the build", named=self.named) as file:
            data = np.frombuffer(os.pread(file.fileno(), length, self.offset + start), np.uint8)
        if data.size != length:
            raise CheckpointError(f"{self.path.name}: ends early, at byte {self.offset + start + data.size}")
        return data


class StoredBuild:
    """What lies at `path`: a folder of safetensors, or one file, which is a GGUF."""

    def __init__(self, path: Path):
        self.path = path
        if not (path.is_dir() or path.is_file()):
            found = "something that is neither" if path.exists() else "nothing"
            raise CheckpointError(
                f"{path}: no build here; expected a folder of safetensors or a .gguf file, found {found}"
            )
        self.is_folder = path.is_dir()

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.path if self.is_folder else self.path.parent

    @property
    def manifest(self) -> Path:
        return manifest_of_folder(self.path) if self.is_folder else manifest_of_file(first_part(self.path))

    @cached_property
    def tensors(self) -> dict[str, FoundTensor]:
        """CheckpointError if it is not whole."""
        return read_safetensors_build(self.path) if self.is_folder else self._gguf[1]

    @property
    def files(self) -> list[str]:
        """Names of the files that hold its tensors, and of any other of their kind in a folder."""
        if self.is_folder:
            return [path.name for path in self.path.iterdir() if path.suffix == ".safetensors"]
        return sorted({tensor.path.name for tensor in self.tensors.values()} | {self.path.name})

    @cached_property
    def quantization_config(self) -> dict[str, Any]:
        """Of the config of a folder; {} if there is none."""
        section = read_json(self.path / "config.json").get("quantization_config")
        return section if isinstance(section, dict) else {}

    @property
    def quant_method(self) -> str | None:
        method = self.quantization_config.get("quant_method")
        return method if isinstance(method, str) else None

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Of a GGUF."""
        return self._gguf[0]

    @cached_property
    def _gguf(self) -> tuple[dict[str, Any], dict[str, FoundTensor]]:
        return read_gguf_build(self.path)


def manifest_of_folder(path: Path) -> Path:
    return path / MANIFEST


def manifest_of_file(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")


def read_safetensors_build(folder: Path) -> dict[str, FoundTensor]:
    """Tensors of a safetensors folder, quantized or not; CheckpointError if it is not whole."""
    return _found(read_tables(folder)[1])


def read_safetensors_file(path: Path) -> dict[str, FoundTensor]:
    """Tensors of one safetensors file that the user named; CheckpointError if it is none or not whole."""
    return _found(read_header(path, named=True))


def read_gguf_tensors(path: Path) -> dict[str, FoundTensor]:
    """Tensors of a GGUF; CheckpointError if it is none or not whole."""
    return read_gguf_build(path)[1]


def read_gguf_build(path: Path) -> tuple[dict[str, Any], dict[str, FoundTensor]]:
    """Keys and tensors of a GGUF, in all its files where it is split; `path` is any of them.

    Raises:
        CheckpointError: it is none or not whole.
    """
    keys, tensors = read_gguf_header(path)
    parts = parts_of(path, keys)
    found: dict[str, FoundTensor] = {}
    for number, part in enumerate(parts):
        named = part == path
        own, tensors = (keys, tensors) if named and len(parts) == 1 else read_gguf_header(part, named=named)
        if len(parts) > 1 and (own.get(NUMBER), own.get(COUNT)) != (number, len(parts)):
            raise CheckpointError(f"{part.name}: is not part {number + 1} of {len(parts)} by its keys; fetch it again")
        keys = own if number == 0 else keys
        for t in tensors:
            if t.name in found:
                raise CheckpointError(f"{part.name}: tensor {bare(t.name)} is in {found[t.name].path.name} too")
            found[t.name] = FoundTensor(t.dtype, t.shape, part, t.offset, t.nbytes, named)
    if len(parts) > 1 and keys.get(TENSORS) != len(found):
        raise CheckpointError(
            f"{parts[0].name}: counts {brief(keys.get(TENSORS))} tensors, its files hold {len(found)}"
        )
    return keys, found


def _found(tensors: dict[str, TensorInfo]) -> dict[str, FoundTensor]:
    return {name: FoundTensor(t.dtype, t.shape, t.path, t.offset, t.nbytes) for name, t in tensors.items()}
