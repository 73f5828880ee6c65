"""Routing against a token-by-token computation in Python floats, and against transformers' routers and losses.

Not covered: speed, and devices other than the CPU. The Triton kernels have tests/kernels/test_routing.py.
"""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from moe_cases import TRITON, device_of
from numeric import assert_close, assert_same_bits, relative_rms

import ornith_moe as om


def softmax_row(row):
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_softmax_topk_equals_python(data):
    experts = data.draw(st.integers(1, 19))
    top_k = data.draw(st.integers(1, experts))
    rows = data.draw(st.lists(st.lists(st.integers(-6, 6), min_size=experts, max_size=experts), min_size=1, max_size=4))
    routing = om.route(torch.tensor(rows, dtype=torch.float32), top_k)
    for row, indices, weights in zip(rows, routing.indices.tolist(), routing.weights.tolist(), strict=True):
        expected = sorted(range(experts), key=lambda e: (-row[e], e))[:top_k]  # ties: lowest index first
        assert indices == expected
        scores = softmax_row(row)
        total = sum(scores[e] for e in expected)
        assert weights == pytest.approx([scores[e] / total for e in expected], rel=1e-5)
    assert routing.counts.tolist() == [routing.indices.flatten().tolist().count(e) for e in range(experts)]


def test_outputs_have_the_pinned_dtypes():
    routing = om.route(torch.randn(5, 7, dtype=torch.bfloat16), 3)
    assert (routing.indices.dtype, routing.weights.dtype, routing.counts.dtype) == (
        torch.int32,
        torch.float32,
        torch.int32,
    )
    assert routing.counts.sum() == 15


@pytest.mark.parametrize("experts", [100, 512])
def test_equal_logits_choose_the_lowest_experts(experts):
    assert om.route(torch.zeros(3, experts), 5).indices.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_all_negative_and_huge_logits():
    """Where scores underflow to zero they tie, and the lowest index wins although its logit is smaller."""
    logits = torch.tensor([[-2e4, -1e4 - 1, -1e4], [1e4, -1e4, 0.0]])
    routing = om.route(logits, 2)
    assert routing.indices.tolist() == [[2, 1], [0, 1]]
    assert_close("weights", routing.weights, torch.tensor([[0.7310586, 0.2689414], [1.0, 0.0]]), 1e-6)


def test_empty_batch_stays_in_the_graph():
    logits = torch.randn(0, 6, requires_grad=True)
    routing = om.route(logits, 2)
    routing.weights.sum().backward()
    assert routing.indices.shape == (0, 2) and routing.counts.tolist() == [0] * 6 and logits.grad.shape == (0, 6)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_of_the_logits(score, norm):
    logits = torch.randn(63, 11)
    dweights = torch.randn(63, 3)
    mine = logits.clone().requires_grad_()
    routing = om.route(mine, 3, score=score, norm_topk_prob=norm, scaling=2.5)
    routing.weights.backward(dweights)
    truth = logits.double().requires_grad_()
    scores = truth.softmax(-1) if score == "softmax" else truth.sigmoid()
    chosen = scores.gather(-1, routing.indices.long())
    weights = 2.5 * (chosen / chosen.sum(-1, keepdim=True) if norm else chosen)
    weights.backward(dweights.double())
    assert_close("weights", routing.weights, weights, 1e-6)
    assert_close("dlogits", mine.grad, truth.grad, 1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])
def test_logits_that_are_no_numbers_stay_in_their_row(backend, score):
    """docs/numerics.md: NaN weights, unique ids in range; other rows keep their bits, forward and backward."""
    clean = torch.randn(6, 5, device=device_of(backend))
    dirty = clean.clone()
    dirty[1, 3], dirty[2, 0], dirty[3], dirty[4, 2] = torch.nan, torch.inf, -torch.inf, -torch.inf
    leaves = [logits.requires_grad_() for logits in (clean, dirty)]
    expected, got = (om.route(leaf, 2, score=score, losses=True, backend=backend) for leaf in leaves)
    lost = [True, True, True] if score == "softmax" else [True, False, False]  # rows 1, 2 and 3
    assert got.weights.isnan().all(1).tolist() == [False, *lost, False, False]
    assert all(len(set(row)) == 2 and 0 <= min(row) and max(row) < 5 for row in got.indices.tolist())
    assert [got.indices[row].tolist() for row in (1, 2, 3)] == (
        [[0, 1]] * 3 if score == "softmax" else [[3, *got.indices[1, 1:].tolist()], [0, got.indices[2, 1]], [0, 1]]
    )
    assert got.counts.sum() == 12 and got.z_loss.isnan() and 2 not in got.indices[4].tolist()
    for routing in (expected, got):
        routing.weights.square().sum().backward()
    for row in (0, 5):
        assert torch.equal(got.weights[row], expected.weights[row])
        assert torch.equal(dirty.grad[row], clean.grad[row])


def test_padding_rows_are_sentinels():
    """The two lines of docs/numerics.md: NaN in padding reaches nothing, and the rest is as if it were not there."""
    x, logits = torch.randn(6, 16), torch.randn(6, 4)
    sides = torch.randn(4, 16, 16), torch.randn(4, 16, 8)
    valid = torch.tensor([True, True, False, True, False, True])
    results = []
    for padded in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, logits, *sides)]
        if padded:
            with torch.no_grad():
                leaves[0][~valid] = leaves[1][~valid] = torch.nan
        hidden, scores = (leaf if padded else leaf[valid] for leaf in leaves[:2])
        mask = valid if padded else valid[valid]
        routing = om.route(scores.masked_fill(~mask[:, None], 0), 2)
        y = om.moe_mlp(hidden, routing.indices.masked_fill(~mask[:, None], 4), routing.weights, *leaves[2:])
        y.square().sum().backward()
        assert not padded or not y[~valid].any()
        results.append([y[mask], *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        assert_close("result", got, expected, 1e-6)


def test_bias_selects_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    routing = om.route(logits, 2, score="sigmoid", bias=torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert routing.indices.tolist() == [[3, 0]]
    chosen = logits.sigmoid()[0, [3, 0]]
    assert_close("weights", routing.weights[0], chosen / chosen.sum(), 1e-6)


def test_groups_equal_deepseek_v3():
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=24, n_routed_experts=32, num_experts_per_tok=4, n_group=8, topk_group=3, routed_scaling_factor=2.5
    )
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.uniform_(0, 0.2)
    x = torch.randn(100, 24)
    found = router(x)
    if not isinstance(found, tuple):
        pytest.skip("this transformers chooses the experts of DeepSeek-V3 in its block, not in its router")
    logits, weights, indices = found
    mine = om.route(
        logits, 4, score="sigmoid", bias=router.e_score_correction_bias, n_group=8, topk_group=3, scaling=2.5
    )
    order, my_order = indices.sort(-1), mine.indices.sort(-1)
    assert order.values.tolist() == my_order.values.tolist()
    assert_close("weights", mine.weights.gather(-1, my_order.indices), weights.gather(-1, order.indices), 1e-6)


def test_group_without_bias_is_worth_its_best_expert():
    logits = torch.tensor([[3.0, 0.0, 2.0, 2.0]])
    assert om.route(logits, 2, n_group=2, topk_group=1).indices.tolist() == [[0, 1]]
    assert om.route(logits, 2, n_group=2, topk_group=1, bias=torch.zeros(4)).indices.tolist() == [[0, 1]]
    logits = torch.tensor([[1.5, -9.0, 1.4, 1.4]])
    assert om.route(logits, 2, n_group=2, topk_group=1).indices.tolist() == [[0, 1]]
    assert om.route(logits, 2, n_group=2, topk_group=1, bias=torch.zeros(4)).indices.tolist() == [[2, 3]]


def test_equals_the_qwen_router():
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

    router = Qwen3_5MoeTopKRouter(Qwen3_5MoeTextConfig(hidden_size=40, num_experts=12, num_experts_per_tok=5))
    torch.nn.init.normal_(router.weight)
    logits, weights, indices = router(torch.randn(63, 40))
    mine = om.route(logits, 5)
    assert_same_bits("indices", mine.indices, indices.int())
    assert relative_rms(mine.weights, weights) < 1e-7


class TestLosses:
    @pytest.mark.parametrize("top_k", [1, 3])
    def test_equal_transformers(self, top_k):
        from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func
        from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

        logits = torch.randn(63, 11)
        mine, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
        routing = om.route(mine, top_k, losses=True)
        balance, z = load_balancing_loss_func((theirs,), 11, top_k), router_z_loss_func(theirs[None])
        assert_close("load_balancing_loss", routing.load_balancing_loss, balance, 1e-6)
        assert_close("z_loss", routing.z_loss, z, 1e-6)
        for a, b in ((routing.load_balancing_loss, balance), (routing.z_loss, z)):
            (dmine,), (dtheirs,) = (torch.autograd.grad(x, y, retain_graph=True) for x, y in ((a, mine), (b, theirs)))
            assert_close("dlogits", dmine, dtheirs, 1e-5)

    def test_of_sigmoid_scores_normalise_over_all_experts(self):
        logits = torch.randn(7, 5)
        routing = om.route(logits, 2, score="sigmoid", bias=torch.tensor([0.0, 9, 0, 0, 0]), losses=True)
        expected = 0.0
        for row in logits.tolist():
            scores = [1 / (1 + math.exp(-v)) for v in row]
            expected += sum(c * s for c, s in zip(routing.counts.tolist(), scores, strict=True)) / sum(scores)
        assert routing.load_balancing_loss.item() == pytest.approx(5 * expected / 7**2, rel=1e-5)
        z = sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()) / 7
        assert routing.z_loss.item() == pytest.approx(z, rel=1e-5)

    def test_count_replayed_choices(self):
        logits = torch.zeros(6, 3)
        fresh = om.route(logits, 1, losses=True)
        spread = om.route(logits + torch.tensor([0.0, 1, 2]), 1, replay=torch.tensor([[0]] * 6), losses=True)
        assert fresh.load_balancing_loss.item() == pytest.approx(1)  # q is even: top_k, whatever the choice
        assert spread.load_balancing_loss.item() == pytest.approx(3 * softmax_row([0, 1, 2])[0])

    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("backend", ["cpu", TRITON])
    def test_do_not_depend_on_torchs_default_dtype(self, backend, default):
        """Nor do the choice, the weights and the gradient."""

        def everything():
            leaf = logits.clone().requires_grad_()
            routing = om.route(leaf, 2, losses=True, scaling=2.5, backend=backend)
            losses = routing.load_balancing_loss, routing.z_loss
            gradient = torch.autograd.grad(routing.weights.square().sum() + sum(losses), leaf)
            return [routing.indices, routing.weights, routing.counts, *losses, *gradient]

        logits = torch.randn(9, 6, device=device_of(backend))
        expected = everything()
        torch.set_default_dtype(default)
        try:
            got = everything()
        finally:
            torch.set_default_dtype(torch.float32)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits("routing", a, b)

    def test_are_none_unless_asked_and_zero_without_tokens(self):
        routing = om.route(torch.randn(3, 4), 2)
        assert routing.load_balancing_loss is None and routing.z_loss is None
        routing = om.route(torch.randn(0, 4), 2, losses=True)
        assert routing.load_balancing_loss == 0 and routing.z_loss == 0


class TestReplay:
    def test_keeps_the_record_and_routes_the_rest(self):
        logits = torch.randn(4, 9)
        replay = torch.tensor([[8, 0], [-1, -1], [3, 5], [-1, -1]])
        routing = om.route(logits, 2, replay=replay)
        fresh = om.route(logits, 2)
        assert routing.indices[[0, 2]].tolist() == [[8, 0], [3, 5]]
        assert_same_bits("unrecorded", routing.indices[[1, 3]], fresh.indices[[1, 3]])
        assert_same_bits("unrecorded", routing.weights[[1, 3]], fresh.weights[[1, 3]])
        scores = logits.double().softmax(-1).gather(-1, routing.indices.long())
        assert_close("weights", routing.weights, scores / scores.sum(-1, keepdim=True), 1e-6)

    def test_of_its_own_choice_changes_nothing(self):
        logits = torch.randn(63, 9)
        first = om.route(logits, 4)
        second = om.route(logits, 4, replay=first.indices)
        for name in ("indices", "weights", "counts"):
            assert_same_bits(name, getattr(second, name), getattr(first, name))

    def test_gradient_reaches_the_router(self):
        logits = torch.randn(5, 9, requires_grad=True)
        om.route(logits, 2, replay=torch.tensor([[8, 0]] * 5)).weights[:, 0].sum().backward()
        assert (logits.grad[:, 8] > 0).all()

    def test_underflow_gives_zero_weights_not_nan(self):
        logits = torch.tensor([[0.0, -500.0, -500.0]], requires_grad=True)
        routing = om.route(logits, 2, replay=torch.tensor([[1, 2]]))
        routing.weights.sum().backward()
        assert routing.weights.tolist() == [[0.0, 0.0]] and logits.grad.isfinite().all()

    @pytest.mark.parametrize(
        ("replay", "error", "says"),
        [
            ([[0, 1, 2]] * 2, ValueError, r"replay: expected shape \[T, top_k\] = \[2, 2\], got \[2, 3\]"),
            ([[0, 1], [9, 2]], ValueError, r"replay\[1, 0\]: expected an expert id in \[0, 9\)"),
            ([[0, 1], [-2, 2]], ValueError, r"replay\[1, 0\]"),
            ([[0, 1], [-1, 2]], ValueError, r"replay\[1, 0\].*whole row of -1"),
            ([[0, 1], [4, 4]], ValueError, r"replay\[1\]: expected 2 different experts, got \[4, 4\]"),
            ([[0.0, 1.0]] * 2, TypeError, "replay: expected an integer tensor"),
        ],
        ids=["shape", "too-large", "too-small", "half-a-record", "twice", "float"],
    )
    def test_refuses_a_wrong_record(self, replay, error, says):
        with pytest.raises(error, match=says):
            om.route(torch.randn(2, 9), 2, replay=torch.tensor(replay))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "top_k: expected 1 to 8"),
        ({"top_k": 9}, "top_k: expected 1 to 8"),
        ({"score": "relu"}, "score: expected 'softmax' or 'sigmoid'"),
        ({"bias": torch.zeros(7)}, r"bias: expected shape \[E\] = \[8\]"),
        ({"n_group": 4}, "go together"),
        ({"n_group": 3, "topk_group": 1}, "n_group: expected a divisor"),
        ({"n_group": 4, "topk_group": 5}, "topk_group: expected 1 to n_group = 4"),
        ({"top_k": 3, "n_group": 4, "topk_group": 1}, "cannot supply top_k = 3"),
    ],
    ids=str,
)
def test_refuses_wrong_options(options, says):
    with pytest.raises(ValueError, match=says):
        om.route(torch.randn(2, 8), **{"top_k": 2, **options})


def test_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of triton, cpu, reference"):
        om.route(torch.randn(2, 8), 2, backend="gpu")


def test_refuses_wrong_logits():
    with pytest.raises(ValueError, match=r"logits: expected shape \[T, E\]"):
        om.route(torch.randn(8), 2)
    with pytest.raises(TypeError, match="logits: expected a floating-point tensor"):
        om.route(torch.ones(2, 8, dtype=torch.int64), 2)
