"""Builds as they lie on a disk: what they say of themselves, their tensors by header, and the bytes of one in slabs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.files import open_file, read_json
from ornith_moe.quant.gguf.reader import read_gguf_header
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
        return manifest_of_folder(self.path) if self.is_folder else manifest_of_file(self.path)

    @cached_property
    def tensors(self) -> dict[str, FoundTensor]:
        """CheckpointError if it is not whole."""
        return read_safetensors_build(self.path) if self.is_folder else read_gguf_tensors(self.path)

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
        return read_gguf_header(self.path)[0]


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
    _, tensors = read_gguf_header(path)
    return {t.name: FoundTensor(t.dtype, t.shape, path, t.offset, t.nbytes, named=True) for t in tensors}


def _found(tensors: dict[str, TensorInfo]) -> dict[str, FoundTensor]:
    return {name: FoundTensor(t.dtype, t.shape, t.path, t.offset, t.nbytes) for name, t in tensors.items()}
