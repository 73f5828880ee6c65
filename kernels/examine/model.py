"""Modelled time of recorded launches: arithmetic on sizes, a routing histogram and compiled code. Not a speed.

    time = max(HBM, L2, processors) + launch

    HBM          bytes that must travel / (share * bandwidth)
    L2           bytes that tiles load and store / L2 bandwidth
    processors   turns of the fullest processor: ceil(tiles / programs at a time) * (K steps * step + start and end)
    step         the larger of matrix time, at the rate that good kernels sustain, and of what products read from shared
                 memory and loads write there; plus the instructions of the hot loop that no matrix instruction of their
                 own warp covers, of all warps of a scheduler one after another

`docs/performance.md` says where each constant comes from, which ones were fitted to timings that others published, how
far the model is from those timings, and what it cannot know. What it assumes:

- Tiles come from an actual histogram of the rows of each expert (`routing_counts`), so padding and waves are counted.
- The L2 is a least-recently-used store of whole tensors. What one launch leaves there, the next one reads from there; a
  tensor that is evicted after it was written costs a write. Rows that top_k experts gather at different times are read
  again as far as they do not fit.
- Programs on one processor fill each other's gaps; warps of one program do not. Warps of different warpgroups may do so
  too, which no compiler promises: the step without it is the model, the step with it is `optimistic`.

`bound_us` is another thing: the least time of a whole forward by bytes and products alone, with nothing wasted.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch

from ornith_moe.kernels.examine.compile import PROCESSORS, Report
from ornith_moe.kernels.launch import TARGETS, Launch, Product


@dataclass(frozen=True)
class Device:
    """Published peaks (dense), and the constants that were fitted or taken over."""

    name: str
    flops: dict[int, float]  # per second, by bytes of an operand
    hbm: float  # bytes per second
    l2_bytes: int  # the last level of cache before memory
    l2: float  # bytes per second from there to all processors
    clock: float  # of the peaks, Hz
    issue: int = 1  # cycles of a scheduler for an instruction of one warp
    sustained: tuple[tuple[int, float], ...] = ((1, 0.78), (2, 0.85), (4, 0.85))  # of the peak, by bytes of an operand
    hbm_share: float = 0.85
    shared: float = 128.0  # bytes a clock between an SM's shared memory and its units
    tile_us: float = 1.5  # start and end of a tile
    launch_us: float = 2.0


DEVICES = {
    "sm89": Device("L40S", {1: 733e12, 2: 362e12, 4: 92e12}, 0.864e12, 96 << 20, 5e12, 2.52e9),
    "sm90": Device("H100 SXM", {1: 1979e12, 2: 989e12, 4: 67e12}, 3.35e12, 50 << 20, 7.1e12, 1.83e9),
    "sm100": Device("B200", {1: 4500e12, 2: 2250e12, 4: 75e12}, 8.0e12, 126 << 20, 8e12, 1.85e9),
    "gfx942": Device("MI300X", {1: 1307e12, 2: 1307e12, 4: 163e12}, 5.3e12, 256 << 20, 17e12, 2.1e9, issue=4),
    "gfx950": Device("MI355X", {1: 5030e12, 2: 2520e12, 4: 157e12}, 8.0e12, 256 << 20, 17e12, 2.4e9, issue=4),
}
_L2_SHARE = 0.5  # of the capacity that whole tensors can count on beside what streams through


@dataclass(frozen=True)
class Shape:
    """A layer: E experts of H by I, `top_k` per token."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int


def routing_counts(shape: Shape, tokens: int, kind: str = "uniform") -> np.ndarray:
    """Rows of each expert, always the same: every token picks `top_k` distinct experts, all with the same chance,
    or ("skewed") expert e with one proportional to (e + 1)^-0.5, about 8 times the mean for the first at E = 256.
    """
    chance = (np.arange(shape.experts) + 1.0) ** (-0.5 if kind == "skewed" else 0.0)
    random = np.random.default_rng(0)
    counts = np.zeros(shape.experts, dtype=np.int64)
    for start in range(0, tokens, 4096):  # the top_k largest of log chance plus Gumbel noise are draws without return
        keys = np.log(chance) + random.gumbel(size=(min(4096, tokens - start), shape.experts))
        counts += np.bincount(np.argpartition(keys, -shape.top_k)[:, -shape.top_k :].ravel(), minlength=shape.experts)
    return counts


def bound_us(device: Device, shape: Shape, tokens: int, *, fp8: bool = True) -> float:
    """Least time of a training forward: the larger of its products at the peak and its bytes at full bandwidth.

    Weights of the experts that uniform routing hits are read once; x is read and y written once in BF16, the saved
    pre-activation written in BF16, a' written and read, and the rows of the down projection written and read in BF16.
    """
    size = 1 if fp8 else 2
    rows = tokens * shape.top_k
    hit = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)
    moved = hit * 3 * shape.hidden * shape.inner * size + 2 * tokens * shape.hidden * 2
    moved += rows * (2 * shape.inner * 2 + 2 * shape.inner * size + 2 * shape.hidden * 2)
    flops = 6 * rows * shape.hidden * shape.inner
    return 1e6 * max(moved / device.hbm, flops / device.flops[size])


@dataclass(frozen=True)
class Estimate:
    """What a launch, or the launches of a kernel in one pass, would take."""

    us: float
    bound: str  # "memory", "matrix", "cache" or "launch"
    bytes: int  # through HBM
    cache_bytes: int  # between L2 and processors
    flops: int  # that were asked for, padding left out
    limit_us: float  # bytes or flops at the published peak
    optimistic_us: float
    launches: int = 1

    @property
    def share_of_limit(self) -> float:
        return self.limit_us / self.us


def total(estimates: Sequence[Estimate]) -> Estimate:
    """The sum of several; what bounds it is what bounds most of its time."""
    times: dict[str, float] = {}
    for e in estimates:
        times[e.bound] = times.get(e.bound, 0.0) + e.us
    sums = {name: sum(getattr(e, name) for e in estimates) for name in _SUMMED}
    return Estimate(bound=max(times, key=times.__getitem__), **sums)


_SUMMED = ("us", "bytes", "cache_bytes", "flops", "limit_us", "optimistic_us", "launches")


class Cache:
    """Whole tensors, the least recently used evicted first. Reads and writes give the bytes that pass through HBM."""

    def __init__(self, capacity: float):
        self.capacity = capacity
        self.held: OrderedDict[Any, tuple[int, bool]] = OrderedDict()  # region -> (bytes, written)

    def read(self, region: Any, size: int) -> int:
        found = region in self.held
        return (0 if found else size) + self._hold(region, size, found and self.held[region][1])

    def write(self, region: Any, size: int) -> int:
        return self._hold(region, size, True)

    def _hold(self, region: Any, size: int, written: bool) -> int:
        self.held.pop(region, None)
        if size > self.capacity:
            return size if written else 0
        self.held[region] = size, written
        out = 0
        while sum(size for size, _ in self.held.values()) > self.capacity:
            _, (evicted, dirty) = self.held.popitem(last=False)
            out += evicted * dirty
        return out


def estimate(
    arch: str, launches: Iterable[tuple[Launch, Report]], counts: np.ndarray, device: Device | None = None
) -> list[Estimate]:
    """An estimate for each launch of a pass, in order, which matters to the cache."""
    device = device or DEVICES[arch]
    cache = Cache(_L2_SHARE * device.l2_bytes)
    return [_estimate(arch, device, launch, report, counts, cache) for launch, report in launches]


@dataclass(frozen=True)
class _Tiles:
    """How a GEMM is cut: `steps` per tile, each a product of rows x columns x depth."""

    tiles: int
    steps: float
    step_flops: int
    operand_bytes: int
    loaded: int  # from L2, all tiles together


def _estimate(arch: str, device: Device, launch: Launch, report: Report, counts: np.ndarray, cache: Cache) -> Estimate:
    moved, touched, product = 0, 0, launch.product
    for name, tensor in _tensors(launch):
        size, again = _touched(product, name, tensor, counts)
        first = product.first if product and name == product.operands[1] else 0
        region = tensor.untyped_storage()._cdata, tensor.storage_offset(), first
        if name in launch.reads:
            moved += cache.read(region, size)
        if name in launch.writes:
            moved += cache.write(region, size)
        moved += round(again * size * max(0.0, 1 - cache.capacity / max(size, 1)))
        touched += 0 if product and name in product.operands else size
    tiles, flops = _cut(launch, counts) if product else (None, 0)
    on_processors = optimistic = 0.0
    if tiles:
        touched += tiles.loaded
        on_processors, optimistic = (_processors_us(arch, device, tiles, report, e) for e in (False, True))
    memory, cached = (1e6 * n / rate for n, rate in ((moved, device.hbm_share * device.hbm), (touched, device.l2)))
    times = {"memory": memory, "cache": cached, "matrix": on_processors, "launch": device.launch_us}
    bound = max(times, key=times.__getitem__)
    size = tiles.operand_bytes if tiles else 2
    return Estimate(
        us=max(memory, cached, on_processors) + device.launch_us,
        bound=bound,
        bytes=moved,
        cache_bytes=touched,
        flops=flops,
        limit_us=1e6 * max(moved / device.hbm, flops / device.flops[size]),
        optimistic_us=max(memory, cached, optimistic) + device.launch_us,
    )


def _tensors(launch: Launch) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of a launch with its parameter, in the kernel's order; a descriptor counts as what it describes.

    Raises:
        ValueError: the launch says of a tensor neither that it reads nor that it writes it, or says so of none.
    """
    found = []
    for name, value in launch.arguments.items():
        for each in value if isinstance(value, tuple) else (value,):
            tensor = getattr(each, "base", each)
            if isinstance(tensor, torch.Tensor):
                found.append((name, tensor))
    undeclared = sorted({name for name, _ in found} - launch.reads - launch.writes)
    if undeclared or not found:
        raise ValueError(
            f"launch {launch.label!r}: expected each tensor among reads or writes, got "
            + (f"{', '.join(undeclared)} in neither" if found else "no tensor at all")
            + "; name them where it is launched"
        )
    return found


def _touched(product: Product | None, name: str, tensor: torch.Tensor, counts: np.ndarray) -> tuple[int, int]:
    """(bytes of an argument that are touched at all, how often gathered rows are read again)."""
    size = tensor.numel() * tensor.element_size()
    if product is None:
        return size, 0
    if name in product.of_experts:
        return round(size * (counts > 0).mean() * product.of_experts[name]), 0
    return size, max(0, product.gathered.get(name, 0) - 1)


def _cut(launch: Launch, counts: np.ndarray) -> tuple[_Tiles, int]:
    """The tiles of a launch's product, and the operations asked for."""
    product = launch.product
    assert product is not None
    a, b = (launch.arguments[name] for name in product.operands)
    a_bytes, b_bytes = (getattr(operand, "base", operand).element_size() for operand in (a, b))
    m, n, k = (counts if size is None else np.full(len(counts), size) for size in product.size)
    rows, columns, depth = product.tile
    tiles = np.ceil(m / rows) * np.ceil(n / columns)
    cut = _Tiles(
        tiles=int(tiles.sum()),
        steps=float(np.ceil(k / depth).mean()),
        step_flops=2 * rows * columns * depth,
        operand_bytes=product.unit_bytes,
        loaded=int((tiles * k).sum()) * (rows * a_bytes + columns * b_bytes),
    )
    return cut, int(2 * (m * n * k).sum())


def _processors_us(arch: str, device: Device, tiles: _Tiles, report: Report, staggered: bool) -> float:
    """Time of the fullest processor. `staggered`: a program's warps cover each other's instructions."""
    processors, programs = TARGETS[arch].processors, max(1, report.programs)
    per_scheduler = ceil(report.warps / PROCESSORS[arch].schedulers)
    rate = device.flops[tiles.operand_bytes] / processors * dict(device.sustained)[tiles.operand_bytes]
    matrix = 1e6 * tiles.step_flops / rate
    if read := _shared_reads(report, tiles.operand_bytes):
        written = tiles.loaded / (tiles.tiles * tiles.steps)
        matrix = max(matrix, 1e6 * (read + written) / (device.shared * device.clock))
    issued = exposed = 0.0
    if loop := report.loop:
        instruction_us = 1e6 * device.issue / device.clock
        issued = loop.instructions * per_scheduler * instruction_us
        exposed = loop.exposed * (1 if staggered else per_scheduler) * instruction_us
    step = max(programs * matrix, programs * issued, max(matrix, issued) * staggered + exposed, matrix + exposed)
    waves = ceil(tiles.tiles / (processors * programs))
    return waves * (tiles.steps * step + device.tile_us)


def _shared_reads(report: Report, size: int) -> float:
    """Bytes of a step that matrix instructions read from shared memory: b, and a unless it lies in registers.

    Of sm90 only, where a warpgroup's product of 64 x 64 reads all that a clock gives; 0 for other targets.
    """
    found = [
        (int(n) + 64 * (a == "%")) * int(k)
        for n, k, a in re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k(\d+)\.\S* *\{[^}]*\}, *(.)", report.asm)
    ]
    if not found or not report.loop:
        return 0.0
    return size * sum(found) / len(found) * report.loop.matrix * report.warps / 4
