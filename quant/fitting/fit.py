"""The types of a model's tensors that lose the least within so many bytes.

    for each type of the head:   the other groups' types by the integer program, within the bytes that are left
    KL of each = loss of the head + noise^EXPONENT (loss.py); the least is the answer

The power of a sum is no sum, but grows with it: for a given head the least noise has the least KL, so the answer is
exact, and its bound is the least of the bounds. A group has one type: gate and up of a layer, which llama.cpp's kernels
multiply together where their types are equal; the experts of a layer are one tensor. Every other tensor is its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.fitting.choose import Choice, choose
from ornith_moe.quant.fitting.loss import EXPONENT, Loss
from ornith_moe.quant.fitting.sensitivity import TensorErrors
from ornith_moe.quant.fitting.types import standing
from ornith_moe.quant.gguf.header import padded
from ornith_moe.quant.gguf.mixtures import NEEDS_IMATRIX
from ornith_moe.quant.gguf.tensor_types import HEAD

_FUSED = re.compile(r"\.ffn_(gate|up)(?=_exps\.|_shexp\.|\.)")


@dataclass(frozen=True)
class Fitted:
    """Types of all tensors, their bytes in a GGUF, KL as predicted and the least that any types could have."""

    types: Mapping[str, str]
    nbytes: int
    kl: float
    bound: float

    @property
    def gap(self) -> float:
        """By how much, at most, other types could be better."""
        return 1 - self.bound / self.kl if self.kl > 0 else 0.0


@dataclass(frozen=True)
class _Option:
    """Types of the tensors of a group."""

    types: Mapping[str, str]
    nbytes: int


@dataclass(frozen=True)
class Format:
    """What may be chosen for a kind of file: those of `types` that were measured.

    Attributes:
        plain: a type that holds a tensor as it was and may be chosen, "" for none.
        nbytes: of a tensor in a type.
        group: a name that tensors of one type share.
        may: whether a tensor may have a type.
    """

    types: Collection[str]
    nbytes: Callable[[TensorErrors, str], int]
    group: Callable[[str], str] = str
    plain: str = ""
    may: Callable[[str, str], bool] = lambda name, kind: True


GGUF = Format(
    tuple(GGMLQuantizationType.__members__),
    lambda tensor, kind: padded(tensor.nbytes(kind)),
    lambda name: _FUSED.sub(".ffn_gate_up", name),
)


class Problem:
    """What may become of each tensor: `asked` ones have their type, the others one that was measured.

    Raises:
        PlanError: nothing may become of one.
    """

    def __init__(self, loss: Loss, asked: Mapping[str, str], imatrix: bool, format: Format = GGUF):
        self.loss, self.imatrix, self.format = loss, imatrix, format
        self.fixed = dict(asked)
        members: dict[str, list[str]] = {}
        for tensor in loss.sensitivity.tensors:
            alone = tensor.name if tensor.name in asked else format.group(tensor.name)
            members.setdefault(alone, []).append(tensor.name)
        self.groups = [tuple(names) for names in members.values()]
        for names in self.groups:
            if not self.options(names):
                raise PlanError(
                    f"{names[0]}: the sensitivity has no type that may be chosen for it; make one with more --types"
                )

    def options(self, names: Sequence[str]) -> list[_Option]:
        """What the tensors of a group can be, the same type in all but where its blocks do not fill their rows."""
        by_name, found = self.loss.sensitivity.by_name, {}
        kinds = [kind for kind in self.loss.sensitivity.types if kind in self.format.types]
        for kind in [*kinds, *filter(None, [self.format.plain])]:
            types = {name: self.fixed.get(name) or standing(kind, by_name[name].shape[-1]) for name in names}
            if all(name in self.fixed or self._may(name, of) for name, of in types.items()):
                nbytes = sum(self.format.nbytes(by_name[name], of) for name, of in types.items())
                found[tuple(types.values())] = _Option(types, nbytes)
        return list(found.values())

    def _may(self, name: str, kind: str) -> bool:
        tensor = self.loss.sensitivity.by_name[name]
        if kind == self.format.plain or not self.format.may(name, kind):
            return self.format.may(name, kind)
        return kind in tensor.errors and (kind not in NEEDS_IMATRIX or (self.imatrix and tensor.important))

    def least(self) -> int:
        """Bytes of the smallest choice."""
        return sum(min(option.nbytes for option in self.options(names)) for names in self.groups)

    def within(self, limit: int) -> Fitted | None:
        """The types that lose the least in at most `limit` bytes; None if none is that small."""
        head, tied = self.loss.head, self.loss.head != HEAD
        others = [self.options(names) for names in self.groups if names != (head,)]
        groups = [[Choice(option.nbytes, self._noise(option)) for option in options] for options in others]
        best: Fitted | None = None
        bound = float("inf")
        for option in sorted(self.options((head,)), key=lambda option: self.loss.of_head(option.types[head])):
            of_head, before = self.loss.of_head(option.types[head]), self._noise(option) if tied else 0.0
            if best and of_head + before**EXPONENT >= best.kl:
                continue
            chosen = choose(groups, limit - option.nbytes)
            if chosen is None:
                continue
            bound = min(bound, of_head + (before + chosen.bound) ** EXPONENT)
            kl = of_head + (before + chosen.loss) ** EXPONENT
            if best is None or kl < best.kl:
                types = dict(option.types)
                for options, index in zip(others, chosen.options, strict=True):
                    types |= options[index].types
                best = Fitted(types, option.nbytes + chosen.nbytes, kl, kl)
        return best and Fitted(best.types, best.nbytes, best.kl, min(bound, best.kl))

    def _noise(self, option: _Option) -> float:
        return sum(self.loss.noise(name, kind) for name, kind in option.types.items())
