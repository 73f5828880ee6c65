"""What block codecs share: tiles, which hold sixteen blocks in sixteen lanes, and the weights of their errors."""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import LANES, broadcast, load, root, store
from ornith_moe.quant.simd.transpose import transpose16

SUPER = 256  # values of a super-block


@compiled
def new_tile(n):
    """Room for n values of each of sixteen blocks."""
    return np.empty(n * LANES, np.float32)


@compiled
def gather(x, first, blocks, width, tile):
    """Blocks `first`, ... of `width` values into a tile: value i of block b to 16 * i + b.

    Lanes beyond the last block repeat it. `blocks` counts those of x, which starts over behind its last value: an
    importance matrix is one row and serves all.
    """
    a, b = new_tile(LANES), new_tile(LANES)
    for i in range(0, width, LANES):
        for lane in range(LANES):
            store(a, LANES * lane, load(x, min(first + lane, blocks - 1) * width % x.size + i))
        transpose16(a, b, tile, LANES * i)


@compiled
def sum_of_squares(n, tile):
    total = broadcast(np.float32(0))
    for i in range(n):
        total = total + load(tile, LANES * i) * load(tile, LANES * i)
    return total


@compiled
def importance(sigma2, v, importance_of_column):
    """ggml's weight of a value with an importance matrix."""
    return importance_of_column * root(sigma2 + v * v)
