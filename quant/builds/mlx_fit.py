"""mlx:fit=SIZE and mlx:bpw=BITS: a folder for MLX whose bits per tensor lose the least within a size.

What the names mean is in target.py, how bits are chosen in quant/fitting/fit.py, from a sensitivity whose types are
MLX2 to MLX8 (`ornith-moe sensitivity --types mlx`). Experts of a layer are one tensor for each projection. The config
has the bits of most tensors at its top and those of every other path below, as mlx_lm.convert writes what a predicate
says and its loader reads; so a folder is its own recipe. Routers and gates of shared experts keep their 8 bits, and so
has what a sensitivity, which knows the tensors of a GGUF, does not tell.

Headers of files are counted as with 8 bits, which makes none smaller.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from ornith_moe.quant.builds.build import Alternative, Options, find_build, quiet, recognize, register_family
from ornith_moe.quant.builds.gguf import GgufBuild, plan_gguf
from ornith_moe.quant.builds.gguf_fit import PLAIN, check_shapes, sensitivity_for
from ornith_moe.quant.builds.mlx import MlxBuild
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.mlx import GROUP
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.builds.target import Fits, Target
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.fitting.fit import Fitted, Format, Problem
from ornith_moe.quant.fitting.loss import Loss
from ornith_moe.quant.fitting.sensitivity import TensorErrors
from ornith_moe.quant.fitting.types import MLX
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.source import Source

MOST = 8  # bits


class MlxFit(MlxBuild):
    """What a name asks for, of any source."""

    hears = frozenset({"sensitivity"})

    def __init__(self, target: Target):
        super().__init__(MOST)
        self.name, self.target = target.name, target

    def decide(self, source: Source, options: Options) -> BuildPlan:
        case = _Case(self, source, options)
        chosen = case.within(self.target)
        if chosen is None:
            smallest = self.target.at_least(case.problem.least(), case.weights, case.other)
            raise PlanError(f"{self}: no measured types make it that small; give at least {smallest.name}")
        bits = {case.paths[name]: kind.removeprefix("MLX") for name, kind in chosen.types.items()}
        common = Counter(bits.values()).most_common(1)[0][0]
        stored = dict.fromkeys(case.others, str(MOST)) | bits
        plan = MlxBuild(int(common)).decide(source, replace(options, stored=stored))
        plan.build = self
        size = sum(file.size for file in self.lay_out(source, plan, options).files)
        plan.notes.append(
            f"{self}: {size:,} bytes; predicted KL {chosen.kl:.4g}, which no other bits within this size make lower by "
            f"more than {max(chosen.gap, 0):.1e} of it"
        )
        return plan

    def as_stored(self, source: Source, found: StoredBuild) -> BuildPlan:
        return find_build(recognize(found)).as_stored(source, found)

    def recognize(self, found: StoredBuild) -> bool:
        return False  # what is made of it says its bits

    def alternatives(
        self, source: Source, plan: BuildPlan, options: Options, progress: Callable[[str, int, int], None] = quiet
    ) -> list[Alternative]:
        """Fits of this and of neighbouring sizes, and every number of bits in all tensors."""
        case = _Case(self, source, options)
        found = self.target.alternatives(case.within, case.other, progress)
        for kind in MLX:
            kl = case.problem.loss.kl(dict.fromkeys(case.paths, kind))
            if kl is not None:
                sizes = (case.nbytes(tensor, kind) for tensor in case.problem.loss.sensitivity.tensors)
                found.append(Alternative(f"mlx:{kind.removeprefix('MLX')}", sum(sizes) + case.other, kl))
        return sorted(found, key=lambda each: each.nbytes)


class _Case:
    """A source and what was measured of it: tensors by their names in a GGUF, whose `paths` MLX knows."""

    def __init__(self, build: MlxFit, source: Source, options: Options):
        sensitivity = sensitivity_for(build, options)
        plan = MlxBuild(MOST).decide(source, replace(options, stored={}))
        if not any(kind in MLX for kind in sensitivity.types):
            raise PlanError(f"{build}: the sensitivity has no types of MLX; make one with --types mlx")
        named = plan_gguf(source, GgufBuild(PLAIN), replace(options, asked=None, imatrix=None, sensitivity=None))
        wanted = {tensor.name: tensor.shape for tensor in named.tensors if tensor.dtype != "F32"}
        check_shapes(sensitivity, wanted)
        quantized = {step.weight: plan.tensors[step.tensors[0]].name for step in plan.steps if len(step.parts) > 1}
        gates = {path for path in plan.config if isinstance(plan.config[path], dict)}
        every = {name.removesuffix(".weight") for name in quantized.values()} - gates
        self.dtype = next((step.parts[1].dtype for step in plan.steps if len(step.parts) > 1), "BF16")
        self.paths: dict[str, str] = {}
        for step in named.steps:
            name = named.tensors[step.tensors[0]].name
            path = quantized.get(step.weight, "").removesuffix(".weight")
            if name in wanted and path in every:
                self.paths[name] = path
        self.others = every - set(self.paths.values())
        self.weights = sum(math.prod(source.weights[step.weight].shape) for step in plan.steps)
        tensors = tuple(tensor for tensor in sensitivity.tensors if tensor.name in self.paths)
        loss = Loss(sensitivity.only(self.paths), source.layers)
        self.problem = Problem(loss, {}, True, Format(tuple(MLX), self.nbytes))
        most = sum(self.nbytes(tensor, f"MLX{MOST}") for tensor in tensors)
        self.other = sum(file.size for file in build.lay_out(source, plan, options).files) - most

    def within(self, target: Target) -> Fitted | None:
        return self.problem.within(target.bytes(self.weights, self.other))

    def nbytes(self, tensor: TensorErrors, kind: str) -> int:
        values = math.prod(tensor.shape)
        return values * int(kind.removeprefix("MLX")) // 8 + 2 * values // GROUP * ITEM_BYTES[self.dtype]


register_family(Fits("mlx", MlxFit, MlxFit.hears))
