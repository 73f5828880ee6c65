"""torch.func, forward mode and second derivatives: equal to a plain loop over slots, or refused with a way out.

`moe_mlp_reference`, which the refusals name, has to give all of it. Not covered: GPUs.
"""

import pytest
import torch
from numeric import assert_close
from torch.autograd import forward_ad
from torch.autograd import functional as classic
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import ornith_moe as om
from ornith_moe.backend.reference import moe_mlp_reference

T, E, H, I, TOP_K = 6, 3, 16, 8, 2


@pytest.fixture
def operands():
    return torch.randn(T, H), torch.rand(T, TOP_K), torch.randn(E, 2 * I, H) / 4, torch.randn(E, H, I) / 3


@pytest.fixture
def indices():
    return torch.rand(T, E).topk(TOP_K).indices


def loop(x, indices, weights, gate_up, down):
    y = torch.zeros_like(x)
    for k in range(indices.shape[1]):
        gate, up = torch.einsum("th,tnh->tn", x, gate_up[indices[:, k]]).chunk(2, -1)
        y = y + torch.einsum("ti,thi->th", gate * gate.sigmoid() * up, down[indices[:, k]]) * weights[:, k : k + 1]
    return y


def plain(logits):
    p = logits.softmax(-1)
    ids = p.topk(TOP_K).indices
    chosen = p.gather(-1, ids)
    counts = (ids[..., None] == torch.arange(E)).sum((0, 1))
    balance = (counts / T * p.mean(0)).sum() * E
    return (chosen / chosen.sum(-1, keepdim=True)).sin()[:, 0].sum() + balance + logits.logsumexp(-1).square().mean()


def routed(logits):
    routing = om.route(logits, TOP_K, losses=True)
    return routing.weights.sin()[:, 0].sum() + routing.load_balancing_loss + routing.z_loss


def batched(f, x):
    leaf = x.clone().requires_grad_()
    dy = torch.stack([torch.ones(T, H), torch.eye(T, H)])
    return torch.autograd.grad(f(leaf), leaf, dy, is_grads_batched=True)[0]


def penalty(f, x):
    """The gradient of a penalty on a gradient, beside a term that must not hide that it is missing."""
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum() + leaf.sin().sum(), leaf)[0]


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def dual_gradient(f, x):
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        return forward_ad.unpack_dual(torch.autograd.grad(y, leaf, dy)[0]).tangent


GIVEN = {  # of f: one operand -> y
    "grad": lambda f, x: grad(lambda t: f(t).sin().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones(T, H))[0],
    "jacrev": lambda f, x: jacrev(lambda t: f(t).sum(0))(x),
    "vmap": lambda f, x: vmap(f, in_dims=1, out_dims=2)(torch.stack([x, 2 * x], 1)),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(torch.stack([x, 2 * x]).expand(2, *[-1] * (x.dim() + 1))),
    "per-sample gradients": lambda f, x: vmap(grad(lambda t: f(t).sin().sum()))(torch.stack([x, 2 * x])),
    "gradient of vmap": lambda f, x: grad(lambda t: vmap(f)(torch.stack([t, 2 * t])).sin().sum())(x),
    "is_grads_batched": batched,
    "jacobian": lambda f, x: classic.jacobian(lambda t: f(t).sum(0), x, vectorize=True),
}
REFUSED = {
    "gradient of gradient": lambda f, x: grad(lambda t: grad(lambda t: f(t).sin().sum())(t).sin().sum())(x),
    "gradient penalty": penalty,
    "hvp": lambda f, x: classic.hvp(lambda t: f(t).sin().sum(), x, x)[1],
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "jvp of gradient": lambda f, x: jvp(grad(lambda t: f(t).sin().sum()), (x,), (x.cos(),))[1],
    "jvp of pullback": lambda f, x: jvp(lambda v: vjp(f, x)[1](v)[0], (torch.ones(T, H),), (torch.ones(T, H),))[1],
    "jacfwd": lambda f, x: jacfwd(lambda t: f(t).sum(0))(x),
    "hessian": lambda f, x: hessian(lambda t: f(t).sin().sum())(x),
    "linearize": lambda f, x: linearize(f, x)[1](x.cos()),
    "dual": dual,
    "dual gradient": dual_gradient,
}


class TestExperts:
    @pytest.mark.parametrize("what", ["x", "weights", "gate_up_proj", "down_proj"])
    @pytest.mark.parametrize("transform", [*GIVEN, *REFUSED])
    def test_right_or_refused(self, transform, what, operands, indices):
        if transform == "linearize" and what != "x":
            pytest.skip("linearize traces for seconds, and is jvp otherwise")
        place = ["x", "weights", "gate_up_proj", "down_proj"].index(what)

        def of(function):
            def f(operand):
                x, *rest = (*operands[:place], operand, *operands[place + 1 :])
                return function(x, indices, *rest)

            return f

        take = (GIVEN | REFUSED)[transform]
        expected = take(of(loop), operands[place])
        assert_close("reference", take(of(moe_mlp_reference), operands[place]), expected, 1e-5)
        if transform in GIVEN:
            assert_close("moe_mlp", take(of(om.moe_mlp), operands[place]), expected, 1e-5)
        else:
            with pytest.raises(RuntimeError, match=r"moe_mlp: .*ornith_moe.backend.reference.moe_mlp_reference"):
                take(of(om.moe_mlp), operands[place])

    def test_a_batch_of_routings(self, operands, indices):
        """Also where the reference has to compute every token by every expert."""
        x, *rest = operands
        xs, ids = torch.stack([x, 2 * x]), torch.stack([indices, indices.flip(0)])
        expected = torch.stack([loop(t, i, *rest) for t, i in zip(xs, ids, strict=True)])
        for function in (om.moe_mlp, moe_mlp_reference):
            assert_close("y", vmap(lambda t, i, f=function: f(t, i, *rest))(xs, ids), expected, 1e-5)

    def test_a_level_without_tangents_changes_nothing(self, operands, indices):
        x, *rest = operands
        leaf = x.clone().requires_grad_()
        with forward_ad.dual_level():
            (got,) = torch.autograd.grad(om.moe_mlp(leaf, indices, *rest).sum(), leaf)
        leaf = x.clone().requires_grad_()
        assert torch.equal(got, torch.autograd.grad(om.moe_mlp(leaf, indices, *rest).sum(), leaf)[0])

    @pytest.mark.parametrize("recipe", ["fp8", "fp8_full", "fp8_channel"])
    def test_fp8_recipes(self, recipe):
        """Straight through the casts: what torch.func gives equals what autograd and finite sums of samples give."""
        x, weights, ids = torch.randn(T, H), torch.rand(T, TOP_K), torch.rand(T, E).topk(TOP_K).indices
        sides = torch.randn(E, 256, H) / 4, torch.randn(E, H, 128) / 11
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(om.moe_mlp(leaf, ids, weights, *sides, recipe=recipe).sum(), leaf)[0]
        for function in (om.moe_mlp, moe_mlp_reference):
            f = lambda t, f=function: f(t, ids, weights, *sides, recipe=recipe).sum()  # noqa: E731
            assert_close("gradient", grad(f)(x), expected, 1e-4)
            assert_close("per sample", vmap(grad(f))(torch.stack([x, x]))[1], expected, 1e-4)
        if recipe != "fp8_full":  # whose gradient is quantized, and so no transpose of the tangent
            assert_close("tangent", jvp(f, (x,), (x,))[1], (expected * x).sum(), 1e-3)


@pytest.mark.parametrize("transform", [*GIVEN, *REFUSED])
def test_routing_has_every_derivative(transform):
    logits, take = torch.randn(T, E), (GIVEN | REFUSED)[transform]

    def of(function):
        return lambda t: function(t).expand(T, H)

    assert_close(transform, take(of(routed), logits), take(of(plain), logits), 1e-4)
