"""ggml's searches for the scale of a block, sixteen blocks at a time.

    signed_scale     x ~ scale * q                q in [-n, n - 1]       make_qx_quants
    refined_scale    the same, by single steps of q instead of scales    make_q3_quants
    affine_scale     x ~ scale * q + low          q in [0, n], low <= 0  make_qkx2_quants, make_qkx3_quants
    positive_scale   x ~ scale * q, x >= 0        q in [0, n]            make_qp_quants

Each tries scales near the obvious one, refits the scale to the codes by weighted least squares, and keeps the best. The
arrays are tiles: value i of lane b lies at 16 * i + b. A sum goes over i in order, in IEEE float32, and products
associate as in C, so all sixteen lanes get ggml's bits.

The winning codes are made again at the end, in q, from the scale that led to them; copying them at every improvement
would cost more. Source: ggml-quants.c.

Letters: n values of a block, x values, w weights, q codes.
"""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.simd.compiled import compiled
from ornith_moe.quant.simd.lanes import (
    LANES,
    absolute,
    any_lane,
    broadcast,
    load,
    low_byte,
    maximum,
    minimum,
    nearest,
    nearest_within,
    select,
    store,
)

EPSILON = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: a block below it is zero
ZERO = np.float32(0)
TAME = np.float32(2**21)  # where `nearest` rounds


@compiled
def clamp(v, low, high):
    return maximum(minimum(v, high), low)


@compiled
def largest(n, x):
    """(signed value of largest magnitude, that magnitude); the first of equals."""
    value = magnitude = broadcast(ZERO)
    for i in range(n):
        v = load(x, LANES * i)
        larger = absolute(v) > magnitude
        magnitude = select(larger, absolute(v), magnitude)
        value = select(larger, v, value)
    return value, magnitude


@compiled
def signed_scale(n, x, w, limit, q):
    """scale; q becomes the codes plus `limit`."""
    value, magnitude = largest(n, x)
    lower, upper = np.float32(-limit), np.float32(limit - 1)
    scale = inverse = best = broadcast(ZERO)
    for step in range(-10, 10):
        if step == 0:
            continue
        shift = np.float32(0 if step == -10 else step)  # the obvious scale is tried first, so -10 stands for 0
        tried = -(broadcast(np.float32(limit)) + np.float32(0.1) * shift) / value
        sum_xq = sum_qq = broadcast(ZERO)
        for i in range(n):
            v, weight = load(x, LANES * i), load(w, LANES * i)
            code = nearest_within(tried * v, lower, upper)  # |tried * v| is at most limit + 1
            sum_xq = sum_xq + weight * v * code
            sum_qq = sum_qq + weight * code * code
        if step == -10:
            better, inverse = sum_qq != ZERO, tried
        else:
            better = (sum_qq > ZERO) & (sum_xq * sum_xq > best * sum_qq)
        scale = select(better, sum_xq / sum_qq, scale)
        best = select(better, scale * sum_xq, best)
        inverse = select(better, tried, inverse)
    zero = magnitude < EPSILON
    for i in range(n):
        code = clamp(nearest(inverse * load(x, LANES * i)), lower, upper) + np.float32(limit)
        store(q, LANES * i, select(zero, ZERO, code))
    return select(zero, ZERO, scale)


@compiled
def refined_scale(n, x, limit, q):
    """scale; q becomes the codes plus `limit`. Weights are x^2."""
    value, magnitude = largest(n, x)
    lower, upper = np.float32(-limit), np.float32(limit - 1)
    inverse = lower / value
    sum_xq = sum_qq = broadcast(ZERO)
    for i in range(n):
        v = load(x, LANES * i)
        code = clamp(nearest(inverse * v), lower, upper)
        store(q, LANES * i, code)
        sum_xq = sum_xq + v * v * v * code
        sum_qq = sum_qq + v * v * code * code
    for _ in range(5):
        changed = sum_qq < sum_qq
        for i in range(n):
            v, code = load(x, LANES * i), load(q, LANES * i)
            weight = v * v
            rest_xq = sum_xq - weight * v * code
            rest_qq = sum_qq - weight * code * code
            tried = clamp(nearest(v * rest_qq / rest_xq), lower, upper)
            new_xq = rest_xq + weight * v * tried
            new_qq = rest_qq + weight * tried * tried
            better = (rest_xq > ZERO) & (tried != code) & (new_qq > ZERO)
            better = better & (new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq)
            store(q, LANES * i, select(better, tried, code))
            sum_xq, sum_qq = select(better, new_xq, sum_xq), select(better, new_qq, sum_qq)
            changed = changed | better
        if not any_lane(changed):
            break
    zero = magnitude < EPSILON
    for i in range(n):
        store(q, LANES * i, select(zero, ZERO, load(q, LANES * i) + np.float32(limit)))
    return select(zero | ~(sum_qq > ZERO), ZERO, sum_xq / sum_qq)


@compiled
def affine_scale(n, x, w, limit, first, delta, steps, absolute_error, guarded, q):
    """(scale, -low); q becomes the codes. `guarded` is make_qkx3_quants, which clamps before it rounds."""
    top = np.float32(limit)
    low = high = load(x, 0)
    sum_w = load(w, 0)
    sum_x = sum_w * low
    for i in range(1, n):
        v, weight = load(x, LANES * i), load(w, LANES * i)
        low, high = minimum(v, low), maximum(v, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * v
    bottom, low = low, select(low > ZERO, ZERO, low)
    flat = high <= low
    inverse = top / (high - low)
    scale = np.float32(1) / inverse
    best = broadcast(ZERO)
    for i in range(n):
        v = load(x, LANES * i)
        difference = scale * clamp(nearest(inverse * (v - low)), ZERO, top) + low - v
        best = best + load(w, LANES * i) * (absolute(difference) if absolute_error else difference * difference)
    shift, ceiling = low, broadcast(np.float32(np.inf))
    for step in range(steps + 1):
        tried = (broadcast(first) + delta * np.float32(step) + top) / (high - low)
        amax = maximum(absolute(tried * (bottom - low)), absolute(tried * (high - low)))
        tame = not any_lane(~(amax < TAME) & ~flat)
        sum_q = sum_qq = sum_xq = broadcast(ZERO)
        for i in range(n):
            v, weight = load(x, LANES * i), load(w, LANES * i)
            code = tried * (v - low)
            if tame:
                code = nearest_within(code, ZERO, top)
            else:
                if guarded:
                    code = select(code > ZERO, minimum(code, top), ZERO)
                code = clamp(nearest(code), ZERO, top)
            store(q, LANES * i, code)
            weighted = weight * code
            sum_q = sum_q + weighted
            sum_qq = sum_qq + weighted * code
            sum_xq = sum_xq + weighted * v
        determinant = sum_w * sum_qq - sum_q * sum_q
        new_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant
        new_low = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        above = new_low > ZERO
        new_scale, new_low = select(above, sum_xq / sum_qq, new_scale), select(above, ZERO, new_low)
        error = broadcast(ZERO)
        for i in range(n):
            difference = new_scale * load(q, LANES * i) + new_low - load(x, LANES * i)
            error = error + load(w, LANES * i) * (absolute(difference) if absolute_error else difference * difference)
        better = (determinant > ZERO) & (error < best)
        best, inverse, shift = select(better, error, best), select(better, tried, inverse), select(better, low, shift)
        ceiling = select(better, top, ceiling)
        scale, low = select(better, new_scale, scale), select(better, new_low, low)  # later steps start from this low
    for i in range(n):
        code = inverse * (load(x, LANES * i) - shift)
        if guarded:
            code = select(code > ZERO, minimum(code, ceiling), ZERO)
        store(q, LANES * i, select(flat, ZERO, clamp(nearest(code), ZERO, top)))
    return select(flat, ZERO, scale), -low


@compiled
def positive_scale(n, x, w, limit, q):
    """scale; q becomes the codes. A code is a byte in C, so a negative one wraps."""
    top = np.float32(limit)
    high = broadcast(ZERO)
    for i in range(n):
        high = maximum(high, load(x, LANES * i))
    inverse = best = broadcast(ZERO)
    for step in range(-5, 5):
        if step == 0:
            continue
        shift = np.float32(0 if step == -5 else step)  # the obvious scale is tried first, so -5 stands for 0
        tried = (broadcast(top) + np.float32(0.1) * shift) / high
        scale = np.float32(1) / tried
        error = broadcast(ZERO)
        for i in range(n):
            code = nearest(tried * load(x, LANES * i))
            code = low_byte(code) if step == -5 else minimum(code, top)
            difference = load(x, LANES * i) - scale * code
            error = error + load(w, LANES * i) * difference * difference
        if step == -5:
            best, inverse = error, tried
        better = error < best
        best, inverse = select(better, error, best), select(better, tried, inverse)
    sum_xq = sum_qq = broadcast(ZERO)
    for i in range(n):
        v, weight = load(x, LANES * i), load(w, LANES * i)
        code = minimum(nearest(inverse * v), top)
        store(q, LANES * i, low_byte(code))
        sum_xq = sum_xq + weight * v * code
        sum_qq = sum_qq + weight * code * code
    for _ in range(5):
        changed = sum_qq < sum_qq
        for i in range(n):
            v, weight, code = load(x, LANES * i), load(w, LANES * i), load(q, LANES * i)
            rest_xq = sum_xq - weight * v * code
            rest_qq = sum_qq - weight * code * code
            tried = minimum(nearest(v * rest_qq / rest_xq), top)
            new_xq = rest_xq + weight * v * tried
            new_qq = rest_qq + weight * tried * tried
            better = (rest_xq > ZERO) & (rest_qq > ZERO) & (tried != code)
            better = better & (new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq)
            store(q, LANES * i, select(better, low_byte(tried), code))
            sum_xq, sum_qq = select(better, new_xq, sum_xq), select(better, new_qq, sum_qq)
            changed = changed | better
        if not any_lane(changed):
            break
    zero = high < EPSILON
    for i in range(n):
        store(q, LANES * i, select(zero, ZERO, load(q, LANES * i)))
    return select(zero | ~(sum_qq > ZERO), ZERO, sum_xq / sum_qq)
