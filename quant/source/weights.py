"""Opening what there is to convert: an architecture's weights, each tied to the rows of the file that hold it.

    config.json -> architecture -> weights (experts one by one) -> rows of the checkpoint's tensors

The same list of weights serves a config alone, where it says what a checkpoint would hold, and a real checkpoint, where
it is also the check: every weight must be there once, in its shape, and every tensor must be a weight or left out for a
reason that is told. Experts may lie fused, one by one or both ways in different layers. Multi-token-prediction tensors
may be announced and absent, as in every Ornith-1.0 checkpoint; the vision tower may be absent.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import read_json
from ornith_moe.quant.names import did_you_mean
from ornith_moe.quant.source.accounts import LeftOut, bare, some
from ornith_moe.quant.source.architectures import Architecture, architecture
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.checkpoint import (
    ITEM_BYTES,
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    without_quantization,
)
from ornith_moe.quant.source.nvfp4 import PACKED, PACKED_SUFFIX, Nvfp4Scales, nvfp4_scales_of
from ornith_moe.quant.source.preset import preset_names, read_preset
from ornith_moe.quant.source.quantized import (
    ACTIVATIONS,
    E4M3,
    READ,
    Scales,
    is_of_activations,
    layout_name,
    planned_as_bf16,
    scales_of,
)
from ornith_moe.quant.source.reconcile import (
    HEAD,
    absent_parts,
    check_parts,
    mtp_beside,
    mtp_of,
    named_tensors,
    settle_head,
)
from ornith_moe.quant.source.shards import MTP_ADVICE
from ornith_moe.quant.source.source import CheckpointSource, ConfigSource, Rows, Source
from ornith_moe.quant.source.tensor_names import is_buffer, is_quantization

MTP_CHOICES = (None, "keep", "drop")
LONGEST_NAME = 200  # bytes; a file's name may have 255
QUANTIZED_ADVICE = f"(of quantized weights only FP8 is read, {READ}, and NVFP4: use its BF16 original, or an FP8 one)"
BUFFERS = "buffers that every model computes for itself"
DROPPED_MTP = "multi-token prediction, dropped as asked"


def open_source(source: str | Path, *, mtp: str | None = None, name: str | None = None) -> Source:
    """A checkpoint folder, a config JSON, or the name of a preset.

    Args:
        source: folder; path of a `.json`; or one of `preset_names()`.
        mtp: "keep" insists on the MTP tensors, "drop" leaves them out, None takes what is there. For a config alone
            None means what is known of a preset of that name, and otherwise no MTP.
        name: of the model, in file names and metadata; default `model_name` of the folder, or the config's stem.
    Raises:
        CheckpointError: nothing of that kind there, or whatever is wrong with it.
    """
    if mtp not in MTP_CHOICES:
        raise ValueError(f"mtp: expected keep or drop, got {brief(mtp)}")
    path = Path(source)
    if str(source) in preset_names() and not path.exists():
        opened = source_from_config(read_preset(str(source))[0], name=str(source), mtp=mtp)
    elif path.is_dir():
        return source_from_checkpoint(open_checkpoint(path, drop_mtp=mtp == "drop"), name=name, mtp=mtp)
    elif path.suffix == ".json" and path.is_file():
        config, section, _ = without_quantization(read_json(path, named=True), path, None)
        opened = source_from_config(config, name=path.stem, mtp=mtp)
        opened = replace(opened, notes=(*planned_as_bf16(section), *opened.notes))
    else:
        raise CheckpointError(
            f"{source}: expected a checkpoint folder, a config .json or one of the presets {', '.join(preset_names())}"
            f"{did_you_mean(str(source), preset_names())}"
        )
    return opened if name is None else replace(opened, name=checked_name(name))


def model_name(folder: str | Path) -> str:
    """What to call the model in `folder`: the name of the folder as it is given, of the link if it is one, or of the
    repository if it is a snapshot of a Hub cache, `models--org--name/snapshots/<commit>`; `_` for what is no text.
    """
    path = Path(os.path.abspath(folder))
    repository = path.parent.parent.name
    cached = path.parent.name == "snapshots" and repository.startswith("models--")
    name = repository.rpartition("--")[2] if cached else path.name
    name = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)
    return name.encode()[:LONGEST_NAME].decode(errors="ignore") or "model"


def checked_name(name: str) -> str:
    """`name`, if files can be named after it.

    Raises:
        CheckpointError: empty, too long, not printable, or with a path separator.
    """
    if not name.isprintable() or name in ("", ".", "..") or set("/\\") & set(name) or len(name.encode()) > LONGEST_NAME:
        raise CheckpointError(
            f"--name {brief(name)}: expected 1 to {LONGEST_NAME} bytes of printable characters without / and \\"
        )
    return name


def source_from_config(config: dict[str, Any], *, name: str, mtp: str | None = None) -> ConfigSource:
    """The weights a checkpoint of this config would hold, in BF16."""
    model = architecture(config)
    notes = []
    published = read_preset(name)[1] if name in preset_names() else None
    has_mtp = bool(model.mtp_layers) and (bool(published) if mtp is None else mtp == "keep")
    if mtp == "keep" and not model.mtp_layers:
        raise CheckpointError(f"{name}: --mtp keep, but the config announces no MTP layer; leave the option out")
    if model.mtp_layers and mtp is None and published is None:
        notes.append("the config announces an MTP layer, whose tensors may not exist: left out, --mtp keep counts them")
    weights = tuple(model.weights(model.prefix, vision=model.vision is not None, mtp=has_mtp))
    return ConfigSource(
        name=name, config=config, architecture=model, weights=weights, has_mtp=has_mtp, notes=tuple(notes)
    )


def source_from_checkpoint(
    checkpoint: Checkpoint, *, name: str | None = None, mtp: str | None = None
) -> CheckpointSource:
    """Tie every weight of the checkpoint's architecture to its rows, and account for every tensor.

    Args:
        name: as `open_source`. mtp: as `open_source`; "keep" also looks into files that the index leaves out.
    Raises:
        CheckpointError: a weight missing, twice or of the wrong shape; a tensor that is no weight.
    """
    name = model_name(checkpoint.folder) if name is None else checked_name(name)
    folder, config = checkpoint.folder, checkpoint.config
    model = architecture(config)
    notes, left_out = list(checkpoint.notes), []
    tensors = named_tensors(checkpoint, model, notes)
    if buffers := [key for key in tensors if is_buffer(key)]:
        left_out.append(LeftOut(BUFFERS, tuple(tensors.pop(key).name for key in buffers)))
    if any(info.dtype == E4M3 for info in tensors.values()) and (found := list(filter(is_of_activations, tensors))):
        left_out.append(LeftOut(ACTIVATIONS, tuple(tensors.pop(key).name for key in found)))
    if mtp == "keep":
        checkpoint, more = mtp_beside(checkpoint, model, tensors, notes)
        tensors |= more
    has_mtp = any(map(model.is_mtp, tensors))
    if has_mtp and mtp == "drop":
        dropped = list(filter(model.is_mtp, tensors))
        left_out.append(LeftOut(DROPPED_MTP, tuple(tensors.pop(key).name for key in dropped)))
        has_mtp = False
    check_parts(folder, model, tensors, has_mtp, mtp)
    vision = any(map(model.is_vision, tensors))
    notes += absent_parts(model, tensors, has_mtp, vision, dropped=mtp == "drop")

    prefix = model.prefix_of(tensors)
    config, repeated = settle_head(checkpoint, config, model, tensors, f"{prefix}embed_tokens.weight", notes)
    left_out += repeated
    model = architecture(config)
    weights = tuple(model.weights(prefix, vision=vision, mtp=has_mtp))
    rows = locate_all(checkpoint, model, weights, tensors)
    notes += quantized_notes(rows)
    left_out += checkpoint.left_out
    notes += [str(entry) for entry in left_out]
    offered = [file for file, table in checkpoint.others.items() if mtp_of(model, table, tensors)]
    if offered and mtp != "drop":
        notes.append(f"--mtp keep takes the {model.MTP_PREFIX}* tensors of {some('file', offered)}")
    return CheckpointSource(
        name=name,
        config=config,
        architecture=model,
        weights=weights,
        has_mtp=has_mtp,
        offers_mtp=bool(offered),
        notes=tuple(notes),
        left_out=tuple(left_out),
        checkpoint=checkpoint,
        rows=rows,
    )


def locate_all(
    checkpoint: Checkpoint, model: Architecture, weights: tuple[Weight, ...], tensors: Mapping[str, TensorInfo]
) -> tuple[Rows, ...]:
    """The rows of every weight.

    Raises:
        CheckpointError: a weight missing, twice, quantized in a way that is not read or of the wrong shape; a tensor
            that is no weight.
    """
    used: dict[str, Scales | Nvfp4Scales | None] = {}
    scaled: set[str] = set()
    rows = [_locate(weight, tensors, checkpoint.block, used, scaled) for weight in weights]
    located = [row for row in rows if row is not None]
    missing = [weight for weight, row in zip(weights, rows, strict=True) if row is None]
    unknown = sorted(tensors.keys() - used.keys() - scaled)
    if missing or unknown:
        raise CheckpointError(_mismatch(checkpoint, model, weights, missing, [tensors[key].name for key in unknown]))
    return tuple(located)


def _locate(
    weight: Weight,
    tensors: Mapping[str, TensorInfo],
    block: tuple[int, int],
    used: dict[str, Scales | Nvfp4Scales | None],
    scaled: set[str],
) -> Rows | None:
    """The rows of a weight; its tensor goes into `used`, with its scales, and these into `scaled`."""
    own = next((name for name in (weight.name, weight.name + PACKED_SUFFIX) if name in tensors), weight.name)
    alone = tensors.get(own)
    packed = tensors.get(weight.packed.name) if weight.packed else None
    if alone and packed:
        raise CheckpointError(
            f"{alone.path.name}: expert weight {weight.name} is there on its own and inside {packed.name}; keep one"
        )
    if alone:
        info, shape, row, name = alone, weight.shape, 0, own
    elif packed and weight.packed:
        info, shape, row, name = packed, weight.packed.shape, weight.packed.row, weight.packed.name
    else:
        return None
    advice = MTP_ADVICE if weight.role == "mtp" else ""
    packed4 = info.dtype == PACKED and (name != weight.name or f"{name}_scale_2" in tensors)
    if info.dtype not in ITEM_BYTES and info.dtype != E4M3 and not packed4:
        raise CheckpointError(
            f"{info.path.name}: tensor {bare(info.name)} is {info.dtype}; expected BF16, F16, F32 or {E4M3} "
            + ("(save it as one of them)" if info.dtype == "F64" else QUANTIZED_ADVICE)
            + advice
        )
    if info.shape != shape and not packed4:
        raise CheckpointError(
            f"{info.path.name}: tensor {bare(info.name)} has shape {list(info.shape)}, config.json means "
            f"{list(shape)}; config and shards are not of one model{advice}"
        )
    if name not in used:
        used[name] = None
        if info.dtype == E4M3:
            key, used[name] = scales_of(name, info, tensors, block)
            scaled.add(key)
        elif packed4:
            keys, used[name] = nvfp4_scales_of(name, info, shape, tensors)
            scaled |= keys
    return Rows(info, row, used[name])


def quantized_notes(rows: tuple[Rows, ...]) -> list[str]:
    """What is to be said of a source whose weights are quantized."""
    counts = Counter(_layout(held.scales) for held in rows if held.scales)
    return [f"{count:,} of {len(rows):,} weights are {layout}" for layout, count in counts.items()]


def _layout(scales: Scales | Nvfp4Scales) -> str:
    if isinstance(scales, Nvfp4Scales):
        return (
            "NVFP4: what is NVFP4 again has their codes and scales; other encodings are made of code * scale in fp32, "
            "and lose more than from a BF16 original"
        )
    return f"FP8 {layout_name(scales.block)}: builds are encoded from code * scale in fp32"


def _mismatch(
    checkpoint: Checkpoint,
    model: Architecture,
    weights: tuple[Weight, ...],
    missing: list[Weight],
    unknown: list[str],
) -> str:
    """Why the tensors of a folder are not the weights of its config, and what to do."""
    folder, kind = checkpoint.folder, checkpoint.config.get("model_type")
    is_mtp = all(weight.role == "mtp" for weight in missing) and all(model.MTP_PREFIX in name for name in unknown)
    if quantized := next((name for name in unknown if is_quantization(name)), None):
        return (
            f"{folder}: the source is already quantized, but tensor {bare(quantized)} belongs to no weight in FP8, and "
            f"only FP8 is read, {READ}, and NVFP4; convert from its BF16 original, or from an FP8 one"
        )
    count = f"{len(unknown):,} tensors are" if len(unknown) > 1 else "a tensor is"
    stray = f"{count} no weight of {brief(kind)}, the first is {bare(unknown[0])}" if unknown else ""
    if not missing:
        return f"{folder}: {stray}; config.json and shards may not be of one model{MTP_ADVICE if is_mtp else ''}"
    first = missing[0]
    names = {first.name, first.packed.name if first.packed else first.name}
    holder = next((file for file, table in checkpoint.others.items() if names & table.keys()), None)
    packed = f" (nor {first.packed.name})" if first.packed else ""
    lost = f"weight {first.name} is missing{packed}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    if is_mtp:
        total = sum(weight.role == "mtp" for weight in weights)
        keep = f"; --mtp keep takes it from {bare(holder)}" if holder else ""
        return f"{folder}: {lost}, of the {total} of multi-token prediction{keep}{MTP_ADVICE}"
    if first.name == HEAD and len(missing) == 1 and not unknown:
        return (
            f"{folder}: {lost}, but config.json says tie_word_embeddings false, so transformers would begin with a "
            "random head; if the head is the embedding, say tie_word_embeddings true in config.json"
        )
    if len(missing) == len(weights) and unknown:
        return (
            f"{folder}: no tensor has the name of a weight of {brief(kind)}: expected {first.name}, the first of "
            f"{len(unknown)} is {bare(unknown[0])}; they are of another model, or a program saved them under its names"
        )
    if unknown:
        return f"{folder}: {lost}, and {stray}; config.json and shards are not of one model, or names were changed"
    if holder:
        read = some("file", [path.name for path in checkpoint.files])
        return (
            f"{folder}: {lost} in {read}, which transformers would load; {bare(holder)} holds it: move away the files "
            "that are not of the model"
        )
    return f"{folder}: {lost}; no file of the folder holds it: the checkpoint was saved or copied incomplete"
