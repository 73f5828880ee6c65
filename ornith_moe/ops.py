"""The operators `ornith::moe_mlp` and `ornith::route`: what the dispatcher, autograd and `torch.compile` see of us.

    moe_mlp          -> y, and what its backward needs     autograd calls moe_mlp_backward with it
    route            -> indices, weights, counts, sums     autograd calls route_backward

Each is one opaque operator for all three backends, so that a graph holds one node where a kernel, a loop or a quantizer
runs, and its backward another. An argument says which backend; schemas hold tensors and plain values only. Every size
follows from the sizes of the arguments, also with a dynamic T. The backward of the experts cannot be differentiated
again; torch.func and forward mode are `ornith_moe.transforms`.

The public functions are `ornith_moe.moe_mlp` and `ornith_moe.route`; they check what is passed on here. The weights
pass through as the objects they are, which is how `ornith_moe.fp8_weights` knows those it quantized.

A gradient that nobody needs is not computed: `needs_grad` says which of x, weights, gate_up_proj and down_proj, from
autograd's `needs_input_grad`; the others have no elements. x is kept for backward only where gate_up_proj needs its
gradient, or where the backend recomputes from it.

Flop counters (torch.utils.flop_counter) see the matrix products of both passes.

The gradient of a weight has the dtype of the weight, or of its `grad_dtype` where that is set: fp32 gradients for BF16
parameters, and for FP8 ones, which have to say so. AOTAutograd of torch 2.13 forgets `grad_dtype`, and would round the
gradient of an FP8 weight to FP8; so that one is refused under `torch.compile`.

Letters: T tokens, E experts, H hidden, I expert intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from ornith_moe import transforms
from ornith_moe.backend import routing_torch
from ornith_moe.backend.protocol import Saved, Sizes, load
from ornith_moe.fp8_weights import quantized_weights
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import recipe_of


class _Forward(NamedTuple):
    """The arguments of `moe_mlp`; a schema is flat, and so is what the dispatcher and autograd hand over."""

    x: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    recipe: str
    scale: str
    batch_invariant: bool
    backend: str
    save: bool


class _Backward(NamedTuple):
    """The arguments of `moe_mlp_backward`."""

    dy: torch.Tensor
    x: torch.Tensor | None
    indices: torch.Tensor
    weights: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    pre: torch.Tensor
    row_to_slot: torch.Tensor
    offsets: torch.Tensor
    a_scale: torch.Tensor
    recipe: str
    scale: str
    batch_invariant: bool
    backend: str
    needs_grad: list[bool]
    gate_up_dtype: torch.dtype
    down_dtype: torch.dtype


class _Route(NamedTuple):
    """The arguments of `route`; all but the last are those of `routing_torch.route`."""

    logits: torch.Tensor
    bias: torch.Tensor | None
    replay: torch.Tensor | None
    top_k: int
    score: str
    norm_topk_prob: bool
    n_group: int | None
    topk_group: int | None
    losses: bool
    backend: str


class _RouteBackward(NamedTuple):
    """The arguments of `route_backward`."""

    logits: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    dweights: torch.Tensor
    dq_sum: torch.Tensor | None
    dsquare_sum: torch.Tensor | None
    score: str
    norm_topk_prob: bool
    backend: str


_TYPES = {  # as a schema spells them
    "torch.Tensor": "Tensor",
    "torch.Tensor | None": "Tensor?",
    "int | None": "int?",
    "list[bool]": "bool[]",
    "torch.dtype": "ScalarType",
}
_OPERATORS = {
    "moe_mlp": (_Forward, "(Tensor y, Tensor pre, Tensor row_to_slot, Tensor offsets, Tensor a_scale)"),
    "moe_mlp_backward": (_Backward, "(Tensor dx, Tensor dweights, Tensor dgate_up_proj, Tensor ddown_proj)"),
    "route": (_Route, "(Tensor weights, Tensor indices, Tensor counts, Tensor? q_sum, Tensor? square_sum)"),
    "route_backward": (_RouteBackward, "Tensor dlogits"),
}
_library = torch.library.Library("ornith", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
for _name, (_arguments, _results) in _OPERATORS.items():
    _kinds = {name: kind.__forward_arg__ for name, kind in _arguments.__annotations__.items()}
    _schema = ", ".join(f"{_TYPES.get(kind, kind)} {name}" for name, kind in _kinds.items())
    _library.define(f"{_name}({_schema}) -> {_results}", tags=_tags)


def _implements(name: str) -> Callable:
    return torch.library.impl(f"ornith::{name}", "default", lib=_library)


def _sizes(name: str) -> Callable:
    return torch.library.register_fake(f"ornith::{name}", lib=_library)


@_implements("moe_mlp")
def _moe_mlp(*args: Any) -> tuple[torch.Tensor, ...]:
    given = _Forward(*args)
    with torch.autocast(given.x.device.type, enabled=False):  # the dtypes were chosen by the caller
        y, saved = load(given.backend).moe_forward(
            given.x, given.indices, given.weights, *_operands(given), recipe=recipe_of(given.recipe), save=given.save,
            batch_invariant=given.batch_invariant,
        )  # fmt: skip
    kept = zip(saved, _empty_saved(given), strict=True)
    y = y.contiguous()  # whatever the strides of x
    return (y, *(empty if t is None else t for t, empty in kept))


@_sizes("moe_mlp")
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    given = _Forward(*args)
    return given.x.new_empty(given.x.shape), *_empty_saved(given)


def _saved_sizes(given: _Forward | _Backward, dtype: torch.dtype) -> Sizes:
    """{field of Saved: (shape, dtype)} of what the backend keeps, for x of this dtype."""
    (experts, twice_inner, _), (tokens, top_k) = given.gate_up_proj.shape, given.indices.shape
    return load(given.backend).saved_sizes(tokens * top_k, experts, twice_inner // 2, recipe_of(given.recipe), dtype)


def _empty_saved(given: _Forward) -> list[torch.Tensor]:
    """Memory of the sizes of Saved; what is not kept has no elements."""
    sizes = _saved_sizes(given, given.x.dtype) if given.save else {}
    kept = (sizes.get(name, ((0,), given.x.dtype)) for name in Saved._fields)
    return [given.x.new_empty(size, dtype=dtype) for size, dtype in kept]


def _operands(given: _Forward | _Backward) -> tuple[Operand, Operand]:
    """Both weights as the recipe multiplies them: given, quantized, or plain without a scale.

    Of quantized ones, the experts in `indices` are current: `ornith_moe.fp8_weights`.
    """
    recipe = recipe_of(given.recipe)
    transposed = recipe.input_gradient is not None and load(given.backend).transposes
    quantizes = recipe.is_fp8 and (given.gate_up_scale is None or given.down_scale is None)
    routed = _routed(given.indices, given.gate_up_proj.shape[0]) if quantizes else None

    def operand(w: torch.Tensor, stored: torch.Tensor | None) -> Operand:
        if stored is None and recipe.is_fp8:
            return quantized_weights(w, recipe.name, given.scale, routed, transposed=transposed)
        found = Operand(w, stored)  # its transposed copy is made anew: that reads what a check would have to read
        return found.with_transposed() if transposed and isinstance(given, _Backward) else found

    return operand(given.gate_up_proj, given.gate_up_scale), operand(given.down_proj, given.down_scale)


def _routed(indices: torch.Tensor, experts: int) -> torch.Tensor:
    """[E] bool: the experts that have rows. Sentinels fall into one more, which is cut off; no device waits."""
    ids = indices.detach().flatten().long()
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
    return torch.zeros(experts + 1, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True)[:experts]


@_implements("moe_mlp_backward")
def _moe_mlp_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    given = _Backward(*args)
    dx, dweights, dgate_up, ddown = given.needs_grad
    dy, grad_dtypes = given.dy, (given.gate_up_dtype, given.down_dtype)
    saved = Saved(**{name: getattr(given, name) for name in _saved_sizes(given, dy.dtype)})
    with torch.autocast(dy.device.type, enabled=False):
        gradients = load(given.backend).moe_backward(
            dy, given.x, given.indices, given.weights, saved, *_operands(given), recipe=recipe_of(given.recipe),
            needs_grad=(dx, dweights, dgate_up, ddown), grad_dtypes=grad_dtypes, batch_invariant=given.batch_invariant,
        )  # fmt: skip
    made = zip(gradients, (dy.dtype, given.weights.dtype, *grad_dtypes), strict=True)
    return tuple(dy.new_empty(0, dtype=d) if g is None else g.to(d).contiguous() for g, d in made)


@_sizes("moe_mlp_backward")
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    given = _Backward(*args)
    like = (given.dy, given.weights, given.gate_up_proj, given.down_proj)
    dtypes = (given.dy.dtype, given.weights.dtype, given.gate_up_dtype, given.down_dtype)
    each = zip(like, dtypes, given.needs_grad, strict=True)
    return tuple(t.new_empty(t.shape if needed else 0, dtype=dtype) for t, dtype, needed in each)


@register_flop_formula(torch.ops.ornith.moe_mlp)
def _(x: Any, indices: Any, weights: Any, gate_up_proj: Any, down_proj: Any, *_: Any, **__: Any) -> int:
    return 6 * _slot_products(indices, down_proj)


@register_flop_formula(torch.ops.ornith.moe_mlp_backward)
def _(*args: Any, **_: Any) -> int:
    given = _Backward(*args)  # with shapes in the place of tensors
    dx, dweights, dgate_up, ddown = given.needs_grad
    products = 2 * (dx or dweights or dgate_up) + 4 * dx + 4 * dgate_up + 2 * ddown
    return products * _slot_products(given.indices, given.down_proj)


def _slot_products(indices: Any, down_proj: Any) -> int:
    """T * top_k * H * I, given shapes; sentinel slots count, because their number is not in a shape."""
    return math.prod(indices) * math.prod(down_proj[1:])


def _moe_mlp_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
    given = _Forward(*inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    needed = _Forward(*ctx.needs_input_grad[: len(inputs)])  # torch may add one of its own
    ctx.needs_grad = [needed.x, needed.weights, needed.gate_up_proj, needed.down_proj]
    dtypes = (
        _gradient_dtype(name, getattr(given, name), getattr(needed, name)) for name in ("gate_up_proj", "down_proj")
    )
    ctx.options = (given.recipe, given.scale, given.batch_invariant, given.backend, ctx.needs_grad, *dtypes)
    keeps_x = needed.gate_up_proj or load(given.backend).recomputes or transforms.active()
    ctx.save_for_backward(given.x if keeps_x else None, *given[1 : given._fields.index("recipe")], *output[1:])


def _moe_mlp_gradient(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return _gradients(_Forward)
    x, *saved = ctx.saved_tensors
    if x is None and torch.is_grad_enabled():  # a second derivative would miss what goes through x
        transforms.once(ctx)
    gradients = call("moe_mlp_backward", dy, x, *saved, *ctx.options)
    dx, dweights, dgate_up, ddown = (g if needed else None for g, needed in zip(gradients, ctx.needs_grad, strict=True))
    return _gradients(_Forward, x=dx, weights=dweights, gate_up_proj=dgate_up, down_proj=ddown)


def _gradients(arguments: type, **of: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """One for each argument of an operator, as autograd wants them; None where there is none."""
    return tuple(of.get(name) for name in arguments.__annotations__)


def _gradient_dtype(name: str, weight: torch.Tensor, needed: bool) -> torch.dtype:
    dtype = (weight.grad_dtype or torch.float32) if weight.is_leaf else weight.dtype
    if needed and dtype.itemsize == 1:
        raise ValueError(
            f"{name}: the gradient of an FP8 weight is not an FP8 number; set {name}.grad_dtype = torch.float32 (or"
            " torch.bfloat16) on the leaf, and train it outside of torch.compile, which forgets that"
        )
    return dtype


@_implements("route")
def _route(*args: Any) -> tuple[torch.Tensor | None, ...]:
    given = _Route(*args)
    return routing_torch.route(*given[:-1], route_forward=load(given.backend).route_forward)


@_sizes("route")
def _(*args: Any) -> tuple[torch.Tensor | None, ...]:
    given = _Route(*args)
    logits, (tokens, experts) = given.logits, given.logits.shape
    return (
        logits.new_empty((tokens, given.top_k), dtype=torch.float32),
        logits.new_empty((tokens, given.top_k), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.float32) if given.losses else None,
        logits.new_empty((), dtype=torch.float32) if given.losses else None,
    )


@_implements("route_backward")
def _route_backward(*args: Any) -> torch.Tensor:
    *gradients, score, norm_topk_prob, backend = args
    return load(backend).route_backward(*gradients, score=score, norm_topk_prob=norm_topk_prob)


@_sizes("route_backward")
def _(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _route_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
    given = _Route(*inputs)
    weights, indices, counts, *_ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(given.logits, indices, weights)
    ctx.options = given.score, given.norm_topk_prob, given.backend


def _route_gradient(
    ctx: Any, dweights: torch.Tensor | None, _indices: None, _counts: None, dq_sum: torch.Tensor | None,
    dsquare_sum: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    logits, indices, weights = ctx.saved_tensors
    if dq_sum is not None or dsquare_sum is not None:  # the kernel takes both or none
        dq_sum = logits.new_zeros(logits.shape[1], dtype=torch.float32) if dq_sum is None else dq_sum
        dsquare_sum = logits.new_zeros((), dtype=torch.float32) if dsquare_sum is None else dsquare_sum
    elif dweights is None:
        return _gradients(_Route)
    dweights = torch.zeros_like(weights) if dweights is None else dweights
    gradients = (logits, indices, weights, dweights, dq_sum, dsquare_sum)
    if torch.is_grad_enabled():  # torch code, which has a second derivative
        score, norm_topk_prob, _ = ctx.options
        dlogits = routing_torch.route_backward(*gradients, score=score, norm_topk_prob=norm_topk_prob)
    else:
        dlogits = torch.ops.ornith.route_backward(*gradients, *ctx.options)
    return _gradients(_Route, logits=dlogits)


def is_opaque(tensor: torch.Tensor) -> bool:
    """Whether it is a subclass with rules of its own (torchao, DTensor): it has no memory that a kernel could read."""
    kind = type(tensor)
    if kind in (torch.Tensor, torch.nn.Parameter) or kind.__module__.startswith("torch._subclasses"):
        return False
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def check_plain(**operands: object) -> None:
    """Refuse a subclass that `is_opaque` among the arguments of a public function, by name."""
    for name, tensor in operands.items():
        if isinstance(tensor, torch.Tensor) and is_opaque(tensor):
            raise TypeError(
                f"{name}: expected a plain tensor, got the subclass {type(tensor).__name__} of"
                f" {type(tensor).__module__}; pass what it stands for, dequantized or by its to_local()"
            )


_functions = {}
for _name, _gradient, _context in (
    ("moe_mlp", _moe_mlp_gradient, _moe_mlp_context),
    ("moe_mlp_backward", transforms.once, None),
    ("route", _route_gradient, _route_context),
):
    torch.library.register_autograd(f"ornith::{_name}", _gradient, setup_context=_context, lib=_library)
    if _name != "route":
        _operator = getattr(torch.ops.ornith, _name).default
        torch.library.register_vmap(f"ornith::{_name}", transforms.per_sample(_operator), lib=_library)
        _functions[_name] = transforms.as_function(_operator, _context, _gradient)


def call(name: str, *args: Any) -> tuple[torch.Tensor, ...]:
    """An operator of the experts, where a transform is active in the form that it knows."""
    if torch.compiler.is_compiling() and transforms.active():  # Dynamo cannot trace a function with a jvp
        return torch.compiler.disable(call)(name, *args)
    if transforms.active():
        return _functions[name].apply(*args)
    return getattr(torch.ops.ornith, name)(*args)
