"""A GGUF as a source, back to Hugging Face's names and numbers: F32, F16, BF16 and Q8_0, a text model, split or not.

    w = f'(the rows of its tensors, without the order of rows and columns)

The architecture says where each weight lies in a GGUF and what happened to it (`gguf_places`); here it is undone:
stacked experts are taken apart, heads are put back into Hugging Face's order, 1 is taken off norms, -exp(w) becomes w.
A GGUF does not hold a config.json or all of a tokenizer, so those lie beside it. It is what its type kept: of Q8_0,
what that rounded; of BF16 all, with w + 1 and exp(w) rounded in F32, far below BF16. The vision tower is not in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ornith_moe.quant.builds.stored import FoundTensor, read_gguf_build
from ornith_moe.quant.codecs.sizes import row_bytes
from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import read_json
from ornith_moe.quant.gguf.mixtures import FILE_TYPES
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.architectures import Architecture, architecture
from ornith_moe.quant.source.architectures.weight import Place, Weight
from ornith_moe.quant.source.checkpoint import CONFIG, without_quantization
from ornith_moe.quant.source.slab import Slab, matrix_shape
from ornith_moe.quant.source.source import Source, weight_matrix
from ornith_moe.quant.source.weights import MTP_CHOICES, checked_name

TYPES = ("F32", "F16", "BF16", "Q8_0")
WHOLE = "; give a GGUF of BF16, F16, F32 or Q8_0"


@dataclass(frozen=True, kw_only=True)
class GgufSource(Source):
    """The weights of one GGUF; `places` of each say in which rows of which tensors it lies."""

    path: Path
    tensors: Mapping[str, FoundTensor]
    places: tuple[tuple[Place, ...], ...]
    state: str

    def dtype(self, index: int) -> str:
        place, *others = self.places[index]
        kind = self.tensors[place.name].dtype
        return kind if kind != "Q8_0" and place.transform.exact and not others else "F32"

    def kept(self, index: int) -> str:
        """F32 is what a GGUF holds of some weights that were BF16, unless all of it is."""
        dtype = self.dtype(index)
        return dtype if dtype != "F32" or self.tensors[self.places[0][0].name].dtype == "F32" else "BF16"

    def read(self, index: int, start: int, rows: int) -> Slab:
        from ornith_moe.quant.codecs.gguf import dequantize_gguf  # not at import: planning needs no numba

        total, columns = weight_matrix(self.weights[index])
        values = np.empty((rows, columns), np.float32)
        for place in self.places[index]:
            targets = place.transform.targets(start, rows, total)
            targets = np.arange(start, start + rows) if targets is None else targets
            taken, tensor = targets >= 0, self.tensors[place.name]
            stored = dequantize_gguf(self._rows(tensor, place.row + targets[taken]), tensor.dtype)
            values[taken] = place.transform.inverse(stored)
        return Slab(_as(values, self.dtype(index)), self.dtype(index))

    def _rows(self, tensor: FoundTensor, rows: np.ndarray) -> np.ndarray:
        """uint8 [rows, row_bytes] of these rows of a tensor, neighbours in one read."""
        size = row_bytes(tensor.dtype, matrix_shape(tensor.shape)[1])
        found = np.empty((len(rows), size), np.uint8)
        pieces = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
        for piece in pieces if len(rows) else []:
            stored = tensor.read(int(rows[piece[0]]) * size, len(piece) * size)
            found[piece[0] : piece[-1] + 1] = stored.reshape(len(piece), size)
        return found

    @property
    def fingerprint(self) -> str:
        return self.state

    @property
    def folder(self) -> Path:
        return self.path.parent

    def position(self, index: int) -> tuple[Any, ...]:
        place = self.places[index][0]
        tensor = self.tensors[place.name]
        return tensor.path.name, tensor.offset, place.row

    def changed(self) -> bool:
        return _state(self.path, self.tensors) != self.state

    def modified_ns(self) -> int:
        return max(path.stat().st_mtime_ns for path in _files(self.path, self.tensors))


def open_gguf(path: Path, *, mtp: str | None = None, name: str | None = None) -> GgufSource:
    """The text model in a GGUF, with config and tokenizer beside it.

    Args:
        mtp, name: as `open_source`; default the file's without its type.
    Raises:
        CheckpointError: no GGUF, one of another architecture than the config's, quantized beyond Q8_0, a tensor
            missing, of another shape or unknown.
    """
    if mtp not in MTP_CHOICES:
        raise ValueError(f"mtp: expected keep or drop, got {brief(mtp)}")
    keys, tensors = read_gguf_build(path)
    if not (path.parent / CONFIG).is_file():
        raise CheckpointError(
            f"{path}: a GGUF does not hold its config; copy config.json and the tokenizer's files of its model there"
        )
    config, _, notes = without_quantization(read_json(path.parent / CONFIG), path.parent / CONFIG, {})
    model = architecture(config)
    if keys.get("general.architecture") != model.gguf_architecture:
        raise CheckpointError(
            f"{path}: is of architecture {brief(keys.get('general.architecture'))} and the config.json beside it means "
            f"{model.gguf_architecture}; copy the config.json of its model there"
        )
    has_mtp = any(model.GGUF_MTP in name for name in tensors)
    if mtp == "keep" and not has_mtp:
        raise CheckpointError(
            f"{path}: --mtp keep, but no tensor named {model.GGUF_MTP}* is here; leave the option out"
        )
    held = tuple(model.weights(model.prefix, vision=False, mtp=has_mtp))
    places = tuple(model.gguf_places(weight) for weight in held)
    _check(path, model, held, places, tensors)
    kept = [not (mtp == "drop" and weight.role == "mtp") for weight in held]
    notes += (f"weights are those of a GGUF of {_kinds(tensors)}: what that rounded stays so",)
    if model.vision is not None:
        notes += ("the config describes a vision tower, which a text GGUF does not hold: builds are text only",)
    return GgufSource(
        name=checked_name(name) if name is not None else _model_of(path),
        config=config,
        architecture=model,
        weights=tuple(weight for weight, keep in zip(held, kept, strict=True) if keep),
        has_mtp=has_mtp and mtp != "drop",
        notes=notes,
        path=path,
        tensors=tensors,
        places=tuple(each for each, keep in zip(places, kept, strict=True) if keep),
        state=_state(path, tensors),
    )


def _check(
    path: Path,
    model: Architecture,
    weights: tuple[Weight, ...],
    places: tuple[tuple[Place, ...], ...],
    tensors: Mapping[str, FoundTensor],
) -> None:
    """Every weight in tensors of its shape and of a type that is read, and no tensor beside them."""
    used = set(model.gguf_constants())
    for weight, each in zip(weights, places, strict=True):
        for place in each:
            tensor = tensors.get(place.name)
            if tensor is None or tensor.shape != place.shape:
                got = f"is {list(tensor.shape)}" if tensor else "is not there"
                raise CheckpointError(
                    f"{path}: tensor {place.name}, for {weight.name}, {got}; config.json means {list(place.shape)}, so "
                    "copy the config.json of its model there"
                )
            if tensor.dtype not in TYPES:
                raise CheckpointError(f"{path}: tensor {place.name} is {tensor.dtype}, which lost too much{WHOLE}")
            used.add(place.name)
    if unknown := sorted(tensors.keys() - used):
        raise CheckpointError(
            f"{path}: tensor {bare(unknown[0])} is of no weight that config.json means; copy the config.json of its "
            "model there"
        )


def _model_of(path: Path) -> str:
    """`model` of model-BF16.gguf, and of model-BF16-00001-of-00002.gguf."""
    model, _, kind = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem).rpartition("-")
    return model if model and kind.upper() in FILE_TYPES else path.stem


def _kinds(tensors: Mapping[str, FoundTensor]) -> str:
    """The types of its matrices."""
    return ", ".join(sorted({tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1}))


def _as(values: np.ndarray, dtype: str) -> np.ndarray:
    """uint8 of fp32 values that came from `dtype`."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype], copy=False).view(np.uint8)


def _files(path: Path, tensors: Mapping[str, FoundTensor]) -> list[Path]:
    """The config, and all files that hold tensors."""
    return [path.parent / CONFIG, *sorted({tensor.path for tensor in tensors.values()})]


def _state(path: Path, tensors: Mapping[str, FoundTensor]) -> str:
    """Of the files, by names, sizes and times of change."""
    found = [(each.name, each.stat()) for each in _files(path, tensors)]
    return xxhash.xxh3_128_hexdigest(f"{[(name, at.st_size, at.st_mtime_ns) for name, at in found]}".encode())
