"""gguf:fit=SIZE and gguf:bpw=BITS: a GGUF whose types lose the least within a size, as a sensitivity predicts.

    gguf:fit=16GB     all files together, headers and alignment too, have at most 16e9 bytes; GiB is 2^30
    gguf:bpw=4.5      tensors have at most 4.5 bits for each weight

What may be chosen is in quant/fitting/fit.py, what is lost in loss.py beside it. A user's --tensor-type, or --keep,
decides its tensors before, and types that need importance are chosen with an importance matrix only. The file says it
is of the file type that most of its bytes are named after. Beside it lies its recipe, with which that file type alone
makes the same bytes, here and in llama-quantize.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ornith_moe.quant.builds.build import Alternative, Build, Options, find_build, recognize, register_family
from ornith_moe.quant.builds.gguf import GgufBuild, plan_gguf
from ornith_moe.quant.builds.layout import Layout
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.fitting.fit import Fitted, Problem
from ornith_moe.quant.fitting.loss import Loss
from ornith_moe.quant.fitting.recipe import recipe
from ornith_moe.quant.fitting.sensitivity import Sensitivity
from ornith_moe.quant.gguf.header import padded
from ornith_moe.quant.gguf.mixtures import FILE_TYPES, FileType, fit
from ornith_moe.quant.gguf.tensor_types import AskedTypes
from ornith_moe.quant.source.architectures.weight import Place
from ornith_moe.quant.source.source import Source

PLAIN = FILE_TYPES["Q8_0"]  # quantizes whatever one may
NEIGHBOURS = (0.7, 0.8, 0.9, 1.1, 1.25)  # sizes beside the one that is asked for
NAMED = (
    "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_M", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Target:
    """What a name asks for: so many bytes of files (`fit`), or bits of a weight (`bpw`)."""

    kind: str
    value: float
    unit: str = ""  # of bytes

    @property
    def number(self) -> str:
        return f"{self.value:.9f}".rstrip("0").rstrip(".")

    @property
    def name(self) -> str:
        return f"gguf:{self.kind}={self.number}{self.unit}"

    @property
    def label(self) -> str:
        """In the name of a file."""
        return f"{self.number}{self.unit or 'bpw'}"

    def bytes(self, weights: int, other: int) -> int:
        """Of the tensors that are chosen, where there are `weights` and all else takes `other` bytes."""
        if self.kind == "bpw":
            return math.floor(self.value * weights / 8)
        return math.floor(self.value * UNITS[self.unit.upper().removesuffix("B")]) - other

    def times(self, share: float) -> Target:
        """Three digits of so much of it."""
        return replace(self, value=float(f"{share * self.value:.3g}"))


class FittedGguf(GgufBuild):
    """A GGUF with types that are given: those of a file type, but for what is chosen."""

    hears = frozenset({"split", "sensitivity"})

    def __init__(self, target: Target, kind: FileType, chosen: Fitted):
        super().__init__(kind)
        self.name, self.target, self.chosen = target.name, target, chosen

    def retype(self, source: Source, places: Sequence[Sequence[Place]], types: dict[str, str], plan: BuildPlan) -> None:
        types |= self.chosen.types
        plan.fallbacks = []

    def recognize(self, found: StoredBuild) -> bool:
        return False

    def file(self, source: Source) -> str:
        return f"{source.name}-{self.target.label}.gguf"

    def names(self, staging: Path, final: Path, layout: Layout) -> list[tuple[Path, Path]]:
        recipe_file = _recipe_name(layout)
        return [(staging / recipe_file, final.with_name(recipe_file)), *super().names(staging, final, layout)]

    def side_files(self, source: Source, plan: BuildPlan, layout: Layout) -> dict[str, bytes]:
        size = sum(file.size for file in layout.files)
        notes = {
            "source": source.name,
            "made_as": self,
            "bytes": size,
            "predicted_KL": f"{self.chosen.kl:.5g}",
            "base": self.kind.name,
            "importance": plan.metadata.get("quantize.imatrix.file", "none"),
        }
        return {_recipe_name(layout): recipe(self.chosen.types, notes).encode()}


class GgufFit(GgufBuild):
    """What a name asks for, of any source."""

    hears = frozenset({"split", "sensitivity"})

    def __init__(self, target: Target):
        super().__init__(PLAIN)
        self.name, self.target = target.name, target

    def decide(self, source: Source, options: Options) -> BuildPlan:
        problem, other = self._problem(source, options)
        weights = _weights(source)
        limit = self.target.bytes(weights, other)
        chosen = problem.within(limit)
        if chosen is None:
            raise PlanError(self._too_small(problem, other, weights))
        plan = self._planned(source, options, chosen)
        size = self._size(source, plan, options) if source.HAS_BYTES else plan.tensor_bytes
        what = "bytes" if source.HAS_BYTES else "bytes, and a header that a config alone does not tell"
        plan.notes.append(
            f"{self}: {size:,} {what}; predicted KL {chosen.kl:.4g}, which no other types within this size "
            f"make lower by more than {max(chosen.gap, 0):.1e} of it"
        )
        return plan

    def as_stored(self, source: Source, found: StoredBuild) -> BuildPlan:
        return find_build(recognize(found)).as_stored(source, found)

    def lay_out(self, source: Source, plan: BuildPlan, options: Options) -> Layout:
        assert isinstance(plan.build, FittedGguf)  # as `decide` made it
        return plan.build.lay_out(source, plan, options)

    def side_files(self, source: Source, plan: BuildPlan, layout: Layout) -> dict[str, bytes]:
        return plan.build.side_files(source, plan, layout)

    def recognize(self, found: StoredBuild) -> bool:
        return False  # what is made of it says it is of a file type

    def alternatives(self, source: Source, plan: BuildPlan, options: Options) -> list[Alternative]:
        """Fits of neighbouring sizes, and the named mixes whose types were all measured."""
        assert isinstance(plan.build, FittedGguf)
        problem, other = self._problem(source, options)
        found = [Alternative(self.name, plan.build.chosen.nbytes + other, plan.build.chosen.kl)]
        for share in NEIGHBOURS:
            target = self.target.times(share)
            chosen = problem.within(target.bytes(_weights(source), other))
            if chosen:
                found.append(Alternative(target.name, chosen.nbytes + other, chosen.kl))
        for name in NAMED:
            named = plan_gguf(source, GgufBuild(FILE_TYPES[name]), replace(options, asked=None))
            kl = problem.loss.kl(named.types)
            if kl is not None and not named.needs_imatrix:
                sizes = {tensor.name: padded(tensor.nbytes) for tensor in named.tensors}
                nbytes = sum(sizes[name] for names in problem.groups for name in names)
                found.append(Alternative(f"gguf:{name}", nbytes + other, kl))
        return sorted(found, key=lambda each: each.nbytes)

    def _problem(self, source: Source, options: Options) -> tuple[Problem, int]:
        """What may be chosen, and the bytes of a GGUF that holds nothing of it."""
        if options.sensitivity is None:
            raise PlanError(
                f"{self}: needs a sensitivity, which 'ornith-moe sensitivity SRC' makes; give it with --sensitivity"
            )
        if options.sensitivity.imatrix != (options.imatrix.digest if options.imatrix else None):
            with_it = "with an importance matrix" if options.sensitivity.imatrix else "without an importance matrix"
            raise PlanError(
                f"{self}: its sensitivity was measured {with_it} that is not the one given here; give the same with "
                "--imatrix, or make it again"
            )
        plain = plan_gguf(source, GgufBuild(PLAIN), replace(options, asked=None, sensitivity=None))
        if options.imatrix:  # whose keys a file of Q8_0, which ignores importance, does not have
            plain.metadata = options.imatrix.metadata()
        found = {tensor.name: tensor for tensor in plain.tensors if tensor.dtype != "F32"}
        _check(options.sensitivity, {name: tensor.shape for name, tensor in found.items()})
        asked = {name: "BF16" for name, tensor in found.items() if tensor.dtype == "BF16"}  # kept as it was
        for name, tensor in found.items():
            if options.asked and name not in asked and (kind := options.asked.type_of(name, True)):
                asked[name] = fit(kind, tensor.shape[-1])
        for name, kind in asked.items():
            if kind not in ("F32", "F16", "BF16", *options.sensitivity.by_name[name].errors):
                raise PlanError(
                    f"{self}: {name} is to be {kind}, which the sensitivity has not measured of it; make one with "
                    f"--types {kind} and the others that may be chosen"
                )
        problem = Problem(Loss(options.sensitivity, source.layers), asked, options.imatrix is not None)
        chosen = sum(padded(tensor.nbytes) for tensor in found.values())
        if source.HAS_BYTES:
            return problem, self._size(source, plain, options) - chosen
        return problem, sum(padded(tensor.nbytes) for tensor in plain.tensors) - chosen

    def _size(self, source: Source, plan: BuildPlan, options: Options) -> int:
        build = plan.build
        assert isinstance(build, GgufBuild)
        return sum(file.size for file in build.header(source, plan, options).files)

    def _planned(self, source: Source, options: Options, chosen: Fitted) -> BuildPlan:
        return plan_gguf(
            source,
            FittedGguf(self.target, _named_after(chosen.types), chosen),
            replace(options, asked=AskedTypes()),
        )

    def _too_small(self, problem: Problem, other: int, weights: int) -> str:
        least = problem.least()
        bits, size = math.ceil(800 * least / weights) / 100, math.ceil((least + other) / 1e6)
        smallest = Target("bpw", bits) if self.target.kind == "bpw" else Target("fit", size, "MB")
        return f"{self}: no measured types make it that small; give at least {smallest.name}"


def _weights(source: Source) -> int:
    return sum(math.prod(weight.shape) for weight in source.weights if weight.role != "vision")


def _check(sensitivity: Sensitivity, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The sensitivity is of this model."""
    known = {tensor.name: tensor.shape for tensor in sensitivity.tensors}
    if known == shapes:
        return
    name = min(name for name in known.keys() | shapes.keys() if known.get(name) != shapes.get(name))
    here, there = (list(of[name]) if name in of else "nothing" for of in (shapes, known))
    raise PlanError(
        f"the sensitivity is of {brief(sensitivity.source)}, where {name} is {there} and here {here}; make one "
        "of this source, with the same --mtp"
    )


def _named_after(types: Mapping[str, str]) -> FileType:
    """The file type whose type most tensors have."""
    for kind, _ in Counter(types.values()).most_common():
        if found := next((each for each in FILE_TYPES.values() if each.base == kind and each.quantized), None):
            return found
    return PLAIN


def _recipe_name(layout: Layout) -> str:
    return f"{layout.files[0].name}.recipe"


def builds_within(source: Source, nbytes: int, options: Options) -> list[str]:
    """Builds whose tensors have at most `nbytes`: the largest named mix, and a fit where there is a sensitivity.

    Raises:
        PlanError: none is that small.
    """
    plans = []
    for name in NAMED:
        try:
            plans.append(GgufBuild(FILE_TYPES[name]).plan(source, replace(options, asked=None, sensitivity=None)))
        except PlanError:
            continue
    fitting = [plan for plan in plans if plan.tensor_bytes <= nbytes and not plan.needs_imatrix]
    found = [max(fitting, key=lambda plan: plan.tensor_bytes).name] if fitting else []
    if options.sensitivity:
        found.append(Target("fit", nbytes, "B").name)
    if not found:
        least = min(plans, key=lambda plan: plan.tensor_bytes)
        raise PlanError(
            f"{nbytes / 1e9:.2f} GB for weights are less than {least.name} needs, {least.tensor_bytes / 1e9:.2f}; "
            "give a larger --for or a smaller --context"
        )
    return found


class GgufFits:
    """The names of these builds."""

    form = "gguf:fit=SIZE, gguf:bpw=BITS"
    hears = GgufFit.hears

    def build(self, name: str) -> Build | None:
        found = re.fullmatch(r"\s*gguf:(fit|bpw)=(.*)", name, re.IGNORECASE)
        if not found:
            return None
        kind, text = found[1].lower(), found[2].strip()
        value = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([KMGT]?I?B?)", text, re.IGNORECASE)
        sound = value and float(value[1]) > 0 and (value[2] == "" or kind == "fit")
        if not value or not sound:
            example = "gguf:fit=16GB" if kind == "fit" else "gguf:bpw=4.5"
            raise PlanError(f"build {brief(name)}: expected a number as in {example}, got {brief(text)}")
        prefix = re.sub("[kmgt]", lambda letter: letter[0].upper(), value[2].lower().removesuffix("b"))
        return GgufFit(Target(kind, float(value[1]), f"{prefix}B" if kind == "fit" else ""))


register_family(GgufFits())
