"""The routed experts, forward and backward, as a sequence of launches.

    forward     x -> (FP8) -> gate_up: pre, a' -> [ down: a strip of rows -> combine: that strip of y ] ...
    backward    dy -> dswiglu: dpre, wa, dweights -> ddown = dy^T wa, dgate_up = dpre^T x
                     -> [ dx: a strip of rows -> combine: that strip of dx ] ...

Nothing of size T * top_k * H is written. x and dy are gathered while they are loaded, and what comes back from the
experts passes through one buffer of T * top_k rows and a strip of H, summed per token before the next strip.

Saved for backward: x, pre, and the plan; with the channel recipe also one scale per row. Everything else is computed
again, from the same roundings: a' in `dswiglu`, the FP8 x by a cast of T * H values.

Recipes (d is the dtype of x; * means dequantized to d):

| recipe | x, a' | weights forward | dgrad | wgrad |
|---|---|---|---|---|
| bf16 | d | d | d | d |
| fp8 | e4m3 1x128 | e4m3 128x128 | d by weights* | d by x*, a'* |
| fp8_full | e4m3 1x128 | e4m3 128x128 | e4m3 1x128 by e4m3 | as fp8; e4m3 if experts have many rows |
| fp8_channel | e4m3 per row | e4m3 per row | as fp8 | as fp8 |

A shared expert whose width is I rides along as one more group: `ornith_moe.routing.fold_shared`.

Legend: T tokens, E experts, H hidden, I expert intermediate, R slots.
"""

from dataclasses import dataclass

import torch

from ornith_moe.kernels.combine import combine, sum_slots
from ornith_moe.kernels.fp8_cast import quantize_fp8_tokens, roundtrip_fp8_tokens
from ornith_moe.kernels.grouped_gemm import FP8, GROUP, Weights, dswiglu, gate_up, project
from ornith_moe.kernels.grouped_wgrad import wgrad
from ornith_moe.kernels.launch import target
from ornith_moe.kernels.plan import RoutingPlan, build_plan
from ornith_moe.kernels.tiles import INVARIANT_ROWS, Tiles, tiles_for

RECIPES = ("bf16", "fp8", "fp8_full", "fp8_channel")
FP8_WGRAD_ROWS = 2048  # rows per expert from which fp8_full quantizes wgrad: below, writing the gradient dominates
_QUANTIZE = {"bf16": None, "fp8": "group", "fp8_full": "group", "fp8_channel": "row"}


@dataclass(frozen=True)
class Experts:
    """The weights of one pass: `Weights` of gate_up [E, 2I, H] and down [E, H, I], and for fp8_full those of dgrad,
    stored K-major: gate_up_t [E, H, 2I] and down_t [E, I, H]."""

    gate_up: Weights
    down: Weights
    gate_up_t: Weights | None = None
    down_t: Weights | None = None


@dataclass(frozen=True)
class Saved:
    """What backward needs. Of T tokens: x, T * H; pre, T * top_k * 2I; routing weights and the plan's index data."""

    x: torch.Tensor | None
    pre: torch.Tensor
    weights: torch.Tensor
    plan: RoutingPlan
    a_scale: torch.Tensor | None


def moe_forward(x, indices, weights, experts, *, recipe="bf16", save=False, ue8m0=False, first_expert=0,
                batch_invariant=False):  # fmt: skip
    """y = sum over k of weights[:, k] * down(silu(gate(x)) * up(x)) of the experts in `indices`.

    Args:
        x: [T, H] fp32, fp16 or BF16, rows contiguous. indices: [T, top_k] integers. weights: [T, top_k] fp32.
        experts: Experts, in d or in FP8 as the recipe says.
        save: give what `moe_backward` needs.
        ue8m0: scales of activations are powers of two, like those of the weights that were made for it.
        first_expert: ids below it and from first_expert + E on are another rank's: they are skipped.
        batch_invariant: choose tiles without looking at T.
    Returns:
        y [T, H] in d, Saved or None.
    """
    gate_up_w = experts.gate_up
    if recipe in ("fp8", "fp8_full") and experts.down.value.shape[2] % GROUP:
        raise ValueError(
            f"recipe: {recipe!r} needs an expert intermediate size in multiples of {GROUP}, or a block would hold rows"
            f" of gate and of up, got I = {experts.down.value.shape[2]}; use recipe='fp8_channel' or 'bf16'"
        )
    num_experts = gate_up_w.value.shape[0]
    tiles = pass_tiles(x, gate_up_w, indices.numel(), batch_invariant)
    plan = build_plan(indices, num_experts, tiles.block_m, first_expert=first_expert)
    group = None if recipe == "fp8_channel" else GROUP
    kind = "ue8m0" if ue8m0 else "fp32"
    xq, x_scale = (x, None) if recipe == "bf16" else quantize_fp8_tokens(x, group=group, scale=kind)
    a, a_scale, pre = gate_up(
        xq, x_scale, gate_up_w, plan, tiles["gate_up"], save=save, dtype=x.dtype, ue8m0=ue8m0,
        quantize="group" if _QUANTIZE[recipe] == "group" else None,
    )  # fmt: skip
    if recipe == "fp8_channel":  # one scale per row needs all its tiles
        a, a_scale = quantize_fp8_tokens(a, group=None, scale="fp32")
    y = torch.empty_like(x)
    _through_strips("down", a, a_scale, experts.down, plan, tiles["down"], weights, y)
    if not save:
        return y, None
    return y, Saved(x, pre, weights, plan, a_scale if recipe == "fp8_channel" else None)


def moe_backward(dy, saved, experts, *, recipe="bf16", wants=(True,) * 4, ue8m0=False, batch_invariant=False,
                 dgate_up=None, ddown=None, grad_dtypes=(None, None)):  # fmt: skip
    """Gradients of x, weights, gate_up and down; `wants` says which, and what nobody wants is not computed.

    Args:
        dy: [T, H] in d, rows contiguous.
        saved: what `moe_forward` gave. experts, recipe: as there.
        dgate_up, ddown: existing gradients [E, 2I, H] and [E, H, I], contiguous, fp32, fp16 or BF16, to add to.
        grad_dtypes: of new gradients of the two weights; d where None.
    Returns:
        dx [T, H] in d, dweights [T, top_k] fp32, dgate_up, ddown; None where not wanted.
    """
    wants_dx, wants_dweights, wants_dgate_up, wants_ddown = wants
    plan, x, full = saved.plan, saved.x, recipe == "fp8_full"
    slots, num_experts = plan.row_to_slot.numel(), experts.gate_up.value.shape[0]
    tiles = pass_tiles(dy, experts.gate_up, slots, batch_invariant)
    kind = "ue8m0" if ue8m0 else "fp32"
    dyq, dy_scale = quantize_fp8_tokens(dy, group=GROUP, scale=kind) if full else (dy, None)
    dpre, wa, partial, dpre_q, dpre_scale = dswiglu(
        dyq, dy_scale, experts.down_t if full else experts.down.transposed, saved.pre, saved.weights, plan,
        tiles["dswiglu"], save_wa=wants_ddown, quantize=_QUANTIZE[recipe], a_scale=saved.a_scale,
        dpre_fp8=full and wants_dx, ue8m0=ue8m0,
    )  # fmt: skip
    dweights = sum_slots(partial, plan) if wants_dweights else None
    fp8_wgrad = full and slots >= FP8_WGRAD_ROWS * num_experts
    if wants_ddown:
        ddown, accumulate = _gradient(experts.down, ddown, grad_dtypes[1] or dy.dtype)
        wgrad("ddown", dy, wa, plan, tiles["wgrad"], ddown, gather_g=True, accumulate=accumulate, fp8=fp8_wgrad)
    if wants_dgate_up:
        if recipe != "bf16" and not fp8_wgrad:
            x = roundtrip_fp8_tokens(x, group=None if recipe == "fp8_channel" else GROUP, scale=kind)
        dgate_up, accumulate = _gradient(experts.gate_up, dgate_up, grad_dtypes[0] or dy.dtype)
        wgrad("dgate_up", dpre, x, plan, tiles["wgrad"], dgate_up, gather_x=True, accumulate=accumulate, fp8=fp8_wgrad)
    dx = None
    if wants_dx:
        dx = torch.empty_like(dy)
        rows, scale, w = (dpre_q, dpre_scale, experts.gate_up_t) if full else (dpre, None, experts.gate_up.transposed)
        _through_strips("dx", rows, scale, w, plan, tiles["dx"], None, dx)
    return dx, dweights, dgate_up if wants_dgate_up else None, ddown if wants_ddown else None


def _through_strips(product, a, a_scale, w, plan, tile, weights, out):
    """out[t] = sum over the slots of t of (weights *) a[row] @ w^T, a strip of columns at a time."""
    hidden, rows = out.shape[1], a.shape[0]
    width = strip_width(hidden)
    buffer = out.new_empty(rows * width)
    for first in range(0, hidden, width):
        strip = out[:, first : first + width]
        partial = buffer[: rows * strip.shape[1]].view(rows, strip.shape[1])
        combine(project(product, a, a_scale, w, plan, tile, first, partial), plan, weights, strip)


def strip_width(hidden):
    """Columns of a strip: half of H, in whole groups. Narrower ones read the GEMM's input more often than they save."""
    return max(-(-hidden // 2 // GROUP), 1) * GROUP


def pass_tiles(x, w, slots, batch_invariant) -> Tiles:
    """The tiles of a pass over `slots` rows with rows like x and weights w; forward and backward may differ."""
    operands = "fp8" if w.value.dtype == FP8 else "fp32" if x.element_size() == 4 else "bf16"
    rows = INVARIANT_ROWS if batch_invariant else slots / w.value.shape[0]
    return tiles_for(target(x.device).arch, operands, rows)


def _gradient(w, existing, dtype):
    """(memory for a weight gradient, whether to add to it)."""
    if existing is not None:
        return existing, True
    return torch.empty(w.value.shape, dtype=dtype, device=w.value.device), False
