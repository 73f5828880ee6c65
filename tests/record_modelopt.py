"""Run ModelOpt's export on the model of modelopt_models.py and record what it writes, as hashes.

    python tests/record_modelopt.py tests/quant/builds/modelopt.json

It needs nvidia-modelopt (0.47.0 made the recorded file) beside the project's environment, with omegaconf, pulp and
scipy; torch on a CPU is enough, because scales come from the largest magnitude. Recipes are ModelOpt's own, without FP8
for keys and values: `nvfp4_mlp_weight_only` in groups of 16; `w4a16_nvfp4-fp8_attn` of qwen3_5_moe; experts only with
`input_scale` 1. Recorded of a tensor: "DTYPE shape sha256"; of FP8's `input_scale`, which comes from data, nothing.
"""

import copy
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

HASH = 16  # hexadecimal digits kept of a SHA-256


def summary(folder: Path) -> dict:
    """{"tensors": {name: dtype, shape and hash}, "hf_quant_config": ..., "quantization_config": ...}."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: describe(file.get_tensor(name)) for name in sorted(file.keys())}
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return {
        "tensors": tensors,
        "hf_quant_config": json.loads((folder / "hf_quant_config.json").read_text("utf-8")),
        "quantization_config": config,
    }


def describe(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {hashlib.sha256(data).hexdigest()[:HASH]}"


def recipe(name: str) -> dict:
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe

    if name == "nvfp4":
        config = copy.deepcopy(mtq.NVFP4_MLP_WEIGHT_ONLY_CFG)
        for entry in config["quant_cfg"]:
            if (entry.get("cfg") or {}).get("block_sizes"):
                entry["cfg"]["block_sizes"][-1] = 16
        return config
    path = {
        "nvfp4 head fp8": "huggingface/qwen3_5_moe/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast",
        "nvfp4-w4a4": "general/ptq/nvfp4_experts_only_input_scale1-kv_fp8_cast",
    }[name]
    config = load_recipe(path).quantize.model_dump()
    config["quant_cfg"] = [entry for entry in config["quant_cfg"] if "bmm" not in entry["quantizer_name"]]
    return config


def export(checkpoint: Path, name: str, output: Path) -> None:
    import modelopt.torch.quantization as mtq
    import transformers
    from modelopt.torch.export import export_hf_checkpoint

    model = transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(checkpoint, dtype="auto").eval()

    def forward(model):
        with torch.no_grad():
            model(torch.arange(64).reshape(2, 32))

    mtq.quantize(model, recipe(name), forward)
    export_hf_checkpoint(model, export_dir=output)


def main(target: Path) -> None:
    from modelopt_models import BUILDS, make

    record = {}
    with tempfile.TemporaryDirectory() as scratch:
        for layout in ("fused", "each", "mixed"):
            checkpoint = make(Path(scratch) / layout, layout)
            for name in BUILDS:
                output = Path(scratch) / f"{layout}-{name}".replace(" ", "-")
                export(checkpoint, name, output)
                found = summary(output)
                if name == "nvfp4 head fp8":
                    found["tensors"] = {k: v for k, v in found["tensors"].items() if not k.endswith("input_scale")}
                assert record.setdefault(name, found) == found, f"{name}: experts {layout} give another export"
    target.write_text(json.dumps(record, indent=0) + "\n", encoding="utf-8")  # modelopt prints on stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
