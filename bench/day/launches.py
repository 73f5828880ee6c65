"""Part c: each launch of a layer by events, beside what the model of `kernels/examine/model.py` makes of it.

The stream sleeps first, so that the whole pass is queued before its first kernel starts, and no launch is timed with
its wait for Python. Then the model's constants are fitted to what was measured:

    minimise  mean of log(modelled / measured)^2  over HBM share, L2 rate, sustained share in BF16 and FP8, start and
              end of a tile, and a launch; by pattern search, a constant at a time

Passes of HELD_OUT tokens set none of them and say what the fitted model is worth. The result is constants.json in the
run's folder; nothing reads it before somebody has looked at it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ornith_moe.bench.cases import make_case
from ornith_moe.bench.day.machine import Machine
from ornith_moe.bench.day.parts import Journal, Task
from ornith_moe.bench.limits import FP8
from ornith_moe.bench.rows import Row
from ornith_moe.bench.timing import Times
from ornith_moe.kernels import routing
from ornith_moe.kernels.examine import catalog
from ornith_moe.kernels.examine.compile import Report
from ornith_moe.kernels.examine.model import Device, estimate
from ornith_moe.kernels.launch import Launch, timing
from ornith_moe.kernels.moe import moe_backward, moe_forward
from ornith_moe.kernels.tiles import Tiles
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import RECIPES, Recipe

HELD_OUT = 1024  # tokens
ROUNDS = 15
SLEEP_CYCLES = 40_000_000  # 20 ms: Python needs less for the launches of a layer, both directions
FITTED = ("hbm_share", "l2", "tile_us", "launch_us", "sustained 1", "sustained 2")


@dataclass(frozen=True)
class Observed:
    """One direction of a layer: what was launched, how many rows each expert had, and the median of each launch."""

    tokens: int
    pairs: list[tuple[Launch, Report]]
    counts: np.ndarray
    seconds: list[float]


def tasks(machine: Machine, journal: Journal) -> Iterator[Task]:
    sizes, observed = machine.sizes, list[Observed]()
    for tokens in sizes.tokens[-1:] if machine.dry else sizes.tokens:
        for recipe in sizes.recipes[:1] if machine.dry else sizes.recipes:
            group = f"{sizes.layer} {recipe}, T = {tokens}"
            run = partial(_layer, machine, journal, tokens, RECIPES[recipe], observed)
            yield Task(group, "launches", run, {"model": sizes.layer, "tokens": tokens, "recipe": recipe})
    yield Task("constants", "of the model", partial(_fit, machine, journal, observed))


def _layer(machine: Machine, journal: Journal, tokens: int, recipe: Recipe, observed: list[Observed]) -> Iterator[Row]:
    model = machine.sizes.layer
    ways = ("forward",) if machine.dry else ("forward", "backward")
    passes = [catalog.Pass(model, tokens, way, recipe) for way in ways]
    compiled = catalog.compiled([(machine.arch, which) for which in passes], workers=machine.workers)
    run = Pass(machine, model, tokens, recipe)
    measured = dict(zip(ways, run.times(1 if machine.dry else ROUNDS, ways=len(ways)), strict=False))
    for which in passes:
        pairs, times = compiled[machine.arch, which], measured[which.direction]
        labels, expected = [label for label, _ in times], [launch.label for launch, _ in pairs]
        if labels != expected:
            raise RuntimeError(f"launched {', '.join(labels)}, but recorded {', '.join(expected)}")
        seconds = [each.summary["median_s"] for _, each in times]
        observed.append(Observed(tokens, [_short(*pair) for pair in pairs], run.counts, seconds))
        group = f"{model} {recipe.name}, T = {tokens}, {which.direction}"
        for number, ((label, each), found) in enumerate(
            zip(times, estimate(machine.arch, pairs, run.counts, machine.card), strict=True)
        ):
            note = f"modelled {found.us:.1f} us, bound by {found.bound}; L2 moves {found.cache_bytes / 1e6:.0f} MB"
            case = {"model": model, "tokens": tokens, "recipe": recipe.name, "pass": which.direction}
            row = Row("launches", group, f"{number:02} {label}", False, median_s=0.0, case=case, note=note)
            row = replace(row, bytes=found.bytes, flops=found.flops)
            yield machine.timed(row, each, journal, FP8 if "fp8" in label else torch.bfloat16)


class Pass:
    """Forward and backward of a layer, router included, on operands that are quantized before."""

    tiles: Tiles | None = None  # those of the table

    def __init__(self, machine: Machine, model: str, tokens: int, recipe: Recipe):
        torch.manual_seed(0)
        shape = machine.experts(model)
        case = make_case(shape, tokens, "uniform", torch.bfloat16, machine.device)
        self.machine, self.recipe, self.top_k = machine, recipe, shape.top_k
        with torch.no_grad():
            self.x, self.dy = case.x.detach(), case.dy
            sides = [Operand.quantized(w.detach(), recipe) for w in (case.gate_up_proj, case.down_proj)]
            self.sides = [side.with_transposed() if recipe.input_gradient else side for side in sides]
            self.logits = torch.randn(tokens, shape.experts, device=machine.device)
            self.indices, self.weights, counts, *_ = routing.route_forward(self.logits, shape.top_k)
        self.counts = counts.cpu().numpy().astype(np.int64)

    def forward(self) -> Any:
        indices, weights, *_ = routing.route_forward(self.logits, self.top_k)
        options: dict[str, Any] = {"recipe": self.recipe, "tiles": self.tiles}
        return moe_forward(self.x, indices, weights, *self.sides, save=True, **options)[1]

    def backward(self, saved: Any) -> None:
        options: dict[str, Any] = {"recipe": self.recipe, "tiles": self.tiles}
        dweights = moe_backward(self.dy, saved, *self.sides, **options)[1]
        assert dweights is not None
        routing.route_backward(self.logits, self.indices, self.weights, dweights)

    @torch.no_grad()
    def times(self, rounds: int, ways: int = 2) -> list[list[tuple[str, Times]]]:
        """[forward, backward]: (label, times) of each launch in order; the first `ways` of them."""
        found: list[list[list[Any]]] = [[], []]
        self.backward(self.forward()) if ways > 1 else self.forward()  # compiled and warm
        for _ in range(rounds):
            self._queue()
            with timing() as times:
                saved = self.forward()
            found[0].append(times)
            if ways > 1:
                self._queue()
                with timing() as times:
                    self.backward(saved)
                found[1].append(times)
        return [
            [(each[0].label, Times(tuple(time.seconds for time in each), ())) for each in zip(*way, strict=True)]
            for way in found
        ]

    def _queue(self) -> None:
        """An empty L2, and a device that sleeps while launches are queued."""
        if not self.machine.dry:
            self.machine.clock.flush()  # type: ignore[attr-defined]  # a CudaClock
            torch.cuda._sleep(SLEEP_CYCLES)


def _short(launch: Launch, report: Report) -> tuple[Launch, Report]:
    """With no more of the assembly than the model reads, which it does often."""
    return launch, replace(report, asm="\n".join(re.findall(r"^.*wgmma\.mma_async.*$", report.asm, re.MULTILINE)))


def _fit(machine: Machine, journal: Journal, observed: list[Observed]) -> Iterator[Row]:
    used = [each for each in observed if each.tokens != HELD_OUT]
    held = [each for each in observed if each.tokens == HELD_OUT]
    if not used:
        raise RuntimeError("expected timed launches to fit the model's constants to, got none")
    fitted = fit(machine.arch, machine.card, used)
    told: dict[str, Any] = {
        "card": machine.card.name,
        "arch": machine.arch,
        "launches": sum(len(e.pairs) for e in used),
    }
    for name, device in (("before", machine.card), ("fitted", fitted)):
        errors = {
            "on fitted rows": rms(machine.arch, device, used),
            "on held out rows": rms(machine.arch, device, held),
        }
        told[name] = {"constants": constants(device), "rms of log(modelled / measured)": errors}
    (machine.out / "constants.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    journal.run.settings["constants"] = told
    journal.save()
    yield from ()


def constants(device: Device) -> dict[str, float]:
    """Those of FITTED."""
    sustained = dict(device.sustained)
    own = {name: getattr(device, name) for name in FITTED[:4]}
    return own | {"sustained 1": sustained[1], "sustained 2": sustained[2]}


def with_constants(device: Device, values: dict[str, float]) -> Device:
    sustained = dict(device.sustained) | {1: values["sustained 1"], 2: values["sustained 2"]}
    own: dict[str, Any] = {name: values[name] for name in FITTED[:4]}
    return replace(device, **own, sustained=tuple(sustained.items()))


def rms(arch: str, device: Device, observed: list[Observed]) -> float | None:
    """Root mean square of log(modelled / measured) over all launches; None of none."""
    logs = [
        math.log(found.us / (1e6 * seconds))
        for each in observed
        for found, seconds in zip(estimate(arch, each.pairs, each.counts, device), each.seconds, strict=True)
        if seconds > 0
    ]
    return math.sqrt(sum(log * log for log in logs) / len(logs)) if logs else None


def fit(arch: str, device: Device, observed: list[Observed], step: float = 0.25, least: float = 0.01) -> Device:
    """`device` with the constants of FITTED that come closest to `observed`."""
    best, values = rms(arch, device, observed), constants(device)
    while best is not None and step > least:
        better = False
        for name in FITTED:
            for factor in (1 + step, 1 / (1 + step)):
                tried = values | {name: values[name] * factor}
                if name not in ("l2", "tile_us", "launch_us"):
                    tried[name] = min(tried[name], 1.0)  # a share
                error = rms(arch, with_constants(device, tried), observed)
                if error is not None and error < best * (1 - 1e-6):
                    best, values, better = error, tried, True
        step = step if better else step / 2
    return with_constants(device, values)
