"""BF16 and e4m3fn in the lanes of simd/lanes.py: widened when loaded, rounded to nearest even when stored.

    load(x, i)              also from uint16, the bits of BF16
    store(x, i, v)          also into uint16, as the bits of the nearest BF16; NaN stays NaN
    load_e4m3(codes, i)     sixteen e4m3 codes as float32; 0x7f and 0xff are NaN
    store_e4m3(codes, i, v) |v| below 464, which rounds to 448; no NaN
    rounded(v)              to the nearest BF16, as float32
    larger_magnitude(a, b)  lane by lane; NaN is larger than infinity
    largest_magnitude(v)    the same over the lanes, as float32

All of it is integer arithmetic on the bits of float32, and so the same on every processor. An e4m3 code has three bits
of mantissa and the exponent bias 7, against 23 and 127: a number from 2^-6 on keeps its bits but for 20 of mantissa
(rounded) and 120 of exponent; below, steps are 2^-9, which is what adding 2^14 rounds to.
"""

from __future__ import annotations

from llvmlite import ir
from numba import float32, types

from ornith_moe.quant.simd.lanes import (
    _FLOATS,
    _I32,
    _INTS,
    LANES,
    Lanes,
    _define,
    _place,
    _register,
    _splat,
    load,
    store,
)

_SHORTS, _BYTES = (ir.VectorType(ir.IntType(width), LANES) for width in (16, 8))
_SIGN, _MAGNITUDE, _INFINITY = 0x80000000, 0x7FFFFFFF, 0x7F800000


def load_e4m3(codes, index):
    """Sixteen e4m3 codes of a flat uint8 array as float32."""


def store_e4m3(codes, index, lanes):
    """Lanes as e4m3 codes into a flat uint8 array; magnitudes below 464 and no NaN."""


def rounded(lanes):
    """The nearest BF16, ties to even."""


def larger_magnitude(a, b):
    """The larger magnitude of the two, lane by lane; NaN is the largest."""


def largest_magnitude(lanes):
    """The largest magnitude of all lanes, as float32; NaN if there is one."""


def _bits(builder, v, mask):
    return builder.and_(builder.bitcast(v, _INTS), _splat(_INTS, mask))


def _larger(builder, a, b):
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


def _farther(builder, a, b):
    a, b = _bits(builder, a, _MAGNITUDE), _bits(builder, b, _MAGNITUDE)
    return builder.bitcast(_larger(builder, a, b), _FLOATS)


def _farthest(builder, v):
    bits, step = _bits(builder, v, _MAGNITUDE), LANES // 2
    while step:
        order = ir.Constant(_INTS, [(lane + step) % LANES for lane in range(LANES)])
        bits = _larger(builder, bits, builder.shuffle_vector(bits, bits, order))
        step //= 2
    return builder.bitcast(builder.extract_element(bits, _I32(0)), ir.FloatType())


def _nearest_even(builder, bits, dropped):
    """Bits with the lowest `dropped` rounded away into the others; they are not cleared."""
    odd = builder.and_(builder.lshr(bits, _splat(_INTS, dropped)), _splat(_INTS, 1))
    return builder.add(builder.add(bits, _splat(_INTS, (1 << dropped - 1) - 1)), odd)


def _rounded_bits(builder, v):
    bits = builder.bitcast(v, _INTS)
    number = builder.icmp_unsigned("<=", _bits(builder, v, _MAGNITUDE), _splat(_INTS, _INFINITY))
    quiet = builder.or_(bits, _splat(_INTS, 1 << 22))
    return builder.and_(builder.select(number, _nearest_even(builder, bits, 16), quiet), _splat(_INTS, 0xFFFF0000))


def _load_bf16(context, builder, signature, arguments):
    halves = builder.load(_place(context, builder, signature, arguments, _SHORTS), align=2)
    return builder.bitcast(builder.shl(builder.zext(halves, _INTS), _splat(_INTS, 16)), _FLOATS)


def _store_bf16(context, builder, signature, arguments):
    bits = builder.lshr(_rounded_bits(builder, arguments[2]), _splat(_INTS, 16))
    builder.store(builder.trunc(bits, _SHORTS), _place(context, builder, signature, arguments, _SHORTS), align=2)
    return context.get_dummy_value()


def _load_e4m3(context, builder, signature, arguments):
    code = builder.zext(builder.load(_place(context, builder, signature, arguments, _BYTES), align=1), _INTS)
    magnitude = builder.and_(code, _splat(_INTS, 0x7F))
    normal = builder.add(builder.shl(magnitude, _splat(_INTS, 20)), _splat(_INTS, 120 << 23))
    small = builder.fmul(builder.uitofp(magnitude, _FLOATS), _splat(_FLOATS, 2.0**-9))
    bits = builder.select(
        builder.icmp_unsigned("<", magnitude, _splat(_INTS, 8)), builder.bitcast(small, _INTS), normal
    )
    bits = builder.select(builder.icmp_unsigned("==", magnitude, _splat(_INTS, 0x7F)), _splat(_INTS, 0x7FC00000), bits)
    sign = builder.shl(builder.and_(code, _splat(_INTS, 0x80)), _splat(_INTS, 24))
    return builder.bitcast(builder.or_(bits, sign), _FLOATS)


def _store_e4m3(context, builder, signature, arguments):
    v = arguments[2]
    magnitude = _bits(builder, v, _MAGNITUDE)
    normal = builder.lshr(_nearest_even(builder, magnitude, 20), _splat(_INTS, 20))
    normal = builder.sub(normal, _splat(_INTS, 120 << 3))
    stepped = builder.fadd(builder.bitcast(magnitude, _FLOATS), _splat(_FLOATS, 2.0**14))
    small = builder.sub(builder.bitcast(stepped, _INTS), _splat(_INTS, (127 + 14) << 23))
    subnormal = builder.icmp_unsigned("<", magnitude, _splat(_INTS, (127 - 6) << 23))
    sign = builder.lshr(_bits(builder, v, _SIGN), _splat(_INTS, 24))
    codes = builder.trunc(builder.or_(builder.select(subnormal, small, normal), sign), _BYTES)
    builder.store(codes, _place(context, builder, signature, arguments, _BYTES), align=1)
    return context.get_dummy_value()


def _arrays(kind):
    return [types.Array(kind, 1, "C", readonly=only_read) for only_read in (True, False)]


_register(load, _load_bf16, Lanes, [(array, types.intp) for array in _arrays(types.uint16)])
_register(load_e4m3, _load_e4m3, Lanes, [(array, types.intp) for array in _arrays(types.uint8)])
_register(store, _store_bf16, types.void, [(types.Array(types.uint16, 1, "C"), types.intp, Lanes)])
_register(store_e4m3, _store_e4m3, types.void, [(types.Array(types.uint8, 1, "C"), types.intp, Lanes)])
_define(rounded, lambda builder, v: builder.bitcast(_rounded_bits(builder, v), _FLOATS), Lanes, (Lanes,))
_define(larger_magnitude, _farther, Lanes, (Lanes,), (Lanes,))
_define(largest_magnitude, _farthest, float32, (Lanes,))
