"""Part d: the first few tiles of each product, timed, and the best of them as a candidate for kernels/configs.

The candidates are those of `bench/tune_tiles.py`, compiled on all cores; those that spill are dropped, the model ranks
the rest, and its first TIMED are timed in a layer, all launches of the product, beside the tile that the table has. The
winners go into tiles-<arch>.json in the run's folder, in the form of kernels/configs/<arch>.json, for somebody to look
at: other recipes must fit them too, which `tests/kernels/examine/test_catalog.py` asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import files
from statistics import median
from typing import Any

import torch

from ornith_moe.bench.day.launches import Pass
from ornith_moe.bench.day.machine import Machine
from ornith_moe.bench.day.parts import Journal, Task
from ornith_moe.bench.rows import Row
from ornith_moe.bench.timing import Times
from ornith_moe.bench.tune_tiles import DEFAULT, PLANS, candidates
from ornith_moe.kernels.examine import catalog
from ornith_moe.kernels.examine.compile import compile_requests, specialize
from ornith_moe.kernels.examine.model import estimate, routing_counts, total
from ornith_moe.kernels.launch import Launch
from ornith_moe.kernels.tiles import PRODUCTS, Tile, Tiles, tiles_for
from ornith_moe.quant.recipes import RECIPES

TIMED = 4  # tiles of a product, besides the table's own
ROUNDS = 9


def tasks(machine: Machine, journal: Journal) -> Iterator[Task]:
    table = _table(machine.arch)
    plans = {32: (32, machine.sizes.tokens[-1])} if machine.dry else dict(reversed(PLANS.items()))
    for block_m, (_, tokens) in plans.items():
        for operands in machine.sizes.recipes[:1] if machine.dry else machine.sizes.recipes:
            for product in ("down",) if machine.dry else PRODUCTS:
                group = f"{operands}, tiles of {block_m} rows, {product}, T = {tokens}"
                run = partial(_product, machine, journal, table, operands, block_m, product, tokens, group)
                yield Task(group, "candidates", run)
    yield Task("table", f"tiles-{machine.arch}.json", partial(_write, machine, table))


def _table(arch: str) -> dict[str, Any]:
    return json.loads((files("ornith_moe.kernels") / "configs" / f"{arch}.json").read_text(encoding="utf-8"))


def mine(product: str, launches: list[Launch]) -> list[Launch]:
    """The launches of a pass that use the tile of a product."""
    labels = ("ddown", "dgate_up") if product == "wgrad" else product
    return [launch for launch in launches if launch.label.startswith(labels)]


def _product(
    machine: Machine, journal: Journal, table: dict[str, Any], operands: str, block_m: int, product: str, tokens: int,
    group: str,
) -> Iterator[Row]:  # fmt: skip
    direction = "forward" if product in ("gate_up", "down") else "backward"
    which = catalog.Pass(machine.sizes.layer, tokens, direction, RECIPES[operands])
    own = _own(machine.arch, operands, block_m)
    every = candidates(machine.arch, product, operands, block_m)
    ranked = _ranked(machine, which, product, own, every[:2] if machine.dry else every)
    tried = {tile: us for tile, us in ranked[: 1 if machine.dry else TIMED]} | dict.fromkeys([own[product]])
    best: dict[Tile, float] = {}
    run = Pass(machine, machine.sizes.layer, tokens, RECIPES[operands])
    for tile, us in tried.items():
        run.tiles = Tiles(block_m, own.tile | {product: tile})
        way = run.times(ROUNDS if not machine.dry else 1, ways=1 if direction == "forward" else 2)[
            direction != "forward"
        ]
        seconds = _sums(product, way)
        note = f"modelled {us:.1f} us" if us else "the table's own"
        name = ", ".join(f"{key} {value}" for key, value in _told(tile).items()) or "default"
        yield machine.timed(Row("tiles", group, name, False, median_s=0.0, note=note), Times(seconds, ()), journal)
        best[tile] = median(seconds)
    entry = next(each for each in table[operands] if each["block_m"] == block_m)
    entry["tiles"][product] = _told(min(best, key=best.__getitem__))


def _own(arch: str, operands: str, block_m: int) -> Tiles:
    """The table's tiles of a plan."""
    rows = PLANS[block_m][0]
    return tiles_for(arch, operands, rows if rows else 1e9)


def _ranked(
    machine: Machine, which: catalog.Pass, product: str, own: Tiles, tiles: list[Tile]
) -> list[tuple[Tile, float]]:
    """(tile, modelled us), the fastest first, without those that spill or do not fit."""
    default = replace(DEFAULT, swap=own.block_m < 64)
    runs = {}
    for tile in tiles:
        chosen = Tiles(own.block_m, dict.fromkeys(PRODUCTS, default) | {product: tile})
        runs[tile] = mine(product, catalog.record(machine.arch, which, chosen))
    requests = [specialize(machine.arch, launch) for launches in runs.values() for launch in launches]
    reports = iter(compile_requests(requests, workers=machine.workers))
    counts, found = routing_counts(catalog.SHAPES[which.model], which.tokens), []
    for tile, launches in runs.items():
        pairs = [(launch, next(reports)) for launch in launches]
        if all(report.programs and not report.spills for _, report in pairs):
            found.append((tile, total(estimate(machine.arch, pairs, counts, machine.card)).us))
    return sorted(found, key=lambda pair: pair[1])


def _sums(product: str, way: list[tuple[str, Times]]) -> tuple[float, ...]:
    """Seconds of all launches of a product, round by round."""
    labels = ("ddown", "dgate_up") if product == "wgrad" else product
    return tuple(map(sum, zip(*(times.seconds for label, times in way if label.startswith(labels)), strict=True)))


def _told(tile: Tile) -> dict[str, Any]:
    """A tile as a table holds it: what differs from the default."""
    plain = asdict(Tile())
    return {key: value for key, value in asdict(tile).items() if value != plain[key]}


def _write(machine: Machine, table: dict[str, Any]) -> Iterator[Row]:
    path = machine.out / f"tiles-{machine.arch}.json"
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    if not machine.dry:
        torch.cuda.empty_cache()
    yield from ()
