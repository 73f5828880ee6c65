"""The routed-experts MLP by the Triton kernels, under autograd.

    y[t] = sum over k of weights[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])),  e = indices[t, k]

`ornith_moe.kernels.moe` does the work, forward and backward; this file makes one operation of it. FP8 weights come from
`ornith_moe.fp8_weights`, so all micro-batches of an optimizer step share one cast. Saved per token: x (H values), the
pre-activation (top_k * 2I), the routing weights and 8 bytes of maps per slot; see docs/numerics.md for each recipe.

A gradient that is not wanted costs nothing: frozen experts skip both weight products and do not keep x.
"""

from dataclasses import fields

import torch

from ornith_moe.fp8_weights import quantized_weights
from ornith_moe.kernels.grouped_gemm import Weights
from ornith_moe.kernels.moe import Experts, Saved, moe_backward, moe_forward
from ornith_moe.kernels.plan import RoutingPlan

_PLAN = [field.name for field in fields(RoutingPlan) if field.type is torch.Tensor]


def moe_mlp_gpu(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    *,
    recipe: str = "bf16",
    scale: str = "fp32",
    batch_invariant: bool = False,
) -> torch.Tensor:
    """y = sum_k weights_k * down(silu(gate(x)) * up(x)) on GPU tensors, or on CPU tensors in Triton's interpreter.

    Args:
        x: [T, H] float32, float16 or bfloat16. indices: [T, top_k] integers; ids outside [0, E) are skipped.
        weights: [T, top_k] floating point.
        gate_up_proj: [E, 2I, H], gate rows first; down_proj: [E, H, I]. In the dtype of x, or for FP8 recipes in any
            of the three: the values that count are those rounded to BF16.
        recipe: "bf16", "fp8", "fp8_full" or "fp8_channel".
        scale: block scales in "fp32", or powers of two ("ue8m0") where the rollout engine wants those.
        batch_invariant: the tile does not follow T, so that a token's bits cannot depend on its batch.

    Returns:
        y [T, H] in the dtype of x.

    Numerics: docs/numerics.md. Deterministic: no atomics, every sum in a fixed order.

    Example:
        >>> import torch
        >>> from ornith_moe.gpu import moe_mlp_gpu                                                 # doctest: +SKIP
        >>> moe_mlp_gpu(x, routing.indices, routing.weights, gate_up_proj, down_proj, recipe="fp8")  # doctest: +SKIP
    """
    return _MoEMLP.apply(x, indices, weights, gate_up_proj, down_proj, recipe, scale, batch_invariant)


def _experts(gate_up_proj, down_proj, recipe, scale):
    if recipe == "bf16":
        return Experts(Weights(gate_up_proj), Weights(down_proj))
    sides = [quantized_weights(w, recipe, scale) for w in (gate_up_proj, down_proj)]
    plain = [Weights(w.q, w.scale) for w in sides]
    return Experts(*plain, *[Weights(w.q_t, w.scale_t) for w in sides if w.q_t is not None])


class _MoEMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, indices, weights, gate_up_proj, down_proj, recipe, scale, batch_invariant):
        ctx.options = {"recipe": recipe, "ue8m0": scale == "ue8m0", "batch_invariant": batch_invariant}
        ctx.scale = scale
        experts = _experts(gate_up_proj, down_proj, recipe, scale)
        x, slot_weights = x.contiguous(), weights.float().contiguous()
        y, saved = moe_forward(x, indices, slot_weights, experts, save=any(ctx.needs_input_grad), **ctx.options)
        if saved is not None:
            kept = x if ctx.needs_input_grad[3] else None
            plan = saved.plan
            ctx.plan_sizes = plan.block_m, plan.top_k
            ctx.weights_dtype = weights.dtype
            ctx.save_for_backward(kept, saved.pre, saved.weights, saved.a_scale, gate_up_proj, down_proj,
                                  *(getattr(plan, name) for name in _PLAN))  # fmt: skip
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, pre, weights, a_scale, gate_up_proj, down_proj, *plan = ctx.saved_tensors
        plan = RoutingPlan(**dict(zip(_PLAN, plan, strict=True)), block_m=ctx.plan_sizes[0], top_k=ctx.plan_sizes[1])
        wants = tuple(ctx.needs_input_grad[i] for i in (0, 2, 3, 4))
        experts = _experts(gate_up_proj, down_proj, ctx.options["recipe"], ctx.scale)
        dx, dweights, dgate_up, ddown = moe_backward(
            dy.contiguous(), Saved(x, pre, weights, plan, a_scale), experts, wants=wants,
            grad_dtypes=(gate_up_proj.dtype, down_proj.dtype), **ctx.options,
        )  # fmt: skip
        if dweights is not None:
            dweights = dweights.to(ctx.weights_dtype)
        return dx, None, dweights, dgate_up, ddown, None, None, None
