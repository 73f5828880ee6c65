"""BF16 and e4m3fn, in the lanes of simd/lanes.py and one by one.

    load(x, i)               also from uint16, the bits of BF16
    store(x, i, v)           also into uint16, as the bits of the nearest BF16
    load_e4m3(codes, i)      sixteen e4m3 codes as float32; 0x7f and 0xff are NaN
    store_e4m3(codes, i, v)  |v| below 464, which rounds to 448; no NaN
    rounded(v)               to the nearest BF16, as float32; of lanes or a number
    bf16_bits(x), bf16_value(bits), e4m3_value(code)     of one number
    larger_magnitude(a, b)   lane by lane; NaN is larger than infinity
    largest_magnitude(v)     the same over the lanes, as float32

The arithmetic is that of simd/emit.py: on the bits of float32, and so the same on every processor.
"""

from __future__ import annotations

from numba import float32, types

from ornith_moe.quant.simd import emit
from ornith_moe.quant.simd.emit import MAGNITUDE, bits_of, constant, float_of
from ornith_moe.quant.simd.lanes import (
    BYTES,
    FLOATS,
    INTS,
    SHORTS,
    Lanes,
    across,
    define,
    element,
    load,
    register,
    store,
)

_SIGN = 0x80000000


def load_e4m3(codes, index):
    """Sixteen e4m3 codes of a flat uint8 array as float32."""


def store_e4m3(codes, index, lanes):
    """Lanes as e4m3 codes into a flat uint8 array; magnitudes below 464 and no NaN."""


def rounded(v):
    """The nearest BF16, ties to even; NaN stays NaN."""


def bf16_bits(number):
    """The nearest BF16 of a float32, as uint16."""


def bf16_value(bits):
    """The float32 of these bits of BF16, a uint16."""


def e4m3_value(code):
    """The float32 of an e4m3 code, a uint8."""


def larger_magnitude(a, b):
    """The larger magnitude of the two, lane by lane; NaN is the largest."""


def largest_magnitude(lanes):
    """The largest magnitude of all lanes, as float32; NaN if there is one."""


def _rounded(builder, v):
    return emit.bf16_value(builder, emit.bf16_bits(builder, v))


def _larger(builder, a, b):
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


def _larger_magnitude(builder, a, b):
    return float_of(builder, _larger(builder, bits_of(builder, a, MAGNITUDE), bits_of(builder, b, MAGNITUDE)))


def _largest_magnitude(builder, v):
    return float_of(builder, across(builder, bits_of(builder, v, MAGNITUDE), _larger))


def _load_bf16(context, builder, signature, arguments):
    place = element(context, builder, signature, arguments, SHORTS)
    return emit.bf16_value(builder, builder.load(place, align=2))


def _store_bf16(context, builder, signature, arguments):
    place = element(context, builder, signature, arguments, SHORTS)
    builder.store(emit.bf16_bits(builder, arguments[2]), place, align=2)
    return context.get_dummy_value()


def _load_e4m3(context, builder, signature, arguments):
    place = element(context, builder, signature, arguments, BYTES)
    return emit.e4m3_value(builder, builder.load(place, align=1))


def _store_e4m3(context, builder, signature, arguments):
    """From 2^-6 on 20 bits of mantissa are rounded away; below, steps are 2^-9, which is what adding 2^14 rounds to."""
    v = arguments[2]
    magnitude = bits_of(builder, v, MAGNITUDE)
    normal = builder.lshr(emit.nearest_even(builder, magnitude, 20), constant(INTS, 20))
    normal = builder.sub(normal, constant(INTS, 120 << 3))
    stepped = builder.fadd(float_of(builder, magnitude), constant(FLOATS, 2.0**14))
    small = builder.sub(bits_of(builder, stepped), constant(INTS, (127 + 14) << 23))
    subnormal = builder.icmp_unsigned("<", magnitude, constant(INTS, (127 - 6) << 23))
    sign = builder.lshr(bits_of(builder, v, _SIGN), constant(INTS, 24))
    codes = builder.trunc(builder.or_(builder.select(subnormal, small, normal), sign), BYTES)
    builder.store(codes, element(context, builder, signature, arguments, BYTES), align=1)
    return context.get_dummy_value()


def _arrays(kind):
    return [types.Array(kind, 1, "C", readonly=only_read) for only_read in (True, False)]


def _define_number(function, build, result, argument):
    """The meaning of a function of one number."""
    register(function, lambda context, builder, signature, values: build(builder, *values), result, [(argument,)])


register(load, _load_bf16, Lanes, [(array, types.intp) for array in _arrays(types.uint16)])
register(load_e4m3, _load_e4m3, Lanes, [(array, types.intp) for array in _arrays(types.uint8)])
register(store, _store_bf16, types.void, [(types.Array(types.uint16, 1, "C"), types.intp, Lanes)])
register(store_e4m3, _store_e4m3, types.void, [(types.Array(types.uint8, 1, "C"), types.intp, Lanes)])
define(rounded, _rounded, Lanes, (Lanes,))
define(larger_magnitude, _larger_magnitude, Lanes, (Lanes,), (Lanes,))
define(largest_magnitude, _largest_magnitude, float32, (Lanes,))
_define_number(rounded, _rounded, float32, float32)
_define_number(bf16_bits, emit.bf16_bits, types.uint16, float32)
_define_number(bf16_value, emit.bf16_value, float32, types.uint16)
_define_number(e4m3_value, emit.e4m3_value, float32, types.uint8)
