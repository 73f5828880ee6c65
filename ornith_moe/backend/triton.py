"""The routed-experts MLP by the Triton kernels: what `ornith_moe.ops` calls for the triton backend.

`ornith_moe.kernels.moe` does the work, forward and backward, on GPU tensors or, in Triton's interpreter, on CPU ones.

Between the two passes stay x (not if gate_up is frozen), the pre-activation, and with the channel recipe one scale per
row. The plan is built again in backward: three launches, which wait for nothing, instead of maps whose size would
follow from this GPU's tiles, where a compiled graph has to know every size from the shapes.
"""

import torch

from ornith_moe.fp8_weights import FP8Weights
from ornith_moe.kernels import moe
from ornith_moe.kernels.grouped_gemm import Weights
from ornith_moe.kernels.plan import build_plan
from ornith_moe.quant.fp8 import dequantize_fp8


def moe_forward(x, indices, weights, gate_up, down, *, recipe, save, batch_invariant):
    """y = sum_k weights_k * down(silu(gate(x)) * up(x)).

    Args:
        x: [T, H] float32, float16 or bfloat16. indices: [T, top_k] integers; ids outside [0, E) are skipped.
        weights: [T, top_k] floating point.
        gate_up, down: FP8Weights of [E, 2I, H] and [E, H, I], or the weights themselves without a scale. Activations
            get UE8M0 scales where these have them.
        recipe, batch_invariant: as in `ornith_moe.moe_mlp`.
        save: keep what `moe_backward` needs.
    Returns:
        y [T, H] in the dtype of x, pre [T * top_k, 2I] (rows sorted by expert, the same dtype) and a_scale
        [T * top_k, 1] float32; None where nothing is saved, and a_scale also where the recipe has none.
    """
    y, saved = moe.moe_forward(
        x.contiguous(), indices, weights.float().contiguous(), _experts(gate_up, down, recipe, x.dtype),
        recipe=recipe, save=save,
        ue8m0=_is_ue8m0(gate_up), batch_invariant=batch_invariant,
    )  # fmt: skip
    return (y, saved.pre, saved.a_scale) if save else (y, None, None)


def moe_backward(
    dy, x, indices, weights, pre, a_scale, gate_up, down, *, recipe, wants, grad_dtypes, batch_invariant
):  # fmt: skip
    """dx, dweights (fp32), dgate_up, ddown (in `grad_dtypes`); what nobody wants is None and not computed."""
    experts, dy = _experts(gate_up, down, recipe, dy.dtype), dy.contiguous()
    tiles = moe.pass_tiles(dy, experts.gate_up, indices.numel(), batch_invariant)  # those that moe_backward will choose
    plan = build_plan(indices, experts.gate_up.value.shape[0], tiles.block_m)
    x = None if x is None else x.contiguous()
    return moe.moe_backward(
        dy, moe.Saved(x, pre, weights.float().contiguous(), plan, a_scale), experts, recipe=recipe, wants=wants,
        ue8m0=_is_ue8m0(gate_up), grad_dtypes=grad_dtypes, batch_invariant=batch_invariant,
    )  # fmt: skip


def _experts(gate_up: FP8Weights, down: FP8Weights, recipe: str, dtype: torch.dtype) -> moe.Experts:
    sides = (gate_up, down)
    turned = [Weights(w.q_t, w.scale_t) for w in sides if w.q_t is not None]
    plain = [Weights(w.q, w.scale) for w in sides]
    if recipe == "bf16":  # the kernel that dequantizes as it loads knows row scales along the contraction only
        plain = [Weights(dequantize_fp8(w.value, w.scale, dtype=dtype)) if w.per_row else w for w in plain]
    return moe.Experts(*plain, *turned)


def _is_ue8m0(weights: FP8Weights) -> bool:
    return weights.scale is not None and weights.scale.dtype == torch.float8_e8m0fnu
