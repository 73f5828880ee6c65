"""Codes of a few bits, packed to bytes and back."""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import load_field


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
