"""gguf:TYPE: a text GGUF of a file type of llama.cpp; the type of each tensor, and the rows that each weight fills.

Experts are stacked, and the vision tower is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial

from gguf import GGUFValueType

from ornith_moe.quant.builds.build import Options, register
from ornith_moe.quant.builds.gguf_file import GgufFile
from ornith_moe.quant.builds.layout import Layout, gguf_cuts, gguf_layout
from ornith_moe.quant.builds.plan import BuildPlan, OutputTensor, Step
from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.storages.nvfp4 import NVFP4Blocks
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.gguf.header import Entry
from ornith_moe.quant.gguf.imatrix import USES_IMATRIX, Imatrix
from ornith_moe.quant.gguf.metadata import MMPROJ, gguf_metadata
from ornith_moe.quant.gguf.mixtures import FILE_TYPES, UNMADE_WITHOUT_IMATRIX, FileType, fit, tensor_types
from ornith_moe.quant.gguf.tensor_types import EMBEDDING, HEAD, AskedTypes
from ornith_moe.quant.gguf.tokenizer import tokenizer_entries
from ornith_moe.quant.source.accounts import LeftOut
from ornith_moe.quant.source.architectures.weight import Place
from ornith_moe.quant.source.source import Source
from ornith_moe.quant.source.tokenizer_files import read_tokenizer

VISION = "the vision tower has no place in a text GGUF"
IN_MMPROJ = "gguf:mmproj makes the file beside it that holds one"
TYPE_OPTIONS = {EMBEDDING: "--token-embedding-type", HEAD: "--output-tensor-type"}
STATIC = "Q4_K"  # of the MTP layer in files of fewer bits: the least that needs no importance and keeps its drafts good


_VALUE_TYPES = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32}
NAMED = 3  # tensors that a pattern names one by one; of more it names the kinds


class GgufBuild(GgufFile):
    """A text GGUF of one of llama.cpp's file types."""

    hears = frozenset({"split"})
    storages = (NVFP4Blocks, Gguf)

    def __init__(self, kind: FileType):
        self.name, self.kind = f"gguf:{kind.name}", kind

    @property
    def is_written(self) -> bool:
        from ornith_moe.quant.codecs.gguf import ENCODERS  # not at import: planning needs no numba

        return {self.kind.base, self.kind.head} <= ENCODERS.keys()

    def decide(self, source: Source, options: Options) -> BuildPlan:
        return plan_gguf(source, self, options)

    def as_stored(self, source: Source, found: StoredBuild) -> BuildPlan:
        plain = self.plan(source, Options())
        plan = self.plan(source, Options(stored={name: tensor.dtype for name, tensor in found.tensors.items()}))
        plan.notes = [note for note in plan.notes if note not in plain.notes]
        return plan

    def retype(self, source: Source, places: Sequence[Sequence[Place]], types: dict[str, str], plan: BuildPlan) -> None:
        """Types that no mixture of llama-quantize decides."""

    def storage(self, type_name: str, place: Place) -> Storage | None:
        """How what is of a type is stored at a place; None: as the type says."""
        return None

    def lay_out(self, source: Source, plan: BuildPlan, options: Options) -> Layout:
        _check_encoders(plan)
        return self.header(source, plan, options)

    def header(self, source: Source, plan: BuildPlan, options: Options) -> Layout:
        """The layout, whether there are encoders or not: what a size is known from."""
        entries, notes = options.once("tokenizer of GGUF", lambda: _tokenizer(source, options.tokenizer_pre))
        card = self.card(source, options)
        metadata = gguf_metadata(
            source.config,
            source.folder,
            name=source.name,
            file_type=self.kind.id,
            mtp_layers=source.architecture.mtp_layers if source.has_mtp else 0,
            shapes={tensor.name: tensor.shape for tensor in plan.tensors},
            tokenizer=entries,
            card=card.values,
        ) + [Entry(key, value, _VALUE_TYPES[type(value)]) for key, value in plan.metadata.items()]
        return gguf_layout(plan, self.file(source), metadata, notes + card.notes, options.split)

    def files(self, plan: BuildPlan, options: Options) -> int:
        return len(gguf_cuts(plan, options.split))

    def recognize(self, found: StoredBuild) -> bool:
        return self.is_of_type(found, self.kind) and found.metadata.get("general.type") != MMPROJ

    def left_out(self, source: Source) -> list[LeftOut]:
        tower = [source.tensor_of(index) for index, weight in enumerate(source.weights) if weight.role == "vision"]
        return [LeftOut(_without_tower(source), tuple(tower))] if tower else []

    def instead(self, source: Source) -> str:
        places = (place for weight in source.weights for place in source.architecture.gguf_places(weight))
        shapes = [place.shape for place in places if len(place.shape) > 1]
        fitting = sum(math.prod(shape) for shape in shapes if shape[-1] % block_shape("Q8_0")[0] == 0)
        if 2 * fitting > sum(map(math.prod, shapes)):
            return "gguf:Q4_0, gguf:Q5_0 and gguf:Q8_0 have blocks of 32, which fit its rows"
        return "no quantized type of a GGUF fits its rows, fp8-channel does"

    def remedy(self, problem: str, source: Source, plan: BuildPlan, steps: Sequence[Step]) -> str:
        """A type for these tensors that holds their weights; none helps where what is stored is a function of them."""
        if not all(step.transform.exact for step in steps):
            return super().remedy(problem, source, plan, steps)
        kind = "F32" if any(source.dtype(step.weight) == "F32" for step in steps) else "BF16"
        names = list(dict.fromkeys(plan.tensors[step.tensors[0]].name for step in steps))
        return (
            f"{problem}, {len(names)} of its tensors being so; make it alone, with --to {self.name} --tensor-type "
            f"'{_pattern(names)}={kind}'"
        )

    def file(self, source: Source) -> str:
        return f"{source.name}-{self.kind.name}.gguf"


def plan_gguf(source: Source, build: GgufBuild, options: Options) -> BuildPlan:
    """Plan a GGUF of a file type."""
    plan, model, file_type = BuildPlan(build), source.architecture, build.kind
    asked, imatrix, stored, kept = options.asked or AskedTypes(), options.imatrix, options.stored, options.kept
    places = [model.gguf_places(weight) for weight in source.weights]
    shapes = {place.name: place.shape for each in places for place in each}
    types, plan.fallbacks = tensor_types(
        shapes.items(),
        file_type,
        layers=source.layers,
        experts=model.experts,
        gqa=model.heads // model.kv_heads,
        imatrix=imatrix is not None,
        asked=asked,
    )
    build.retype(source, places, types, plan)
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
    _note(plan, build, asked, imatrix, types, other)

    for name, values in model.gguf_constants().items():
        plan.tensors.append(OutputTensor(name, "F32", (len(values),), 4 * len(values), tuple(values)))
    storages = {name: Gguf(name) for name in set(types.values())}
    covered = {found.tensor for found in plan.coverage}
    for index, weight in enumerate(source.weights):
        for place in places[index]:
            storage = build.storage(types[place.name], place) or storages[types[place.name]]
            if imatrix and place.name in covered:
                row = partial(imatrix.importance, place.name, weight.expert or 0, weight.shape[-1])
                storage = Gguf(storage.name, row)
            plan.add(source, index, storage, place, model.scale_group(weight))
    if any(weight.role == "vision" for weight in source.weights):
        plan.notes.append(_without_tower(source))
    return plan


def _without_tower(source: Source) -> str:
    return f"{VISION}; {IN_MMPROJ}" if source.architecture.HAS_MMPROJ else VISION


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
    build: GgufBuild,
    asked: AskedTypes,
    imatrix: Imatrix | None,
    types: Mapping[str, str],
    other: set[str],
) -> None:
    """What a user should know of the types of a GGUF."""
    file_type = build.kind
    if not file_type.quantized and any(block_shape(kind)[0] > 1 for _, kind in asked.tensor_types):
        plan.notes.append(
            f"{build}: quantized tensor types are for quantized file types, and are left out as by llama-quantize"
        )
    elif unused := asked.unused(types):
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
            f"{len(other)} tensors are not of the types that {file_type.name} alone means, the first is {name} as "
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


def _check_encoders(plan: BuildPlan) -> None:
    from ornith_moe.quant.codecs.gguf import ENCODERS

    lacking = sorted({step.storage.name for step in plan.steps} - ENCODERS.keys())
    if lacking:
        raise PlanError(
            f"{plan.build}: needs {', '.join(lacking)}, which this version can plan but not encode yet; "
            f"it encodes {', '.join(ENCODERS)}"
        )
    if plan.needs_imatrix:
        raise PlanError(next(note for note in plan.notes if "noise without an importance matrix" in note))


def _tokenizer(source: Source, pre: str | None) -> tuple[list[Entry], tuple[str, ...]]:
    """Keys of the tokenizer, the same for every GGUF, and what is to be said of it."""
    model = source.architecture
    files = read_tokenizer(source.folder, model.vocabulary)
    entries = tokenizer_entries(files, source.config, model.vocabulary, pre=pre, fallback=model.BYTE_FALLBACK)
    return entries, files.notes


def _pattern(names: list[str]) -> str:
    """A regular expression for these tensors, or for all of their kinds where they are many."""
    if len(names) > NAMED:
        kinds = dict.fromkeys(re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight") for name in names)
        return rf"(^|\.)({'|'.join(map(re.escape, kinds))})\.weight$"
    return f"^({'|'.join(map(re.escape, names))})$" if len(names) > 1 else f"^{re.escape(names[0])}$"


register(*map(GgufBuild, FILE_TYPES.values()))
