"""What there is to convert: the weights of one model, whoever holds their bytes.

    Source             what is known of the model, and `read`, which gives rows of a weight
    ConfigSource       a config alone: what a checkpoint of it would hold
    CheckpointSource   a folder of safetensors (opened by quant/source/weights.py)

Plans, conversion, verification and importance ask for nothing but what `Source` says. So weights that lie elsewhere, or
are decoded as they are read, are a subclass: `dtype`, `read`, `fingerprint`, and a folder for the side files.
tests/quant/source/test_toy_architecture.py has one that holds arrays in memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.source.accounts import LeftOut
from ornith_moe.quant.source.architectures import Architecture
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.checkpoint import Checkpoint, TensorInfo
from ornith_moe.quant.source.nvfp4 import GROUP, Nvfp4Scales, read_nvfp4
from ornith_moe.quant.source.quantized import E4M3, Codes, Scales, read_quantized
from ornith_moe.quant.source.ranges import Ranges
from ornith_moe.quant.source.slab import Slab, matrix_shape


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Weights of one model; experts one by one, whatever layout they lie in."""

    HAS_BYTES: ClassVar[bool] = True

    name: str
    config: dict[str, Any]
    architecture: Architecture
    weights: tuple[Weight, ...]
    has_mtp: bool = False
    offers_mtp: bool = False  # there are MTP tensors that were not asked for
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()  # what it holds and no build will, as `notes` say too
    added: Mapping[str, str] = field(default_factory=dict)  # from elsewhere: {kind: name}, as manifests say

    @cached_property
    def layers(self) -> int:
        """Blocks of the model, MTP included."""
        return self.architecture.layers + (self.architecture.mtp_layers if self.has_mtp else 0)

    def require(self, purpose: str) -> None:
        """Refuse a source without bytes.

        Raises:
            PlanError: it has none, and `purpose` needs them.
        """
        if not self.HAS_BYTES:
            raise PlanError(f"{self.name}: is a config without weights; {purpose} needs the checkpoint folder")

    @abstractmethod
    def dtype(self, index: int) -> str:
        """In which of BF16, F16 and F32 `read` gives the rows of weight `index`."""

    def kept(self, index: int) -> str:
        """The dtype in which a build that leaves weight `index` unquantized holds it: that of its file, as a rule."""
        return self.dtype(index)

    def codes(self, index: int) -> Codes | None:
        """How weight `index` lies as codes and scales, which its slabs then hold; None: as numbers of its dtype."""
        return None

    @abstractmethod
    def read(self, index: int, start: int, rows: int) -> Slab:
        """Rows [start, start + rows) of weight `index` seen as a matrix; from any thread."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of all that the source is: an unfinished conversion goes on while it is the same."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where config, tokenizer and other side files lie, on this machine."""

    def files(self, patterns: Iterable[str]) -> list[Path]:
        """Side files whose names fit one of the glob `patterns`, sorted."""
        patterns = tuple(patterns)
        return [path for path in sorted(self.folder.iterdir()) if any(map(path.match, patterns))]

    def position(self, index: int) -> tuple[Any, ...]:
        """Sort key of weight `index`: a conversion reads in this order, which should be that on disk."""
        return (index,)

    def changed(self) -> bool:
        """Whether the weights may be others than when it was opened."""
        return False

    def modified_ns(self) -> int:
        """When a file of it was last written to, in nanoseconds since 1970; 0 of what lies in no file."""
        return 0

    @property
    def identity(self) -> str:
        """What stands for all bytes that come from elsewhere, so that none need be read to know them; "" if nothing
        does.
        """
        return ""

    def follow(self, follow: Callable[[int, int], None]) -> None:  # noqa: B027  # most have nothing to tell
        """Tell `follow`, from any thread, of (bytes that have come from elsewhere, 0), and of (0, 1) where some are
        asked for again; what lies on this machine tells nothing.
        """

    @property
    def held_bytes(self) -> int:
        """How much it holds in memory of what comes from elsewhere, at most."""
        return 0

    def is_remote(self, index: int) -> bool:
        """Whether weight `index` comes from elsewhere."""
        return False

    def tensor_of(self, index: int) -> str:
        """Name of the tensor that holds weight `index`."""
        return self.weights[index].name

    def tensor_sizes(self) -> Mapping[str, int]:
        """{tensor: values} of all that the source holds; a build has them all, or `left_out` names them."""
        return {weight.name: math.prod(weight.shape) for weight in self.weights}


class ConfigSource(Source):
    """The weights a checkpoint of a config would hold, in BF16: enough for a plan. The only source without bytes."""

    HAS_BYTES = False

    def dtype(self, index: int) -> str:
        return "BF16"

    def read(self, index: int, start: int, rows: int) -> Slab:
        raise AssertionError("without bytes: `require` refuses what needs them")

    @property
    def fingerprint(self) -> str:
        raise AssertionError("without bytes: `require` refuses what needs them")

    @property
    def folder(self) -> Path:
        raise AssertionError("without bytes: `require` refuses what needs them")


class Rows(NamedTuple):
    """Where a weight lies: in which tensor, from which of its rows on, and the tensor's scales if it is quantized."""

    tensor: TensorInfo
    first: int
    scales: Scales | Nvfp4Scales | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSource(Source):
    """A checkpoint folder; `rows` says of each weight where it lies."""

    checkpoint: Checkpoint
    rows: tuple[Rows, ...]

    def dtype(self, index: int) -> str:
        tensor, _, scales = self.rows[index]
        return "F32" if scales else tensor.dtype

    def kept(self, index: int) -> str:
        return "BF16" if self.rows[index].scales else self.dtype(index)

    def codes(self, index: int) -> Codes | None:
        tensor, first, scales = self.rows[index]
        if scales is None:
            return None
        if isinstance(scales, Nvfp4Scales):
            return Codes(scales.kind, (1, GROUP), scales.groups.dtype, True)
        height = scales.block[0] or matrix_shape(tensor.shape)[0]
        whole = first % height == 0 and tensor.shape[-2] % height == 0
        return Codes(E4M3, scales.block, scales.tensor.dtype, whole)

    def read(self, index: int, start: int, rows: int) -> Slab:
        tensor, first, scales = self.rows[index]
        if isinstance(scales, Nvfp4Scales):
            return read_nvfp4(self.checkpoint, tensor, scales, first + start, rows)
        if scales:
            return read_quantized(self.checkpoint, tensor, scales, first + start, rows)
        return Slab(self.checkpoint.read_rows(tensor, first + start, rows), tensor.dtype)

    @property
    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    def position(self, index: int) -> tuple[Any, ...]:
        tensor, first, _ = self.rows[index]
        return tensor.path.name, tensor.offset, first

    @property
    def identity(self) -> str:
        return self.checkpoint.opened.identity if isinstance(self.checkpoint.opened, Ranges) else ""

    def follow(self, follow: Callable[[int, int], None]) -> None:
        if isinstance(self.checkpoint.opened, Ranges):
            self.checkpoint.opened.follow(follow)

    @property
    def held_bytes(self) -> int:
        return self.checkpoint.opened.held_bytes if isinstance(self.checkpoint.opened, Ranges) else 0

    def is_remote(self, index: int) -> bool:
        return isinstance(self.checkpoint.opened, Ranges)

    def changed(self) -> bool:
        return self.checkpoint.changed()

    def modified_ns(self) -> int:
        return self.checkpoint.modified_ns()

    def tensor_of(self, index: int) -> str:
        return self.rows[index].tensor.name

    def tensor_sizes(self) -> Mapping[str, int]:
        sizes = {name: math.prod(info.shape) for name, info in self.checkpoint.tensors.items()}
        for tensor, _, scales in self.rows:
            if isinstance(scales, Nvfp4Scales):
                sizes[tensor.name] = 2 * math.prod(tensor.shape)
                sizes.pop(scales.groups.name, None), sizes.pop(scales.whole.name, None)
            elif scales:
                sizes.pop(scales.tensor.name, None)  # of stacked experts, once
        return sizes


def weight_matrix(weight: Weight) -> tuple[int, int]:
    """Rows and columns of a weight as the stream sees it."""
    return matrix_shape(weight.shape)
