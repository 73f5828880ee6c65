"""The operators `ornith::moe_mlp` and `ornith::route`: what the dispatcher, autograd and `torch.compile` see of us.

    moe_mlp          -> y, and what its backward needs     autograd calls moe_mlp_backward with it
    route            -> indices, weights, counts, sums     autograd calls route_backward

Each is one opaque operator for all three backends, so that a graph holds one node where a kernel, a loop or a quantizer
runs, and its backward another. An argument says which backend; schemas hold tensors and plain values only. Every size
follows from the sizes of the arguments, also with a dynamic T. The backward of the experts cannot be differentiated
again; torch.func and forward mode are `ornith_moe.transforms`.

The public functions are `ornith_moe.moe_mlp` and `ornith_moe.route`; they check what is passed on here. The weights
pass through as the objects they are, which is how `ornith_moe.fp8_weights` knows those it quantized.

A gradient that nobody wants is not computed: `wants` says which of x, weights, gate_up_proj and down_proj, from
autograd's `needs_input_grad`; the others have no elements. x is kept for backward only where gate_up_proj wants its
gradient.

Flop counters (torch.utils.flop_counter) see the matrix products of both passes.

The gradient of a weight has the dtype of the weight, or of its `grad_dtype` where that is set: fp32 gradients for BF16
parameters, and for FP8 ones, which have to say so. AOTAutograd of torch 2.13 forgets `grad_dtype`, and would round the
gradient of an FP8 weight to FP8; so that one is refused under `torch.compile`.

Letters: T tokens, E experts, H hidden, I expert intermediate.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from ornith_moe import transforms
from ornith_moe.backend import reference, routing_torch
from ornith_moe.fp8_weights import FP8Weights, quantized_weights, turned_weights

_SCHEMAS = {
    "moe_mlp": """(Tensor x, Tensor indices, Tensor weights, Tensor gate_up_proj, Tensor down_proj,
        Tensor? gate_up_scale, Tensor? down_scale, str recipe, str scale, bool batch_invariant, str backend, bool save)
        -> (Tensor y, Tensor pre, Tensor row_to_slot, Tensor offsets, Tensor a_scale)""",
    "moe_mlp_backward": """(Tensor dy, Tensor? x, Tensor indices, Tensor weights,
        Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_scale, Tensor? down_scale,
        Tensor pre, Tensor row_to_slot, Tensor offsets, Tensor a_scale,
        str recipe, str scale, bool batch_invariant, str backend, bool[] wants,
        ScalarType gate_up_dtype, ScalarType down_dtype)
        -> (Tensor dx, Tensor dweights, Tensor dgate_up_proj, Tensor ddown_proj)""",
    "route": """(Tensor logits, Tensor? bias, Tensor? replay, int top_k, str score, bool norm_topk_prob,
        int? n_group, int? topk_group, bool losses, str backend)
        -> (Tensor weights, Tensor indices, Tensor counts, Tensor? q_sum, Tensor? square_sum)""",
    "route_backward": """(Tensor logits, Tensor indices, Tensor weights, Tensor dweights, Tensor? dq_sum,
        Tensor? dsquare_sum, str score, bool norm_topk_prob, str backend) -> Tensor dlogits""",
}
_library = torch.library.Library("ornith", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + " ".join(_schema.split()), tags=_tags)


def _implements(name):
    return torch.library.impl(f"ornith::{name}", "default", lib=_library)


def _sizes(name):
    return torch.library.register_fake(f"ornith::{name}", lib=_library)


@_implements("moe_mlp")
def _moe_mlp(
    x, indices, weights, gate_up_proj, down_proj, gate_up_scale, down_scale,
    recipe, scale, batch_invariant, backend, save,
):  # fmt: skip
    sides = _sides(gate_up_proj, down_proj, gate_up_scale, down_scale, recipe, scale, backend, indices)
    pre = row_to_slot = offsets = a_scale = None
    with torch.autocast(x.device.type, enabled=False):  # the dtypes were chosen by the caller
        if backend == "triton":
            from ornith_moe.backend import triton as gpu  # imported where it is used: one needs Triton, one numba

            y, pre, a_scale = gpu.moe_forward(
                x, indices, weights, *sides, recipe=recipe, save=save, batch_invariant=batch_invariant
            )
        elif backend == "cpu":
            from ornith_moe.backend import cpu

            sides = [cpu.Weights(w.q, w.scale) for w in sides]
            y, saved = cpu.moe_forward(x, indices, weights, *sides, recipe=recipe, save=save)
            pre, row_to_slot, offsets = saved or (None,) * 3
        else:
            y = reference.moe_forward(x, indices, weights, *[(w.q, w.scale) for w in sides], recipe=recipe)
    sizes = _saved(x, indices, gate_up_proj, recipe, backend, save)
    kept = zip((pre, row_to_slot, offsets, a_scale), sizes, strict=True)
    y = y.contiguous()  # whatever the strides of x
    return (y, *(x.new_empty(size, dtype=dtype) if t is None else t for t, (size, dtype) in kept))


@_sizes("moe_mlp")
def _(
    x, indices, weights, gate_up_proj, down_proj, gate_up_scale, down_scale,
    recipe, scale, batch_invariant, backend, save,
):  # fmt: skip
    sizes = _saved(x, indices, gate_up_proj, recipe, backend, save)
    return (x.new_empty(x.shape), *(x.new_empty(size, dtype=dtype) for size, dtype in sizes))


def _saved(x, indices, gate_up_proj, recipe, backend, save):
    """Size and dtype of pre, row_to_slot, offsets and a_scale; what a backend does not keep has no elements."""
    slots, (experts, width, _) = indices.shape[0] * indices.shape[1], gate_up_proj.shape
    rows = slots if save and backend != "reference" else 0
    return (
        ((rows, width), x.dtype),
        ((rows if backend == "cpu" else 0,), torch.int32),
        ((experts + 1 if save and backend == "cpu" else 0,), torch.int32),
        ((rows if backend == "triton" and recipe == "fp8_channel" else 0, 1), torch.float32),
    )


def _sides(gate_up_proj, down_proj, gate_up_scale, down_scale, recipe, scale, backend, indices, backward=False):
    """FP8Weights of both weights as the recipe multiplies them: given, quantized, or plain without a scale.

    Of quantized ones, the experts in `indices` are current: `ornith_moe.fp8_weights`.
    """
    turned = recipe == "fp8_full" and backend == "triton"  # only its matrix unit wants another copy for the gradient
    kind = "fp8" if recipe == "fp8_full" and not turned else recipe
    quantizes = recipe != "bf16" and (gate_up_scale is None or down_scale is None)
    routed = _routed(indices, gate_up_proj.shape[0]) if quantizes else None
    sides = []
    for w, stored in ((gate_up_proj, gate_up_scale), (down_proj, down_scale)):
        if stored is not None:
            sides.append(turned_weights(w, stored) if turned and backward else FP8Weights(w, stored))
        else:
            sides.append(FP8Weights(w, None) if recipe == "bf16" else quantized_weights(w, kind, scale, routed))
    return sides


def _routed(indices, experts):
    """[E] bool: the experts that have rows. Sentinels fall into one more, which is cut off; no device waits."""
    ids = indices.detach().flatten().long()
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
    return torch.zeros(experts + 1, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True)[:experts]


@_implements("moe_mlp_backward")
def _moe_mlp_backward(
    dy, x, indices, weights, gate_up_proj, down_proj, gate_up_scale, down_scale, pre, row_to_slot, offsets, a_scale,
    recipe, scale, batch_invariant, backend, wants, gate_up_dtype, down_dtype,
):  # fmt: skip
    sides = _sides(gate_up_proj, down_proj, gate_up_scale, down_scale, recipe, scale, backend, indices, backward=True)
    wants, grad_dtypes = tuple(wants), (gate_up_dtype, down_dtype)
    with torch.autocast(dy.device.type, enabled=False):
        if backend == "triton":
            from ornith_moe.backend import triton as gpu

            gradients = gpu.moe_backward(
                dy, x, indices, weights, pre, a_scale if len(a_scale) else None, *sides, recipe=recipe, wants=wants,
                grad_dtypes=grad_dtypes, batch_invariant=batch_invariant,
            )  # fmt: skip
        elif backend == "cpu":
            from ornith_moe.backend import cpu

            sides = [cpu.Weights(w.q, w.scale) for w in sides]
            saved = cpu.Saved(pre, row_to_slot, offsets)
            gradients = cpu.moe_backward(
                dy, x, weights, saved, *sides, recipe=recipe, wants=wants, grad_dtypes=grad_dtypes
            )
        else:
            sides = [(w.q, w.scale) for w in sides]
            gradients = reference.moe_backward(dy, x, indices, weights, *sides, recipe=recipe, wants=wants)
    dtypes = (dy.dtype, weights.dtype, *grad_dtypes)
    made = zip(gradients, dtypes, strict=True)
    return tuple(dy.new_empty(0, dtype=d) if g is None else g.to(d).contiguous() for g, d in made)


@_sizes("moe_mlp_backward")
def _(
    dy, x, indices, weights, gate_up_proj, down_proj, gate_up_scale, down_scale, pre, row_to_slot, offsets, a_scale,
    recipe, scale, batch_invariant, backend, wants, gate_up_dtype, down_dtype,
):  # fmt: skip
    like = ((dy, dy.dtype), (weights, weights.dtype), (gate_up_proj, gate_up_dtype), (down_proj, down_dtype))
    return tuple(
        t.new_empty(t.shape if wanted else 0, dtype=dtype) for (t, dtype), wanted in zip(like, wants, strict=True)
    )


@register_flop_formula(torch.ops.ornith.moe_mlp)
def _(x, indices, weights, gate_up_proj, down_proj, *_, **__) -> int:
    return 6 * _slot_products(indices, down_proj)


@register_flop_formula(torch.ops.ornith.moe_mlp_backward)
def _(dy, x, indices, weights, gate_up_proj, down_proj, *rest, **__) -> int:
    dx, dweights, dgate_up, ddown = rest[-3]
    return (2 * (dx or dweights or dgate_up) + 4 * dx + 4 * dgate_up + 2 * ddown) * _slot_products(indices, down_proj)


def _slot_products(indices, down_proj):
    """T * top_k * H * I, given shapes; sentinel slots count, because their number is not in a shape."""
    return math.prod(indices) * math.prod(down_proj[1:])


def _moe_mlp_context(ctx, inputs, output):
    x, indices, weights, gate_up_proj, down_proj, *scales, recipe, scale, batch_invariant, backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    wants = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    named = (("gate_up_proj", gate_up_proj, wants[2]), ("down_proj", down_proj, wants[3]))
    ctx.options = recipe, scale, batch_invariant, backend, wants, *(_gradient_dtype(*each) for each in named)
    kept = x if wants[2] or backend == "reference" or transforms.active() else None
    ctx.save_for_backward(kept, indices, weights, gate_up_proj, down_proj, *scales, *output[1:])


def _moe_mlp_gradient(ctx, dy, *_):
    if dy is None:
        return (None,) * 12
    x, *saved = ctx.saved_tensors
    if x is None and torch.is_grad_enabled():  # a second derivative would miss what goes through x
        transforms.once(ctx)
    wants = ctx.options[4]
    gradients = call("moe_mlp_backward", dy, x, *saved, *ctx.options)
    dx, dweights, *dsides = (g if wanted else None for g, wanted in zip(gradients, wants, strict=True))
    return dx, None, dweights, *dsides, *[None] * 7


def _gradient_dtype(name, weight, wanted):
    dtype = (weight.grad_dtype or torch.float32) if weight.is_leaf else weight.dtype
    if wanted and dtype.itemsize == 1:
        raise ValueError(
            f"{name}: the gradient of an FP8 weight is not an FP8 number; set {name}.grad_dtype = torch.float32 (or"
            " torch.bfloat16) on the leaf, and train it outside of torch.compile, which forgets that"
        )
    return dtype


@_implements("route")
def _route(logits, bias, replay, top_k, score, norm_topk_prob, n_group, topk_group, losses, backend):
    if backend == "triton":
        from ornith_moe.kernels.routing import route_forward
    else:
        route_forward = routing_torch.route_forward
    options = (logits, bias, replay, top_k, score, norm_topk_prob, n_group, topk_group, losses)
    return routing_torch.route(*options, route_forward=route_forward)


@_sizes("route")
def _(logits, bias, replay, top_k, score, norm_topk_prob, n_group, topk_group, losses, backend):
    tokens, experts = logits.shape
    return (
        logits.new_empty((tokens, top_k), dtype=torch.float32),
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.float32) if losses else None,
        logits.new_empty((), dtype=torch.float32) if losses else None,
    )


@_implements("route_backward")
def _route_backward(logits, indices, weights, dweights, dq_sum, dsquare_sum, score, norm_topk_prob, backend):
    gradients = (logits, indices, weights, dweights, dq_sum, dsquare_sum)
    if backend == "triton":
        from ornith_moe.kernels.routing import route_backward

        return route_backward(*gradients, score=score, norm_topk_prob=norm_topk_prob)
    return routing_torch.route_backward(*gradients, score=score, norm_topk_prob=norm_topk_prob)


@_sizes("route_backward")
def _(logits, indices, weights, dweights, dq_sum, dsquare_sum, score, norm_topk_prob, backend):
    return logits.new_empty(logits.shape)


def _route_context(ctx, inputs, output):
    logits, _, _, _, score, norm_topk_prob, _, _, _, backend = inputs
    weights, indices, counts, *_ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(logits, indices, weights)
    ctx.options = score, norm_topk_prob, backend


def _route_gradient(ctx, dweights, _indices, _counts, dq_sum, dsquare_sum):
    logits, indices, weights = ctx.saved_tensors
    if dq_sum is not None or dsquare_sum is not None:  # the kernel wants both
        dq_sum = logits.new_zeros(logits.shape[1], dtype=torch.float32) if dq_sum is None else dq_sum
        dsquare_sum = logits.new_zeros((), dtype=torch.float32) if dsquare_sum is None else dsquare_sum
    elif dweights is None:
        return (None,) * 10
    dweights = torch.zeros_like(weights) if dweights is None else dweights
    gradients = (logits, indices, weights, dweights, dq_sum, dsquare_sum)
    if torch.is_grad_enabled():  # torch code, which has a second derivative
        score, norm_topk_prob, _ = ctx.options
        dlogits = routing_torch.route_backward(*gradients, score=score, norm_topk_prob=norm_topk_prob)
    else:
        dlogits = torch.ops.ornith.route_backward(*gradients, *ctx.options)
    return dlogits, *[None] * 9


def is_opaque(tensor):
    """Whether it is a subclass with rules of its own (torchao, DTensor): it has no memory that a kernel could read."""
    kind = type(tensor)
    if kind in (torch.Tensor, torch.nn.Parameter) or kind.__module__.startswith("torch._subclasses"):
        return False
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def check_plain(**operands):
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


def call(name, *args):
    """An operator of the experts, where a transform is active in the form that it knows."""
    if torch.compiler.is_compiling() and transforms.active():  # Dynamo cannot trace a function with a jvp
        return torch.compiler.disable(call)(name, *args)
    if transforms.active():
        return _functions[name].apply(*args)
    return getattr(torch.ops.ornith, name)(*args)
