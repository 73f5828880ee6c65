"""nvfp4:fit=SIZE and nvfp4:bpw=BITS: modules in NVFP4, in FP8 or as in the source, so that the least is lost.

What the names mean is in target.py, how modules are chosen in quant/fitting/fit.py, from a sensitivity that has
W4A16_NVFP4 and FP8 (`ornith-moe sensitivity --types nvfp4`). What is fused has one algorithm: q, k, v; in_proj_qkv and
in_proj_z; gate and up; all experts of a layer. What may become of what is that of ModelOpt's recipes:

    routed experts            NVFP4 or FP8: where a layer's experts are not listed, vLLM takes what its shared expert is
    shared expert, MLP        NVFP4, FP8 or as in the source
    attention, DeltaNet       FP8 or as in the source
    head                      NVFP4 or as in the source
    any of them that the      NVFP4, with the codes of the source: nothing else is smaller or loses less
    source has in NVFP4

The config lists every module that is quantized, as `MIXED_PRECISION` does. FP8 casts activations too, which no error of
weights tells. Headers grow with what is chosen, so a choice that is too large by them is made again in less.

Source: vLLM's ModelOptMixedPrecisionConfig.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from ornith_moe.quant.builds.build import Alternative, Options, find_build, quiet, recognize, register_family
from ornith_moe.quant.builds.gguf import GgufBuild, plan_gguf
from ornith_moe.quant.builds.gguf_fit import PLAIN, check_shapes, sensitivity_for, weights_of
from ornith_moe.quant.builds.modelopt import MIXERS, MLP, SMALL, ModelOptBuild, held_in_nvfp4
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.nvfp4 import GROUP
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.builds.target import Fits, Target
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.fitting.fit import Fitted, Format, Problem
from ornith_moe.quant.fitting.loss import Loss
from ornith_moe.quant.fitting.sensitivity import TensorErrors
from ornith_moe.quant.fitting.types import MODELOPT
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.source import Source

NVFP4, FP8, KEPT = "W4A16_NVFP4", "FP8", "BF16"
TRIES = 8


def choices(weight: Weight) -> tuple[str, ...]:
    """What may become of it; none but to be kept: ()."""
    if not weight.is_linear:
        return ()
    if weight.role in MLP:
        return (NVFP4, FP8) if weight.expert is not None else (NVFP4, FP8, KEPT)
    if weight.role in MIXERS and weight.leaf not in SMALL:
        return FP8, KEPT
    return (NVFP4, KEPT) if weight.role == "head" else ()


class ModelOptFit(ModelOptBuild):
    """What a name asks for, of any source."""

    hears = frozenset({"sensitivity", "kv_cache"})
    lists = True

    def __init__(self, target: Target):
        super().__init__(target.name, NVFP4, MLP)
        self.target = target

    def decide(self, source: Source, options: Options) -> BuildPlan:
        case = _Case(self, source, options)
        for _ in range(TRIES):
            chosen = case.within(self.target)
            if chosen is None:
                smallest = self.target.at_least(case.problem.least(), case.weights, case.other)
                raise PlanError(f"{self}: no measured types make it that small; give at least {smallest.name}")
            plan = self.planned(source, options, case.wanted(chosen))
            size = sum(file.size for file in self.lay_out(source, plan, options).files)
            over = size - self.target.bytes(case.weights, 0)
            if self.target.kind == "bpw" or over <= 0:
                plan.notes.append(
                    f"{self}: {size:,} bytes; predicted KL {chosen.kl:.4g}, which no other algorithms within this size "
                    f"make lower by more than {max(chosen.gap, 0):.1e} of it"
                )
                return plan
            case.other += over
        raise AssertionError("headers grow by less each time")

    def as_stored(self, source: Source, found: StoredBuild) -> BuildPlan:
        return find_build(recognize(found)).as_stored(source, found)

    def recognize(self, found: StoredBuild) -> bool:
        return False  # what is made of it lists its modules

    def alternatives(
        self, source: Source, plan: BuildPlan, options: Options, progress: Callable[[str, int, int], None] = quiet
    ) -> list[Alternative]:
        """Fits of this and of neighbouring sizes, and nvfp4."""
        case = _Case(self, source, options)
        found = self.target.alternatives(case.within, case.other, progress)
        kl = case.problem.loss.kl(case.named)
        if kl is not None:
            found.append(Alternative("nvfp4", case.named_bytes + case.other, kl))
        return sorted(found, key=lambda each: each.nbytes)


class _Case:
    """A source and what was measured of it: tensors by their names in a GGUF, each with the weights that it holds."""

    def __init__(self, build: ModelOptFit, source: Source, options: Options):
        sensitivity = sensitivity_for(build, options)
        if not set(MODELOPT) <= set(sensitivity.types):
            raise PlanError(f"{build}: the sensitivity lacks NVFP4 or FP8; make one with --types nvfp4")
        model, named = source.architecture, plan_gguf(source, GgufBuild(PLAIN), Options())
        wanted = {tensor.name: tensor.shape for tensor in named.tensors if tensor.dtype != "F32"}
        check_shapes(sensitivity, wanted)
        self.holds: dict[str, list[int]] = {}
        for step in named.steps:
            name = named.tensors[step.tensors[0]].name
            if name in wanted and choices(source.weights[step.weight]) and step.weight not in options.kept:
                self.holds.setdefault(name, []).append(step.weight)
        held = held_in_nvfp4(source, options.nvfp4)
        untouched = [name for name, indices in self.holds.items() if held.issuperset(indices)]
        self.held = [index for name in untouched for index in self.holds.pop(name)]
        self.source, self.weights = source, weights_of(source)
        first = {name: source.weights[indices[0]] for name, indices in self.holds.items()}
        head = Loss(sensitivity, source.layers).head
        loss = Loss(sensitivity.only({*self.holds, head}), source.layers)
        fixed = {} if head in self.holds else {head: KEPT}
        form = Format(
            tuple(MODELOPT),
            self.nbytes,
            lambda name: model.fused_group(first[name]) if name in first else name,
            KEPT,
            lambda name, kind: kind in choices(first[name]),
        )
        self.problem = Problem(loss, fixed, True, form)
        plain = find_build("nvfp4")
        plan = plain.decide(source, replace(options, sensitivity=None, imatrix=None))
        self.named = {name: NVFP4 if weight.role in MLP else KEPT for name, weight in first.items()}
        by_name = loss.sensitivity.by_name
        self.named_bytes = sum(self.nbytes(by_name[name], kind) for name, kind in self.named.items())
        if head not in self.named:
            self.named_bytes += self.nbytes(by_name[head], KEPT)
        self.other = sum(file.size for file in plain.lay_out(source, plan, options).files) - self.named_bytes

    def within(self, target: Target) -> Fitted | None:
        return self.problem.within(target.bytes(self.weights, self.other))

    def wanted(self, chosen: Fitted) -> dict[int, str]:
        """{weight: algorithm} of those that are quantized."""
        pairs = ((index, chosen.types[name]) for name, indices in self.holds.items() for index in indices)
        return dict.fromkeys(self.held, NVFP4) | {index: kind for index, kind in pairs if kind != KEPT}

    def nbytes(self, tensor: TensorErrors, kind: str) -> int:
        values, matrices = math.prod(tensor.shape), len(self.holds.get(tensor.name, (0,)))
        if kind == NVFP4:
            return values // 2 + values // GROUP + 4 * matrices
        if kind == FP8:
            return values + 8 * matrices  # scales of weights and of activations
        indices = self.holds.get(tensor.name, ())
        return values * (ITEM_BYTES[self.source.dtype(indices[0])] if indices else 2)


register_family(Fits("nvfp4", ModelOptFit, ModelOptFit.hears))
