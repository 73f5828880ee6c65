"""fp16 in integers: its bits from a float32, rounded to nearest even, and back. The same on every processor."""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.simd.compiled import compiled


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
