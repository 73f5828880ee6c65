"""The experts function `ornith` inside transformers, against transformers' own `eager` and `grouped_mm`.

Models are tiny and random, in float32. Modules that only exist upstream in other layouts (transposed, interleaved,
biased, ungated, own gate, norm after the expert) are taken from the upstream models that have them. FP8 experts are in
test_hf_fp8, expert parallelism and FSDP2 over processes in test_parallel. On a GPU families and words run there.
"""

import copy
import doctest
import itertools
import logging

import hf_models
import pytest
import torch
import transformers
from hf_models import FAMILIES, IDS, gradient_error, loss_and_gradients
from moe_cases import DEVICE
from numeric import assert_close, assert_same_bits, relative_rms
from transformers import AutoModelForCausalLM, Qwen3_5MoeForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

import ornith_moe as om
import ornith_moe.hf
from ornith_moe.backend.reference import moe_mlp_reference
from ornith_moe.quant.recipes import RECIPES


@pytest.fixture
def model():
    return hf_models.model()


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that reach our function."""
    calls = []
    ours = ornith_moe.hf.moe_mlp
    monkeypatch.setattr(ornith_moe.hf, "moe_mlp", lambda *a, **k: calls.append(a) or ours(*a, **k))
    return calls


@pytest.mark.device
@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_loss_and_every_gradient(self, family, calls):
        model = hf_models.model(family, device=DEVICE)
        loss, gradients = loss_and_gradients(model, "ornith")
        layers = model.config.num_hidden_layers
        fused = [explained.startswith("fused") for explained in ornith_moe.hf.explain(model).values()]
        assert fused == [family != "gpt_oss"] * layers and len(calls) == sum(fused)
        assert len(gradients) == len(list(model.parameters()))
        for other in ("eager", "grouped_mm"):
            expected_loss, expected = loss_and_gradients(model, other)
            assert_close("loss", loss, expected_loss, 1e-6)
            error, name = gradient_error(gradients, expected)
            assert error < 1e-5, f"{other}, {name}: {error:.2e}"

    def test_gradient_checkpointing_gives_the_same_bits(self, family):
        model = hf_models.model(family, device=DEVICE)
        loss, gradients = loss_and_gradients(model)
        model.train()
        for reentrant in (False, True):
            hf_models.checkpoint_activations(model, use_reentrant=reentrant)
            again, checkpointed = loss_and_gradients(model)
            assert_same_bits("loss", again, loss)
            for name, gradient in gradients.items():
                assert_same_bits(name, checkpointed[name], gradient)

    def test_generates_the_same_tokens(self, family):
        model = hf_models.model(family, device=DEVICE)
        tokens = {}
        for implementation in ("ornith", "eager"):
            model.set_experts_implementation(implementation)
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            ids = IDS.to(DEVICE)
            tokens[implementation] = model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()
        assert tokens["ornith"] == tokens["eager"]
        assert len(tokens["ornith"][0]) == 23 + 12


def test_in_float64_only_the_order_of_sums_differs():
    """What float32 hides in rounding: a wrong term of relative size 1e-9 would show."""
    model = hf_models.model("qwen3_moe").double()
    loss, gradients = loss_and_gradients(model, "ornith")
    expected_loss, expected = loss_and_gradients(model, "eager")
    assert_close("loss", loss, expected_loss, 1e-9)
    assert gradient_error(gradients, expected)[0] < 1e-9


class TestSelection:
    """Every way to choose an implementation ends in our function."""

    def test_by_argument_of_from_pretrained(self, model, tmp_path, calls):
        model.save_pretrained(tmp_path)
        assert "experts_implementation" not in (tmp_path / "config.json").read_text()
        AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=IDS)
        assert not calls
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="ornith")(input_ids=IDS)
        assert len(calls) == 4

    def test_by_attribute_of_the_config(self, model, tmp_path, calls):
        """What verl's `override_config` does: `setattr` on the loaded config, after `external_lib` was imported."""
        model.save_pretrained(tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        for key, value in {"_experts_implementation": "ornith"}.items():
            setattr(config, key, value)
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)(input_ids=IDS)
        assert len(calls) == 4

    def test_at_run_time(self, model, calls):
        model.set_experts_implementation("grouped_mm")
        model(input_ids=IDS)
        assert not calls
        model.set_experts_implementation("ornith")
        model(input_ids=IDS)
        assert len(calls) == 4

    def test_a_copied_model_keeps_its_choice(self, model):
        clone = copy.deepcopy(model)
        assert isinstance(clone, Qwen3_5MoeForCausalLM) and clone.config._experts_implementation == "ornith"
        with torch.no_grad():
            assert relative_rms(clone(input_ids=IDS).logits, model(input_ids=IDS).logits) == 0

    def test_a_word_for_each_recipe_is_in_both_registries(self):
        assert [*ornith_moe.hf.WORDS] == ["ornith", "ornith_fp8", "ornith_fp8_full", "ornith_fp8_channel"]
        assert [recipe.name for recipe in ornith_moe.hf.WORDS.values()] == [*RECIPES]
        for registry, word in itertools.product(
            (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS), ornith_moe.hf.WORDS
        ):
            assert registry[word].__name__ == f"{word}_experts"

    @pytest.mark.parametrize("word", ornith_moe.hf.WORDS)
    def test_every_word_trains_by_its_recipe(self, word):
        """Loss and all gradients of a model, against the same model around the reference of the recipe.

        In a third of models a cast to FP8 rounds some value the other way, as sums before it differ in their last bit:
        up to 2e-4 of the loss and 3e-2 of a gradient. In all others nothing but fp32 is left; eight have one of these.
        """
        recipe, errors = ornith_moe.hf.WORDS[word].name, []

        def reference(self, x, indices, weights):
            weights_of = self.gate_up_proj, self.down_proj
            return moe_mlp_reference(x, indices, weights, *weights_of, recipe=recipe, scale="bf16")

        ALL_EXPERTS_FUNCTIONS.register("reference", reference)
        try:
            for _ in range(1 if recipe == "bf16" else 8):
                model = hf_models.model("qwen3_moe", word, hidden_size=128, moe_intermediate_size=128)
                told = f"fused: plain SwiGLU, recipe {recipe}, cpu backend"
                assert set(ornith_moe.hf.explain(model).values()) == {told}
                loss, gradients = loss_and_gradients(model)
                expected_loss, expected = loss_and_gradients(model, "reference")
                error, worst = hf_models.gradient_error(gradients, expected)
                errors.append((abs(loss - expected_loss).item() / expected_loss.item(), error, worst))
                if errors[-1][0] < 1e-5 and error < 1e-4:
                    break
            else:
                pytest.fail(f"(of the loss, of the worst gradient, its parameter): {errors}")
        finally:
            ALL_EXPERTS_FUNCTIONS._global_mapping.pop("reference")


@pytest.mark.device
@pytest.mark.parametrize("word", ornith_moe.hf.WORDS)
def test_a_word_is_moe_mlp_on_the_device_of_the_module(word):
    """Bit for bit, forward and backward; what those bits are worth is for test_gpu and tests/kernels."""
    module = experts_module(word, hidden_size=128, moe_intermediate_size=128).to(DEVICE)
    x, indices, weights = (t.to(DEVICE) for t in (torch.randn(9, 128), *inputs()[1:]))
    recipe, masters = ornith_moe.hf.WORDS[word].name, (module.gate_up_proj, module.down_proj)
    got, expected = (
        (y.detach(), *torch.autograd.grad(y, masters, torch.ones_like(y)))
        for y in (module(x, indices, weights), om.moe_mlp(x, indices, weights, *masters, recipe=recipe, scale="bf16"))
    )
    for name, a, b in zip(("y", "dgate_up", "ddown"), got, expected, strict=True):
        assert_same_bits(name, a, b)


def experts_module(implementation="ornith", **changes):
    config = hf_models.config(**changes)
    config._experts_implementation = implementation
    module = Qwen3_5MoeExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def inputs(tokens=9, top_k=3):
    return torch.randn(tokens, 40), torch.rand(tokens, 7).topk(top_k).indices, torch.rand(tokens, top_k)


def outputs_and_gradients(module, implementation, x, indices, weights):
    module.config._experts_implementation = implementation
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    module.zero_grad()
    y = module(leaves[0], indices, leaves[1])
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": leaves[0].grad, "dweights": leaves[1].grad} | gradients


def assert_equals(module, other, *operands, tolerance=1e-5):
    mine = outputs_and_gradients(module, "ornith", *operands)
    expected = outputs_and_gradients(module, other, *operands)
    for label, value in mine.items():
        assert_close(label, value, expected[label], tolerance)


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"], ids=["fused", "grouped_mm"])
class TestOddInputs:
    """What expert parallelism and decoding hand over."""

    def test_sentinels(self, hidden_act):
        """Ids >= the local number of experts with weight 0, as a rank receives them under all_reduce."""
        module = experts_module(hidden_act=hidden_act)
        if not hasattr(module, "_is_expert_parallel"):
            pytest.skip(f"transformers {transformers.__version__} leaves router gradients of sentinels unwritten")
        module._is_expert_parallel = True
        x, indices, weights = inputs()
        indices[::2, 1], indices[4] = 7, 7
        assert_equals(module, "grouped_mm", x, indices, weights.masked_fill(indices == 7, 0))

    def test_one_expert_per_row_with_unit_weight(self, hidden_act):
        """As all_to_all calls it on the rows a rank received."""
        x, indices, _ = inputs(top_k=1)
        assert_equals(experts_module(hidden_act=hidden_act), "eager", x, indices, torch.ones(9, 1))

    def test_a_dummy_row_of_nothing(self, hidden_act):
        """As all_to_all makes it for a rank without rows: the sum over no rows, whose result it cuts away."""
        module = experts_module(hidden_act=hidden_act)
        rows = torch.randn(0, 40, requires_grad=True)
        y = module(rows.sum(0, keepdim=True), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))[:0]
        assert y.shape == (0, 40)
        y.sum().backward()
        assert rows.grad.shape == (0, 40)
        assert all(p.grad is not None and not p.grad.any() for p in module.parameters())

    def test_no_tokens_keep_the_graph(self, hidden_act):
        module = experts_module(hidden_act=hidden_act)
        x, weights = torch.randn(0, 40, requires_grad=True), torch.rand(0, 3, requires_grad=True)
        module(x, torch.zeros(0, 3, dtype=torch.int64), weights).sum().backward()
        assert all(t.grad is not None and not t.grad.any() for t in (x, weights, *module.parameters()))

    def test_float32_input_with_bf16_experts(self, hidden_act):
        """As under autocast, where a norm returns float32."""
        module = experts_module(hidden_act=hidden_act).bfloat16()
        x, indices, weights = inputs()
        y = module(x, indices, weights)
        assert y.dtype == torch.float32
        expected = module(x.bfloat16(), indices, weights)
        assert_close("y", y, expected.float(), 3e-3 if hidden_act == "gelu" else 1e-9)

    def test_frozen_experts_get_no_gradient(self, hidden_act):
        """As under LoRA: the input and the router still do."""
        module = experts_module(hidden_act=hidden_act)
        x, indices, weights = inputs()
        expected = outputs_and_gradients(module, "eager", x, indices, weights)
        module.zero_grad()
        module.requires_grad_(False)
        mine = outputs_and_gradients(module, "ornith", x, indices, weights)
        for label in ("y", "dx", "dweights"):
            assert_close(label, mine[label], expected[label], 1e-5)
        assert mine["gate_up_proj"] is None and mine["down_proj"] is None


_SIZES = {"hidden_size": 40, "num_attention_heads": 4, "moe_intermediate_size": 24}
UPSTREAM = {  # name: (package, configuration, experts, what the configuration needs)
    "deepseek-v3": ("deepseek_v3", "DeepseekV3Config", "DeepseekV3Experts", _SIZES | {"num_local_experts": 7}),
    "glm4-moe": ("glm4_moe", "Glm4MoeConfig", "Glm4MoeExperts", _SIZES | {"num_local_experts": 7}),
    "olmoe": ("olmoe", "OlmoeConfig", "OlmoeExperts", _SIZES | {"intermediate_size": 24, "num_experts": 7}),
    "gpt-oss": (
        "gpt_oss",
        "GptOssConfig",
        "GptOssExperts",
        {"hidden_size": 40, "intermediate_size": 24, "num_local_experts": 7},
    ),
    "nemotron-h": (
        "nemotron_h",
        "NemotronHConfig",
        "NemotronHExperts",
        {"hidden_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 7},
    ),
    "aria": (
        "aria",
        "AriaTextConfig",
        "AriaExperts",
        {"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 24, "moe_num_experts": 7},
    ),
    "muse-spark": (
        "muse_spark",
        "MuseSparkTextConfig",
        "MuseSparkExperts",
        {"moe_hidden_size": 40, "moe_intermediate_size": 24, "num_local_experts": 7},
    ),
}


def upstream_layout(name):
    package, config, experts, options = UPSTREAM[name]
    modeling = pytest.importorskip(
        f"transformers.models.{package}.modeling_{package}",
        reason=f"transformers {transformers.__version__} has no {experts}",
    )
    made = getattr(modeling, experts)(getattr(modeling, config)(**options)) if hasattr(modeling, experts) else None
    if not hasattr(made, "is_transposed"):
        pytest.skip(f"transformers {transformers.__version__} has no {experts} that takes an implementation")
    return made


class Clamped(Qwen3_5MoeExperts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.clamp(-0.5, 0.5).chunk(2, dim=-1)
        return self.act_fn(gate) * up


@use_experts_implementation
class Interleaved(torch.nn.Module):
    """Plain SwiGLU, but gate and up rows alternate, which no view undoes."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = 7
        self.gate_up_proj = torch.nn.Parameter(torch.empty(7, 48, 40))
        self.down_proj = torch.nn.Parameter(torch.empty(7, 40, 24))
        self.act_fn = torch.nn.SiLU()

    def _apply_gate(self, gate_up):
        return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

    def forward(self):
        raise NotImplementedError


LAYOUTS = {
    "deepseek-v3": "fused: plain SwiGLU, recipe bf16, cpu backend",
    "glm4-moe": "fused: plain SwiGLU, recipe bf16, cpu backend",
    "olmoe": "fused: plain SwiGLU, recipe bf16, cpu backend",
    "gpt-oss": "grouped_mm: biases",
    "nemotron-h": "grouped_mm: experts without a gate",
    "aria": "fused: plain SwiGLU, recipe bf16, cpu backend",
    "muse-spark": "grouped_mm: a norm after each expert",
    "clamped": "grouped_mm: its own gate function, Clamped._apply_gate",
    "interleaved": "grouped_mm: its own gate function, Interleaved._apply_gate",
    "gelu": "grouped_mm: the activation GELUActivation",
}


def layout(name):
    if name == "gelu":
        return experts_module(hidden_act="gelu")
    if name in ("clamped", "interleaved"):
        module = {"clamped": Clamped, "interleaved": Interleaved}[name](hf_models.config())
    else:
        module = upstream_layout(name)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("name", LAYOUTS)
class TestLayouts:
    def test_value_and_gradients(self, name, calls):
        module = layout(name)
        assert ornith_moe.hf.why(module, "ornith") == LAYOUTS[name]
        assert_equals(module, "grouped_mm", *inputs())
        assert len(calls) == LAYOUTS[name].startswith("fused")

    def test_fp8_training_is_refused_where_it_would_not_be_fp8(self, name):
        module = layout(name)
        module.config._experts_implementation = "ornith_fp8"
        obstacle = LAYOUTS[name].partition(": ")[2]
        if LAYOUTS[name].startswith("fused"):
            obstacle = "an expert intermediate size of 24, no multiple of 128"
        assert ornith_moe.hf.why(module) == f"refused: {obstacle}; choose 'ornith' for unquantized experts"
        with pytest.raises(ValueError, match=r"experts_implementation='ornith_fp8' cannot compute .*; choose 'ornith'"):
            module(*inputs())


def test_transposed_weights_are_not_copied(calls):
    module = layout("aria")
    module.config._experts_implementation = "ornith"
    module(*inputs())
    (_, _, _, gate_up, down), *_ = calls
    assert gate_up.data_ptr() == module.gate_up_proj.data_ptr() and gate_up.shape == (7, 48, 40)
    assert down.data_ptr() == module.down_proj.data_ptr() and down.shape == (7, 40, 24)


class TestReasons:
    def test_are_logged_once(self, caplog, monkeypatch):
        monkeypatch.setattr(ornith_moe.hf, "_said", set())
        module = experts_module(hidden_act="gelu")
        with caplog.at_level(logging.WARNING, "ornith_moe.hf"):
            for _ in range(3):
                module(*inputs())
        assert caplog.messages == [
            "Qwen3_5MoeExperts takes the path 'grouped_mm' under 'ornith': the activation GELUActivation"
        ]

    def test_of_a_model(self, model):
        assert set(ornith_moe.hf.explain(model).values()) == {"fused: plain SwiGLU, recipe bf16, cpu backend"}
        assert len(ornith_moe.hf.explain(model)) == 4
        model.set_experts_implementation("eager")
        assert set(ornith_moe.hf.explain(model).values()) == {"not ours: eager"}

    def test_of_a_device_without_kernels(self, monkeypatch):
        def refuse(*_):
            raise ValueError("backend: 'triton' is unavailable")

        monkeypatch.setattr(ornith_moe.hf, "choose_backend", refuse)
        assert ornith_moe.hf.why(experts_module()) == "refused: backend: 'triton' is unavailable"

    @pytest.mark.parametrize("where", ["instance", "class", "module class", "block", "registry"])
    def test_name_the_library_that_took_our_place(self, model, monkeypatch, where, calls):
        """As Liger, unsloth and the kernels hub do; hooks of accelerate and torch.compile are not such a thing."""
        block = model.model.layers[0].mlp

        def theirs(self, *_):
            raise AssertionError

        ours = {"fused: plain SwiGLU, recipe bf16, cpu backend"}
        block.experts.forward = torch.compile(block.experts.forward)
        assert set(ornith_moe.hf.explain(model).values()) == ours
        del block.experts.forward
        told = "replaced: test_hf.TestReasons.test_name_the_library_that_took_our_place.<locals>."
        theirs.__module__ = "test_hf"
        if where == "instance":
            block.experts.forward = theirs.__get__(block.experts)
        elif where == "class":
            monkeypatch.setattr(type(block.experts), "forward", theirs)
        elif where == "module class":  # without what transformers' decorator adds
            block.experts, experts = torch.nn.Module(), block.experts
            block.experts.gate_up_proj, block.experts.down_proj = experts.gate_up_proj, experts.down_proj
            told = "replaced: torch.nn.modules.module._forward_unimplemented runs instead"
        elif where == "block":
            monkeypatch.setattr(type(block), "forward", theirs)
        else:
            monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "ornith", theirs)
        reason = ornith_moe.hf.explain(model)["model.layers.0.mlp.experts"]
        assert reason.startswith(told) and "runs in" in reason, reason
        other = ornith_moe.hf.explain(model)["model.layers.1.mlp.experts"]
        assert (other in ours) == (where in ("instance", "module class"))

    def test_of_something_else(self):
        with pytest.raises(TypeError, match="expected an experts module of transformers, got Linear"):
            ornith_moe.hf.why(torch.nn.Linear(2, 2))
        with pytest.raises(
            ValueError, match="expected one of ornith, ornith_fp8, ornith_fp8_full, ornith_fp8_channel, got 'eager'"
        ):
            ornith_moe.hf.why(experts_module("eager"))


class Stored(torch.Tensor):
    """As torchao's: bytes and a scale, which know a few operators of torch and refuse all others."""

    @staticmethod
    def __new__(cls, q, scale):
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32, strides=q.stride())

    def __init__(self, q, scale):
        self.q, self.scale = q, scale

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator in (torch.ops.aten.detach.default, torch.ops.aten.select.int, torch.ops.aten.t.default):
            return cls(operator(args[0].q, *args[1:]), args[0].scale)
        if operator is torch.ops.aten.mm.default:
            return args[0] @ (args[1].q * args[1].scale)
        raise NotImplementedError(operator)


def test_tensor_subclasses_compute_themselves_or_are_refused(calls):
    module, (x, ids, weights) = experts_module(), inputs()
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name).detach()
        scale = weight.abs().amax() / 127
        stored = Stored((weight / scale).round().to(torch.int8), scale)
        setattr(module, name, torch.nn.Parameter(stored, requires_grad=False))
    sides = [w.q * w.scale for w in (module.gate_up_proj, module.down_proj)]
    assert_close("y", module(x, ids, weights), om.moe_mlp(x, ids, weights, *sides), 1e-5)
    assert not calls
    assert ornith_moe.hf.why(module) == f"eager: weights of the subclass {__name__}.Stored"
    assert ornith_moe.hf.why(module, "ornith_fp8").startswith(f"refused: weights of the subclass {__name__}.Stored; ")
    module.config._experts_implementation = "ornith_fp8"
    with pytest.raises(ValueError, match=r"cannot compute weights of the subclass \S+Stored; choose 'ornith'"):
        module(x, ids, weights)
    with pytest.raises(TypeError, match="gate_up_proj: expected a plain tensor, got the subclass Stored of "):
        om.moe_mlp(x, ids, weights, module.gate_up_proj, module.down_proj)


@pytest.mark.parametrize(
    ("implementation", "hidden_act"), [("ornith", "silu"), ("ornith_fp8", "silu"), ("ornith", "gelu")]
)
def test_compiles_as_one_graph(implementation, hidden_act):
    """The experts call in one graph, forward and backward, then for another number of tokens."""
    module = experts_module(implementation, hidden_act=hidden_act, moe_intermediate_size=128)
    if hidden_act == "gelu" and not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
        pytest.skip(f"grouped_mm of transformers {transformers.__version__} does not compile in one graph")
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (9, 13):
        x, indices, weights = inputs(tokens)
        results = []
        for call in (module, compiled):
            module.zero_grad()
            leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
            y = call(leaves[0], indices, leaves[1])
            y.square().sum().backward()
            results.append([y.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())])
        for label, mine, expected in zip(("y", "dx", "dweights", "dgate_up", "ddown"), *results, strict=True):
            assert_close(label, mine, expected, 1e-6)


def test_fp8_training_of_masters_is_the_recipe(calls):
    """`ornith_fp8` on unquantized experts: block FP8 forward, gradients for the masters."""
    module = experts_module("ornith_fp8", moe_intermediate_size=128)
    x, indices, weights = inputs()
    mine = outputs_and_gradients(module, "ornith_fp8", x, indices, weights)
    leaves = [t.detach().clone().requires_grad_() for t in (x, weights, module.gate_up_proj, module.down_proj)]
    options = {"recipe": "fp8", "backend": "reference", "scale": "bf16"}  # the scales of FP8 builds
    y = om.moe_mlp(leaves[0], indices, leaves[1], *leaves[2:], **options)
    y.square().sum().backward()
    for label, expected in zip(mine, (y, *(leaf.grad for leaf in leaves)), strict=True):
        assert_close(label, mine[label], expected, 1e-5)
    exact = outputs_and_gradients(module, "eager", x, indices, weights)
    assert 1e-3 < relative_rms(mine["y"], exact["y"]) < 0.1  # it did quantize
    assert len(calls) == 1


def test_docstrings_run():
    ran = doctest.testmod(ornith_moe.hf)
    assert ran.attempted >= 6 and not ran.failed
