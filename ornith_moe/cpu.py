"""The routed-experts MLP on a CPU, forward and a hand-written backward.

    pre = x[token] @ gate_up[e]^T      a = silu(gate) * up      y[t] = sum_k weights[t, k] * (a @ down[e]^T)

Forward: sort the T * top_k slots by expert (stable), then for each expert that has rows gather them, two GEMMs and the
activation; the results return to slot order and each token adds its slots in order. Nothing is added through an index,
so the same inputs give the same bits.

Backward, per active expert, from dy alone:

    da' = dy[token] @ down[e]          the gradient of a before it is weighted
    dweights = <da', a>                so the expert's output never has to be kept
    ddown[e] = dy[token]^T @ (weights * a)
    dpre = silu-and-mul backward of weights * da'
    dgate_up[e] = dpre^T @ x[token]    dx[t] = sum_k dpre @ gate_up[e]

Saved: x, the order of the slots and the pre-activation [R, 2I], besides the weights that exist anyway; `a` is
recomputed. Each product is skipped when its gradient is not wanted; x is not even kept when gate_up is frozen.
Transient: one [R, H] buffer in the dtype of x, in the forward and, if x wants a gradient, in the backward.

Precision: GEMMs in the dtype of the operands (which torch accumulates in float32); activation, weighting and the sum
over slots in float32 (float64 for float64). Slots whose id is outside [0, E) are sentinels: they reach no GEMM, add
nothing, and the gradient of their weight is zero.

Letters: T tokens, E experts, H hidden, I expert intermediate, R routed rows (valid slots), m rows of one expert.
Source: the router gradient from <da', a> is SonicMoE's observation (Guo et al. 2025).
"""

import torch
import torch.nn.functional as F


def moe_mlp_cpu(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """y = sum_k weights_k * down(silu(gate(x)) * up(x)) on CPU tensors.

    Args:
        x: [T, H] float32, bfloat16, float16 or float64; all three operands share one dtype.
        indices: [T, top_k] integers; ids outside [0, E) are skipped.
        weights: [T, top_k] floating point.
        gate_up_proj: [E, 2I, H], gate rows first. down_proj: [E, H, I].

    Returns:
        y [T, H] in the dtype of x.

    Numerics: see the module; float32 results are within 1e-6 relative RMS of float64. Bit-identical from run to run at
    an unchanged thread count.

    Example:
        >>> import torch
        >>> from ornith_moe.cpu import moe_mlp_cpu
        >>> x, w13, w2 = torch.ones(1, 2), torch.ones(3, 8, 2), torch.ones(3, 2, 4)
        >>> moe_mlp_cpu(x, torch.tensor([[2]]), torch.tensor([[0.5]]), w13, w2)
        tensor([[7.0464, 7.0464]])
    """
    tensors = (x, weights, gate_up_proj, down_proj)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _MoEMLP.apply(x, indices, weights, gate_up_proj, down_proj)
    groups = _group_by_expert(indices, gate_up_proj.shape[0])
    return _forward(x, weights, gate_up_proj, down_proj, groups, pre_activation=None)


def _group_by_expert(indices, experts):
    """(slots, groups): slots [R] int64 sorted by expert, and (expert, start, stop) of every expert that has rows."""
    ids = indices.reshape(-1)
    keys = torch.where((ids >= 0) & (ids < experts), ids, experts)  # sentinels sort to the end
    slots = keys.argsort(stable=True)
    groups, start = [], 0
    for expert, count in enumerate(keys.bincount(minlength=experts + 1)[:experts].tolist()):
        if count:
            groups.append((expert, start, start + count))
            start += count
    return slots[:start], groups


def _accumulate_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _activate(pre):
    """a = silu(gate) * up for pre [m, 2I] in the accumulation dtype."""
    gate, up = pre.to(_accumulate_dtype(pre)).chunk(2, dim=-1)
    return F.silu(gate) * up


def _sum_slots(rows, weights):
    """y[t] = sum over k, in order, of weights[t, k] * rows[t, k]; rows [T, top_k, H], weights [T, top_k] or None."""
    total = rows.new_zeros((rows.shape[0], rows.shape[2]), dtype=_accumulate_dtype(rows))
    for k in range(rows.shape[1]):
        if weights is None:
            total += rows[:, k]
        else:
            total += rows[:, k] * weights[:, k : k + 1]
    return total.to(rows.dtype)


def _forward(x, weights, gate_up_proj, down_proj, grouping, pre_activation):
    """y [T, H]; fills `pre_activation` [R, 2I] if given."""
    slots, groups = grouping
    top_k = weights.shape[1]
    rows = x.new_zeros(weights.numel(), x.shape[1])  # zero, because sentinel slots are never written ...
    slot_weights = torch.zeros(weights.numel(), dtype=_accumulate_dtype(x), device=x.device)
    slot_weights[slots] = weights.reshape(-1)[slots].to(slot_weights.dtype)  # ... nor may their weight make 0 * inf
    for expert, start, stop in groups:
        slot = slots[start:stop]
        pre = None if pre_activation is None else pre_activation[start:stop]
        pre = torch.mm(x[slot // top_k], gate_up_proj[expert].T, out=pre)  # [m, 2I]
        rows[slot] = torch.mm(_activate(pre).to(x.dtype), down_proj[expert].T)
    return _sum_slots(rows.view(*weights.shape, x.shape[1]), slot_weights.view(weights.shape))


class _MoEMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, indices, weights, gate_up_proj, down_proj):
        slots, groups = _group_by_expert(indices, gate_up_proj.shape[0])
        pre_activation = x.new_empty(slots.numel(), gate_up_proj.shape[1])
        y = _forward(x, weights, gate_up_proj, down_proj, (slots, groups), pre_activation)
        needs_x = ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_x else None, weights, gate_up_proj, down_proj, slots, pre_activation)
        ctx.groups = groups
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weights, gate_up_proj, down_proj, slots, pre_activation = ctx.saved_tensors
        wants_dx, _, wants_dweights, wants_dgate_up, wants_ddown = ctx.needs_input_grad
        dtype, accumulate = dy.dtype, _accumulate_dtype(dy)
        top_k = weights.shape[1]
        slot_weights = weights.reshape(-1).to(accumulate)

        dx_rows = dy.new_zeros(weights.numel(), dy.shape[1]) if wants_dx else None
        dweights = torch.zeros_like(slot_weights) if wants_dweights else None
        dgate_up = _gradient_like(gate_up_proj, ctx.groups) if wants_dgate_up else None
        ddown = _gradient_like(down_proj, ctx.groups) if wants_ddown else None
        for expert, start, stop in ctx.groups:
            slot = slots[start:stop]
            token = slot // top_k
            weight = slot_weights[slot].unsqueeze(-1)  # [m, 1]
            dy_rows = dy[token]  # [m, H]
            gate, up = pre_activation[start:stop].to(accumulate).chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            if wants_ddown:
                torch.mm(dy_rows.T, (silu * up * weight).to(dtype), out=ddown[expert])
            if not (wants_dx or wants_dweights or wants_dgate_up):
                continue
            da = torch.mm(dy_rows, down_proj[expert]).to(accumulate)  # [m, I], not yet weighted
            if wants_dweights:
                dweights[slot] = (da * silu * up).sum(-1)
            if not (wants_dx or wants_dgate_up):
                continue
            da = da * weight
            dgate = da * up * (sigmoid + silu * (1 - sigmoid))
            dpre = torch.cat((dgate, da * silu), dim=-1).to(dtype)  # [m, 2I]
            if wants_dgate_up:
                torch.mm(dpre.T, x[token], out=dgate_up[expert])
            if wants_dx:
                dx_rows[slot] = torch.mm(dpre, gate_up_proj[expert])
        dx = _sum_slots(dx_rows.view(*weights.shape, dy.shape[1]), None) if wants_dx else None
        if wants_dweights:
            dweights = dweights.view_as(weights).to(weights.dtype)
        return dx, None, dweights, dgate_up, ddown


def _gradient_like(weight, groups):
    """Memory for a weight gradient, zero for the experts that no GEMM will write."""
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    active = {expert for expert, _, _ in groups}
    for expert in range(weight.shape[0]):
        if expert not in active:
            gradient[expert].zero_()
    return gradient
