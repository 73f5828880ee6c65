"""What there is to convert: an architecture's weights, each tied to the rows of the file that hold it.

    config.json -> architecture -> weights (experts one by one) -> rows of the checkpoint's tensors

The same list of weights serves a config alone, where it says what a checkpoint would hold, and a real checkpoint, where
it is also the check: every weight must be there once, in its shape, and every tensor must be a weight. Experts may lie
fused, one by one or both ways in different layers. Multi-token-prediction tensors may be announced and absent, as in
every Ornith-1.0 checkpoint; the vision tower may be absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from ornith_moe.quant.architectures import Gemma4, Qwen35, architecture
from ornith_moe.quant.architectures.weight import Weight
from ornith_moe.quant.checkpoint import (
    Checkpoint,
    TensorInfo,
    matrix_shape,
    open_checkpoint,
    refuse_quantized,
)
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.files import read_json
from ornith_moe.quant.names import did_you_mean

# What a config cannot say: whether the MTP layer it announces was published. Ornith-1.0 has none, Qwen3.5 has.
PRESET_HAS_MTP = {
    "ornith-1.0-9b": False,
    "ornith-1.0-35b": False,
    "ornith-1.0-397b": False,
    "qwen3.5-9b": True,
    "qwen3.5-35b-a3b": True,
    "qwen3.5-397b-a17b": True,
    "gemma-4-31b": False,
}
MTP_CHOICES = (None, "keep", "drop")


@dataclass(frozen=True)
class Source:
    """Weights of one model and, unless it was made from a config alone, the rows that hold them."""

    name: str
    config: dict[str, Any]
    architecture: Qwen35 | Gemma4
    weights: tuple[Weight, ...]
    has_mtp: bool
    notes: tuple[str, ...]
    checkpoint: Checkpoint | None = None
    rows: tuple[tuple[TensorInfo, int], ...] = ()  # per weight: its tensor and first row there

    def dtype(self, index: int) -> str:
        return self.rows[index][0].dtype if self.rows else "BF16"

    @property
    def folder(self) -> Path | None:
        return self.checkpoint.folder if self.checkpoint else None

    @cached_property
    def layers(self) -> int:
        """Blocks of the model, MTP included."""
        return self.architecture.layers + (self.architecture.mtp_layers if self.has_mtp else 0)


def open_source(source: str | Path, *, mtp: str | None = None) -> Source:
    """A checkpoint folder, a config JSON, or the name of a preset.

    Args:
        source: folder; path of a `.json`; or one of `PRESET_HAS_MTP`.
        mtp: "keep" insists on the MTP tensors, "drop" leaves them out, None takes what is there. For a config alone
            None means what is known of a preset of that name, and otherwise no MTP.
    Raises:
        CheckpointError: nothing of that kind there, or whatever is wrong with it.
    """
    if mtp not in MTP_CHOICES:
        raise ValueError(f"mtp: expected keep or drop, got {mtp!r}")
    path = Path(source)
    if str(source) in PRESET_HAS_MTP and not path.exists():
        preset = resources.files("ornith_moe.quant").joinpath(f"presets/{source}.json")
        return source_from_config(json.loads(preset.read_bytes()), name=str(source), mtp=mtp)
    if path.is_dir():
        return source_from_checkpoint(open_checkpoint(path), mtp=mtp)
    if path.suffix == ".json" and path.is_file():
        config = read_json(path, named=True)
        refuse_quantized(config, path)
        return source_from_config(config, name=path.stem, mtp=mtp)
    raise CheckpointError(
        f"{source}: expected a checkpoint folder, a config .json or one of the presets {', '.join(PRESET_HAS_MTP)}"
        f"{did_you_mean(str(source), PRESET_HAS_MTP)}"
    )


def source_from_config(config: dict[str, Any], *, name: str, mtp: str | None = None) -> Source:
    """The weights a checkpoint of this config would hold, in BF16."""
    model = architecture(config)
    notes = []
    has_mtp = bool(model.mtp_layers) and (PRESET_HAS_MTP.get(name, False) if mtp is None else mtp == "keep")
    if mtp == "keep" and not model.mtp_layers:
        raise CheckpointError(f"{name}: --mtp keep, but the config announces no MTP layer; leave the option out")
    if model.mtp_layers and mtp is None and name not in PRESET_HAS_MTP:
        notes.append("the config announces an MTP layer, whose tensors may not exist: left out, --mtp keep counts them")
    prefix = "model.language_model." if "text_config" in config else "model."
    weights = tuple(model.weights(prefix, vision=model.vision is not None, mtp=has_mtp))
    return Source(name, config, model, weights, has_mtp, tuple(notes))


def source_from_checkpoint(checkpoint: Checkpoint, *, name: str | None = None, mtp: str | None = None) -> Source:
    """Tie every weight of the checkpoint's architecture to its rows, and account for every tensor.

    Args:
        name: of the model, in file names and metadata; default the folder's.
        mtp: as `open_source`.
    Raises:
        CheckpointError: a weight missing, twice or of the wrong shape; a tensor that is no weight.
    """
    folder, tensors = checkpoint.folder, checkpoint.tensors
    model = architecture(checkpoint.config)
    prefix = "model.language_model." if any(n.startswith("model.language_model.") for n in tensors) else "model."
    found_mtp = any(name.startswith("mtp.") for name in tensors)
    notes = []
    if mtp == "keep" and not found_mtp:
        raise CheckpointError(f"{folder}: --mtp keep, but no tensor named mtp.* is here; leave the option out")
    if found_mtp and not model.mtp_layers:
        raise CheckpointError(f"{folder}: holds mtp.* tensors, but config.json says mtp_num_hidden_layers 0")
    if model.mtp_layers and not found_mtp:
        notes.append("the config announces an MTP layer, but no mtp.* tensor exists: a GGUF will not announce it")
    vision = any(name.startswith(model.VISION_PREFIX) for name in tensors)
    if vision and model.vision is None:
        raise CheckpointError(f"{folder}: holds vision tensors, but config.json has no vision_config")
    if model.vision is not None and not vision:
        notes.append("the config describes a vision tower, but no tensor of it is here: builds are text only")

    weights = tuple(model.weights(prefix, vision=vision, mtp=found_mtp))
    used: set[str] = set()
    rows = tuple(_locate(weight, tensors, used) for weight in weights)
    unknown = tensors.keys() - used
    if model.tied and "lm_head.weight" in unknown:
        unknown = unknown - {"lm_head.weight"}
        notes.append("lm_head.weight repeats the tied embedding and is left out")
    if unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} tensors are no weights of {checkpoint.config.get('model_type')}, the first is "
            f"{min(unknown)}; config.json and shards may not be of one model"
        )
    keep = range(len(weights))
    if found_mtp and mtp == "drop":
        keep = [i for i in keep if weights[i].role != "mtp"]
        notes.append("MTP tensors are left out as asked")
    return Source(
        name or folder.resolve().name,
        checkpoint.config,
        model,
        tuple(weights[i] for i in keep),
        found_mtp and mtp != "drop",
        tuple(notes),
        checkpoint,
        tuple(rows[i] for i in keep),
    )


def _locate(weight: Weight, tensors: Mapping[str, TensorInfo], used: set[str]) -> tuple[TensorInfo, int]:
    alone = tensors.get(weight.name)
    packed = tensors.get(weight.packed.name) if weight.packed else None
    if alone and packed:
        raise CheckpointError(
            f"{alone.path.name}: expert weight {weight.name} is there on its own and inside {packed.name}; keep one"
        )
    info, shape, row = (alone, weight.shape, 0) if alone else (packed, getattr(weight.packed, "shape", None), None)
    if info is None:
        either = f" (nor {weight.packed.name})" if weight.packed else ""
        raise CheckpointError(f"weight {weight.name} is missing{either}; the checkpoint is incomplete, fetch it again")
    if info.shape != shape:
        raise CheckpointError(
            f"{info.path.name}: tensor {info.name} has shape {list(info.shape)}, config.json means {list(shape)}; "
            "config and shards are not of one model"
        )
    used.add(info.name)
    return info, weight.packed.row if row is None else row


def weight_matrix(weight: Weight) -> tuple[int, int]:
    """Rows and columns of a weight as the stream sees it."""
    return matrix_shape(weight.shape)
