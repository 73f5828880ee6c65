"""Routings and references for the tests of the expert kernels.

The reference is a loop over experts in float64 under autograd. For FP8 recipes it sees the operands that the kernels
multiply: weights, tokens and activations after quantize and dequantize by `ornith_moe.quant.fp8`, with the
gradient passing straight through each cast.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ornith_moe.quant import fp8
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import RECIPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.device)  # a backend of a test whose operands are `device_of` it
OUTPUTS = ("y", "dx", "dweights", "dgate_up", "ddown")


def device_of(backend):
    """Where the operands of a backend belong; of "triton" only if it is there, or else the test is skipped."""
    if backend != "triton":
        return "cpu"
    pytest.importorskip("triton", reason="triton is not installed")
    return DEVICE


def exact_products(monkeypatch):
    """Let equal bits in Triton's interpreter depend on the kernel alone: products of BF16 and FP8 are summed in float64
    and rounded once.

    The order in which np.matmul adds depends on the shape of its operands, and on the processor: without AVX-512 a row
    has other last bits among fewer rows, and a product of swapped operands too.
    """
    from triton.runtime import interpreter

    def matmul(a, b, dtype):
        return (a.astype(np.float64) @ b.astype(np.float64)).astype(dtype)

    monkeypatch.setattr(interpreter, "np", SimpleNamespace(**vars(np) | {"matmul": matmul}))


def make_indices(kind, tokens, experts, top_k):
    """[T, top_k] expert ids: "uniform", "skewed" (two experts take most, some none), "one" (the same for all), or
    "sentinels" (other ranks' ids and -1 among them, one token with nothing else)."""
    if kind == "one":
        return torch.arange(top_k).expand(tokens, top_k).contiguous()
    preference = torch.rand(tokens, experts)
    if kind == "skewed":
        preference[:, :2] += 0.8
        preference[:, experts // 2] = -1
    indices = preference.topk(top_k).indices
    if kind == "sentinels":
        indices[::4, 0] = experts
        indices[1 % tokens] = -1
    return indices


def choose(kind, tokens, experts, top_k):
    """indices [tokens, top_k] int64 of a routing of this kind, each row without a repeated expert."""
    if kind == "one-takes-all":  # every token's first slot
        others = torch.rand(tokens, experts - 1).argsort(-1)[:, : top_k - 1] + 1
        return torch.cat((torch.zeros(tokens, 1, dtype=torch.long), others), -1)
    preference = torch.rand(tokens, experts)
    if kind == "skewed":
        preference += torch.linspace(2, 0, experts)
    if kind == "empty":  # the first, the last and a middle expert get nothing
        preference[:, [0, experts // 2, experts - 1]] = -1
    indices = preference.topk(top_k).indices
    if kind == "sentinels":
        indices[::4, 0] = experts
        indices[5, 1], indices[6] = -1, experts + 9
    return indices


class Layer:
    """Operands of one layer at the scale of a trained one, on the device, and what float64 makes of them."""

    def __init__(self, tokens, hidden, inner, experts, top_k, dtype=torch.float32, kind="uniform", magnitude=1.0):
        self.x = (torch.randn(tokens, hidden) * magnitude).to(dtype)
        self.gate_up = (torch.randn(experts, 2 * inner, hidden) / hidden**0.5).to(dtype)
        self.down = (torch.randn(experts, hidden, inner) / inner**0.5).to(dtype)
        self.indices = make_indices(kind, tokens, experts, top_k).int()
        self.weights = torch.rand(tokens, top_k)
        self.dy = torch.randn(tokens, hidden).to(dtype)
        for name, value in vars(self).items():
            setattr(self, name, value.to(DEVICE))

    def operands(self, recipe="bf16", scale="fp32"):
        """gate_up and down as the recipe multiplies them, with `scale` for blocks."""
        recipe = RECIPES[recipe]
        operands = [Operand.quantized(w, recipe, scale) for w in (self.gate_up, self.down)]
        return [w.with_transposed() for w in operands] if recipe.input_gradient else operands

    def expected(self, recipe="bf16", scale="fp32"):
        """y and the four gradients in float64, by the names in OUTPUTS."""
        gate_up, down = self.gate_up, self.down
        group = 128
        if recipe != "bf16":
            gate_up, down = (w.dequantized(torch.bfloat16) for w in self.operands(recipe, scale))
            group = None if recipe == "fp8_channel" else 128
        leaves = [t.double().requires_grad_() for t in (self.x, self.weights, gate_up, down)]
        x, weights, gate_up, down = leaves
        cast = (lambda rows: _Cast.apply(rows, group, scale, self.x.dtype)) if recipe != "bf16" else (lambda rows: rows)
        y, rows = 0 * x, cast(x)
        for e in range(gate_up.shape[0]):
            token, slot = (self.indices == e).nonzero(as_tuple=True)
            if len(token):
                gate, up = (rows[token] @ gate_up[e].T).chunk(2, -1)
                out = cast(F.silu(gate) * up) @ down[e].T
                y = y.index_add(0, token, out * weights[token, slot, None])
        gradients = torch.autograd.grad(y, leaves, self.dy.double(), materialize_grads=True)
        return dict(zip(OUTPUTS, (y.detach(), *gradients), strict=True))


class _Cast(torch.autograd.Function):
    """Quantize and dequantize rows; the gradient passes through."""

    @staticmethod
    def forward(ctx, rows, group, scale, dtype):
        q, s = fp8.quantize_fp8_tokens(rows.to(dtype), group=group, scale=scale if group else "fp32")
        return fp8.dequantize_fp8(q, s, block=(1, group or rows.shape[1]), dtype=dtype).to(rows.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None, None
