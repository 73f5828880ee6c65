"""The loss and its weights against the written formulas, token by token.

Reference: `written`, float64 autograd over scalars, and Python's floats. Not covered: reading logps off a model.
"""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.rl import loss as module
from ornith_moe.rl.loss import fold, grpo_loss, mismatch_weights, staleness_weights

NAN = float("nan")
LOW, HIGH = 0.2, 0.28


def written(logps, old, advantages, mask, level, mismatch, normalizer):
    """The formula over scalars: a 0-dim float64 tensor with its graph."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(len(logps)):
        live = [t for t in range(logps.shape[1]) if mask[b, t]]
        for t in live:
            if level == "token":
                ratio = (logps[b, t] - old[b, t]).exp()
            else:
                ratio = (sum(logps[b, u] - old[b, u] for u in live) / len(live)).exp()
            limited = min(max(ratio.item(), 1 - LOW), 1 + HIGH)
            a = advantages[b, t].item()
            inside = ratio.item() * a <= limited * a
            total = total + mismatch[b, t].item() * (ratio * a if inside else limited * a)
            count += 1
    return -total / (normalizer or max(count, 1))


def case(seed, shape=(5, 7), spread=0.3):
    random = torch.Generator().manual_seed(seed)
    logps = -torch.rand(shape, dtype=torch.float64, generator=random) * 3
    old = logps + spread * torch.randn(shape, dtype=torch.float64, generator=random)
    advantages = torch.randn(shape, dtype=torch.float64, generator=random)
    mask = torch.rand(shape, generator=random) < 0.7
    mask[-1] = False  # a row that was dropped
    return logps, old, advantages, mask


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalizer", [None, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_against_autograd_of_the_written_formula(level, normalizer, seed):
    logps, old, advantages, mask = case(seed)
    weights = mismatch_weights(
        old, old + 0.5 * torch.randn(old.shape, generator=torch.Generator().manual_seed(9)), mask
    )
    ours, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    made = grpo_loss(ours, old, advantages, mask, level=level, normalizer=normalizer, mismatch=weights)
    expected = written(theirs, old, advantages, mask, level, weights, normalizer)
    made.loss.backward()
    expected.backward()
    assert torch.allclose(made.loss, expected, rtol=1e-12, atol=0)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12, atol=1e-17)
    assert not ours.grad[~mask].any() and ours.grad[mask].any()
    if level == "token":
        assert made.clipped_low > 0 and made.clipped_high > 0  # both sides of the clip were met
    else:
        assert torch.autograd.gradcheck(
            lambda x: grpo_loss(x, old, advantages, mask, level=level).loss, logps.clone().requires_grad_()
        )


def test_by_hand():
    """Four tokens, A = 1, 1, -1, -1 at ratios 2, 1/2, 2, 1/2: clipped above, free, free, clipped below."""
    logps = torch.tensor([[2.0, 0.5, 2.0, 0.5]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    made = grpo_loss(logps, torch.zeros(1, 4, dtype=torch.float64), advantages, torch.ones(1, 4))
    made.loss.backward()
    assert made.loss.item() == pytest.approx(-(1.28 + 0.5 - 2 - 0.8) / 4, rel=1e-15)
    assert torch.allclose(logps.grad, torch.tensor([[0, -0.125, 0.5, 0]], dtype=torch.float64), rtol=1e-15, atol=0)
    statistics = [getattr(made, name).item() for name in made._fields[1:]]
    assert statistics == pytest.approx([1.25, 0.5, 2, 0.25, 0.25, 4], rel=1e-15)


def test_the_first_update_is_the_policy_gradient():
    """rho = 1: the ratios are exactly 1, nothing is clipped, and the gradient is -A / tokens."""
    logps, _, advantages, mask = case(3)
    leaf = logps.float().requires_grad_()
    made = grpo_loss(leaf, leaf.detach().clone(), advantages.float(), mask)
    made.loss.backward()
    assert made.ratio_min == made.ratio_max == made.ratio_mean == 1 and made.clipped_low == made.clipped_high == 0
    assert torch.allclose(leaf.grad, -(advantages * mask / mask.sum()).float(), rtol=1e-6, atol=0)


def test_what_the_mask_leaves_out_may_hold_anything():
    logps, old, advantages, mask = case(4)
    for bad in (NAN, math.inf, -math.inf):
        leaf = logps.masked_fill(~mask, bad).requires_grad_()
        made = grpo_loss(
            leaf,
            old.masked_fill(~mask, bad),
            advantages.masked_fill(~mask, bad),
            mask,
            mismatch=torch.ones_like(logps).masked_fill(~mask, bad),
        )
        made.loss.backward()
        clean = grpo_loss(logps, old, advantages, mask)
        assert all(torch.equal(*pair) for pair in zip(made, clean, strict=True))
        assert leaf.grad.isfinite().all() and not leaf.grad[~mask].any()


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_empty_mask(shape, level):
    leaf = torch.randn(shape, requires_grad=True)
    if 0 in shape:
        with pytest.raises(ValueError, match="expected at least one row and one token"):
            grpo_loss(leaf, leaf.detach(), torch.ones(shape[0]), torch.zeros(shape), level=level)
        return
    made = grpo_loss(leaf, torch.randn(shape), torch.ones(shape[0]), torch.zeros(shape), level=level)
    made.loss.backward()
    assert [part.item() for part in made] == [0, 1, 1, 1, 0, 0, 0] and not leaf.grad.any()


def test_micro_batches_add_up_with_a_common_normalizer():
    logps, old, advantages, mask = case(5, (8, 4))
    whole = grpo_loss(logps, old, advantages, mask).loss
    parts = [
        grpo_loss(logps[i : i + 3], old[i : i + 3], advantages[i : i + 3], mask[i : i + 3], normalizer=mask.sum()).loss
        for i in (0, 3, 6)
    ]
    assert torch.allclose(sum(parts), whole, rtol=1e-13)


def test_gspo_is_the_sequence_level_with_lengths_folded_in():
    """mean over rows of min(s A, clamp(s) A), s = exp(mean of log rho): Zheng et al. 2025."""
    logps, old, _, mask = case(6)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0], dtype=torch.float64)
    length = mask.sum(1).clamp(min=1)
    made = grpo_loss(logps, old, fold(advantages, 1 / length), mask, level="sequence", normalizer=len(logps))
    s = (((logps - old) * mask).sum(1) / length).exp()
    terms = torch.minimum(s * advantages, s.clamp(1 - LOW, 1 + HIGH) * advantages) * mask.any(1)
    assert torch.allclose(made.loss, -terms.mean(), rtol=1e-12)


thin = st.floats(-4, 4, width=32)  # 24 bits: float64 holds the product of two of them and five bits more


@settings(max_examples=500, deadline=None)
@given(
    rows=st.lists(st.tuples(thin, st.floats(0, 4, width=32), st.integers(0, 32)), min_size=1, max_size=8),
)
def test_folding_is_exact_bit_for_bit(rows):
    """float64, operands of float32, weights k / 32: w min(rho A, c A) and min(rho wA, c wA) have the same bits."""
    a, ratio, w = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    w = w / 32
    c = ratio.clamp(float(torch.tensor(0.8)), float(torch.tensor(1.28)))  # the bounds as float32 holds them
    outside = w * torch.minimum(ratio * a, c * a)
    folded = fold(a[:, None], w[:, None])[:, 0]
    inside = torch.minimum(ratio * folded, c * folded)
    assert torch.equal(outside.view(torch.int64), inside.view(torch.int64))


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-4, 4), st.floats(0.1, 4), st.floats(0.01, 1)), min_size=1, max_size=8),
)
def test_folding_any_weight_costs_two_roundings(rows):
    a, ratio, w = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    c = ratio.clamp(1 - LOW, 1 + HIGH)
    outside, folded = w * torch.minimum(ratio * a, c * a), fold(a, w)
    inside = torch.minimum(ratio * folded, c * folded)
    assert ((outside - inside).abs() <= 2 * 2**-52 * outside.abs() + 1e-300).all()


def test_folding_in_the_loss_keeps_gradients_and_clips():
    logps, old, advantages, mask = case(7)
    age = torch.arange(35).view(5, 7) % 6
    weights = staleness_weights(age, 1, 4).double()
    folded, outside = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    made = grpo_loss(folded, old, fold(advantages, weights), mask)
    ratio = (outside - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)
    (-(gain * weights * mask).sum() / mask.sum()).backward()
    made.loss.backward()
    assert torch.allclose(folded.grad, outside.grad, rtol=1e-14, atol=0)
    alive = mask & (weights > 0)  # A = 0 is neither a gain nor a loss
    plain = grpo_loss(logps, old, advantages, alive)
    assert made.clipped_low * made.tokens == plain.clipped_low * plain.tokens


def test_staleness_by_hand():
    age = torch.tensor([[0, 2, 3, 4, 5, 6, 100]])
    assert staleness_weights(age, 2, 5).tolist() == [[1, 1, 0.75, 0.5, 0.25, 0, 0]]
    assert staleness_weights(age, 0, 0).tolist() == [[1, 0, 0, 0, 0, 0, 0]]
    assert staleness_weights(age, 3, 3).tolist() == [[1, 1, 1, 0, 0, 0, 0]]


@settings(deadline=None)
@given(k1=st.integers(0, 9), span=st.integers(0, 9))
def test_staleness_falls_from_one_to_zero_and_never_rises(k1, span):
    weights = staleness_weights(torch.arange(25), k1, k1 + span)
    assert (weights[: k1 + 1] == 1).all() and (weights[k1 + span + 1 :] == 0).all()
    assert (weights.diff() <= 0).all() and (weights[: k1 + span + 1] > 0).all()


def test_mismatch_by_hand():
    trainer = torch.tensor([[4.0, 1.5, 0.5], [2.0, 2.0, NAN]], dtype=torch.float64).log()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rollout = torch.zeros(2, 3, dtype=torch.float64)

    def weights(**options):
        return mismatch_weights(trainer, rollout, mask, **options)

    def near(actual, expected):
        return torch.allclose(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-14)

    assert near(weights(), [[2, 1.5, 0.5], [2, 2, 1]])
    assert near(weights(mode="mask", cap=3), [[0, 1.5, 0.5], [2, 2, 1]])
    assert near(weights(level="sequence", cap=3.5), [3, 3.5])
    assert near(weights(level="sequence", mode="mask", cap=3.5), [3, 0])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_equal_numbers_weigh_exactly_one_and_change_nothing(level):
    logps, old, advantages, mask = case(8)
    weights = mismatch_weights(old, old.clone(), mask, level=level, mode="mask")
    assert (weights == 1).all()
    assert torch.equal(
        grpo_loss(logps, old, advantages, mask, mismatch=weights).loss, grpo_loss(logps, old, advantages, mask).loss
    )


def test_half_precision_is_computed_in_fp32():
    logps, old, advantages, mask = case(9)
    logps, old = logps.bfloat16(), old.bfloat16()
    made = grpo_loss(logps, old, advantages.float(), mask).loss
    assert made.dtype == torch.float32 and torch.equal(
        made, grpo_loss(logps.float(), old.float(), advantages.float(), mask).loss
    )


def test_refusals():
    rows, row = torch.zeros(2, 3), torch.zeros(2)
    for call, words in (
        (lambda: grpo_loss(rows, rows[:, :2], row, rows), r"old_logps: expected \[B, T\].*got \[2, 2\]"),
        (lambda: grpo_loss(rows, rows, torch.zeros(3), rows), r"advantages: expected \[B\] or \[B, T\] of \[2, 3\]"),
        (lambda: grpo_loss(rows, rows, row, rows, mismatch=torch.zeros(2, 1)), "mismatch: expected"),
        (lambda: grpo_loss(rows, rows, row, rows, level="turn"), "level: expected 'token' or 'sequence', got 'turn'"),
        (lambda: grpo_loss(rows, rows, row, rows, clip_low=1.2), "expected 0 <= clip_low < 1"),
        (lambda: mismatch_weights(rows, rows, rows, level="turn"), "level: expected"),
        (lambda: mismatch_weights(rows, rows, rows, mode="clip"), "mode: expected 'truncate' or 'mask', got 'clip'"),
        (lambda: mismatch_weights(rows, rows, rows, cap=0), "cap: expected a number above 0, got 0"),
        (lambda: staleness_weights(torch.tensor([-1]), 0, 1), "age: expected 0 or more, got -1"),
        (lambda: staleness_weights(torch.tensor([1]), 2, 1), "expected 0 <= k1 <= k2, got 2 and 1"),
        (lambda: fold(rows, torch.zeros(3)), "advantages, weights: expected"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="age: expected integers"):
        staleness_weights(torch.tensor([1.0]), 0, 1)


def test_examples_run():
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
