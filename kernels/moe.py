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

from __future__ import annotations

from dataclasses import dataclass

import torch

from ornith_moe.kernels.combine import combine, sum_slots
from ornith_moe.kernels.dswiglu import dswiglu
from ornith_moe.kernels.fp8_cast import quantize_fp8_tokens, roundtrip_fp8_tokens
from ornith_moe.kernels.gate_up import gate_up
from ornith_moe.kernels.grouped_wgrad import wgrad
from ornith_moe.kernels.launch import target
from ornith_moe.kernels.mainloop import FP8
from ornith_moe.kernels.plan import RoutingPlan, build_plan
from ornith_moe.kernels.project import project
from ornith_moe.kernels.tiles import INVARIANT_ROWS, Tile, Tiles, tiles_for
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import FP8_BLOCK, Recipe, recipe_of

FP8_WGRAD_ROWS = 2048  # rows per expert from which fp8_full quantizes wgrad: below, writing the gradient dominates
_BF16 = recipe_of("bf16")


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Saved:
    """What backward needs. Of T tokens: x, T * H; pre, T * top_k * 2I; routing weights and the plan's index data."""

    x: torch.Tensor | None
    pre: torch.Tensor
    weights: torch.Tensor
    plan: RoutingPlan
    a_scale: torch.Tensor | None


def moe_forward(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up_proj: Operand, down_proj: Operand, *,
    recipe: Recipe = _BF16, save: bool = False, tiles: Tiles | None = None,
) -> tuple[torch.Tensor, Saved | None]:  # fmt: skip
    """y = sum over k of weights[:, k] * down(silu(gate(x)) * up(x)) of the experts in `indices`.

    Args:
        x: [T, H] fp32, fp16 or BF16, rows contiguous. indices: [T, top_k] integers; those outside [0, E) are skipped.
        weights: [T, top_k] fp32.
        gate_up_proj, down_proj: [E, 2I, H] and [E, H, I], in d or in FP8 as the recipe says; what their scales are,
            UE8M0 or not, those of the activations are.
        save: give what `moe_backward` needs.
        tiles: those of `pass_tiles` where None.
    Returns:
        y [T, H] in d, Saved or None.
    """
    recipe.check(down_proj.value.shape[2])
    tiles = tiles or pass_tiles(x, gate_up_proj, indices.numel())
    plan = build_plan(indices, gate_up_proj.value.shape[0], tiles.block_m)
    whole_rows = recipe.activations is not None and recipe.group is None
    kind = gate_up_proj.scale_of_activations
    xq, x_scale = quantize_fp8_tokens(x, group=recipe.group, scale=kind) if recipe.activations else (x, None)
    a, a_scale, pre = gate_up(
        xq, x_scale, gate_up_proj, plan, tiles["gate_up"], save=save, dtype=x.dtype, ue8m0=kind == "ue8m0",
        quantize=recipe.group is not None,
    )  # fmt: skip
    if whole_rows:  # one scale per row needs all its tiles
        a, a_scale = quantize_fp8_tokens(a, group=None, scale="fp32")
    y = torch.empty_like(x)
    _through_strips("down", a, a_scale, down_proj, plan, tiles["down"], weights, y)
    if not save:
        return y, None
    assert pre is not None
    return y, Saved(x, pre, weights, plan, a_scale if whole_rows else None)


def moe_backward(
    dy: torch.Tensor, saved: Saved, gate_up_proj: Operand, down_proj: Operand, *, recipe: Recipe = _BF16,
    needs_grad: tuple[bool, bool, bool, bool] = (True, True, True, True), tiles: Tiles | None = None,
    grad_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
) -> Gradients:  # fmt: skip
    """Gradients of x, weights, gate_up_proj and down_proj; `needs_grad` says which, the others are not computed.

    Args:
        dy: [T, H] in d, rows contiguous.
        saved: what `moe_forward` gave. gate_up_proj, down_proj, recipe: as there, with their transposed pairs where the
            recipe casts the input gradient.
        tiles: those of `pass_tiles` where None; their block_m is that of the saved plan.
        grad_dtypes: of the gradients of the two weights; d where None.
    Returns:
        dx [T, H] in d, dweights [T, top_k] fp32, dgate_up, ddown; None where not needed.
    """
    needs_dx, needs_dweights, needs_dgate_up, needs_ddown = needs_grad
    plan, x, full = saved.plan, saved.x, recipe.input_gradient is not None
    slots, num_experts = plan.row_to_slot.numel(), gate_up_proj.value.shape[0]
    tiles = tiles or pass_tiles(dy, gate_up_proj, slots)
    kind = gate_up_proj.scale_of_activations
    dyq, dy_scale = quantize_fp8_tokens(dy, group=FP8_BLOCK, scale=kind) if full else (dy, None)
    dpre, wa, partial, dpre_q, dpre_scale = dswiglu(
        dyq, dy_scale, down_proj.transposed, saved.pre, saved.weights, plan, tiles["dswiglu"], save_wa=needs_ddown,
        quantize=recipe.activations, a_scale=saved.a_scale, dpre_fp8=full and needs_dx, ue8m0=kind == "ue8m0",
    )  # fmt: skip
    dweights = sum_slots(partial, plan) if needs_dweights else None
    fp8_wgrad = full and slots >= FP8_WGRAD_ROWS * num_experts
    ddown = dgate_up = dx = None
    if needs_ddown:
        assert wa is not None
        ddown = _gradient(down_proj, grad_dtypes[1] or dy.dtype)
        wgrad("ddown", dy, wa, plan, tiles["wgrad"], ddown, gather_g=True, fp8=fp8_wgrad)
    if needs_dgate_up:
        assert x is not None
        if recipe.activations and not fp8_wgrad:
            x = roundtrip_fp8_tokens(x, group=recipe.group, scale=kind)
        dgate_up = _gradient(gate_up_proj, grad_dtypes[0] or dy.dtype)
        wgrad("dgate_up", dpre, x, plan, tiles["wgrad"], dgate_up, gather_x=True, fp8=fp8_wgrad)
    if needs_dx:
        dx = torch.empty_like(dy)
        rows, scale = (dpre, None) if dpre_q is None else (dpre_q, dpre_scale)
        _through_strips("dx", rows, scale, gate_up_proj.transposed, plan, tiles["dx"], None, dx)
    return dx, dweights, dgate_up, ddown


def _through_strips(
    product: str, a: torch.Tensor, a_scale: torch.Tensor | None, w: Operand, plan: RoutingPlan, tile: Tile,
    weights: torch.Tensor | None, out: torch.Tensor,
) -> None:  # fmt: skip
    """out[t] = sum over the slots of t of (weights *) a[row] @ w^T, a strip of columns at a time."""
    hidden, rows = out.shape[1], a.shape[0]
    width = strip_width(hidden)
    buffer = out.new_empty(rows * width)
    for first in range(0, hidden, width):
        strip = out[:, first : first + width]
        partial = buffer[: rows * strip.shape[1]].view(rows, strip.shape[1])
        combine(project(product, a, a_scale, w, plan, tile, first, partial), plan, weights, strip)


def strip_width(hidden: int) -> int:
    """Columns of a strip: half of H, in whole groups. Narrower ones read the GEMM's input more often than they save."""
    return max(-(-hidden // 2 // FP8_BLOCK), 1) * FP8_BLOCK


def pass_tiles(x: torch.Tensor, w: Operand, slots: int, batch_invariant: bool = False) -> Tiles:
    """The tiles of a pass over `slots` rows with rows like x and weights w; forward and backward may differ.

    `batch_invariant`: the same ones whatever `slots`.
    """
    operands = "fp8" if w.value.dtype == FP8 else "fp32" if x.element_size() == 4 else "bf16"
    rows = INVARIANT_ROWS if batch_invariant else slots / w.value.shape[0]
    return tiles_for(target(x.device).arch, operands, rows)


def _gradient(w: Operand, dtype: torch.dtype) -> torch.Tensor:
    """Memory for the gradient of a weight, contiguous whatever the weight is."""
    return torch.empty(w.value.shape, dtype=dtype, device=w.value.device)
