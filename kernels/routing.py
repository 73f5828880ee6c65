"""Router on the GPU: score, restrict to the best groups, select, renormalise, and the sums that the two losses need.

    p = softmax(logits) or sigmoid(logits)      indices = the top_k largest of p + bias      w = p[indices] / sum

The definition is `ornith_moe.routing`. One program owns whole tokens, so a token's bits depend on no other token; sums
over tokens are written per program and added up afterwards in a fixed order. There are no atomics: runs are bitwise
equal.

- Selection is `top_k` times the largest of int32 keys that order as the floats do, NaN on top. A chosen expert's key
  becomes `_TAKEN`, below that of -inf, so no expert is chosen twice whatever the preferences; equal keys go to the
  lowest id.
- Expert groups are an axis of their own, padded to a power of two like the experts within one; a lane is a (group,
  member) pair. Lanes ascend with expert ids, which keeps ties right.
- `tl.exp` errs by about |logit - max| * 2^-24 on a GPU: scores that agree to the last bits may change places.
- The scores of chosen experts are computed again from gathered logits, which gives the same bits as reading a lane.

Backward. h_k = w_k * (dw_k - sum_j w_j dw_j) is the gradient with respect to log p of choice k (without
renormalisation h_k = w_k * dw_k), so no division by a small sum appears:

    softmax   dlogits_e = [h of e, if chosen] - p_e * sum_k h_k
    sigmoid   dlogits_e = [h of e, if chosen] * (1 - p_e)

The losses add the gradient of q, the softmax or the sigmoids divided by their sum, and of logsumexp^2.

Legend: T tokens, E experts; GROUPS groups of SIZE experts (one group of E without groups).
"""

import torch
import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import bits_of, float_of, narrow, widen
from ornith_moe.kernels.launch import launch

_TAKEN = tl.constexpr(-0x80000000)  # below every key
_MINUS_INF = tl.constexpr(-0x7F800001)  # the key of -inf
_LAST = tl.constexpr(0x7FFFFFFF)
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def _not_zero(total):
    """A sum to divide by; NaN stays NaN, where `tl.maximum` would drop it and leave a quotient of 1e37."""
    return tl.where(total < _TINY, _TINY, total)


@triton.jit
def _key(x):
    """int32 that order as fp32 `x` do, NaN above all."""
    bits = bits_of(x)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LAST)


@triton.jit
def _largest(keys, ids):
    """Per row, the lowest of `ids` with the largest key."""
    top = tl.max(keys, axis=1)
    return tl.min(tl.where(keys == top[:, None], ids[None, :], _LAST), axis=1)


@triton.jit
def _restrict(keys, real, GROUPS: tl.constexpr, SIZE: tl.constexpr, OPEN: tl.constexpr, PAIR: tl.constexpr,
              BLOCK_T: tl.constexpr, GROUPS_PAD: tl.constexpr, SIZE_PAD: tl.constexpr):  # fmt: skip
    """`keys` with those outside the best OPEN groups set to that of -inf."""
    member = tl.arange(0, SIZE_PAD)[None, None, :]
    group = tl.arange(0, GROUPS_PAD)
    grouped = tl.reshape(keys, [BLOCK_T, GROUPS_PAD, SIZE_PAD])
    worth = tl.max(grouped, axis=2)
    if PAIR and SIZE > 1:
        first = tl.min(tl.where(grouped == worth[:, :, None], member, _LAST), axis=2)
        second = tl.max(tl.where(member == first[:, :, None], _TAKEN, grouped), axis=2)
        # the map from floats to keys is its own inverse
        best = float_of(worth ^ ((worth >> 31) & 0x7FFFFFFF)) + float_of(second ^ ((second >> 31) & 0x7FFFFFFF))
        worth = _key(best)
    worth = tl.where((group < GROUPS)[None, :], worth, _TAKEN)
    for _ in range(OPEN):
        pick = _largest(worth, group)
        worth = tl.where(group[None, :] == pick[:, None], _TAKEN, worth)
    grouped = tl.where((worth == _TAKEN)[:, :, None], grouped, _MINUS_INF)
    return tl.where(real[None, :], tl.reshape(grouped, [BLOCK_T, GROUPS_PAD * SIZE_PAD]), _TAKEN)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@triton.jit
def _load_logits(logits_ptr, tokens, expert, live, real, E):
    """[BLOCK_T, lanes] fp32, -inf in padded lanes, zero in padded tokens."""
    mask = live[:, None] & real[None, :]
    x = widen(tl.load(logits_ptr + tokens[:, None] * E + expert[None, :], mask=mask, other=0.0))
    return tl.where(real[None, :], x, float("-inf"))


@triton.jit
def route_forward_kernel(
    logits_ptr, bias_ptr, replay_ptr, indices_ptr, weights_ptr, counts_ptr, q_ptr, square_ptr, T,
    E: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, LOSSES: tl.constexpr,
    GROUPS: tl.constexpr, OPEN: tl.constexpr, BLOCK_T: tl.constexpr, GROUPS_PAD: tl.constexpr, SIZE_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: ceil(T / BLOCK_T). One program owns BLOCK_T tokens: it writes their indices and weights [T, TOP_K], and its
    row of counts [grid, E] (int16), of the sums of q [grid, E], and its sum of logsumexp^2 [grid].
    """
    pid = tl.program_id(0)
    SIZE: tl.constexpr = E // GROUPS
    lane = tl.arange(0, GROUPS_PAD * SIZE_PAD)
    expert = lane // SIZE_PAD * SIZE + lane % SIZE_PAD
    real = (lane % SIZE_PAD < SIZE) & (lane // SIZE_PAD < GROUPS)
    tokens = (pid * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    live = tokens < T

    x = _load_logits(logits_ptr, tokens, expert, live, real, E)
    if LOSSES or not SIGMOID:
        top = tl.max(x, axis=1)
        scores = tl.exp(x - top[:, None])
        total = tl.sum(scores, axis=1)
        if LOSSES:
            logsumexp = top + tl.log(total)
            tl.store(square_ptr + pid, tl.sum(tl.where(live, logsumexp * logsumexp, 0.0), axis=0))
        scores = tl.div_rn(scores, total[:, None])
    if SIGMOID:
        scores = _sigmoid(x)
    if LOSSES:
        q = scores
        if SIGMOID:
            q = tl.div_rn(q, _not_zero(tl.sum(q, axis=1))[:, None])
        q = tl.sum(tl.where(live[:, None], q, 0.0), axis=0)
        tl.store(q_ptr + pid.to(tl.int64) * E + expert, q, mask=real)

    preference = scores
    if bias_ptr is not None:
        preference += widen(tl.load(bias_ptr + expert, mask=real, other=0.0))[None, :]
    keys = tl.where(real[None, :], _key(preference), _TAKEN)
    if OPEN:
        PAIR: tl.constexpr = bias_ptr is not None
        keys = _restrict(keys, real, GROUPS, SIZE, OPEN, PAIR, BLOCK_T, GROUPS_PAD, SIZE_PAD)
    slot = tl.arange(0, K_PAD)[None, :]
    chosen = tl.zeros([BLOCK_T, K_PAD], tl.int32)
    for k in range(TOP_K):
        pick = _largest(keys, expert)
        if replay_ptr is not None:  # an id outside [0, E) is no record, as -1 is
            record = tl.load(replay_ptr + tokens * TOP_K + k, mask=live, other=0).to(tl.int64)
            pick = tl.where((record >= 0) & (record < E), record.to(tl.int32), pick)
        keys = tl.where(expert[None, :] == pick[:, None], _TAKEN, keys)
        chosen = tl.where(slot == k, pick[:, None], chosen)
    counts = tl.sum(((keys == _TAKEN) & live[:, None]).to(tl.int32), axis=0)
    tl.store(counts_ptr + pid.to(tl.int64) * E + expert, counts.to(tl.int16), mask=real)

    mask = live[:, None] & (slot < TOP_K)
    weights = widen(tl.load(logits_ptr + tokens[:, None] * E + chosen, mask=mask, other=0.0))
    if SIGMOID:
        weights = _sigmoid(weights)
    else:
        weights = tl.div_rn(tl.exp(weights - top[:, None]), total[:, None])
    if NORM:
        weights = tl.where(mask, weights, 0.0)
        weights = tl.div_rn(weights, _not_zero(tl.sum(weights, axis=1))[:, None])
    at = tokens[:, None] * TOP_K + slot
    tl.store(indices_ptr + at, chosen, mask=mask)
    tl.store(weights_ptr + at, weights, mask=mask)


@triton.jit
def route_backward_kernel(
    logits_ptr, indices_ptr, weights_ptr, dweights_ptr, dq_ptr, dsquare_ptr, dlogits_ptr, T,
    E: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr, LOSSES: tl.constexpr,
    BLOCK_T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid: ceil(T / BLOCK_T). One program owns BLOCK_T tokens and writes their dlogits [T, E]."""
    expert = tl.arange(0, LANES)
    real = expert < E
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    live = tokens < T

    total_weight = tl.zeros([BLOCK_T], tl.float32)
    mean = tl.zeros([BLOCK_T], tl.float32)
    if NORM:
        for k in range(TOP_K):
            w = tl.load(weights_ptr + tokens * TOP_K + k, mask=live, other=0.0)
            total_weight += w
            mean += w * tl.load(dweights_ptr + tokens * TOP_K + k, mask=live, other=0.0)
        # The weights add up to 1, unless the scores' sum underflowed and was replaced by a constant.
        mean = tl.where(total_weight > 0.99, mean, 0.0)
    total_h = tl.zeros([BLOCK_T], tl.float32)
    gradient = tl.zeros([BLOCK_T, LANES], tl.float32)
    for k in range(TOP_K):
        at = tokens * TOP_K + k
        w = tl.load(weights_ptr + at, mask=live, other=0.0)
        h = w * (tl.load(dweights_ptr + at, mask=live, other=0.0) - mean)
        total_h += h
        chosen = tl.load(indices_ptr + at, mask=live, other=0)
        gradient = tl.where(expert[None, :] == chosen[:, None], h[:, None], gradient)

    x = _load_logits(logits_ptr, tokens, expert, live, real, E)
    if LOSSES or not SIGMOID:
        top = tl.max(x, axis=1)
        p = tl.exp(x - top[:, None])
        total = tl.sum(p, axis=1)
        p = tl.div_rn(p, total[:, None])
        shift = -total_h
        if LOSSES:
            dsquare = 2 * (top + tl.log(total)) * tl.load(dsquare_ptr)
            dq = tl.load(dq_ptr + expert, mask=real, other=0.0)[None, :]
    if SIGMOID:
        scores = _sigmoid(x)
        if LOSSES:
            q = tl.div_rn(scores, _not_zero(tl.sum(scores, axis=1))[:, None])
            gradient += q * (dq - tl.sum(q * dq, axis=1)[:, None])
        gradient *= 1.0 - scores
        if LOSSES:
            gradient += p * dsquare[:, None]
    else:
        if LOSSES:
            shift += dsquare - tl.sum(p * dq, axis=1)
            gradient += p * dq
        gradient += p * shift[:, None]
    mask = live[:, None] & real[None, :]
    out = narrow(gradient, dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + tokens[:, None] * E + expert[None, :], out, mask=mask)


def _block(lanes: int) -> int:
    """Tokens of a program, from the number of experts alone: 4096 lanes are 32 for each thread of four warps."""
    return max(1, min(64, 4096 // lanes))


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None else x.contiguous()


def route_forward(
    logits: torch.Tensor, top_k: int, *, score: str = "softmax", norm_topk_prob: bool = True,
    bias: torch.Tensor | None = None, n_group: int | None = None, topk_group: int | None = None,
    replay: torch.Tensor | None = None, losses: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """The routing of logits [T, E] in fp32, fp16 or BF16; options as in `ornith_moe.route`, which checks them.

    Returns:
        indices [T, top_k] int32, weights [T, top_k] fp32 (not yet scaled), counts [E] int32, and with `losses` the sums
        over tokens of q [E] and of logsumexp^2 [] in fp32, else None twice. A `replay` id outside [0, E) is replaced.
    """
    T, E = logits.shape
    groups = n_group or 1
    groups_pad, size_pad = triton.next_power_of_2(groups), triton.next_power_of_2(E // groups)
    block = _block(groups_pad * size_pad)
    programs = triton.cdiv(T, block)

    def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    indices, weights = new(torch.int32, T, top_k), new(torch.float32, T, top_k)
    counts = new(torch.int16, programs, E)  # at most 64 each
    q, square = (new(torch.float32, programs, E), new(torch.float32, programs)) if losses else (None, None)
    launch(
        f"route {score}", route_forward_kernel, (programs,),
        reads={"logits_ptr": logits.contiguous(), "bias_ptr": _dense(bias), "replay_ptr": _dense(replay)},
        writes={
            "indices_ptr": indices, "weights_ptr": weights, "counts_ptr": counts, "q_ptr": q, "square_ptr": square
        },
        T=T, E=E, TOP_K=top_k, SIGMOID=score == "sigmoid", NORM=norm_topk_prob, LOSSES=losses, GROUPS=groups,
        OPEN=topk_group or 0, BLOCK_T=block, GROUPS_PAD=groups_pad, SIZE_PAD=size_pad,
        K_PAD=triton.next_power_of_2(top_k),
    )  # fmt: skip
    q_sum, square_sum = (None if rows is None else rows.sum(0) for rows in (q, square))
    return indices, weights, counts.sum(0, dtype=torch.int32), q_sum, square_sum


def route_backward(
    logits: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, dweights: torch.Tensor,
    dq: torch.Tensor | None = None, dsquare: torch.Tensor | None = None, *, score: str = "softmax",
    norm_topk_prob: bool = True,
) -> torch.Tensor:  # fmt: skip
    """dlogits [T, E] in the dtype of the logits, from what `route_forward` took and gave.

    Args:
        dweights: [T, top_k] fp32. dq: [E] fp32, dsquare: [] fp32, both or neither, the gradients of the two sums.
    """
    T, E = logits.shape
    lanes = triton.next_power_of_2(E)
    block = _block(lanes)
    dlogits = torch.empty(T, E, dtype=logits.dtype, device=logits.device)
    launch(
        f"route backward {score}", route_backward_kernel, (triton.cdiv(T, block),),
        reads={
            "logits_ptr": logits.contiguous(), "indices_ptr": indices, "weights_ptr": weights,
            "dweights_ptr": dweights.contiguous(), "dq_ptr": _dense(dq), "dsquare_ptr": dsquare,
        },
        writes={"dlogits_ptr": dlogits},
        T=T, E=E, TOP_K=indices.shape[1], SIGMOID=score == "sigmoid", NORM=norm_topk_prob, LOSSES=dq is not None,
        BLOCK_T=block, LANES=lanes,
    )  # fmt: skip
    return dlogits
