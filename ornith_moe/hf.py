"""transformers adapter: `import ornith_moe.hf`, then `experts_implementation="ornith"`.

transformers calls a registered *experts function* on every forward of an experts module: (module, tokens [T, H], ids
[T, top_k], weights [T, top_k]) -> [T, H]. Importing this file registers `ornith` in its two registries:

    ALL_EXPERTS_FUNCTIONS       unquantized experts: plain SwiGLU goes to `moe_mlp`, every other layout through a loop
    ALL_FP8_EXPERTS_FUNCTIONS   fine-grained FP8 experts, weight-only: see `ornith_fp8_experts`

Select it with `from_pretrained(..., experts_implementation="ornith")`, `model.set_experts_implementation("ornith")` or,
where only the config can be reached, with the attribute `config._experts_implementation = "ornith"`. transformers does
not save the choice in config.json.

Plain means: gated, gate rows before up rows in one tensor [E, 2I, H], no bias, no norm after the expert, SiLU, and the
default gate function. The loop honours everything else that transformers declares on the module: transposed or
interleaved weights, biases, an own `_apply_gate` or activation, ungated experts, a norm after the expert.

Expert parallelism: the module then holds only its local experts, and ids >= that count are sentinels. They reach no
GEMM, add nothing to the output and get a zero gradient. T = 0 works and keeps every parameter in the graph.

Letters: T tokens, E experts of this module, H hidden, I expert intermediate, R valid slots.
"""

import torch
import torch.nn.functional as F
from transformers.activations import SiLUActivation
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from ornith_moe.functional import moe_mlp
from ornith_moe.quant.fp8 import dequantize_fp8


def ornith_experts(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function registered as `ornith`.

    Args:
        self: an experts module decorated by transformers' `use_experts_implementation`.
        hidden_states: [T, H]. top_k_index: [T, top_k] integers. top_k_weights: [T, top_k].

    Returns:
        [T, H] in the dtype of hidden_states. The experts compute in the dtype of their weights, as in transformers'
        `grouped_mm`, so a float32 input under autocast is cast first.

    Numerics: those of `moe_mlp`; deterministic, so gradient checkpointing recomputes the same bits.
    """
    if not _is_plain_swiglu(self):
        linears = _dense_linears(self)
        return _loop_over_experts(self, hidden_states, top_k_index, top_k_weights, linears, trained=self.parameters())
    x = hidden_states.to(self.gate_up_proj.dtype)
    y = moe_mlp(x, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)
    return y.to(hidden_states.dtype)


def ornith_fp8_experts(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The FP8 experts function registered as `ornith`: weight-only, y = experts(x) with w = q * scale.

    Each active expert is dequantized to the dtype of hidden_states when it is used, one at a time, in forward and again
    in backward; activations are not quantized. The weights are frozen; hidden_states and top_k_weights get gradients.

    Args:
        self: transformers' FP8Experts: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] in float8_e4m3fn, with
            `*_scale_inv` [E, ceil(N / 128), ceil(K / 128)] (float32, bfloat16 or UE8M0), or one scale per matrix.
        hidden_states: [T, H]. top_k_index: [T, top_k] integers. top_k_weights: [T, top_k].

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        ValueError: FP4-packed experts, or scales whose shape does not tile the weight.
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = _fp8_operand(self, up_name), _fp8_operand(self, "down_proj")

    def linears(expert):
        return tuple(
            lambda rows, w=w, s=s, block=block: _FrozenFP8Linear.apply(rows, w[expert], s[expert], block)
            for w, s, block in (up, down)
        )

    return _loop_over_experts(self, hidden_states, top_k_index, top_k_weights, linears, trained=())


def _is_plain_swiglu(module) -> bool:
    return (
        module.has_gate
        and module.is_concatenated
        and not (module.is_transposed or module.has_bias or module.has_post_expert_norm)
        and getattr(module._apply_gate, "__func__", None) is _default_apply_gate
        and (isinstance(module.act_fn, (torch.nn.SiLU, SiLUActivation)) or module.act_fn is F.silu)
    )


def _dense_linears(module):
    """expert -> (up, down), two functions of rows, for any layout that transformers declares."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"

    def split(name):  # unbind: its backward stacks the gradients once, where indexing adds E full-size zero tensors
        biases = getattr(module, f"{name}_bias").unbind(0) if module.has_bias else None
        return getattr(module, name).unbind(0), biases

    def linear(expert, weights, biases):
        weight = weights[expert].T if module.is_transposed else weights[expert]
        return lambda rows: F.linear(rows.to(weight.dtype), weight, None if biases is None else biases[expert])

    operands = split(up_name), split("down_proj")
    return lambda expert: tuple(linear(expert, *operand) for operand in operands)


def _loop_over_experts(module, hidden_states, top_k_index, top_k_weights, linears, trained):
    """y[t] = sum over k, in order, of weights[t, k] * expert(x[t]), through the module's own activation and norm."""
    (tokens, top_k), experts = top_k_index.shape, module.down_proj.shape[0]
    ids = top_k_index.reshape(-1)
    keys = torch.where((ids >= 0) & (ids < experts), ids, experts)  # sentinels sort to the end
    slots = keys.argsort(stable=True)
    outputs, start = [], 0
    # host sync: the loop needs the counts; this path is for layouts that no kernel serves
    for expert, count in enumerate(keys.bincount(minlength=experts + 1)[:experts].tolist()):
        if count == 0:
            continue
        up, down = linears(expert)
        rows = up(hidden_states[slots[start : start + count] // top_k])
        rows = down(module._apply_gate(rows) if module.has_gate else module.act_fn(rows))
        outputs.append(module.post_expert_norm(rows) if module.has_post_expert_norm else rows)
        start += count
    outputs.append(hidden_states.new_zeros(slots.numel() - start, hidden_states.shape[1]))  # rows of the sentinels
    by_slot = torch.cat(outputs)[slots.argsort()].unflatten(0, (tokens, top_k))  # [T, top_k, H]
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    weights = top_k_weights.to(dtype).masked_fill((keys == experts).view(tokens, top_k), 0)
    y = (by_slot.to(dtype) * weights.unsqueeze(-1)).sum(1)
    # sums over nothing: x and every trained parameter stay in the graph when no expert was active, at no cost
    return (y + sum(t[:0].sum() for t in (hidden_states, *trained))).to(hidden_states.dtype)


def _fp8_operand(module, name):
    """(weight [E, N, K], scale [E, ., .], block): block is the (rows, columns) of the weight that share a scale."""
    weight, scale = getattr(module, name).detach(), getattr(module, f"{name}_scale_inv").detach()
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"{name}: 'ornith' serves FP8 experts in float8_e4m3fn, got {weight.dtype}; "
            "choose experts_implementation='grouped_mm' for FP4-packed experts"
        )
    block = []
    declared_block = module.block_size or (None, None)
    for size, scales, declared in zip(weight.shape[1:], scale.shape[1:], declared_block, strict=True):
        # transformers keeps two row scales for a gate_up that is smaller than a block, and for one without blocks
        block.append(declared if declared and -(-size // declared) == scales else -(-size // scales))
    return weight, scale, tuple(block)


class _FrozenFP8Linear(torch.autograd.Function):
    """x @ dequantize(q, scale)^T; keeps q, not the dequantized weight, for the gradient of x."""

    @staticmethod
    def forward(ctx, x, q, scale, block):
        ctx.save_for_backward(q, scale)
        ctx.block = block
        return x @ dequantize_fp8(q, scale, block=block, dtype=x.dtype).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, scale = ctx.saved_tensors
        return dy @ dequantize_fp8(q, scale, block=ctx.block, dtype=dy.dtype), None, None, None


ALL_EXPERTS_FUNCTIONS.register("ornith", ornith_experts)
ALL_FP8_EXPERTS_FUNCTIONS.register("ornith", ornith_fp8_experts)
