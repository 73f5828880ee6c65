"""Plans of GGUF builds: the type of each tensor, the rows that each weight fills, and what a user should know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from ornith_moe.quant.builds.plan import BuildPlan, OutputTensor, Step
from ornith_moe.quant.builds.storage import Gguf
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.errors import brief
from ornith_moe.quant.gguf.imatrix import USES_IMATRIX, Imatrix
from ornith_moe.quant.gguf.mixtures import FILE_TYPES, UNMADE_WITHOUT_IMATRIX, FileType, fit, tensor_types
from ornith_moe.quant.gguf.tensor_types import EMBEDDING, HEAD, Recipe
from ornith_moe.quant.source.slab import matrix_shape
from ornith_moe.quant.source.weights import Source

TYPE_OPTIONS = {EMBEDDING: "--token-embedding-type", HEAD: "--output-tensor-type"}
STATIC = "Q4_K"  # of the MTP layer in files of fewer bits: the least that needs no importance and keeps its drafts good


def plan_gguf(
    source: Source,
    build: str,
    recipe: Recipe,
    imatrix: Imatrix | None,
    kept: Mapping[int, str],
    stored: Mapping[str, str],
) -> BuildPlan:
    """Plan a GGUF of a file type; the arguments are `plan_build`'s."""
    plan, model = BuildPlan(build), source.architecture
    file_type = FILE_TYPES[plan.file_type]
    places = [model.gguf_places(weight) for weight in source.weights]
    shapes = {place.name: place.shape for each in places for place in each}
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
    types |= {place.name: "BF16" for index in kept for place in places[index] if types[place.name] != "F32"}
    if imatrix:
        quantizable = {name: (shapes[name], kind) for name, kind in types.items() if kind != "F32"}
        matched = imatrix.match(quantizable, model.gguf_architecture)
        plan.coverage = [found for found in matched if found.type in USES_IMATRIX]
        plan.metadata = imatrix.metadata() if plan.coverage else {}
    mtp_places = (each for weight, each in zip(source.weights, places, strict=True) if weight.role == "mtp")
    mtp = {place.name for each in mtp_places for place in each}
    _without_importance(plan, file_type, types, shapes, mtp)
    _note(plan, file_type, recipe, imatrix, types, other)

    for name, values in model.gguf_constants().items():
        plan.tensors.append(OutputTensor(name, "F32", (len(values),), 4 * len(values), tuple(values)))
    storages = {name: Gguf(name) for name in set(types.values())}
    covered = {found.tensor for found in plan.coverage}
    index_of: dict[str, int] = {}
    for index, weight in enumerate(source.weights):
        for place in places[index]:
            storage = storages[types[place.name]]
            if place.name in covered:
                row = partial(imatrix.importance, place.name, weight.expert or 0, weight.shape[-1])
                storage = Gguf(storage.name, row)
            parts = storage.parts(weight.shape, source.dtype(index))
            if place.name not in index_of:
                index_of[place.name] = len(plan.tensors)
                nbytes = matrix_shape(place.shape)[0] * parts[0].row_bytes
                plan.tensors.append(OutputTensor(place.name, storage.name, place.shape, nbytes))
            plan.steps.append(Step(index, storage, parts, (index_of[place.name],), place.row, place.transform))
    if any(weight.role == "vision" for weight in source.weights):
        plan.notes.append("the vision tower is left out: a text GGUF has no place for it (an mmproj file would)")
    return plan


def _without_importance(
    plan: BuildPlan,
    file_type: FileType,
    types: dict[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    mtp: set[str],
) -> None:
    """Tensors of types that are noise without importance and have none: those of the MTP layer get a type that is not.

    Importance is measured without the MTP layer, by llama-imatrix as by us, so nobody could give what is missing.
    Embedding and head, on which a matrix has nothing as a rule, are left alone as by llama-quantize, unless nothing
    encodes their type without one.
    """
    needs = dict.fromkeys(types, file_type.needs_imatrix) | dict.fromkeys(TYPE_OPTIONS, UNMADE_WITHOUT_IMATRIX)
    covered = {found.tensor for found in plan.coverage}
    lacking = sorted(name for name in types.keys() - covered if types[name] in needs[name])
    given_way = [name for name in lacking if name in mtp]
    for name in given_way:
        types[name] = fit(STATIC, shapes[name][-1])
    if given_way:
        plan.notes.append(
            f"{plan.build}: {len(given_way)} tensors of the MTP layer, the first {given_way[0]}, are stored as "
            f"{types[given_way[0]]}: importance is measured without that layer, and fewer bits would need it"
        )
    plan.needs_imatrix = [name for name in lacking if name not in mtp]


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
    if not file_type.quantized and any(block_shape(kind)[0] > 1 for _, kind in recipe.tensor_types):
        plan.notes.append(
            f"{build}: quantized tensor types are for quantized file types, and are left out as by llama-quantize"
        )
    elif unused := recipe.unused(types):
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        plan.notes.append(f"{build}: no tensor has a name that {brief(unused[0])}{more} fits")
    served = {name for name, kind in types.items() if kind in USES_IMATRIX}
    if imatrix and file_type.quantized:
        full = sum(found.covered == found.matrices for found in plan.coverage)
        plan.notes.append(
            f"{build}: {imatrix.name} covers {len(plan.coverage)} of the {len(served)} tensors that importance can "
            f"serve, {full} of them in every expert; what it does not cover counts all columns alike"
        )
    if plan.needs_imatrix:
        plan.notes.append(f"{build}: {_lacks_importance(plan, types, imatrix)}")
    if other:
        name = min(other)
        plan.notes.append(
            f"{len(other)} tensors are not of the types that {plan.file_type} alone means, the first is {name} as "
            f"{types[name]}: a recipe, an importance matrix or another program decided them"
        )


def _lacks_importance(plan: BuildPlan, types: Mapping[str, str], imatrix: Imatrix | None) -> str:
    names = plan.needs_imatrix
    what = f"{len(names)} tensors, the first {names[0]} as {types[names[0]]}, are noise without an importance matrix"
    options = [f"{option} {STATIC}" for name, option in TYPE_OPTIONS.items() if name in names]
    if imatrix is None and not options:
        return f"{what}; give one with --imatrix, which 'ornith-moe imatrix SRC --text FILE' makes"
    kinds = dict.fromkeys(re.sub(r"^blk\.\d+\.", "", name) for name in names if name not in TYPE_OPTIONS)
    if kinds:
        options.append(f"--tensor-type '{'|'.join(map(re.escape, kinds))}={STATIC}' before any other")
    known = f"{imatrix.name} has nothing on them" if imatrix else "none is measured for embedding and head"
    return f"{what}, and {known}; give them another type with {' and '.join(options)}"
