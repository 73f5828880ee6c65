"""What each type of a GGUF does to each tensor of a model: what quant/conversion/sensitivity.py measures, kept.

    error[tensor, type] = sum over its matrices e of share[e] * sum over rows and columns of h[e, k] * (w - w')^2
    energy[tensor]      = the same of w^2
    w' = decode(encode(w))        h = importance of column k, 1 without an importance matrix
                                  share = tokens that matrix e saw, over those that a matrix saw on average

error / energy is the share of a tensor's output that is noise: h is the mean square of an input, so error is the mean
square that is added to the output, as long as inputs do not hang together. An expert counts as often as it is asked.
A tensor has every candidate that its rows allow; what gives way to one that does not divide them stands for it
(quant/gguf/mixtures.py), and types that are noise without importance are there only with it.

The file is JSON: `source` and `sample` (a digest of its weights), `imatrix` (a digest) or null, `types`, and `tensors`,
each with `shape`, `important`, `energy` and `errors` by type. Where KL was measured of tensors that alone have a type,
`text` (shape and digest of its tokens) and `effects`, each with `tensors`, `type`, `kl` and its standard error `kl_se`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.codecs.sizes import row_bytes
from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import json_bytes, read_json
from ornith_moe.quant.fitting.types import parse_kind, standing
from ornith_moe.quant.source.slab import matrix_shape

FORMAT = 1
MAX_BYTES, MAX_DIMENSION = 64 << 20, 1 << 32
MOST_NOISE = 1e3  # of an energy; a type that stores zeros makes 1


@dataclass(frozen=True, slots=True)
class TensorErrors:
    """One tensor: GGUF name, shape in Hugging Face order, whether importance weighs it, and what each type does."""

    name: str
    shape: tuple[int, ...]
    important: bool
    energy: float
    errors: Mapping[str, float]

    def relative(self, kind: str) -> float:
        """The share of its output that is noise in type `kind`."""
        return self.errors[kind] / self.energy if self.energy > 0 else 0.0

    def nbytes(self, kind: str) -> int:
        rows, columns = matrix_shape(self.shape)
        return rows * row_bytes(kind, columns)


@dataclass(frozen=True, slots=True)
class Effect:
    """KL(source || model) where these tensors alone are of `type`, nats per token, with its standard error."""

    tensors: tuple[str, ...]
    type: str
    kl: float
    kl_se: float | None


@dataclass(frozen=True)
class Sensitivity:
    """Of a whole model; made by `measure_sensitivity` and `read_sensitivity`."""

    source: str
    sample: str
    imatrix: str | None
    types: tuple[str, ...]
    tensors: tuple[TensorErrors, ...]
    text: str | None = None  # what the effects were measured on
    effects: tuple[Effect, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, TensorErrors]:
        return {tensor.name: tensor for tensor in self.tensors}

    def only(self, names: Collection[str]) -> Sensitivity:
        """Of these tensors, with the effects that tell of no other."""
        tensors = tuple(tensor for tensor in self.tensors if tensor.name in names)
        effects = tuple(effect for effect in self.effects if all(name in names for name in effect.tensors))
        return replace(self, tensors=tensors, effects=effects)


def sensitivity_bytes(found: Sensitivity) -> bytes:
    """The file that holds it."""
    tensors = {}
    for tensor in found.tensors:
        value = asdict(tensor)
        name = value.pop("name")
        tensors[name] = value
    head = {"format": FORMAT, "source": found.source, "sample": found.sample, "imatrix": found.imatrix}
    effects = {"text": found.text, "effects": [asdict(effect) for effect in found.effects]} if found.effects else {}
    return json_bytes(head | {"types": list(found.types), "tensors": tensors} | effects)


@budgeted
def read_sensitivity(path: str | Path) -> Sensitivity:
    """The sensitivity in a file.

    Raises:
        CheckpointError: no such file, another format, or numbers that cannot be.
    """
    value = read_json(path, what="a sensitivity, which 'ornith-moe sensitivity' makes", limit=MAX_BYTES, named=True)
    try:
        if value["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: is of format {brief(value['format'])}, this version reads {FORMAT}; make it again"
            )
        tensors = tuple(_tensor(name, entry) for name, entry in value["tensors"].items())
        imatrix, effects = value["imatrix"], value.get("effects", [])
        return Sensitivity(
            _text(value["source"]),
            _text(value["sample"]),
            imatrix if imatrix is None else _text(imatrix),
            tuple(parse_kind(_text(kind), "types") for kind in value["types"]),
            tensors,
            _text(value["text"]) if effects else None,
            tuple(_effect(entry, {tensor.name: tensor for tensor in tensors}) for entry in effects),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is no sensitivity, {brief(error)}; make it again with 'ornith-moe sensitivity'"
        ) from None


def _tensor(name: str, entry: Mapping[str, Any]) -> TensorErrors:
    shape = tuple(entry["shape"])
    if not 2 <= len(shape) <= 4 or not all(type(size) is int and 0 < size < MAX_DIMENSION for size in shape):
        raise ValueError(f"{name} has shape {list(shape)}")
    errors = {parse_kind(kind, name): _number(error, name) for kind, error in entry["errors"].items()}
    energy = _number(entry["energy"], name)
    for kind, error in errors.items():
        if standing(kind, shape[-1]) != kind:
            raise ValueError(f"{name} is {kind} and has {shape[-1]} columns")
        if energy > 0 and error > MOST_NOISE * energy:
            raise ValueError(f"{name} is {kind} with an error of {brief(error)} and an energy of {brief(energy)}")
    return TensorErrors(_text(name), shape, entry["important"] is True, energy, errors)


def _effect(entry: Mapping[str, Any], known: Mapping[str, TensorErrors]) -> Effect:
    names, kind, error = (
        tuple(map(_text, entry["tensors"])),
        parse_kind(_text(entry["type"]), "effects"),
        entry["kl_se"],
    )
    for name in names:
        if name not in known or standing(kind, known[name].shape[-1]) not in known[name].errors:
            raise ValueError(f"an effect is of {brief(name)} in {kind}, whose error is not known")
    if not names or len(set(names)) < len(names):
        raise ValueError("an effect is of no tensors, or of one twice")
    return Effect(names, kind, _number(entry["kl"], names[0]), error if error is None else _number(error, names[0]))


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} has {brief(value)} for a number from 0 on")
    return float(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{brief(value)} is no text")
    return value
