"""The routed-experts MLP as one function: check, choose a backend, compute.

    y[t] = sum over k of weights[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])),  e = indices[t, k]

Routing is not part of it (`ornith_moe.route`), and neither is the shared expert (`ornith_moe.MoE`).
"""

import torch

from ornith_moe.backend import choose_backend
from ornith_moe.cpu import moe_mlp_cpu
from ornith_moe.reference import moe_mlp_reference

RECIPES = ("bf16", "fp8", "fp8_full", "fp8_channel")
_COMPUTE = {"cpu": moe_mlp_cpu, "reference": moe_mlp_reference}


def moe_mlp(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    *,
    activation: str = "silu",
    recipe: str = "bf16",
    backend: str | None = None,
) -> torch.Tensor:
    """y = sum_k weights_k * down(silu(gate(x)) * up(x)) over the experts in `indices`.

    Args:
        x: [T, H] floating point.
        indices: [T, top_k] integers; an id outside [0, E) is a sentinel (an expert on another rank) and adds nothing.
        weights: [T, top_k] floating point.
        gate_up_proj: [E, 2I, H] in the dtype of x, gate rows first.
        down_proj: [E, H, I] in the dtype of x.
        activation: "silu".
        recipe: "bf16": no quantization, GEMMs in the dtype of the operands, whatever that is. With the triton backend
            also "fp8", "fp8_full" and "fp8_channel" (docs/numerics.md); the weights may then have a dtype of their own.
        backend: "triton", "cpu" or "reference"; None chooses by device.

    Returns:
        y [T, H] in the dtype of x, differentiable in x, weights, gate_up_proj and down_proj. T = 0 gives an empty y
        that is still part of the graph.

    Raises:
        TypeError: an argument is not a tensor of the expected kind, or the dtypes differ.
        ValueError: a shape, device, recipe, activation or backend does not fit.

    Numerics: see `ornith_moe.cpu` and `ornith_moe.gpu`; deterministic.

    Example:
        >>> import torch, ornith_moe as om
        >>> x, w13, w2 = torch.randn(5, 16), torch.randn(4, 24, 16), torch.randn(4, 16, 12)
        >>> routing = om.route(torch.randn(5, 4), top_k=2)
        >>> om.moe_mlp(x, routing.indices, routing.weights, w13, w2).shape
        torch.Size([5, 16])
    """
    _check(x, indices, weights, gate_up_proj, down_proj, same_dtype=recipe == "bf16")
    if activation != "silu":
        raise ValueError(f"activation: expected 'silu', got {activation!r}")
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    name = choose_backend(backend, x.device)
    if recipe != "bf16" and name != "triton":
        raise ValueError(f"recipe: {recipe!r} runs on the triton backend only, not on {name!r}; use recipe='bf16'")
    if name == "triton" and x.dtype == torch.float64:
        raise TypeError("x: the triton backend takes 16- and 32-bit floats, got float64; ask for backend='reference'")
    operands = (x, indices, weights, gate_up_proj, down_proj)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes were chosen by the caller
        if name == "triton":
            from ornith_moe.gpu import moe_mlp_gpu  # needs Triton, which the other backends do not

            return moe_mlp_gpu(*operands, recipe=recipe)
        return _COMPUTE[name](*operands)


def _check(x, indices, weights, gate_up_proj, down_proj, same_dtype):
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
        if integral != (name == "indices") or (not integral and tensor.element_size() == 1):
            kind = "an integer" if name == "indices" else "a 16-, 32- or 64-bit floating-point"
            raise TypeError(f"{name}: expected {kind} tensor, got {tensor.dtype}")
    for name, tensor in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if same_dtype and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x ({x.dtype}), got {tensor.dtype}; cast one of them")
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
