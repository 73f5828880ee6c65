"""The mismatch meter: how far the trainer's numbers are from those of the program that sampled.

    d[t]       = trainer's log-prob of the sampled token - rollout's
    k1         = mean of -d                         unbiased for KL(rollout || trainer), may be negative
    k3         = mean of exp(d) - 1 - d             unbiased too, never negative
    KL         = sum over v of p (log p - log q)    exact, p the rollout's logits, q the trainer's
    ratio      = exp(d)                             what `loss.mismatch_weights` truncates
    flipped[l] = share of the rollout's experts in layer l that the trainer would not visit

What is read off: a policy in FP8 whose trainer and engine share one quantizer has d = 0 in every token, not a small d.
Anything else has a name: `measure` takes the same batch without and with replay, which shows the part that routing
makes; `compare_quantizers` counts codes, which shows the part that quantization makes.

Numerics: sums in float64; deterministic; no gradients. Sources: k1 and k3, Schulman 2020 ("Approximating KL
divergence"); fp32 masters against BF16 weights, xtuner#2044; the rest ours.

Letters: B rows, T tokens of a row, V vocabulary, L routers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ornith_moe import replay
from ornith_moe.quant.fp8 import E4M3_MAX, MIN_SCALE, dequantize_fp8, quantize_fp8_block
from ornith_moe.routing_records import MISSING

Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Sampled(NamedTuple):
    """What the log-probs of sampled tokens say.

    Attributes:
        k1, k3: nats per token, estimates of KL(rollout || trainer).
        ratio_min, ratio_mean, ratio_max: of trainer to rollout.
        equal: share of tokens whose two log-probs are the same number.
        tokens: how many. Without any the rest is 0, and ratios and `equal` are 1.
    """

    k1: float
    k3: float
    ratio_min: float
    ratio_mean: float
    ratio_max: float
    equal: float
    tokens: int


@torch.no_grad()
def sampled_kl(trainer_logps: torch.Tensor, rollout_logps: torch.Tensor, mask: torch.Tensor) -> Sampled:
    """k1, k3 and ratios over the tokens in `mask`, all [B, T]; what it leaves out may hold anything.

    Raises:
        ValueError: shapes.
    Example:
        >>> sampled_kl(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2))[:2]
        (0.0, 0.0)
    """
    if not trainer_logps.shape == rollout_logps.shape == mask.shape:
        raise ValueError(
            "trainer_logps, rollout_logps, mask: expected one shape, got "
            f"{list(trainer_logps.shape)}, {list(rollout_logps.shape)} and {list(mask.shape)}"
        )
    live = mask.bool()
    d = (trainer_logps[live].double() - rollout_logps[live].double()).cpu()
    if not len(d):
        return Sampled(0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0)
    ratio = d.exp()
    return Sampled(
        -d.mean().item() + 0.0,
        (torch.expm1(d) - d).clamp(min=0).mean().item(),
        ratio.min().item(),
        ratio.mean().item(),
        ratio.max().item(),
        (d == 0).double().mean().item(),
        len(d),
    )


@torch.no_grad()
def exact_kl(rollout_logits: torch.Tensor, trainer_logits: torch.Tensor) -> torch.Tensor:
    """KL(rollout || trainer) in nats at each position: [..., V] twice -> [...] float64.

    0 exactly where the logits have the same bits. A token that the rollout gives no probability adds nothing.
    """
    if rollout_logits.shape != trainer_logits.shape:
        raise ValueError(
            "rollout_logits, trainer_logits: expected one shape, got "
            f"{list(rollout_logits.shape)} and {list(trainer_logits.shape)}"
        )
    log_p, log_q = rollout_logits.double().log_softmax(-1), trainer_logits.double().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.where(log_p > -torch.inf, 0.0).sum(-1)


@torch.no_grad()
def flipped_experts(rollout: torch.Tensor, trainer: torch.Tensor) -> torch.Tensor:
    """Per layer, the share of the rollout's experts that the trainer did not visit: [L] float64, NaN without records.

    Args:
        rollout, trainer: records [tokens, L, top_k] (`ornith_moe.routing_records`), the same tokens in both. A token
            without a record, -1, on either side is left out. The order of slots does not matter.
    """
    if rollout.dim() != 3 or rollout.shape != trainer.shape:
        raise ValueError(
            "rollout, trainer: expected two records [tokens, layers, top_k] of the same tokens, got "
            f"{list(rollout.shape)} and {list(trainer.shape)}"
        )
    known = ((rollout != MISSING) & (trainer != MISSING)).all(-1)  # [tokens, L]
    kept = (rollout.unsqueeze(-1) == trainer.unsqueeze(-2)).any(-1).sum(-1)
    flips = torch.where(known, rollout.shape[-1] - kept, 0).sum(0).double()
    return flips / (known.sum(0) * rollout.shape[-1])


class Mismatch(NamedTuple):
    """One batch, twice.

    Attributes:
        free, replayed: log-probs of the trainer with its own routing, and with the rollout's.
        flipped: [L] float64, experts that flip without replay. layers: the routers' names.
    """

    free: Sampled
    replayed: Sampled
    flipped: torch.Tensor
    layers: tuple[str, ...]


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    rollout_logps: torch.Tensor,
    mask: torch.Tensor,
    records: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    **inputs: Any,
) -> Mismatch:
    """The trainer's mismatch on rollouts, before and after replay: two forward passes, no gradient.

    Args:
        model: a causal language model with routers that `ornith_moe.replay` knows, in the mode it trains in.
        input_ids, mask, rollout_logps: [B, T]; at a position in the mask, the engine's log-prob of that token.
        records: [B * T, L, top_k], experts that the engine visited (`replay.pack`).
        temperature: the engine's, if its log-probs are those after it.
        attention_mask, inputs: further arguments of the model.
    """
    if not input_ids.shape == rollout_logps.shape == mask.shape or mask[:, :1].any():
        raise ValueError(
            "input_ids, rollout_logps, mask: expected [B, T] each, and nothing in the mask at position 0, got "
            f"{list(input_ids.shape)}, {list(rollout_logps.shape)} and {list(mask.shape)}"
        )

    def read() -> Sampled:
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
        logps = torch.zeros_like(rollout_logps, dtype=torch.float32)
        logps[:, 1:] = token_logps(output.logits[:, :-1], input_ids[:, 1:], temperature)
        return sampled_kl(logps, rollout_logps, mask)

    with replay.record(model) as trace:
        free = read()
    with replay.replay(model, records):
        replayed = read()
    own = next(iter(trace.values())).cpu()
    return Mismatch(free, replayed, flipped_experts(records.cpu(), own), trace.layers)


def token_logps(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log softmax(logits / temperature) at `ids`, in fp32: [B, T, V], [B, T] -> [B, T]. One row at a time in memory."""
    rows = [
        F.log_softmax(row.float() / temperature, -1).gather(-1, at[:, None])[:, 0]
        for row, at in zip(logits, ids, strict=True)
    ]
    return torch.stack(rows)


class Difference(NamedTuple):
    """Shares of e4m3 codes and of scales that differ, and the relative error between what they mean, in RMS."""

    codes: float
    scales: float
    relative_rms: float


@torch.no_grad()
def compare_quantizers(
    weight: torch.Tensor, one: Quantizer | None = None, other: Quantizer | None = None
) -> Difference:
    """How two quantizers differ on a weight [..., N, K]; by default ours, of BF16 scales, against `quantize_masters`.

    0, 0, 0 for equal bits, which is what "one quantizer" means.
    """
    (q, s), (q2, s2) = (one or _as_files_have_it)(weight), (other or quantize_masters)(weight)
    if q.shape != q2.shape or s.shape != s2.shape:
        raise ValueError(
            f"one, other: expected codes and scales of one shape, got {list(q.shape)}, {list(s.shape)} and "
            f"{list(q2.shape)}, {list(s2.shape)}"
        )
    codes = (q.view(torch.uint8) != q2.view(torch.uint8)).double().mean().item()
    scales = (s.float() != s2.float()).double().mean().item()
    values, values2 = (dequantize_fp8(*pair, dtype=torch.float32).double() for pair in ((q, s), (q2, s2)))
    norm = values.norm().item()
    return Difference(codes, scales, (values - values2).norm().item() / norm if norm else 0.0)


def quantize_masters(weight: torch.Tensor, scale: str = "bf16") -> tuple[torch.Tensor, torch.Tensor]:
    """What a trainer does that quantizes its fp32 masters as they are: our rule per 128 x 128 without the BF16 first.

    The policy it trains is not the one that an engine serves after a sync in BF16. Not for use, but to measure against.
    """
    *lead, n, k = weight.shape
    padded = F.pad(weight.float(), (0, -k % 128, 0, -n % 128))
    blocks = padded.view(*lead, padded.shape[-2] // 128, 128, padded.shape[-1] // 128, 128)
    peak = blocks.abs().amax((-3, -1), keepdim=True)
    s = torch.where(peak > 0, (peak / E4M3_MAX).clamp(min=MIN_SCALE), torch.ones_like(peak))
    s = s.bfloat16().float() if scale == "bf16" else s
    q = (blocks / s).to(torch.float8_e4m3fn).view(padded.shape)[..., :n, :k].contiguous()
    s = s.squeeze(-1).squeeze(-2)
    return q, s.bfloat16() if scale == "bf16" else s


def _as_files_have_it(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_fp8_block(weight, scale="bf16")
