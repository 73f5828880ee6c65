"""Tiles as data: which tile a GEMM uses for a device, a product and the rows an expert gets on average.

`configs/<arch>.json` lists, per product, entries {"rows": up to how many rows per expert, ...Tile}; the last one has no
"rows" and takes the rest. A device without a file uses `configs/default.json`, which compiles without spills on every
target we compile for. The tile changes no bit of a result (see `mainloop`): BLOCK_K is not in it, and batch-
invariant mode, which asks for the same tile at every batch, exists for what a compiler might still do differently.

All products of a pass share `block_m`, because they share the plan's tiles: an entry holds it once, for its `tiles`.
Tables are compiled, not timed: no figure in them comes from a GPU yet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

PRODUCTS = ("gate_up", "down", "dswiglu", "dx", "wgrad")
INVARIANT_ROWS = 64  # rows per expert that batch-invariant mode assumes whatever the batch


@dataclass(frozen=True)
class Tile:
    """`block_n` columns by `block_m` rows, a half or a quarter of the plan's; None: all of them.

    `swap` puts the weights on the matrix unit's M side. `pair` gives down and dx 2 * block_n columns in two
    accumulators; gate_up has two anyway. `late` adds a partial sum while the next product runs, where there are two and
    FP8 blocks.
    """

    block_n: int = 128
    num_warps: int = 8
    num_stages: int = 2
    swap: bool = False
    pair: bool = False
    late: bool = False
    block_m: int | None = None


@dataclass(frozen=True)
class Tiles:
    """`block_m` of every grouped GEMM of a pass, and the tile of each product."""

    block_m: int
    tile: dict[str, Tile]

    def __getitem__(self, product: str) -> Tile:
        return self.tile[product]


def tiles_for(arch: str, operands: str, rows_per_expert: float) -> Tiles:
    """The tiles of a device ("sm90") for `operands` "bf16", "fp8" or "fp32" at that many rows per expert."""
    entries = _table(arch)[operands]
    return next(tiles for rows, tiles in entries if rows is None or rows_per_expert <= rows)


@cache
def _table(arch: str) -> dict[str, list[tuple[int | None, Tiles]]]:
    configs = files("ornith_moe.kernels") / "configs"
    path = configs / f"{arch}.json"
    table = json.loads((path if path.is_file() else configs / "default.json").read_text(encoding="utf-8"))
    return {operands: [_entry(**entry) for entry in entries] for operands, entries in table.items()}


def _entry(block_m: int, tiles: dict[str, dict], rows: int | None = None) -> tuple[int | None, Tiles]:
    return rows, Tiles(block_m, {product: Tile(**tiles.get(product, tiles.get("default", {}))) for product in PRODUCTS})
