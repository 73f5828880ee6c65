"""Builds that are folders of safetensors, as transformers names them: shards, index, config and what a model needs.

A linear layer of a fused group (q k v; gate up; in_proj_qkv in_proj_z) is quantized with all of its group or not at
all, because the engines concatenate them at load; the experts of a layer are one such group. Sources: facts of the
published builds, by header and byte count; vLLM and SGLang loaders for the fused groups.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ornith_moe.quant.builds.build import Build, Options
from ornith_moe.quant.builds.layout import (
    DEFAULT_MAX_SHARD_BYTES,
    Layout,
    safetensors_index,
    safetensors_layout,
    shard_tensors,
)
from ornith_moe.quant.builds.plan import BuildPlan, Step
from ornith_moe.quant.builds.side_files import copied_files
from ornith_moe.quant.builds.stored import StoredBuild, manifest_of_folder
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.files import json_bytes
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.source import Source
from ornith_moe.quant.source.weights import DROPPED_MTP

SKIP_LISTS = ("ignore", "modules_to_not_convert")  # keys of a quantization_config that name unquantized modules


class SafetensorsBuild(Build):
    """What folders of safetensors have in common; one of them says `decide`, and how a reader knows it."""

    quant_method: str | None = None  # of its quantization_config
    dequantizer: str | None = None  # class of transformers whose `dequantize=True` reads it as dense weights
    unread: str = ""  # why transformers cannot run it
    header_format = "pt"  # as headers name it
    shard_bytes = DEFAULT_MAX_SHARD_BYTES  # the most in a file, unless the user says otherwise
    engines: tuple[str, ...] = ("vLLM", "SGLang")
    client = "transformers"  # the program that runs it

    def lay_out(self, source: Source, plan: BuildPlan, options: Options) -> Layout:
        return safetensors_layout(plan, options.max_shard_bytes or self.shard_bytes, self.header_format)

    def files(self, plan: BuildPlan, options: Options) -> int:
        return len(shard_tensors(plan.tensors, options.max_shard_bytes or self.shard_bytes))

    def path(self, out: Path, layout: Layout) -> Path:
        return out / self.name.replace(":", "-")

    def manifest(self, path: Path) -> Path:
        return manifest_of_folder(path)

    def names(self, staging: Path, final: Path, layout: Layout) -> list[tuple[Path, Path]]:
        return [(staging, final)]

    def recognize(self, found: StoredBuild) -> bool:
        return found.is_folder and found.quant_method == self.quant_method

    def side_files(self, source: Source, plan: BuildPlan, layout: Layout) -> dict[str, bytes]:
        """Config with its quantization, index, tokenizer, templates, licence.

        Raises:
            CheckpointError: as `copied_files`.
        """
        sides = copied_files(source)
        config = self.config(json.loads(json.dumps(source.config)), plan)
        if any(entry.reason == DROPPED_MTP for entry in source.left_out):
            config.get("text_config", config)[source.architecture.MTP_LAYERS_KEY] = 0  # do not announce it
        sides["config.json"] = json_bytes(config)
        index = self.index(source, plan, layout)
        if index:
            sides["model.safetensors.index.json"] = json_bytes(index)
        return sides

    def index(self, source: Source, plan: BuildPlan, layout: Layout) -> dict[str, Any] | None:
        """model.safetensors.index.json; None: it has none, being one file."""
        return safetensors_index(plan, layout) if len(layout.files) > 1 else None

    def config(self, config: dict[str, Any], plan: BuildPlan) -> dict[str, Any]:
        """The source's config as this build has it."""
        return config | {"quantization_config": plan.config}

    def asked_in(self, found: StoredBuild) -> Options:
        """What was asked of a build that exists."""
        return Options(kv_cache="fp8" if found.quantization_config.get("kv_cache_scheme") else "bf16")

    def as_stored(self, source: Source, found: StoredBuild) -> BuildPlan:
        options = self.asked_in(found)
        plan = self.plan(source, options)
        plan.notes = []
        quantized = [step for step in plan.steps if len(step.parts) > 1]

        def is_kept(step: Step) -> bool:
            tensor = found.tensors.get(plan.tensors[step.tensors[0]].name)
            return tensor is not None and tensor.dtype in ITEM_BYTES

        kept = {step.weight: "stored unquantized" for step in quantized if is_kept(step)}
        if not kept:
            return plan
        plan = self.plan(source, replace(options, kept=kept))
        listed = [found.quantization_config.get(key) for key in SKIP_LISTS]
        names = {str(name) for one in listed if isinstance(one, list) for name in one}
        wanted = [name for key in SKIP_LISTS for name in plan.config.get(key, ())]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise PlanError(
                f"config.json: {len(missing)} unquantized modules are not on its skip list, first {missing[0]}"
            )
        plan.notes = [f"{len(kept)} weights, the first {source.weights[min(kept)].name}, are stored unquantized"]
        return plan


def whole_groups(source: Source, wanted: Collection[int], columns: int, kept: Collection[int]) -> set[int]:
    """Those of the weights `wanted` of which nothing that is fused with them is `kept` or of no whole `columns`."""
    group = source.architecture.fused_group
    partial = [index for index in wanted if source.weights[index].shape[1] % columns]
    left = {group(source.weights[index]) for index in [*partial, *kept]}
    return {index for index in wanted if group(source.weights[index]) not in left}


def fallbacks(source: Source, left: Collection[int], columns: int, kept: Collection[int]) -> list[Fallback]:
    """What is to be said of weights that `whole_groups` has left out for their columns."""
    weights = [source.weights[index] for index in sorted(set(left) - set(kept))]
    return [
        Fallback(
            weight.name,
            f"{weight.shape[0]}x{weight.shape[1]}, it or its fused group has rows of no whole {columns}, kept",
        )
        for weight in weights
    ]
