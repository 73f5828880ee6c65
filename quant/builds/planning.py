"""The builds of a checkpoint: for every weight, which storage it gets, under which name, in which tensor.

    fp8-channel   compressed-tensors float-quantized, the layout of the official Ornith-1.0 FP8 builds
    fp8-block     128x128 blocks and `weight_scale_inv`, the layout of the official Qwen3.5 FP8 builds
    bf16          the checkpoint in BF16 with experts one by one
    gguf:TYPE     a text GGUF of a file type of llama.cpp

Safetensors builds name experts one by one and keep the vision tower as it is (safetensors_builds.py); a text GGUF
stacks experts and leaves the vision tower out (gguf_builds.py). A build most of whose weights could not get the storage
it is named after says so before anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.builds.gguf import plan_gguf
from ornith_moe.quant.builds.names import SAFETENSORS_BUILDS, build_name
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.safetensors import plan_safetensors
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.gguf.imatrix import Imatrix
from ornith_moe.quant.gguf.tensor_types import Recipe
from ornith_moe.quant.source.weights import Source


@budgeted
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
        build: one of names.BUILDS, in any case.
        recipe: types that the user asks for in a GGUF.
        imatrix: importance of the columns of a GGUF's tensors.
        kept: {index of a weight: what is wrong with its values}; it stays BF16 (F32 where it would be), with all that
            its build stores or fuses with it.
        stored: {tensor: GGUF type} of a build that exists; goes before what would be decided here.
    Raises:
        PlanError: an unknown build, or one this model cannot have; an importance matrix of another model.
    """
    build, kept = build_name(build), kept or {}
    if build in SAFETENSORS_BUILDS:
        plan = plan_safetensors(source, build, kept)
    else:
        plan = plan_gguf(source, build, recipe or Recipe(), imatrix, kept, stored or {})
    if not stored:
        _tell_what_is_lost(plan, source)
    plan.kept = frozenset(kept)
    held = {plan.tensors[step.tensors[0]].name: step.weight for step in plan.steps if step.weight in kept}
    plan.non_finite = list(held)
    types = {tensor.name: tensor.dtype for tensor in plan.tensors} if held else {}
    plan.fallbacks += [
        Fallback(
            source.weights[index].name,
            "holds a NaN or an infinity, so its tensor is stored unquantized",
            f"{kept[index]}; tensor {tensor} is stored as {types[tensor]}",
        )
        for tensor, index in held.items()
    ]
    return plan


def _tell_what_is_lost(plan: BuildPlan, source: Source) -> None:
    """The warning of a plan most of whose weights fell back: how many bits it takes, and which build is smaller."""
    if not plan.fallbacks:
        return
    fell = {fallback.tensor for fallback in plan.fallbacks}
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in plan.tensors if tensor.name in fell or tensor.quantized}
    fallen = sum(sizes[name] for name in fell)
    if 2 * fallen <= sum(sizes.values()):
        return
    bits = 8 * plan.tensor_bytes / sum(math.prod(source.weights[step.weight].shape) for step in plan.steps)
    plan.warning = (
        f"{plan.build}: is hardly one: {fallen / sum(sizes.values()):.0%} of the weights that it should quantize do "
        f"not fit its blocks, and it takes {bits:.2f} bits per weight; {_smaller(plan, source)}"
    )


def _smaller(plan: BuildPlan, source: Source) -> str:
    """What to ask for instead of a build whose blocks do not fit the rows."""
    if plan.build == "fp8-block":
        return "fp8-channel needs no whole blocks"
    places = (place for weight in source.weights for place in source.architecture.gguf_places(weight))
    shapes = [place.shape for place in places if len(place.shape) > 1]
    fitting = sum(math.prod(shape) for shape in shapes if shape[-1] % block_shape("Q8_0")[0] == 0)
    if 2 * fitting > sum(map(math.prod, shapes)):
        return "gguf:Q4_0, gguf:Q5_0 and gguf:Q8_0 have blocks of 32, which fit its rows"
    return "no quantized type of a GGUF fits its rows, fp8-channel does"
