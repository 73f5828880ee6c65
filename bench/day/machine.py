"""What the parts stand on: a GPU at the sizes of our models, or Triton's interpreter at toy sizes (`--dry`).

Limits (`bench.limits`) are measured once and kept in the run, because each part has a process of its own.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ornith_moe.bench.day.parts import Journal
from ornith_moe.bench.limits import Limits, cpu_name
from ornith_moe.bench.rows import Row
from ornith_moe.bench.shapes import MODELS, Experts
from ornith_moe.bench.timing import Call, Clock, Times, clock_of, control_of, interleave
from ornith_moe.kernels.examine import catalog
from ornith_moe.kernels.examine.model import DEVICES, Device, Shape

TOY = Experts(hidden=128, inner=128, experts=3, top_k=2)
PACKAGES = ("torch", "triton", "numpy", "numba", "transformers", "gguf", "xllamacpp", "liger-kernel", "torchao")


@dataclass(frozen=True)
class Sizes:
    """What is computed: `models` by the name of `catalog.SHAPES` and of `shapes.MODELS`."""

    layer: str  # parts b to d
    large: str  # part f
    model: Mapping[str, str]
    tokens: tuple[int, ...]  # the most asked for first: a part may run out of time
    large_tokens: tuple[int, ...]
    recipes: tuple[str, ...]  # parts c and d
    layer_recipes: tuple[str, ...]  # part b
    large_recipes: tuple[str, ...]
    matrix: tuple[int, int]  # rows and columns of a weight to encode
    whole: Experts  # a layer for part a, whose reference is a loop in float64
    repeats: int


REAL = Sizes(
    "35B", "397B", {"35B": "ornith-35b", "397B": "ornith-397b"}, (8192, 64, 32768, 1024, 1), (8192, 64),
    ("bf16", "fp8"), ("bf16", "fp8", "fp8_channel"), ("bf16", "fp8"), (32768, 4096),
    Experts(hidden=2048, inner=512, experts=16, top_k=4), 20,
)  # fmt: skip
DRY = Sizes("toy", "toy", {"toy": "toy"}, (4,), (1,), ("bf16", "fp8"), ("fp8",), ("bf16",), (2, 256), TOY, 2)


@dataclass(frozen=True)
class Machine:
    """A device with its clock, and the sizes that suit it.

    Attributes:
        device: "cuda", or "cpu" for the interpreter. arch: what is compiled for.
        card: its published peaks and the model's constants.
        limits: of the device; `measured` is the run's own dict.
        seconds_per_group: that implementations of one task take turns for.
    """

    device: str
    arch: str
    card: Device
    clock: Clock
    control: Call
    sizes: Sizes
    out: Path
    workers: int
    seconds_per_group: float
    limits: Limits

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def answers(self) -> bool:
        """Whether the device still computes; after a fault its process cannot use it again."""
        if self.dry:
            return True
        try:
            torch.cuda.synchronize()
            return bool(torch.ones(1, device="cuda").item() == 1)
        except RuntimeError:
            return False

    def experts(self, model: str) -> Experts:
        """Sizes of a model of `sizes`."""
        return TOY if model == "toy" else MODELS[self.sizes.model[model]]

    def time(self, calls: Mapping[str, Call], seconds: float | None = None) -> dict[str, Times]:
        """Times of calls that take turns; each has been called before. One each in the interpreter, meaning nothing."""
        if self.dry:
            return {name: Times((self.clock.seconds(call),), ()) for name, call in calls.items()}
        return interleave(calls, self.clock, budget_s=seconds or self.seconds_per_group, control=self.control)

    def timed(self, row: Row, times: Times, journal: Journal, dtype: torch.dtype = torch.bfloat16) -> Row:
        """`row` with its times, and the limit that its bytes and operations have here."""
        self.limits.measured = journal.run.limits
        limit_s, limit = self.limits.seconds(row.bytes, row.flops, dtype) if row.bytes else (None, "")
        return replace(row, device=self.device, **times.summary, limit_s=limit_s, limit=limit)


def real(out: Path) -> Machine:
    """The current GPU."""
    properties = torch.cuda.get_device_properties()
    arch = f"sm{properties.major}{properties.minor}"
    card, clock = card_of(properties.name, arch), clock_of("cuda")
    return Machine("cuda", arch, card, clock, control_of("cuda"), REAL, out, os.cpu_count() or 1, 1.5, Limits(clock))


def dry(out: Path) -> Machine:
    """No GPU: kernels run in Triton's interpreter, and what is compiled is compiled for an H100."""
    catalog.SHAPES.setdefault("toy", Shape("toy", TOY.experts, TOY.top_k, TOY.hidden, TOY.inner))
    a = torch.ones(16, 16)
    card, clock, control = DEVICES["sm90"], clock_of("cpu"), lambda: torch.mm(a, a)
    return Machine("cpu", "sm90", card, clock, control, DRY, out, os.cpu_count() or 1, 1e-3, Limits(clock))


def card_of(name: str, arch: str) -> Device:
    """The published peaks of a card; an H200 is an H100 with other memory. `arch` decides where the name says nothing.

    Raises:
        ValueError: no card of this architecture is known.
    """
    if arch not in DEVICES:
        raise ValueError(f"arch: expected one of {', '.join(DEVICES)}, got {arch!r} ({name}); add it to DEVICES")
    if "H200" in name:
        return replace(DEVICES[arch], name="H200", hbm=4.8e12)
    return DEVICES[arch]


def described(dry: bool) -> dict[str, Any]:
    """`Run.machine`; asks nvidia-smi, so that this process leaves the device alone."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "load_at_start": os.getloadavg()[0]}
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if not dry:
        asked = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        found["card"] = _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv")
    return found


def commit() -> str:
    """Of the checkout, "+" at its end with changes; "" where there is none."""
    here = str(Path(__file__).resolve().parent)
    found = _output("git", "-C", here, "rev-parse", "HEAD")
    return found + "+" * bool(found and _output("git", "-C", here, "status", "--porcelain"))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
