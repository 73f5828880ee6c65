"""Where the tensors of a checkpoint and its config disagree: names, multi-token prediction, the head.

What the tensors say goes before what the config says: a head whose values are not the embedding's is a weight, whatever
`tie_word_embeddings` claims, as it is for transformers (`tie_weights`), and what is not there is not announced. Every
decision leaves a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source.accounts import LeftOut, bare, some
from ornith_moe.quant.source.architectures import Architecture
from ornith_moe.quant.source.checkpoint import ITEM_BYTES, Checkpoint, TensorInfo
from ornith_moe.quant.source.slab import matrix_shape, to_float32
from ornith_moe.quant.source.tensor_names import canonical_names, is_adapter

HEAD = "lm_head.weight"
COMPARED_BYTES = 8 << 20  # of head and embedding at a time
REPEATED_HEAD = "it repeats the embedding, to which config.json ties the head"


def named_tensors(checkpoint: Checkpoint, model: Architecture, notes: list[str]) -> dict[str, TensorInfo]:
    """{canonical name: tensor}; a tensor keeps the name that its file gives it.

    Raises:
        CheckpointError: an adapter that was not merged; two tensors of one name.
    """
    tensors = checkpoint.tensors
    if adapter := [name for name in tensors if is_adapter(name)]:
        raise CheckpointError(
            f"{checkpoint.folder}: {some('tensor', adapter)}, of an adapter (LoRA or its like) that was not merged; "
            "load the model with peft, merge_and_unload(), save_pretrained(), and convert that folder"
        )
    names = canonical_names(tensors, model.prefix_of(tensors))
    if any(name != canonical for name, canonical in names.items()):
        names = canonical_names(tensors, model.prefix)
        other = [name for name, canonical in names.items() if name != canonical]
        if other:
            first = bare(names[other[0]])
            notes.append(f"{some('tensor', other)}, named by a wrapper around the model: read as {first}")
    return {names[name]: info for name, info in tensors.items()}


def mtp_of(
    model: Architecture, table: Mapping[str, TensorInfo], tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """{canonical name: tensor} of the MTP tensors in a file beside the model; none if it repeats part of the model."""
    try:
        names = canonical_names(table, model.prefix_of(tensors))
    except CheckpointError:
        return {}
    if any(canonical in tensors for canonical in names.values()):
        return {}
    return {canonical: table[name] for name, canonical in names.items() if model.is_mtp(canonical)}


def mtp_beside(
    checkpoint: Checkpoint, model: Architecture, tensors: Mapping[str, TensorInfo], notes: list[str]
) -> tuple[Checkpoint, dict[str, TensorInfo]]:
    """The checkpoint with the MTP tensors of the files beside it, and these by their canonical names."""
    found: dict[str, TensorInfo] = {}
    used: dict[str, dict[str, TensorInfo]] = {}
    for file, table in checkpoint.others.items():
        mtp = mtp_of(model, table, tensors)
        if both := found.keys() & mtp.keys():
            holder = found[min(both)].path.name
            raise CheckpointError(
                f"{checkpoint.folder}: {bare(holder)} and {bare(file)} both hold {bare(min(both))}, and no index says "
                "which counts; move one of them away"
            )
        if mtp:
            used[file] = {info.name: info for info in mtp.values()}
            found |= mtp
            notes.append(f"{some('tensor', sorted(mtp))}, taken from {bare(file)}, which is not of the model otherwise")
    return (checkpoint.including(used), found) if used else (checkpoint, {})


def check_parts(
    folder: Path, model: Architecture, tensors: Mapping[str, TensorInfo], has_mtp: bool, mtp: str | None
) -> None:
    """Refuse parts of a model that its config does not announce, or that were insisted on and are not there."""
    if mtp == "keep" and not has_mtp:
        raise CheckpointError(
            f"{folder}: --mtp keep, but no tensor named {model.MTP_PREFIX}* is here; leave the option out"
        )
    if has_mtp and not model.mtp_layers:
        raise CheckpointError(
            f"{folder}: holds {model.MTP_PREFIX}* tensors, but config.json says {model.MTP_LAYERS_KEY} 0; --mtp drop "
            "leaves them out"
        )
    if model.vision is None and any(map(model.is_vision, tensors)):
        raise CheckpointError(f"{folder}: holds vision tensors, but config.json has no vision_config")


def absent_parts(
    model: Architecture, tensors: Mapping[str, TensorInfo], has_mtp: bool, vision: bool, *, dropped: bool
) -> list[str]:
    """Notes of what the config announces and the checkpoint does not hold."""
    notes = []
    if model.mtp_layers and not has_mtp and not dropped:
        notes.append(
            f"the config announces an MTP layer, but no {model.MTP_PREFIX}* tensor exists: a GGUF will not announce it"
        )
    if model.vision is not None and not vision:
        notes.append("the config describes a vision tower, but no tensor of it is here: builds are text only")
    return notes


def settle_head(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    model: Architecture,
    tensors: dict[str, TensorInfo],
    embedding: str,
    notes: list[str],
) -> tuple[dict[str, Any], list[LeftOut]]:
    """Whether the head is tied, by its values; `tensors` loses a head that repeats the embedding.

    Returns:
        The config, saying so where it said otherwise, and what is left out.
    """
    text = config.get("text_config")
    if HEAD not in tensors:
        if not model.tied and isinstance(text, dict) and text.get("tie_word_embeddings") is True:
            notes.append("config.json ties the head in text_config alone and no head is here: it is tied")
            return _with_tied_head(config, True), []
        return config, []
    if not model.tied:
        return config, []
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(HEAD)
        notes.append(f"the embedding is not here and {HEAD} is, tied to it by config.json: it serves as both")
        return config, []
    if _equal(checkpoint, tensors[embedding], tensors[HEAD]):
        return config, [LeftOut(REPEATED_HEAD, (tensors.pop(HEAD).name,))]
    notes.append(
        f"config.json ties the head to the embedding, but the values of {HEAD} are others: the head is kept, as "
        "transformers does, and builds say tie_word_embeddings false"
    )
    return _with_tied_head(config, False), []


def _with_tied_head(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    config = {**config, "tie_word_embeddings": tied}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": tied}
    return config


def _equal(checkpoint: Checkpoint, a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors hold the same values, read a slab at a time up to the first difference."""
    if a.shape != b.shape or not {a.dtype, b.dtype} <= ITEM_BYTES.keys():
        return False
    rows, columns = matrix_shape(a.shape)
    slab = max(1, COMPARED_BYTES // max(1, 4 * columns))

    def read(info: TensorInfo, start: int) -> np.ndarray:
        raw = checkpoint.read_rows(info, start, min(slab, rows - start))
        return raw if a.dtype == b.dtype else to_float32(raw, info.dtype)

    return all(np.array_equal(read(a, start), read(b, start)) for start in range(0, rows, slab))
