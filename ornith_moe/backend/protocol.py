"""What a backend is: one Protocol, which `triton`, `cpu` and `reference` fill, and the way from a name to one of them.

`ornith_moe.ops` calls a backend through it and knows no other difference between them; `ornith_moe.backend.choice` says
which one computes here. Loading a backend imports what it computes with, so it is loaded by the first call that it
serves, and its sizes and traits are known without a GPU, for tensors on "meta".

Letters: T tokens, E experts, H hidden, I expert intermediate, R slots (T * top_k).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import NamedTuple, Protocol

import torch

from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import Recipe

NAMES = ("triton", "cpu", "reference")

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Saved(NamedTuple):
    """What backward needs besides the operands; None where a backend keeps nothing of it.

    pre: [R, 2I] in the dtype of x, gate and up before the activation, rows sorted by expert.
    row_to_slot: [R] int32, -1 past the last routed row. offsets: [E + 1] int32, exclusive.
    a_scale: [R, 1] float32, of the activations, where a row has one scale.
    """

    pre: torch.Tensor | None = None
    row_to_slot: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    a_scale: torch.Tensor | None = None


class Backend(Protocol):
    """One implementation of the routed experts and of routing.

    Attributes:
        transposes: an FP8 gradient of the input reads the transposed pair of an `Operand`.
        recomputes: backward needs x whatever gradient is asked for; else only for that of gate_up.
        takes_float64: x may be float64, with a recipe that casts nothing.
        is_batch_invariant: it can promise that a token's bits do not follow its batch.
    """

    transposes: bool
    recomputes: bool
    takes_float64: bool
    is_batch_invariant: bool

    def moe_forward(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        gate_up: Operand,
        down: Operand,
        *,
        recipe: Recipe,
        save: bool = False,
        batch_invariant: bool = False,
    ) -> tuple[torch.Tensor, Saved]:
        """y = sum over k of weights[:, k] * down(silu(gate(x)) * up(x)) of the experts in `indices`.

        Args:
            x: [T, H]. indices: [T, top_k] integers; ids outside [0, E) are skipped. weights: [T, top_k] floating point.
            gate_up, down: Operands [E, 2I, H] and [E, H, I], in the dtype of x or FP8; FP8 if the recipe casts weights.
                Activations get UE8M0 scales where gate_up has them.
            save: give what `moe_backward` needs. batch_invariant: only where `is_batch_invariant`.
        Returns:
            y [T, H] in the dtype of x; and Saved, of the sizes that `saved_sizes` tells.
        """
        ...

    def moe_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor | None,
        indices: torch.Tensor,
        weights: torch.Tensor,
        saved: Saved,
        gate_up: Operand,
        down: Operand,
        *,
        recipe: Recipe,
        needs_grad: tuple[bool, bool, bool, bool] = (True, True, True, True),
        grad_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
        batch_invariant: bool = False,
    ) -> Gradients:
        """Gradients of x, weights, gate_up and down; `needs_grad` says which, the others are None and not computed.

        Args:
            dy: [T, H] in the dtype of x. x: as in the forward, or None where it is not needed (`recomputes`).
            grad_dtypes: of the gradients of gate_up and down, a wish that the caller casts to; None: that of x.
        """
        ...

    def saved_sizes(self, slots: int, experts: int, inner: int, recipe: Recipe, dtype: torch.dtype) -> Sizes:
        """{field of Saved: (shape, dtype)} of what `moe_forward` saves of R slots, E experts, I and the dtype of x."""
        ...

    def route_forward(
        self, logits: torch.Tensor, top_k: int, *, score: str, norm_topk_prob: bool, bias: torch.Tensor | None,
        n_group: int | None, topk_group: int | None, replay: torch.Tensor | None, losses: bool,
    ) -> Routed:  # fmt: skip
        """As `ornith_moe.backend.routing_torch.route_forward`, which defines it."""
        ...

    def route_backward(
        self, logits: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, dweights: torch.Tensor,
        dq_sum: torch.Tensor | None, dsquare_sum: torch.Tensor | None, *, score: str, norm_topk_prob: bool,
    ) -> torch.Tensor:  # fmt: skip
        """As `ornith_moe.backend.routing_torch.route_backward`."""
        ...


@cache
def load(name: str) -> Backend:
    """The backend called `name`, one of NAMES."""
    return import_module(f"ornith_moe.backend.{name}").BACKEND
