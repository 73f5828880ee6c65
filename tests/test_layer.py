"""The MoE block against transformers' Qwen3.5-MoE block, from whose state dict it loads.

Not covered: speed, GPUs.
"""

from dataclasses import replace

import pytest
import torch
from numeric import assert_close, assert_same_bits

import ornith_moe as om

CONFIG = om.MoEConfig(
    hidden_size=40, intermediate_size=24, num_experts=7, top_k=3, shared_intermediate_size=20, router_logits="model"
)


def qwen_block():
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

    config = Qwen3_5MoeTextConfig(
        hidden_size=40,
        moe_intermediate_size=24,
        num_experts=7,
        num_experts_per_tok=3,
        shared_expert_intermediate_size=20,
    )
    config._experts_implementation = "eager"
    block = Qwen3_5MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block


def test_equals_the_qwen_block_in_value_and_every_gradient():
    block = qwen_block()
    moe = om.MoE(CONFIG)
    moe.load_state_dict(block.state_dict())
    x, dy = torch.randn(2, 9, 40), torch.randn(2, 9, 40)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = moe(mine), block(theirs)
    y.backward(dy)
    expected.backward(dy)
    assert_close("y", y, expected, 1e-6)
    assert_close("dx", mine.grad, theirs.grad, 1e-5)
    gradients = dict(block.named_parameters())
    for name, parameter in moe.named_parameters():
        assert_close(name, parameter.grad, gradients.pop(name).grad, 1e-5)
    assert not gradients


def test_bf16_with_float32_logits_routes_by_float32():
    moe = om.MoE(replace(CONFIG, router_logits="float32")).bfloat16()
    x = torch.randn(100, 40).bfloat16()
    routing = moe.route(x)
    expected = om.route(x.double() @ moe.gate.weight.double().T, 3)
    assert_same_bits("indices", routing.indices, expected.indices)
    assert_close("weights", routing.weights, expected.weights, 1e-5)
    assert moe(x).dtype == torch.bfloat16


def test_without_shared_expert():
    moe = om.MoE(replace(CONFIG, shared_intermediate_size=0))
    assert sorted(moe.state_dict()) == ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
    x = torch.randn(5, 40)
    routing = moe.route(x)
    weights = (moe.experts.gate_up_proj, moe.experts.down_proj)
    assert_same_bits("y", moe(x), om.moe_mlp(x, routing.indices, routing.weights, *weights))


def test_replay_reproduces_and_steers():
    moe = om.MoE(CONFIG)
    x = torch.randn(9, 40)
    recorded = moe.route(x).indices
    assert_same_bits("y", moe(x, replay=recorded), moe(x))
    other = torch.tensor([[4, 5, 6]] * 9)
    assert (moe(x, replay=other) != moe(x)).any()


@pytest.mark.parametrize("recipe", ["fp8", "fp8_full", "fp8_channel"])
def test_fp8_descends_and_replays(recipe):
    """The choice is the recorded one, and the router learns from it: its gradient is that of the weights alone."""
    moe = om.MoE(replace(CONFIG, intermediate_size=128, recipe=recipe))
    x, target = torch.randn(63, 40), torch.randn(63, 40)
    record = om.MoE(replace(CONFIG, intermediate_size=128)).route(x).indices  # another router's choice
    optimizer = torch.optim.Adam(moe.parameters(), 1e-2)
    losses, start = [], moe.gate.weight.detach().clone()
    for _ in range(20):
        routing = moe.route(x, replay=record)
        assert_same_bits("indices", routing.indices, record)
        loss = (moe(x, replay=record) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.any() and p.grad.isfinite().all() for p in moe.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert (moe.gate.weight - start).norm() > 0.1 * start.norm()


def test_compiles_to_one_graph():
    moe = om.MoE(replace(CONFIG, intermediate_size=128, recipe="fp8"))
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x, record = torch.randn(2, 9, 40), moe.route(torch.randn(18, 40)).indices
    got, expected = compiled(x, replay=record), moe(x, replay=record)
    assert_same_bits("y", got, expected)
    gradients = [torch.autograd.grad(y.sum(), list(moe.parameters())) for y in (got, expected)]
    for (name, _), a, b in zip(moe.named_parameters(), *gradients, strict=True):
        assert_same_bits(name, a, b)
    torch._dynamo.reset()


def test_no_tokens():
    moe = om.MoE(CONFIG)
    y = moe(torch.randn(2, 0, 40))
    y.sum().backward()
    assert y.shape == (2, 0, 40) and all(p.grad is not None for p in moe.parameters())


def test_a_step_of_descent_lowers_the_loss():
    moe = om.MoE(CONFIG)
    x, target = torch.randn(63, 40), torch.randn(63, 40)
    optimizer = torch.optim.Adam(moe.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = (moe(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 0}, "hidden_size: expected at least 1"),
        ({"top_k": 8}, "top_k: expected 1 to 7"),
        ({"shared_intermediate_size": -1}, "shared_intermediate_size: expected 0 or more"),
        ({"score": "tanh"}, "score: expected 'softmax' or 'sigmoid'"),
        ({"n_group": 2, "topk_group": 1}, "n_group: expected a divisor"),
        ({"router_logits": "bf16"}, "router_logits: expected 'float32' or 'model'"),
        ({"recipe": "fp4"}, "recipe: expected one of bf16, fp8, fp8_full, fp8_channel, got 'fp4'"),
        ({"recipe": "fp8"}, "recipe: 'fp8' needs an expert intermediate size in multiples of 128, .*, got I = 24"),
        ({"scale": "fp16"}, "scale: expected 'fp32', 'bf16' or 'ue8m0', got 'fp16'"),
        ({"backend": "cuda"}, "backend: expected one of triton, cpu, reference or None, got 'cuda'"),
    ],
    ids=str,
)
def test_config_refuses_contradictions(change, says):
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **change)


def test_refuses_a_wrong_width():
    with pytest.raises(ValueError, match=r"x: expected \[..., H\] with H = 40, got \[3, 41\]"):
        om.MoE(CONFIG)(torch.randn(3, 41))


def test_a_folded_shared_expert_is_the_same_layer():
    plain = om.MoE(replace(CONFIG, shared_intermediate_size=CONFIG.intermediate_size)).double()
    folded = om.MoE(replace(plain.config, fold_shared=True)).double()
    state = plain.state_dict()
    shared = {name: state.pop(f"shared_expert.{name}_proj.weight") for name in ("gate", "up", "down")}
    state["experts.gate_up_proj"] = torch.cat(
        (state["experts.gate_up_proj"], torch.cat((shared["gate"], shared["up"]))[None])
    )
    state["experts.down_proj"] = torch.cat((state["experts.down_proj"], shared["down"][None]))
    folded.load_state_dict(state)
    x = torch.randn(9, CONFIG.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-5, atol=1e-9)  # the routing weights are fp32
    with pytest.raises(ValueError, match="fold_shared: expected shared_intermediate_size equal"):
        replace(CONFIG, fold_shared=True, shared_intermediate_size=CONFIG.intermediate_size + 1)
