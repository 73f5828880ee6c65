"""bf16: the checkpoint in BF16, with experts one by one."""

from __future__ import annotations

from typing import Any

from ornith_moe.quant.builds.build import BUILDS, Options, register
from ornith_moe.quant.builds.folder import SafetensorsBuild
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.plain import ToBF16
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.builds.tensor_parallel import max_tensor_parallel
from ornith_moe.quant.source.source import Source


class BF16(SafetensorsBuild):
    name = "bf16"
    storages = ()  # BF16 is known from GGUF

    def decide(self, source: Source, options: Options) -> BuildPlan:
        plan = BuildPlan(self, max_tensor_parallel=max_tensor_parallel(source))
        for index in range(len(source.weights)):
            plan.add(source, index, ToBF16())
        return plan

    def config(self, config: dict[str, Any], plan: BuildPlan) -> dict[str, Any]:
        config["dtype"] = config.get("text_config", config)["dtype"] = "bfloat16"
        return config

    def recognize(self, found: StoredBuild) -> bool:
        """A folder that is no other build of ours."""
        return found.is_folder and not any(build.recognize(found) for build in BUILDS.values() if build is not self)


register(BF16())
