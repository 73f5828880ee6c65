"""LLVM instructions for one number or a vector of any width, of which lanes and register tiles are made.

    constant(kind, x), broadcast(builder, v, lanes)      a number in every lane
    shuffle(builder, a, b, order)                        lanes of two vectors, counted through, in any order
    call(builder, "llvm.sqrt.v16f32", result, arguments) an intrinsic of LLVM
    bf16_bits, bf16_value, e4m3_value                    small floats, as integer arithmetic on the bits of float32

A `kind` is a type of LLVM. The builder writes into the numba function that is being compiled. Nothing here asks for
fast-math, so every operation is rounded once, as IEEE says, and is the same in every lane of every width.

BF16 is rounded to nearest even, and a NaN keeps the upper bits of its payload and becomes quiet: what ggml stores and
the processors' own instructions give. e4m3 has three bits of mantissa and the exponent bias 7, against 23 and 127.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
MAGNITUDE = 0x7FFFFFFF  # the bits of a float32 without its sign


def with_lanes(element: ir.Type, kind: ir.Type) -> ir.Type:
    """The type with these elements and as many lanes as `kind`."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def constant(kind: ir.Type, number: float) -> ir.Constant:
    """A number, in every lane where `kind` is a vector."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def broadcast(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A number in every lane."""
    vector = ir.VectorType(value.type, lanes)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return shuffle(builder, single, single, [0] * lanes)


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
    """Lane `order[i]` of the lanes of a, then of b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), list(order)))


def call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
    """A function of LLVM's."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def bits_of(builder: ir.IRBuilder, v: ir.Value, mask: int = 0xFFFFFFFF) -> ir.Value:
    """The bits of float32, those in `mask`."""
    bits = builder.bitcast(v, with_lanes(I32, v.type))
    return bits if mask == 0xFFFFFFFF else builder.and_(bits, constant(bits.type, mask))


def float_of(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    return builder.bitcast(bits, with_lanes(F32, bits.type))


def nearest_even(builder: ir.IRBuilder, bits: ir.Value, dropped: int) -> ir.Value:
    """Bits with the lowest `dropped` rounded away into the others; they are not cleared."""
    odd = builder.and_(builder.lshr(bits, constant(bits.type, dropped)), constant(bits.type, 1))
    return builder.add(builder.add(bits, constant(bits.type, (1 << dropped - 1) - 1)), odd)


def bf16_bits(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """float32 to the 16 bits of the nearest BF16."""
    bits = bits_of(builder, v)
    quiet = builder.or_(bits, constant(bits.type, 1 << 22))
    bits = builder.select(builder.fcmp_ordered("ord", v, v), nearest_even(builder, bits, 16), quiet)
    return builder.trunc(builder.lshr(bits, constant(bits.type, 16)), with_lanes(I16, v.type))


def bf16_value(builder: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    """The bits of BF16 to float32."""
    bits = builder.zext(halves, with_lanes(I32, halves.type))
    return float_of(builder, builder.shl(bits, constant(bits.type, 16)))


def e4m3_value(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    """Bytes of e4m3 to float32; 0x7f and 0xff are NaN.

    A normal number keeps its bits, the exponent gets another bias; a subnormal counts steps of 2^-9, which are those of
    the float32 from 2^-6 on. So no operation meets a subnormal float32, which is slow on many processors.
    """
    code = builder.zext(codes, with_lanes(I32, codes.type))
    kind = code.type
    magnitude = builder.and_(code, constant(kind, 0x7F))
    shifted = builder.shl(magnitude, constant(kind, 20))
    normal = builder.add(shifted, constant(kind, (127 - 7) << 23))
    counted = float_of(builder, builder.or_(shifted, constant(kind, (127 - 6) << 23)))
    small = bits_of(builder, builder.fsub(counted, constant(counted.type, 2.0**-6)))
    bits = builder.select(builder.icmp_unsigned("<", magnitude, constant(kind, 8)), small, normal)
    nan = builder.icmp_unsigned("==", magnitude, constant(kind, 0x7F))
    bits = builder.select(nan, constant(kind, 0x7FC00000), bits)
    sign = builder.shl(builder.and_(code, constant(kind, 0x80)), constant(kind, 24))
    return float_of(builder, builder.or_(bits, sign))
