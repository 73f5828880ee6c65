"""ornith_moe/backend/triton.py: the kernels below the operator, from router logits to the loss and back.

References: float64 torch (softmax, top-k, loop over experts) under autograd; for the number of casts, a count of calls.
Without a GPU the kernels run in Triton's interpreter. The kernels' own tests are in tests/kernels.
"""

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from launches import watch
from moe_cases import DEVICE, Layer
from numeric import TOLERANCE, assert_close, assert_same_bits, cosine_difference, sqnr_db

import ornith_moe as om
from ornith_moe import fp8_weights

pytestmark = pytest.mark.device
moe_mlp_gpu = partial(om.moe_mlp, backend="triton")
FIVE = ("y", "dx", "dgate_up", "ddown", "dlogits")


def through_router(layer, logits, recipe="bf16", **options):
    """y and the gradients of x, gate_up, down and the logits."""
    leaves = [t.detach().clone().requires_grad_() for t in (layer.x, layer.gate_up, layer.down, logits)]
    x, gate_up, down, logits = leaves
    routing = om.route(logits, layer.weights.shape[1], backend="triton")
    y = om.moe_mlp(x, routing.indices, routing.weights, gate_up, down, recipe=recipe, backend="triton", **options)
    y.backward(layer.dy)
    return routing, dict(zip(FIVE, (y.detach(), *(t.grad for t in leaves)), strict=True))


def expected_through_router(layer, logits, recipe="bf16"):
    leaf = logits.double().requires_grad_()
    scores = leaf.softmax(-1)
    indices = scores.sort(dim=-1, descending=True, stable=True).indices[:, : layer.weights.shape[1]]
    weights = scores.gather(-1, indices)
    weights = weights / weights.sum(-1, keepdim=True)
    layer.indices, layer.weights = indices.int(), weights.detach().float()
    expected = layer.expected(recipe)
    weights.backward(expected["dweights"])
    return expected | {"dlogits": leaf.grad}


@pytest.mark.parametrize("shape", [(37, 100, 36, 5, 2), (20, 256, 128, 12, 3)], ids=str)
def test_all_five_outputs_in_float32(shape):
    layer, logits = Layer(*shape), torch.randn(shape[0], shape[3], device=DEVICE)
    expected = expected_through_router(layer, logits)
    routing, got = through_router(layer, logits)
    assert_same_bits("indices", routing.indices, layer.indices)
    for name in FIVE:
        assert_close(name, got[name], expected[name], TOLERANCE[torch.float32])


@pytest.mark.parametrize("recipe", ["fp8", "fp8_full", "fp8_channel"])
def test_all_five_outputs_in_fp8(recipe):
    layer = Layer(60, 256, 128, 6, 2, dtype=torch.bfloat16)
    logits = torch.randn(60, 6, device=DEVICE)
    expected = expected_through_router(layer, logits, recipe)
    unquantized = expected_through_router(layer, logits)
    _, got = through_router(layer, logits, recipe)
    for name in FIVE:
        assert cosine_difference(got[name], expected[name]) < 1e-3, name
        assert sqnr_db(got[name], unquantized[name]) > 22, name


@pytest.mark.parametrize(("tokens", "hidden", "inner", "top_k"), [(48, 256, 128, 2), (31, 128, 384, 4)])
def test_saved_bytes_per_token(tokens, hidden, inner, top_k):
    """H * 2 (x) + top_k * 2I * 2 (pre-activation), and index data that depends on neither H nor I."""
    layer = Layer(tokens, hidden, inner, 6, top_k, dtype=torch.bfloat16)
    x, gate_up, down = (t.requires_grad_() for t in (layer.x, layer.gate_up, layer.down))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        moe_mlp_gpu(x, layer.indices, layer.weights, gate_up, down)
    saved = [t for t in saved if t.numel() and t.data_ptr() != layer.indices.data_ptr()]  # the indices exist anyway
    kept = [t for t in saved if t.data_ptr() not in (gate_up.data_ptr(), down.data_ptr())]
    activations = [t for t in kept if t.shape[-1] in (hidden, 2 * inner)]
    assert sum(t.nbytes for t in activations) == tokens * (hidden * 2 + top_k * 2 * inner * 2)
    index_bytes = sum(t.nbytes for t in kept if not any(t is a for a in activations))
    assert index_bytes == tokens * top_k * 4  # the routing weights; the plan is built again


LAUNCHES = {  # forward, then backward by what is wanted; the plan's three launches come before each
    "x": ["gate_up", "down", "combine", "dswiglu", "dx", "combine"],
    "weights": ["gate_up", "down", "combine", "dswiglu"],
    "gate_up_proj": ["gate_up", "down", "combine", "dswiglu", "dgate_up"],
    "down_proj": ["gate_up", "down", "combine", "dswiglu", "ddown"],
}


@pytest.mark.parametrize("trained", LAUNCHES)
def test_a_gradient_that_nobody_wants_is_not_launched(trained, monkeypatch):
    layer = Layer(20, 64, 32, 3, 2)
    started = watch(monkeypatch)
    leaves = {"x": layer.x, "weights": layer.weights, "gate_up_proj": layer.gate_up, "down_proj": layer.down}
    leaves[trained].requires_grad_()
    moe_mlp_gpu(indices=layer.indices, **leaves).backward(layer.dy)
    assert [one.label.split()[0] for one in started if not one.label.startswith("plan")] == LAUNCHES[trained]
    expected = layer.expected()
    name = {"x": "dx", "weights": "dweights", "gate_up_proj": "dgate_up", "down_proj": "ddown"}[trained]
    assert_close(name, leaves[trained].grad, expected[name], TOLERANCE[torch.float32])


def test_two_micro_batches_quantize_once(monkeypatch):
    calls = []
    quantize = fp8_weights._quantize
    monkeypatch.setattr(fp8_weights, "_quantize", lambda *a: calls.append(a) or quantize(*a))
    layer = Layer(12, 128, 128, 2, 1, dtype=torch.bfloat16)
    gate_up, down = (torch.nn.Parameter(t.float()) for t in (layer.gate_up, layer.down))  # fp32 masters
    optimizer = torch.optim.SGD([gate_up, down], lr=0.1)
    for step in (1, 2):
        for _ in range(2):
            moe_mlp_gpu(layer.x, layer.indices, layer.weights, gate_up, down, recipe="fp8").backward(layer.dy)
        optimizer.step()
        if DEVICE == "cpu":  # on a GPU only the kernel knows: tests/kernels/test_fp8_cast.py
            assert len(calls) == 2 * step
    assert gate_up.grad.dtype == torch.float32 and gate_up.grad.any()


def test_training_and_inference_give_the_same_bits():
    layer = Layer(30, 256, 128, 4, 2, dtype=torch.bfloat16)
    for recipe in ("bf16", "fp8", "fp8_channel"):
        operands = (layer.x, layer.indices, layer.weights, layer.gate_up, layer.down)
        with torch.no_grad():
            inference = moe_mlp_gpu(*operands, recipe=recipe)
        layer.x.requires_grad_()
        assert_same_bits(recipe, moe_mlp_gpu(*operands, recipe=recipe).detach(), inference)
        layer.x.requires_grad_(False)


def test_no_tokens_still_belong_to_the_graph():
    layer = Layer(0, 64, 32, 3, 2)
    gate_up = layer.gate_up.requires_grad_()
    y = om.moe_mlp(layer.x, layer.indices, layer.weights, gate_up, layer.down, backend="triton")
    y.sum().backward()
    assert y.shape == (0, 64) and not gate_up.grad.any()


def test_recipes_that_do_not_fit_say_why():
    layer = Layer(3, 64, 32, 3, 2)
    operands = (layer.x, layer.indices, layer.weights, layer.gate_up, layer.down)
    with pytest.raises(ValueError, match=r"recipe: 'fp8' needs an expert intermediate size in multiples of 128"):
        om.moe_mlp(*operands, recipe="fp8", backend="triton")
    with pytest.raises(ValueError, match=r"recipe: expected one of bf16, fp8, fp8_full, fp8_channel, got 'fp4'"):
        om.moe_mlp(*operands, recipe="fp4")
    with pytest.raises(TypeError, match=r"float64.*reference"):
        doubles = [t.double() if t.is_floating_point() else t for t in operands]
        om.moe_mlp(*doubles, backend="triton")
