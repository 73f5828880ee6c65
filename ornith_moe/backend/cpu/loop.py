"""The five steps of the routed experts as a loop over experts in torch: any dtype, and torch.mm's own speed.

For float16 and float64, and for machines whose torch.mm multiplies BF16 much faster than `register_tiles` can (AMX).
The steps are those of `native`, with the same arguments and results; there stands what they compute.

Precision: products in d by torch.mm; activation, weighting and the sums over slots in float32, float64 for float64.
Letters: T tokens, E experts, H hidden, I expert intermediate, R slots, m rows of one expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ornith_moe.backend.cpu import memory
from ornith_moe.backend.cpu.routed import RoutedRows
from ornith_moe.backend.cpu.rows import scale_block
from ornith_moe.quant.fp8 import dequantize_fp8
from ornith_moe.quant.operand import Operand


def gate_up(x: torch.Tensor, rows: RoutedRows, weight: Operand, save: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape = (rows.slots, weight.value.shape[1])
    pre = x.new_empty(shape) if save else None
    a = x.new_empty(shape[0], shape[1] // 2)
    for e, first, last in rows.groups():
        out = x[rows.tokens_of(first, last)] @ _expert(weight, e, x.dtype).T
        if pre is not None:
            pre[first:last] = out
        gate, up = _wide(out).chunk(2, -1)
        a[first:last] = F.silu(gate) * up
    return a, pre


def down(a: torch.Tensor, rows: RoutedRows, weights: torch.Tensor, weight: Operand) -> torch.Tensor:
    y = _wide(a.new_zeros(rows.tokens, weight.value.shape[1]))
    for e, first, last in rows.groups():
        factor = weights.reshape(-1)[rows.slots_of(first, last)].to(y.dtype)[:, None]
        out = _wide(a[first:last] @ _expert(weight, e, a.dtype).T)
        _add_rows(y, rows.tokens_of(first, last), out * factor)
    return y.to(a.dtype)


def activation_gradient(
    dy: torch.Tensor,
    rows: RoutedRows,
    weights: torch.Tensor,
    weight: Operand,
    pre: torch.Tensor,
    a_given: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    needs_dweights, needs_wa, needs_dpre = needs
    slot_weights = _wide(weights.reshape(-1))
    dweights = dy.new_zeros(rows.slots, dtype=torch.float32) if needs_dweights else None
    wa = dy.new_empty(rows.slots, pre.shape[1] // 2) if needs_wa else None
    dpre = torch.empty_like(pre) if needs_dpre else None
    for e, first, last in rows.groups():
        slots = rows.slots_of(first, last)
        gate, up = _wide(pre[first:last]).chunk(2, -1)
        factor = slot_weights[slots].to(gate.dtype)[:, None]
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        a = _wide((silu * up).to(dy.dtype) if a_given is None else a_given[first:last])
        if wa is not None:
            wa[first:last] = a * factor
        if needs_dweights or needs_dpre:
            da = _wide(dy[rows.tokens_of(first, last)] @ _expert(weight, e, dy.dtype))
        if dweights is not None:
            dweights[slots] = (da * a).sum(-1).float()
        if dpre is not None:
            da *= factor
            dpre[first:last] = torch.cat((da * up * (sigmoid + silu * (1 - sigmoid)), da * silu), -1)
    return None if dweights is None else dweights.view(weights.shape), wa, dpre


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    gathered: tuple[bool, bool],
    rows: RoutedRows,
    shape: torch.Size,
    dtype: torch.dtype,
) -> torch.Tensor:
    gradient = memory.weight_gradient(shape, dtype, rows.active.tolist())
    for e, first, last in rows.groups():
        chosen = [rows.tokens_of(first, last) if gather else slice(first, last) for gather in gathered]
        gradient[e] = left[chosen[0]].T @ right[chosen[1]]
    return gradient


def input_gradient(dpre: torch.Tensor, rows: RoutedRows, weight: Operand) -> torch.Tensor:
    dx = _wide(dpre.new_zeros(rows.tokens, weight.value.shape[2]))
    for e, first, last in rows.groups():
        _add_rows(dx, rows.tokens_of(first, last), _wide(dpre[first:last] @ _expert(weight, e, dpre.dtype)))
    return dx.to(dpre.dtype)


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _expert(weight: Operand, e: int, dtype: torch.dtype) -> torch.Tensor:
    if weight.scale is None:
        return weight.value[e].to(dtype)
    value, scale = weight.value[e], weight.scale[e]
    return dequantize_fp8(value, scale, block=scale_block(value.shape, scale.shape), dtype=torch.float32).to(dtype)


def _add_rows(total: torch.Tensor, tokens: torch.Tensor, values: torch.Tensor) -> None:
    """total[tokens[i]] += values[i], i in order; a token may choose an expert twice."""
    if len(tokens.unique()) == len(tokens):
        total[tokens] += values
    else:
        for token, value in zip(tokens.tolist(), values, strict=True):
            total[token] += value
