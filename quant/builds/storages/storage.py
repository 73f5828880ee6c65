"""What every storage says of itself: the parts a weight becomes, their bytes, the way back, and what is sound of them.

A `Storage` turns rows of a weight into rows of one output tensor (kept, BF16, a GGUF type) or of several (FP8 values
and scales). A part may need whole groups of rows (`Part.rows`), so a slab of whole groups gives the same bytes as the
whole weight; that is what lets a conversion see a weight in slabs and in any order. What a storage must know of the
whole weight, or of all that is fused with it, it is given before (`needs`): the weight is then read once more.

    found = merge(measure(slab), measure(slab), ...)      storage.given(found).encode(slab), for every slab

Decoding is for verification, which has the `gguf` package, other people's code, decode the start of every slab too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ornith_moe.quant.builds.stored import FoundTensor
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.slab import FLOAT_BITS, Slab, matrix_shape, to_float32
from ornith_moe.quant.source.source import Source


@dataclass(frozen=True, slots=True)
class Part:
    """One output tensor of a weight: suffix of its name, dtype, shape, bytes of a row, and weight rows per row.

    `rows` None: one row for the whole weight, as a scale of all of it is.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    row_bytes: int
    rows: int | None = 1

    @property
    def nbytes(self) -> int:
        return self.row_bytes * (1 if self.rows is None else matrix_shape(self.shape)[0])

    def rows_of(self, weight_rows: int) -> int:
        """Its rows for so many rows of the weight."""
        return 1 if self.rows is None else weight_rows // self.rows


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a storage: `step`, the least above zero, and the largest weight that one can hold, over it."""

    step: float
    reach: float


class Storage(ABC):
    """One way to store a weight.

    To add one: `name`, `floor_db`, `parts`, `encode`, `decode`; `of` and `problems` for a verification without the
    source; `scales` and `tile` where scales have a range; `needs`, `measure`, `merge` and `given` where a slab is not
    enough to know. Name it among the `storages` of the build that uses it.
    """

    name: str  # in sentences, and of the encoders of a GPU
    floor_db: float  # SQNR: far below what a sound encoding reaches, and above what damage leaves
    scales: Scales | None = None  # None: it has none, or their range holds every weight
    float_type: str | None = None  # dtype of what it stores, where that is the weight rounded and may overflow
    uses_torch = False  # in `encode`
    needs = False  # what `measure` finds in the whole weight
    copies = False  # codes and scales of the source

    @abstractmethod
    def parts(self, shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
        """What a weight of `shape`, whose source holds it as `dtype`, becomes."""

    @abstractmethod
    def encode(self, slab: Slab) -> tuple[np.ndarray, ...]:
        """uint8 [rows, row_bytes] of each part for rows of a weight, whole groups of them.

        Raises:
            UnstorableError: a weight that it cannot hold.
        """

    @abstractmethod
    def decode(self, parts: tuple[np.ndarray, ...], columns: int, dtype: str) -> np.ndarray:
        """fp32 [rows, columns] of what `encode` gave for a source of `dtype`."""

    def as_stored(self, parts: tuple[np.ndarray, ...]) -> Storage:
        """This storage, with what it needs to know of a weight read from the weight's own parts."""
        return self

    def exact(self, dtype: str) -> bool:
        """Whether a weight that its source holds as `dtype` keeps its values."""
        return False

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the weights that share a scale, of a matrix of `shape`."""
        return 1, 1

    def taking(self, source: Source, index: int) -> Storage:
        """This storage for weight `index` of `source`, which may hold it as codes and scales, as slabs then do."""
        return self

    @classmethod
    def of(cls, name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
        """How tensor `name` of a build is stored, by its header and those beside it; None: in no way of this class.

        Args:
            found: all tensors of the build.
        """
        return None

    def problems(self, name: str, found: Mapping[str, FoundTensor]) -> Iterator[str]:
        """What is wrong with the stored bytes of tensor `name` and of what belongs to it, a sentence each."""
        yield from ()

    def measure(self, slab: Slab) -> Any:
        """What rows of a weight say of what it `needs`."""
        raise NotImplementedError(f"{self.name} needs nothing of the whole weight")

    def merge(self, first: Any, second: Any) -> Any:
        """What two lots of rows say together; in any order and cut."""
        raise NotImplementedError(f"{self.name} needs nothing of the whole weight")

    def given(self, found: Any) -> Storage:
        """This storage for a weight of which `found` is what all measures together say."""
        return self


def not_finite(name: str, tensor: FoundTensor, value: int) -> str:
    """The sentence on a stored value, by its index, that is a NaN or an infinity."""
    row = value // matrix_shape(tensor.shape)[1]
    return f"{tensor.path.name}: tensor {bare(name)}, row {row} holds a NaN or an infinity"


def largest_magnitude(slab: Slab) -> float:
    """The largest magnitude of a slab, from its bits."""
    bits, magnitude, _ = FLOAT_BITS[slab.dtype]
    largest = (slab.raw.view(bits) & magnitude).max(initial=0)
    return float(to_float32(np.array([largest], bits).view(np.uint8), slab.dtype)[0])
