"""Routing in torch, forward and backward: what the cpu and reference backends run, and what the kernels must equal.

`ornith_moe.routing` says what is computed and why. The gradient is in closed form, so that none is divided by a small
sum: with h_k = w_k * (dw_k - sum_j w_j dw_j), the gradient with respect to log p of choice k (h_k = w_k * dw_k without
renormalisation),

    softmax   dlogits_e = [h of e, if chosen] - p_e * sum_k h_k
    sigmoid   dlogits_e = [h of e, if chosen] * (1 - p_e)

and the losses add the gradients of q, the softmax or the sigmoids divided by their sum, and of logsumexp^2.

Letters: T tokens, E experts, top_k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ornith_moe.backend.protocol import Routed

_TINY = torch.finfo(torch.float32).tiny


def route_forward(
    logits: torch.Tensor, top_k: int, *, score: str, norm_topk_prob: bool, bias: torch.Tensor | None,
    n_group: int | None, topk_group: int | None, replay: torch.Tensor | None, losses: bool,
) -> Routed:  # fmt: skip
    """indices [T, top_k] int32, weights [T, top_k] before scaling, counts [E] int32; with `losses` the sums over tokens
    of q [E] and of logsumexp^2 [], else None twice. `replay` is checked."""
    logits = logits.float().contiguous()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    preference = scores if bias is None else scores + bias.float()
    if n_group is not None and topk_group is not None:
        preference = _restrict_to_groups(preference, n_group, topk_group, pair=bias is not None)
    indices = _largest(preference, top_k)
    if replay is not None:
        indices = torch.where(replay == -1, indices, replay)
    weights = scores.gather(-1, indices)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(_TINY)
    flat = indices.reshape(-1)
    counts = torch.zeros(logits.shape[-1], dtype=torch.int32, device=logits.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int32))  # integers: the same in any order
    if not losses:
        return indices.int(), weights, counts, None, None
    return indices.int(), weights, counts, _shares(scores, score).sum(0), logits.logsumexp(-1).square().sum()


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, replay: torch.Tensor | None, top_k: int, score: str,
    norm_topk_prob: bool, n_group: int | None, topk_group: int | None, losses: bool,
    route_forward: Callable[..., Routed] = route_forward,
) -> Routed:  # fmt: skip
    """`ornith::route`, what is differentiable first: opcheck adds the other outputs to it."""
    if replay is not None:
        replay = checked_record(replay, logits, top_k)
    indices, weights, counts, q_sum, square_sum = route_forward(
        logits, top_k, score=score, norm_topk_prob=norm_topk_prob, bias=bias, n_group=n_group, topk_group=topk_group,
        replay=replay, losses=losses,
    )  # fmt: skip
    return weights, indices, counts, q_sum, square_sum


def route_backward(
    logits: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, dweights: torch.Tensor,
    dq_sum: torch.Tensor | None, dsquare_sum: torch.Tensor | None, *, score: str, norm_topk_prob: bool,
) -> torch.Tensor:  # fmt: skip
    """dlogits [T, E] in the dtype of the logits, from what `route_forward` took and gave; the gradients of both sums or
    None twice."""
    dtype, logits, indices = logits.dtype, logits.float().contiguous(), indices.long()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    if norm_topk_prob:
        # the weights add up to 1, unless the scores' sum underflowed and was replaced by a constant
        sound = weights.sum(-1, keepdim=True) > 0.99
        h = weights * (dweights - torch.where(sound, (weights * dweights).sum(-1, keepdim=True), 0.0))
    else:
        h = weights * dweights
    gradient = torch.zeros_like(scores).scatter(-1, indices, h)  # a token has no expert twice
    if score == "softmax":
        gradient = gradient - scores * h.sum(-1, keepdim=True)
    else:
        gradient = gradient * (1 - scores)
    if dq_sum is not None and dsquare_sum is not None:
        q = _shares(scores, score)
        dlog = q * (dq_sum - (q * dq_sum).sum(-1, keepdim=True))
        gradient = gradient + (dlog if score == "softmax" else dlog * (1 - scores))
        gradient = gradient + 2 * logits.logsumexp(-1, keepdim=True) * dsquare_sum * logits.softmax(-1)
    return gradient.to(dtype)


def _shares(scores: torch.Tensor, score: str) -> torch.Tensor:
    """q [T, E], which adds up to 1 for every token."""
    return scores if score == "softmax" else scores / scores.sum(-1, keepdim=True).clamp_min(_TINY)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest values per row, ties to the lowest index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _restrict_to_groups(preference: torch.Tensor, n_group: int, topk_group: int, *, pair: bool) -> torch.Tensor:
    """Set the preference of every expert outside the best `topk_group` groups to -inf."""
    grouped = preference.unflatten(-1, (n_group, -1))  # [T, n_group, E / n_group]
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values
    worth = best.sum(-1) if pair else best[..., 0]
    closed = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, _largest(worth, topk_group), False)
    return grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)


def checked_record(replay: torch.Tensor, logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """`replay` as int64 on the device of the logits, its ids checked: a host sync, but not under graph capture."""
    experts = logits.shape[1]
    record = replay.to(device=logits.device, dtype=torch.int64)
    if record.is_meta or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return record
    absent = (record == -1).all(-1, keepdim=True)
    outside = ~absent & ((record < 0) | (record >= experts))
    ordered = record.sort(-1).values
    twice = ~absent & (ordered[..., 1:] == ordered[..., :-1])
    if bool(outside.any() | twice.any()):  # host sync: a wrong record must not train a wrong expert silently
        if outside.any():
            token, slot = outside.nonzero()[0].tolist()
            raise ValueError(
                f"replay[{token}, {slot}]: expected an expert id in [0, {experts}) or a whole row of -1 for no record, "
                f"got {int(record[token, slot])}; check that the record and the model have the same experts"
            )
        token = int(twice.any(-1).nonzero()[0])
        raise ValueError(
            f"replay[{token}]: expected {top_k} different experts, got {record[token].tolist()}; "
            "drop the record of this token by setting its row to -1"
        )
    return record
