"""The routed-experts MLP in plain torch: the truth that every backend is compared with.

    y[t] = sum over k of down*[e] @ (weights[t, k] * a*),    e = indices[t, k]
    a    = silu(gate*[e] @ x*[t]) * (up*[e] @ x*[t])

A star is what a GEMM sees of a number. With recipe `bf16` that is the number itself. An FP8 recipe quantizes by
`ornith_moe.quant.fp8` and dequantizes at once:

| recipe | gate_up*, down*, rounded to BF16 first | x*, a*, rounded to the dtype of x first | gradient of a product |
|---|---|---|---|
| fp8 | 128x128 blocks | 1x128 groups | as it is |
| fp8_full | 128x128 blocks | 1x128 groups | in 1x128 groups where it goes on to the product's input |
| fp8_channel | one BF16 scale per row | one scale per row | as it is |

Every cast passes its gradient through unchanged. So a gradient is that of the starred operands, and a weight in fp32 or
BF16 receives it as if the cast were not there. Weights given as (q, scale) are starred already, whatever the recipe;
`bf16` then quantizes weights only. Where the scales of the weights are UE8M0, those of 1x128 groups are too.

A loop over experts in float32 (or float64 if any operand is), differentiated by autograd as often as one likes, by
forward mode and by torch.func, under which every expert computes every token. The backend of this name computes the
same gradients by formulas. Both are written to be believed, not to be fast. Ids outside [0, E) belong to no expert here
and contribute nothing.

Letters: T tokens, E experts, H hidden, I expert intermediate, m rows of one expert, top_k slots per token.
"""

import torch
import torch.nn.functional as F

from ornith_moe.quant import fp8


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
        recipe: "bf16", "fp8", "fp8_full" or "fp8_channel". scale: of blocks, "fp32" or "ue8m0".
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
    compute = dtype or _compute_dtype(x, weights, gate_up_proj, down_proj)
    stars = [
        _star(w) if isinstance(w, tuple) else w if recipe == "bf16" else _Star.apply(w, recipe, scale)
        for w in (gate_up_proj, down_proj)
    ]
    ue8m0 = _is_ue8m0(gate_up_proj) if isinstance(gate_up_proj, tuple) else recipe != "fp8_channel" and scale == "ue8m0"
    y = _experts(x, indices, weights, *stars, recipe, ue8m0, compute)
    return y if dtype else y.to(x.dtype)


def moe_forward(x, indices, weights, gate_up, down, *, recipe):
    """y [T, H] in the dtype of x; `gate_up` and `down` are pairs (value, scale), scale None for plain weights."""
    compute = _compute_dtype(x, weights, gate_up[0], down[0])
    stars = _star(gate_up), _star(down)
    return _experts(x, indices, weights, *stars, recipe, _is_ue8m0(gate_up), compute).to(x.dtype)


def moe_backward(dy, x, indices, weights, gate_up, down, *, recipe, wants):
    """The gradients that `wants` asks for, of x, weights, gate_up and down, None for the others.

    Written out, because inside of an operator there is no autograd; the tests hold it against autograd of the above.
    """
    compute = _compute_dtype(x, weights, gate_up[0], down[0])
    options = _cast_options(x, recipe, _is_ue8m0(gate_up))
    cast = (lambda rows: rows) if recipe == "bf16" else lambda rows: _Cast.apply(rows, *options)
    cast_gradient = cast if recipe == "fp8_full" else lambda rows: rows
    rows, weights, gate_up, down, dy = (t.to(compute) for t in (x, weights, _star(gate_up), _star(down), dy))
    rows, dy_rows = cast(rows), cast_gradient(dy)
    operands = (rows, weights, gate_up, down)
    gradients = [torch.zeros_like(t) if wanted else None for t, wanted in zip(operands, wants, strict=True)]
    dx, dweights, dgate_up, ddown = gradients
    for expert in range(gate_up.shape[0]):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = (rows[token] @ gate_up[expert].T).chunk(2, dim=-1)  # [m, I] each
        weight, sigmoid = weights[token, slot].unsqueeze(-1), gate.sigmoid()
        silu = gate * sigmoid
        a = cast(silu * up)
        da = dy_rows[token] @ down[expert]  # of weight * a
        if dweights is not None:
            dweights[token, slot] = (da * a).sum(-1)
        if ddown is not None:
            ddown[expert] = dy[token].T @ (weight * a)
        da = weight * da
        dpre = torch.cat((da * up * (sigmoid + silu * (1 - sigmoid)), da * silu), dim=-1)
        if dgate_up is not None:
            dgate_up[expert] = dpre.T @ rows[token]
        if dx is not None:
            dx.index_add_(0, token, cast_gradient(dpre) @ gate_up[expert])
    return gradients


def _experts(x, indices, weights, gate_up, down, recipe, ue8m0, compute):
    """y [T, H] in `compute`, differentiable; the weights are starred already."""
    options = _cast_options(x, recipe, ue8m0)
    linear = _LinearFP8Gradient.apply if recipe == "fp8_full" else lambda rows, w, *_: F.linear(rows, w)
    rows, weights, gate_up, down = (t.to(compute) for t in (x, weights, gate_up, down))
    y = torch.zeros_like(rows) + 0 * rows
    rows = rows if recipe == "bf16" else _Cast.apply(rows, *options)
    # unbind, not indexing: its backward stacks the gradients once instead of adding a full-size zero tensor per expert
    for expert, (w13, w2) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        token, weight = _rows_of(expert, indices, weights)
        gate, up = linear(rows[token], w13, *options).chunk(2, dim=-1)  # [m, I] each
        a = gate * gate.sigmoid() * up  # silu; F.silu's gradient has no forward mode
        a = a if recipe == "bf16" else _Cast.apply(a, *options)
        # the weight goes before the product: what comes back to the product then is dy, as the recipe quantizes it
        y = y.index_add(0, token, linear(weight.unsqueeze(-1) * a, w2, *options))
    return y


def _rows_of(expert, indices, weights):
    """Tokens and weights of the rows of an expert. Under torch.func no size may follow from a value: every token."""
    if torch._C._are_functorch_transforms_active():
        chosen = indices == expert
        return torch.arange(len(indices), device=indices.device), torch.where(chosen, weights, 0).sum(1)
    token, slot = (indices == expert).nonzero(as_tuple=True)
    return token, weights[token, slot]


class _StraightThrough(torch.autograd.Function):
    """A cast of its first argument, whose gradient and tangent pass through; leading dimensions are kept apart."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = len(inputs) - 1
        ctx.dtype, ctx.star_dtype = inputs[0].dtype, output.dtype

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype), *[None] * ctx.options

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.to(ctx.star_dtype)

    @classmethod
    def vmap(cls, info, in_dims, tensor, *options):
        return cls.apply(tensor.movedim(in_dims[0], 0), *options), 0


class _Cast(_StraightThrough):
    """rows* of rows: rounded to `dtype`, quantized per token and group, dequantized."""

    @staticmethod
    def forward(rows, group, scale, dtype):
        rounded = rows.to(torch.float32 if dtype == torch.float64 else dtype)
        q, s = fp8.quantize_fp8_tokens(rounded, group=group, scale=scale)
        return fp8.dequantize_fp8(q, s, block=(1, group), dtype=torch.float32).to(rows.dtype)


class _Star(_StraightThrough):
    """A weight as `recipe` stores and then reads it."""

    @staticmethod
    def forward(w, recipe, scale):
        return _star(_quantize(w, recipe, scale))


class _LinearFP8Gradient(torch.autograd.Function):
    """rows @ w^T, whose gradient is quantized where it goes on to rows and is not where it makes the gradient of w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, w, group, scale, dtype):
        return F.linear(rows, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, w, *ctx.options = inputs
        ctx.save_for_backward(rows, w)
        ctx.save_for_forward(rows, w)

    @staticmethod
    def backward(ctx, dout):
        rows, w = ctx.saved_tensors
        return _Cast.apply(dout, *ctx.options) @ w, dout.T @ rows, None, None, None

    @staticmethod
    def jvp(ctx, drows, dw, *_):
        rows, w = ctx.saved_tensors
        return F.linear(drows, w) + F.linear(rows, dw)


def _quantize(w, recipe, scale):
    """(value, scale) of a weight as `recipe` stores it."""
    if recipe == "bf16":
        return w, None
    return fp8.quantize_fp8_channel(w) if recipe == "fp8_channel" else fp8.quantize_fp8_block(w, scale=scale)


def _cast_options(x, recipe, ue8m0):
    """Group, scale and dtype of `_Cast`."""
    return None if recipe == "fp8_channel" else 128, "ue8m0" if ue8m0 else "fp32", x.dtype


def _star(pair):
    value, scale = pair
    return value if scale is None else fp8.dequantize_fp8(value, scale, dtype=torch.float32)


def _is_ue8m0(pair):
    return pair[1] is not None and pair[1].dtype == torch.float8_e8m0fnu


def _compute_dtype(*operands):
    dtypes = {t.dtype for t in operands if isinstance(t, torch.Tensor)}
    return torch.float64 if torch.float64 in dtypes else torch.float32
