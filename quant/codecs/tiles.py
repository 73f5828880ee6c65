"""What block codecs share: tiles of sixteen blocks, weights, fp16 in integers, codes packed to bytes and back."""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.codecs.compiled import compiled
from ornith_moe.quant.codecs.lanes import (
    LANES,
    interleave_first,
    interleave_second,
    load,
    load_field,
    root,
    spread,
    store,
)

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
        riffle(a, b, 0)
        riffle(b, a, 0)
        riffle(a, b, 0)
        riffle(b, tile, LANES * i)


@compiled
def riffle(cards, to, at):
    """A perfect shuffle of 256 values; four of them swap the rows and columns of a square of sixteen."""
    for row in range(8):
        a, b = load(cards, LANES * row), load(cards, LANES * (row + 8))
        store(to, at + 2 * LANES * row, interleave_first(a, b))
        store(to, at + 2 * LANES * row + LANES, interleave_second(a, b))


@compiled
def sum_of_squares(n, tile):
    total = spread(np.float32(0))
    for i in range(n):
        total = total + load(tile, LANES * i) * load(tile, LANES * i)
    return total


@compiled
def importance(sigma2, v, importance_of_column):
    """ggml's weight of a value with an importance matrix."""
    return importance_of_column * root(sigma2 + v * v)


@compiled
def half_bits(value):
    """The bits of fp16(value), rounded to nearest even; beyond fp16 they are those of infinity."""
    bits = np.float32(value).view(np.uint32)
    sign, magnitude = (bits >> np.uint32(16)) & np.uint32(0x8000), bits & np.uint32(0x7FFFFFFF)
    if magnitude >= np.uint32(0x47800000):  # 65536, infinity, NaN
        half = np.uint32(0x7C00)
    elif magnitude < np.uint32(0x38800000):  # below 2^-14: steps of 2^-24, which is what 0.5 + v rounds to
        half = np.float32(np.float32(0.5) + abs(np.float32(value))).view(np.uint32) - np.uint32(0x3F000000)
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        half = (magnitude + np.uint32(0xFFF) + odd - np.uint32(0x38000000)) >> np.uint32(13)
    return np.uint16(sign | half)


@compiled
def half_value(half):
    """The fp16 of these bits as float32; infinities and NaN too."""
    magnitude = np.uint32(half) & np.uint32(0x7FFF)
    if magnitude < np.uint32(0x400):
        value = np.float32(magnitude) * np.float32(2.0**-24)
    else:
        bias = np.uint32(0x38000000) if magnitude < np.uint32(0x7C00) else np.uint32(0x70000000)
        value = np.uint32((magnitude << np.uint32(13)) + bias).view(np.float32)
    return -value if half & np.uint16(0x8000) else value


@compiled
def half_at(blocks, at):
    """The fp16 stored in two bytes."""
    return half_value(np.uint16(blocks[at] | blocks[at + 1] << 8))


@compiled
def pack(codes, shift, bits, run, out, at):
    """Fields of `bits` bits, the low ones of codes >> shift, into out[:, at:]; codes are flat, equally many per block.

    Codes that lie `run` apart share a byte, the first in its lowest bits, until it is full. numpy is as fast but takes
    the interpreter's lock back after each of its steps, which two threads pay for.
    """
    fields, mask = 8 // bits, (1 << bits) - 1
    width = codes.size // max(1, out.shape[0])
    for block in range(out.shape[0]):
        for group in range(width // (run * fields)):
            first = width * block + run * fields * group
            target = out[block, at + run * group : at + run * (group + 1)]
            target[:] = 0
            for field in range(fields):
                part, place = codes[first + run * field : first + run * (field + 1)], bits * field
                for i in range(run):
                    target[i] |= np.uint8((part[i] >> shift & mask) << place)


@compiled
def unpack(blocks, at, bits, run, i):
    """Sixteen codes from value i on, of those that `pack` wrote to byte `at` of a block; `run` a multiple of 16."""
    place, fields = i // run, 8 // bits
    return load_field(blocks, at + run * (place // fields) + i % run, bits * (place % fields), (1 << bits) - 1)
