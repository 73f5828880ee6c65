"""A small Qwen3.5 MoE, the same bytes on any machine, for ModelOpt's export and for ours.

    make(folder, layout)      with a vision tower and MTP; experts `fused`, `each` or `mixed` (the first layer fused)

Numbers are integers of a fixed generator, so that quotients meet ties; a group of sixteen is zero, and a row.
"""

import json
from pathlib import Path

import numpy as np
import torch
from converter_models import qwen_tokenizer
from safetensors.torch import save_file

from ornith_moe.quant.source.architectures import architecture
from ornith_moe.quant.source.source import ConfigSource
from ornith_moe.quant.source.weights import source_from_config

SEED = 11
BUILDS = {  # name of a recording -> build, options of ours
    "nvfp4": ("nvfp4", {}),
    "nvfp4 head fp8": ("nvfp4", {"head": True, "rest": "fp8"}),
    "nvfp4-w4a4": ("nvfp4-w4a4", {}),
}
_TEXT = {
    "model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "vocab_size": 320, "hidden_size": 64,
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "num_experts": 3,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 32,
    "mtp_num_hidden_layers": 1, "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000, "partial_rotary_factor": 0.5,
                        "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
}  # fmt: skip
_TOWER = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "num_position_embeddings": 16, "spatial_merge_size": 2, "in_channels": 3, "temporal_patch_size": 2,
}  # fmt: skip


def make(folder: Path, layout: str = "fused", **changes: int) -> Path:
    """Write the checkpoint into `folder`, which is made; `changes` are of the text config."""
    folder.mkdir(parents=True)
    config = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
    config |= {"tie_word_embeddings": False, "text_config": _TEXT | changes}
    config["vision_config"] = _TOWER | {"out_hidden_size": config["text_config"]["hidden_size"]}
    tokenizer, settings = qwen_tokenizer()
    files = {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    save_file(_tensors(config, layout), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def planned(**changes: int) -> ConfigSource:
    """What can be planned of it, without tensors."""
    config = {"model_type": "qwen3_5_moe", "text_config": _TEXT | changes, "vision_config": _TOWER}
    return source_from_config(config, name="planned")


def _tensors(config: dict, layout: str) -> dict[str, torch.Tensor]:
    random, tensors, packed = np.random.RandomState(SEED), {}, {}
    for weight in architecture(config).weights("model.language_model.", vision=True, mtp=True):
        values = random.randint(-255, 256, weight.shape) * 2.0 ** (random.randint(-8, -1, weight.shape) - 8.0)
        if weight.name.endswith("layers.0.mlp.experts.1.up_proj.weight"):
            values[3, 16:32], values[5] = 0, 0
        if weight.role in ("shared_expert", "head"):
            values *= 2.0 ** random.randint(-12, 1, (weight.shape[0], 1))  # scales of blocks down to the least
        tensors[weight.name] = torch.from_numpy(values.astype(np.float32)).bfloat16()
        fused = layout == "fused" or (layout == "mixed" and weight.layer == 0)
        if weight.packed and fused and weight.role != "mtp":
            rows, columns = weight.packed.shape[0] * weight.packed.shape[1], weight.packed.shape[2]
            whole = packed.setdefault(weight.packed.name, torch.empty(rows, columns, dtype=torch.bfloat16))
            whole[weight.packed.row : weight.packed.row + weight.shape[0]] = tensors.pop(weight.name)
            packed[weight.packed.name + ".shape"] = weight.packed.shape
    shapes = {name: packed.pop(f"{name}.shape") for name in [n for n in packed if not n.endswith(".shape")]}
    return tensors | {name: packed[name].reshape(shape) for name, shape in shapes.items()}
