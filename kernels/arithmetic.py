"""The arithmetic that every kernel shares: widen, narrow, dot, and the bits of an FP8 scale and code.

Each function gives the same bits on every target and in Triton's interpreter, so that what is tested is what runs:

- BF16 is widened by a shift. The interpreter's BF16 arithmetic is garbage, and so is its widening of subnormals.
- `narrow` rounds to nearest even. A GPU's own cast does; the interpreter's truncates, so there it is done on bits.
- `dot` multiplies 16- and 8-bit operands as they are on a GPU and widened to fp32 in the interpreter. A product of two
  of them is exact in fp32, and both sum in fp32, so only the order of the sum is the device's own.
- e4m3 codes and BF16 and UE8M0 scales are integer arithmetic on fp32 bits everywhere: hardware casts differ between
  targets, and the interpreter's is wrong for subnormals and above 464. Divisions are IEEE (`div_rn`); `/` is not.

The definition of the FP8 rules is `ornith_moe.quant.fp8`.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # fixed where `triton.jit` reads it too: at import

_ONE = tl.constexpr(0x3F800000)  # fp32 bits
_INF = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_MIN_SCALE = tl.constexpr(0x00800000)  # 2^-126


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(bits):
    """fp32 bits, rounded to nearest even at bit 16. NaN stays NaN."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return tl.where((bits & 0x7FFFFFFF) > _INF, bits, rounded)


@triton.jit
def widen(x):
    """`x` of any floating dtype as fp32."""
    if x.dtype == tl.bfloat16:
        return float_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 `x` to fp32, fp16 or BF16, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        halves = bf16_bits(bits_of(x)) >> 16
        return tl.where(x == x, halves, halves | 0x40).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b in fp32."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scale_bits(amax_bits, SHIFT: tl.constexpr):
    """fp32 bits of the scale that goes with |amax|, rounded to the dtype whose bits lie SHIFT below."""
    s = tl.maximum(bits_of(tl.div_rn(float_of(amax_bits), 448.0)), _MIN_SCALE)  # positive numbers order like their bits
    if SHIFT == 16:
        s = bf16_bits(s)
    elif SHIFT == 23:
        s = (s + 0x7FFFFF) & _INF  # up: any mantissa bit carries into the exponent
    s = tl.where(amax_bits == 0, _ONE, s)
    return tl.where(amax_bits < _INF, s, _NAN)


@triton.jit
def stored_scale(s):
    """fp32 of a scale as it is stored: fp32 itself, BF16, or the exponent byte of UE8M0."""
    if s.dtype == tl.uint8:
        return float_of(s.to(tl.int32) << 23)
    return widen(s)


@triton.jit
def e4m3_code(y):
    """uint8 e4m3fn code of fp32 `y`, to nearest even, saturating; 0x7f for NaN of either sign."""
    bits = bits_of(y)
    magnitude = bits & 0x7FFFFFFF
    # Three of 23 mantissa bits stay; the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the step is 2^-9, which is that of fp32 numbers from 2^14 on: the addition rounds, the rest is a count.
    subnormal = bits_of(float_of(magnitude) + 16384.0) - 0x46800000
    code = tl.minimum(tl.where(magnitude < 0x3C800000, subnormal, normal), 0x7E) | ((bits >> 24) & 0x80)
    return tl.where(magnitude > _INF, 0x7F, code).to(tl.uint8)


@triton.jit
def divide_by_scale(x, s):
    """fp32 x / s as IEEE rounds it, for a normal scale `s` that many `x` share, in a few multiplications each.

    With r = 1 / s correctly rounded and q = x * r, fma(fma(-s, q, x), r, q) is x / s correctly rounded (Markstein
    1990) as long as the remainder is not subnormal: hence the exact factor 2^64 for small scales. Below s * 2^-11 the
    quotient may be off in its last bit, where e4m3 rounds it to 0 all the same.
    """
    lift = tl.where(s < 2.0**-64, 2.0**64, 1.0)
    s, x = s * lift, x * lift
    r = tl.div_rn(1.0, s)
    q = x * r
    remainder = tl.fma(tl.broadcast_to(-s, q.shape), q, x)
    return tl.where(remainder == 0.0, q, tl.fma(remainder, tl.broadcast_to(r, q.shape), q))  # q keeps the sign of -0


@triton.jit
def e4m3_value(code):
    """fp32 of a uint8 e4m3fn code."""
    return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
