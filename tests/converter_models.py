"""Small checkpoints, the same bytes on any machine, for llama.cpp's converter and for ours.

    make(name, folder)      one of MODELS, written as published checkpoints are

Numbers come from integers of a fixed generator, never from a library's normal distribution, whose last bit depends on
the processor; vocabularies are written out, not trained. Names and shapes are those of the architecture's shape model;
the converter knows them by itself and stops at one it does not know.
"""

import json
from pathlib import Path

import numpy as np
import torch
from fixtures import QWEN35_REGEX, QWEN_TEMPLATE
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from ornith_moe.quant.source.architectures import architecture

SEED = 7  # torch rounds -exp(A_log) correctly in all 84 values, as it does in 99 of 100
QWEN_ROWS = 320  # more than tokens
_QWEN = {
    "vocab_size": QWEN_ROWS,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 4096,
    "full_attention_interval": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.5,
                        "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
}  # fmt: skip
_MOE = {
    "num_hidden_layers": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 8, "mtp_num_hidden_layers": 1,
    "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_DENSE = {
    "num_hidden_layers": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "mtp_num_hidden_layers": 0,
    "intermediate_size": 80,  # no whole blocks of Q8_0 in ffn_down
}  # fmt: skip
_TOWER = {
    "depth": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 80,  # no whole blocks of Q8_0 in ffn_down
    "out_hidden_size": 64, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
    "num_position_embeddings": 36, "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": [],
}  # fmt: skip
_GEMMA_TOWER = {
    "model_type": "gemma4_vision", "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 80, "patch_size": 4, "position_embedding_size": 30,
    "pooling_kernel_size": 3, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", "standardize": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "use_clipped_linears": False,
}  # fmt: skip
_GEMMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_global_key_value_heads": 1, "head_dim": 32, "global_head_dim": 64,
    "attention_k_eq_v": True, "sliding_window": 16, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": False,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
    "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}  # fmt: skip
CARD = """---
license: other
license_name: a licence
license_link: https://example.com/LICENSE
author: Wren, Jay and the Ornith(opter)s
organization: ornith-ai
base_model:
- Qwen/Qwen3.6-27B
- https://huggingface.co/ornith-ai/Ornith-1.5-9B
datasets: [a/b-c, https://example.com/data]
pipeline_tag: image-text-to-text
tags:
\t- moe
\t- "1.5"
language:
- en
- no
---

# A README

---
license: not here
"""
MODELS = {  # name of the folder -> what the converter is told besides
    "Ornith-2.1-Tiny-MoE": (),
    "tiny-dense": ("--no-mtp",),
    "Gemma-4-300K-it": (),
    "Ornith-2.2-35B-VL": (),
    "Gemma-4-400K-VL": (),
}
TYPES = {"F32": "f32", "BF16": "bf16", "Q8_0": "q8_0"}  # ours -> the converter's
MMPROJ_TYPES = {"mmproj": "bf16", "mmproj-F16": "f16", "mmproj-F32": "f32", "mmproj-Q8_0": "q8_0"}  # with --mmproj


def types_of(name: str) -> dict[str, str]:
    """{our file type: the converter's} of what is recorded of a model."""
    if name.startswith("Gemma") and name.endswith("-VL"):
        return MMPROJ_TYPES
    return {"BF16": "bf16", **MMPROJ_TYPES} if name.endswith("-VL") else TYPES


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint `name` of MODELS into `folder / name`."""
    folder = folder / name
    folder.mkdir()
    if name.startswith("Gemma"):
        tokenizer, settings = _gemma_tokenizer()
        text = _GEMMA | {"vocab_size": len(tokenizer["model"]["vocab"])}
        config = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "dtype": "bfloat16", **text}
        if name.endswith("-VL"):
            text = {"model_type": "gemma4_text", "dtype": "bfloat16", **text}
            config = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text}
            config |= {"vision_config": _GEMMA_TOWER, "audio_config": None, "tie_word_embeddings": True}
            processor = {"image_processor": {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}}
            (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    else:
        tokenizer, settings = qwen_tokenizer()
        (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE, encoding="utf-8")
        if name == "tiny-dense":
            config = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "dtype": "float32"}
            config |= _QWEN | _DENSE
            settings = _with_further_tokens(tokenizer, settings)
        else:
            text = {"model_type": "qwen3_5_moe_text", "dtype": "bfloat16", **_QWEN, **_MOE}
            config = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
            config |= {"text_config": text, "tie_word_embeddings": False}
        if name == "Ornith-2.2-35B-VL":
            text = {"model_type": "qwen3_5_text", "dtype": "bfloat16", **_QWEN, **_DENSE, "rms_norm_eps": 1e-5}
            text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 6}  # three to one, as Qwen3.6-27B has it
            yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 32.0}
            text["rope_parameters"] = text["rope_parameters"] | yarn
            config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
            config |= {"text_config": text, "vision_config": _TOWER, "tie_word_embeddings": False}
            (folder / "README.md").write_text(CARD, encoding="utf-8")
            preprocessor = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.5, 0.3, 0.26862954], "patch_size": 4}
            (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}
    generation |= {"repetition_penalty": 1.05}
    for file, content in (
        ("config.json", config), ("generation_config.json", generation), ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
    ):  # fmt: skip
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    save_file(tensors_of(config), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors_of(config: dict) -> dict[str, torch.Tensor]:
    """BF16 weights of 8 significant bits, experts one by one; where the config says float32, of 24."""
    random, bits = np.random.RandomState(SEED), 24 if config.get("dtype") == "float32" else 8
    prefix = "model.language_model." if "text_config" in config else "model."
    shapes = architecture(config)
    tensors = {}
    for weight in shapes.weights(prefix, vision="vision_config" in config, mtp=bool(shapes.mtp_layers)):
        mantissas = random.randint(1 - (1 << bits), 1 << bits, weight.shape)
        values = np.ldexp(mantissas, random.randint(-8, -1, weight.shape) - bits)
        values = values * 8 if weight.name.endswith("A_log") else values
        tensor = torch.from_numpy(values.astype(np.float32))
        tensors[weight.name] = tensor if bits == 24 else tensor.bfloat16()
    return tensors


def token_entry(index: int, text: str, special: bool) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": special}


def qwen_tokenizer() -> tuple[dict, dict]:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [["Ġ", "t"], ["h", "e"], ["Ġt", "he"], ["i", "n"], ["e", "r"], ["o", "r"], ["Ã", "¼"], ["Ġ", "Ġ"]]
    pieces += ["".join(pair) for pair in merges]
    special = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<|vision_pad|>": False}
    added = {**special, "<think>": False, "</think>": False, "  tabs\t": False}
    steps = [{"type": "Split", "pattern": {"Regex": QWEN35_REGEX}, "behavior": "Isolated", "invert": False}]
    steps += [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [token_entry(len(pieces) + i, text, flag) for i, (text, flag) in enumerate(added.items())],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": merges},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "bos_token": None}
    return tokenizer, settings | {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}


def _with_further_tokens(tokenizer: dict, settings: dict) -> dict:
    """Settings that name tokens which tokenizer.json lacks, as trainers do that write only tokenizer_config.json."""
    added = tokenizer["added_tokens"]
    first = added[-1]["id"] + 1
    further = [("<|tool|>", True), ("<plain>", False), ("<|looks_special|>", False)]
    added = added + [token_entry(first + i, text, special) for i, (text, special) in enumerate(further)]
    decoder = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added}
    return settings | {"added_tokens_decoder": decoder, "extra_special_tokens": ["<|tool|>", "<only_named>"]}


def _gemma_tokenizer() -> tuple[dict, dict]:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>")
    merges = [["▁", "t"], ["h", "e"], ["▁t", "he"], ["\n", "\n"]]
    pieces = [*special, "[multimodal]", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"abcdefghijklmnopqrstuvwxyz▁.,\n", *("".join(pair) for pair in merges)]
    added = [token_entry(index, text, True) for index, text in enumerate(special)]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [*added, token_entry(len(special), "[multimodal]", False)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "<bos>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                                                     {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": merges},
    }  # fmt: skip
    names = {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    names |= {"sot_token": "<|turn>", "eot_token": "<turn|>", "soc_token": "<|channel>", "eoc_token": "<channel|>"}
    templates = [{"name": "default", "template": "{{ bos_token }}"}, {"name": "tool use", "template": "{{ tools }}"}]
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": templates}
