"""Which experts a token visits, and how much each of them counts.

    scores  = softmax(logits) or sigmoid(logits)        fp32, over all E experts
    indices = the top_k largest of scores + bias        ties go to the lowest expert index
    weights = scores[indices] / sum(scores[indices]) * scaling

Stages: score, restrict to the best expert groups (optional), select, gather, renormalise. The bias and the groups
decide only *who* is selected; the weights come from the scores alone, and so does the gradient.

Selection is a stable descending sort, because `torch.topk` leaves the order of ties open and differs between devices.
Renormalisation divides by the sum. The sum of replayed experts can underflow to zero where that of a fresh choice
cannot; such a row gets zero weights, not NaN.

Replay (router replay, "R3") takes the choice that a rollout engine recorded and recomputes only its weights from the
logits at hand, so that trainer and engine visit the same experts while the router still learns.

Letters: T tokens, E experts, top_k experts per token.
Sources: Shazeer et al. 2017 (top-k gating); DeepSeek-V3 report, section 2.1.2 (bias and groups); the Qwen3.5 router.
"""

from dataclasses import dataclass

import torch

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Routing:
    """A routing decision.

    Attributes:
        indices: [T, top_k] int32, the chosen experts, best first (a replayed row keeps the order of its record).
        weights: [T, top_k] float32, differentiable with respect to the logits.
        counts: [E] int32, how many (token, slot) pairs each expert received; sums to T * top_k.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    norm_topk_prob: bool = True,
    bias: torch.Tensor | None = None,
    n_group: int | None = None,
    topk_group: int | None = None,
    scaling: float = 1.0,
    replay: torch.Tensor | None = None,
) -> Routing:
    """weights = scaling * normalise(score(logits)[indices]), indices = top_k(score(logits) + bias).

    Args:
        logits: [T, E] floating point; computed on in float32. T = 0 is fine.
        top_k: experts per token, 1 <= top_k <= E.
        score: "softmax" over all experts, or "sigmoid" per expert.
        norm_topk_prob: divide the chosen scores by their sum.
        bias: [E] added to the scores for selection only; receives no gradient.
        n_group: split the experts into this many equal consecutive groups; together with `topk_group`.
        topk_group: select only from this many groups. A group is worth its best score, or with a bias the sum of its
            two best biased scores, as DeepSeek-V2 and -V3 define it.
        scaling: factor on the final weights.
        replay: [T, top_k] integers, recorded choices to use instead; a row of -1 has no record and is routed afresh.

    Returns:
        Routing.

    Raises:
        TypeError: an argument is not a tensor of the expected kind.
        ValueError: a shape, range or combination is wrong, or `replay` names an expert twice in a row.

    Numerics: float32 throughout, deterministic, ties to the lowest index. Checking `replay` reads one flag back to the
    host; nothing else synchronises.

    Example:
        >>> import torch, ornith_moe as om
        >>> om.route(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), top_k=2).indices
        tensor([[1, 3]], dtype=torch.int32)
    """
    _check(logits, top_k, score, bias, n_group, topk_group)
    logits = logits.float()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    with torch.no_grad():
        preference = scores if bias is None else scores + bias.float()
        if n_group is not None:
            preference = _restrict_to_groups(preference, n_group, topk_group, pair=bias is not None)
        indices = _largest(preference, top_k)
        if replay is not None:
            indices = _replayed(indices, replay, logits.shape[-1])
    weights = scores.gather(-1, indices)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(_TINY)
    flat = indices.reshape(-1)
    counts = torch.zeros(logits.shape[-1], dtype=torch.int32, device=logits.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))  # integer sums: the same in any order
    return Routing(indices.int(), weights * scaling, counts)


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


def _replayed(fresh: torch.Tensor, replay: torch.Tensor, experts: int) -> torch.Tensor:
    """`replay` where it has a record, `fresh` elsewhere, after checking the record."""
    if not isinstance(replay, torch.Tensor) or replay.is_floating_point() or replay.dtype == torch.bool:
        raise TypeError(f"replay: expected an integer tensor, got {getattr(replay, 'dtype', type(replay).__name__)}")
    if replay.shape != fresh.shape:
        raise ValueError(
            f"replay: expected shape [T, top_k] = {list(fresh.shape)}, got {list(replay.shape)}; "
            "record one row of top_k expert ids per token"
        )
    record = replay.to(device=fresh.device, dtype=fresh.dtype)
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
            f"replay[{token}]: expected {fresh.shape[-1]} different experts, got {record[token].tolist()}; "
            "drop the record of this token by setting its row to -1"
        )
    return torch.where(absent, fresh, record)


def _check(logits, top_k, score, bias, n_group, topk_group):
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a floating-point tensor, got {kind}")
    if logits.dim() != 2:
        raise ValueError(f"logits: expected shape [T, E], got {list(logits.shape)}; flatten the tokens first")
    experts = logits.shape[-1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts} (the number of experts), got {top_k}")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score: expected 'softmax' or 'sigmoid', got {score!r}")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias: expected shape [E] = [{experts}], got {list(bias.shape)}")
    if (n_group is None) != (topk_group is None):
        raise ValueError(f"n_group and topk_group go together, got n_group={n_group} and topk_group={topk_group}")
    if n_group is not None:
        if n_group < 1 or experts % n_group:
            raise ValueError(f"n_group: expected a divisor of the {experts} experts, got {n_group}")
        if not 1 <= topk_group <= n_group:
            raise ValueError(f"topk_group: expected 1 to n_group = {n_group}, got {topk_group}")
        if topk_group * (experts // n_group) < top_k:
            raise ValueError(
                f"topk_group: {topk_group} groups of {experts // n_group} experts cannot supply top_k = {top_k}"
            )
