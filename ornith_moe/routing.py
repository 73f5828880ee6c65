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

Two losses can come with it, in the form that transformers gives them for one layer:

    load_balancing_loss = E * sum_e counts[e] / T * mean_t q[t, e]      q = softmax(logits), or scores / sum(scores)
    z_loss              = mean_t logsumexp(logits[t])^2

Counts are constants there; balanced experts give top_k. Both backends return the sums over tokens, so the formulas
stand here once. The operator is `ornith::route` (`ornith_moe.ops`), computed by `ornith_moe.kernels.routing` on a GPU
and elsewhere by `ornith_moe.backend.routing_torch`, which defines what both give.

Letters: T tokens, E experts, top_k experts per token.
Sources: Shazeer et al. 2017 (top-k gating); DeepSeek-V3 report, section 2.1.2 (bias and groups); the Qwen3.5 router;
Fedus et al. 2021 (load balancing), Zoph et al. 2022 (z-loss).
"""

from dataclasses import dataclass

import torch

from ornith_moe import ops, transforms
from ornith_moe.backend import routing_torch
from ornith_moe.backend.choice import choose_backend


@dataclass(frozen=True)
class Routing:
    """A routing decision.

    Attributes:
        indices: [T, top_k] int32, the chosen experts, best first (a replayed row keeps the order of its record).
        weights: [T, top_k] float32, differentiable with respect to the logits.
        counts: [E] int32, how many (token, slot) pairs each expert received; sums to T * top_k.
        load_balancing_loss: [] float32, differentiable with respect to the logits; None unless asked for.
        z_loss: the same.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    load_balancing_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None


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
    losses: bool = False,
    backend: str | None = None,
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
        losses: compute `load_balancing_loss` and `z_loss` too, over all T rows; 0 where T = 0.
        backend: as in `ornith_moe.moe_mlp`; "cpu" and "reference" are the same torch code.

    Returns:
        Routing.

    Raises:
        TypeError: an argument is not a tensor of the expected kind.
        ValueError: a shape, range or combination is wrong, or `replay` names an expert twice in a row.

    Numerics: float32 throughout, deterministic, ties to the lowest index. Checking `replay` reads one flag back to the
    host, except while a CUDA graph is captured, which cannot; nothing else synchronises. "triton" makes
    the same choice as torch unless two scores agree to the last bits.

    Example:
        >>> import torch, ornith_moe as om
        >>> om.route(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), top_k=2).indices
        tensor([[1, 3]], dtype=torch.int32)
    """
    ops.check_plain(logits=logits, bias=bias, replay=replay)
    _check(logits, top_k, score, bias, n_group, topk_group)
    if replay is not None:
        _check_record(replay, logits, top_k)
    if logits.dtype == torch.float64:
        logits = logits.float()
    bias = None if bias is None else bias.detach()
    backend = choose_backend(backend, logits.device)
    options = (logits, bias, replay, top_k, score, norm_topk_prob, n_group, topk_group, losses)
    if transforms.active():  # torch code, which every transform knows
        outputs = routing_torch.route(*options)
    else:
        outputs = torch.ops.ornith.route(*options, backend)
    weights, indices, counts, q_sum, square_sum = outputs
    if scaling != 1:
        weights = weights * scaling
    if q_sum is None or square_sum is None:  # no losses
        return Routing(indices, weights, counts)
    tokens, experts = logits.shape
    tokens = max(tokens, 1)
    # float first: a quotient of integers has torch's default dtype
    balance = (counts.float() / tokens * (q_sum / tokens)).sum() * experts
    return Routing(indices, weights, counts, balance, square_sum / tokens)


def fold_shared(
    indices: torch.Tensor, weights: torch.Tensor, experts: int, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A shared expert as the last slot of every token: expert E of weights [E + 1, ...], weighted by its gate.

    Args:
        indices, weights: [T, top_k] of the routed experts. experts: E.
        gate: [T] or [T, 1], the sigmoid of the shared expert's gate.
    Returns:
        indices, weights [T, top_k + 1], in the dtypes they came in, for `moe_mlp`, which adds the
        shared expert last.
    Example:
        >>> indices, weights = torch.tensor([[2, 0]]), torch.tensor([[0.75, 0.25]])
        >>> fold_shared(indices, weights, 4, torch.tensor([0.5]))[0]
        tensor([[2, 0, 4]])
    """
    column = torch.full_like(indices[:, :1], experts)
    return torch.cat((indices, column), 1), torch.cat((weights, gate.reshape(-1, 1).to(weights.dtype)), 1)


def _check_record(replay: object, logits: torch.Tensor, top_k: int) -> None:
    """Kind and shape; the ids are checked inside of the operator, where their values may be read."""
    if not isinstance(replay, torch.Tensor) or replay.is_floating_point() or replay.dtype == torch.bool:
        raise TypeError(f"replay: expected an integer tensor, got {getattr(replay, 'dtype', type(replay).__name__)}")
    tokens = logits.shape[0]
    if replay.shape != (tokens, top_k):
        raise ValueError(
            f"replay: expected shape [T, top_k] = {[tokens, top_k]}, got {list(replay.shape)}; "
            "record one row of top_k expert ids per token"
        )


def _check(
    logits: object, top_k: int, score: str, bias: torch.Tensor | None, n_group: int | None, topk_group: int | None
) -> None:
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
    if n_group is not None and topk_group is not None:
        if n_group < 1 or experts % n_group:
            raise ValueError(f"n_group: expected a divisor of the {experts} experts, got {n_group}")
        if not 1 <= topk_group <= n_group:
            raise ValueError(f"topk_group: expected 1 to n_group = {n_group}, got {topk_group}")
        if topk_group * (experts // n_group) < top_k:
            raise ValueError(
                f"topk_group: {topk_group} groups of {experts // n_group} experts cannot supply top_k = {top_k}"
            )
