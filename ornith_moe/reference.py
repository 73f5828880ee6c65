"""The routed-experts MLP in plain torch: the truth that every backend is compared with.

    y[t] = sum over k of weights[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])),  e = indices[t, k]

A loop over experts, differentiated by autograd, in float32 (or float64 if any operand is). It is written to be
believed, not to be fast. Ids outside [0, E) belong to no expert here and contribute nothing.

Letters: T tokens, E experts, H hidden, I expert intermediate, top_k slots per token.
"""

import torch
import torch.nn.functional as F


def moe_mlp_reference(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """y = sum_k weights_k * down(silu(gate(x)) * up(x)), one expert after the other.

    Args:
        x: [T, H]. indices: [T, top_k] integers. weights: [T, top_k].
        gate_up_proj: [E, 2I, H], gate rows first. down_proj: [E, H, I].

    Returns:
        y [T, H] in the dtype of x. Autograd reaches every floating-point argument, also when T = 0.

    Numerics: everything in float32, or in float64 if any argument is float64; one rounding at the end.

    Example:
        >>> import torch
        >>> from ornith_moe.reference import moe_mlp_reference
        >>> x, w13, w2 = torch.ones(1, 2), torch.ones(3, 8, 2), torch.ones(3, 2, 4)
        >>> moe_mlp_reference(x, torch.tensor([[2]]), torch.tensor([[0.5]]), w13, w2)
        tensor([[7.0464, 7.0464]])
    """
    operands = (x, weights, gate_up_proj, down_proj)
    dtype = torch.float64 if torch.float64 in {t.dtype for t in operands} else torch.float32
    rows, weights, gate_up, down = (t.to(dtype) for t in operands)
    y = torch.zeros_like(rows) + 0 * rows
    # unbind, not indexing: its backward stacks the gradients once instead of adding a full-size zero tensor per expert
    for expert, (w13, w2) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = F.linear(rows[token], w13).chunk(2, dim=-1)  # [m, I] each
        out = F.linear(F.silu(gate) * up, w2) * weights[token, slot].unsqueeze(-1)  # [m, H]
        y = y.index_add(0, token, out)
    return y.to(x.dtype)
