"""ggml's searches for the scale of a sub-block, one sub-block to a lane of the GPU.

    signed_scale     x ~ scale * q                q in [-n, n - 1]       make_qx_quants
    affine_scale     x ~ scale * q + low          q in [0, n], low <= 0  make_qkx2_quants, make_qkx3_quants
    positive_scale   x ~ scale * q, x >= 0        q in [0, n]            make_qp_quants

The same arithmetic as `ornith_moe.quant.codecs.search`, in the same order, so the same bits: ggml sums over the values
of a sub-block one after the other, and here each lane does that for its own, in registers. A sub-block is therefore a
tuple of 16 or 32 tensors [L], not a tile: a tile would be summed as a tree. No product is contracted with a sum, every
division and root is IEEE, and `nearest` says itself what ggml leaves to x86.

Codes of the search are not kept but made again from what led to them, `code`; only few are ever wanted.

Legend: L lanes (sub-blocks, or super-blocks for `positive_scale`), N values of each.
"""

import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import bits_of, float_of, widen

EPSILON = tl.constexpr(1e-15)  # ggml's GROUP_MAX_EPS: a block below it is zero
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def nearest(v):
    """ggml's nearest_int, as fp32: to nearest even, and beyond 2^22 the low bits of v + 1.5 * 2^23.

    NaN gives 0: its low bits on x86 and AMD. NVIDIA's NaN has all bits set, hence the minimum.
    """
    bits = tl.minimum(bits_of(v + 12582912.0), 0x7FC00000)
    return float_of((bits & 0x7FFFFF) | 0x4B000000) - 12582912.0


@triton.jit
def low_byte(v):
    """A whole number as C's uint8_t keeps it: modulo 256."""
    return (v.to(tl.int32) & 255).to(tl.float32)


@triton.jit
def clamp(v, low, high):
    return tl.maximum(tl.minimum(v, high), low)


@triton.jit
def code(v, top, GUARDED: tl.constexpr):
    """v rounded, in [0, top]. GUARDED is make_qkx3_quants, which clamps first: beyond 2^22 that makes a difference."""
    if GUARDED:
        return nearest(tl.minimum(tl.maximum(v, 0.0), top))  # NaN becomes 0
    return clamp(nearest(v), 0.0, top)


@triton.jit
def values(ptr, at, mask, N: tl.constexpr):
    """ptr[at], ..., ptr[at + N - 1] of every lane as fp32: N tensors [L]. Four to a load, all in the lane's thread."""
    found = ()
    for i in tl.static_range(0, N, 4):
        four = widen(tl.load(ptr + (at + i)[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0.0))
        even, odd = tl.split(tl.reshape(four, [at.shape[0], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        found += (first, second, third, fourth)  # type: ignore[assignment]  # Triton's tuples grow
    return found


@triton.jit
def sum_of_squares(x, N: tl.constexpr):
    total = x[0] * x[0]
    for i in tl.static_range(1, N):
        total = total + x[i] * x[i]
    return total


@triton.jit
def mean_square(ptr, at, mask, N: tl.constexpr):
    """Mean of v^2 over N values in order, N a power of two; not unrolled, unlike `sum_of_squares`."""
    total = tl.zeros(at.shape, tl.float32)
    for i in range(0, N, 4):
        a, b, c, d = values(ptr, at + i, mask, 4)
        total = total + a * a + b * b + c * c + d * d
    return total * (1.0 / N)


@triton.jit
def affine_scale(x, w, N: tl.constexpr, TOP: tl.constexpr, FIRST: tl.constexpr, DELTA: tl.constexpr,
                 STEPS: tl.constexpr, GUARDED: tl.constexpr):  # fmt: skip
    """(scale, -low, sum of w, inverse, shift); the codes are code(inverse * (x - shift), TOP, GUARDED)."""
    top = tl.full(x[0].shape, TOP, tl.float32)
    low, high, sum_w = x[0], x[0], w[0]
    sum_x = sum_w * low
    for i in tl.static_range(1, N):
        low = tl.where(x[i] < low, x[i], low)
        high = tl.where(x[i] > high, x[i], high)
        sum_w = sum_w + w[i]
        sum_x = sum_x + w[i] * x[i]
    low = tl.where(low > 0.0, 0.0, low)
    flat = high <= low
    inverse = tl.div_rn(top, high - low)
    scale = tl.div_rn(1.0, inverse)
    inverse = tl.where(flat | (inverse == INFINITY), 0.0, inverse)  # the codes of both are 0
    best = tl.zeros_like(low)
    for i in tl.static_range(N):
        difference = scale * code(inverse * (x[i] - low), top, False) + low - x[i]
        best = best + w[i] * (difference * difference)
    shift = low
    for step in range(STEPS + 1):
        tried = tl.div_rn(FIRST + DELTA * tl.full(top.shape, step, tl.float32) + top, high - low)
        q = [code(tried * (v - low), top, GUARDED) for v in x]
        sum_q = tl.zeros_like(low)
        sum_qq, sum_xq, error = sum_q, sum_q, sum_q
        for i in tl.static_range(N):
            weighted = w[i] * q[i]
            sum_q = sum_q + weighted
            sum_qq = sum_qq + weighted * q[i]
            sum_xq = sum_xq + weighted * x[i]
        determinant = sum_w * sum_qq - sum_q * sum_q
        new_scale = tl.div_rn(sum_w * sum_xq - sum_x * sum_q, determinant)
        new_low = tl.div_rn(sum_qq * sum_x - sum_q * sum_xq, determinant)
        above = new_low > 0.0
        new_scale = tl.where(above, tl.div_rn(sum_xq, sum_qq), new_scale)
        new_low = tl.where(above, 0.0, new_low)
        for i in tl.static_range(N):
            difference = new_scale * q[i] + new_low - x[i]
            error = error + w[i] * (difference * difference)
        better = (determinant > 0.0) & (error < best)
        best, inverse = tl.where(better, error, best), tl.where(better, tried, inverse)
        shift = tl.where(better, low, shift)
        scale, low = tl.where(better, new_scale, scale), tl.where(better, new_low, low)  # later steps start from it
    return tl.where(flat, 0.0, scale), -low, sum_w, inverse, shift


@triton.jit
def nth_shift(i, MOST: tl.constexpr, like):
    """0, -MOST, ..., -1, 1, ..., MOST for i = 0, ..., 2 * MOST, in the lanes of `like`: ggml tries in this order."""
    i = tl.full(like.shape, i, tl.int32)
    return tl.where(i == 0, 0, tl.where(i <= MOST, i - MOST - 1, i - MOST)).to(tl.float32)


@triton.jit
def signed_scale(x, w, N: tl.constexpr, LIMIT: tl.constexpr):
    """(scale, inverse); codes are clamp(nearest(inverse * x), -LIMIT, LIMIT - 1) + LIMIT, or 0 if it is infinite."""
    value = tl.zeros_like(x[0])
    magnitude = value
    for i in tl.static_range(N):
        larger = tl.abs(x[i]) > magnitude  # the first of equals stays
        magnitude, value = tl.where(larger, tl.abs(x[i]), magnitude), tl.where(larger, x[i], value)
    limit = tl.full(value.shape, LIMIT, tl.float32)
    scale = tl.zeros_like(value)
    inverse, best = scale, scale
    for i in range(19):
        tried = tl.div_rn(-(limit + 0.1 * nth_shift(i, 9, limit)), value)
        sum_xq = tl.zeros_like(value)
        sum_qq = sum_xq
        for j in tl.static_range(N):
            q = clamp(nearest(tried * x[j]), -limit, limit - 1.0)
            sum_xq = sum_xq + w[j] * x[j] * q
            sum_qq = sum_qq + w[j] * q * q
        better = (sum_qq > 0.0) & ((sum_xq * sum_xq > best * sum_qq) | (i == 0))
        scale = tl.where(better, tl.div_rn(sum_xq, sum_qq), scale)
        best = tl.where(better, scale * sum_xq, best)
        inverse = tl.where(better | (i == 0), tried, inverse)
    zero = magnitude < EPSILON
    return tl.where(zero, 0.0, scale), tl.where(zero, INFINITY, inverse)


@triton.jit
def positive_scale(x, w, N: tl.constexpr, TOP: tl.constexpr):
    """(scale, N codes). A code is a byte in C, so a negative one wraps."""
    top = tl.full(x[0].shape, TOP, tl.float32)
    high = tl.zeros_like(top)
    for j in tl.static_range(N):
        high = tl.where(x[j] > high, x[j], high)
    inverse = tl.zeros_like(high)
    best = inverse
    for i in range(2 * 4 + 1):
        tried = tl.div_rn(top + 0.1 * nth_shift(i, 4, top), high)
        scale = tl.div_rn(1.0, tried)
        error = tl.zeros_like(high)
        for j in tl.static_range(N):
            q = nearest(tried * x[j])
            difference = x[j] - scale * tl.where(i == 0, low_byte(q), tl.minimum(q, top))
            error = error + w[j] * difference * difference
        better = (error < best) | (i == 0)
        best, inverse = tl.where(better, error, best), tl.where(better, tried, inverse)
    sum_xq = tl.zeros_like(high)
    sum_qq = sum_xq
    q = ()
    for j in tl.static_range(N):
        nearby = tl.minimum(nearest(inverse * x[j]), top)
        sum_xq = sum_xq + w[j] * x[j] * nearby
        sum_qq = sum_qq + w[j] * nearby * nearby
        q += (low_byte(nearby),)
    for _ in range(5):
        moved = ()
        for j in tl.static_range(N):
            rest_xq = sum_xq - w[j] * x[j] * q[j]
            rest_qq = sum_qq - w[j] * q[j] * q[j]
            tried = tl.minimum(nearest(tl.div_rn(x[j] * rest_qq, rest_xq)), top)
            new_xq = rest_xq + w[j] * x[j] * tried
            new_qq = rest_qq + w[j] * tried * tried
            better = (rest_xq > 0.0) & (rest_qq > 0.0) & (tried != q[j])
            better = better & (new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq)
            moved += (tl.where(better, low_byte(tried), q[j]),)  # type: ignore[assignment]  # Triton's tuples grow
            sum_xq, sum_qq = tl.where(better, new_xq, sum_xq), tl.where(better, new_qq, sum_qq)
        q = moved
    zero = high < EPSILON
    scale = tl.where(zero | ~(sum_qq > 0.0), 0.0, tl.div_rn(sum_xq, sum_qq))
    return scale, [tl.where(zero, 0.0, code) for code in q]
