"""fp8-block: 128x128 blocks and `weight_scale_inv`, the layout of the official Qwen3.5 FP8 builds."""

from __future__ import annotations

from ornith_moe.quant.builds.build import Options, register
from ornith_moe.quant.builds.folder import SafetensorsBuild
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.fp8 import FP8Block
from ornith_moe.quant.builds.storages.plain import Keep
from ornith_moe.quant.builds.tensor_parallel import max_tensor_parallel, whole_blocks
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.recipes import FP8_BLOCK
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.source import Source


class FP8BlockBuild(SafetensorsBuild):
    name = "fp8-block"
    storages = (FP8Block,)
    quant_method = "fp8"
    dequantizer = "FineGrainedFP8Config"

    def decide(self, source: Source, options: Options) -> BuildPlan:
        model, plan = source.architecture, BuildPlan(self)

        def wanted(weight: Weight) -> bool:
            leaf = weight.owner.rsplit(".", 1)[-1]
            return weight.is_linear and weight.role != "vision" and leaf not in model.BLOCK_SKIP

        partial = {  # fused groups with a member that is not whole blocks
            model.fused_group(weight)
            for weight in source.weights
            if wanted(weight) and not whole_blocks(source, weight)
        }
        groups = partial | {model.fused_group(source.weights[index]) for index in options.kept}
        skipped: dict[str, None] = {}
        for index, weight in enumerate(source.weights):
            quantize = wanted(weight) and model.fused_group(weight) not in groups
            if wanted(weight) and model.fused_group(weight) in partial:
                shape = "x".join(map(str, weight.shape))
                kind = f"{shape}, it or its fused group is not whole 128x128 blocks, kept"
                plan.fallbacks.append(Fallback(weight.name, kind))
            if not quantize:
                name = weight.owner
                experts = [model.fused_group(weight)] if weight.expert is not None else []
                skipped |= dict.fromkeys([*experts, name, *model.block_skip_aliases(name)])
            plan.add(source, index, FP8Block() if quantize else Keep())
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

    def instead(self, source: Source) -> str:
        return "fp8-channel needs no whole blocks"


register(FP8BlockBuild())
