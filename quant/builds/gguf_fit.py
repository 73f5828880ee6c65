"""gguf:fit=SIZE and gguf:bpw=BITS: a GGUF whose types lose the least within a size, as a sensitivity predicts.

What the names mean is in target.py, what may be chosen in quant/fitting/fit.py, what is lost in loss.py beside it. A
user's --tensor-type, or --keep, decides its tensors before, and types that need importance are chosen with an
importance matrix only. The file says it is of the file type that most of its bytes are named after. Beside it lies its
recipe, with which that file type alone makes the same bytes, here and in llama-quantize.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ornith_moe.quant.builds.build import Alternative, Build, Options, find_build, quiet, recognize, register_family
from ornith_moe.quant.builds.gguf import GgufBuild, plan_gguf
from ornith_moe.quant.builds.layout import Layout
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.builds.target import Fits, Target
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
NAMED = (
    "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_M", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip


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
        weights = weights_of(source)
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

    def alternatives(
        self, source: Source, plan: BuildPlan, options: Options, progress: Callable[[str, int, int], None] = quiet
    ) -> list[Alternative]:
        """Fits of neighbouring sizes, and the named mixes whose types were all measured."""
        assert isinstance(plan.build, FittedGguf)
        problem, other = self._problem(source, options)
        found = [Alternative(self.name, plan.build.chosen.nbytes + other, plan.build.chosen.kl)]
        weights = weights_of(source)
        found += self.target.alternatives(
            lambda target: problem.within(target.bytes(weights, other)), other, progress, itself=False
        )
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
        sensitivity = sensitivity_for(self, options)
        plain = plan_gguf(source, GgufBuild(PLAIN), replace(options, asked=None, sensitivity=None))
        if options.imatrix:  # whose keys a file of Q8_0, which ignores importance, does not have
            plain.metadata = options.imatrix.metadata()
        found = {tensor.name: tensor for tensor in plain.tensors if tensor.dtype != "F32"}
        check_shapes(sensitivity, {name: tensor.shape for name, tensor in found.items()})
        asked = {name: "BF16" for name, tensor in found.items() if tensor.dtype == "BF16"}  # kept as it was
        for name, tensor in found.items():
            if options.asked and name not in asked and (kind := options.asked.type_of(name, True)):
                asked[name] = fit(kind, tensor.shape[-1])
        for name, kind in asked.items():
            if kind not in ("F32", "F16", "BF16", *sensitivity.by_name[name].errors):
                raise PlanError(
                    f"{self}: {name} is to be {kind}, which the sensitivity has not measured of it; make one with "
                    f"--types {kind} and the others that may be chosen"
                )
        problem = Problem(Loss(sensitivity, source.layers), asked, options.imatrix is not None)
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
        smallest = self.target.at_least(problem.least(), weights, other)
        return f"{self}: no measured types make it that small; give at least {smallest.name}"


def weights_of(source: Source) -> int:
    return sum(math.prod(weight.shape) for weight in source.weights if weight.role != "vision")


def sensitivity_for(build: Build, options: Options) -> Sensitivity:
    """What is given of types.

    Raises:
        PlanError: nothing, or what was measured with other importance.
    """
    if options.sensitivity is None:
        raise PlanError(
            f"{build}: needs a sensitivity, which 'ornith-moe sensitivity SRC' makes; give it with --sensitivity"
        )
    if options.sensitivity.imatrix != (options.imatrix.digest if options.imatrix else None):
        with_it = "with an importance matrix" if options.sensitivity.imatrix else "without an importance matrix"
        raise PlanError(
            f"{build}: its sensitivity was measured {with_it} that is not the one given here; give the same with "
            "--imatrix, or make it again"
        )
    return options.sensitivity


def check_shapes(sensitivity: Sensitivity, shapes: Mapping[str, tuple[int, ...]]) -> None:
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
        found.append(Target("gguf", "fit", nbytes, "B").name)
    if not found:
        least = min(plans, key=lambda plan: plan.tensor_bytes)
        raise PlanError(
            f"{nbytes / 1e9:.2f} GB for weights are less than {least.name} needs, {least.tensor_bytes / 1e9:.2f}; "
            "give a larger --for or a smaller --context"
        )
    return found


register_family(Fits("gguf", GgufFit, GgufFit.hears))
