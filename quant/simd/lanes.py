"""Sixteen float32 in a numba function: vectors that keep the order of sums.

    v = load(x, i)            x[i], ..., x[i + 15]
    v * w + v, -v, v < w      lane by lane; a number on one side is broadcast over all lanes
    select(mask, a, b)        a where the mask is set, else b

ggml's searches are sums over the 16 or 32 values of a block. Reordering a float sum changes its last bits, and with
them which of two near-tied candidates wins; so a compiler may not vectorise such a sum. But blocks do not depend on
each other: with sixteen blocks in the sixteen lanes, every sum keeps its order and every instruction does sixteen.

numba has no vector type, so this file adds two: `Lanes`, LLVM's <16 x float>, and `Mask`, <16 x i1>. Operators become
LLVM's strict IEEE instructions (no fast-math flag, so nothing is contracted or reordered), and LLVM splits a vector
into what the processor has: one AVX-512 register, two of AVX2, four of NEON.
"""

from __future__ import annotations

import operator
from itertools import product

from llvmlite import ir
from numba import float32, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

from ornith_moe.quant.simd import emit
from ornith_moe.quant.simd.emit import F32, I8, I16, I32, I64, constant, shuffle

LANES = 16
FLOATS, INTS, SHORTS, BYTES = (ir.VectorType(kind, LANES) for kind in (F32, I32, I16, I8))
_BITS = ir.VectorType(ir.IntType(1), LANES)


class LanesType(types.Type):
    vector = FLOATS


class MaskType(types.Type):
    vector = _BITS


@register_model(LanesType)
@register_model(MaskType)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.vector)


Lanes, Mask = LanesType("Lanes"), MaskType("Mask")
_NUMBERS = types.Array(types.float32, 1, "C")
_ONLY_READ = types.Array(types.float32, 1, "C", readonly=True)
_CODES = types.Array(types.uint8, 1, "C")


def load(x, index):
    """Sixteen neighbours of a flat array, float32 or the whole numbers of uint8; the caller answers for the bounds."""


def store(x, index, lanes):
    """Lanes into a flat array: as they are into float32, as whole numbers 0 to 255 into uint8."""


def broadcast(number):
    """A number in every lane."""


def load_field(codes, index, shift, mask):
    """(codes[index] >> shift) & mask of sixteen neighbours of a flat uint8 array, the whole numbers of them."""


def load_broadcast(x, index):
    """One number of a flat float32 array in every lane; the caller answers for the bounds."""


def select(mask, a, b):
    """a where the mask is set, else b."""


def maximum(a, b):
    """C's `a > b ? a : b`."""


def minimum(a, b):
    """C's `a < b ? a : b`."""


def nearest(lanes):
    """ggml's nearest_int: round to the nearest whole number, ties to even, for |v| below 2^22.

    Beyond, ggml returns the low bits of v + 1.5 * 2^23, whatever they are; so do we.
    """


def nearest_within(lanes, low, high):
    """`nearest`, then the nearer of low and high where it is outside; whole numbers low <= high, and none may be NaN.

    Cheaper than `nearest` and a clamp, because it clamps integers; beyond 2^22 it clamps where ggml takes low bits.
    """


def low_byte(lanes):
    """A whole number as C's uint8_t keeps it: modulo 256."""


def absolute(lanes):
    """|v|."""


def root(lanes):
    """The square root, correctly rounded."""


def floor(lanes):
    """The largest whole number that is not above."""


def any_lane(mask):
    """True if the mask is set in any lane."""


def interleave_first(a, b):
    """The first halves of a and b, lane by lane in turn."""


def interleave_second(a, b):
    """The second halves of a and b, lane by lane in turn."""


def evens(a, b):
    """Lanes 0, 2, 4, ... of a, then of b."""


def odds(a, b):
    """Lanes 1, 3, 5, ... of a, then of b."""


def bits(mask):
    """The mask as a number, lane 0 its lowest bit."""


def mask_of(number):
    """The inverse: the mask whose lane i is bit i of a uint32."""


def first_lane(mask):
    """The lowest lane where the mask is set, 16 where it is nowhere."""


def highest(lanes):
    """The largest number of all lanes, as float32; none may be NaN."""


def lowest(lanes):
    """The smallest number of all lanes, as float32; none may be NaN."""


def _wide(builder, value):
    """A number broadcast over all lanes; vectors pass."""
    return value if isinstance(value.type, ir.VectorType) else emit.broadcast(builder, value, LANES)


def _pick(predicate):
    """`a predicate b ? a : b`, which LLVM knows as one instruction."""
    return lambda builder, a, b: builder.select(builder.fcmp_ordered(predicate, a, b), a, b)


def _nearest(builder, v):
    bits = builder.bitcast(builder.fadd(v, constant(FLOATS, 12582912.0)), INTS)
    mantissa = builder.and_(bits, constant(INTS, 0x7FFFFF))
    return builder.sitofp(builder.sub(mantissa, constant(INTS, 0x400000)), FLOATS)


def _nearest_within(builder, v, low, high):
    def whole(number):
        return builder.bitcast(builder.fadd(number, magic), INTS)

    magic = constant(FLOATS, 12582912.0)  # a float32 near 1.5 * 2^23 has no fraction, and its bits have its order
    bits, low, high = whole(v), whole(low), whole(high)
    bits = builder.select(builder.icmp_signed(">", bits, low), bits, low)
    bits = builder.select(builder.icmp_signed("<", bits, high), bits, high)
    return builder.fsub(builder.bitcast(bits, FLOATS), magic)


def _interleave(half):
    order = [lane // 2 + LANES // 2 * half + LANES * (lane % 2) for lane in range(LANES)]
    return lambda builder, a, b: shuffle(builder, a, b, order)


def _every_second(first):
    order = range(first, 2 * LANES, 2)
    return lambda builder, a, b: shuffle(builder, a, b, order)


def _low_byte(builder, v):
    return builder.sitofp(builder.and_(builder.fptosi(v, INTS), constant(INTS, 255)), FLOATS)


def _llvm(name):
    return lambda builder, v: emit.call(builder, f"{name}.v{LANES}f32", FLOATS, [v])


def _any(builder, mask):
    return builder.icmp_unsigned("!=", builder.bitcast(mask, ir.IntType(LANES)), ir.IntType(LANES)(0))


def _bits(builder, mask):
    return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), I32)


def _mask_of(context, builder, signature, arguments):
    return builder.bitcast(builder.trunc(arguments[0], ir.IntType(LANES)), _BITS)


def _first(builder, mask):
    bits = builder.or_(_bits(builder, mask), I32(1 << LANES))
    return builder.zext(emit.call(builder, "llvm.cttz.i32", I32, [bits, ir.IntType(1)(1)]), I64)


def across(builder, v, best):
    """The best of all lanes: halves against each other until one is left, since the order does not matter to it."""
    step = LANES // 2
    while step:
        v = best(builder, v, shuffle(builder, v, v, [(lane + step) % LANES for lane in range(LANES)]))
        step //= 2
    return builder.extract_element(v, I32(0))


def _load(context, builder, signature, arguments):
    return builder.load(element(context, builder, signature, arguments, FLOATS), align=4)


def _load_broadcast(context, builder, signature, arguments):
    place = element(context, builder, signature, arguments, F32)
    return _wide(builder, builder.load(place, align=4))


def _load_bytes(context, builder, signature, arguments):
    place = element(context, builder, signature, arguments, BYTES)
    return builder.uitofp(builder.load(place, align=1), FLOATS)


def _load_field(context, builder, signature, arguments):
    place = element(context, builder, signature, arguments, BYTES)
    shift, mask = (_wide(builder, builder.trunc(number, I32)) for number in arguments[2:])
    codes = builder.lshr(builder.zext(builder.load(place, align=1), INTS), shift)
    return builder.sitofp(builder.and_(codes, mask), FLOATS)


def _store(context, builder, signature, arguments):
    vector, align = arguments[2], 4
    if signature.args[0] == _CODES:
        vector, align = builder.fptoui(vector, BYTES), 1
    builder.store(vector, element(context, builder, signature, arguments, vector.type), align=align)
    return context.get_dummy_value()


def element(context, builder, signature, arguments, kind):
    """Where element arguments[1] of the array arguments[0] lies, as a pointer to `kind`."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(array.data, [arguments[1]]), kind.as_pointer())


def register(function, lower, result, cases):
    """Give `function` its meaning in compiled code: `lower` writes it, for each of the cases of argument types."""
    template = type(function.__name__, (ConcreteTemplate,), {"cases": [signature(result, *case) for case in cases]})
    infer_global(function)(template)
    for case in cases:
        lower_builtin(function, *case)(lower)


def define(function, build, result, *choices):
    """`register` for all combinations of types but those of numbers alone; build(builder, *values) gets vectors."""

    def lower(context, builder, signature, values):
        return build(builder, *(_wide(builder, value) for value in values))

    cases = [case for case in product(*choices) if case.count(float32) < len(case) or len(case) == 1]
    register(function, lower, result, cases)


_EITHER = (Lanes, float32)
register(load, _load, Lanes, [(kind, types.intp) for kind in (_NUMBERS, _ONLY_READ)])
register(load, _load_bytes, Lanes, [(kind, types.intp) for kind in (_CODES, _CODES.copy(readonly=True))])
register(load_field, _load_field, Lanes, [(kind, *[types.intp] * 3) for kind in (_CODES, _CODES.copy(readonly=True))])
register(mask_of, _mask_of, Mask, [(types.uint32,)])
register(load_broadcast, _load_broadcast, Lanes, [(kind, types.intp) for kind in (_NUMBERS, _ONLY_READ)])
register(store, _store, types.void, [(kind, types.intp, Lanes) for kind in (_NUMBERS, _CODES)])
define(broadcast, lambda builder, v: v, Lanes, (float32,))
define(select, lambda builder, mask, a, b: builder.select(mask, a, b), Lanes, (Mask,), _EITHER, _EITHER)
define(maximum, _pick(">"), Lanes, _EITHER, _EITHER)
define(minimum, _pick("<"), Lanes, _EITHER, _EITHER)
define(nearest, _nearest, Lanes, (Lanes,))
define(nearest_within, _nearest_within, Lanes, (Lanes,), (float32,), (float32,))
define(interleave_first, _interleave(0), Lanes, (Lanes,), (Lanes,))
define(interleave_second, _interleave(1), Lanes, (Lanes,), (Lanes,))
define(evens, _every_second(0), Lanes, (Lanes,), (Lanes,))
define(odds, _every_second(1), Lanes, (Lanes,), (Lanes,))
define(low_byte, _low_byte, Lanes, (Lanes,))
define(absolute, _llvm("llvm.fabs"), Lanes, (Lanes,))
define(root, _llvm("llvm.sqrt"), Lanes, (Lanes,))
define(floor, _llvm("llvm.floor"), Lanes, (Lanes,))
define(any_lane, _any, types.boolean, (Mask,))
define(first_lane, _first, types.intp, (Mask,))
define(bits, _bits, types.uint32, (Mask,))
define(highest, lambda builder, v: across(builder, v, _pick(">")), float32, (Lanes,))
define(lowest, lambda builder, v: across(builder, v, _pick("<")), float32, (Lanes,))
define(operator.neg, lambda builder, v: builder.fneg(v), Lanes, (Lanes,))
define(operator.invert, lambda builder, mask: builder.not_(mask), Mask, (Mask,))
define(operator.and_, lambda builder, a, b: builder.and_(a, b), Mask, (Mask,), (Mask,))
define(operator.or_, lambda builder, a, b: builder.or_(a, b), Mask, (Mask,), (Mask,))
for _operator, _name in {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}.items():
    define(
        getattr(operator, _operator),
        lambda builder, a, b, name=_name: getattr(builder, name)(a, b),
        Lanes,
        _EITHER,
        _EITHER,
    )
for _operator, _symbol in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items():
    define(
        getattr(operator, _operator),
        lambda builder, a, b, symbol=_symbol: (
            builder.fcmp_unordered(symbol, a, b) if symbol == "!=" else builder.fcmp_ordered(symbol, a, b)
        ),
        Mask,
        _EITHER,
        _EITHER,
    )
