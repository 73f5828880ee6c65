"""How far a build's predictions are from its source's, measured in programs that we did not write.

    with open_client(source) as a, open_client(build) as b:
        compare(a, b, tokens, positions)

Two clients read the same token ids, and at each position p both say log P(token[p + 1] | token[0..p]) for every token
of the vocabulary. With P from `a` and Q from `b`, natural logarithms, so that units are nats per token:

    kl          sum over the vocabulary of P * (log P - log Q); mean and max over positions; 0 when equal
    top1        share of positions where both think the same token likeliest
    perplexity  exp(-mean log-probability of the token that follows), for each client; needs text, not random ids

The clients are ornith_moe/clients.py's. Compare trained weights: on random ones expert choices flip at the slightest
change and the figures say nothing about quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ornith_moe.clients import Client, encode
from ornith_moe.quant import files
from ornith_moe.quant.errors import VerificationError

MAX_TEXT_BYTES = 64 << 20
LISTED_SUM_ERROR = 1e-6  # llama.cpp's fp32 probabilities sum to one within this


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; field names are those of the CLI's JSON."""

    client_a: str
    client_b: str
    positions: int
    kl_mean: float  # nats per token, KL(a || b)
    kl_max: float
    top1: float  # from 0 to 1
    perplexity_a: float
    perplexity_b: float


def compare(a: Client, b: Client, tokens: np.ndarray, positions: Sequence[int] | None = None) -> Comparison:
    """Compare two clients' next-token distributions, KL(a || b).

    Args:
        a: the reference, usually the BF16 source.
        b: the build.
        tokens: ids of one window (L) or several (W, L); windows are independent.
        positions: ascending, each below L - 1, the same in every window; default `default_positions(L)`.

    Raises:
        ValueError: windows too short, positions out of range, ids outside a vocabulary.
        VerificationError: the clients' vocabularies differ.
    """
    windows = np.atleast_2d(np.asarray(tokens))
    positions = default_positions(windows.shape[1]) if positions is None else list(positions)
    if not positions or positions[-1] > windows.shape[1] - 2:
        raise ValueError(f"positions: expected some, each at most {windows.shape[1] - 2}, got {positions[-3:]}")
    if a.vocabulary != b.vocabulary:
        raise VerificationError(
            f"{a.name} knows {a.vocabulary} tokens and {b.name} {b.vocabulary}; builds of one checkpoint have the same"
        )
    p, q = log_probs(a, windows, positions), log_probs(b, windows, positions)
    targets = windows[:, np.asarray(positions) + 1].reshape(-1)
    divergence = kl_divergence(p, q)
    return Comparison(
        client_a=a.name,
        client_b=b.name,
        positions=len(targets),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1=top1_agreement(p, q),
        perplexity_a=perplexity(p, targets),
        perplexity_b=perplexity(q, targets),
    )


def log_probs(client: Client, tokens: np.ndarray, positions: Sequence[int]) -> np.ndarray:
    """float64 [W * P, V]: the client's log-probabilities at `positions` of each window, window by window.

    Raises:
        ValueError: tokens of another rank, ids outside the vocabulary, positions that do not ascend within a window.
    """
    windows = np.atleast_2d(np.asarray(tokens))
    if windows.ndim != 2 or windows.dtype.kind not in "iu":
        raise ValueError(f"tokens: expected integers (L) or (W, L), got {windows.dtype} {windows.shape}")
    if windows.size and not 0 <= windows.min() <= windows.max() < client.vocabulary:
        raise ValueError(f"tokens: expected ids from 0 to {client.vocabulary - 1}, got up to {windows.max()}")
    positions = [int(position) for position in positions]
    if positions != sorted(set(positions)) or (positions and not 0 <= positions[0] <= positions[-1] < windows.shape[1]):
        raise ValueError(f"positions: expected ascending indices below {windows.shape[1]}, got {positions[:8]}")
    return np.concatenate([client.log_probs(window.tolist(), positions) for window in windows])


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(P || Q) in nats for each row of log-probabilities [N, V]; where P is 0 a token adds nothing.

    Tokens that either side did not list (NaN) count as one token with what probability is left: never more than the
    divergence over single tokens, and zero for equal distributions.
    """
    pooled = np.isnan(p) | np.isnan(q)
    with np.errstate(invalid="ignore"):
        terms = np.where(pooled | np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(axis=-1)
    p_rest, q_rest = _mass(p, pooled), _mass(q, pooled)
    return terms + np.where(pooled.any(axis=-1), p_rest * np.log(p_rest / q_rest), 0.0)


def top1_agreement(p: np.ndarray, q: np.ndarray) -> float:
    """Share of rows of [N, V] whose likeliest token is the same; the lowest id wins a tie."""
    return float((np.nanargmax(p, axis=-1) == np.nanargmax(q, axis=-1)).mean())


def perplexity(p: np.ndarray, targets: np.ndarray) -> float:
    """exp of the mean negative log-probability that rows of [N, V] give to `targets` [N].

    A target that was not listed gets an even share of what is left, at most the least probability listed.
    """
    targets = np.asarray(targets)[:, None]
    found = np.take_along_axis(p, targets, axis=-1)[:, 0]
    unlisted = np.isnan(p)
    if np.isnan(found).any():
        share = np.log(_mass(p, unlisted) / np.maximum(unlisted.sum(axis=-1), 1))
        found = np.where(np.isnan(found), np.minimum(share, np.nanmin(p, axis=-1)), found)
    return float(np.exp(-found.mean()))


def _mass(p: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Probability of the chosen tokens of each row, from the others where one of the chosen was not listed."""
    inside = np.where(chosen, np.exp(p), 0.0).sum(axis=-1)  # NaN where one is unlisted
    outside = 1.0 - np.where(chosen, 0.0, np.exp(p)).sum(axis=-1)
    return np.maximum(np.where(np.isnan(inside), outside, inside), LISTED_SUM_ERROR)


def default_positions(length: int, count: int = 16) -> list[int]:
    """`count` positions spread evenly over a window of `length`, after a first eighth that only gives context."""
    first, last = length // 8, length - 2
    if last < first:
        raise ValueError(f"tokens: expected windows of at least 2 tokens, got {length}")
    return sorted({int(position) for position in np.linspace(first, last, min(count, last - first + 1)).round()})


def held_out_windows(tokens: Sequence[int], *, windows: int = 8, length: int = 256) -> np.ndarray:
    """int64 [W, L]: windows spread evenly over a text's ids, fewer or shorter where the text is short.

    Raises:
        ValueError: fewer than two tokens.
    """
    length = min(length, len(tokens))
    if length < 2:
        raise ValueError(f"tokens: expected a text of at least 2 tokens, got {len(tokens)}")
    windows = max(1, min(windows, len(tokens) // length))
    starts = np.linspace(0, len(tokens) - length, windows).round().astype(np.int64)
    return np.stack([np.asarray(tokens[start : start + length], dtype=np.int64) for start in starts])


def begin_windows(folder: str | Path, windows: np.ndarray) -> np.ndarray:
    """Windows [W, L] that begin with the token with which the tokenizer in `folder` begins texts, where it has one."""
    begin = encode(folder, "", special=True)
    return np.concatenate([np.full_like(windows[:, :1], begin[0]), windows[:, 1:]], axis=1) if begin else windows


def read_text(path: str | Path | None) -> str:
    """The text in a UTF-8 file; without one, the language reference in Python's own help, which every machine has."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    return files.read_text(path, what="a text file in UTF-8", limit=MAX_TEXT_BYTES, named=True)
