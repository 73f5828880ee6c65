"""Inputs of the routed experts, their true result, and how far an implementation is from it.

    y[t] = sum over k of weights[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])),  e = indices[t, k]

The truth is a loop over experts in FP32 (float64 where asked), one at a time, on the very operands of the case; nothing
is quantized in it, so the error of an FP8 recipe is what the recipe costs. What ours makes of a recipe is compared with
the project's reference of that recipe too, whose quantization is right by other tests.

T tokens, E experts, H hidden, I expert intermediate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ornith_moe.bench.numeric import TOLERANCE, relative_rms
from ornith_moe.bench.shapes import Experts, route

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OUTPUTS = ("y", "dx", "dweights", "dgate_up", "ddown")
FP8_TOLERANCE = 0.1  # to the truth; measured 0.053 to 0.073 on normal data: operands with three bits of mantissa
RECIPE_TOLERANCE = 0.04  # of y to the reference of the recipe, which rounds the activation once less; measured 0.023
PEERS_ALLOWANCE = 3  # they may round where ours does not
KEPT_BYTES = 1 << 30  # of true weight gradients; of more experts a sample is checked


class Case(NamedTuple):
    """x [T, H], indices [T, top_k], weights [T, top_k], gate_up_proj [E, 2I, H], down_proj [E, H, I], dy [T, H]."""

    x: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    dy: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What has a gradient, in the order of OUTPUTS."""
        return self.x, self.weights, self.gate_up_proj, self.down_proj

    def flops(self, backward: bool) -> int:
        """6 T top_k H I forward, without padding or recomputation, and three times that with backward."""
        return 6 * self.indices.numel() * self.x.shape[1] * self.down_proj.shape[2] * (3 if backward else 1)

    def least_bytes(self, backward: bool, weight_bytes: int) -> int:
        """Active experts once at `weight_bytes` a weight, x and y; with backward them twice, and a dense gradient."""
        per_expert = self.gate_up_proj[0].numel() + self.down_proj[0].numel()
        active = self.indices.unique().numel() * per_expert * weight_bytes
        total = active * (2 if backward else 1) + 2 * self.x.nbytes
        return total + (self.gate_up_proj.nbytes + self.down_proj.nbytes if backward else 0)


@lru_cache(maxsize=1)  # up to gigabytes; the cases of one model follow one another
def make_experts(shape: Experts, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up_proj and down_proj at the scale of trained ones."""
    hidden, inner, experts, _ = shape
    gate_up_proj = torch.randn(experts, 2 * inner, hidden, dtype=dtype, device=device).mul_(hidden**-0.5)
    down_proj = torch.randn(experts, hidden, inner, dtype=dtype, device=device).mul_(inner**-0.5)
    return gate_up_proj.requires_grad_(), down_proj.requires_grad_()


def make_case(shape: Experts, tokens: int, routing: str, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Normal x and dy, and weights of each token that add up to 1."""
    x, dy = (torch.randn(tokens, shape.hidden, dtype=dtype, device=device) for _ in range(2))
    indices = route(routing, tokens, shape, device)
    weights = torch.rand(tokens, shape.top_k, device=device).add_(0.1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    return Case(x.requires_grad_(), indices, weights.requires_grad_(), *make_experts(shape, dtype, device), dy)


@dataclass(frozen=True)
class Truth:
    """The outputs of a case by the names of OUTPUTS; the weights' gradients of the `experts` that are checked.

    An element of dweights is a dot product of a row of dy with what an expert gave. It may cancel to nothing, and does
    where a case has one token, so its error is relative to `dots`, the size |dy| |out| / sqrt(H) of such a product.
    """

    outputs: dict[str, torch.Tensor]
    experts: list[int]
    dots: torch.Tensor

    def errors(self, outputs: Sequence[torch.Tensor]) -> dict[str, float]:
        """Relative RMS of what an implementation gave, y alone or with the four gradients."""
        checked = [t.detach() if t.dim() < 3 else t[self.experts] for t in outputs]
        pairs = zip(self.outputs.items(), checked, strict=False)
        found = {name: relative_rms(actual, expected) for (name, expected), actual in pairs}
        if "dweights" in found:
            size = self.outputs["dweights"].double().norm() / self.dots.double().norm()
            found["dweights"] *= size.item()
        return found


def true_outputs(case: Case, backward: bool, dtype: torch.dtype = torch.float32, recipe: str | None = None) -> Truth:
    """The loop over experts in `dtype`; with `recipe` by the project's reference of it."""
    count, per_expert = len(case.down_proj), case.gate_up_proj[0].numel() + case.down_proj[0].numel()
    kept = min(count, max(1, KEPT_BYTES // (per_expert * dtype.itemsize)))
    checked = [i * count // kept for i in range(kept)] if backward else []
    totals = [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (case.x, case.x, case.weights)]
    dots, dy_norm = totals[2].clone(), case.dy.to(dtype).norm(dim=1, keepdim=True) * case.x.shape[1] ** -0.5
    gradients: dict[str, list[torch.Tensor]] = {"dgate_up": [], "ddown": []}
    for e in range(count):
        only_e = torch.where(case.indices == e, 0, -1)
        if not (only_e == 0).any() and e not in checked:
            continue
        sides = (case.gate_up_proj[e : e + 1], case.down_proj[e : e + 1])
        leaves = [t.detach().to(dtype).requires_grad_() for t in (case.x, case.weights, *sides)]
        y = _one_expert(leaves, only_e, recipe)
        totals[0] += y.detach()
        dots += torch.where(only_e == 0, y.detach().norm(dim=1, keepdim=True) * dy_norm / leaves[1].detach(), 0)
        if backward:
            made = torch.autograd.grad(y, leaves, case.dy.to(dtype), materialize_grads=True)
            totals[1] += made[0]
            totals[2] += made[1]
            if e in checked:
                gradients["dgate_up"].append(made[2][0])
                gradients["ddown"].append(made[3][0])
    stacked = [torch.stack(gradients[name]) for name in OUTPUTS[3:]] if backward else []
    names = OUTPUTS if backward else OUTPUTS[:1]
    return Truth(dict(zip(names, [*totals[: 3 if backward else 1], *stacked], strict=True)), checked, dots)


def _one_expert(leaves: Sequence[torch.Tensor], indices: torch.Tensor, recipe: str | None) -> torch.Tensor:
    """What one expert adds to y; `indices` is 0 where a token goes to it."""
    if recipe is not None:
        import ornith_moe as om

        return om.moe_mlp(leaves[0], indices, *leaves[1:], recipe=recipe, backend="reference")
    x, weights, gate_up, down = leaves
    token, slot = (indices == 0).nonzero(as_tuple=True)
    gate, up = (x[token] @ gate_up[0].T).chunk(2, -1)
    out = (F.silu(gate) * up) @ down[0].T
    return torch.zeros_like(x).index_add(0, token, out * weights[token, slot, None])


def allowed_error(dtype: torch.dtype, recipe: str, peer: bool) -> float:
    """How far from the truth a right result may be."""
    return FP8_TOLERANCE if recipe != "bf16" else TOLERANCE[dtype] * (PEERS_ALLOWANCE if peer else 1)


def worst(errors: dict[str, float], allowed: float) -> float:
    """The largest error; AssertionError where it is not below `allowed`, or is a NaN."""
    name = max(errors, key=lambda each: (errors[each] != errors[each], errors[each]))
    assert errors[name] < allowed, f"{name}: relative RMS error {errors[name]:.2e}, allowed {allowed:.0e}"
    return errors[name]


def outputs_of(forward: Any, case: Case, backward: bool) -> tuple[torch.Tensor, ...]:
    """One step: y, and the gradients of x, weights and both projections."""
    with torch.set_grad_enabled(backward):
        y = forward()
        return (y.detach(), *(torch.autograd.grad(y, case.leaves, case.dy) if backward else ()))
