"""Part 0: the limits of the device, and every kernel of the day compiled on all cores.

Worker processes compile what the parts will launch, specialized as Triton's JIT would, into Triton's own cache on disk;
`gpu_day.py` sets what they set (TRITON_DISABLE_LINE_INFO), because it is part of the cache's keys.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ornith_moe.bench.day.machine import Machine
from ornith_moe.bench.day.parts import Journal, Task
from ornith_moe.bench.limits import FP8
from ornith_moe.bench.rows import Row
from ornith_moe.kernels.examine import catalog
from ornith_moe.quant.recipes import RECIPES


def tasks(machine: Machine, journal: Journal) -> Iterator[Task]:
    yield Task("limits", "copy and torch.mm", partial(_limits, machine, journal))
    yield Task("kernels", machine.sizes.layer, partial(_compile, machine, passes(machine)))


def passes(machine: Machine) -> list[catalog.Pass]:
    """What parts b, c and f launch; in a dry run what its part c asks for."""
    sizes = machine.sizes
    at = [(sizes.layer, tokens) for tokens in sizes.tokens] + [(sizes.large, tokens) for tokens in sizes.large_tokens]
    if machine.dry:
        return [catalog.Pass(sizes.layer, sizes.tokens[-1], "forward", RECIPES["bf16"])]
    ways = ("forward", "backward")
    return [catalog.Pass(model, t, way, RECIPES[r]) for model, t in at for r in sizes.layer_recipes for way in ways]


def _limits(machine: Machine, journal: Journal) -> Iterator[Row]:
    machine.limits.measured = journal.run.limits
    machine.limits.copy_gb_s()
    for dtype in (torch.bfloat16, FP8) if not machine.dry else (torch.float32,):
        machine.limits.gemm_gflop_s(dtype)
    journal.run.settings["clocks_under_load"] = machine.clock.state()
    journal.save()
    yield from ()


def _compile(machine: Machine, wanted: list[catalog.Pass]) -> Iterator[Row]:
    began = time.perf_counter()
    compiled = catalog.compiled([(machine.arch, which) for which in wanted], workers=machine.workers)
    took = time.perf_counter() - began
    pairs = [pair for launches in compiled.values() for pair in launches]
    spilling = sorted({launch.label for launch, report in pairs if report.spills})
    found: dict[str, Any] = {"group": "kernels", "name": machine.arch, "peer": False, "device": "cpu"}
    if spilling:
        yield Row("compile", **found, status="red", why=f"{', '.join(spilling)} spill registers on {machine.arch}")
        return
    kernels = len({id(report) for _, report in pairs})
    note = f"{kernels} kernels of {len(pairs)} launches in {machine.workers} processes, 0 spills"
    yield Row("compile", **found, median_s=took, rounds=1, note=note)
