"""The experts function `ornith` inside transformers, against transformers' own `eager` and `grouped_mm`.

Models are tiny and random, in float32. Modules that only exist upstream in other layouts (transposed, interleaved,
biased, ungated, own gate, norm after the expert) are taken from the upstream models that have them; FP8 experts are
compared with `moe_mlp` on weights dequantized beforehand. Not covered: real expert parallelism over processes,
torch.compile, GPUs.
"""

import copy

import pytest
import torch
import transformers
from numeric import assert_close, assert_same_bits, relative_rms
from transformers import AutoModelForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import ornith_moe as om
import ornith_moe.hf
from ornith_moe.quant.fp8 import dequantize_fp8, quantize_fp8_block

IDS = torch.arange(2 * 23).view(2, 23) * 7 % 97


def tiny_config(**changes):
    return Qwen3_5MoeTextConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "mrope_section": [1, 1, 0],
                "mrope_interleaved": True,
            },
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            **changes,
        }
    )


@pytest.fixture
def model():
    """Weights large enough that every part matters, among them the router."""
    model = AutoModelForCausalLM.from_config(tiny_config(), experts_implementation="ornith")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def loss_and_gradients(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("other", ["eager", "grouped_mm"])
def test_loss_and_every_gradient(model, other):
    loss, gradients = loss_and_gradients(model, "ornith")
    expected_loss, expected = loss_and_gradients(model, other)
    assert_close("loss", loss, expected_loss, 1e-6)
    total = sum(g.double().square().sum() for g in expected.values()).sqrt().item()
    for name, gradient in gradients.items():
        error = (gradient.double() - expected[name].double()).norm().item()
        # a gradient below 1e-3 of the whole is a difference of larger terms: its own norm is no scale for rounding
        scale = max(expected[name].double().norm().item(), 1e-3 * total)
        assert error / scale < 1e-5, f"{name}: {error / scale:.2e}"


def test_gradient_checkpointing_gives_the_same_bits(model):
    loss, gradients = loss_and_gradients(model, "ornith")
    model.activation_checkpointing_enable()
    model.train()
    again, checkpointed = loss_and_gradients(model, "ornith")
    assert_same_bits("loss", again, loss)
    for name, gradient in gradients.items():
        assert_same_bits(name, checkpointed[name], gradient)


def test_generates_the_same_tokens(model):
    model.eval()
    tokens = {}
    for implementation in ("ornith", "eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        tokens[implementation] = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options).tolist()
    assert tokens["ornith"] == tokens["eager"] == tokens["grouped_mm"]
    assert len(tokens["ornith"][0]) == 23 + 16


class TestSelection:
    """Every way to choose an implementation ends in our function; `calls` counts that it is really ours."""

    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch):
        calls = []
        ours = ornith_moe.hf.moe_mlp
        monkeypatch.setattr(ornith_moe.hf, "moe_mlp", lambda *a, **k: calls.append(1) or ours(*a, **k))
        return calls

    def test_by_argument_of_from_pretrained(self, model, tmp_path, calls):
        model.save_pretrained(tmp_path)
        assert "experts_implementation" not in (tmp_path / "config.json").read_text()
        AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=IDS)
        assert not calls
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="ornith")(input_ids=IDS)
        assert len(calls) == 4

    def test_by_attribute_of_the_config(self, model, tmp_path, calls):
        model.save_pretrained(tmp_path)
        config = tiny_config()
        config._experts_implementation = "ornith"
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)(input_ids=IDS)
        assert len(calls) == 4

    def test_at_run_time(self, model, calls):
        model.set_experts_implementation("grouped_mm")
        model(input_ids=IDS)
        assert not calls
        model.set_experts_implementation("ornith")
        model(input_ids=IDS)
        assert len(calls) == 4


def experts_module(**changes):
    config = tiny_config(**changes)
    config._experts_implementation = "ornith"
    module = transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def test_sentinels_of_expert_parallelism():
    """Ids >= the local number of experts with weight 0, as a rank receives them."""
    module = experts_module()
    module._is_expert_parallel = True
    x, indices, weights = torch.randn(9, 40), torch.rand(9, 7).topk(3).indices, torch.rand(9, 3)
    indices[::2, 1], indices[4] = 7, 7
    weights = weights.masked_fill(indices == 7, 0)
    results = []
    for implementation in ("ornith", "grouped_mm"):
        module.config._experts_implementation = implementation
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        module.zero_grad()
        y = module(leaves[0], indices, leaves[1])
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())])
    for label, mine, expected in zip(("y", "dx", "dweights", "dgate_up", "ddown"), *results, strict=True):
        assert_close(label, mine, expected, 1e-5)


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"], ids=["backend", "loop"])
def test_no_tokens_keep_the_graph(hidden_act):
    module = experts_module(hidden_act=hidden_act)
    x, weights = torch.randn(0, 40, requires_grad=True), torch.rand(0, 3, requires_grad=True)
    module(x, torch.zeros(0, 3, dtype=torch.int64), weights).sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in (x, weights, *module.parameters()))


def test_float32_input_with_bf16_experts():
    """As under autocast, where a norm returns float32."""
    module = experts_module().bfloat16()
    x, indices, weights = torch.randn(9, 40), torch.rand(9, 7).topk(3).indices, torch.rand(9, 3)
    y = module(x, indices, weights)
    assert y.dtype == torch.float32
    expected = om.moe_mlp(x.bfloat16(), indices, weights, module.gate_up_proj, module.down_proj)
    assert_same_bits("y", y, expected.float())


def other_layouts():
    from transformers.models.aria.modeling_aria import AriaExperts, AriaTextConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts, MuseSparkTextConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts

    return {
        "gpt-oss: transposed, interleaved, biased, own gate": lambda: GptOssExperts(
            GptOssConfig(hidden_size=40, intermediate_size=24, num_local_experts=7)
        ),
        "nemotron-h: no gate": lambda: NemotronHExperts(
            NemotronHConfig(hidden_size=40, moe_intermediate_size=24, n_routed_experts=7)
        ),
        "aria: transposed": lambda: AriaExperts(
            AriaTextConfig(hidden_size=40, num_attention_heads=4, intermediate_size=24, moe_num_experts=7)
        ),
        "muse-spark: norm after the expert": lambda: MuseSparkExperts(
            MuseSparkTextConfig(moe_hidden_size=40, moe_intermediate_size=24, num_local_experts=7)
        ),
    }


@pytest.mark.parametrize("name", other_layouts())
def test_other_layouts_take_the_loop(name, monkeypatch):
    module = other_layouts()[name]()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    monkeypatch.setattr(ornith_moe.hf, "moe_mlp", None)  # the backend would compute something else
    x, indices, weights = torch.randn(9, 40), torch.rand(9, 7).topk(3).indices, torch.rand(9, 3)
    results = []
    for implementation in ("ornith", "grouped_mm"):
        module.config._experts_implementation = implementation
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        module.zero_grad()
        y = module(leaves[0], indices, leaves[1])
        y.square().sum().backward()
        gradients = {n: p.grad for n, p in module.named_parameters()}
        results.append({"y": y, "dx": leaves[0].grad, "dweights": leaves[1].grad} | gradients)
    for label, mine in results[0].items():
        assert_close(label, mine, results[1][label], 1e-5)


def test_own_gate_takes_the_loop_and_skips_sentinels(monkeypatch):
    """A clamped SwiGLU in a module whose flags are all plain, with infinite weights in the sentinel slots."""

    class Clamped(transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeExperts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.clamp(-0.5, 0.5).chunk(2, dim=-1)
            return self.act_fn(gate) * up

    module = experts_module()
    module.__class__ = Clamped
    monkeypatch.setattr(ornith_moe.hf, "moe_mlp", None)
    x, indices, weights = torch.randn(9, 40), torch.rand(9, 7).topk(3).indices, torch.rand(9, 3)
    indices[3, 1], indices[4] = 7, -1
    present = (indices >= 0) & (indices < 7)
    y = module(x, indices, weights.masked_fill(~present, torch.inf))
    module._is_expert_parallel = True
    module.config._experts_implementation = "grouped_mm"
    expected = module(x, indices.masked_fill(~present, 7), weights.masked_fill(~present, 0))
    assert_close("y", y, expected, 1e-6)


def fp8_module(block_size, inner=160, hidden=256):
    config = tiny_config(hidden_size=hidden, moe_intermediate_size=inner)
    config._experts_implementation = "ornith"
    decorated = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    module = decorated(config, block_size=block_size)
    dense = []
    for name in ("gate_up_proj", "down_proj"):
        parameter, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        weight = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
        block = tuple(-(-n // s) for n, s in zip(parameter.shape[1:], scale.shape[1:], strict=True))
        if block_size is not None and parameter.shape[1] > 128:
            block = tuple(block_size)
        q, s = quantize_fp8_block(weight, block=block)
        parameter.data, scale.data = q, s
        dense.append(dequantize_fp8(q, s, block=block, dtype=torch.float32))
    module.requires_grad_(False)
    return module, dense


@pytest.fixture
def restore_fp8_experts():
    """The decorator changes the class in place; transformers does so at every load, a test should not."""
    saved = {name: FP8Experts.__dict__[name] for name in ("__init__", "forward")}
    yield
    for name, value in saved.items():
        setattr(FP8Experts, name, value)


@pytest.mark.parametrize(
    ("block_size", "inner"),
    [([128, 128], 192), ([128, 128], 256), ([128, 128], 32), (None, 160)],
    ids=["partial-block", "whole-blocks", "two-scales-in-one-block", "one-scale-per-matrix"],
)
def test_fp8_experts_are_weight_only(restore_fp8_experts, block_size, inner):
    module, dense = fp8_module(block_size, inner=inner)
    indices = torch.rand(9, 7).topk(3).indices
    indices[2], indices[5, 1] = 7, 7  # sentinels
    x, weights = torch.randn(9, 256), torch.rand(9, 3).masked_fill(indices == 7, 0)
    mine, truth = ([t.clone().requires_grad_() for t in (x, weights)] for _ in range(2))
    y = module(mine[0], indices, mine[1])
    expected = om.moe_mlp(truth[0], indices, truth[1], *dense)
    dy = torch.randn(9, 256)
    y.backward(dy)
    expected.backward(dy)
    assert_close("y", y, expected, 1e-5)
    assert_close("dx", mine[0].grad, truth[0].grad, 1e-5)
    assert_close("dweights", mine[1].grad, truth[1].grad, 1e-5)


def test_fp8_experts_refuse_fp4(restore_fp8_experts):
    module, _ = fp8_module([128, 128], inner=256)
    module.down_proj = torch.nn.Parameter(module.down_proj.view(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"down_proj: 'ornith' serves FP8 experts in float8_e4m3fn, got torch.int8"):
        module(torch.randn(2, 256), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


def test_registered_in_both_registries():
    assert "ornith" in ALL_EXPERTS_FUNCTIONS and "ornith" in ALL_FP8_EXPERTS_FUNCTIONS


def test_a_copied_model_keeps_its_choice(model):
    clone = copy.deepcopy(model)
    assert isinstance(clone, Qwen3_5MoeForCausalLM) and clone.config._experts_implementation == "ornith"
    with torch.no_grad():
        assert relative_rms(clone(input_ids=IDS).logits, model(input_ids=IDS).logits) == 0
