"""Plans of the builds that are folders of safetensors: fp8-channel, fp8-block, bf16.

A linear layer of a fused group (q k v; gate up; in_proj_qkv in_proj_z) is quantized with all of its group or not at
all, because the engines concatenate them at load; the experts of a layer are one such group. Sources: facts of the
published builds, by header and byte count; vLLM and SGLang loaders for the fused groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ornith_moe.quant.builds.plan import BuildPlan, OutputTensor, Step
from ornith_moe.quant.builds.storage import FP8_BLOCK, FP8Block, FP8Channel, Keep, Storage, ToBF16
from ornith_moe.quant.builds.tensor_parallel import max_tensor_parallel, whole_blocks
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.weights import Source

_FUSED = {  # linear layers that engines concatenate at load -> the name of their group
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "in_proj_qkv": "qkvz",
    "in_proj_z": "qkvz",
}


def plan_safetensors(source: Source, build: str, kept: Mapping[int, str]) -> BuildPlan:
    """Plan one of `SAFETENSORS_BUILDS`; `kept` are weights that stay as they are, with all that is fused with them."""
    if build == "fp8-channel":
        return _plan_channel(source, kept)
    if build == "fp8-block":
        return _plan_block(source, kept)
    plan = BuildPlan(build, max_tensor_parallel=max_tensor_parallel(source))
    for index, weight in enumerate(source.weights):
        _add(plan, source, index, weight, ToBF16())
    return plan


def _plan_channel(source: Source, kept: Mapping[int, str]) -> BuildPlan:
    model = source.architecture
    ignore = [*model.CHANNEL_IGNORE, *([model.CHANNEL_IGNORE_MTP] if source.has_mtp else [])]
    patterns = [re.compile(item[3:]) for item in ignore if item.startswith("re:")]
    names = {item for item in ignore if not item.startswith("re:")}
    plan = BuildPlan("fp8-channel", max_tensor_parallel=max_tensor_parallel(source))
    groups = {_group(source.weights[index]) for index in kept}
    skipped: dict[str, None] = {}
    for index, weight in enumerate(source.weights):
        module = _module(weight)
        quantize = weight.is_linear and module not in names and not any(p.match(module) for p in patterns)
        if quantize and _group(weight) in groups:
            quantize = False
            skipped[module if weight.expert is None else rf"re:^{re.escape(_group(weight))}\..*"] = None
        _add(plan, source, index, weight, FP8Channel() if quantize else Keep())
    plan.config = compressed_tensors_config([*ignore, *skipped])
    return plan


def _plan_block(source: Source, kept: Mapping[int, str]) -> BuildPlan:
    model = source.architecture
    plan = BuildPlan("fp8-block")

    def wanted(weight: Weight) -> bool:
        return (
            weight.is_linear and weight.role != "vision" and _module(weight).rsplit(".", 1)[-1] not in model.BLOCK_SKIP
        )

    partial = {  # fused groups with a member that is not whole blocks
        _group(weight) for weight in source.weights if wanted(weight) and not whole_blocks(source, weight)
    }
    groups = partial | {_group(source.weights[index]) for index in kept}
    skipped: dict[str, None] = {}
    for index, weight in enumerate(source.weights):
        quantize = wanted(weight) and _group(weight) not in groups
        if wanted(weight) and _group(weight) in partial:
            shape = "x".join(map(str, weight.shape))
            kind = f"{shape}, it or its fused group is not whole 128x128 blocks, kept"
            plan.fallbacks.append(Fallback(weight.name, kind))
        if not quantize:
            module = _module(weight)
            experts = [_group(weight)] if weight.expert is not None else []
            skipped |= dict.fromkeys([*experts, module, *model.block_skip_aliases(module)])
        _add(plan, source, index, weight, FP8Block() if quantize else Keep())
    blocks = {step.weight for step in plan.steps if len(step.parts) > 1}
    plan.max_tensor_parallel = max_tensor_parallel(source, blocks)
    if any(weight.role == "vision" for weight in source.weights):
        root = model.VISION_PREFIX.rstrip(".")
        skipped |= dict.fromkeys([root.removeprefix("model."), root])
    plan.config = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": list(skipped),
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    return plan


def _add(plan: BuildPlan, source: Source, index: int, weight: Weight, storage: Storage) -> None:
    """A step whose parts are tensors of their own, named after the weight."""
    parts = storage.parts(weight.shape, source.dtype(index))
    first = len(plan.tensors)
    for part in parts:
        plan.tensors.append(OutputTensor(weight.name + part.suffix, part.dtype, part.shape, part.nbytes))
    plan.steps.append(Step(index, storage, parts, tuple(range(first, len(plan.tensors)))))


def _module(weight: Weight) -> str:
    return weight.name.removesuffix(".weight").removesuffix(".bias")


def _group(weight: Weight) -> str:
    """The fused group of a linear layer: all experts of a layer, or its own name when it is fused with nothing."""
    parent, _, leaf = _module(weight).rpartition(".")
    if weight.expert is not None:
        return parent.rpartition(".")[0]
    return f"{parent}.{_FUSED.get(leaf, leaf)}"


def compressed_tensors_config(ignore: list[str]) -> dict[str, Any]:
    """quantization_config of the official Ornith-1.0 FP8 builds, with this ignore list."""
    common = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    common |= {"actorder": None, "scale_dtype": None, "zp_dtype": None, "observer_kwargs": {}}
    group = {
        "format": "float-quantized",
        "input_activations": common | {"dynamic": True, "observer": None, "strategy": "token"},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": common | {"dynamic": False, "observer": "memoryless_minmax", "strategy": "channel"},
    }
    return {
        "config_groups": {"config_group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": "0.17.1",
    }
