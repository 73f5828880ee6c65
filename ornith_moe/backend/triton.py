"""The routed experts by the Triton kernels, on GPU tensors or, in Triton's interpreter, on CPU ones.

`ornith_moe.kernels.moe` does the work, forward and backward. It is imported when it is called, because sizes are asked
for where there is no Triton too, by tensors on "meta".

Between the two passes stay x (not if gate_up is frozen), the pre-activation, and one scale per row where the recipe
scales whole rows. The plan is built again in backward: three launches, which wait for nothing, instead of maps whose
size would follow from this GPU's tiles, where a compiled graph has to know every size from the shapes.
"""

from __future__ import annotations

import torch

from ornith_moe.backend.protocol import Backend, Gradients, Routed, Saved, Sizes
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import Recipe


class Triton:
    """The backend of this name; x in float32, float16 or bfloat16."""

    transposes = True
    recomputes = False
    takes_float64 = False
    is_batch_invariant = True

    @staticmethod
    def moe_forward(
        x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: Operand, down: Operand, *,
        recipe: Recipe, save: bool = False, batch_invariant: bool = False,
    ) -> tuple[torch.Tensor, Saved]:  # fmt: skip
        from ornith_moe.kernels import moe

        gate_up, down = (_loadable(w, recipe, x.dtype) for w in (gate_up, down))
        y, saved = moe.moe_forward(
            x.contiguous(), indices, weights.float().contiguous(), gate_up, down, recipe=recipe, save=save,
            tiles=moe.pass_tiles(x, gate_up, indices.numel(), batch_invariant),
        )  # fmt: skip
        return y, Saved(pre=saved.pre, a_scale=saved.a_scale) if saved is not None else Saved()

    @staticmethod
    def moe_backward(
        dy: torch.Tensor, x: torch.Tensor | None, indices: torch.Tensor, weights: torch.Tensor, saved: Saved,
        gate_up: Operand, down: Operand, *, recipe: Recipe,
        needs_grad: tuple[bool, bool, bool, bool] = (True, True, True, True),
        grad_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None), batch_invariant: bool = False,
    ) -> Gradients:  # fmt: skip
        from ornith_moe.kernels import moe
        from ornith_moe.kernels.plan import build_plan

        assert saved.pre is not None
        dy = dy.contiguous()
        gate_up, down = (_loadable(w, recipe, dy.dtype) for w in (gate_up, down))
        tiles = moe.pass_tiles(dy, gate_up, indices.numel(), batch_invariant)
        plan = build_plan(indices, gate_up.value.shape[0], tiles.block_m)
        x = None if x is None else x.contiguous()
        kept = moe.Saved(x, saved.pre, weights.float().contiguous(), plan, saved.a_scale)
        dx, dweights, dgate_up, ddown = moe.moe_backward(
            dy, kept, gate_up, down, recipe=recipe, needs_grad=needs_grad, tiles=tiles, grad_dtypes=grad_dtypes
        )
        return dx, dweights, dgate_up, ddown

    @staticmethod
    def saved_sizes(slots: int, experts: int, inner: int, recipe: Recipe, dtype: torch.dtype) -> Sizes:
        sizes: Sizes = {"pre": ((slots, 2 * inner), dtype)}
        if recipe.activations and recipe.group is None:
            sizes["a_scale"] = ((slots, 1), torch.float32)
        return sizes

    @staticmethod
    def route_forward(
        logits: torch.Tensor, top_k: int, *, score: str, norm_topk_prob: bool, bias: torch.Tensor | None,
        n_group: int | None, topk_group: int | None, replay: torch.Tensor | None, losses: bool,
    ) -> Routed:  # fmt: skip
        from ornith_moe.kernels.routing import route_forward

        return route_forward(
            logits, top_k, score=score, norm_topk_prob=norm_topk_prob, bias=bias, n_group=n_group,
            topk_group=topk_group, replay=replay, losses=losses,
        )  # fmt: skip

    @staticmethod
    def route_backward(
        logits: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, dweights: torch.Tensor,
        dq_sum: torch.Tensor | None, dsquare_sum: torch.Tensor | None, *, score: str, norm_topk_prob: bool,
    ) -> torch.Tensor:  # fmt: skip
        from ornith_moe.kernels.routing import route_backward

        gradients = (logits, indices, weights, dweights, dq_sum, dsquare_sum)
        return route_backward(*gradients, score=score, norm_topk_prob=norm_topk_prob)


BACKEND: Backend = Triton()


def _loadable(w: Operand, recipe: Recipe, dtype: torch.dtype) -> Operand:
    """The kernel that dequantizes as it loads knows row scales along the contraction only."""
    return Operand(w.dequantized(dtype)) if w.per_row and not recipe.is_fp8 else w
