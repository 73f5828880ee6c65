"""Choose the tiles of kernels/configs/<arch>.json by compiling every candidate and modelling it. Not a measurement.

    python bench/tune_tiles.py sm90 > kernels/configs/sm90.json

Per operands, rows of the plan and product: candidates that spill a register in any recipe that would use them are
dropped, the rest are ranked by their modelled time over both directions of a 35B layer, at a number of tokens where the
plan's rows fit. A plan serves from half as many rows per expert as its tiles hold; few rows take swapped operands.

Where a GPU is at hand, time the first few of each product there instead: the model does not know a compiler's schedule.
"""

import json
import sys
from dataclasses import asdict, replace
from importlib.resources import files

from ornith_moe.kernels.examine import catalog
from ornith_moe.kernels.examine.compile import compile_requests, specialize
from ornith_moe.kernels.examine.model import estimate, routing_counts, total
from ornith_moe.kernels.tiles import PRODUCTS, Tile, Tiles
from ornith_moe.quant.recipes import RECIPES, Recipe

USED_BY: dict[str, list[Recipe]] = {  # the table's entries for operands
    "bf16": [r for r in RECIPES.values() if not r.is_fp8],
    "fp8": [r for r in RECIPES.values() if r.is_fp8],
}
PLANS = {32: (32, 64), 64: (160, 4096), 128: (None, 32768)}  # rows of a tile: (rows per expert up to which, tokens)
DEFAULT = Tile(num_stages=2)


def candidates(arch: str, product: str, operands: str, block_m: int) -> list[Tile]:
    """Every tile worth compiling."""
    amd = arch.startswith("gfx")
    if product == "wgrad":
        return [Tile(128, 4, 2), Tile(128, 8, 2)] if amd else [Tile(256, 8, 3), Tile(128, 8, 3), Tile(128, 4, 3)]
    few = block_m < 64
    if amd:
        return [Tile(128, w, s, swap) for swap in ((False, True) if few else (False,)) for w in (4, 8) for s in (1, 2)]
    found = []
    for block_n, pair in ((128, False), (128, True), (64, True)) if product in ("down", "dx") else ((128, False),):
        for late in (False, True) if operands == "fp8" and (pair or product == "gate_up") else (False,):
            for num_warps in (4, 8) if few else (8, 16) if block_m > 64 else (8,):
                for rows in (None, 64) if block_m > 64 else (None,):
                    found += [Tile(block_n, num_warps, s, few, pair, late, rows) for s in (2, 3)]
    return found


def tune(arch: str, operands: str, block_m: int, tokens: int) -> dict[str, dict]:
    """The best tile of each product, as the table holds it."""
    choices = {product: candidates(arch, product, operands, block_m) for product in PRODUCTS}
    runs = []  # (product, tile, pass, launches)
    for product, tiles in choices.items():
        for tile in tiles:
            chosen = Tiles(block_m, dict.fromkeys(PRODUCTS, replace(DEFAULT, swap=block_m < 64)) | {product: tile})
            for recipe in USED_BY[operands]:
                for direction in ("forward", "backward"):
                    which = catalog.Pass("35B", tokens, direction, recipe)
                    mine = product if product != "wgrad" else ("ddown", "dgate_up")
                    launches = [entry for entry in catalog.record(arch, which, chosen) if entry.label.startswith(mine)]
                    if launches:
                        runs.append((product, tile, which, launches))
    requests = [specialize(arch, launch) for *_, launches in runs for launch in launches]
    reports = iter(compile_requests(requests, progress=progress))
    times: dict[str, dict[Tile, float]] = {product: {} for product in PRODUCTS}
    counts = routing_counts(catalog.SHAPES["35B"], tokens)
    for product, tile, which, launches in runs:
        pairs = [(launch, next(reports)) for launch in launches]
        us = total(estimate(arch, pairs, counts)).us if all(r.programs and not r.spills for _, r in pairs) else 1e9
        scored = which.name in ("bf16", "fp8")  # the other recipes must fit, the usual one decides
        times[product][tile] = times[product].get(tile, 0.0) + (us if scored or us == 1e9 else 0.0)
    best = {product: min(ranked, key=ranked.__getitem__) for product, ranked in times.items()}
    for product, tile in best.items():
        print(f"{arch} {operands} {block_m} {product}: {times[product][tile]:.1f} us modelled, {tile}", file=sys.stderr)
    plain = asdict(Tile())
    return {p: {k: v for k, v in asdict(t).items() if v != plain[k]} for p, t in best.items()}


def progress(phase: str, done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"{phase} {done}/{of}", end="\r", file=sys.stderr)


def main(arch: str) -> None:
    default = files("ornith_moe.kernels") / "configs" / "default.json"
    table = {"fp32": json.loads(default.read_text(encoding="utf-8"))["fp32"]}
    for operands in USED_BY:
        entries = []
        plans = PLANS if arch.startswith("sm") else {32: (32, 64), 64: (None, 8192)}  # LDS holds no 128 rows in stages
        for block_m, (rows, tokens) in plans.items():
            entry = {"rows": rows} if rows else {}
            entries.append(entry | {"block_m": block_m, "tiles": tune(arch, operands, block_m, tokens)})
        table[operands] = entries
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main(sys.argv[1])
