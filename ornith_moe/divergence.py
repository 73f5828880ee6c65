"""How far next-token distributions are apart, from logits that come in slabs of the vocabulary.

With logits a of the source and b of a build, A = log sum exp a and B of b, over all tokens v:

    KL(P || Q) = sum_v p_v (log p_v - log q_v) = sum_v e^(a_v - A) (a_v - b_v)  -  (A - B)

Each sum is carried with the largest logit so far taken off, so the vocabulary is gone through once and [N, V] never
stands. All sums are fp64; equal logits give exactly 0.

A mean over positions has a standard error over windows, since positions of one window are not independent: the
deviation of the windows' means over the square root of their number. That of a quantile is the deviation of the
quantiles of windows drawn again with replacement. One window has none.

Letters: N positions, V vocabulary, v tokens of a slab, W windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

RESAMPLES = 200


class Found(NamedTuple):
    """Of builds B at N positions."""

    kl: np.ndarray  # float64 [B, N], nats, KL(source || build)
    same_top: np.ndarray  # bool [B, N]: source and build think the same token likeliest
    log_likelihood: np.ndarray  # float64 [1 + B, N] of the tokens that follow; the source's first


class _Running:
    """Of one model at N positions: log sum exp, the likeliest token and the logit of the token that follows."""

    def __init__(self, targets: np.ndarray):
        self.targets = torch.from_numpy(targets)
        self.most = torch.full((len(targets),), -torch.inf, dtype=torch.float64)
        self.sum = torch.zeros(len(targets), dtype=torch.float64)
        self.likeliest = torch.zeros(len(targets), dtype=torch.int64)
        self.target = torch.zeros(len(targets), dtype=torch.float64)

    def add(self, start: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """exp(logits - the largest so far), and by what earlier sums of such numbers are to be multiplied."""
        place = torch.from_numpy(logits.numpy().argmax(1))  # the lowest id wins a tie
        most = logits.gather(1, place[:, None])[:, 0]
        self.likeliest = torch.where(most > self.most, place + start, self.likeliest)
        scale = (self.most - torch.maximum(self.most, most)).exp()
        self.most = torch.maximum(self.most, most)
        powers = (logits - self.most[:, None]).exp_()
        self.sum = self.sum * scale + powers.sum(1)
        inside = (self.targets >= start) & (self.targets < start + logits.shape[1])
        self.target[inside] = logits[inside, self.targets[inside] - start]
        return powers, scale

    @property
    def log_sum(self) -> torch.Tensor:
        return self.most + self.sum.log()


class Divergences:
    """Of builds from their source at the same positions.

    Args:
        targets: int64 [N], the token that follows each position.
        builds: how many.
    """

    def __init__(self, targets: np.ndarray, builds: int):
        self._source = _Running(targets)
        self._builds = [_Running(targets) for _ in range(builds)]
        self._apart = [torch.zeros(len(targets), dtype=torch.float64) for _ in range(builds)]

    def add(self, start: int, source: torch.Tensor, builds: Iterable[torch.Tensor]) -> None:
        """Logits [N, v] of tokens [start, start + v), in order; fp32 as models give them."""
        a = source.double()
        powers, scale = self._source.add(start, a)
        for number, (running, logits) in enumerate(zip(self._builds, builds, strict=True)):
            b = logits.double()
            self._apart[number] = self._apart[number] * scale + torch.linalg.vecdot(powers, a - b)
            running.add(start, b)

    def found(self) -> Found:
        """What all slabs together say."""
        same = [running.likeliest == self._source.likeliest for running in self._builds]
        likelihood = [running.target - running.log_sum for running in (self._source, *self._builds)]
        return Found(_rows(self._kl()), _rows(same), _rows(likelihood))

    def _kl(self) -> list[torch.Tensor]:
        source = self._source
        pairs = zip(self._apart, self._builds, strict=True)
        return [apart / source.sum - (source.log_sum - running.log_sum) for apart, running in pairs]


def _rows(found: list[torch.Tensor]) -> np.ndarray:
    return np.array([each.numpy() for each in found])


@dataclass(frozen=True)
class Figure:
    """A number and its standard error over windows; None of one window."""

    value: float
    error: float | None


def mean(values: np.ndarray) -> Figure:
    """Of [W, P]."""
    return Figure(float(values.mean()), _deviation(values.mean(1), len(values)))


def quantile(values: np.ndarray, share: float) -> Figure:
    """Of [W, P]."""
    generator = np.random.default_rng(0)
    drawn = [
        np.quantile(values[generator.integers(0, len(values), len(values))], share)
        for _ in range(RESAMPLES if len(values) > 1 else 0)
    ]
    return Figure(float(np.quantile(values, share)), float(np.std(drawn, ddof=1)) if drawn else None)


def _deviation(means: np.ndarray, windows: int) -> float | None:
    return float(means.std(ddof=1) / np.sqrt(windows)) if windows > 1 else None
