"""Grouped GEMM over rows sorted by expert: one persistent skeleton, three epilogues.

    acc[row] = a[row] @ b[expert of row]^T          fp32

    store    c = acc
    swiglu   pre = [acc of the gate rows, acc of the up rows],  a' = silu(gate) * up            (two products, one tile)
    dswiglu  acc is da' = dy @ down;  dweights = <da', a'>,  wa = w * a',  dpre = d(silu(gate) * up) * w * da'

A row of `a` may be gathered while it is loaded (`top_k`: row r reads token row_to_slot[r] // top_k), so the T * top_k
rows of x or dy never exist in memory. FP8 leaves from the epilogue: swiglu quantizes a', dswiglu dpre, 1x128.

What the operands are, and so how they multiply (d is the dtype of `a`):

| a, b | product | used for |
|---|---|---|
| d, d | d x d | BF16 training |
| e4m3 1x128, e4m3 128x128 | acc = fma(partial over 128 of K, scale_a * scale_b, acc) | FP8 forward, FP8 dgrad |
| e4m3 per row, e4m3 per row of b | acc += partial over 128 of K; times both scales at the end | channel FP8 forward |
| d, e4m3 | d x narrow(e4m3 * scale), as `dequantize_fp8` gives it | BF16 dgrad on dequantized weights |

FP8 partial sums leave the matrix unit every 128 of K on every target, because Ada's and Hopper's keeps about 14 bits
(`Report.unbroken_k` reads it in compiled code). The order of K is that of memory, BLOCK_K follows from the dtypes alone
and no K is split: a row's bits depend neither on the other rows nor on the tile. `pre` and a' are rounded to d before
anything is computed from them, which makes the a' that backward recomputes from the saved `pre` the forward's, and
matches engines that store the activation in BF16.

Schedule: program p takes tiles p, p + grid, ... of the plan, columns innermost, so one expert's weights are read while
they are in cache. With `swap` the weights take the matrix unit's M side and the rows its N side, which may be 16: few
rows per expert do not leave the unit idle. `b` comes through a host tensor descriptor (TMA on sm90 and sm100) where
its strides allow one, otherwise through pointers.

Legend: R rows (routed slots), E experts, M N K of the product, I expert intermediate. Source: the epilogue scheme and
the router gradient from <da', a'> are SonicMoE's (Guo et al. 2025); 1x128 by 128x128 is DeepSeek-V3's, section 3.3.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ornith_moe.kernels.arithmetic import (
    bits_of,
    divide_by_scale,
    dot,
    e4m3_code,
    e4m3_value,
    float_of,
    narrow,
    scale_bits,
    stored_scale,
    widen,
)  # fmt: skip
from ornith_moe.kernels.launch import launch, target

GROUP = 128  # columns that share a scale
_GROUP = tl.constexpr(GROUP)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Weights:
    """[E, N, K] weights of one product, K contracted; FP8 comes with a scale per 128x128 block or per row.

    `value` may be any view whose last or second-last dimension is contiguous: a dgrad passes the transpose.
    scale: [E, N / 128, K / 128] (rounded up), or [E, N, 1] per row, or [E, 1, K] per row of a transposed weight.
    """

    value: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def transposed(self) -> "Weights":
        """The same weights as [E, K, N]."""
        return Weights(self.value.transpose(1, 2), None if self.scale is None else self.scale.transpose(1, 2))

    @property
    def per_row(self) -> bool:
        """A scale per row, in whichever direction the rows lie."""
        n, k = self.value.shape[1:]
        return self.scale is not None and tuple(self.scale.shape[1:]) in ((n, 1), (1, k))


@triton.jit
def _load_b(b, e, n, k, N, K, stride_be, stride_bn, stride_bk,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """b[e] at rows n, columns k, as [BLOCK_K, BLOCK_N]. TMA names the side a descriptor is contiguous in."""
    if TMA == "k":
        return b.load([e * N + n, k]).T
    elif TMA == "n":
        return b.load([e * K + k, n])
    else:
        offs_n, offs_k = n + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
        ptrs = b + e.to(tl.int64) * stride_be + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        if EVEN:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs_k < K)[:, None] & (offs_n < N)[None, :], other=0.0)


@triton.jit
def _multiply_add(a, b, acc, SWAP: tl.constexpr):
    if SWAP:
        return dot(b.T, a.T, acc)
    else:
        return dot(a, b, acc)


@triton.jit
def _scaled_add(partial, row_scale, acc, SWAP: tl.constexpr):
    """acc + partial * scale of its row, rounded once."""
    s = row_scale[None, :] if SWAP else row_scale[:, None]
    return tl.fma(partial, tl.broadcast_to(s, partial.shape), acc)


@triton.jit
def _promoted_add(partial, acc):
    """acc + partial, outside the matrix unit. Triton folds `acc += dot(a, b)` into dot(a, b, acc), but no fma."""
    return tl.fma(partial, tl.full(partial.shape, 1.0, tl.float32), acc)


@triton.jit
def _scale_of_rows(x, SHIFT: tl.constexpr):
    """fp32 [rows, 1] scales of the rows of fp32 `x`."""
    return float_of(scale_bits(tl.max(bits_of(x) & 0x7FFFFFFF, axis=1, keep_dims=True), SHIFT))


@triton.jit
def _store_scale(ptr, s, mask, SHIFT: tl.constexpr):
    tl.store(ptr, (bits_of(s) >> SHIFT).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_gemm_kernel(
    a, a_scale_ptr, b, b_scale_ptr, c_ptr, c_scale_ptr,
    pre_ptr, weights_ptr, wa_ptr, dweights_ptr, dpre_code_ptr, dpre_scale_ptr,
    row_to_slot_ptr, offsets_ptr, tile_to_expert_ptr, tile_to_row_ptr, num_tiles_ptr,
    N, N_B, K, n_first, second, stride_am, stride_sa, stride_be, stride_bn, stride_bk, stride_se, stride_sn, stride_sk,
    TOP_K: tl.constexpr, EPILOGUE: tl.constexpr, SCALES: tl.constexpr, QUANTIZE: tl.constexpr, SHIFT: tl.constexpr,
    SAVE: tl.constexpr, DPRE_FP8: tl.constexpr, PAIR: tl.constexpr, LATE: tl.constexpr,
    PLAN_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr, A_TMA: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid: any; programs share the tiles. One tile: BLOCK_M rows of one expert by BLOCK_N columns, written once.

    N columns from n_first on, of the N_B rows of b[e]. With PAIR a tile has a second half, whose weights lie `second`
    rows further: the up rows of swiglu (N is I, `second` too), or the next BLOCK_N columns of a wide store.
    """
    STEP_N: tl.constexpr = 2 * BLOCK_N if PAIR and EPILOGUE == "store" else BLOCK_N
    columns = tl.cdiv(N, STEP_N)
    HALVES: tl.constexpr = PLAN_M // BLOCK_M
    for i in tl.range(tl.program_id(0), tl.load(num_tiles_ptr) * HALVES * columns, tl.num_programs(0)):
        tile = i // (HALVES * columns)
        n = i % columns * STEP_N
        e = tl.load(tile_to_expert_ptr + tile)
        row = tl.load(tile_to_row_ptr + tile) + i // columns % HALVES * BLOCK_M
        if row < tl.load(offsets_ptr + e + 1):
            # Rows past the expert's last repeat it: loads need no mask, and what they give is not stored.
            offs_m = tl.minimum(row + tl.arange(0, BLOCK_M), tl.load(offsets_ptr + e + 1) - 1)
            source = tl.load(row_to_slot_ptr + offs_m) // TOP_K if TOP_K else offs_m
            if WIDE:
                source = source.to(tl.int64)
            offs_k = tl.arange(0, BLOCK_K)
            a_offs = source[:, None] * stride_am + offs_k[None, :]
            nb = n_first + n
            sb_ptr = b_scale_ptr + e * stride_se if SCALES is not None else b_scale_ptr

            shape: tl.constexpr = [BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N]
            acc = tl.zeros(shape, tl.float32)
            if PAIR:
                up = tl.zeros(shape, tl.float32)
            if LATE:
                partial, partial_scale = tl.zeros(shape, tl.float32), tl.zeros([BLOCK_M], tl.float32)
            for k in range(0, K, BLOCK_K):
                if A_TMA:
                    tile_a = a.load([row, k])
                elif EVEN:
                    tile_a = tl.load(a + k + a_offs)
                else:
                    tile_a = tl.load(a + k + a_offs, mask=(k + offs_k < K)[None, :], other=0.0)
                tile_b = _load_b(b, e, nb, k, N_B, K, stride_be, stride_bn, stride_bk, BLOCK_N, BLOCK_K, EVEN, TMA)
                if PAIR:
                    tile_up = _load_b(
                        b, e, nb + second, k, N_B, K, stride_be, stride_bn, stride_bk, BLOCK_N, BLOCK_K, EVEN, TMA
                    )
                if SCALES == "block":
                    row_scale = stored_scale(tl.load(a_scale_ptr + source * stride_sa + k // _GROUP))
                    scale = row_scale * stored_scale(
                        tl.load(sb_ptr + nb // _GROUP * stride_sn + k // _GROUP * stride_sk)
                    )
                    if PAIR:
                        scale_up = row_scale * stored_scale(
                            tl.load(sb_ptr + (nb + second) // _GROUP * stride_sn + k // _GROUP * stride_sk)
                        )
                    if LATE:  # a partial sum is added while the next product runs; the order of the sums is the same
                        partial_gate = _multiply_add(tile_a, tile_b, None, SWAP)
                        up = _scaled_add(partial, partial_scale, up, SWAP)
                        partial = _multiply_add(tile_a, tile_up, None, SWAP)
                        acc = _scaled_add(partial_gate, scale, acc, SWAP)
                        partial_scale = scale_up
                    else:
                        acc = _scaled_add(_multiply_add(tile_a, tile_b, None, SWAP), scale, acc, SWAP)
                        if PAIR:
                            up = _scaled_add(_multiply_add(tile_a, tile_up, None, SWAP), scale_up, up, SWAP)
                elif SCALES == "channel":
                    acc = _promoted_add(_multiply_add(tile_a, tile_b, None, SWAP), acc)
                    if PAIR:
                        up = _promoted_add(_multiply_add(tile_a, tile_up, None, SWAP), up)
                else:
                    if SCALES == "dequantize block":
                        sb = stored_scale(tl.load(sb_ptr + nb // _GROUP * stride_sn + k // _GROUP * stride_sk))
                        tile_b = narrow(widen(tile_b) * sb, tile_a.dtype)
                        if PAIR:
                            sb = tl.load(sb_ptr + (nb + second) // _GROUP * stride_sn + k // _GROUP * stride_sk)
                            tile_up = narrow(widen(tile_up) * stored_scale(sb), tile_a.dtype)
                    elif SCALES == "dequantize channel":
                        sb = stored_scale(tl.load(sb_ptr + (k + offs_k) * stride_sk, mask=k + offs_k < K, other=0.0))
                        tile_b = narrow(widen(tile_b) * sb[:, None], tile_a.dtype)
                        if PAIR:
                            tile_up = narrow(widen(tile_up) * sb[:, None], tile_a.dtype)
                    acc = _multiply_add(tile_a, tile_b, acc, SWAP)
                    if PAIR:
                        up = _multiply_add(tile_a, tile_up, up, SWAP)

            if LATE:
                up = _scaled_add(partial, partial_scale, up, SWAP)
            if SWAP:
                acc = acc.T
                if PAIR:
                    up = up.T
            # From here on offsets are relative to the tile's first row and column, in 32 bits.
            # They are clipped, and so read from the plan: the compiler does not hold them through the K loop.
            m = (offs_m - row)[:, None]
            offs_n = tl.arange(0, BLOCK_N)[None, :]
            rows_left = tl.load(offsets_ptr + e + 1) - row
            mask_m = tl.arange(0, BLOCK_M)[:, None] < rows_left
            mask = mask_m if EVEN else mask_m & (n + offs_n < N)
            if SCALES == "channel":
                source_m = row + m
                if TOP_K:
                    source_m = tl.load(row_to_slot_ptr + source_m) // TOP_K
                row_scale = tl.load(a_scale_ptr + source_m * stride_sa)
                inside = n + offs_n < N
                acc *= row_scale * stored_scale(tl.load(sb_ptr + (nb + offs_n) * stride_sn, mask=inside, other=0.0))
                if PAIR:
                    up_inside = n + offs_n < N if EPILOGUE == "swiglu" else n + BLOCK_N + offs_n < N
                    up *= row_scale * stored_scale(
                        tl.load(sb_ptr + (nb + second + offs_n) * stride_sn, mask=up_inside, other=0.0)
                    )
            first = row.to(tl.int64) * N + n
            groups = tl.cdiv(N, _GROUP)
            scale_first = row.to(tl.int64) * groups + n // _GROUP
            if EPILOGUE == "store":
                tl.store(c_ptr + first + (m * N + offs_n), narrow(acc, c_ptr.dtype.element_ty), mask=mask)
                if PAIR:
                    if not EVEN:
                        mask = mask_m & (n + BLOCK_N + offs_n < N)
                    up_offs = m * N + BLOCK_N + offs_n
                    tl.store(c_ptr + first + up_offs, narrow(up, c_ptr.dtype.element_ty), mask=mask)
            else:
                dtype: tl.constexpr = pre_ptr.dtype.element_ty
                gate_ptr = pre_ptr + first + row.to(tl.int64) * N
                offs_2n = m * (2 * N) + offs_n
            if EPILOGUE == "swiglu":
                gate, up = narrow(acc, dtype), narrow(up, dtype)
                if SAVE:
                    tl.store(gate_ptr + offs_2n, gate, mask=mask)
                    tl.store(gate_ptr + N + offs_2n, up, mask=mask)
                gate = widen(gate)
                out = narrow(gate / (1.0 + tl.exp(-gate)) * widen(up), dtype)
                if QUANTIZE == "group":
                    s = _scale_of_rows(tl.where(mask, widen(out), 0.0), SHIFT)
                    _store_scale(c_scale_ptr + scale_first + m * groups, s, mask_m, SHIFT)
                    tl.store(c_ptr + first + (m * N + offs_n), e4m3_code(divide_by_scale(widen(out), s)), mask=mask)
                else:
                    tl.store(c_ptr + first + (m * N + offs_n), out, mask=mask)
            if EPILOGUE == "dswiglu":
                gate = widen(tl.load(gate_ptr + offs_2n, mask=mask, other=0.0))
                up = widen(tl.load(gate_ptr + N + offs_2n, mask=mask, other=0.0))
                weight = tl.load(weights_ptr + tl.load(row_to_slot_ptr + row + m))
                out = widen(narrow(gate / (1.0 + tl.exp(-gate)) * up, dtype))  # written as in swiglu, for the same bits
                if QUANTIZE is not None:
                    if QUANTIZE == "group":
                        s = _scale_of_rows(out, SHIFT)
                    else:
                        s = tl.load(c_scale_ptr + row + m, mask=mask_m, other=1.0)
                    out = widen(narrow(e4m3_value(e4m3_code(divide_by_scale(out, s))) * s, dtype))
                if SAVE:
                    tl.store(wa_ptr + first + (m * N + offs_n), narrow(out * weight, dtype), mask=mask)
                # da' of a row past the last is another row's: it only reaches values that the masks drop.
                acc = tl.where(mask, acc, 0.0)
                tl.store(dweights_ptr + (row.to(tl.int64) + m) * columns + n // BLOCK_N,
                         tl.sum(acc * out, axis=1, keep_dims=True), mask=mask_m)  # fmt: skip
                acc *= weight
                # gate and up are read twice, from L1 the second time: kept in registers, sm90 and sm100 spill.
                gate = widen(tl.load(gate_ptr + offs_2n, mask=mask, other=0.0))
                sigmoid = 1.0 / (1.0 + tl.exp(-gate))
                silu = gate * sigmoid
                dup = narrow(acc * silu, dtype)
                up = widen(tl.load(gate_ptr + N + offs_2n, mask=mask, other=0.0))
                dgate = narrow(acc * up * (sigmoid + silu * (1.0 - sigmoid)), dtype)
                dpre_ptr = c_ptr + first + row.to(tl.int64) * N
                tl.store(dpre_ptr + offs_2n, dgate, mask=mask)
                tl.store(dpre_ptr + N + offs_2n, dup, mask=mask)
                if DPRE_FP8:
                    code_ptr = dpre_code_ptr + first + row.to(tl.int64) * N
                    scale_ptr = dpre_scale_ptr + scale_first + row.to(tl.int64) * groups + m * (2 * groups)
                    s = _scale_of_rows(widen(dgate), SHIFT)
                    _store_scale(scale_ptr, s, mask_m, SHIFT)
                    tl.store(code_ptr + offs_2n, e4m3_code(divide_by_scale(widen(dgate), s)), mask=mask)
                    s = _scale_of_rows(widen(dup), SHIFT)
                    _store_scale(scale_ptr + groups, s, mask_m, SHIFT)
                    tl.store(code_ptr + N + offs_2n, e4m3_code(divide_by_scale(widen(dup), s)), mask=mask)


def gate_up(x, x_scale, weights, plan, tile, *, save, quantize=None, ue8m0=False, dtype=None):
    """a' = silu(x @ gate^T) * (x @ up^T) for every routed row of x.

    Args:
        x: [T, H] in d or e4m3, `x_scale` [T, H / 128] or [T, 1] with it, else None.
        weights: Weights [E, 2I, H], gate rows first.
        plan, tile: what to compute and how.
        save: also give `pre` [R, 2I] in d.
        quantize: "group" gives a' in e4m3 with scales 1x128, UE8M0 ones with `ue8m0`; None gives it in d.
        dtype: d; that of x unless x is e4m3.
    Returns:
        a' [R, I], its scale [R, I / 128] or None, pre [R, 2I] or None. R counts all slots; the
        rows past the routed ones are not written.
    """
    rows, inner = plan.row_to_slot.numel(), weights.value.shape[1] // 2
    dtype = dtype or x.dtype
    pre = x.new_empty(rows if save else 0, 2 * inner, dtype=dtype)
    a = x.new_empty(rows, inner, dtype=torch.uint8 if quantize else dtype)
    scale = _new_scale(a, inner, ue8m0) if quantize else None
    _start("gate_up", x, x_scale, weights, plan, tile, inner, 0, gather=True, epilogue="swiglu", c=a, c_scale=scale,
           pre=pre, save=save, quantize=quantize)  # fmt: skip
    return a.view(FP8) if quantize else a, _as_scale(scale), pre if save else None


def project(product, a, a_scale, weights, plan, tile, first, out):
    """out = a @ weights[first : first + width]^T for every routed row; a [R, K], weights [E, N, K], out [R, width]."""
    _start(product, a, a_scale, weights, plan, tile, out.shape[1], first, gather=False, epilogue="store", c=out)
    return out


def dswiglu(dy, dy_scale, weights, pre, routing_weights, plan, tile, *, save_wa, quantize=None, a_scale=None,
            dpre_fp8=False, ue8m0=False):  # fmt: skip
    """Backward of w * down(silu(gate) * up) up to the pre-activation.

    Args:
        dy: [T, H] in d or e4m3 with `dy_scale`.
        weights: Weights [E, I, H], the transposed down projection.
        pre: [R, 2I] as `gate_up` saved it. routing_weights: [T * top_k] fp32.
        save_wa: also give wa = w * a'.
        quantize: how the forward quantized a': None, "group", or "row" with its `a_scale` [R]; then a' stands for the
            dequantized values, and the cast passes gradients through.
        dpre_fp8: also give dpre in e4m3, 1x128.
    Returns:
        dpre [R, 2I], wa [R, I] or None, partial dweights [R, tiles] to be summed, dpre in e4m3 and its scale, or None.
    """
    rows, inner = pre.shape[0], pre.shape[1] // 2
    dpre = torch.empty_like(pre)
    wa = pre.new_empty(rows if save_wa else 0, inner)
    partial = pre.new_empty(rows, triton.cdiv(inner, tile.block_n), dtype=torch.float32)
    code = pre.new_empty(rows, 2 * inner, dtype=torch.uint8) if dpre_fp8 else None
    code_scale = _new_scale(code, 2 * inner, ue8m0) if dpre_fp8 else None
    _start("dswiglu", dy, dy_scale, weights, plan, tile, inner, 0, gather=True, epilogue="dswiglu", c=dpre,
           c_scale=a_scale, pre=pre, weights_of_slots=routing_weights, wa=wa, dweights=partial, save=save_wa,
           quantize=quantize, dpre_code=code, dpre_scale=code_scale, ue8m0=ue8m0)  # fmt: skip
    return dpre, wa if save_wa else None, partial, code.view(FP8) if dpre_fp8 else None, _as_scale(code_scale)


def _new_scale(rows, columns, ue8m0):
    """Memory for a scale per row and 128 columns, in the integers that carry its bits."""
    return rows.new_empty(rows.shape[0], triton.cdiv(columns, GROUP), dtype=torch.uint8 if ue8m0 else torch.int32)


def _as_scale(scale):
    if scale is None:
        return None
    return scale.view(torch.float8_e8m0fnu if scale.dtype == torch.uint8 else torch.float32)


def block_k(a_dtype, b_dtype):
    """Columns of K per step, from the dtypes alone: it is part of the numerics."""
    return 128 if a_dtype == b_dtype == FP8 else 64 if a_dtype.itemsize < 4 else 32


def _start(product, a, a_scale, weights, plan, tile, columns, first, *, gather, epilogue, c, c_scale=None, pre=None,
           weights_of_slots=None, wa=None, dweights=None, save=False, quantize=None, dpre_code=None, dpre_scale=None,
           ue8m0=None):  # fmt: skip
    """One grouped GEMM over `columns` rows of each expert's weights from `first` on."""
    b, b_scale = weights.value, weights.scale
    (experts, rows_b, k), fp8_a = b.shape, a.dtype == FP8
    scales = None
    if b_scale is not None:
        scales = ("" if fp8_a else "dequantize ") + ("channel" if weights.per_row else "block")
        if scales == "dequantize channel" and b_scale.shape[2] != k:
            raise AssertionError(f"{product}: weights are dequantized by a scale per column of K, got {b_scale.shape}")
    step, block_m = block_k(a.dtype, b.dtype), min(tile.block_m or plan.block_m, plan.block_m)
    block_n = min(tile.block_n, triton.next_power_of_2(columns))
    quantizes = quantize or dpre_code is not None
    if quantizes and tile.block_n != GROUP:
        raise AssertionError(f"{product}: an epilogue that quantizes owns {GROUP} columns, the tile has {tile.block_n}")
    block_n = GROUP if quantizes else max(block_n, 16)
    pair = epilogue == "swiglu" or (epilogue == "store" and tile.pair and columns >= 2 * block_n)
    width = 2 * block_n if pair and epilogue == "store" else block_n
    even = k % step == 0 and columns % width == 0
    # Without TMA a descriptor becomes pointers whose masks take four times the instructions of the product.
    tma = _contiguous_side(b, step) if target(a.device).tma else None
    if tma == "k":
        operand = TensorDescriptor(b, [experts * rows_b, k], [b.stride(1), 1], [block_n, step])
    elif tma == "n":
        operand = TensorDescriptor(b, [experts * k, rows_b], [b.stride(2), 1], [step, block_n])
    else:
        operand = b
    # Rows in the order of the plan are a matrix; a tile that reaches past its expert reads rows that it does not store.
    a_tma = tma is not None and not gather and len(a) > 0 and a.stride(1) == 1
    a_tma = a_tma and a.stride(0) * a.element_size() % 16 == 0
    rows = TensorDescriptor(a, list(a.shape), [a.stride(0), 1], [block_m, step]) if a_tma else a
    scale_out = dpre_scale if dpre_scale is not None else c_scale
    shift = 23 if scale_out is not None and scale_out.dtype == torch.uint8 else 0
    processors = target(a.device).processors * max(1, 8 // tile.num_warps)
    grid = min(processors, plan.tile_to_expert.numel() * triton.cdiv(columns, width))
    kind = "fp8" if fp8_a else "fp8 weights" if b.dtype == FP8 else {2: "bf16", 4: "fp32"}[a.element_size()]
    launch(
        f"{product} {kind}", grouped_gemm_kernel, (grid,),
        rows, _bits(a_scale), operand, _bits(b_scale), c, c_scale,
        pre, weights_of_slots, wa, dweights, dpre_code, dpre_scale,
        plan.row_to_slot, plan.offsets, plan.tile_to_expert, plan.tile_to_row, plan.num_tiles,
        columns, rows_b, k, first, columns if epilogue == "swiglu" else block_n,
        a.stride(0), 0 if a_scale is None else a_scale.stride(0), *b.stride(),
        *((0, 0, 0) if b_scale is None else b_scale.stride()),
        TOP_K=plan.top_k if gather else 0, EPILOGUE=epilogue, SCALES=scales, QUANTIZE=quantize, SHIFT=shift,
        SAVE=save, DPRE_FP8=dpre_code is not None, PAIR=pair, LATE=tile.late and pair and scales == "block",
        PLAN_M=plan.block_m, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=step, SWAP=tile.swap,
        EVEN=even, TMA=tma, A_TMA=a_tma, WIDE=a.numel() >= 2**31,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _contiguous_side(b, step):
    """ "k" or "n" where a descriptor can load [E, N, K] weights whole, None where pointers must."""
    aligned = b.data_ptr() % 16 == 0
    if b.stride(2) == 1 and b.stride(0) == b.shape[1] * b.stride(1):
        return "k" if aligned and b.stride(1) * b.element_size() % 16 == 0 else None
    # A tile that leaves the K of its expert would multiply the next one's weights, NaN included, by zero.
    if b.stride(1) == 1 and b.stride(0) == b.shape[2] * b.stride(2) and b.shape[2] % step == 0:
        return "n" if aligned and b.stride(2) * b.element_size() % 16 == 0 else None
    return None


def _bits(scale):
    """UE8M0 as bytes: Triton has no such type."""
    return scale.view(torch.uint8) if scale is not None and scale.dtype == torch.float8_e8m0fnu else scale
