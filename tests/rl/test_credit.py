"""Two-level credit against the formulas in exact rational arithmetic, one group at a time.

Reference: `exact`, Python fractions over lists, written from the docstring. Not covered: how a trainer lays rows out.
"""

import doctest
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.rl import credit
from ornith_moe.rl.credit import (
    CREDITS,
    STD_FLOOR,
    mean_of_valid,
    relative_to_siblings,
    shared,
    solution_only,
    two_level,
)

NAN = float("nan")


def mean(values):
    return sum(values, Fraction(0)) / len(values)


def siblings(values, valid, punished, least):
    """[(advantage, trained)] of one group; values are Fractions."""
    good = [v for v, ok in zip(values, valid, strict=True) if ok]
    if len(good) < max(least, 1):
        return [(Fraction(0), False)] * len(values)
    return [
        (v - mean(good), True) if ok else (-mean(good), True) if bad else (Fraction(0), False)
        for v, ok, bad in zip(values, valid, punished, strict=True)
    ]


def exact(rewards, valid, scaffold_valid, struck, least, kind):
    """Advantages of one task as [S] and [S][R] pairs (advantage, trained)."""
    punish = struck == "punish"
    valid = [[ok and top for ok in row] for row, top in zip(valid, scaffold_valid, strict=True)]
    if kind == "two_level":
        solution = [
            siblings(row, ok, [punish and not x for x in ok], least) for row, ok in zip(rewards, valid, strict=True)
        ]
        values = [
            mean([r for r, x in zip(row, ok, strict=True) if x]) if any(ok) else Fraction(0)
            for row, ok in zip(rewards, valid, strict=True)
        ]
        enough = [sum(ok) >= max(least, 1) for ok in valid]
        return siblings(values, enough, [punish and not any(ok) for ok in valid], 1), solution
    values, good = [r for row in rewards for r in row], [ok for row in valid for ok in row]
    flat = siblings(values, good, [punish and not ok for ok in good], least)
    width = len(rewards[0])
    rows = [flat[i * width : (i + 1) * width] for i in range(len(rewards))]
    scaffold = []
    for row in rows:
        kept = [a for a, trained in row if trained]
        scaffold.append((mean(kept), True) if kept else (Fraction(0), False))
    solution = [row if top else [(Fraction(0), False)] * width for row, top in zip(rows, scaffold_valid, strict=True)]
    return ([(Fraction(0), False)] * len(rows) if kind == "solution_only" else scaffold), solution


@st.composite
def groups(draw):
    S, R = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    reward = st.sampled_from([Fraction(n, 12) for n in range(13)])  # thirds too, which floats do not hold
    rewards = draw(st.lists(st.lists(reward, min_size=R, max_size=R), min_size=S, max_size=S))
    flags = st.lists(st.sampled_from([True, True, False]), min_size=R, max_size=R)
    valid = draw(st.lists(flags, min_size=S, max_size=S))
    top = draw(st.lists(st.sampled_from([True, True, True, False]), min_size=S, max_size=S))
    return rewards, valid, top


def tensors(rewards, valid, top):
    """What is struck holds NaN."""
    valid, top = torch.tensor(valid), torch.tensor(top)
    values = torch.tensor([[float(r) for r in row] for row in rewards], dtype=torch.float64)
    return values.masked_fill(~(valid & top[:, None]), NAN), valid, top


options = {"struck": st.sampled_from(["drop", "punish"]), "least": st.integers(1, 3)}


@pytest.mark.parametrize("kind", CREDITS)
@settings(max_examples=200, deadline=None)
@given(group=groups(), **options)
def test_against_exact_arithmetic(kind, group, struck, least):
    rewards, valid, top = tensors(*group)
    made = CREDITS[kind](rewards, valid, struck=struck, min_valid=least, scaffold_valid=top)
    scaffold, solution = exact(*group, struck, least, kind)
    assert made.scaffold_trained.tolist() == [trained for _, trained in scaffold]
    assert made.solution_trained.tolist() == [[trained for _, trained in row] for row in solution]
    expected = torch.tensor([float(a) for a, _ in scaffold], dtype=torch.float64)
    assert torch.allclose(made.scaffold, expected, rtol=1e-12, atol=1e-14)
    expected = torch.tensor([[float(a) for a, _ in row] for row in solution], dtype=torch.float64)
    assert torch.allclose(made.solution, expected, rtol=1e-12, atol=1e-14)
    assert not made.scaffold[~made.scaffold_trained].any() and not made.solution[~made.solution_trained].any()


def test_by_hand():
    """Two tasks, S = 3, R = 2. Task 0: values 1, 1/2, 0, mean 1/2. Task 1: one rollout of scaffold 0 is struck."""
    rewards = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], [[1.0, NAN], [0.5, 0.0], [0.25, 0.25]]])
    valid = ~rewards.isnan()
    dropped = two_level(rewards, valid)
    assert dropped.scaffold.tolist() == [[0.5, 0, -0.5], [0.5, -0.25, -0.25]]
    assert dropped.solution.tolist() == [[[0, 0], [0.5, -0.5], [0, 0]], [[0, 0], [0.25, -0.25], [0, 0]]]
    assert dropped.solution_trained.tolist() == valid.tolist() and dropped.scaffold_trained.all()
    punished = two_level(rewards, valid, struck="punish")
    assert punished.solution[1, 0].tolist() == [0, -1] and punished.solution_trained.all()
    assert torch.equal(punished.scaffold, dropped.scaffold)  # the struck rollout is in no mean
    lonely = two_level(rewards, valid, min_valid=2)
    assert lonely.scaffold[1].tolist() == [0, -0.0, 0.0] and lonely.scaffold_trained[1].tolist() == [False, True, True]
    assert two_level(rewards, valid, min_valid=2, min_scaffolds=3).scaffold_trained.tolist() == [
        [True] * 3,
        [False] * 3,
    ]
    one = shared(rewards, valid)
    assert one.solution[0].tolist() == [[0.5, 0.5], [0.5, -0.5], [-0.5, -0.5]]  # obeying scaffold 2 is blamed
    assert one.scaffold[0].tolist() == [0.5, 0, -0.5]
    only = solution_only(rewards, valid)
    assert torch.equal(only.solution, one.solution) and not only.scaffold_trained.any() and not only.scaffold.any()
    assert torch.equal(solution_only(rewards, valid, within="scaffold").solution, dropped.solution)


def test_a_struck_scaffold():
    """Its solutions carry no loss; under "punish" it stands below the others, whose mean it does not enter."""
    rewards, top = torch.tensor([[1.0, 0.0], [NAN, NAN], [0.0, 0.0]]), torch.tensor([True, False, True])
    for rule in (two_level, shared):
        dropped = rule(rewards, scaffold_valid=top)
        assert dropped.scaffold.tolist() == [0.25, 0, -0.25] and dropped.scaffold_trained.tolist() == top.tolist()
        punished = rule(rewards, scaffold_valid=top, struck="punish")
        assert punished.scaffold.tolist() == [0.25, -0.25, -0.25] and punished.scaffold_trained.all()
        for made in (dropped, punished):
            assert made.solution_trained.tolist() == [[True] * 2, [False] * 2, [True] * 2]
            assert not made.solution[1].any()


def test_a_scaffold_whose_rollouts_were_all_struck():
    rewards, valid = torch.tensor([[0.5, 0.5], [NAN, NAN]]), torch.tensor([[True, True], [False, False]])
    assert two_level(rewards, valid).scaffold_trained.tolist() == [True, False]
    punished = two_level(rewards, valid, struck="punish")
    assert punished.scaffold.tolist() == [0, -0.5] and punished.scaffold_trained.all()
    assert not punished.solution.any() and punished.solution_trained.tolist() == valid.tolist()


@pytest.mark.parametrize("kind", CREDITS)
@pytest.mark.parametrize("struck", ["drop", "punish"])
@pytest.mark.parametrize("scale", ["none", "std"])
@settings(max_examples=50, deadline=None)
@given(group=groups(), data=st.data())
def test_permutations_permute(kind, struck, scale, group, data):
    rewards, valid, top = tensors(*group)
    S, R = rewards.shape
    rows, columns = data.draw(st.permutations(range(S))), data.draw(st.permutations(range(R)))

    def run(rewards, valid, top):
        return CREDITS[kind](
            rewards, valid, struck=struck, scaffold_valid=top, scaffold_scale=scale, solution_scale=scale
        )

    before, after = run(rewards, valid, top), run(rewards[rows][:, columns], valid[rows][:, columns], top[rows])
    for index in (0, 2):
        assert torch.allclose(before[index][rows].double(), after[index].double(), rtol=1e-9, atol=1e-11)
    for index in (1, 3):
        assert torch.allclose(before[index][rows][:, columns].double(), after[index].double(), rtol=1e-9, atol=1e-11)


@settings(max_examples=200, deadline=None)
@given(group=groups(), struck=st.sampled_from(["drop", "punish"]), data=st.data())
def test_a_strike_moves_the_mean_it_leaves_and_nothing_else(group, struck, data):
    """Solutions of other scaffolds keep their bits; those of its own, and other scaffolds, all move by one number."""
    rewards, valid, top = tensors(*group)
    live = (valid & top[:, None]).nonzero().tolist()
    if not live:
        return
    s, r = data.draw(st.sampled_from(live))
    after_valid = valid.clone()
    after_valid[s, r] = False
    before = two_level(rewards, valid, struck=struck, scaffold_valid=top)
    after = two_level(rewards, after_valid, struck=struck, scaffold_valid=top)
    others = torch.arange(len(rewards)) != s
    assert torch.equal(before.solution[others], after.solution[others])
    assert torch.equal(
        before.scaffold_trained[others] & bool(after_valid.any(-1)[top].any()), after.scaffold_trained[others]
    )
    own = (valid & top[:, None])[s].clone()
    own[r] = False
    for moved in (
        (after.solution - before.solution)[s][own],
        (after.scaffold - before.scaffold)[others & before.scaffold_trained & after.scaffold_trained],
    ):
        assert torch.allclose(moved, moved[:1].expand_as(moved), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", CREDITS)
@pytest.mark.parametrize("struck", ["drop", "punish"])
@pytest.mark.parametrize("scale", ["none", "std"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 3), (2, 4, 1), (3, 5, 4)])
def test_nothing_to_learn_gives_zeros(kind, struck, scale, shape):
    """All equal, though 0.1 is no sum of thirds of itself; all struck; alone."""
    rule = CREDITS[kind]
    arguments = {"struck": struck, "scaffold_scale": scale, "solution_scale": scale}
    equal = rule(torch.full(shape, 0.1), **arguments)
    assert not equal.scaffold.any() and not equal.solution.any() and equal.solution_trained.all()
    out = rule(torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool), **arguments)
    assert not any(part.any() for part in out)
    random = two_level(torch.rand(shape, generator=torch.Generator().manual_seed(0)), **arguments)
    assert shape[1] > 1 or not random.scaffold.any()
    assert shape[2] > 1 or not random.solution.any()


def test_advantages_of_a_group_add_up_to_zero_and_leave_one_out_is_a_multiple():
    """R / (R - 1) times mean centring is leaving oneself out of the mean: why there is no such option."""
    rewards = torch.rand(7, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = two_level(rewards)
    assert made.solution.sum(-1).abs().max() < 1e-14 and made.scaffold.sum(-1).abs().max() < 1e-14
    others = (rewards.sum(-1, keepdim=True) - rewards) / 4
    assert torch.allclose(rewards - others, made.solution * 5 / 4, rtol=1e-12, atol=1e-15)


def test_the_standard_deviation_at_two_rollouts_is_deaf_to_size():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.1]], dtype=torch.float64)
    made = two_level(rewards, solution_scale="std").solution
    expected = [[d / 2 / (d / 2**0.5 + STD_FLOOR) * sign for sign in (-1, 1)] for d in (1.0, 0.1)]
    assert torch.allclose(made, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
    assert ((made.abs() - 0.5**0.5).abs() < 2e-3).all()


def test_a_level_above_is_the_same_function():
    """Four proposed tasks: a task's value is the mean of its scaffolds' values."""
    rewards = torch.tensor([1.0, 0.5, 0.5, 0.0]).view(4, 1, 1).expand(4, 3, 2)
    scaffolds = mean_of_valid(rewards, torch.ones(4, 3, 2, dtype=torch.bool))
    tasks = mean_of_valid(scaffolds, torch.ones(4, 3, dtype=torch.bool))
    advantage, trained = relative_to_siblings(tasks, torch.tensor([True, True, True, False]))
    assert torch.allclose(advantage, torch.tensor([1 / 3, -1 / 6, -1 / 6, 0])) and trained.tolist() == [True] * 3 + [
        False
    ]


def test_leading_dimensions_are_independent_and_dtypes_are_kept():
    rewards = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    made = two_level(rewards.requires_grad_())
    assert made.scaffold.shape == (2, 3, 4) and made.solution.dtype == torch.float32
    assert not made.solution.requires_grad
    assert torch.equal(made.solution[1, 2], two_level(rewards[1, 2]).solution)
    assert two_level(torch.tensor([[True, False]])).solution.tolist() == [[0.5, -0.5]]
    assert two_level(torch.ones(1, 2, dtype=torch.bfloat16)).solution.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"rewards: expected shape \[..., S, R\]"),
        ((torch.ones(3, 0),), r"of at least one each, got \[3, 0\]"),
        ((torch.ones(3, 2), torch.ones(3, 2)), "valid: expected bool"),
        ((torch.ones(3, 2), torch.ones(2, 3, dtype=torch.bool)), r"valid: expected bool \[3, 2\]"),
        ((torch.tensor([[1.0, NAN]]),), r"rewards\[0, 1\]: expected a finite number, got nan; strike"),
    ],
)
def test_refusals(arguments, message):
    for rule in CREDITS.values():
        with pytest.raises(ValueError, match=message):
            rule(*arguments)


def test_refusals_of_options():
    rewards = torch.tensor([[0.0, -1.0]])
    for words, options in (
        ("struck: expected 'drop' or 'punish', got 'skip'", {"struck": "skip"}),
        (r"rewards\[0, 1\]: expected 0 or more under struck='punish', got -1.0; shift", {"struck": "punish"}),
        ("scale: expected 'none' or 'std', got 'mad'", {"solution_scale": "mad"}),
        (r"scaffold_valid: expected bool \[1\]", {"scaffold_valid": torch.ones(2, dtype=torch.bool)}),
    ):
        with pytest.raises(ValueError, match=words):
            two_level(rewards, **options)
    with pytest.raises(ValueError, match="within: expected 'task' or 'scaffold', got 'row'"):
        solution_only(rewards, within="row")


def test_examples_run():
    assert doctest.testmod(credit, extraglobs={"torch": torch}).failed == 0
