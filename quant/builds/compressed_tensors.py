"""nvfp4-ct, mxfp4 and int4-ct: weight-only builds of four bits in compressed-tensors' layouts, as of llm-compressor.

    nvfp4-ct       nvfp4-pack-quantized: the codes and scales of nvfp4, the scale of all inverted
    mxfp4          mxfp4-pack-quantized: the same codes, a power of two for 32 columns
    int4-ct        pack-quantized: int4, symmetric, one scale for 128 columns; for 32 where rows are of no whole 128
    int4-ct-g32    the same with one scale for 32

Routed and shared experts, or the MLP of a dense model; everything else is as in the source and on the ignore list.
What a source holds in NVFP4 beyond them is in nvfp4-ct too, and patterns of that list which would reach it are spelled
out.
int4 needs no data and runs where NVFP4 does not: Ampere, and AMD, whose MI355 multiplies MXFP4.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import replace
from typing import Any

from ornith_moe.quant.builds.build import AskedNvfp4, Options, register
from ornith_moe.quant.builds.folder import SafetensorsBuild, fallbacks, whole_groups
from ornith_moe.quant.builds.fp8_channel import KV_CACHE, compressed_tensors_config
from ornith_moe.quant.builds.modelopt import MLP, held_in_nvfp4, modules
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.int4 import Int4
from ornith_moe.quant.builds.storages.mxfp4 import GROUP as MXFP4_GROUP
from ornith_moe.quant.builds.storages.mxfp4 import MXFP4
from ornith_moe.quant.builds.storages.nvfp4 import GROUP, NVFP4Packed
from ornith_moe.quant.builds.storages.plain import Keep
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.builds.tensor_parallel import max_tensor_parallel
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.source.source import Source

ATTENTION = r"re:.*self_attn.*"
PACKED = ".weight_packed"
WIDE, NARROW = 128, 32


class PackedBuild(SafetensorsBuild):
    """A folder of packed weights of four bits; one of them says how a weight is stored."""

    quant_method = "compressed-tensors"
    dequantizer = "CompressedTensorsConfig"
    hears: frozenset[str] = frozenset({"kv_cache"})
    kind: str  # format, as the config names it

    @abstractmethod
    def group(self, source: Source, wanted: list[int]) -> int:
        """Columns that share a scale."""

    @abstractmethod
    def storage(self, group: int, shape: tuple[int, ...]) -> Storage:
        """How a weight of `shape` is stored."""

    @abstractmethod
    def numbers(self, group: int) -> dict[str, Any]:
        """What the config says of the weights."""

    def decide(self, source: Source, options: Options) -> BuildPlan:
        model, plan = source.architecture, BuildPlan(self)
        roles, held = (*MLP, "head") if self.takes_head(source, options) else MLP, self.held(source, options)
        wanted = [i for i, w in enumerate(source.weights) if w.is_linear and (w.role in roles or i in held)]
        group = self.group(source, wanted)
        quantized = whole_groups(source, wanted, group, options.kept)
        left = set(wanted) - quantized
        plan.fallbacks = fallbacks(source, left, group, options.kept)
        plan.max_tensor_parallel = max_tensor_parallel(source, in_groups=quantized, group=group)
        for index, weight in enumerate(source.weights):
            storage = self.storage(group, weight.shape) if index in quantized else Keep()
            plan.add(source, index, storage, group=model.scale_group(weight))
        ignore = [*model.CHANNEL_IGNORE, ATTENTION, *(model.CHANNEL_IGNORE_MTP if source.has_mtp else ())]
        ignore = [name for item in ignore for name in beside(item, source, wanted)]
        skipped = {
            weight.owner if weight.expert is None else rf"re:^{re.escape(model.fused_group(weight))}\..*": None
            for weight in (source.weights[index] for index in sorted(left))
        }
        plan.config = compressed_tensors_config([*ignore, *skipped], self.kind, self.numbers(group), None)
        if options.kv_cache == "fp8":
            plan.keep_cache_in_fp8(KV_CACHE)
        return plan

    def takes_head(self, source: Source, options: Options) -> bool:
        """Whether the output head is quantized too."""
        return False

    def held(self, source: Source, options: Options) -> set[int]:
        """Weights that are quantized whatever their role."""
        return set()

    def recognize(self, found: StoredBuild) -> bool:
        return super().recognize(found) and found.quantization_config.get("format") == self.kind


def beside(item: str, source: Source, wanted: list[int]) -> list[str]:
    """An item of an ignore list; if it means any of the weights `wanted`, the names of all others that it means."""
    means = re.compile(item[3:] if item.startswith("re:") else re.escape(item) + "$").match
    quantized = {source.weights[index].owner for index in wanted}
    if not any(map(means, quantized)):
        return [item]
    return [name for name in modules(source) if means(name) and name not in quantized]


class NVFP4PackedBuild(PackedBuild):
    name, kind = "nvfp4-ct", "nvfp4-pack-quantized"
    engines = ("vLLM",)
    storages = (NVFP4Packed,)
    unread = "reads packed experts without their weight_global_scale, as of 5.23, and computes something else"
    hears = frozenset({"nvfp4", "kv_cache"})

    def group(self, source: Source, wanted: list[int]) -> int:
        return GROUP

    def storage(self, group: int, shape: tuple[int, ...]) -> Storage:
        return NVFP4Packed()

    def numbers(self, group: int) -> dict[str, Any]:
        e4m3 = "torch.float8_e4m3fn"
        numbers = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": group}
        return numbers | {"scale_dtype": e4m3, "zp_dtype": e4m3}

    def takes_head(self, source: Source, options: Options) -> bool:
        if options.nvfp4.rest != "bf16":
            raise PlanError(f"{self.name}: its format is of NVFP4 alone; ask for nvfp4, or leave --nvfp4-rest out")
        if options.nvfp4.head and not any(weight.role == "head" for weight in source.weights):
            raise PlanError(
                f"{self.name}: --nvfp4-head, but the head of this model is its embedding; leave the option out"
            )
        return options.nvfp4.head

    def held(self, source: Source, options: Options) -> set[int]:
        return held_in_nvfp4(source, options.nvfp4)

    def asked_in(self, found: StoredBuild) -> Options:
        held = frozenset(name.removesuffix(PACKED) for name in found.tensors if name.endswith(PACKED))
        return replace(super().asked_in(found), nvfp4=AskedNvfp4(head="lm_head" in held, held=held))


class MXFP4Build(PackedBuild):
    name, kind = "mxfp4", "mxfp4-pack-quantized"
    engines = ("vLLM",)
    storages = (MXFP4,)

    def group(self, source: Source, wanted: list[int]) -> int:
        return MXFP4_GROUP

    def storage(self, group: int, shape: tuple[int, ...]) -> Storage:
        return MXFP4()

    def numbers(self, group: int) -> dict[str, Any]:
        numbers = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": group}
        return numbers | {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}


class Int4Build(PackedBuild):
    kind = "pack-quantized"
    storages = (Int4,)

    def __init__(self, name: str, columns: int):
        self.name, self.columns = name, columns

    def group(self, source: Source, wanted: list[int]) -> int:
        whole = all(source.weights[index].shape[1] % self.columns == 0 for index in wanted)
        return self.columns if whole else NARROW

    def storage(self, group: int, shape: tuple[int, ...]) -> Storage:
        return Int4(group, shape)

    def numbers(self, group: int) -> dict[str, Any]:
        return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}

    def recognize(self, found: StoredBuild) -> bool:
        if not super().recognize(found):
            return False
        groups = found.quantization_config.get("config_groups")
        entries = groups.values() if isinstance(groups, dict) else ()
        weights = [entry.get("weights") for entry in entries if isinstance(entry, dict)]
        sizes = [numbers.get("group_size") for numbers in weights if isinstance(numbers, dict)]
        return self.columns in sizes


register(NVFP4PackedBuild(), MXFP4Build(), Int4Build("int4-ct", WIDE), Int4Build("int4-ct-g32", NARROW))
