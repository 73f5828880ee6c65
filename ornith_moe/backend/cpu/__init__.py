"""The routed-experts MLP on a CPU, forward and a hand-written backward: the default where there is no GPU.

    pre = x[token] @ gate_up[e]^T      a' = silu(gate) * up      y[t] = sum of weights[t, k] * (a' @ down[e]^T)

    forward     gate_up: pre, a'  ->  down: y
    backward    activation_gradient: dweights, wa, dpre  ->  weight_gradient: ddown = dy^T wa, dgate_up = dpre^T x
                                                         ->  input_gradient: dx

Files: `register_tiles` (products), `rows` (formats), `forward` and `backward` (kernels), `native` (one call each),
`loop` (the same in torch), `routed` (the sort), `memory` (lazily zero gradients), `machine` (threads, the probe).
float32 and BF16 go through our kernels; float16 and float64 through `loop`, and so do experts with many rows where the
machine's torch.mm is much faster (AMX; `machine.torch_wins`).

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

from typing import NamedTuple

import torch

from ornith_moe.backend.cpu import loop, native
from ornith_moe.backend.cpu.machine import describe, torch_wins
from ornith_moe.backend.cpu.native import Weights
from ornith_moe.backend.cpu.routed import group_by_expert, regroup
from ornith_moe.quant.fp8 import roundtrip_fp8_tokens

__all__ = ["RECIPES", "Saved", "Weights", "describe", "moe_backward", "moe_forward"]

RECIPES = ("bf16", "fp8", "fp8_full", "fp8_channel")
_GROUP = 128
_MANY_ROWS = 32  # per expert, from which torch.mm may be preferred


class Saved(NamedTuple):
    """What backward needs besides the operands; sizes follow from the shapes of the operands alone."""

    pre: torch.Tensor  # [T * top_k, 2I] in d, rows sorted by expert; past offsets[E] undefined
    row_to_slot: torch.Tensor  # [T * top_k] int32, -1 past offsets[E]
    offsets: torch.Tensor  # [E + 1] int32, exclusive


def moe_forward(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Weights,
    down: Weights,
    *,
    recipe: str = "bf16",
    save: bool = False,
) -> tuple[torch.Tensor, Saved | None]:
    """y = sum over k of weights[:, k] * down(silu(gate(x)) * up(x)) of the experts in `indices`.

    Args:
        x: [T, H] float32, bfloat16, float16 or float64: d.
        indices: [T, top_k] integers; ids outside [0, E) are skipped. weights: [T, top_k] floating point.
        gate_up: Weights [E, 2I, H], gate rows first. down: Weights [E, H, I]. In d, or in e4m3fn with scales.
        recipe: see the module. The FP8 recipes want FP8 weights; scales in UE8M0 bring those of x and a' with them.
        save: give what `moe_backward` needs.

    Returns:
        y [T, H] in d, and Saved or None.

    Raises:
        ValueError: an unknown recipe; an FP8 recipe with weights that have no scales; "fp8" or "fp8_full" with an I
            that is no multiple of 128.

    Numerics: the module and docs/numerics.md; deterministic for any number of threads.

    Example:
        >>> import torch
        >>> from ornith_moe.backend.cpu import Weights, moe_forward
        >>> w13, w2 = torch.ones(3, 8, 2), torch.ones(3, 2, 4)
        >>> moe_forward(torch.ones(1, 2), torch.tensor([[2]]), torch.tensor([[0.5]]), Weights(w13), Weights(w2))[0]
        tensor([[7.0464, 7.0464]])
    """
    _check(recipe, gate_up, down)
    rows = group_by_expert(indices, down.value.shape[0])
    engine = _engine(x, rows, gate_up, down)
    cast = _cast(recipe, gate_up)
    a, pre = engine.gate_up(cast(x), rows, gate_up, save)
    if recipe != "bf16":
        a[: rows.used] = cast(a[: rows.used])
    y = engine.down(a, rows, weights, down)
    return y, Saved(pre, rows.row_to_slot, rows.offsets) if save else None


def moe_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weights: torch.Tensor,
    saved: Saved,
    gate_up: Weights,
    down: Weights,
    *,
    recipe: str = "bf16",
    wants: tuple[bool, bool, bool, bool] = (True,) * 4,
    grad_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, weights, gate_up and down; `wants` says which, and what nobody wants is not computed.

    Args:
        dy: [T, H] in d. x: as in the forward, or None where dgate_up is not wanted.
        weights, gate_up, down, recipe: as in the forward.
        saved: what `moe_forward` gave.
        grad_dtypes: of dgate_up and ddown; d where None.

    Returns:
        dx [T, H] in d, dweights [T, top_k] float32, dgate_up [E, 2I, H], ddown [E, H, I]; None where not wanted.
        The memory of weight gradients appears when it is written: that of an expert without rows is never touched.

    Numerics: as the forward. A sum over the rows of an expert depends on their number and order, nothing else does.

    Example:
        >>> import torch
        >>> from ornith_moe.backend.cpu import Weights, moe_backward, moe_forward
        >>> x, weights = torch.ones(1, 2), torch.tensor([[0.5]])
        >>> w13, w2 = Weights(torch.ones(3, 8, 2)), Weights(torch.ones(3, 2, 4))
        >>> y, saved = moe_forward(x, torch.tensor([[2]]), weights, w13, w2, save=True)
        >>> moe_backward(torch.ones(1, 2), x, weights, saved, w13, w2, wants=(False, True, False, False))[1]
        tensor([[28.1855]])
    """
    wants_dx, wants_dweights, wants_dgate_up, wants_ddown = wants
    _check(recipe, gate_up, down)
    rows = regroup(saved.offsets, saved.row_to_slot, *weights.shape)
    engine = _engine(dy, rows, gate_up, down)
    cast, full = _cast(recipe, gate_up), recipe == "fp8_full"
    a_given = None
    if recipe != "bf16":
        a_given = torch.zeros_like(saved.pre[:, : down.value.shape[2]])
        a_given[: rows.used] = cast(_activation(saved.pre[: rows.used]))
    dweights, wa, dpre = engine.activation_gradient(
        cast(dy) if full else dy, rows, weights, down, saved.pre, a_given,
        (wants_dweights, wants_ddown, wants_dx or wants_dgate_up),
    )  # fmt: skip
    ddown = dgate_up = dx = None
    if wants_ddown:
        dtype = grad_dtypes[1] or dy.dtype
        ddown = _weight_gradient(engine, dy, wa, (True, False), rows, down.value.shape, dtype)
    del wa
    if wants_dgate_up:
        dtype = grad_dtypes[0] or dy.dtype
        dgate_up = _weight_gradient(engine, dpre, cast(x), (False, True), rows, gate_up.value.shape, dtype)
    if wants_dx:
        if full:
            dpre[: rows.used] = cast(dpre[: rows.used])
        dx = engine.input_gradient(dpre, rows, gate_up)
    return dx, dweights, dgate_up, ddown


def _weight_gradient(engine, left, right, gathered, rows, shape, dtype):
    if engine is native and dtype not in (torch.float32, torch.bfloat16):
        return native.weight_gradient(left, right, gathered, rows, shape, torch.float32).to(dtype)
    return engine.weight_gradient(left, right, gathered, rows, shape, dtype)


def _engine(x, rows, *weights):
    if not native.serves(x, *weights):
        return loop
    many = x.dtype == torch.bfloat16 and rows.used >= _MANY_ROWS * max(len(rows.active), 1)
    return loop if many and torch_wins() else native


def _cast(recipe, weight):
    """What the recipe does to activations: a function of rows."""
    if recipe == "bf16":
        return lambda rows: rows
    if recipe == "fp8_channel":
        return lambda rows: roundtrip_fp8_tokens(rows, group=None)
    scale = "ue8m0" if weight.scale.dtype in (torch.uint8, torch.float8_e8m0fnu) else "fp32"
    return lambda rows: roundtrip_fp8_tokens(rows, group=_GROUP, scale=scale)


def _activation(pre):
    gate, up = pre.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(pre.dtype)


def _check(recipe, gate_up, down):
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    if recipe == "bf16":
        return
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if weight.scale is None:
            got = weight.value.dtype
            raise ValueError(f"{name}: recipe {recipe!r} expects e4m3fn values with scales, got {got} without")
    if recipe != "fp8_channel" and down.value.shape[2] % _GROUP:
        raise ValueError(
            f"recipe: {recipe!r} needs an expert intermediate size in multiples of {_GROUP}, or a block would hold rows"
            f" of gate and of up, got I = {down.value.shape[2]}; use recipe='fp8_channel' or 'bf16'"
        )
