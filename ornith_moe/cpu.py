"""The routed-experts MLP on a CPU, forward and a hand-written backward: a loop over experts.

    pre = x*[token] @ gate_up*[e]^T    a = silu(gate) * up    y[t] = sum_k weights[t, k] * (a* @ down*[e]^T)

A star is a number dequantized from FP8, or with recipe `bf16` the number itself; `ornith_moe.reference` has the table.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ornith_moe.quant.fp8 import dequantize_fp8, roundtrip_fp8_tokens


class Weights(NamedTuple):
    """[E, N, K] in a float dtype, or e4m3 with scales [E, ceil(N / 128), ceil(K / 128)] or [E, N, 1]."""

    value: torch.Tensor
    scale: torch.Tensor | None = None


class Saved(NamedTuple):
    """pre [T * top_k, 2I], rows sorted by expert; row_to_slot [T * top_k] int32, -1 unused; offsets [E + 1] int32."""

    pre: torch.Tensor
    row_to_slot: torch.Tensor
    offsets: torch.Tensor


def moe_forward(x, indices, weights, gate_up, down, *, recipe="bf16", save=False):
    """y [T, H] in the dtype of x, and Saved or None."""
    experts, top_k = gate_up.value.shape[0], indices.shape[1]
    ids = indices.reshape(-1)
    keys = torch.where((ids >= 0) & (ids < experts), ids, experts)  # sentinels sort to the end
    order = keys.argsort(stable=True)
    counts = keys.bincount(minlength=experts + 1)[:experts]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    row_to_slot = torch.where(torch.arange(len(order)) < offsets[-1], order, -1).int()

    pre = x.new_zeros(len(order), gate_up.value.shape[1])
    rows = x.new_zeros(len(order), x.shape[1], dtype=_accumulate_dtype(x))
    seen = _cast(x, recipe, gate_up)
    for expert, start, stop in _groups(offsets):
        slot = order[start:stop]
        pre[start:stop] = seen[slot // top_k] @ _star(gate_up, expert, x).T
        a = _cast(_activate(pre[start:stop])[0].to(x.dtype), recipe, gate_up)
        rows[slot] = (a @ _star(down, expert, x).T).to(rows.dtype) * weights.reshape(-1, 1)[slot].to(rows.dtype)
    y = _sum_slots(rows, indices.shape).to(x.dtype)
    return y, Saved(pre, row_to_slot, offsets) if save else None


def moe_backward(
    dy, x, weights, saved, gate_up, down, *, recipe="bf16", wants=(True,) * 4, grad_dtypes=(None, None)
):  # fmt: skip
    """dx, dweights, dgate_up, ddown, None where not wanted; x may be None where dgate_up is not wanted."""
    wants_dx, wants_dweights, wants_dgate_up, wants_ddown = wants
    d, accumulate, top_k = dy.dtype, _accumulate_dtype(dy), weights.shape[1]
    new = {"dtype": accumulate, "device": dy.device}
    dx_rows = torch.zeros(weights.numel(), dy.shape[1], **new) if wants_dx else None
    dweights = torch.zeros(weights.numel(), **new) if wants_dweights else None
    dgate_up, ddown = (
        torch.zeros(w.value.shape, dtype=dtype or d) if wanted else None
        for w, dtype, wanted in zip((gate_up, down), grad_dtypes, wants[2:], strict=True)
    )
    seen = _cast(x, recipe, gate_up) if wants_dgate_up else None
    dy_seen = _cast(dy, "fp8", gate_up) if recipe == "fp8_full" else dy
    for expert, start, stop in _groups(saved.offsets):
        slot = saved.row_to_slot[start:stop].long()
        token, weight = slot // top_k, weights.reshape(-1, 1)[slot].to(accumulate)
        pre = saved.pre[start:stop]
        a, gate, up = _activate(pre)
        a = _cast(a.to(d), recipe, gate_up).to(accumulate)
        if wants_ddown:
            ddown[expert] = (dy[token].T @ (weight * a).to(d)).to(ddown.dtype)
        if not (wants_dx or wants_dweights or wants_dgate_up):
            continue
        da = (dy_seen[token] @ _star(down, expert, dy)).to(accumulate)  # not yet weighted
        if wants_dweights:
            dweights[slot] = (da * a).sum(-1)
        da, sigmoid = da * weight, gate.sigmoid()
        dpre = torch.cat((da * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), da * gate * sigmoid), -1).to(d)
        if wants_dgate_up:
            dgate_up[expert] = (dpre.T @ seen[token]).to(dgate_up.dtype)
        if wants_dx:
            dpre = _cast(dpre, "fp8", gate_up) if recipe == "fp8_full" else dpre
            dx_rows[slot] = (dpre @ _star(gate_up, expert, dy)).to(accumulate)
    dx = _sum_slots(dx_rows, weights.shape).to(d) if wants_dx else None
    return dx, dweights.view_as(weights) if wants_dweights else None, dgate_up, ddown


def _accumulate_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _groups(offsets):
    bounds = offsets.tolist()
    return [(e, *bounds[e : e + 2]) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]


def _activate(pre):
    gate, up = pre.to(_accumulate_dtype(pre)).chunk(2, dim=-1)
    return F.silu(gate) * up, gate, up


def _cast(rows, recipe, weights):
    if recipe == "bf16":
        return rows
    ue8m0 = weights.scale.dtype == torch.float8_e8m0fnu
    group = None if recipe == "fp8_channel" else 128
    return roundtrip_fp8_tokens(rows, group=group, scale="ue8m0" if ue8m0 else "fp32")


def _star(weights, expert, like):
    if weights.scale is None:
        return weights.value[expert]
    return dequantize_fp8(weights.value[expert], weights.scale[expert], dtype=like.dtype)


def _sum_slots(rows, shape):
    """Sum over the slots of each token, in order."""
    rows = rows.view(*shape, rows.shape[-1])
    total = torch.zeros_like(rows[:, 0]) if shape[1] else rows.sum(1)
    for k in range(shape[1]):
        total += rows[:, k]
    return total
