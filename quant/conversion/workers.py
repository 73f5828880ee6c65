"""What a conversion works with: threads and their slabs, who follows it, and builds that have their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ornith_moe.quant.builds.layout import Layout
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.source.slab import Slab

# phase, bytes done, bytes in all; ("compile", 0, 0), "fetch", ("retry", how many, 0) and "check" come from any thread,
# "check" one call at a time and beside "convert"
EXECUTORS = ("local", "ray")  # threads of this process, or the machines of a cluster
Progress = Callable[[str, int, int], None]
Encoders = Mapping[str, Callable[[Storage, Slab], tuple[np.ndarray, ...]]]  # instead of a storage's own, by its name


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody follows."""


@dataclass(frozen=True)
class Workers:
    """How a conversion works, which decides no byte: threads, bytes of source in a slab and of all weights that may be
    read together, encoders, who follows."""

    jobs: int = 1
    slab_bytes: int = 1 << 20
    group_bytes: int = 0
    encoders: Encoders = field(default_factory=dict)
    progress: Progress = silent
    executor: str = "local"


@dataclass(frozen=True)
class PlacedBuild:
    """A planned build with its place: staging folder, final path, first of its files in the list of all files."""

    plan: BuildPlan
    layout: Layout
    sides: Mapping[str, bytes]  # what lies beside its tensors
    staging: Path
    final: Path
    first_file: int = 0
