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

from ornith_moe.quant.errors import CheckpointError, PlanError, brief
from ornith_moe.quant.gguf.header import Entry
from ornith_moe.quant.source.architectures import architecture
from ornith_moe.quant.source.architectures.weight import Settings, text_settings
from ornith_moe.quant.source.tokenizer_files import read_optional

QUANTIZATION_VERSION = 2  # of ggml's block formats
MROPE_SECTIONS = (11, 11, 10)  # transformers' default for Qwen3.5: rotary pairs for time, height, width
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
    shape = architecture(config)
    text = text_settings(config)
    hyperparameters = _gemma4(shape, text) if shape.gguf_architecture == "gemma4" else _qwen35(shape, text, mtp_layers)
    values = [*hyperparameters[0], (Keys.General.FILE_TYPE, int(file_type), Type.UINT32), *hyperparameters[1]]
    return [
        Entry(Keys.General.ARCHITECTURE, shape.gguf_architecture, Type.STRING),
        Entry(Keys.General.TYPE, "model", Type.STRING),
        *(_sampling(folder) if folder else ()),
        *_identity(name, shapes),
        *(Entry(key.format(arch=shape.gguf_architecture), value, *types) for key, value, *types in values),
        Entry(Keys.General.QUANTIZATION_VERSION, QUANTIZATION_VERSION, Type.UINT32),
        *tokenizer,
    ]


def _identity(name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """What the gguf package reads out of a name: title, version, fine-tune, base; and the number of parameters."""
    experts = [shape[0] for tensor, shape in shapes.items() if "_exps." in tensor]
    in_experts = sum(math.prod(shape[1:]) for tensor, shape in shapes.items() if "_exps." in tensor)
    total = sum(map(math.prod, shapes.values()))
    shared = sum(math.prod(shape) for tensor, shape in shapes.items() if "_exps." not in tensor)
    found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), None, None, Path(name), total)
    size = gguf.size_label(total, shared, in_experts, sum(experts) // max(len(experts), 1)) if shapes else None
    values = (
        (Keys.General.NAME, found.name or name),
        (Keys.General.VERSION, found.version),
        (Keys.General.FINETUNE, found.finetune),
        (Keys.General.BASENAME, found.basename),
        (Keys.General.SIZE_LABEL, found.size_label or size),
    )
    return [Entry(key, value, Type.STRING) for key, value in values if value]


def _common(shape, text: Settings, kv_heads: tuple) -> list[tuple]:
    inner = text.values.get("intermediate_size") and text.integer("intermediate_size")  # idle in an MoE, if it is there
    return [
        (Keys.LLM.CONTEXT_LENGTH, text.integer("max_position_embeddings", high=1 << 31), Type.UINT32),
        (Keys.LLM.EMBEDDING_LENGTH, shape.hidden, Type.UINT32),
        *([(Keys.LLM.FEED_FORWARD_LENGTH, inner, Type.UINT32)] if inner else []),
        (Keys.Attention.HEAD_COUNT, shape.heads, Type.UINT32),
        (Keys.Attention.HEAD_COUNT_KV, *kv_heads),
    ]


def _qwen35(shape, text: Settings, mtp_layers: int) -> tuple[list[tuple], list[tuple]]:
    """The keys before and after `general.file_type`, where llama.cpp's converter writes it."""
    rope = _rope(text, text.section("rope_parameters") or text.section("rope_scaling"), "default")
    rotary_factor = rope.fraction("partial_rotary_factor", text.fraction("partial_rotary_factor", 0.25))
    theta = _number(rope, "rope_theta", text.values.get("rope_theta", 10_000_000))
    if shape.key_head_dim != shape.value_head_dim:
        raise PlanError(
            f"config.json: linear_key_head_dim {shape.key_head_dim} and linear_value_head_dim {shape.value_head_dim} "
            "differ; llama.cpp knows one state size for both"
        )
    recurrent = [mixer == "linear_attention" for mixer in shape.mixers] + [False] * mtp_layers
    first = [
        (Keys.LLM.BLOCK_COUNT, shape.layers + mtp_layers, Type.UINT32),
        *_common(shape, text, (shape.kv_heads, Type.UINT32)),
        (Keys.Rope.DIMENSION_SECTIONS, _mrope_sections(shape, rope), Type.ARRAY, Type.INT32),
        (Keys.Rope.FREQ_BASE, theta, Type.FLOAT32),
        (Keys.Attention.LAYERNORM_RMS_EPS, _number(text, "rms_norm_eps", 1e-6), Type.FLOAT32),
    ]
    if shape.moe:
        used = text.integer("num_experts_per_tok", high=shape.experts)
        first += [(Keys.LLM.EXPERT_COUNT, shape.experts, Type.UINT32), (Keys.LLM.EXPERT_USED_COUNT, used, Type.UINT32)]
    first += [
        (Keys.Attention.KEY_LENGTH, shape.head_dim, Type.UINT32),
        (Keys.Attention.VALUE_LENGTH, shape.head_dim, Type.UINT32),
    ]
    after = [
        (Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, shape.intermediate, Type.UINT32),
        (Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, shape.shared_intermediate, Type.UINT32),
    ] if shape.moe else []  # fmt: skip
    if mtp_layers:
        after.append((Keys.LLM.NEXTN_PREDICT_LAYERS, mtp_layers, Type.UINT32))
    after += [
        (Keys.SSM.CONV_KERNEL, shape.conv_kernel, Type.UINT32),
        (Keys.SSM.STATE_SIZE, shape.key_head_dim, Type.UINT32),
        (Keys.SSM.GROUP_COUNT, shape.key_heads, Type.UINT32),
        (Keys.SSM.TIME_STEP_RANK, shape.value_heads, Type.UINT32),
        (Keys.SSM.INNER_SIZE, shape.value_heads * shape.value_head_dim, Type.UINT32),
        # Which blocks are recurrent, twice: the list is exact, the interval is what readers before autumn 2026 know.
        ("{arch}.attention.recurrent_layers", recurrent, Type.ARRAY, Type.BOOL),
        (Keys.LLM.FULL_ATTENTION_INTERVAL, _interval(shape.mixers), Type.UINT32),
        (Keys.Rope.DIMENSION_COUNT, int(shape.head_dim * rotary_factor), Type.UINT32),
    ]
    return first, after


def _mrope_sections(shape, rope: Settings) -> list[int]:
    sections = rope.values.get("mrope_section") or list(MROPE_SECTIONS)
    pairs = range(shape.head_dim // 2 + 1)
    if not (
        isinstance(sections, list) and len(sections) in (3, 4) and all(type(n) is int and n in pairs for n in sections)
    ):
        raise CheckpointError(
            f"{rope.where}: expected mrope_section to be three integers from 0 to {pairs[-1]}, got {brief(sections)}"
        )
    return [*sections, 0][:4]  # the fourth is for a position axis that text and images do not have


def _gemma4(shape, text: Settings) -> tuple[list[tuple], list[tuple]]:
    """The keys before and after `general.file_type`, where llama.cpp's converter writes it."""
    rope = text.section("rope_parameters") or Settings({}, f"{text.where}.rope_parameters")
    everywhere = _rope(text, rope.section("full_attention"), "proportional")
    sliding = _rope(text, rope.section("sliding_attention"), "default")
    is_sliding = [attention == "sliding_attention" for attention in shape.attentions]
    kv_heads = [shape.kv_heads if slides else shape.global_kv_heads for slides in is_sliding]
    heads = (kv_heads, Type.ARRAY, Type.INT32) if set(kv_heads) != {shape.kv_heads} else (shape.kv_heads, Type.UINT32)
    first = [
        (Keys.LLM.BLOCK_COUNT, shape.layers, Type.UINT32),
        *_common(shape, text, heads),
        (Keys.Rope.FREQ_BASE, _number(everywhere, "rope_theta", 1e6), Type.FLOAT32),
        (Keys.Rope.FREQ_BASE_SWA, _number(sliding, "rope_theta", 1e4), Type.FLOAT32),
        (Keys.Attention.LAYERNORM_RMS_EPS, _number(text, "rms_norm_eps", 1e-6), Type.FLOAT32),
        (Keys.Attention.KEY_LENGTH, shape.global_head_dim, Type.UINT32),
        (Keys.Attention.VALUE_LENGTH, shape.global_head_dim, Type.UINT32),
    ]
    after = []
    if text.values.get("final_logit_softcapping") is not None:
        softcap = _number(text, "final_logit_softcapping", None)
        after.append((Keys.LLM.FINAL_LOGIT_SOFTCAPPING, softcap, Type.FLOAT32))
    after += [
        (Keys.Attention.SLIDING_WINDOW, text.integer("sliding_window"), Type.UINT32),
        (Keys.Attention.SHARED_KV_LAYERS, 0, Type.UINT32),
        (Keys.LLM.EMBD_LENGTH_PER_LAYER_INP, 0, Type.UINT32),
        (Keys.Attention.SLIDING_WINDOW_PATTERN, is_sliding, Type.ARRAY, Type.BOOL),
        (Keys.Attention.KEY_LENGTH_SWA, shape.head_dim, Type.UINT32),
        (Keys.Attention.VALUE_LENGTH_SWA, shape.head_dim, Type.UINT32),
        (Keys.Rope.DIMENSION_COUNT, shape.global_head_dim, Type.UINT32),  # rope_freqs stops the pairs that rest
        (Keys.Rope.DIMENSION_COUNT_SWA, shape.head_dim, Type.UINT32),
    ]
    return first, after


def _interval(mixers: list[str]) -> int:
    """Every how many layers attention is full. Layers that follow no interval are described by the list alone."""
    full = [layer for layer, mixer in enumerate(mixers) if mixer == "full_attention"]
    return full[0] + 1 if full else len(mixers) + 1


def _rope(text: Settings, rope: Settings | None, expected: str) -> Settings:
    rope = rope or Settings({}, f"{text.where}.rope_parameters")
    kind = rope.values.get("rope_type", rope.values.get("type", expected))  # older configs say `type`
    if kind != expected and (kind, expected) != ("mrope", "default"):
        raise PlanError(
            f"{rope.where}: rope_type {brief(kind)} is not written to a GGUF, only {brief(expected)}; convert with "
            "the original rope_parameters and give llama.cpp the scaling when it runs"
        )
    return rope


def _number(settings: Settings, key: str, default: Any) -> float:
    value = settings.values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"{settings.where}: expected {key} to be a positive number, got {brief(value)}")
    return float(value)


def _sampling(folder: Path) -> list[Entry]:
    """What the publisher recommends for sampling; llama.cpp uses it where its user says nothing."""
    found = read_optional(Path(folder), "generation_config.json")
    entries: dict[str, Entry] = {}
    for name, key, kind in _SAMPLING:
        value = found.get(name)
        if kind == Type.STRING and isinstance(value, str):
            entries[key] = Entry(key, value, kind)
        elif kind != Type.STRING and type(value) in (int, float) and abs(value) < 1e9:
            entries.setdefault(key, Entry(key, int(value) if kind == Type.INT32 else float(value), kind))
    return list(entries.values())
