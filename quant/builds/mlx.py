"""mlx:BITS and mlx:MODE: a folder that mlx-lm and mlx-vlm both load, the text as mlx_lm.convert writes it.

Experts are stacked however the source holds them. Every linear layer of the text, the embedding and the head are
quantized in groups of 64, or of 16 or 32 small floats; the router and the gate of a shared expert get 8 affine bits and
are named in the config, as by mlx-lm; what fills no groups stays as it is, and so does the vision tower. Zero-centred
norms become w + 1 and convolutions get their channels last, both or neither: loaders take the shape of a convolution
for the sign that they must do both. Multi-token prediction is left out.

Sources: mlx-lm 0.32.2 (utils.py, convert.py, models/qwen3_5*.py) and mlx-vlm 0.7.10, both run.
"""

from __future__ import annotations

import math
from typing import Any

from ornith_moe.quant.builds.build import Options, register
from ornith_moe.quant.builds.folder import SafetensorsBuild
from ornith_moe.quant.builds.layout import Layout, safetensors_index
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.storages.mlx import FLOOR_DB, GROUP, MODES, ChannelsLast, MlxAffine, MlxFloat
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.source.accounts import LeftOut
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.source import Source

MTP = "multi-token prediction has no place in a folder for MLX, whose loaders drop it"
TEXT, TOWER, HEAD = "language_model.", "vision_tower.", "language_model.lm_head.weight"
TOP_LEVEL = (  # keys of a config without sections that belong above its text
    "architectures", "dtype", "eos_token_id", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "vocab_size",
)  # fmt: skip
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # as configs name them
GATE_BITS = 8  # of routers and of gates of shared experts


class MlxBuild(SafetensorsBuild):
    """The text in groups of `bits`, affine or, with a `mode`, in small floats; neither: all of it in BF16."""

    storages = (MlxAffine, MlxFloat)
    header_format = "mlx"
    shard_bytes = 5 << 30  # of mlx-lm and mlx-vlm
    library, engines = "mlx", ("mlx-lm", "mlx-vlm")
    client = "mlx-lm"

    def __init__(self, bits: int | None = None, mode: str = "affine"):
        self.name = f"mlx:{mode if mode in MODES else bits or 'bf16'}"
        self.group, self.bits = MODES[mode][:2] if mode in MODES else (GROUP, bits)
        self.mode = mode

    def decide(self, source: Source, options: Options) -> BuildPlan:
        plan, model = BuildPlan(self), source.architecture
        places = [model.mlx_places(weight) for weight in source.weights]
        kept = {place.name for index in options.kept for place in places[index]}
        dtype = self._dtype(source)
        exceptions: dict[str, dict[str, Any]] = {}
        fell: dict[str, Fallback] = {}
        gate = MlxAffine(GATE_BITS, dtype)  # one object for all weights, of which there are ten thousands
        others = MlxFloat(self.mode) if self.mode in MODES else MlxAffine(self.bits or GATE_BITS, dtype)
        of_bits = {bits: MlxAffine(bits, dtype) for bits in FLOOR_DB}
        for index, weight in enumerate(source.weights):
            plain = source.dtype(index) if weight.leaf in model.MLX_OWN_DTYPE else dtype
            for place in places[index]:
                moved = len(weight.shape) > 2 and place.shape != weight.shape
                storage: Storage = ChannelsLast(plain, weight.shape) if moved else Gguf(plain)
                if self.bits and _is_quantized(weight) and place.name not in kept:
                    is_gate = weight.role == "router"
                    group = GROUP if is_gate else self.group
                    if weight.shape[-1] % group:
                        kind = f"{weight.shape[-1]} columns fill no groups of {group}, stored as {plain}"
                        fell[place.name] = Fallback(place.name, kind)
                    elif is_gate:
                        storage = gate
                        exceptions[place.name.removesuffix(".weight")] = {"group_size": GROUP, "bits": GATE_BITS}
                    else:
                        storage, path = others, place.name.removesuffix(".weight")
                        if (bits := options.stored.get(path)) and bits != str(self.bits):
                            storage = of_bits[int(bits)]
                            exceptions[path] = {"group_size": GROUP, "bits": int(bits), "mode": "affine"}
                plan.add(source, index, storage, place)
        plan.fallbacks = list(fell.values())
        if self.bits:
            plan.config = {"group_size": self.group, "bits": self.bits, "mode": self.mode, **exceptions}
        if self.left_out(source):
            plan.notes.append(f"{self}: {MTP}")
        return plan

    def _dtype(self, source: Source) -> str:
        """What is not quantized is stored as this, and scales: the dtype that the config names, as mlx-lm decides."""
        if not self.bits:
            return "BF16"
        text = source.architecture.text.values
        return DTYPES.get(str(source.config.get("torch_dtype") or text.get("dtype")), source.dtype(0))

    def left_out(self, source: Source) -> list[LeftOut]:
        names = [source.tensor_of(index) for index, weight in enumerate(source.weights) if weight.role == "mtp"]
        return [LeftOut(MTP, tuple(dict.fromkeys(names)))] if names else []

    def config(self, config: dict[str, Any], plan: BuildPlan) -> dict[str, Any]:
        """The text in a section of its own, no vision_config without a tower, its quantization twice; keys sorted."""
        config.pop("quantization_config", None)
        if "text_config" not in config:  # mlx-lm knows no model_type for text alone
            model_type = str(config["model_type"]).removesuffix("_text")
            config = {key: config[key] for key in TOP_LEVEL if key in config} | {
                "model_type": model_type,
                "text_config": config,
            }
        if not any(tensor.name.startswith(TOWER) for tensor in plan.tensors):
            config.pop("vision_config", None)
        tied = not any(tensor.name == HEAD for tensor in plan.tensors)
        if tied != config["text_config"].get("tie_word_embeddings", False):
            config["text_config"]["tie_word_embeddings"] = tied
        if self.bits:
            config |= {"quantization": plan.config, "quantization_config": plan.config}
        else:
            for section in (config, config["text_config"]):
                section.update({key: "bfloat16" for key in ("dtype", "torch_dtype") if key in section})
        return dict(sorted(config.items()))

    def index(self, source: Source, plan: BuildPlan, layout: Layout) -> dict[str, Any]:
        index = safetensors_index(plan, layout)
        index["metadata"]["total_parameters"] = sum(math.prod(source.weights[step.weight].shape) for step in plan.steps)
        return index

    def recognize(self, found: StoredBuild) -> bool:
        """By the `quantization_config` without a method, or by the names of its tensors."""
        config = found.quantization_config if found.is_folder else {"quant_method": "gguf"}
        if "quant_method" in config:
            return False
        if not config:
            return self.bits is None and any(name.startswith(TEXT) for name in found.tensors)
        return (config.get("bits"), config.get("mode", "affine")) == (self.bits, self.mode)

    def asked_in(self, found: StoredBuild) -> Options:
        """Bits of the modules that the config names, as mlx-lm reads them."""
        bits = {path: one.get("bits") for path, one in found.quantization_config.items() if isinstance(one, dict)}
        known = {path: str(of) for path, of in bits.items() if type(of) is int and of in FLOOR_DB}
        return Options(stored={} if self.mode in MODES else known)

    def instead(self, source: Source) -> str:
        return "fp8-channel needs no groups"


def _is_quantized(weight: Weight) -> bool:
    """Whether mlx-lm quantizes it: linear layers, embedding and head of the text."""
    return weight.role != "vision" and (weight.is_linear or weight.role == "embedding")


register(*map(MlxBuild, (2, 3, 4, 5, 6, 8, None)), *(MlxBuild(mode=mode) for mode in MODES))
