"""Two-level credit: how the reward of S * R solutions reaches the scaffolds and the solutions of a task.

    V_s     = mean over valid r of reward[s, r]                     value of scaffold s
    A[s]    = V_s - mean over valid siblings s' of V_s'             its tokens: is it better than the other scaffolds?
    A[s, r] = reward[s, r] - V_s                                    a solution's tokens: better than under the same one?

A solution that obeys a bad scaffold is as good as its neighbours under it and is not blamed; the scaffold is. One
advantage over all S * R solutions, the baseline `shared`, blames it.

Strike-outs. A struck rollout is in no mean. `struck="drop"`: it has no advantage and no loss. `struck="punish"`: it
counts as reward 0, the least there is, against the others: 0 - mean of the valid ones. A scaffold is struck with all of
its rollouts, or by `scaffold_valid`; then the same rule holds one level up, and its solutions carry no loss in either
case. Nothing is known of a group with fewer than `min_valid` valid members: zeros, no loss, and a scaffold over such a
group is no sibling of the others.

A level above. Both levels are one function, `relative_to_siblings`, over the last dimension. Where the policy proposes
tasks too, a task's value is `mean_of_valid` of its scaffolds' values, and its advantage
`relative_to_siblings(task_values [..., N], valid)`; leading dimensions are the rest of the tree.

Numerics: in the dtype of the rewards (other than floats: the default dtype), no autograd, deterministic. Sums are taken
from the group's smallest member, so that equal rewards give exactly 0. Never NaN: what is struck may hold anything.

Sources: group-relative advantages, Shao et al. 2024 (GRPO); no division by the standard deviation, Liu et al. 2025 (Dr.
GRPO); reward reaching both stages, second-hand (restatements of Ornith's blog); the two levels and strike-outs, ours.

Letters: S scaffolds of a task, R rollouts under a scaffold.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch

STD_FLOOR = 1e-4  # added to a standard deviation, as TRL does: rewards that differ by rounding are no signal

Struck = Literal["drop", "punish"]
Scale = Literal["none", "std"]


class Credit(NamedTuple):
    """Advantages of both stages, and which rows carry a loss (a mask for the rows that do not).

    Attributes:
        scaffold: [..., S]. solution: [..., S, R]. Both 0 where there is no loss.
        scaffold_trained, solution_trained: bool of the same shapes; an advantage of 0 from a tie is still trained.
    """

    scaffold: torch.Tensor
    solution: torch.Tensor
    scaffold_trained: torch.Tensor
    solution_trained: torch.Tensor


def mean_of_valid(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the last dimension of what is valid, 0 where nothing is: [..., N], bool [..., N] -> [...].

    Equal values give exactly that value: the sum runs over differences from the smallest one.
    """
    infinite = torch.full_like(values, torch.inf)
    least = torch.where(valid, values, infinite).amin(-1)
    least = torch.where(valid.any(-1), least, torch.zeros_like(least))
    above = torch.where(valid, values - least.unsqueeze(-1), torch.zeros_like(values)).sum(-1)
    return least + above / valid.sum(-1).clamp(min=1)


def relative_to_siblings(
    values: torch.Tensor,
    valid: torch.Tensor,
    *,
    punished: torch.Tensor | None = None,
    min_valid: int = 1,
    scale: Scale = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value - mean) / scale within each group of siblings, the last dimension; one level of the tree.

    Args:
        values: [..., N] float. valid: [..., N] bool, the members the mean is over.
        punished: [..., N] bool: not valid, yet trained, with value 0. The rest that is not valid is dropped.
        min_valid: groups with fewer valid members get zeros and no loss.
        scale: "std" divides by the sample standard deviation of the valid ones plus 1e-4. With two members that makes
            every difference +-0.7, however small: hence not the default.
    Returns:
        advantages [..., N], and which of them are trained, bool [..., N].
    """
    punished = torch.zeros_like(valid) if punished is None else punished & ~valid
    zero = torch.zeros_like(values)
    count = valid.sum(-1, keepdim=True)
    trained = (valid | punished) & (count >= max(min_valid, 1))
    mean = mean_of_valid(values, valid).unsqueeze(-1)
    advantage = torch.where(valid, values, zero) - mean
    if scale == "std":
        square = torch.where(valid, advantage, zero).square().sum(-1, keepdim=True)
        advantage = advantage / ((square / (count - 1).clamp(min=1)).sqrt() + STD_FLOOR)
    elif scale != "none":
        raise ValueError(f"scale: expected 'none' or 'std', got {scale!r}")
    return torch.where(trained, advantage, zero), trained


def two_level(
    rewards: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    struck: Struck = "drop",
    min_valid: int = 1,
    min_scaffolds: int = 1,
    scaffold_scale: Scale = "none",
    solution_scale: Scale = "none",
    scaffold_valid: torch.Tensor | None = None,
) -> Credit:
    """A[s] = V_s - mean V over its valid siblings; A[s, r] = reward[s, r] - V_s.

    Args:
        rewards: [..., S, R], one per solution; what is struck may hold anything, NaN too.
        valid: bool [..., S, R], False for a solution that was struck; default all valid.
        struck: what a struck row gets: "drop", nothing, or "punish", 0 - mean of the valid ones.
        min_valid: valid rollouts that a scaffold needs for a value, and its solutions for an advantage.
        min_scaffolds: scaffolds with a value that a task needs for its scaffolds to get an advantage.
        scaffold_scale, solution_scale: "std" divides by the group's standard deviation (see `relative_to_siblings`).
        scaffold_valid: bool [..., S], False for a scaffold that was struck itself: unreadable, or outside the boundary.
    Returns:
        `Credit`. With S = 1, with R = 1, in ties, and where all is struck, the advantages of that level are 0.
    Raises:
        ValueError: shapes, options, a valid reward that is not finite, or below 0 under "punish" (0 would be a prize).
    Source: ours, from GRPO at each level.
    Example:
        >>> two_level(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).scaffold.tolist()
        [0.25, -0.25]
    """
    rewards, valid, scaffold_valid = _checked(rewards, valid, scaffold_valid, struck)
    punish = struck == "punish"
    count = valid.sum(-1)
    solution, solution_trained = relative_to_siblings(
        rewards, valid, punished=~valid if punish else None, min_valid=min_valid, scale=solution_scale
    )
    scaffold, scaffold_trained = relative_to_siblings(
        mean_of_valid(rewards, valid),
        count >= max(min_valid, 1),
        punished=count == 0 if punish else None,  # between 0 and min_valid it is unknown, which is no offence
        min_valid=min_scaffolds,
        scale=scaffold_scale,
    )
    return Credit(scaffold, solution, scaffold_trained, solution_trained)


def shared(
    rewards: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    struck: Struck = "drop",
    min_valid: int = 1,
    min_scaffolds: int = 1,
    scaffold_scale: Scale = "none",
    solution_scale: Scale = "none",
    scaffold_valid: torch.Tensor | None = None,
) -> Credit:
    """The baseline "single-row GRPO": A[s, r] = reward[s, r] - mean over all S * R; A[s] = mean over r of A[s, r].

    It is what GRPO gives if scaffold and solution are one completion of S * R in a group: every token of a row has the
    row's advantage, and the tokens of a scaffold, which stand in R rows, the mean of R. So A[s] = V_s - mean of all
    rewards, the same as in `two_level` where nothing is struck; the difference is in the solutions' tokens.

    Arguments as in `two_level`, so that the arms are interchangeable. `min_valid` counts in the group of S * R;
    `solution_scale` divides the one advantage; `min_scaffolds` and `scaffold_scale` have no second group to act on.
    """
    rewards, valid, scaffold_valid = _checked(rewards, valid, scaffold_valid, struck)
    advantage, trained = relative_to_siblings(
        rewards.flatten(-2),
        valid.flatten(-2),
        punished=~valid.flatten(-2) if struck == "punish" else None,
        min_valid=min_valid,
        scale=solution_scale,
    )
    advantage, trained = advantage.view_as(rewards), trained.view_as(valid)
    scaffold = mean_of_valid(advantage, trained)
    solution_trained = trained & scaffold_valid.unsqueeze(-1)
    solution = torch.where(solution_trained, advantage, torch.zeros_like(advantage))
    return Credit(scaffold, solution, trained.any(-1), solution_trained)


def solution_only(
    rewards: torch.Tensor,
    valid: torch.Tensor | None = None,
    *,
    struck: Struck = "drop",
    min_valid: int = 1,
    min_scaffolds: int = 1,
    scaffold_scale: Scale = "none",
    solution_scale: Scale = "none",
    scaffold_valid: torch.Tensor | None = None,
    within: Literal["task", "scaffold"] = "task",
) -> Credit:
    """The ablation: tokens of scaffolds carry no loss. Solutions as in `shared`, or as in `two_level`.

    The scaffold stays whatever the warm start made of it. Arguments as in `two_level` (of scaffolds: no effect), and

    Args:
        within: "task", one advantage over all S * R; "scaffold", within a scaffold's own group.
    """
    if within not in ("task", "scaffold"):
        raise ValueError(f"within: expected 'task' or 'scaffold', got {within!r}")
    credit = (shared if within == "task" else two_level)(
        rewards,
        valid,
        struck=struck,
        min_valid=min_valid,
        min_scaffolds=min_scaffolds,
        scaffold_scale=scaffold_scale,
        solution_scale=solution_scale,
        scaffold_valid=scaffold_valid,
    )
    return credit._replace(
        scaffold=torch.zeros_like(credit.scaffold), scaffold_trained=torch.zeros_like(credit.scaffold_trained)
    )


CREDITS: Mapping[str, Callable[..., Credit]] = {
    "two_level": two_level,
    "shared": shared,
    "solution_only": solution_only,
}


def _checked(
    rewards: torch.Tensor, valid: torch.Tensor | None, scaffold_valid: torch.Tensor | None, struck: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float rewards, validity of solutions (none under a struck scaffold) and of scaffolds. Reads one flag back."""
    if rewards.dim() < 2 or not rewards.shape[-1] or not rewards.shape[-2]:
        raise ValueError(f"rewards: expected shape [..., S, R] of at least one each, got {list(rewards.shape)}")
    if struck not in ("drop", "punish"):
        raise ValueError(f"struck: expected 'drop' or 'punish', got {struck!r}")
    rewards = rewards.detach()
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    if scaffold_valid is None:
        scaffold_valid = torch.ones_like(valid[..., 0])
    for name, mask, shape in (("valid", valid, rewards.shape), ("scaffold_valid", scaffold_valid, rewards.shape[:-1])):
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(f"{name}: expected bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    valid = valid & scaffold_valid.unsqueeze(-1)
    bad = valid & ~(rewards.isfinite() & (rewards >= 0) if struck == "punish" else rewards.isfinite())
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        value = rewards[tuple(place)].item()
        if math.isfinite(value):
            raise ValueError(
                f"rewards{place}: expected 0 or more under struck='punish', got {value}; shift the rewards"
            )
        raise ValueError(
            f"rewards{place}: expected a finite number, got {value}; "
            "strike the rollout out (valid=False) where the verifier has no answer"
        )
    return rewards, valid, scaffold_valid
