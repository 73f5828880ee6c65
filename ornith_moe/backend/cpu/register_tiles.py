"""Register tiles of a matrix product, written in LLVM's vector language for numba functions.

    dot_tile     C[i, j] = <A[i, :], B[j, :]>           both operands with the contraction contiguous: x @ w^T
    outer_tile   C[i, :] = sum over k of A[i, k] * B[k, :]     one broadcast, one row: dy @ w, and dy^T @ x

numba has no vectors and no registers to speak of; a tile has 16 to 24 sums in them for the length of K. Each tile is
therefore an intrinsic whose LLVM code is written by the loops below, for the vector width of the processor it runs on.

A tile works on 32-bit *words*: a word is one float32, or two BF16 that are neighbours along K, low half first. What a
word is worth is the `kind`:

    FP32        acc += a * b                                  fused multiply-add
    BF16_DOT    acc += a.lo * b.lo + a.hi * b.hi              AVX-512's vdpbf16ps: half the instructions
    BF16_WIDE   the same as two fused multiply-adds on halves widened by a shift, for any processor

A sum is split over the lanes of a vector (dot_tile) or kept in one lane (outer_tile); its order depends on K and kind
alone, not on which rows share a tile. So a row of a product has the same bits whatever else is in the batch.

Every address is an integer. `rows` is the address of an array of addresses, so rows are gathered while they are loaded.
Sources: Goto and van de Geijn 2008 (tiles in registers); the AVX-512 BF16 instructions of Intel and AMD.
"""

from __future__ import annotations

from functools import reduce
from itertools import product

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ornith_moe.quant.simd.emit import F32, I8, I16, I32, I64, bf16_bits, broadcast, call, constant, shuffle

FP32, BF16_DOT, BF16_WIDE = range(3)
try:
    FEATURES = dict(llvm.get_host_cpu_features())
except RuntimeError:  # LLVM cannot tell on every platform
    FEATURES = {}
HAS_BF16_DOT = bool(FEATURES.get("avx512bf16"))
_KINDS = (FP32, BF16_DOT, BF16_WIDE) if HAS_BF16_DOT else (FP32, BF16_WIDE)
_ARM = not any(name.startswith(("sse", "avx")) for name, has in FEATURES.items() if has)
_HAS_FMA = bool(FEATURES.get("fma")) or _ARM
# lanes of a vector, rows of a dot tile, vectors of an outer tile: 32 registers, or AVX2's 16, or 32 short ones of NEON
LANES, DOT_ROWS, _VECTORS = (16, 4, 4) if FEATURES.get("avx512f") else (4, 4, 4) if _ARM else (8, 3, 2)
DOT_COLUMNS = 4
OUTER_ROWS = 6
STREAMS = (4, 2, 1)
STORE, ADD, BF16 = range(3)
PANEL = _VECTORS * LANES  # words of one row of a packed panel
VECTOR_BYTES = 4 * LANES


class _BFloat(ir.Type):
    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


_FLOATS, _WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_HALVES = ir.VectorType(_BFloat(), 2 * LANES)
_ZERO = constant(_FLOATS, 0.0)


def _at(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder, address, kind):
    return builder.load(_at(builder, address, kind), align=4)


def _row(builder, rows, index):
    return builder.load(_at(builder, builder.add(rows, I64(8 * index)), I64))


def _fma(builder, a, b, total):
    if not _HAS_FMA:  # a call into the C library otherwise
        return builder.fadd(builder.fmul(a, b), total)
    return call(builder, f"llvm.fma.v{LANES}f32", _FLOATS, [a, b, total])


def _halves(builder, words):
    low = builder.shl(words, constant(_WORDS, 16))
    high = builder.and_(words, constant(_WORDS, 0xFFFF0000))
    return builder.bitcast(low, _FLOATS), builder.bitcast(high, _FLOATS)


def _operand(builder, kind, words):
    """Words as `_multiply_add` wants them; done once per load, not once per product."""
    if kind == FP32:
        return builder.bitcast(words, _FLOATS)
    if kind == BF16_DOT:
        return builder.bitcast(words, _HALVES)
    return _halves(builder, words)


def _multiply_add(builder, kind, a, b, total):
    if kind == FP32:
        return _fma(builder, a, b, total)
    if kind == BF16_DOT:
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, [total, a, b])
    return _fma(builder, a[1], b[1], _fma(builder, a[0], b[0], total))


def _loop(builder, sums, bound, step):
    """Open a loop over k = 0, step, ... < bound; returns k, the sums, and a function that closes it."""
    entry, body, done = builder.block, builder.append_basic_block("k"), builder.append_basic_block("done")
    builder.branch(body)
    builder.position_at_end(body)
    k = builder.phi(I64)
    k.add_incoming(I64(0), entry)
    totals = [builder.phi(_FLOATS) for _ in range(sums)]
    for total in totals:
        total.add_incoming(_ZERO, entry)

    def close(new):
        following = builder.add(k, I64(step))
        k.add_incoming(following, body)
        for total, value in zip(totals, new, strict=True):
            total.add_incoming(value, body)
        builder.cbranch(builder.icmp_signed("<", following, bound), body, done)
        builder.position_at_end(done)

    return k, totals, close


def _sum_lanes(builder, vectors):
    """<4 x float>: the sums of the lanes of four vectors, by halves, so that no order depends on the others."""
    segment = LANES
    while len(vectors) > 1:
        half = segment // 2
        low = [start + i for start in range(0, LANES, segment) for i in range(half)]
        both = [low + [LANES + i for i in low], [i + half for i in low] + [LANES + i + half for i in low]]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(*(shuffle(builder, u, v, order) for order in both)) for u, v in pairs]
        segment = half
    (vector,) = vectors
    while segment > 1:
        segment //= 2
        vector = builder.fadd(vector, shuffle(builder, vector, vector, [i ^ segment for i in range(LANES)]))
    return shuffle(builder, vector, vector, [i * LANES // DOT_COLUMNS for i in range(DOT_COLUMNS)])


def _dot(builder, kind, rows, streams, arguments):
    a_rows, b_rows, k_bytes, ahead, c_rows, c_offset, factors, add = arguments
    a = [_row(builder, a_rows, i) for i in range(rows)]
    b = [_row(builder, b_rows, j) for j in range(DOT_COLUMNS)]
    k, sums, close = _loop(builder, rows * DOT_COLUMNS, k_bytes, VECTOR_BYTES)
    for stream in range(streams):
        address = builder.add(builder.add(ahead, builder.mul(k, I64(streams))), I64(VECTOR_BYTES * stream))
        _prefetch(builder, address)
    left = [_operand(builder, kind, _load(builder, builder.add(row, k), _WORDS)) for row in a]
    new = list(sums)
    for j, row in enumerate(b):
        right = _operand(builder, kind, _load(builder, builder.add(row, k), _WORDS))
        for i in range(rows):
            new[i * DOT_COLUMNS + j] = _multiply_add(builder, kind, left[i], right, sums[i * DOT_COLUMNS + j])
    close(new)
    for i in range(rows):
        result = _sum_lanes(builder, new[i * DOT_COLUMNS : (i + 1) * DOT_COLUMNS])
        factor = _load(builder, builder.add(factors, I64(4 * i)), F32)
        result = builder.fmul(result, broadcast(builder, factor, DOT_COLUMNS))
        _put(builder, result, builder.add(_row(builder, c_rows, i), c_offset), add)


def _outer(builder, kind, rows, arguments):
    a_rows, a_step, panel, words, c_rows, c_offset, store = arguments
    a = [_row(builder, a_rows, i) for i in range(rows)]
    k, sums, close = _loop(builder, rows * _VECTORS, words, 1)
    base = builder.add(panel, builder.mul(k, I64(4 * PANEL)))
    right = [
        _operand(builder, kind, _load(builder, builder.add(base, I64(VECTOR_BYTES * v)), _WORDS))
        for v in range(_VECTORS)
    ]
    offset, new = builder.mul(k, a_step), list(sums)
    for i, row in enumerate(a):
        left = _operand(builder, kind, broadcast(builder, _load(builder, builder.add(row, offset), I32), LANES))
        for v in range(_VECTORS):
            new[i * _VECTORS + v] = _multiply_add(builder, kind, left, right[v], sums[i * _VECTORS + v])
    close(new)
    starts = [builder.add(_row(builder, c_rows, i), c_offset) for i in range(rows)]

    def write(how):
        for index, value in enumerate(new):
            i, v = divmod(index, _VECTORS)
            if how == BF16:
                value = bf16_bits(builder, value)
            place = builder.add(starts[i], I64((2 if how == BF16 else 4) * LANES * v))
            place = _at(builder, place, value.type)
            if how == ADD:
                value = builder.fadd(builder.load(place, align=4), value)
            builder.store(value, place, align=2)

    _choose(builder, [(STORE,), (ADD,), (BF16,)], [store], write)


def _prefetch(builder, address):
    """To read, into the second level of cache: the first is for this tile, and was 3 % to 40 % slower."""
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [_at(builder, address, I8), I32(0), I32(2), I32(1)])


def _put(builder, value, address, add):
    place = _at(builder, address, value.type)
    with builder.if_else(add) as (then, otherwise):
        with then:
            builder.store(builder.fadd(builder.load(place, align=4), value), place, align=4)
        with otherwise:
            builder.store(value, place, align=4)


def _choose(builder, choices, selectors, emit):
    """One block per choice, entered where the selectors have its values."""
    end = builder.append_basic_block("end")
    for choice in choices:
        body, following = builder.append_basic_block("case"), builder.append_basic_block("next")
        equal = [builder.icmp_signed("==", s, I64(value)) for s, value in zip(selectors, choice, strict=True)]
        builder.cbranch(reduce(builder.and_, equal), body, following)
        builder.position_at_end(body)
        emit(*choice)
        builder.branch(end)
        builder.position_at_end(following)
    builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def dot_tile(context, kind, rows, streams, a_rows, b_rows, k_bytes, ahead, c_rows, c_offset, factors, add):
    """C[i][c_offset ...] (+)= factors[i] * <A[i], B[j]>: rows <= DOT_ROWS times DOT_COLUMNS; added where `add` is set.

    k_bytes is a multiple of VECTOR_BYTES. `streams` cache lines per vector are fetched from `ahead` on for later tiles:
    DOT_COLUMNS where this is the only tile to use B, else fewer, so that memory is asked evenly.
    """

    def generate(context, builder, signature, arguments):
        choices = [choice for choice in product(_KINDS, range(1, DOT_ROWS + 1), STREAMS)]
        _choose(builder, choices, arguments[:3], lambda *choice: _dot(builder, *choice, arguments[3:]))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 10, types.boolean), generate


@intrinsic
def outer_tile(context, kind, rows, a_rows, a_step, panel, words, c_rows, c_offset, store):
    """C[i][c_offset ...] = sum over k of A[i, k] * B[k, :]: rows <= OUTER_ROWS times PANEL.

    `store`: STORE or ADD float32, or round to BF16.

    Word k of row i of A lies at a_rows[i] + k * a_step, row k of B at panel + k * 4 * PANEL.
    """

    def generate(context, builder, signature, arguments):
        choices = list(product(_KINDS, range(1, OUTER_ROWS + 1)))
        _choose(builder, choices, arguments[:2], lambda *choice: _outer(builder, *choice, arguments[2:]))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), generate


@intrinsic
def narrow_row(context, source, place):
    """PANEL float32 rounded to BF16."""

    def generate(context, builder, signature, arguments):
        source, place = arguments
        for v in range(_VECTORS):
            value = bf16_bits(builder, _load(builder, builder.add(source, I64(VECTOR_BYTES * v)), _FLOATS))
            builder.store(value, _at(builder, builder.add(place, I64(2 * LANES * v)), value.type), align=2)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def fetch(context, address, lines):
    """Ask for some cache lines that a later step will read."""

    def generate(context, builder, signature, arguments):
        for line in range(4 * PANEL // 64):
            with builder.if_then(builder.icmp_signed(">", arguments[1], I64(line))):
                _prefetch(builder, builder.add(arguments[0], I64(64 * line)))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def pack_row(context, kind, low, high, place):
    """PANEL words from a row of float32 at `low`, or from two rows of BF16."""

    def generate(context, builder, signature, arguments):
        kind, low, high, place = arguments
        shorts, shift = ir.VectorType(I16, LANES), constant(_WORDS, 16)

        def words(address):
            return builder.zext(builder.load(_at(builder, address, shorts), align=2), _WORDS)

        with builder.if_else(builder.icmp_signed("==", kind, I64(FP32))) as (single, pair):
            with single:
                for step in (I64(VECTOR_BYTES * v) for v in range(_VECTORS)):
                    value = _load(builder, builder.add(low, step), _WORDS)
                    builder.store(value, _at(builder, builder.add(place, step), _WORDS), align=4)
            with pair:
                for v in range(_VECTORS):
                    first, second = (words(builder.add(a, I64(2 * LANES * v))) for a in (low, high))
                    value = builder.or_(first, builder.shl(second, shift))
                    builder.store(value, _at(builder, builder.add(place, I64(VECTOR_BYTES * v)), _WORDS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def take(context, counter):
    """The next number of an int64 counter at this address, to be had once among all threads."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _at(builder, arguments[0], I64), I64(1), "monotonic")

    return types.intp(types.intp), generate


@intrinsic
def pointer(context, address):
    """An address as numba's `carray` wants it."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.intp), generate
