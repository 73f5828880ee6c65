"""kernels/routing.py through `om.route(backend="triton")`, against its definition in torch and against float64.

Choices are compared exactly where scores are equal or far apart (integer logits), and by float64 scores otherwise.
Gradients are those of autograd in float64 for the choice at hand. Without a GPU the kernels run in Triton's interpreter
and are compiled for four GPUs. Not covered: speed; a choice between scores that differ in the last bits.
"""

import pytest
import torch
from numeric import assert_close, assert_same_bits

pytest.importorskip("triton", reason="triton is not installed")

from machine_code import FORMS, compiled

import ornith_moe as om
from ornith_moe.kernels.launch import recording
from ornith_moe.kernels.routing import route_backward, route_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = 3e-6  # in the interpreter 1e-7; a GPU's exp errs by |logit - max| * 2^-24
FIELDS = ("indices", "weights", "counts", "load_balancing_loss", "z_loss")

# Inf - Inf and exp(large) inside the interpreter's numpy
pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def route(logits, top_k, **options):
    return om.route(logits, top_k, backend="triton", **options)


def definition(logits, indices, score="softmax", norm_topk_prob=True):
    """weights, load-balancing loss and z-loss of given choices, in float64 under autograd."""
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    weights = scores.gather(-1, indices.long())
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    q = scores / scores.sum(-1, keepdim=True)
    experts = logits.shape[-1]
    share = indices.flatten().bincount(minlength=experts) / len(logits)
    return weights, experts * (share * q.mean(0)).sum(), logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("shape", [(1, 4, 1), (5, 4, 4), (63, 60, 6), (130, 256, 8), (63, 512, 10)], ids=str)
def test_softmax_choice_and_losses(shape):
    T, E, top_k = shape
    logits = torch.randint(-6, 7, (T, E), device=DEVICE).float()
    logits[::2] -= 100  # all negative
    logits[-1] = 3.0  # all tied
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = route(logits.to(dtype), top_k, losses=True)
        expected = om.route(logits, top_k, losses=True, backend="reference")
        for name in FIELDS:
            assert getattr(got, name).dtype == getattr(expected, name).dtype, name
        assert_same_bits("indices", got.indices, expected.indices)
        assert_same_bits("counts", got.counts, expected.counts)
        for name, truth in zip(("weights", *FIELDS[3:]), definition(logits.double(), got.indices), strict=True):
            assert_close(name, getattr(got, name), truth, WEIGHTS)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("experts", "groups"), [(60, (12, 3)), (60, (5, 2)), (64, (64, 9)), (12, (1, 1)), (256, (8, 4))], ids=str
)
def test_groups_and_bias(experts, groups, score):
    """Groups of 5, 12, 1, 12 and 32, with ties among experts and groups; with a bias a group is worth its best two."""
    options = {"score": score, "n_group": groups[0], "topk_group": groups[1]}
    logits = torch.randint(-4, 3, (40, experts), device=DEVICE).float()
    quarters = torch.randint(-4, 5, (experts,), device=DEVICE) / 4
    for bias in (None, quarters, quarters.bfloat16(), quarters.double().repeat_interleave(2)[::2]):
        got = route(logits, 4, bias=bias, scaling=2.5, **options)
        expected = om.route(logits, 4, bias=bias, scaling=2.5, backend="reference", **options)
        assert_same_bits("indices", got.indices, expected.indices)
        assert_same_bits("counts", got.counts, expected.counts)
        assert_close("weights", got.weights, expected.weights, WEIGHTS)


def test_continuous_logits_choose_the_largest():
    logits = torch.randn(130, 300, device=DEVICE) * 3
    bias = torch.randn(300, device=DEVICE) / 10
    routing = route(logits, 9, score="sigmoid", bias=bias)
    preference = logits.double().sigmoid() + bias
    chosen = preference.gather(1, routing.indices.long())
    assert (chosen.diff(dim=1) < 1e-6).all(), "best first"
    rest = preference.scatter(1, routing.indices.long(), -9.0)
    assert (rest.amax(1) < chosen[:, -1] + 1e-6).all()


@pytest.mark.parametrize("losses", [False, True])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(5, 4, 2), (63, 60, 7), (70, 256, 8)], ids=str)
def test_gradients_equal_float64(shape, score, norm, losses):
    """The second half of the choices is replayed, so it is not the best one."""
    T, E, top_k = shape
    logits = torch.randn(T, E, device=DEVICE) * 2
    replay = torch.stack([torch.randperm(E)[:top_k] for _ in range(T)]).to(DEVICE)
    replay[: T // 2] = -1
    options = {"score": score, "norm_topk_prob": norm}
    dweights, dbalance, dz = torch.randn(T, top_k, device=DEVICE), 3.0 * T, -0.1 * T  # gradients of one magnitude

    mine = logits.clone().requires_grad_()
    routing = route(mine, top_k, replay=replay, losses=losses, **options)
    assert_same_bits("replayed", routing.indices[T // 2 :], replay[T // 2 :].int())
    total = (routing.weights * dweights).sum()
    if losses:
        total = total + dbalance * routing.load_balancing_loss + dz * routing.z_loss
    total.backward()

    truth = logits.double().requires_grad_()
    weights, balance, z = definition(truth, routing.indices, **options)
    total = (weights * dweights).sum()
    (total + dbalance * balance + dz * z if losses else total).backward()
    assert_close("weights", routing.weights, weights, WEIGHTS)
    assert_close("dlogits", mine.grad, truth.grad, 1e-5)


@pytest.mark.parametrize("name", ["load_balancing_loss", "z_loss"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_of_one_loss(score, name):
    logits = torch.randn(63, 60, device=DEVICE)
    mine, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    routing = route(mine, 5, score=score, losses=True)
    loss, expected = getattr(routing, name), definition(truth, routing.indices, score)[FIELDS.index(name) - 2]
    loss.backward()
    expected.backward()
    assert_close(name, loss, expected, WEIGHTS)
    assert_close("dlogits", mine.grad, truth.grad, 1e-5)


def test_gradient_in_the_dtype_of_the_logits():
    logits = torch.randn(20, 48, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        mine = logits.to(dtype).requires_grad_()
        truth = mine.detach().double().requires_grad_()
        routing = route(mine, 3)
        routing.weights[:, 0].sum().backward()  # a strided gradient
        definition(truth, routing.indices)[0][:, 0].sum().backward()
        assert mine.grad.dtype == dtype
        assert_close("dlogits", mine.grad, truth.grad, {torch.bfloat16: 3e-3, torch.float16: 4e-4}.get(dtype, 1e-5))


def test_closed_and_infinite_experts_are_never_chosen_twice():
    logits = torch.full((3, 20), -1e4, device=DEVICE)
    logits[1, 5:] = -float("inf")
    bias = torch.full((20,), -float("inf"), device=DEVICE)
    bias[6:8] = torch.tensor([-1.0, 0.0])
    assert route(logits, 8, bias=bias).indices.tolist() == [[7, 6, 0, 1, 2, 3, 4, 5]] * 3
    assert route(logits, 8).indices[1].tolist() == [*range(8)]
    assert route(logits, 4, bias=bias, n_group=5, topk_group=2).indices.tolist() == [[7, 6, 0, 1]] * 3
    assert route(logits, 4, n_group=5, topk_group=1).indices.tolist() == [[0, 1, 2, 3]] * 3


def test_nan_stays_in_its_token():
    logits = torch.randn(9, 60, device=DEVICE)
    clean = route(logits, 6, score="sigmoid")
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        broken = logits.clone()
        broken[4, ::7] = bad
        for options in ({}, {"n_group": 12, "topk_group": 4}, {"bias": torch.zeros(60, device=DEVICE)}):
            routing = route(broken, 6, losses=True, **options)
            assert ((routing.indices >= 0) & (routing.indices < 60)).all()
            assert all(len(set(row)) == 6 for row in routing.indices.tolist())
        routing = route(broken, 6, score="sigmoid")
        keep = torch.arange(9, device=DEVICE) != 4
        assert_same_bits("indices", routing.indices[keep], clean.indices[keep])
        assert_same_bits("weights", routing.weights[keep], clean.weights[keep])
    broken[4] = float("nan")
    assert route(broken, 6).weights[4].isnan().all() and route(broken, 6).indices[4].tolist() == [*range(6)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_replay_in_every_integer_dtype(dtype):
    logits = torch.randn(33, 60, device=DEVICE)
    record = torch.stack([torch.randperm(60)[:4] for _ in range(33)]).to(DEVICE)
    if dtype != torch.uint8:
        record[::5] = -1
    got = route(logits, 4, replay=record.to(dtype), losses=True)
    expected = om.route(logits, 4, replay=record, losses=True, backend="reference")
    for name in FIELDS:
        assert_close(name, getattr(got, name), getattr(expected, name), WEIGHTS)
    for name, value in zip(FIELDS[:3], route_forward(logits, 4, replay=record.to(dtype))[:3], strict=True):
        assert_same_bits(name, value, getattr(got, name))


def test_unchecked_replay_stays_in_range():
    """What `om.route` refuses can reach the kernel while a CUDA graph is captured."""
    record = torch.tensor([[9, -2], [2**32 + 5, -1], [3, 8]], device=DEVICE)
    indices = route_forward(torch.zeros(3, 9, device=DEVICE), 2, replay=record)[0]
    assert indices.tolist() == [[0, 1], [0, 1], [3, 8]]


def test_underflow_gives_zero_weights_not_nan():
    logits = torch.tensor([[0.0, -500.0, -500.0]], device=DEVICE, requires_grad=True)
    routing = route(logits, 2, replay=torch.tensor([[1, 2]], device=DEVICE))
    routing.weights.sum().backward()
    assert routing.weights.tolist() == [[0.0, 0.0]] and logits.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_token_does_not_see_its_batch_and_runs_are_equal(score):
    logits = torch.randn(70, 60, device=DEVICE)
    dweights = torch.randn(70, 6, device=DEVICE)

    def run(rows):
        x = logits[rows].requires_grad_()
        routing = route(x, 6, score=score, losses=True)
        (dlogits,) = torch.autograd.grad(routing.weights, x, dweights[rows])
        return (*(getattr(routing, name) for name in FIELDS), dlogits)

    everyone = torch.arange(70, device=DEVICE)
    first = run(everyone)
    for name, a, b in zip((*FIELDS, "dlogits"), first, run(everyone), strict=True):
        assert_same_bits(name, a, b)
    for rows in (torch.randperm(70, device=DEVICE), everyone[37:38], everyone[1::3]):
        some = run(rows)
        for at in (0, 1, 5):
            assert_same_bits((*FIELDS, "dlogits")[at], some[at], first[at][rows])


def test_strided_and_empty_input():
    wide = torch.randn(12, 40, device=DEVICE)
    for view in (wide[:, ::2], wide.T):
        got, expected = route(view, 3), om.route(view, 3, backend="reference")
        assert_same_bits("indices", got.indices, expected.indices)
    logits = torch.randn(0, 6, device=DEVICE, requires_grad=True)
    routing = route(logits, 2, losses=True)
    (routing.weights.sum() + routing.z_loss + routing.load_balancing_loss).backward()
    assert routing.indices.shape == (0, 2) and routing.counts.tolist() == [0] * 6 and logits.grad.shape == (0, 6)
    assert routing.z_loss == 0 and routing.load_balancing_loss == 0


@pytest.mark.gpu
def test_a_captured_route_serves_every_token():
    logits, record = torch.randn(70, 60, device=DEVICE), torch.full((70, 6), -1, device=DEVICE)
    route(logits, 6, replay=record, losses=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = route(logits, 6, replay=record, losses=True)
    logits.normal_()
    record[::3] = torch.arange(6, device=DEVICE)
    graph.replay()
    expected = route(logits, 6, replay=record, losses=True)
    for name in FIELDS:
        assert_same_bits(name, getattr(routing, name), getattr(expected, name))


def launches(arch):
    """What the launchers start for the routers of the 35B and the 397B, and for a grouped one with a bias."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    grouped = {"score": "sigmoid", "bias": meta(512), "n_group": 8, "topk_group": 4}
    replayed = {"replay": meta(32768, 10, dtype=torch.int16)}
    with recording(arch) as started:
        for experts, top_k, options in ((256, 8, {}), (512, 10, replayed), (512, 10, grouped)):
            logits = meta(32768, experts, dtype=torch.float32 if options else torch.bfloat16)
            indices, weights, _, *sums = route_forward(logits, top_k, losses=True, **options)
            route_backward(logits, indices, weights, weights, *sums, score=options.get("score", "softmax"))
    return started


@pytest.mark.parametrize("target", FORMS)
def test_compiles_for_every_target(target):
    for one in compiled(target, launches):
        name = f"{one.launch.label}, E = {one.launch.arguments['E']}"
        assert one.report.spills == 0, f"{name}: {one.report.spills}"
        assert not one.seen["atomics"], name
        assert one.seen["divisions"], f"{name}: division is not IEEE"
