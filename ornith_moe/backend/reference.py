"""The routed-experts MLP in plain torch: the truth that every backend is compared with.

    y[t] = sum over k of down'[e] @ (weights[t, k] * a'),    e = indices[t, k]
    a    = silu(gate'[e] @ x'[t]) * (up'[e] @ x'[t])

A prime is what a GEMM sees of a number. With recipe `bf16` that is the number itself. An FP8 recipe
(`ornith_moe.quant.recipes`) quantizes by `ornith_moe.quant.fp8` and dequantizes at once: gate_up and down rounded to
BF16 first, x and a rounded to the dtype of x first, and where the recipe says so a product's gradient as it goes on to
the product's input.

Every cast passes its gradient through unchanged. So a gradient is that of the dequantized operands, and a weight in
fp32 or BF16 receives it as if the cast were not there. Weights given as (q, scale) are stored already, whatever the
recipe; `bf16` then quantizes weights only. Where the scales of the weights are UE8M0, those of activations are too.

A loop over experts in float32 (or float64 if any operand is), differentiated by autograd as often as one likes, by
forward mode and by torch.func, under which every expert computes every token. The backend of this name computes the
same gradients by formulas. Both are written to be believed, not to be fast. Ids outside [0, E) belong to no expert here
and contribute nothing.

Letters: T tokens, E experts, H hidden, I expert intermediate, m rows of one expert, top_k slots per token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ornith_moe.backend.protocol import Backend, Gradients, Saved, Sizes
from ornith_moe.backend.routing_torch import route_backward, route_forward
from ornith_moe.quant import fp8
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import Cast, Recipe, recipe_of


def moe_mlp_reference(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    down_proj: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    *,
    recipe: str = "bf16",
    scale: str = "fp32",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = sum_k weights_k * down(silu(gate(x)) * up(x)), one expert after the other.

    Args:
        x: [T, H]. indices: [T, top_k] integers. weights: [T, top_k].
        gate_up_proj: [E, 2I, H], gate rows first. down_proj: [E, H, I]. Or pairs (q, scale).
        recipe: a name of `ornith_moe.quant.recipes`. scale: of blocks, "fp32" or "ue8m0".
        dtype: to compute in, float32 or float64; None is float64 if any argument is, else float32.

    Returns:
        y [T, H] in the dtype of x, or in `dtype`. Autograd reaches every floating-point argument (not pairs), also
        when T = 0.

    Numerics: everything in float32 or float64, casts included as the module's table says; one rounding at the end.

    Example:
        >>> import torch
        >>> from ornith_moe.backend.reference import moe_mlp_reference
        >>> x, w13, w2 = torch.ones(1, 2), torch.ones(3, 8, 2), torch.ones(3, 2, 4)
        >>> moe_mlp_reference(x, torch.tensor([[2]]), torch.tensor([[0.5]]), w13, w2)
        tensor([[7.0464, 7.0464]])
    """
    row = recipe_of(recipe)
    given = [Operand(*w) if isinstance(w, tuple) else Operand(w) for w in (gate_up_proj, down_proj)]
    compute = dtype or _compute_dtype(x, weights, *(w.value for w in given))
    kind = given[0].scale_of_activations
    if given[0].scale is None and row.scale_of_weights(scale) == "ue8m0":
        kind = "ue8m0"
    w13, w2 = (
        _Stored.apply(w.value, row, scale) if w.scale is None and row.is_fp8 else w.dequantized(torch.float32)
        for w in given
    )
    y = _experts(x, indices, weights, w13, w2, row, kind, compute)
    return y if dtype else y.to(x.dtype)


class Reference:
    """The backend of this name: any device, float32 or float64, and nothing saved but the operands."""

    transposes = False
    recomputes = True
    takes_float64 = True
    is_batch_invariant = False
    route_forward = staticmethod(route_forward)
    route_backward = staticmethod(route_backward)

    @staticmethod
    def moe_forward(
        x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: Operand, down: Operand, *,
        recipe: Recipe, save: bool = False, batch_invariant: bool = False,
    ) -> tuple[torch.Tensor, Saved]:  # fmt: skip
        compute = _compute_dtype(x, weights, gate_up.value, down.value)
        w13, w2 = (w.dequantized(torch.float32) for w in (gate_up, down))
        y = _experts(x, indices, weights, w13, w2, recipe, gate_up.scale_of_activations, compute)
        return y.to(x.dtype), Saved()

    @staticmethod
    def moe_backward(
        dy: torch.Tensor, x: torch.Tensor | None, indices: torch.Tensor, weights: torch.Tensor, saved: Saved,
        gate_up: Operand, down: Operand, *, recipe: Recipe,
        needs_grad: tuple[bool, bool, bool, bool] = (True, True, True, True),
        grad_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None), batch_invariant: bool = False,
    ) -> Gradients:  # fmt: skip
        """Written out, because inside of an operator there is no autograd; the tests hold it against autograd."""
        assert x is not None  # `recomputes`
        compute, kind = _compute_dtype(x, weights, gate_up.value, down.value), gate_up.scale_of_activations
        cast, cast_gradient = (_cast(each, kind, x.dtype) for each in (recipe.activations, recipe.input_gradient))
        w13, w2 = (w.dequantized(torch.float32).to(compute) for w in (gate_up, down))
        rows, factors, dy = x.to(compute), weights.to(compute), dy.to(compute)
        rows, dy_rows = cast(rows), cast_gradient(dy)
        operands = (rows, factors, w13, w2)
        gradients = [torch.zeros_like(t) if needed else None for t, needed in zip(operands, needs_grad, strict=True)]
        dx, dweights, dgate_up, ddown = gradients
        for expert in range(w13.shape[0]):
            token, slot = (indices == expert).nonzero(as_tuple=True)
            gate, up = (rows[token] @ w13[expert].T).chunk(2, dim=-1)  # [m, I] each
            weight, sigmoid = factors[token, slot].unsqueeze(-1), gate.sigmoid()
            silu = gate * sigmoid
            a = cast(silu * up)
            da = dy_rows[token] @ w2[expert]  # of weight * a
            if dweights is not None:
                dweights[token, slot] = (da * a).sum(-1)
            if ddown is not None:
                ddown[expert] = dy[token].T @ (weight * a)
            da = weight * da
            dpre = torch.cat((da * up * (sigmoid + silu * (1 - sigmoid)), da * silu), dim=-1)
            if dgate_up is not None:
                dgate_up[expert] = dpre.T @ rows[token]
            if dx is not None:
                dx.index_add_(0, token, cast_gradient(dpre) @ w13[expert])
        return dx, dweights, dgate_up, ddown

    @staticmethod
    def saved_sizes(slots: int, experts: int, inner: int, recipe: Recipe, dtype: torch.dtype) -> Sizes:
        return {}


BACKEND: Backend = Reference()


def _experts(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    recipe: Recipe, kind: str, compute: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """y [T, H] in `compute`, differentiable, of dequantized weights; `kind`: of the scales of activations."""
    cast = _cast(recipe.activations, kind, x.dtype)

    def linear(rows: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if recipe.input_gradient is None:
            return F.linear(rows, w)
        return _LinearFP8Gradient.apply(rows, w, recipe.input_gradient[1], kind, x.dtype)

    rows, weights, gate_up, down = (t.to(compute) for t in (x, weights, gate_up, down))
    y = torch.zeros_like(rows) + 0 * rows
    rows = cast(rows)
    # unbind, not indexing: its backward stacks the gradients once instead of adding a full-size zero tensor per expert
    for expert, (w13, w2) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        token, weight = _rows_of(expert, indices, weights)
        gate, up = linear(rows[token], w13).chunk(2, dim=-1)  # [m, I] each
        a = cast(gate * gate.sigmoid() * up)  # silu; F.silu's gradient has no forward mode
        # the weight goes before the product: what comes back to the product then is dy, as the recipe quantizes it
        y = y.index_add(0, token, linear(weight.unsqueeze(-1) * a, w2))
    return y


def _rows_of(expert: int, indices: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weights of the rows of an expert. Under torch.func no size may follow from a value: every token."""
    if torch._C._are_functorch_transforms_active():
        chosen = indices == expert
        return torch.arange(len(indices), device=indices.device), torch.where(chosen, weights, 0).sum(1)
    token, slot = (indices == expert).nonzero(as_tuple=True)
    return token, weights[token, slot]


class _StraightThrough(torch.autograd.Function):
    """A cast of its first argument, whose gradient and tangent pass through; leading dimensions are kept apart."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = len(inputs) - 1
        ctx.dtype, ctx.output_dtype = inputs[0].dtype, output.dtype

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient.to(ctx.dtype), *[None] * ctx.options

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> torch.Tensor:
        return tangent.to(ctx.output_dtype)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], tensor: torch.Tensor, *options: Any) -> tuple[torch.Tensor, int]:
        return cls.apply(tensor.movedim(in_dims[0], 0), *options), 0


class _Cast(_StraightThrough):
    """Rows, rounded to `dtype`, quantized per token and group, dequantized."""

    @staticmethod
    def forward(rows: torch.Tensor, group: int | None, scale: str, dtype: torch.dtype) -> torch.Tensor:
        rounded = rows.to(torch.float32 if dtype == torch.float64 else dtype)
        q, s = fp8.quantize_fp8_tokens(rounded, group=group, scale=scale)
        return fp8.dequantize_fp8(q, s, block=(1, group), dtype=torch.float32).to(rows.dtype)


class _Stored(_StraightThrough):
    """A weight as `recipe` stores and then reads it."""

    @staticmethod
    def forward(w: torch.Tensor, recipe: Recipe, scale: str) -> torch.Tensor:
        return Operand.quantized(w, recipe, scale).dequantized(torch.float32)


class _LinearFP8Gradient(torch.autograd.Function):
    """rows @ w^T, whose gradient is quantized where it goes on to rows and is not where it makes the gradient of w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: torch.Tensor, w: torch.Tensor, group: int | None, scale: str, dtype: torch.dtype) -> torch.Tensor:
        return F.linear(rows, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rows, w, *ctx.options = inputs
        ctx.save_for_backward(rows, w)
        ctx.save_for_forward(rows, w)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, w = ctx.saved_tensors
        return _Cast.apply(dout, *ctx.options) @ w, dout.T @ rows, None, None, None

    @staticmethod
    def jvp(ctx: Any, drows: torch.Tensor, dw: torch.Tensor, *_: None) -> torch.Tensor:
        rows, w = ctx.saved_tensors
        return F.linear(drows, w) + F.linear(rows, dw)


def _cast(cast: Cast | None, kind: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `cast` makes of rows of activations or gradients."""
    return (lambda rows: _Cast.apply(rows, cast[1], kind, dtype)) if cast else (lambda rows: rows)


def _compute_dtype(*operands: torch.Tensor) -> torch.dtype:
    dtypes = {t.dtype for t in operands}
    return torch.float64 if torch.float64 in dtypes else torch.float32
