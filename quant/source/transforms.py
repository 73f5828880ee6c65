"""What becomes of the numbers of a weight on their way into a build, each change with its inverse beside it.

    build = f(w)[rows][:, columns]        w = f'(build without columns and rows)

`Values` are functions of a single number, `Order`s say where rows or columns come from, and a `Transform` is one of
each, on slabs of rows. An order of rows may take a part of them, so that a weight fills several tensors: the keys and
the values of `kv_b`, the frames of a convolution over time.

Orders move bits and are exact. Functions of values are computed as each says and rounded once, to fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ornith_moe.quant.source.slab import FLOAT_BITS, Slab


class Values(ABC):
    """A function of each value of a weight, fp32 to fp32."""

    exact = False  # whether a value comes back as it was, and in its own dtype

    @abstractmethod
    def forward(self, values: np.ndarray) -> np.ndarray:
        """What a build stores instead of `values`."""

    @abstractmethod
    def inverse(self, values: np.ndarray) -> np.ndarray:
        """The weights of what a build stores."""

    @abstractmethod
    def signal(self, weights: np.ndarray) -> np.ndarray:
        """What a rounding of the stored value is relative to, at a difference of weights; float64 as `weights` are."""


@dataclass(frozen=True, slots=True)
class Same(Values):
    """w"""

    exact = True

    def forward(self, values: np.ndarray) -> np.ndarray:
        return values

    def inverse(self, values: np.ndarray) -> np.ndarray:
        return values

    def signal(self, weights: np.ndarray) -> np.ndarray:
        return weights


@dataclass(frozen=True, slots=True)
class AddOne(Values):
    """w + 1 in fp32: zero-centred norms, which ggml keeps plain."""

    def forward(self, values: np.ndarray) -> np.ndarray:
        return values + np.float32(1)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        return values - np.float32(1)

    def signal(self, weights: np.ndarray) -> np.ndarray:
        return weights + 1


@dataclass(frozen=True, slots=True)
class NegativeExp(Values):
    """-exp(w) correctly rounded to fp32: computed in fp64, whose error is far below an fp32 ulp, rounded once.

    fp32 exponentials are not: numpy's misses 2 values in 5 by an ulp, torch's 1 in 100, which ones depends on the CPU.
    """

    def forward(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # beyond 88.7 the result is -inf in fp32, as it is for torch
            return (-np.exp(values.astype(np.float64))).astype(np.float32)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        return np.log(-values.astype(np.float64)).astype(np.float32)

    def signal(self, weights: np.ndarray) -> np.ndarray:
        return np.ones_like(weights)  # an error of -exp(w) relative to itself is one of w as it is


class Order(ABC):
    """Which rows, or columns, of a weight a build has, and in which order."""

    @abstractmethod
    def source_index(self, length: int) -> np.ndarray:
        """int64 [n]: which of `length` source positions each destination takes, none of them twice."""

    def target_index(self, length: int) -> np.ndarray:
        """int64 [length]: the inverse, which destination each source position goes to; -1 of what is not taken."""
        taken = self.source_index(length)
        index = np.full(length, -1)
        index[taken] = np.arange(len(taken))
        return index


@dataclass(frozen=True, slots=True)
class HeadSwap(Order):
    """Heads from [groups, ratio] to [ratio, groups], each `size` long, from position `start` on.

    Hugging Face stores the value heads of gated DeltaNet by key head, ggml stores them tiled.
    """

    start: int
    groups: int
    ratio: int
    size: int

    def source_index(self, length: int) -> np.ndarray:
        index = np.arange(length)
        stop = self.start + self.groups * self.ratio * self.size
        heads = index[self.start : stop].reshape(self.groups, self.ratio, self.size)
        index[self.start : stop] = heads.swapaxes(0, 1).reshape(-1)
        return index


@dataclass(frozen=True, slots=True)
class Every(Order):
    """Of every `period` positions the `size` from `start` on: one of the parts of a weight that lie interleaved."""

    start: int
    size: int
    period: int

    def source_index(self, length: int) -> np.ndarray:
        return np.arange(length).reshape(-1, self.period)[:, self.start : self.start + self.size].reshape(-1)


@dataclass(frozen=True, slots=True)
class Transposed(Order):
    """Positions as [n, columns], column by column."""

    columns: int

    def source_index(self, length: int) -> np.ndarray:
        return np.arange(length).reshape(-1, self.columns).T.reshape(-1)


SAME = Same()


@dataclass(frozen=True, slots=True)
class Transform:
    """What happens to a weight, slab by slab: to its values, to its rows, to its columns."""

    values: Values = SAME
    rows: Order | None = None
    columns: Order | None = None  # of all of them

    @property
    def exact(self) -> bool:
        """Whether all that a build rounds is its own storage's doing."""
        return self.values.exact

    def targets(self, start: int, count: int, total: int) -> np.ndarray | None:
        """int64 [count]: where rows [start, start + count) of `total` go, -1 for nowhere; None: as they come."""
        return None if self.rows is None else self.rows.target_index(total)[start : start + count]

    def taken(self, slab: Slab, start: int, total: int) -> Slab:
        """The rows of `slab`, which begins at row `start` of `total`, that go anywhere, as they are."""
        targets = self.targets(start, slab.rows, total)
        return slab if targets is None or targets.min(initial=0) >= 0 else Slab(slab.raw[targets >= 0], slab.dtype)

    def forward(self, slab: Slab) -> Slab:
        """Rows `taken`, values and columns as the build wants them; the order of rows is a matter of writing."""
        if not self.values.exact:
            slab = Slab(self.values.forward(slab.float32).view(np.uint8), "F32")
        if self.columns:
            columns = slab.raw.view(FLOAT_BITS[slab.dtype][0])
            columns = np.ascontiguousarray(columns[:, self.columns.source_index(columns.shape[1])])
            slab = Slab(columns.view(np.uint8), slab.dtype)
        return slab

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """Inverse of `forward` on decoded rows, fp32 [rows, K]."""
        if self.columns:
            values = values[:, self.columns.target_index(values.shape[1])]
        return self.values.inverse(values)


UNCHANGED = Transform()
