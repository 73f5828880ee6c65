"""fp8-channel: compressed-tensors float-quantized, the layout of the official Ornith-1.0 FP8 builds."""

from __future__ import annotations

import re
from typing import Any

from ornith_moe.quant.builds.build import Options, register
from ornith_moe.quant.builds.folder import SafetensorsBuild
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.fp8 import FP8Channel
from ornith_moe.quant.builds.storages.plain import Keep
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.builds.tensor_parallel import max_tensor_parallel
from ornith_moe.quant.source.source import Source

FORMAT = "float-quantized"
WEIGHTS: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel"}
ACTIVATIONS: dict[str, Any] = {"num_bits": 8, "type": "float", "dynamic": True, "observer": None, "strategy": "token"}
COMMON: dict[str, Any] = {
    "symmetric": True, "group_size": None, "block_structure": None, "actorder": None, "scale_dtype": None,
    "zp_dtype": None, "observer_kwargs": {},
}  # fmt: skip
STATIC: dict[str, Any] = {"dynamic": False, "observer": "memoryless_minmax"}
KV_CACHE = COMMON | STATIC | {"num_bits": 8, "type": "float", "strategy": "tensor"}  # as of llm-compressor


class FP8ChannelBuild(SafetensorsBuild):
    name = "fp8-channel"
    storages = (FP8Channel,)
    quant_method = "compressed-tensors"
    dequantizer = "CompressedTensorsConfig"
    hears = frozenset({"kv_cache"})

    def decide(self, source: Source, options: Options) -> BuildPlan:
        model = source.architecture
        ignore = [*model.CHANNEL_IGNORE, *(model.CHANNEL_IGNORE_MTP if source.has_mtp else ())]
        patterns = [re.compile(item[3:]) for item in ignore if item.startswith("re:")]
        names = {item for item in ignore if not item.startswith("re:")}
        plan = BuildPlan(self, max_tensor_parallel=max_tensor_parallel(source))
        groups = {model.fused_group(source.weights[index]) for index in options.kept}
        skipped: dict[str, None] = {}
        for index, weight in enumerate(source.weights):
            name = weight.owner
            quantize = weight.is_linear and name not in names and not any(p.match(name) for p in patterns)
            if quantize and model.fused_group(weight) in groups:
                quantize = False
                skipped[name if weight.expert is None else rf"re:^{re.escape(model.fused_group(weight))}\..*"] = None
            plan.add(source, index, FP8Channel() if quantize else Keep())
        plan.config = compressed_tensors_config([*ignore, *skipped])
        if options.kv_cache == "fp8":
            plan.keep_cache_in_fp8(KV_CACHE)
        return plan

    def recognize(self, found: StoredBuild) -> bool:
        """Of all that compressed-tensors reads, what does not say to be in another format."""
        return super().recognize(found) and found.quantization_config.get("format", FORMAT) == FORMAT


def compressed_tensors_config(
    ignore: list[str],
    kind: str = FORMAT,
    weights: dict[str, Any] = WEIGHTS,
    activations: dict[str, Any] | None = ACTIVATIONS,
) -> dict[str, Any]:
    """quantization_config of compressed-tensors, as the official Ornith-1.0 FP8 builds spell it.

    Args:
        kind: the format of its tensors. weights, activations: what differs from numbers of no particular kind.
    """
    group = {
        "format": kind,
        "input_activations": None if activations is None else COMMON | activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": COMMON | STATIC | weights,
    }
    return {
        "config_groups": {"config_group_0": group},
        "format": kind,
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": "0.17.1",
    }


register(FP8ChannelBuild())
