"""Convert the models below with mlx-lm and mlx-vlm and record what they write, as hashes.

    python tests/record_mlx.py > tests/quant/builds/mlx.json

Needs mlx, mlx-lm and mlx-vlm beside requirements.txt; recorded with mlx 0.32.4 on a CPU, mlx-lm 0.32.2 and mlx-vlm
0.7.10, whose converter keeps the tower. What has a tower is converted by mlx-vlm too, which must agree with mlx-lm.

    moe     experts (fused, or mlx-lm would refuse it), a tower, an MTP layer, BF16
    dense   F32, embedding and head tied, an MLP of 96 columns, which fill no groups of 64
    half    F16
    gemma   Gemma 4 without a tower, BF16, embedding and head tied

Numbers come from integers of a fixed generator, as in tests/converter_models.py.
"""

import contextlib
import hashlib
import json
import struct
import sys
import tempfile
from pathlib import Path

import torch
from converter_models import qwen_tokenizer, tensors_of
from safetensors.torch import save_file

from ornith_moe.quant.source.architectures import architecture

HASH = 10  # hexadecimal digits kept of a SHA-256
_TEXT = {
    "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "full_attention_interval": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "linear_num_key_heads": 1,
    "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
                        "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
}  # fmt: skip
_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128,
    "mtp_num_hidden_layers": 1,
}  # fmt: skip
_TOWER = {
    "depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128, "patch_size": 4,
    "num_position_embeddings": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
_GEMMA = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 64, "global_head_dim": 128,
    "attention_k_eq_v": True, "sliding_window": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False, "enable_moe_block": False, "max_position_embeddings": 4096,
    "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {
    "gemma": {"model_type": "gemma4", "vocab_size": 320,
              "text_config": {"model_type": "gemma4_text", "dtype": "bfloat16", **_GEMMA}},
    "moe": {"model_type": "qwen3_5_moe", "vision_config": {"model_type": "qwen3_5_moe", **_TOWER},
            "text_config": {"model_type": "qwen3_5_moe_text", "dtype": "bfloat16", **_TEXT, **_MOE}},
    "dense": {"model_type": "qwen3_5", "dtype": "float32", "tie_word_embeddings": True,
              "text_config": {"model_type": "qwen3_5_text", "dtype": "float32", "intermediate_size": 96,
                              "tie_word_embeddings": True, **_TEXT}},
    "half": {"model_type": "qwen3_5",
             "text_config": {"model_type": "qwen3_5_text", "dtype": "float16", "intermediate_size": 128, **_TEXT}},
}  # fmt: skip
LAYOUTS = ("fused", "each", "mixed")
BUILDS = {  # ours -> options of mlx_lm.convert
    "mlx:2": {"q_bits": 2}, "mlx:3": {"q_bits": 3}, "mlx:4": {"q_bits": 4}, "mlx:5": {"q_bits": 5},
    "mlx:6": {"q_bits": 6}, "mlx:8": {"q_bits": 8}, "mlx:bf16": {"dtype": "bfloat16"},
    "mlx:mxfp4": {"q_bits": 4, "q_mode": "mxfp4"}, "mlx:nvfp4": {"q_bits": 4, "q_mode": "nvfp4"},
    "mlx:mxfp8": {"q_bits": 8, "q_mode": "mxfp8"},
}  # fmt: skip

RECORDED = {
    "gemma": ("mlx:4",),
    "moe": tuple(BUILDS),
    "dense": ("mlx:4", "mlx:bf16", "mlx:nvfp4"),
    "half": ("mlx:4", "mlx:6", "mlx:mxfp8"),
}


def make(name: str, folder: Path, layout: str = "fused") -> Path:
    """Write the checkpoint `name` of MODELS into `folder`; layout mixed: the MTP layer's experts one by one."""
    folder.mkdir()
    tokenizer, settings = qwen_tokenizer()
    for file, content in (
        ("config.json", MODELS[name]), ("tokenizer.json", tokenizer), ("tokenizer_config.json", settings),
    ):  # fmt: skip
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    tensors = tensors_of(MODELS[name])
    if name == "half":
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
    save_file(_laid_out(MODELS[name], tensors, layout), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _laid_out(config: dict, tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    model, laid_out = architecture(config), dict(tensors)
    for weight in model.weights("model.language_model.", vision=False, mtp=bool(model.mtp_layers)):
        if weight.packed and (layout == "fused" or (layout == "mixed" and weight.role != "mtp")):
            packed, rows = weight.packed, weight.shape[0]
            whole = laid_out.setdefault(packed.name, torch.empty(packed.shape, dtype=torch.bfloat16))
            whole.view(-1, packed.shape[-1])[packed.row : packed.row + rows] = laid_out.pop(weight.name)
    return laid_out


def summary(folder: Path) -> dict[str, str]:
    """{tensor: "DTYPE shape hash"} of all files of a folder, each of which must say that its format is MLX's."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:start])
        assert header.pop("__metadata__") == {"format": "mlx"}
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            digest = hashlib.sha256(data[start + begin : start + end]).hexdigest()[:HASH]
            found[name] = f"{tensor['dtype']} {'x'.join(map(str, tensor['shape']))} {digest}"
    return dict(sorted(found.items()))


def record(checkpoint: Path, out: Path, options: dict, has_tower: bool) -> dict:
    from mlx_lm.convert import convert
    from mlx_vlm.convert import convert as convert_with_tower

    options = options if "dtype" in options else {"quantize": True, "q_group_size": None, **options}
    convert(str(checkpoint), str(out / "text"), **options)
    tensors = summary(out / "text")
    if has_tower:
        if "q_group_size" in options:
            options["q_group_size"] = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}.get(options.get("q_mode", ""), 64)
        convert_with_tower(str(checkpoint), str(out / "all"), **options)
        text, tensors = tensors, summary(out / "all")
        assert {name: tensors.get(name) for name in text} == text
    config = json.loads((out / "text" / "config.json").read_text("utf-8"))
    index = json.loads((out / "text" / "model.safetensors.index.json").read_text("utf-8"))
    return {"tensors": tensors, "quantization": config.get("quantization"), "index": index["metadata"]}


def main() -> None:
    import mlx.core

    mlx.core.set_default_device(mlx.core.cpu)
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        for name, config in MODELS.items():
            checkpoint = make(name, Path(scratch) / name)
            for build in RECORDED[name]:
                out = Path(scratch) / f"{name} {build}"
                found[f"{name} {build}"] = record(checkpoint, out, dict(BUILDS[build]), "vision_config" in config)
    json.dump(found, sys.stdout, indent=0)


if __name__ == "__main__":
    main()
