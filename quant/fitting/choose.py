"""Types of groups of tensors that lose the least within a size: an integer program.

    minimise    sum over groups g, options o of loss[g, o] * x[g, o]
    such that   sum of bytes[g, o] * x[g, o] <= limit,    sum over o of x[g, o] = 1 for each g,    x in {0, 1}

Solved by HiGHS (scipy.optimize.milp). Its tolerances are absolute, so losses are scaled by the optimum of the relaxed
program, and bytes, beyond those of the smallest options, by what the limit has to spare. The bytes of an answer are
then counted in integers; one that is too large by rounding makes the limit smaller. `bound`, the least loss that any
choice could have, is of the first program, whose limit nothing has shortened.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ornith_moe.quant.errors import PlanError

GAP = 1e-6  # relative, at which the search ends
SECONDS = 120.0
SHORTENED = 30  # times a limit may be made smaller


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of a group."""

    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """The option of each group, their bytes and loss together, and the least loss that any choice could have."""

    options: tuple[int, ...]
    nbytes: int
    loss: float
    bound: float


def choose(groups: Sequence[Sequence[Choice]], limit: int) -> Chosen | None:
    """The choice of least loss within `limit` bytes, as good as any within `GAP`; None if none is that small.

    Raises:
        PlanError: scipy is not installed.
    """
    smallest = [min(option.nbytes for option in options) for options in groups]
    spare = limit - sum(smallest)
    if spare < 0:
        return None
    kept = [_undominated(options, least + spare) for options, least in zip(groups, smallest, strict=True)]
    reduced = [
        [Choice(options[i].nbytes - least, options[i].loss) for i in keep]
        for options, keep, least in zip(groups, kept, smallest, strict=True)
    ]
    shortened, bound = spare, 0.0
    for times in range(SHORTENED):
        picked, found = _solve(reduced, shortened)
        bound = bound if times else found
        used = sum(options[i].nbytes for options, i in zip(reduced, picked, strict=True))
        if used <= spare:
            loss = sum(options[i].loss for options, i in zip(reduced, picked, strict=True))
            answer = tuple(keep[i] for keep, i in zip(kept, picked, strict=True))
            return Chosen(answer, used + limit - spare, loss, min(bound, loss))
        shortened -= (used - spare) << times
    raise AssertionError("the limit is shortened by more than the solver can miss")


def _undominated(options: Sequence[Choice], most: int) -> list[int]:
    """Options of at most `most` bytes, by bytes, that are better than every smaller one."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].loss)):
        if options[index].nbytes <= most and (not kept or options[index].loss < options[kept[-1]].loss):
            kept.append(index)
    return kept


def _solve(groups: Sequence[Sequence[Choice]], limit: int) -> tuple[list[int], float]:
    """The option of each group, and a bound from below on the loss."""
    optimize, sparse = _scipy()
    sizes = np.array([option.nbytes for options in groups for option in options], np.float64) / max(limit, 1)
    losses = np.array([option.loss for options in groups for option in options], np.float64)
    starts = np.cumsum([0, *map(len, groups)])
    if all(len(options) == 1 for options in groups):
        return [0] * len(groups), float(losses.sum())
    of_group = np.repeat(np.arange(len(groups)), np.diff(starts))
    one = sparse.csr_array((np.ones(len(losses)), (of_group, np.arange(len(losses)))))
    rules = [optimize.LinearConstraint(one, 1, 1), optimize.LinearConstraint(sizes[None], -np.inf, 1)]
    box = optimize.Bounds(0, 1)
    top = max(losses.max(), 1e-300)
    settings = {"mip_rel_gap": GAP, "time_limit": SECONDS}
    with _silent():
        relaxed = optimize.milp(losses / top, constraints=rules, bounds=box)
        scale = top * max(relaxed.fun or 0.0, 1e-9) / 1e4
        whole = np.ones(len(losses))
        result = optimize.milp(losses / scale, constraints=rules, bounds=box, integrality=whole, options=settings)
    if result.x is None:  # a limit that is shortened to less than the smallest options take
        return [0] * len(groups), 0.0
    picked = [int(np.argmax(result.x[first:last])) for first, last in pairwise(starts)]
    return picked, float(result.mip_dual_bound) * scale


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing gets to stdout, where HiGHS prints a line of its own whatever it is told."""
    sys.stdout.flush()
    kept = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise PlanError("a fit needs scipy, which is not installed; pip install 'ornith-moe[fit]'") from None
    return optimize, sparse
