"""Experts stored in FP8 (transformers' FP8Experts) under `ornith`, `ornith_fp8` and the other words.

References: `ornith_moe.backend.reference` on the same q and scale, and plain torch on weights dequantized beforehand.
transformers itself computes FP8 experts on GPUs only, so its result is no reference here; modules are its own class,
and the model of the training test is made by its own replacement of experts. Not covered: loading a checkpoint as FP8,
which transformers does on GPUs only.
"""

import fixtures
import hf_models
import pytest
import torch
import torch.nn.functional as F
import transformers
from numeric import assert_close, assert_same_bits, relative_rms
from safetensors import safe_open
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts, replace_with_fp8_linear
from transformers.integrations.moe import use_experts_implementation

import ornith_moe as om
import ornith_moe.hf
from ornith_moe.backend.reference import moe_mlp_reference
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.fp8 import dequantize_fp8, quantize_fp8_block
from ornith_moe.quant.recipes import ROW
from ornith_moe.quant.source.hub import open_any

WEIGHTS = ("gate_up_proj", "down_proj")


@pytest.fixture(autouse=True)
def restore_fp8_experts():
    """The decorator changes the class in place; transformers does so at every load, a test should not."""
    saved = {name: FP8Experts.__dict__[name] for name in ("__init__", "forward")}
    yield
    for name, value in saved.items():
        setattr(FP8Experts, name, value)


def fp8_module(implementation="ornith", block_size=(128, 128), inner=128, hidden=256, scale="fp32", **changes):
    """FP8Experts with random weights, and those weights dequantized."""
    options = {name: changes.pop(name) for name in ("activation_scheme", "has_gate") if name in changes}
    config = hf_models.config(hidden_size=hidden, moe_intermediate_size=inner)
    for name, value in changes.items():
        setattr(config, name, value)
    config._experts_implementation = implementation
    flags = {"has_gate": options.get("has_gate", True), "experts_interface": ALL_FP8_EXPERTS_FUNCTIONS}
    decorated = use_experts_implementation(FP8Experts, **flags)
    module = decorated(config, block_size=block_size, **options)
    if not hasattr(module, "limit") and (inner == 32 or "swiglu_limit" in changes):
        pytest.skip(f"FP8Experts of transformers {transformers.__version__} clamps nothing and pads no scales")
    return module, fill(module, scale)


@torch.no_grad()
def fill(module, scale="fp32"):
    dense = []
    for name in WEIGHTS if module.has_gate else ("up_proj", "down_proj"):
        parameter, scales = getattr(module, name), getattr(module, f"{name}_scale_inv")
        weight = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
        block = tuple(-(-n // s) for n, s in zip(parameter.shape[1:], scales.shape[1:], strict=True))
        if module.block_size is not None and parameter.shape[1] > 128:
            block = tuple(module.block_size)
        q, s = quantize_fp8_block(weight, block=block, scale=scale)
        parameter.data, scales.data = q, s
        scales.requires_grad_(False)
        dense.append(dequantize_fp8(q, s, block=block, dtype=torch.float32))
    return dense


def inputs(tokens=9, hidden=256):
    indices = torch.rand(tokens, 7).topk(3).indices
    indices[2], indices[5, 1] = 7, 7  # sentinels
    return torch.randn(tokens, hidden), indices, torch.rand(tokens, 3).masked_fill(indices == 7, 0)


def run(function, x, indices, weights):
    """y, dx, dweights."""
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    y = function(leaves[0], indices, leaves[1])
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return y.detach(), leaves[0].grad, leaves[1].grad


def assert_all_close(mine, expected, tolerance):
    for label, value, truth in zip(("y", "dx", "dweights"), mine, expected, strict=True):
        assert_close(label, value, truth, tolerance)


def pairs(module):
    return [(getattr(module, name).detach(), getattr(module, f"{name}_scale_inv").detach()) for name in WEIGHTS]


class TestWeightOnly:
    @pytest.mark.parametrize(
        ("options", "path"),
        [
            ({}, "fused: plain SwiGLU, stored FP8, weight-only, cpu backend"),
            ({"inner": 192}, "fused: plain SwiGLU, stored FP8, weight-only, cpu backend"),
            ({"hidden": 200}, "fused: plain SwiGLU, stored FP8, weight-only, cpu backend"),
            ({"scale": "ue8m0"}, "fused: plain SwiGLU, stored FP8, weight-only, cpu backend"),
            ({"scale": "bf16"}, "fused: plain SwiGLU, stored FP8, weight-only, cpu backend"),
            ({"inner": 32}, "loop: scales that are not one per 128 x 128 block"),
            ({"inner": 32, "scale": "ue8m0"}, "loop: scales that are not one per 128 x 128 block"),
            ({"inner": 160, "block_size": None}, "loop: scales that are not one per 128 x 128 block"),
            ({"inner": 160, "block_size": (64, 32)}, "loop: scales that are not one per 128 x 128 block"),
        ],
        ids=str,
    )
    def test_every_kind_of_scale(self, options, path):
        module, dense = fp8_module(**options)
        assert ornith_moe.hf.why(module) == path
        operands = inputs(hidden=options.get("hidden", 256))
        expected = run(lambda x, i, w: moe_mlp_reference(x, i, w, *dense), *operands)
        assert_all_close(run(module, *operands), expected, 1e-5)

    def test_without_a_gate(self):
        module, (w1, w2) = fp8_module(has_gate=False)
        assert ornith_moe.hf.why(module) == "loop: experts without a gate"

        def experts(x, indices, weights):
            y = torch.zeros_like(x)
            for expert in range(7):
                token, slot = (indices == expert).nonzero(as_tuple=True)
                rows = F.silu(x[token] @ w1[expert].T) @ w2[expert].T
                y = y.index_add(0, token, rows * weights[token, slot].unsqueeze(-1))
            return y

        operands = inputs()
        assert_all_close(run(module, *operands), run(experts, *operands), 1e-5)

    @pytest.mark.parametrize("inner", [128, 32], ids=["fused", "loop"])
    def test_bf16(self, inner):
        module, dense = fp8_module(inner=inner)
        x, indices, weights = inputs()
        mine = run(module, x.bfloat16(), indices, weights)
        assert mine[0].dtype == mine[1].dtype == torch.bfloat16
        expected = run(lambda x, i, w: moe_mlp_reference(x, i, w, *dense), x.bfloat16().float(), indices, weights)
        assert_all_close(mine, expected, 2e-2)

    @pytest.mark.parametrize("inner", [128, 32], ids=["fused", "loop"])
    def test_no_tokens(self, inner):
        module, _ = fp8_module(inner=inner)
        y, dx, dweights = run(module, torch.randn(0, 256), torch.zeros(0, 3, dtype=torch.int64), torch.rand(0, 3))
        assert y.shape == dx.shape == (0, 256) and dweights.shape == (0, 3)

    def test_frozen_though_transformers_wants_gradients(self):
        module, _ = fp8_module()
        assert module.gate_up_proj.requires_grad
        run(module, *inputs())
        assert module.gate_up_proj.grad is None and module.down_proj.grad is None


class TestAsServed:
    """Activations quantized per token and 128 values, weights the stored q and scale."""

    @pytest.mark.parametrize(
        ("options", "path"),
        [({}, "fused: plain SwiGLU, stored FP8, recipe fp8, cpu backend"), ({"scale": "ue8m0"}, "fused")],
        ids=str,
    )
    def test_fused(self, options, path):
        module, dense = fp8_module("ornith_fp8", **options)
        assert ornith_moe.hf.why(module).startswith(path)
        operands = inputs()
        reference = run(lambda x, i, w: moe_mlp_reference(x, i, w, *pairs(module), recipe="fp8"), *operands)
        mine = run(module, *operands)
        assert_all_close(mine, reference, 1e-5)
        weight_only = run(lambda x, i, w: moe_mlp_reference(x, i, w, *dense), *operands)
        assert 1e-3 < relative_rms(mine[0], weight_only[0]) < 0.1  # it did quantize activations

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"swiglu_limit": 0.3}, "a clamped or capped gate"),
            ({"inner": 192}, "an expert intermediate size of 192, no multiple of 128"),
            ({"inner": 32}, "an expert intermediate size of 32, no multiple of 128"),
            ({"hidden_act": "gelu"}, "the activation GELUActivation"),
        ],
        ids=str,
    )
    def test_loop(self, options, reason):
        """The recipe written out in torch: round trip of the rows, dequantized weights, the module's own gate."""
        module, dense = fp8_module("ornith_fp8", **options)
        assert ornith_moe.hf.why(module) == f"loop: {reason}"

        def seen(rows):
            groups = F.pad(rows, (0, -rows.shape[-1] % 128)).unflatten(-1, (-1, 128))
            scale = groups.abs().amax(-1, keepdim=True) / 448
            q = (groups / scale.where(scale > 0, 1)).to(torch.float8_e4m3fn).to(rows.dtype)
            back = (q * scale.where(scale > 0, 1)).flatten(-2)[..., : rows.shape[-1]]
            return rows + (back - rows).detach()

        def recipe(x, indices, weights):
            y = torch.zeros_like(x)
            for expert, (w13, w2) in enumerate(zip(*dense, strict=True)):
                token, slot = (indices == expert).nonzero(as_tuple=True)
                rows = seen(module._apply_gate(seen(x[token]) @ w13.T)) @ w2.T
                y = y.index_add(0, token, rows * weights[token, slot].unsqueeze(-1))
            return y

        operands = inputs()
        assert_all_close(run(module, *operands), run(recipe, *operands), 1e-5)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"activation_scheme": "static"}, "static activation scales; choose 'ornith' for weight-only"),
            ({"block_size": None}, "scales per matrix, not per 128 x 128; choose 'ornith'"),
            ({"block_size": (64, 32)}, r"scales per \(64, 32\), not per 128 x 128; choose 'ornith'"),
        ],
        ids=str,
    )
    def test_refused(self, options, reason):
        module, _ = fp8_module("ornith_fp8", **options)
        with pytest.raises(ValueError, match=f"experts_implementation='ornith_fp8' cannot compute {reason}"):
            module(*inputs())


ROWS = {"block_size": (1, 256)}  # wide enough for a scale per row of both weights


class TestEveryWord:
    @pytest.mark.parametrize("scale", ["fp32", "bf16"])
    @pytest.mark.parametrize("word", ornith_moe.hf.WORDS)
    def test_computes_its_recipe_on_what_is_stored(self, word, scale):
        """Forward and gradients, those of the stored weights among them, against the reference of the recipe."""
        recipe = ornith_moe.hf.WORDS[word]
        module, dense = fp8_module(word, scale=scale, **(ROWS if recipe.weights == ROW else {}))
        numbers = f"recipe {recipe.name}" if recipe.is_fp8 else "weight-only"
        assert ornith_moe.hf.why(module) == f"fused: plain SwiGLU, stored FP8, {numbers}, cpu backend"
        ornith_moe.hf.weight_gradients(module)
        operands = inputs()
        mine = run(module, *operands)
        stored = [(q.requires_grad_(), s) for q, s in pairs(module)]
        for q, _ in stored:
            q.grad_dtype = torch.float32
        options = {"recipe": recipe.name, "backend": "reference"}
        assert_all_close(mine, run(lambda x, i, w: om.moe_mlp(x, i, w, *stored, **options), *operands), 1e-3)
        for name, (q, _) in zip(WEIGHTS, stored, strict=True):
            assert_close(name, getattr(module, name).grad, q.grad, 1e-3)
        weight_only = run(lambda x, i, w: moe_mlp_reference(x, i, w, *dense), *operands)[0]
        assert (relative_rms(mine[0], weight_only) > 1e-3) == recipe.is_fp8

    def test_rows_under_the_words_of_blocks_and_blocks_under_that_of_rows(self):
        rows, dense = fp8_module(**ROWS)
        blocks, _ = fp8_module()
        assert ornith_moe.hf.why(rows, "ornith") == "fused: plain SwiGLU, stored FP8, weight-only, cpu backend"
        operands = inputs()
        expected = run(lambda x, i, w: moe_mlp_reference(x, i, w, *dense), *operands)
        assert_all_close(run(rows, *operands), expected, 1e-5)
        for word in ("ornith_fp8", "ornith_fp8_full"):
            expected = "refused: scales per (1, 256), not per 128 x 128; choose 'ornith'"
            assert ornith_moe.hf.why(rows, word) == expected
        expected = "refused: scales per (128, 128), not per row; choose 'ornith' for weight-only"
        assert ornith_moe.hf.why(blocks, "ornith_fp8_channel") == expected
        ue8m0, _ = fp8_module("ornith_fp8_channel", scale="ue8m0", **ROWS)
        with pytest.raises(ValueError, match="cannot compute UE8M0 scales per row; choose 'ornith' for weight-only"):
            ue8m0(*inputs())

    def test_the_loop_casts_whole_rows_and_no_gradient(self):
        module, (w13, w2) = fp8_module("ornith_fp8_channel", hidden_act="gelu", **ROWS)
        assert ornith_moe.hf.why(module) == "loop: the activation GELUActivation"

        def seen(rows):
            scale = rows.abs().amax(-1, keepdim=True) / 448
            return rows + ((rows / scale).to(torch.float8_e4m3fn).to(rows.dtype) * scale - rows).detach()

        def recipe(x, indices, weights):
            y = torch.zeros_like(x)
            for expert in range(7):
                token, slot = (indices == expert).nonzero(as_tuple=True)
                rows = seen(module._apply_gate(seen(x[token]) @ w13[expert].T)) @ w2[expert].T
                y = y.index_add(0, token, rows * weights[token, slot].unsqueeze(-1))
            return y

        operands = inputs()
        assert_all_close(run(module, *operands), run(recipe, *operands), 1e-5)
        reason = "refused: the activation GELUActivation; choose 'ornith' for weight-only"
        blocks, _ = fp8_module(hidden_act="gelu")
        assert ornith_moe.hf.why(blocks, "ornith_fp8_full") == reason

    def test_masters_of_rows_give_back_the_stored_numbers(self):
        module, _ = fp8_module("ornith_fp8_channel", scale="bf16", **ROWS)
        stored = pairs(module)
        for master, (q, s) in zip(ornith_moe.hf.master_weights(module), stored, strict=True):
            again, s_again = om.quantize_fp8_channel(master.detach())
            assert_same_bits("q", again.view(torch.uint8), q.view(torch.uint8))
            assert ((s_again.float() / s.float() - 1).abs() <= 2**-7).all()
        assert ornith_moe.hf.why(module) == "fused: plain SwiGLU, recipe fp8_channel, cpu backend"


@pytest.mark.parametrize("implementation", ["ornith", "ornith_fp8"])
def test_fp4_is_refused(implementation):
    module, _ = fp8_module(implementation)
    module.down_proj = torch.nn.Parameter(module.down_proj.view(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"cannot compute torch.int8 weights \(FP4\); choose 'grouped_mm'"):
        module(*inputs())


@pytest.mark.parametrize("implementation", ["ornith", "ornith_fp8"])
class TestWeightGradients:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_are_those_of_the_dequantized_weights(self, implementation, dtype):
        module, dense = fp8_module(implementation)
        parameters = ornith_moe.hf.weight_gradients(module, dtype)
        assert parameters == [module.gate_up_proj, module.down_proj]
        operands = inputs()
        mine = run(module, *operands)
        dense = [w.requires_grad_() for w in dense]
        if implementation == "ornith":
            expected = run(lambda x, i, w: moe_mlp_reference(x, i, w, *dense), *operands)
            gradients = [w.grad for w in dense]
        else:
            stored = [(q.requires_grad_(), s) for q, s in pairs(module)]
            for q, _ in stored:
                q.grad_dtype = torch.float32
            options = {"recipe": "fp8", "backend": "reference"}
            expected = run(lambda x, i, w: om.moe_mlp(x, i, w, *stored, **options), *operands)
            gradients = [q.grad for q, _ in stored]
        assert_all_close(mine, expected, 1e-5)
        for name, gradient in zip(WEIGHTS, gradients, strict=True):
            assert getattr(module, name).grad.dtype == dtype
            assert_close(name, getattr(module, name).grad, gradient, 1e-5 if dtype == torch.float32 else 4e-3)

    def test_need_fused_experts(self, implementation):
        module, _ = fp8_module(implementation, inner=32)
        ornith_moe.hf.weight_gradients(module)
        with pytest.raises(ValueError, match=r"gate_up_proj: the gradient .* needs fused experts; use master_weights"):
            module(*inputs())


class TestMasterWeights:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("scale", ["fp32", "bf16"])
    def test_give_back_the_stored_numbers(self, dtype, scale):
        module, dense = fp8_module("ornith_fp8", scale=scale)
        stored, operands = pairs(module), inputs()
        served = run(module, *operands)
        masters = ornith_moe.hf.master_weights(module, dtype)
        assert [m.dtype for m in masters] == [dtype] * 2 and masters[0] is module.gate_up_proj
        assert "gate_up_proj_scale_inv" not in module.state_dict()
        for master, (q, s), exact in zip(masters, stored, dense, strict=True):
            assert_close("master", master.float(), exact, 1e-9 if dtype == torch.float32 else 4e-3)
            again, s_again = quantize_fp8_block(master.detach(), scale=scale)
            assert_same_bits("q", again.view(torch.uint8), q.view(torch.uint8))
            assert ((s_again.float() / s.float() - 1).abs() <= 2**-8).all()
        assert ornith_moe.hf.why(module) == "fused: plain SwiGLU, recipe fp8, cpu backend"
        assert_all_close(run(module, *operands), served, 2e-2)
        assert all(m.grad is not None and m.grad.dtype == dtype and m.grad.any() for m in masters)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_of_powers_of_two_are_the_served_policy(self, dtype):
        """q * scale is exact in both dtypes, and so is casting it again with scales of that kind."""
        module, _ = fp8_module("ornith_fp8", scale="ue8m0")
        operands = inputs()
        served = run(module, *operands)
        ornith_moe.hf.master_weights(module, dtype)
        for label, mine, expected in zip(("y", "dx", "dweights"), run(module, *operands), served, strict=True):
            assert_same_bits(label, mine, expected)

    def test_of_small_experts_and_without_quantization(self):
        module, dense = fp8_module("ornith", inner=32)
        ornith_moe.hf.master_weights(module)
        operands = inputs()
        expected = run(lambda x, i, w: moe_mlp_reference(x, i, w, *dense), *operands)
        assert_all_close(run(module, *operands), expected, 1e-5)
        assert ornith_moe.hf.why(module) == "fused: plain SwiGLU, recipe bf16, cpu backend"
        assert ornith_moe.hf.master_weights(module) == []

    def test_a_model_of_fp8_experts_trains(self):
        """From the served policy: same loss within rounding before the first step, and the loss falls."""
        model = hf_models.model("qwen3_moe", "ornith_fp8", hidden_size=128, moe_intermediate_size=128)
        others = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        quantization = FineGrainedFP8Config(modules_to_not_convert=others)
        replace_with_fp8_linear(model, others, quantization_config=quantization)
        experts = [module for module in model.modules() if isinstance(module, FP8Experts)]
        assert len(experts) == 2
        for module in experts:
            module.to_empty(device="cpu")
            fill(module)
        ids = hf_models.IDS
        with torch.no_grad():
            served = model(input_ids=ids, labels=ids).loss
        masters = ornith_moe.hf.master_weights(model)
        assert len(masters) == 4
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
        losses = []
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(served.item(), rel=1e-2)
        assert losses[-1] < 0.8 * losses[0]


def test_a_build_of_compressed_tensors_trains_under_the_word_of_its_numbers(tmp_path):
    """transformers gives plain weights; the recipe makes of them the codes that the build stores."""
    source = fixtures.qwen35moe(tmp_path / "tiny", experts=4, top_k=2)
    convert(open_any(str(source)), tmp_path / "out", ["fp8-channel"], jobs=1)
    (build,) = (tmp_path / "out").iterdir()
    model = AutoModelForCausalLM.from_pretrained(build, experts_implementation="ornith_fp8_channel")
    explained = set(ornith_moe.hf.explain(model).values())
    if explained == {"refused: FP8 weights without scales, which this transformers did not load; upgrade it"}:
        pytest.skip(f"transformers {transformers.__version__} reads no fused experts of compressed-tensors")
    assert explained == {"fused: plain SwiGLU, recipe fp8_channel, cpu backend"}
    experts = model.get_submodule("model.layers.2.mlp.experts")
    stored = {}
    for shard in build.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys() if ".layers.2.mlp.experts." in name}
    prefix = next(iter(stored)).partition(".experts.")[0]
    names = [(f"{prefix}.experts.{e}.gate_proj", f"{prefix}.experts.{e}.up_proj") for e in range(4)]
    codes = torch.stack([torch.cat([stored[f"{name}.weight"] for name in pair]) for pair in names])
    again, scale = om.quantize_fp8_channel(experts.gate_up_proj.detach())
    assert_same_bits("q", again.view(torch.uint8), codes.view(torch.uint8))
    scales = torch.stack([torch.cat([stored[f"{name}.weight_scale"] for name in pair]) for pair in names])
    assert ((scale.float() / scales.float() - 1).abs() <= 2**-7).all()
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    assert experts.gate_up_proj.grad.isfinite().all() and experts.gate_up_proj.grad.any()
