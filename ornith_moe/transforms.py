"""What torch.func and forward-mode differentiation see of the operators of `ornith_moe.ops`.

The autograd formula of a registered operator is refused by torch.func, and forward mode drops its tangents without a
word. So while a transform or a dual level is active, an operator runs inside of an `autograd.Function`, which both
know:

    grad, vjp, jacrev, and vmap of them     the kernels, with the gradient that autograd gives
    vmap, is_grads_batched                  one call per sample, stacked
    jvp, jacfwd, hessian, linearize, duals  refused: there is no formula for a tangent
    a gradient of a gradient                refused, as everywhere

What is refused works with `ornith_moe.backend.reference.moe_mlp_reference`. `ornith_moe.route` needs none
of this: there the torch code of `ornith_moe.backend.routing_torch` takes the place of the operator, and it can be
differentiated in every way.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform of torch.func or a forward-mode level is on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def once(ctx: Any, *_: Any) -> NoReturn:
    """The gradient of a backward operator."""
    raise RuntimeError(
        "moe_mlp: its gradient cannot be differentiated again, got create_graph=True or a second backward; "
        "use create_graph=False, or ornith_moe.backend.reference.moe_mlp_reference where a second derivative is needed"
    )


def no_tangent(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "moe_mlp: it has no forward-mode derivative, got a tangent (jvp, jacfwd, hessian, linearize or a dual tensor); "
        "use grad, vjp or jacrev, or ornith_moe.backend.reference.moe_mlp_reference where a tangent is needed"
    )


def per_sample(call: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule for `call`: one call per sample, results stacked in front."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def sample(i: int) -> list[Any]:
            return [a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)]

        # a list argument has a list of Nones
        dims = [d if isinstance(a, torch.Tensor) else None for a, d in zip(args, in_dims, strict=True)]
        results = list(zip(*(call(*sample(i)) for i in range(info.batch_size)), strict=True))
        stacked = tuple(None if each[0] is None else torch.stack(each) for each in results)
        return stacked, tuple(None if each is None else 0 for each in stacked)

    return rule


def as_function(
    operator: Any, context: Callable[..., None] | None, gradient: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """`operator` as a Function that torch.func and forward mode know; context and gradient as `register_autograd`."""
    members: dict[str, Callable[..., Any]] = {
        "forward": lambda *args: operator(*args),
        "setup_context": context or (lambda ctx, inputs, output: None),
        "backward": gradient,
        "jvp": no_tangent,
    }
    function: Any = type(
        operator.__name__, (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()}
    )
    function.vmap = staticmethod(per_sample(function.apply))
    return function
