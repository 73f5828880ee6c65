"""Everything a GGUF says besides its tensors: identity, hyperparameters, sampling defaults, tokenizer.

    gguf_metadata(config, folder, name="ornith-nano", file_type=0, mtp_layers=0, shapes={...}, tokenizer=[...])
        -> general.*  (architecture, name, size, file type, sampling)
         + {arch}.*   (what llama.cpp's loader for qwen35, qwen35moe or gemma4 reads)
         + tokenizer.* (quant/gguf/tokenizer.py)

Keys, values, types and order are those of llama.cpp's converter (tests/quant/gguf/test_converter.py); docs/formats.md
lists where and why they differ. They depend on the checkpoint's content and the name of its folder alone: no date, no
path, no machine, so equal checkpoints give equal bytes. Shapes are not interpreted a second time: they come from the
architecture's shape model, which plans the tensors too.

Two rules that cost others a file that does not load: `block_count` counts MTP blocks and `nextn_predict_layers` is
written only when MTP tensors are really there (the loader demands them once announced, and Ornith-1.0 announces an MTP
layer that it does not ship); `rope.dimension_sections` is required for Qwen3.5 even where a config leaves it out.

Sources: llama.cpp `src/models/{qwen35,qwen35moe,gemma4}.cpp` for what is read, its `conversion/` for what is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
from gguf import GGUFValueType as Type
from gguf import Keys

from ornith_moe.quant.gguf.header import Entry
from ornith_moe.quant.source.architectures import Architecture, architecture
from ornith_moe.quant.source.architectures.architecture import Key
from ornith_moe.quant.source.preprocessor import read_normalization
from ornith_moe.quant.source.tokenizer_files import read_optional

MMPROJ = "mmproj"  # `general.type` of a vision tower
QUANTIZATION_VERSION = 2  # of ggml's block formats
# generation_config.json key -> GGUF key and type
_SAMPLING = (
    ("sequence", Keys.General.SAMPLING_SEQUENCE, Type.STRING),
    ("top_k", Keys.General.SAMPLING_TOP_K, Type.INT32),
    ("top_p", Keys.General.SAMPLING_TOP_P, Type.FLOAT32),
    ("min_p", Keys.General.SAMPLING_MIN_P, Type.FLOAT32),
    ("xtc_probability", Keys.General.SAMPLING_XTC_PROBABILITY, Type.FLOAT32),
    ("xtc_threshold", Keys.General.SAMPLING_XTC_THRESHOLD, Type.FLOAT32),
    ("temperature", Keys.General.SAMPLING_TEMP, Type.FLOAT32),
    ("penalty_last_n", Keys.General.SAMPLING_PENALTY_LAST_N, Type.INT32),
    ("penalty_repeat", Keys.General.SAMPLING_PENALTY_REPEAT, Type.FLOAT32),
    ("repetition_penalty", Keys.General.SAMPLING_PENALTY_REPEAT, Type.FLOAT32),  # transformers' name of the same
    ("mirostat", Keys.General.SAMPLING_MIROSTAT, Type.INT32),
    ("mirostat_tau", Keys.General.SAMPLING_MIROSTAT_TAU, Type.FLOAT32),
    ("mirostat_eta", Keys.General.SAMPLING_MIROSTAT_ETA, Type.FLOAT32),
)


def gguf_metadata(
    config: dict[str, Any],
    folder: Path | None,
    *,
    name: str,
    file_type: int,
    mtp_layers: int,
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    tokenizer: Sequence[Entry] = (),
    card: Mapping[str, Any] = MappingProxyType({}),
) -> list[Entry]:
    """The key-value section of a GGUF for one checkpoint.

    Args:
        config: parsed config.json, of a text model or of the multimodal wrapper.
        folder: where generation_config.json may lie; None leaves the sampling out.
        name: of the model, as its folder has it.
        file_type: llama.cpp's file type number, for instance 0 for F32, 7 for Q8_0, 32 for BF16.
        mtp_layers: multi-token-prediction blocks that the file holds as tensors, not as the config announces.
        shapes: of the file's tensors, to count the parameters; {} leaves the size out.
        tokenizer: its keys, `tokenizer_entries`; without them a file does not load.
        card: values of `read_card`.

    Returns:
        Entries in file order, ready for `gguf_header`.

    Raises:
        CheckpointError: an unknown architecture, a missing or damaged value or file.
        PlanError: a sound checkpoint that the format or llama.cpp cannot express (rope scaling).

    Example:
        >>> entries = gguf_metadata(config, None, name="tiny", file_type=0, mtp_layers=0)  # doctest: +SKIP
        >>> [entry.value for entry in entries if entry.key == "general.architecture"]  # doctest: +SKIP
        ['qwen35moe']
    """
    model = architecture(config)
    before, after = model.gguf_keys(mtp_layers)
    values = [*before, (Keys.General.FILE_TYPE, int(file_type), Type.UINT32), *after]
    about = _about(model.gguf_architecture, "model", folder, name, shapes, card)
    return [*about, *_entries(values, model.gguf_architecture), *tokenizer]


def mmproj_metadata(
    model: Architecture,
    folder: Path,
    *,
    name: str,
    file_type: int,
    shapes: Mapping[str, tuple[int, ...]],
    card: Mapping[str, Any],
) -> list[Entry]:
    """The key-value section of an mmproj, the GGUF of a vision tower; arguments and errors as `gguf_metadata`.

    Raises:
        CheckpointError: and no word on how pixels are normalized.
    """
    assert model.vision is not None, "a tower that no config describes has no weights either"
    mean, std = read_normalization(folder)
    values = [(Keys.General.FILE_TYPE, int(file_type), Type.UINT32), *model.mmproj_keys(model.vision, mean, std)]
    return [*_about("clip", MMPROJ, folder, name, shapes, card), *_entries(values, "clip")]


def _about(
    architecture: str,
    kind: str,
    folder: Path | None,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    card: Mapping[str, Any],
) -> list[Entry]:
    """What any GGUF says first: what it is, how to sample from it, and whose it is."""
    return [
        Entry(Keys.General.ARCHITECTURE, architecture, Type.STRING),
        Entry(Keys.General.TYPE, kind, Type.STRING),
        *(_sampling(folder) if folder else ()),
        *_identity(name, shapes, card),
    ]


def _entries(values: Sequence[Key], architecture: str) -> list[Entry]:
    """`values` under the name of their architecture, and the version of ggml's blocks."""
    named = [Entry(key.format(arch=architecture), value, *types) for key, value, *types in values]
    return [*named, Entry(Keys.General.QUANTIZATION_VERSION, QUANTIZATION_VERSION, Type.UINT32)]


def _identity(name: str, shapes: Mapping[str, tuple[int, ...]], card: Mapping[str, Any]) -> list[Entry]:
    """What the gguf package reads out of a name and a model card, and the number of parameters."""
    experts = [shape[0] for tensor, shape in shapes.items() if "_exps." in tensor]
    in_experts = sum(math.prod(shape[1:]) for tensor, shape in shapes.items() if "_exps." in tensor)
    total = sum(map(math.prod, shapes.values()))
    shared = sum(math.prod(shape) for tensor, shape in shapes.items() if "_exps." not in tensor)
    found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), dict(card), None, Path(name), total)
    found.name = found.name or name
    if shapes and not found.size_label:
        found.size_label = gguf.size_label(total, shared, in_experts, sum(experts) // max(len(experts), 1))
    writer = gguf.GGUFWriter(None, "")  # never written: it knows the keys of these fields, and their order
    found.set_gguf_meta_model(writer)
    return [
        Entry(key, value.value, value.type, Type.STRING if value.type == Type.ARRAY else None)
        for key, value in writer.kv_data[0].items()
        if key != Keys.General.ARCHITECTURE
    ]


def _sampling(folder: Path) -> list[Entry]:
    """What the publisher recommends for sampling; llama.cpp uses it where its user says nothing."""
    found = read_optional(Path(folder), "generation_config.json")
    entries: dict[str, Entry] = {}
    for name, key, kind in _SAMPLING:
        value = found.get(name)
        if kind == Type.STRING and isinstance(value, str):
            entries[key] = Entry(key, value, kind)
        elif kind != Type.STRING and isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e9:
            entries.setdefault(key, Entry(key, int(value) if kind == Type.INT32 else float(value), kind))
    return list(entries.values())
