"""What an architecture says of one weight: its name, what it does, where it may be packed, and its places in a GGUF.

Experts are always seen one by one here, whatever layout the checkpoint has: `packed` says in which rows of which fused
tensor the same numbers would lie, so that "fused, one by one or mixed" is a question of looking up two names.

Letters: E experts, H hidden, I expert intermediate; L number of text layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.source.transforms import UNCHANGED, Transform

ROLES = (
    "router", "expert", "shared_expert", "attention", "linear_attention", "mlp", "norm", "embedding", "head",
    "vision", "mtp",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows [row, row + rows of the weight) of the tensor `name` of shape `shape`, seen as a matrix [E*N, K]."""

    name: str
    shape: tuple[int, ...]
    row: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight as the architecture defines it; experts one by one."""

    name: str  # Hugging Face name, with `.weight` where there is one
    shape: tuple[int, ...]
    role: str  # one of ROLES
    layer: int | None = None  # MTP layers count on after the last text layer
    expert: int | None = None
    packed: Packed | None = None

    @property
    def leaf(self) -> str:
        """The last part of its module's name, such as q_proj."""
        return self.name.removesuffix(".weight").rpartition(".")[2]

    @property
    def module(self) -> str:
        """What its name says below the layer, such as `self_attn.q_proj.weight`."""
        return self.name.split(".layers.", 1)[1].split(".", 1)[1]

    @property
    def owner(self) -> str:
        """The module that it belongs to, as configs name it."""
        return self.name.removesuffix(".weight").removesuffix(".bias")

    @property
    def is_linear(self) -> bool:
        """Whether it is the matrix of a matrix product, so that a recipe may quantize it unless it skips it by name."""
        return len(self.shape) == 2 and self.role not in ("norm", "embedding") and self.name.endswith(".weight")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight, or the rows that `transform` takes of it, goes in a build, and what happens on the way."""

    name: str
    shape: tuple[int, ...]  # of the tensor if nothing quantizes it, Hugging Face order (GGUF reverses it)
    row: int = 0  # first row of this weight in the tensor seen as a matrix
    transform: Transform = UNCHANGED


@dataclass(frozen=True, slots=True)
class Cut:
    """How tensor parallelism cuts a matrix: into `parts` of (units, size) along its rows, or `by_columns`.

    A rank gets units / ranks of each part, or one unit where there are fewer than ranks and they are `shared`, as heads
    of keys and values are. A unit is a head, or one row.
    """

    parts: tuple[tuple[int, int], ...]
    by_columns: bool = False
    shared: bool = False

    def per_rank(self, ranks: int) -> tuple[int, ...] | None:
        """Rows (columns) that a rank gets of each part; None if the parts cannot be cut so."""
        sizes = []
        for units, size in self.parts:
            if units % ranks and not (self.shared and ranks % units == 0):
                return None
            sizes.append(max(units // ranks, 1) * size)
        return tuple(sizes)


def text_settings(config: dict[str, Any]) -> Settings:
    """Settings of the language model: `text_config` of a wrapper, or the config itself."""
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: expected text_config to be an object, got {brief(text)}")
    return Settings(text, "config.json")


@dataclass(frozen=True)
class Settings:
    """Checked access to a config.json section; every failure names the file's key."""

    values: dict[str, Any]
    where: str

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 1 << 24) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(
                f"{self.where}: expected {key} to be an integer from {low} to {high}, got {brief(value)}"
            )
        return value

    def fraction(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise CheckpointError(f"{self.where}: expected {key} to be a number from 0 to 1, got {brief(value)}")
        return float(value)

    def number(self, key: str, default: float | None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise CheckpointError(f"{self.where}: expected {key} to be a positive number, got {brief(value)}")
        return float(value)

    def strings(self, key: str, count: int, allowed: tuple[str, ...]) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != count or not all(item in allowed for item in value):
            raise CheckpointError(
                f"{self.where}: expected {key} to be {count} names out of {', '.join(allowed)}, got {brief(value)}"
            )
        return value

    def section(self, key: str) -> Settings | None:
        value = self.values.get(key)
        return Settings(value, f"{self.where}.{key}") if isinstance(value, dict) else None
