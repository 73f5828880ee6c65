"""Token-level GRPO with asymmetric clipping; weights for staleness and for mismatch, two factors that stay apart.

    rho[b, t]  = exp(logps - old_logps)                        the trainer now against the trainer that sampled
    c[b, t]    = clamp(rho, 1 - clip_low, 1 + clip_high)
    loss       = - sum of mask * m * min(rho * wA, c * wA) / normalizer

    w[b, t]    in [0, 1] by age of the token: 1 up to k1 versions, falling to k2, 0 beyond       `staleness_weights`
    m[b, t]    in [0, cap], the trainer that sampled against the engine that sampled             `mismatch_weights`

w is folded into A (`fold`): w >= 0, so w min(rho A, c A) = min(rho wA, c wA), and a trainer that takes advantages
[B, T] needs no loss of its own. In floating point the two sides multiply in another order: their bits are equal where
the products are exact (float64 with operands of float32 and weights k / 32), else they are two roundings apart.

Staleness is between versions of the trainer, mismatch between two programs that run one version. One ratio of trainer
now against engine would clip the second as if the policy had moved, so old_logps are the trainer's (arXiv 2605.12070).

Sources. Known: the clipped surrogate (Schulman et al. 2017), clip_high > clip_low and one mean over all tokens (Yu et
al. 2025, DAPO), the ratio of a sequence (Zheng et al. 2025, GSPO), truncated and masked mismatch weights (Yao et al.
2025; Liu et al. 2025; options of TRL and verl). Second-hand, from restatements of Ornith's blog: full weight up to K1,
decay, 0 beyond K2. Ours: that the decay is linear, the folding.

Numerics: in the dtype of logps, but fp32 at least; deterministic. What the mask leaves out may hold anything, NaN too.

Letters: B rows, T tokens of a completion.
"""

from typing import Literal, NamedTuple

import torch

Level = Literal["token", "sequence"]


class Loss(NamedTuple):
    """The loss, and what happened to the ratios of the tokens in the mask: 0-dim tensors, not read back.

    Attributes:
        loss: with gradient to logps. The rest has none, and is 0 (ratios 1) where the mask is empty.
        ratio_mean, ratio_min, ratio_max: of rho, before clipping.
        clipped_low: share of tokens with A < 0 and rho < 1 - clip_low, which get no gradient.
        clipped_high: share of tokens with A > 0 and rho > 1 + clip_high, which get none either.
        tokens: how many the mask holds.
    """

    loss: torch.Tensor
    ratio_mean: torch.Tensor
    ratio_min: torch.Tensor
    ratio_max: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    tokens: torch.Tensor


def grpo_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    level: Level = "token",
    normalizer: float | torch.Tensor | None = None,
    mismatch: torch.Tensor | None = None,
) -> Loss:
    """- sum of mask * mismatch * min(rho A, clamp(rho, 1 - clip_low, 1 + clip_high) A) / normalizer.

    Args:
        logps: [B, T] float, log-probabilities of the sampled tokens now. old_logps: the same when they were sampled,
            by the trainer; no gradient.
        advantages: [B], or [B, T] for two stages or staleness in one row (`fold`).
        mask: [B, T] bool or 0 and 1: tokens that the policy wrote and that carry a loss (`Credit.solution_trained`).
        level: "token": rho of each token. "sequence": all tokens of a row have exp(mean of log rho), its gradient too.
        normalizer: default the tokens in the mask. Over micro-batches or processes give the tokens of all of them.
            GSPO's mean over rows is `fold(advantages, 1 / lengths)` with normalizer B.
        mismatch: [B] or [B, T], from `mismatch_weights`; no gradient.
    Raises:
        ValueError: shapes or options.
    Source: Schulman et al. 2017, Shao et al. 2024, Yu et al. 2025 (DAPO), Zheng et al. 2025 (GSPO).
    Example:
        >>> rows = torch.zeros(2, 3, requires_grad=True)
        >>> made = grpo_loss(rows, torch.zeros(2, 3), torch.tensor([1.0, 0.0]), torch.ones(2, 3))
        >>> made.loss.item(), made.ratio_mean.item()
        (-0.5, 1.0)
    """
    _matrices(logps=logps, old_logps=old_logps, mask=mask)
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ValueError(
            f"clip_low, clip_high: expected 0 <= clip_low < 1 and clip_high >= 0, got {clip_low} and {clip_high}"
        )
    mask = mask.bool()
    tokens = mask.sum()
    ratio = _log_ratio(logps, old_logps.detach(), mask, level).exp()
    zero = torch.zeros_like(ratio)
    advantage = torch.where(mask, _per_token("advantages", advantages, mask).to(ratio.dtype), zero)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    if mismatch is not None:
        gain = gain * torch.where(mask, _per_token("mismatch", mismatch, mask).to(ratio.dtype), zero)
    loss = -gain.sum() / (tokens.clamp(min=1) if normalizer is None else normalizer)
    with torch.no_grad():
        share = 1 / tokens.clamp(min=1)
        none = tokens == 0
        return Loss(
            loss,
            torch.where(none, 1.0, torch.where(mask, ratio, zero).sum() * share),
            torch.where(none, 1.0, torch.where(mask, ratio, torch.inf).amin()),
            torch.where(none, 1.0, torch.where(mask, ratio, zero).amax()),
            (mask & (advantage < 0) & (ratio < 1 - clip_low)).sum() * share,
            (mask & (advantage > 0) & (ratio > 1 + clip_high)).sum() * share,
            tokens,
        )


def staleness_weights(age: torch.Tensor, k1: int, k2: int) -> torch.Tensor:
    """w = clamp((k2 + 1 - age) / (k2 + 1 - k1), 0, 1): 1 up to age k1, falling in equal steps, 0 from k2 + 1 on.

    Args:
        age: [B, T] int, updates of the policy since that token was sampled: version of the trainer less version of the
            weights that wrote the token. A rollout that goes on over a weight sync has several ages in a row.
        k1, k2: 0 <= k1 <= k2.
    Returns:
        [B, T] in the default dtype. A token of weight 0 stays in the mask, so in the normalizer: stale rows make the
        others' steps no larger. Take them out of the mask for the other choice.
    Source: 1, decay, 0 second-hand; linear steps ours, nothing is published about the form.
    Example:
        >>> staleness_weights(torch.arange(6), k1=1, k2=4).tolist()
        [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if not 0 <= k1 <= k2:
        raise ValueError(f"k1, k2: expected 0 <= k1 <= k2, got {k1} and {k2}")
    if age.is_floating_point() or age.is_complex():
        raise TypeError(f"age: expected integers, whole versions, got {age.dtype}")
    if age.numel() and bool((age < 0).any()):  # read back once: a token from the future is a mixed-up subtraction
        raise ValueError(f"age: expected 0 or more, got {int(age.min())}; it is trainer's less sampler's version")
    return ((k2 + 1 - age).to(torch.get_default_dtype()) / (k2 + 1 - k1)).clamp(0, 1)


def fold(advantages: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """w A: w min(rho A, c A) = min(rho wA, c wA) for every w >= 0, so a token's weight goes into its advantage.

    Args:
        advantages: [B] or [B, T]. weights: [B] or [B, T], none negative (not checked); at least one is [B, T], or both
            are [B] and so is the result.
    Source: ours. The sign of A stays, so shares of clipped tokens keep their meaning.
    """
    if advantages.dim() not in (1, 2) or weights.dim() not in (1, 2) or len(advantages) != len(weights):
        raise ValueError(
            f"advantages, weights: expected [B] or [B, T], got {list(advantages.shape)} and {list(weights.shape)}"
        )
    if advantages.dim() < weights.dim():
        advantages = advantages.unsqueeze(1)
    elif weights.dim() < advantages.dim():
        weights = weights.unsqueeze(1)
    return advantages * weights


@torch.no_grad()
def mismatch_weights(
    trainer_logps: torch.Tensor,
    rollout_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    level: Level = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    cap: float = 2.0,
) -> torch.Tensor:
    """m = min(rho, cap), or rho where rho <= cap and 0 elsewhere, of rho = exp(trainer_logps - rollout_logps).

    Both sides are of the version that sampled: the trainer's are its old_logps, computed by the trainer, the rollout's
    are what the engine returned. With one quantizer and replayed routing they are equal bits, and m is exactly 1.

    Args:
        trainer_logps, rollout_logps: [B, T]. mask: [B, T], the tokens that were sampled.
        level: "token", or "sequence": the product over the row's tokens, unbiased and of high variance.
        mode: "truncate" keeps what is over the cap at the cap, "mask" takes it out. cap: above 0.
    Returns:
        [B, T] with 1 outside the mask, or [B] at the level of sequences. No gradient. A token of weight 0 stays in the
        loss's normalizer; leave it out of the mask too (THUDM/slime#657) if the others shall make up for it.
    Source: truncated, Yao et al. 2025 ("Your efficient RL framework secretly brings you off-policy RL training");
        masked, Liu et al. 2025 ("When speed kills stability"). Kept apart from staleness: arXiv 2605.12070.
    """
    _matrices(trainer_logps=trainer_logps, rollout_logps=rollout_logps, mask=mask)
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode: expected 'truncate' or 'mask', got {mode!r}")
    if not cap > 0:
        raise ValueError(f"cap: expected a number above 0, got {cap}")
    if level not in ("token", "sequence"):
        raise ValueError(f"level: expected 'token' or 'sequence', got {level!r}")
    difference = _log_ratio(trainer_logps, rollout_logps, mask.bool(), "token")
    ratio = (difference if level == "token" else difference.sum(1)).exp()
    return ratio.clamp(max=cap) if mode == "truncate" else ratio.where(ratio <= cap, torch.zeros_like(ratio))


def _log_ratio(new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, level: str) -> torch.Tensor:
    """new - old [B, T], or in each token the row's mean of it; 0 outside the mask, in value and gradient."""
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    difference = torch.where(mask, new.to(dtype) - old.to(dtype), torch.zeros((), dtype=dtype, device=new.device))
    if level == "token":
        return difference
    if level != "sequence":
        raise ValueError(f"level: expected 'token' or 'sequence', got {level!r}")
    mean = difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(difference)


def _per_token(name: str, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, T] or [B, 1] of values [B, T] or [B], without gradient."""
    if values.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(f"{name}: expected [B] or [B, T] of {list(mask.shape)}, got {list(values.shape)}")
    values = values.detach()
    return values if values.dim() == 2 else values.unsqueeze(1)


def _matrices(**tensors: torch.Tensor) -> None:
    first = next(iter(tensors.values())).shape
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise ValueError(
                f"{name}: expected at least one row and one token, got {list(tensor.shape)}; skip the batch"
            )
        if tensor.dim() != 2 or tensor.shape != first:
            raise ValueError(f"{name}: expected [B, T], the same for {', '.join(tensors)}, got {list(tensor.shape)}")
