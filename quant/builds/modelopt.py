"""nvfp4 and nvfp4-w4a4: e2m1 weights in ModelOpt's layout, as NVIDIA and Ornith-1.5 publish them.

    nvfp4        W4A16: routed and shared experts, or the MLP of a dense model; activations stay BF16
    nvfp4-w4a4   routed experts only, or that MLP, and an `input_scale` for each: activations become NVFP4 too

Everything else is as in the source, unless `AskedNvfp4` says more: the head in NVFP4, attention in FP8 with one scale
for a matrix. What a source holds in NVFP4 beyond that, attention or the head, keeps its codes in `nvfp4` if all that is
fused with it can. MTP and vision are never quantized: engines build them in BF16. A folder of one algorithm says so in
two words and lists what is not quantized, with ModelOpt's wildcards; one of two lists what is. Experts are written one
by one: readers drop the scales of fused ones (vllm#49638).

`input_scale` is 1.0, as in ModelOpt's own recipe without data (`nvfp4_experts_only_input_scale1`): activations of up to
2688 have room. With an importance matrix that tells the largest activations it is amax / 2688 (FP8: / 448), amax of all
experts of the layer as in ModelOpt's export, so that those which no token reached have one; 0.5 where none was. A
projection without one is read as zero (vllm#45212), so the plan has one for each.

`--kv-cache fp8` is ModelOpt's flag, in both configs and without a tensor: vLLM (vllm#29980) and SGLang then keep keys
and values in e4m3 where `--kv-cache-dtype` is auto, with scales of 1.0, since the checkpoint holds none.

Source: modelopt 0.47, torch/export: quant_utils.py, convert_hf_config.py, unified_export_hf.py. What it makes of the
same weights is recorded in tests/quant/builds/modelopt.json.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ornith_moe.quant.builds.build import AskedNvfp4, Options, register
from ornith_moe.quant.builds.folder import SafetensorsBuild, fallbacks, whole_groups
from ornith_moe.quant.builds.layout import Layout
from ornith_moe.quant.builds.plan import BuildPlan, OutputTensor
from ornith_moe.quant.builds.storages.fp8 import FP8Tensor
from ornith_moe.quant.builds.storages.nvfp4 import GROUP, NVFP4, is_nvfp4
from ornith_moe.quant.builds.storages.plain import Keep
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.builds.tensor_parallel import max_tensor_parallel
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.files import json_bytes
from ornith_moe.quant.gguf.imatrix import Imatrix
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.source import Source

CONFIG_FILE = "hf_quant_config.json"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # whose layout it is: llama.cpp and vLLM ask for that name
GROUPED = ("NVFP4", "W4A16_NVFP4")  # algorithms with a scale for every 16 columns
MLP, MIXERS = ("expert", "shared_expert", "mlp"), ("attention", "linear_attention")  # roles
SCALE_2 = ".weight_scale_2"
INPUT_SCALE, UNREACHED = ".input_scale", 0.5  # the largest activation of a layer that no token reached
SMALL = ("in_proj_a", "in_proj_b")  # a few rows each; every recipe leaves them alone


class ModelOptBuild(SafetensorsBuild):
    """A folder in ModelOpt's layout; `roles` are in NVFP4, and `algorithm` says what becomes of their activations."""

    storages = (NVFP4, FP8Tensor)
    quant_method = "modelopt"
    engines = ("vLLM", "SGLang", "TensorRT-LLM")
    unread = "has no reader of ModelOpt's layout"
    hears = frozenset({"nvfp4", "kv_cache"})
    lists = False  # modules, whatever their algorithms

    def __init__(self, name: str, algorithm: str, roles: tuple[str, ...]):
        self.name, self.algorithm, self.roles = name, algorithm, roles

    def decide(self, source: Source, options: Options) -> BuildPlan:
        self.check(source, options.nvfp4)
        asked, listed = options.nvfp4, options.stored
        held = held_in_nvfp4(source, asked) if self.algorithm == "W4A16_NVFP4" else set()
        kinds = (
            (listed.get(layer_of(weight.owner), "") if weight.is_linear else "")
            if listed
            else self.wants(weight, asked) or (self.algorithm if index in held else "")
            for index, weight in enumerate(source.weights)
        )
        return self.planned(source, options, {index: kind for index, kind in enumerate(kinds) if kind})

    def planned(self, source: Source, options: Options, wanted: dict[int, str]) -> BuildPlan:
        """The plan in which these weights have these algorithms."""
        model, plan = source.architecture, BuildPlan(self)
        grouped = [index for index, kind in wanted.items() if kind in GROUPED]
        quantized = whole_groups(source, grouped, GROUP, options.kept)
        plan.fallbacks = fallbacks(source, set(grouped) - quantized, GROUP, options.kept)
        plan.max_tensor_parallel = max_tensor_parallel(source, in_groups=quantized)
        quantized |= whole_groups(source, wanted.keys() - set(grouped), 1, options.kept)
        algorithms: dict[str, str] = {}  # of modules
        for index, weight in enumerate(source.weights):
            if index not in quantized:
                plan.add(source, index, Keep())
                continue
            algorithms[weight.owner] = kind = wanted[index]
            storage = NVFP4() if kind in GROUPED else FP8Tensor()
            plan.add(source, index, storage, group=model.scale_group(weight))
            if kind != "W4A16_NVFP4":
                value = input_scale(source, index, kind, options.imatrix)
                plan.tensors.append(OutputTensor(f"{weight.owner}{INPUT_SCALE}", "F32", (), 4, (value,)))
        plan.config = quantization_config(source, algorithms, self.lists)
        if options.kv_cache == "fp8":
            plan.keep_cache_in_fp8({"dynamic": False, "num_bits": 8, "type": "float"})
        if scaled := sum(kind != "W4A16_NVFP4" for kind in algorithms.values()):
            plan.measured = options.imatrix is not None
            whence = f"from {options.imatrix.name}" if options.imatrix else "1.0, no data having been asked"
            plan.notes.append(f"{self}: {scaled} scales of activations are {whence}")
        return plan

    def as_stored(self, source: Source, found: StoredBuild) -> BuildPlan:
        """With the scales of activations that are stored: they come from data that is not here."""
        plan = super().as_stored(source, found)
        for number, tensor in enumerate(plan.tensors):
            stored = found.tensors.get(tensor.name) if tensor.constant else None
            if stored is not None and (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape):
                value = float(stored.read(0, stored.nbytes).view("<f4")[0])
                if 0 < value < math.inf:
                    plan.tensors[number] = replace(tensor, constant=(value,))
        return plan

    def check(self, source: Source, asked: AskedNvfp4) -> None:
        """Refuse what this build of `source` cannot be.

        Raises:
            PlanError: so it is.
        """
        if asked.head and self.algorithm == "NVFP4":
            raise PlanError(
                f"{self.name}: --nvfp4-head would compute the head with activations of four bits, which no recipe "
                "does; leave the option out"
            )
        if asked.head and not any(weight.role == "head" for weight in source.weights):
            raise PlanError(
                f"{self.name}: --nvfp4-head, but the head of this model is its embedding; leave the option out"
            )

    def wants(self, weight: Weight, asked: AskedNvfp4) -> str:
        """The algorithm for `weight`; "" to keep it."""
        if weight.is_linear and (weight.role in self.roles or (asked.head and weight.role == "head")):
            return self.algorithm
        mixer = weight.is_linear and weight.role in MIXERS and weight.leaf not in SMALL
        return "FP8" if mixer and asked.rest == "fp8" else ""

    def side_files(self, source: Source, plan: BuildPlan, layout: Layout) -> dict[str, bytes]:
        return super().side_files(source, plan, layout) | {CONFIG_FILE: json_bytes(hf_quant_config(plan.config))}

    def recognize(self, found: StoredBuild) -> bool:
        """By what becomes of the activations of experts."""
        if not super().recognize(found):
            return False
        listed = [*listed_algorithms(found).values()]
        if listed and all(kind == "FP8" for kind in listed):  # a fit that had room
            return self.algorithm == "W4A16_NVFP4"
        return self.algorithm in [found.quantization_config.get("quant_algo"), *listed]

    def asked_in(self, found: StoredBuild) -> Options:
        tensors = found.tensors
        fp8 = any(FP8Tensor.of(name, tensors) for name in tensors)
        head = "lm_head.weight_scale_2" in tensors
        listed = {module: kind for module, kind in listed_algorithms(found).items() if kind in (*GROUPED, "FP8")}
        held = frozenset(name.removesuffix(SCALE_2) for name in tensors if name.endswith(SCALE_2))
        return replace(super().asked_in(found), nvfp4=AskedNvfp4(head, "fp8" if fp8 else "bf16", held), stored=listed)


def held_in_nvfp4(source: Source, asked: AskedNvfp4) -> set[int]:
    """Weights that are in NVFP4 whatever their role, with all that is fused with them: their source holds them so."""
    group = source.architecture.fused_group
    roles = (*MLP, *MIXERS, "head")
    linear = [i for i, w in enumerate(source.weights) if w.is_linear and w.role in roles and w.leaf not in SMALL]

    def is_held(index: int) -> bool:
        return is_nvfp4(source, index) if asked.held is None else source.weights[index].owner in asked.held

    others = {group(source.weights[index]) for index in linear if not is_held(index)}
    return {index for index in linear if group(source.weights[index]) not in others}


def listed_algorithms(found: StoredBuild) -> dict[str, object]:
    """{module: algorithm} of a folder that lists them, as one of several algorithms does."""
    layers = found.quantization_config.get("quantized_layers")
    pairs = layers.items() if isinstance(layers, dict) else ()
    return {module: entry.get("quant_algo") for module, entry in pairs if isinstance(entry, dict)}


def input_scale(source: Source, index: int, algorithm: str, imatrix: Imatrix | None) -> float:
    """What activations of weight `index` are divided by.

    Raises:
        PlanError: the importance matrix does not tell, or is of another model.
    """
    if imatrix is None:
        return 1.0
    model = source.architecture
    (place,) = model.gguf_places(source.weights[index])
    matched = imatrix.match({place.name: (place.shape, algorithm)}, model.gguf_architecture)
    entry = imatrix.entry_of(place.name)
    if not matched or entry is None or entry.largest is None:
        raise PlanError(
            f"{imatrix.name}: does not tell the largest activations of {place.name}, of which --imatrix would make "
            "input scales; make it with ornith-moe imatrix, or leave --imatrix out for scales of 1.0"
        )
    return float(np.float32(entry.largest or UNREACHED) / np.float32(448 if algorithm == "FP8" else 2688))


def quantization_config(source: Source, algorithms: dict[str, str], lists: bool = False) -> dict[str, Any]:
    """What config.json says, as `convert_hf_quant_config_format` makes it.

    Args:
        algorithms: {module: algorithm} of those that are quantized.
        lists: they are listed even if there is one algorithm.
    """
    kinds = dict.fromkeys(algorithms.values())
    uniform = len(kinds) < 2 and not lists
    groups = {f"group_{i}": group_config(kind) for i, kind in enumerate(kinds)}
    config: dict[str, Any] = {"config_groups": groups}
    if uniform:
        for group in groups.values():
            group["targets"] = ["Linear"]
        others = [module for module in modules(source) if module not in algorithms]
        ignored = sorted(with_wildcards(others, algorithms))
        config["ignore"] = ignored + [f"{source.architecture.MTP_PREFIX.rstrip('.')}*"] * source.has_mtp
    else:
        layers = {layer_of(module): kind for module, kind in algorithms.items()}
        for kind, group in zip(kinds, groups.values(), strict=True):
            group["targets"] = sorted(module for module, its in layers.items() if its == kind)
        config["quantized_layers"] = {
            module: {"quant_algo": kind} | ({} if kind == "FP8" else {"group_size": GROUP})
            for module, kind in layers.items()
        }
        config["ignore"] = []
    algorithm = next(iter(kinds), "NVFP4") if uniform else "MIXED_PRECISION"
    return config | {"quant_algo": algorithm, "producer": PRODUCER, "quant_method": "modelopt"}


def group_config(algorithm: str) -> dict[str, Any]:
    """Numbers of an algorithm, for readers that know compressed-tensors; weight-only has no activations."""
    numbers = {"dynamic": False, "num_bits": 8 if algorithm == "FP8" else 4, "type": "float"}
    numbers |= {} if algorithm == "FP8" else {"group_size": GROUP}
    activations = {} if algorithm == "W4A16_NVFP4" else {"input_activations": dict(numbers)}
    return {**activations, "weights": numbers}


def hf_quant_config(config: dict[str, Any]) -> dict[str, Any]:
    """hf_quant_config.json, which says the same."""
    algorithm = config["quant_algo"]
    cache = "FP8" if "kv_cache_scheme" in config else None
    quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": cache}
    if algorithm == "MIXED_PRECISION":
        quantization["quantized_layers"] = config["quantized_layers"]
    else:
        quantization |= {"group_size": GROUP, "exclude_modules": config["ignore"]}
    return {"producer": config["producer"], "quantization": quantization}


def layer_of(module: str) -> str:
    """The module that a config names: all routed experts of a layer are one."""
    parent, found, _ = module.rpartition(".experts.")
    return f"{parent}.experts" if found else module


def modules(source: Source) -> Iterator[str]:
    """Modules with a matrix, of the model and its vision tower; the head also where it is the embedding."""
    for weight in source.weights:
        if weight.role not in ("norm", "mtp") and len(weight.shape) > 1 and weight.name.endswith(".weight"):
            yield weight.owner
    if source.architecture.tied:
        yield "lm_head"


def with_wildcards(others: Iterable[str], quantized: Iterable[str]) -> set[str]:
    """Names of `others` up to the first dot from which on nothing is `quantized`, and a star.

    Where a star behind the name would reach further, behind a dot, as in `_prefix_wildcard_summarize_exclude_modules`.
    """
    known = set(quantized)
    names = sorted(known)

    def reaches(prefix: str) -> bool:
        at = bisect_left(names, prefix)
        return at < len(names) and names[at].startswith(prefix)

    def pattern(name: str) -> str:
        for i in (i for i, letter in enumerate(name) if letter == "."):
            if not reaches(name[:i]):
                return f"{name[:i]}*"
            if not reaches(f"{name[:i]}.") and name[:i] not in known:
                return f"{name[:i]}.*"
        return name

    return {pattern(name) for name in others}


register(ModelOptBuild("nvfp4", "W4A16_NVFP4", MLP), ModelOptBuild("nvfp4-w4a4", "NVFP4", ("expert", "mlp")))
