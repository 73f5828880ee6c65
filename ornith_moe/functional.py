"""The routed-experts MLP as one function: check, choose a backend, call the operator.

    y[t] = sum over k of weights[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])),  e = indices[t, k]

Routing is not part of it (`ornith_moe.route`), and neither is the shared expert (`ornith_moe.MoE`). The operator is
`ornith::moe_mlp` of `ornith_moe.ops`, the same one for every backend.
"""

from typing import Any

import torch

from ornith_moe import ops, transforms
from ornith_moe.backend.choice import choose_backend
from ornith_moe.quant.fp8 import SCALES
from ornith_moe.quant.recipes import BLOCK, FP8_BLOCK, ROW, Recipe, recipe_of

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)


def moe_mlp(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    down_proj: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    *,
    activation: str = "silu",
    recipe: str = "bf16",
    backend: str | None = None,
    scale: str = "fp32",
    batch_invariant: bool = False,
) -> torch.Tensor:
    """y = sum_k weights_k * down(silu(gate(x)) * up(x)) over the experts in `indices`.

    Args:
        x: [T, H] floating point.
        indices: [T, top_k] integers; an id outside [0, E) is a sentinel (an expert on another rank) and adds nothing.
        weights: [T, top_k] floating point.
        gate_up_proj: [E, 2I, H], gate rows first, or the pair (q, scale) that stores it: q in float8_e4m3fn and scale
            [E, ceil(2I / 128), ceil(H / 128)] or one per row [E, 2I, 1], in float32, bfloat16 or (blocks) UE8M0.
        down_proj: [E, H, I], or its pair.
        activation: "silu".
        recipe: a row of `ornith_moe.quant.recipes`. "bf16": nothing is quantized, GEMMs in the dtype of x, whatever
            that is; weights have that dtype too, or are pairs and dequantized to it. "fp8", "fp8_full", "fp8_channel":
            `docs/numerics.md`; the weights are masters in any 16- or 32-bit float, or pairs of the recipe's blocks or
            rows, and I is a multiple of 128 except for fp8_channel.
        backend: "triton", "cpu" or "reference"; None chooses by device.
        scale: scales of the blocks that fp8 and fp8_full make of masters: "fp32", "bf16" as FP8 builds store them, or
            "ue8m0" (powers of two) where the rollout engine wants those. Activations are scaled as the weights are.
        batch_invariant: the tile does not follow T, so that a token's bits cannot depend on its batch; triton only.

    Returns:
        y [T, H] in the dtype of x, no view, differentiable in x, weights, gate_up_proj and down_proj, once, and not in
        forward mode (`ornith_moe.transforms`). T = 0 gives an empty y that is still part of the graph. A weight's
        gradient has the weight's dtype, or its `grad_dtype`. For the q of a pair that is the gradient of the
        dequantized weight, and `q.grad_dtype` must be set to float32 or bfloat16 first; scales have none.

    Raises:
        TypeError: an argument is not a tensor of the expected kind or is an opaque subclass, or the dtypes differ.
        ValueError: a shape, device, recipe, activation, scale or backend does not fit.

    Numerics: docs/numerics.md; deterministic. Masters are rounded to BF16 and quantized when they have changed, not
    once per call (`ornith_moe.fp8_weights`), and get their gradient as if they had not been quantized.

    Example:
        >>> import torch, ornith_moe as om
        >>> x, w13, w2 = torch.randn(5, 16), torch.randn(4, 256, 16), torch.randn(4, 16, 128)
        >>> routing = om.route(torch.randn(5, 4), top_k=2)
        >>> om.moe_mlp(x, routing.indices, routing.weights, w13, w2).shape
        torch.Size([5, 16])
        >>> pairs = om.quantize_fp8_block(w13), om.quantize_fp8_block(w2)
        >>> y = om.moe_mlp(x, routing.indices, routing.weights, *pairs, recipe="fp8")
        >>> torch.equal(y, om.moe_mlp(x, routing.indices, routing.weights, w13, w2, recipe="fp8"))
        True
    """
    if activation != "silu":
        raise ValueError(f"activation: expected 'silu', got {activation!r}")
    row = recipe_of(recipe)
    if scale not in SCALES:
        raise ValueError(f"scale: expected 'fp32', 'bf16' or 'ue8m0', got {scale!r}")
    gate_up, gate_up_scale = _pair("gate_up_proj", gate_up_proj)
    down, down_scale = _pair("down_proj", down_proj)
    operands = {"x": x, "indices": indices, "weights": weights, "gate_up_proj": gate_up, "down_proj": down}
    ops.check_plain(**operands, gate_up_scale=gate_up_scale, down_scale=down_scale)
    _check(**operands)
    _check_weight("gate_up_proj", gate_up, gate_up_scale, x, row)
    _check_weight("down_proj", down, down_scale, x, row)
    row.check(down.shape[2])
    name = choose_backend(backend, x.device, recipe, dtype=x.dtype, batch_invariant=batch_invariant)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_up, down))
    grad = grad or transforms.active()  # whose levels hide whether a tensor requires it
    y, *_ = ops.call(
        "moe_mlp", x, indices, weights, gate_up, down, gate_up_scale, down_scale, recipe, scale, batch_invariant, name,
        grad,
    )  # fmt: skip
    return y


def _pair(name: str, weight: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not isinstance(weight, (tuple, list)):
        return weight, None
    if len(weight) != 2 or not all(isinstance(t, torch.Tensor) for t in weight):
        raise TypeError(f"{name}: expected a tensor or a pair (q, scale) of tensors, got {len(weight)} values")
    q, scale = weight
    return q, scale


def _check(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor
) -> None:
    tensors = {
        "x": (x, 2, "[T, H]"),
        "indices": (indices, 2, "[T, top_k]"),
        "weights": (weights, 2, "[T, top_k]"),
        "gate_up_proj": (gate_up_proj, 3, "[E, 2I, H]"),
        "down_proj": (down_proj, 3, "[E, H, I]"),
    }
    for name, (tensor, dims, shape) in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor {shape}, got {type(tensor).__name__}")
        if tensor.dim() != dims:
            raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x ({x.device}), got {tensor.device}")
        integral = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        narrow = tensor.dtype.itemsize == 1 and name not in ("gate_up_proj", "down_proj")
        if integral != (name == "indices") or (not integral and narrow):
            kind = "an integer" if name == "indices" else "a 16-, 32- or 64-bit floating-point"
            raise TypeError(f"{name}: expected {kind} tensor, got {tensor.dtype}")
    if indices.shape != weights.shape or indices.shape[0] != x.shape[0]:
        raise ValueError(
            f"indices and weights: expected the same shape [T, top_k] with T = {x.shape[0]}, "
            f"got {list(indices.shape)} and {list(weights.shape)}"
        )
    (experts, twice_inner, hidden), inner = gate_up_proj.shape, down_proj.shape[2]
    if hidden != x.shape[1]:
        raise ValueError(f"gate_up_proj: expected [E, 2I, H] with H = {x.shape[1]} of x, got {[*gate_up_proj.shape]}")
    if twice_inner != 2 * inner or down_proj.shape[:2] != (experts, hidden):
        raise ValueError(
            f"down_proj: expected [E, H, I] = {[experts, hidden, twice_inner // 2]} to match gate_up_proj "
            f"{[*gate_up_proj.shape]}, got {[*down_proj.shape]}"
        )


def _check_weight(name: str, weight: torch.Tensor, scale: torch.Tensor | None, x: torch.Tensor, recipe: Recipe) -> None:
    """Dtype of a weight, and what belongs to a pair."""
    if scale is None:
        if not recipe.is_fp8 and weight.dtype.itemsize > 1 and weight.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x ({x.dtype}), got {weight.dtype}; cast one of them")
        if weight.dtype.itemsize == 1 or (recipe.is_fp8 and weight.dtype == torch.float64):
            sizes = "16- or 32-bit" if recipe.is_fp8 else "16-, 32- or 64-bit"
            raise TypeError(
                f"{name}: expected a {sizes} floating-point tensor or a pair (q, scale), got {weight.dtype}"
            )
        return
    if weight.dtype != torch.float8_e4m3fn:
        raise TypeError(f"{name}: expected q of a pair in float8_e4m3fn, got {weight.dtype}")
    if scale.dtype not in _SCALE_DTYPES:
        raise TypeError(f"{name}: expected its scale in float32, bfloat16 or float8_e8m0fnu, got {scale.dtype}")
    if scale.device != weight.device:
        raise ValueError(f"{name}: expected its scale on the device of q ({weight.device}), got {scale.device}")
    experts, n, k = weight.shape
    blocks, rows = (experts, -(-n // FP8_BLOCK), -(-k // FP8_BLOCK)), (experts, n, 1)
    fits = [shape for cast, shape in ((BLOCK, blocks), (ROW, rows)) if recipe.weights in (None, cast)]
    if tuple(scale.shape) not in fits:
        expected = " or ".join(str(list(shape)) for shape in fits)
        raise ValueError(
            f"{name}: expected its scale in shape {expected} for recipe {recipe.name!r} and q of shape"
            f" {[experts, n, k]}, got {list(scale.shape)}"
        )
    if recipe.weights == ROW and scale.dtype == torch.float8_e8m0fnu:
        raise TypeError(f"{name}: expected its scale of rows in float32 or bfloat16, got {scale.dtype}")
