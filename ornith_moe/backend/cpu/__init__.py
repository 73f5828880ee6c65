"""The routed-experts MLP on a CPU, forward and a hand-written backward: the default where there is no GPU.

    pre = x[token] @ gate_up[e]^T      a' = silu(gate) * up      y[t] = sum of weights[t, k] * (a' @ down[e]^T)

    forward     gate_up: pre, a'  ->  down: y
    backward    activation_gradient: dweights, wa, dpre  ->  weight_gradient: ddown = dy^T wa, dgate_up = dpre^T x
                                                         ->  input_gradient: dx

Files: `register_tiles` (products), `rows` (formats), `forward` and `backward` (kernels), `native` (one call each),
`loop` (the same in torch), `routed` (the sort), `memory` (lazily zero gradients), `machine` (threads), `probe`.
float32 and BF16 go through our kernels; float16 and float64 through `loop`, and so do experts with many rows where the
machine's torch.mm is much faster (AMX; `probe.torch_wins`).

What is not done, because on a CPU it is what costs: x and dy are not gathered, nothing of size T * top_k * H exists,
FP8 weights are decoded into cache four rows at a time, gradients are written once and into lazily zero memory, so an
expert without rows costs nothing. A gradient that is not wanted skips its work: all of da' where only ddown is wanted.

Recipes (d is the dtype of x; * means quantized and dequantized to d, with the bits of `quant.fp8`):

| recipe | x, a' | weights | dgrad | wgrad |
|---|---|---|---|---|
| bf16 | d | d, or d(e4m3 * scale) | d | d |
| fp8 | * per 1x128 | d(e4m3 * scale), 128x128 | dy by weights | dy by a'*, dpre by x* |
| fp8_full | as fp8 | as fp8 | dy*, dpre* by weights | as fp8 |
| fp8_channel | * per row | d(e4m3 * scale), per row | as fp8 | as fp8 |

Precision: docs/numerics.md. Sums are float32, each in an order that follows from the shapes: no thread count and no
repetition changes a bit of y, and no other token does, except in BF16 where the experts of a call have 256 rows or more
on average (`native`, or `loop` on AMX from 32): those rows sum in another order. The kernels compile at their first
use (numba; once per machine where the cache can be written).

Letters: T tokens, E experts, H hidden, I expert intermediate.
Source: the router gradient from <da', a'> is SonicMoE's observation (Guo et al. 2025); the rest is original.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from ornith_moe.backend.cpu import loop, native
from ornith_moe.backend.cpu.native import Native
from ornith_moe.backend.cpu.probe import bf16_kind, describe, torch_wins
from ornith_moe.backend.cpu.register_tiles import FP32
from ornith_moe.backend.cpu.routed import RoutedRows, group_by_expert, regroup
from ornith_moe.backend.protocol import Backend, Gradients, Saved, Sizes
from ornith_moe.backend.routing_torch import route_backward, route_forward
from ornith_moe.quant.fp8 import roundtrip_fp8_tokens
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import Cast, Recipe

__all__ = ["BACKEND", "Cpu", "describe"]

_MANY_ROWS = 32  # per expert, from which torch.mm may be preferred


class Cpu:
    """The backend of this name; x in float32, bfloat16, float16 or float64: d.

    The memory of a weight gradient appears when it is written: that of an expert without rows is never touched. A sum
    over the rows of an expert depends on their number and order, nothing else does.

    Example:
        >>> import torch
        >>> from ornith_moe.backend.cpu import Cpu
        >>> from ornith_moe.quant.operand import Operand
        >>> from ornith_moe.quant.recipes import recipe_of
        >>> x, indices, weights = torch.ones(1, 2), torch.tensor([[2]]), torch.tensor([[0.5]])
        >>> sides = Operand(torch.ones(3, 8, 2)), Operand(torch.ones(3, 2, 4))
        >>> y, saved = Cpu.moe_forward(x, indices, weights, *sides, recipe=recipe_of("bf16"), save=True)
        >>> y
        tensor([[7.0464, 7.0464]])
        >>> needs_grad, recipe = (False, True, False, False), recipe_of("bf16")
        >>> Cpu.moe_backward(
        ...     torch.ones(1, 2), None, indices, weights, saved, *sides, recipe=recipe, needs_grad=needs_grad
        ... )[1]
        tensor([[28.1855]])
    """

    transposes = False
    recomputes = False
    takes_float64 = True
    is_batch_invariant = False
    route_forward = staticmethod(route_forward)
    route_backward = staticmethod(route_backward)

    @staticmethod
    def moe_forward(
        x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: Operand, down: Operand, *,
        recipe: Recipe, save: bool = False, batch_invariant: bool = False,
    ) -> tuple[torch.Tensor, Saved]:  # fmt: skip
        """As `Backend.moe_forward`.

        Raises:
            ValueError: a recipe that casts weights without scales, or an I that it does not take.
        """
        _check(recipe, gate_up, down)
        rows = group_by_expert(indices, down.value.shape[0])
        engine = _engine(x, rows, gate_up, down)
        cast = _cast(recipe.activations, gate_up)
        a, pre = engine.gate_up(cast(x), rows, gate_up, save)
        if recipe.activations:
            a[: rows.used] = cast(a[: rows.used])
        y = engine.down(a, rows, weights, down)
        return y, Saved(pre, rows.row_to_slot, rows.offsets) if save else Saved()

    @staticmethod
    def moe_backward(
        dy: torch.Tensor, x: torch.Tensor | None, indices: torch.Tensor, weights: torch.Tensor, saved: Saved,
        gate_up: Operand, down: Operand, *, recipe: Recipe,
        needs_grad: tuple[bool, bool, bool, bool] = (True, True, True, True),
        grad_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None), batch_invariant: bool = False,
    ) -> Gradients:  # fmt: skip
        """As `Backend.moe_backward`; dweights is float32."""
        needs_dx, needs_dweights, needs_dgate_up, needs_ddown = needs_grad
        _check(recipe, gate_up, down)
        pre, row_to_slot, offsets, _ = saved
        assert pre is not None and row_to_slot is not None and offsets is not None
        rows = regroup(offsets, row_to_slot, *weights.shape)
        engine = _engine(dy, rows, gate_up, down)
        cast, cast_gradient = (_cast(each, gate_up) for each in (recipe.activations, recipe.input_gradient))
        a_given = None
        if recipe.activations:
            a_given = torch.zeros_like(pre[:, : down.value.shape[2]])
            a_given[: rows.used] = cast(_activation(pre[: rows.used]))
        dweights, wa, dpre = engine.activation_gradient(
            cast_gradient(dy), rows, weights, down, pre, a_given,
            (needs_dweights, needs_ddown, needs_dx or needs_dgate_up),
        )  # fmt: skip
        ddown = dgate_up = dx = None
        if needs_ddown:
            assert wa is not None
            dtype = grad_dtypes[1] or dy.dtype
            ddown = engine.weight_gradient(dy, wa, (True, False), rows, down.value.shape, dtype)
        del wa
        if needs_dgate_up:
            assert x is not None and dpre is not None
            dtype = grad_dtypes[0] or dy.dtype
            dgate_up = engine.weight_gradient(dpre, cast(x), (False, True), rows, gate_up.value.shape, dtype)
        if needs_dx:
            assert dpre is not None
            if recipe.input_gradient:
                dpre[: rows.used] = cast_gradient(dpre[: rows.used])
            dx = engine.input_gradient(dpre, rows, gate_up)
        return dx, dweights, dgate_up, ddown

    @staticmethod
    def saved_sizes(slots: int, experts: int, inner: int, recipe: Recipe, dtype: torch.dtype) -> Sizes:
        return {
            "pre": ((slots, 2 * inner), dtype),
            "row_to_slot": ((slots,), torch.int32),
            "offsets": ((experts + 1,), torch.int32),
        }


BACKEND: Backend = Cpu()


def _engine(x: torch.Tensor, rows: RoutedRows, *weights: Operand) -> Native | ModuleType:
    """What takes the five steps: our kernels, or `loop`, which has the same five functions."""
    if not native.serves(x, *weights):
        return loop
    many = x.dtype == torch.bfloat16 and rows.used >= _MANY_ROWS * max(len(rows.active), 1)
    if many and torch_wins():
        return loop
    return Native(FP32 if x.dtype == torch.float32 else bf16_kind())


def _cast(cast: Cast | None, weight: Operand) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `cast` makes of rows that meet `weight`."""
    if cast is None:
        return lambda rows: rows
    return lambda rows: roundtrip_fp8_tokens(rows, group=cast[1], scale=weight.scale_of_activations)


def _activation(pre: torch.Tensor) -> torch.Tensor:
    gate, up = pre.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(pre.dtype)


def _check(recipe: Recipe, gate_up: Operand, down: Operand) -> None:
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if recipe.is_fp8 and weight.scale is None:
            got = weight.value.dtype
            raise ValueError(f"{name}: recipe {recipe.name!r} expects e4m3fn values with scales, got {got} without")
    recipe.check(down.value.shape[2])
