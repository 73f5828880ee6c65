"""The builds of a checkpoint: for every weight, which storage it gets, under which name, in which tensor.

    fp8-channel   compressed-tensors float-quantized, the layout of the official Ornith-1.0 FP8 builds
    fp8-block     128x128 blocks and `weight_scale_inv`, the layout of the official Qwen3.5 FP8 builds
    bf16          the checkpoint in BF16 with experts one by one
    gguf:TYPE     a text GGUF of a file type of llama.cpp

Safetensors builds name experts one by one and keep the vision tower as it is; a text GGUF stacks experts and leaves the
vision tower out. A linear layer of a fused group (q k v; gate up; in_proj_qkv in_proj_z) is quantized with all of its
group or not at all, because the engines concatenate them at load; the experts of a layer are one such group. Sources:
facts of the published builds, by header and byte count; vLLM and SGLang loaders for the fused groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ornith_moe.quant.architectures.weight import GgufPlace, Weight
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.gguf_types import EMBEDDING, FILE_TYPES, HEAD, FileType, tensor_types
from ornith_moe.quant.imatrix import USES_IMATRIX, Coverage, Imatrix
from ornith_moe.quant.recipe import Recipe
from ornith_moe.quant.source import Source
from ornith_moe.quant.storage import FP8_BLOCK, FP8Block, FP8Channel, Gguf, Keep, Part, Storage, ToBF16

SAFETENSORS_BUILDS = ("fp8-channel", "fp8-block", "bf16")
_FUSED = {  # linear layers that engines concatenate at load -> the name of their group
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "in_proj_qkv": "qkvz",
    "in_proj_z": "qkvz",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One weight into one build: how it is stored, the output tensor of each part, and where it begins there."""

    weight: int  # index into the source's weights
    storage: Storage
    parts: tuple[Part, ...]
    tensors: tuple[int, ...]  # index of each part's tensor in `BuildPlan.tensors`
    row: int = 0  # first row of this weight in the first tensor, in weight rows
    place: GgufPlace | None = None  # transforms on the way; None: as it is


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of a build. `dtype` is a safetensors dtype or a GGUF type; `shape` in Hugging Face order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    constant: tuple[float, ...] = ()  # F32 values of a tensor that no weight gives


@dataclass
class BuildPlan:
    """Everything about a build that headers alone decide."""

    build: str
    tensors: list[OutputTensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    fallbacks: list[str] = field(
        default_factory=list
    )  # weights that could not get the storage the build is named after
    notes: list[str] = field(default_factory=list)
    max_tensor_parallel: int | None = None
    config: dict[str, Any] = field(default_factory=dict)  # quantization_config of a safetensors build
    coverage: list[Coverage] = field(default_factory=list)  # of the tensors encoded with importance
    metadata: dict[str, str | int] = field(default_factory=dict)  # more keys of a GGUF
    kept: frozenset[int] = frozenset()  # weights that hold a NaN or an infinity and may
    non_finite: list[str] = field(default_factory=list)  # the tensors these are in
    needs_imatrix: list[str] = field(default_factory=list)  # tensors of a type that is noise without importance

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def is_gguf(self) -> bool:
        return self.build.startswith("gguf:")

    @property
    def file_type(self) -> str:
        return self.build.removeprefix("gguf:")


def plan_build(
    source: Source,
    build: str,
    *,
    recipe: Recipe | None = None,
    imatrix: Imatrix | None = None,
    kept: Mapping[int, str] | None = None,
    stored: Mapping[str, str] | None = None,
) -> BuildPlan:
    """Decide tensors, storages and names of `build` from the headers of `source`.

    Args:
        recipe: types that the user asks for in a GGUF.
        imatrix: importance of the columns of a GGUF's tensors.
        kept: {index of a weight: what is wrong with its values}; it stays BF16 (F32 where it would be), with all that
            its build stores or fuses with it.
        stored: {tensor: GGUF type} of a build that exists; goes before what would be decided here.
    Raises:
        PlanError: an unknown build, or one this model cannot have; an importance matrix of another model.
    """
    kept = kept or {}
    if build == "fp8-channel":
        plan = _plan_channel(source, kept)
    elif build == "fp8-block":
        plan = _plan_block(source, kept)
    elif build == "bf16":
        plan = BuildPlan(build, max_tensor_parallel=_tensor_parallel(source))
        for index, weight in enumerate(source.weights):
            _add(plan, source, index, weight, ToBF16())
    elif build.startswith("gguf:") and build.removeprefix("gguf:") in FILE_TYPES:
        plan = _plan_gguf(source, build, recipe or Recipe(), imatrix, kept, stored or {})
    else:
        known = ", ".join([*SAFETENSORS_BUILDS, *(f"gguf:{name}" for name in FILE_TYPES)])
        raise PlanError(f"build {build!r} is unknown; expected one of {known}")
    plan.kept = frozenset(kept)
    held = {plan.tensors[step.tensors[0]].name: step.weight for step in plan.steps if step.weight in kept}
    plan.non_finite = list(held)
    plan.fallbacks += [
        f"{source.weights[index].name}: {kept[index]}; tensor {tensor} is stored as "
        f"{next(t.dtype for t in plan.tensors if t.name == tensor)}"
        for tensor, index in held.items()
    ]
    return plan


def _add(plan: BuildPlan, source: Source, index: int, weight: Weight, storage: Storage) -> None:
    """A step whose parts are tensors of their own, named after the weight."""
    parts = storage.parts(weight.shape, source.dtype(index))
    first = len(plan.tensors)
    for part in parts:
        plan.tensors.append(OutputTensor(weight.name + part.suffix, part.dtype, part.shape, part.nbytes))
    plan.steps.append(Step(index, storage, parts, tuple(range(first, len(plan.tensors)))))


def _plan_channel(source: Source, kept: Mapping[int, str]) -> BuildPlan:
    model = source.architecture
    ignore = [*model.CHANNEL_IGNORE, *([model.CHANNEL_IGNORE_MTP] if source.has_mtp else [])]
    patterns = [re.compile(item[3:]) for item in ignore if item.startswith("re:")]
    names = {item for item in ignore if not item.startswith("re:")}
    plan = BuildPlan("fp8-channel", max_tensor_parallel=_tensor_parallel(source))
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
    plan = BuildPlan("fp8-block", max_tensor_parallel=_tensor_parallel(source, FP8_BLOCK))

    def wanted(weight: Weight) -> bool:
        return (
            weight.is_linear and weight.role != "vision" and _module(weight).rsplit(".", 1)[-1] not in model.BLOCK_SKIP
        )

    partial = {  # fused groups with a member that is not whole blocks
        _group(weight) for weight in source.weights if wanted(weight) and any(n % FP8_BLOCK for n in weight.shape)
    }
    groups = partial | {_group(source.weights[index]) for index in kept}
    skipped: dict[str, None] = {}
    for index, weight in enumerate(source.weights):
        quantize = wanted(weight) and _group(weight) not in groups
        if wanted(weight) and _group(weight) in partial:
            shape = "x".join(map(str, weight.shape))
            plan.fallbacks.append(f"{weight.name}: {shape}, it or its fused group is not whole 128x128 blocks, kept")
        if not quantize:
            module = _module(weight)
            experts = [_group(weight)] if weight.expert is not None else []
            skipped |= dict.fromkeys([*experts, module, *model.block_skip_aliases(module)])
        _add(plan, source, index, weight, FP8Block() if quantize else Keep())
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


def _plan_gguf(
    source: Source,
    build: str,
    recipe: Recipe,
    imatrix: Imatrix | None,
    kept: Mapping[int, str],
    stored: Mapping[str, str],
) -> BuildPlan:
    plan, model = BuildPlan(build), source.architecture
    file_type = FILE_TYPES[plan.file_type]
    places = [model.gguf_place(weight) for weight in source.weights]
    shapes = {place.name: place.shape for place in places if place}
    types, plan.fallbacks = tensor_types(
        shapes.items(),
        file_type,
        layers=source.layers,
        experts=model.experts,
        gqa=model.heads // model.kv_heads,
        imatrix=imatrix is not None,
        recipe=recipe,
    )
    other = {name for name in types.keys() & stored.keys() if "F32" != types[name] != stored[name]}
    types |= {name: stored[name] for name in other}
    types |= {place.name: "BF16" for place in map(places.__getitem__, kept) if place and types[place.name] != "F32"}
    if imatrix:
        quantizable = {name: (shapes[name], kind) for name, kind in types.items() if kind != "F32"}
        matched = imatrix.match(quantizable, model.gguf_architecture)
        plan.coverage = [found for found in matched if found.type in USES_IMATRIX]
        plan.metadata = imatrix.metadata() if plan.coverage else {}
    _note(plan, file_type, recipe, imatrix, types, other)

    for name, values in model.gguf_constants().items():
        plan.tensors.append(OutputTensor(name, "F32", (len(values),), 4 * len(values), tuple(values)))
    storages = {name: Gguf(name) for name in set(types.values())}
    covered = {found.tensor for found in plan.coverage}
    index_of: dict[str, int] = {}
    for index, (weight, place) in enumerate(zip(source.weights, places, strict=True)):
        if place is None:
            continue
        storage = storages[types[place.name]]
        if place.name in covered:
            row = partial(imatrix.importance, place.name, weight.expert or 0, weight.shape[-1])
            storage = Gguf(storage.name, row)
        parts = storage.parts(weight.shape, source.dtype(index))
        if place.name not in index_of:
            index_of[place.name] = len(plan.tensors)
            members = place.shape[0] if weight.expert is not None else 1
            plan.tensors.append(OutputTensor(place.name, storage.name, place.shape, members * parts[0].nbytes))
        plan.steps.append(Step(index, storage, parts, (index_of[place.name],), place.row, place))
    if any(weight.role == "vision" for weight in source.weights):
        plan.notes.append("the vision tower is left out: a text GGUF has no place for it (an mmproj file would)")
    return plan


def _note(
    plan: BuildPlan,
    file_type: FileType,
    recipe: Recipe,
    imatrix: Imatrix | None,
    types: Mapping[str, str],
    other: set[str],
) -> None:
    """What a user should know of the types of a GGUF."""
    build = plan.build
    if recipe.tensor_types and not file_type.quantized:
        plan.notes.append(f"{build}: tensor types are for quantized file types, and are left out as by llama-quantize")
    elif unused := recipe.unused(types):
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        plan.notes.append(f"{build}: no tensor has a name that {unused[0]!r}{more} fits")
    served = {name for name, kind in types.items() if kind in USES_IMATRIX}
    if imatrix and file_type.quantized:
        full = sum(found.covered == found.matrices for found in plan.coverage)
        plan.notes.append(
            f"{build}: {imatrix.name} covers {len(plan.coverage)} of the {len(served)} tensors that importance can "
            f"serve, {full} of them in every expert; what it does not cover counts all columns alike"
        )
    free = {EMBEDDING, HEAD, *(found.tensor for found in plan.coverage)}
    plan.needs_imatrix = sorted(name for name in types.keys() - free if types[name] in file_type.needs_imatrix)
    if plan.needs_imatrix:
        name, count = plan.needs_imatrix[0], len(plan.needs_imatrix)
        plan.notes.append(
            f"{build}: {count} tensors, the first {name} as {types[name]}, cannot be encoded without an importance "
            "matrix that covers them; give one with --imatrix"
        )
    if other:
        name = min(other)
        plan.notes.append(
            f"{len(other)} tensors are not of the types that {plan.file_type} alone means, the first is {name} as "
            f"{types[name]}: a recipe, an importance matrix or another program decided them"
        )


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


def _module(weight: Weight) -> str:
    return weight.name.removesuffix(".weight").removesuffix(".bias")


def _group(weight: Weight) -> str:
    """The fused group of a linear layer: all experts of a layer, or its own name when it is fused with nothing."""
    parent, _, leaf = _module(weight).rpartition(".")
    if weight.expert is not None:
        return parent.rpartition(".")[0]
    return f"{parent}.{_FUSED.get(leaf, leaf)}"


def _tensor_parallel(source: Source, block: int = 1) -> int:
    """Largest power of two by which heads and expert widths divide, each rank's width in whole `block`s."""
    model = source.architecture
    widths = [model.intermediate, *([model.shared_intermediate] if model.moe else [])]
    counts = [model.heads, *([model.key_heads] if hasattr(model, "key_heads") else [])]
    ranks = 1
    while all(n % (2 * ranks) == 0 for n in counts) and all(n % (2 * ranks * block) == 0 for n in widths):
        ranks *= 2
    return ranks


def plan_json(plan: BuildPlan, files: int) -> dict[str, Any]:
    """A plan as `ornith-moe plan --json` prints it."""
    return {
        "build": plan.build,
        "tensors": len(plan.tensors),
        "tensor_bytes": plan.tensor_bytes,
        "files": files,
        "fallbacks": plan.fallbacks,
        "max_tensor_parallel": plan.max_tensor_parallel,
        "notes": plan.notes,
        "imatrix": [asdict(found) for found in plan.coverage],
    }


def iterate_dtypes(plan: BuildPlan) -> Iterator[tuple[str, int, int]]:
    """(dtype, tensors, bytes) of a build, largest first."""
    totals: dict[str, list[int]] = {}
    for tensor in plan.tensors:
        count = totals.setdefault(tensor.dtype, [0, 0])
        count[0] += 1
        count[1] += tensor.nbytes
    for dtype, (tensors, size) in sorted(totals.items(), key=lambda item: -item[1][1]):
        yield dtype, tensors, size
