"""Weight sync: what a live policy gives is what `convert` writes of the checkpoint it saves, byte for byte.

Reference: the safetensors files and the index that `convert` wrote of the same model, saved by transformers'
`save_pretrained` (sync_models.py). Masters are fp32 and not BF16 numbers. Sharded models: test_sync_parallel.py;
engines and builds on disk: test_sync_engines.py. Not covered: GPUs, but for the signatures of their quantizer.
"""

import copy

import hf_models
import peft
import pytest
import sync_worker
import torch
from hypothesis import given
from hypothesis import strategies as st
from sync_models import BUILDS, MODELS, WIDE, assert_same_bytes, converted, masters, stored
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear

import ornith_moe.hf
from ornith_moe.fp8_weights import quantized_weights
from ornith_moe.kernels import fp8_cast
from ornith_moe.quant.builds.storages.fp8 import FP8Block, FP8Channel
from ornith_moe.quant.errors import ConversionError, PlanError
from ornith_moe.sync import named_tensors, plan_sync, served, served_weights
from ornith_moe.sync.held import Cut
from ornith_moe.sync.served import TORCH, fitting_build


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_those_of_the_build(model, build):
    expected = stored(converted(model)[build])
    sent = list(served_weights(masters(model), build))
    assert_same_bytes(named_tensors(sent), expected)
    scaled = [one for one in sent if one.scale is not None]
    assert {one.scale_name for one in scaled} == {name for name in expected if "_scale" in name}
    assert all(one.tensor.dtype == torch.float8_e4m3fn and one.scale_name.startswith(one.name) for one in scaled)
    assert bool(scaled) == (build != "bf16")
    announced = [
        (tensor.name, TORCH[tensor.dtype], tensor.shape) for tensor in plan_sync(masters(model), build).tensors
    ]
    assert announced == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named_tensors(sent)]


@pytest.mark.parametrize("build", BUILDS)
def test_a_checkpoint_in_fp32_keeps_what_is_not_quantized_in_fp32(build):
    """What is quantized is the same whichever was saved: `convert` rounds to BF16 before it quantizes."""
    in_fp32, in_bf16 = stored(converted("moe", torch.float32)[build]), stored(converted("moe")[build])
    assert_same_bytes(named_tensors(served_weights(masters("moe"), build, saved_as=None)), in_fp32)
    differ = {name for name in in_fp32 if in_fp32[name].dtype != in_bf16[name].dtype}
    assert_same_bytes(
        ((name, in_fp32[name]) for name in in_fp32 if name not in differ),
        {name: tensor for name, tensor in in_bf16.items() if name not in differ},
    )
    kept = {name for name, tensor in in_bf16.items() if tensor.dtype == torch.bfloat16 and "_scale" not in name}
    assert differ == (set() if build == "bf16" else kept)


@pytest.mark.parametrize("build", BUILDS)
def test_a_checkpoint_in_fp16_is_rounded_twice(build):
    """First to fp16, as it is saved, then to BF16: other numbers than those of masters rounded once."""
    expected = stored(converted("moe", torch.float16)[build])
    assert_same_bytes(named_tensors(served_weights(masters("moe"), build, saved_as=torch.float16)), expected)
    once = stored(converted("moe")[build])
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert not torch.equal(expected[name].view(torch.uint8), once[name].view(torch.uint8))


def test_the_next_pass_sees_the_next_step():
    model = copy.deepcopy(masters("moe"))
    sync = plan_sync(model, "fp8-block")
    assert_same_bytes(named_tensors(sync), stored(converted("moe")["fp8-block"]))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3].mul_(-1)
    before = stored(converted("moe")["fp8-block"])
    changed = [name for name, tensor in named_tensors(sync) if not torch.equal(tensor.float(), before[name].float())]
    assert changed == ["model.layers.1.mlp.experts.3.down_proj.weight"]


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_names_do_not_depend_on_wrappers(wrapper):
    """As DDP, torch.compile and FSDP1 name what they hold."""
    outer = torch.nn.Module()
    setattr(outer, wrapper, masters("dense"))
    assert_same_bytes(named_tensors(served_weights(outer, "bf16")), stored(converted("dense")["bf16"]))


def test_a_merged_adapter_is_in_its_weight_and_another_is_refused():
    """Of linear layers, and of the fused experts by `target_parameters`."""
    fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=fused, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(masters("moe")), config)
    with pytest.raises(PlanError, match=r"call merge_adapter\(\) before the sync"):
        served_weights(model, "bf16")
    model.merge_adapter()
    merged, before = dict(named_tensors(served_weights(model, "bf16"))), stored(converted("moe")["bf16"])
    assert merged.keys() == before.keys()
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {name for name in merged if "q_proj" in name or ".experts." in name}
    base = copy.deepcopy(model).merge_and_unload()
    assert_same_bytes(named_tensors(served_weights(base, "bf16")), merged)


class TestStoredFP8:
    """Experts that a model holds in FP8, as transformers loads them on a GPU: (q, scale)."""

    @pytest.fixture
    def model(self, scale_dtype):
        """The MoE with the experts of its fp8-block build, by transformers' own replacement of modules."""
        model = copy.deepcopy(masters("moe")).to(torch.bfloat16)
        model.set_experts_implementation("ornith_fp8")
        files = stored(converted("moe")["fp8-block"])
        others = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        saved = {name: FP8Experts.__dict__[name] for name in ("__init__", "forward")}
        replace_with_fp8_linear(model, others, quantization_config=FineGrainedFP8Config(modules_to_not_convert=others))
        for name, module in model.named_modules():
            if isinstance(module, FP8Experts):
                module.to_empty(device="cpu")
                self.fill(module, name, files, scale_dtype)
        yield model
        for name, value in saved.items():  # the replacement decorates the class in place
            setattr(FP8Experts, name, value)

    @torch.no_grad()
    def fill(self, module, name, files, scale_dtype):
        for expert in range(module.gate_up_proj.shape[0]):
            for suffix in ("", "_scale_inv"):
                gate, up, down = (files[f"{name}.{expert}.{p}_proj.weight{suffix}"] for p in ("gate", "up", "down"))
                dtype = scale_dtype if suffix else gate.dtype
                for projection, rows in (("gate_up_proj", torch.cat([gate, up])), ("down_proj", down)):
                    held = getattr(module, projection + suffix)
                    if held.dtype != dtype:
                        held.data = held.data.to(dtype)
                    held[expert] = rows.to(dtype)

    @pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_stored_bytes_are_given_as_they_are(self, model):
        expected = stored(converted("moe")["fp8-block"])
        assert fitting_build(model) == "fp8-block"
        assert_same_bytes(named_tensors(served_weights(model)), expected)

    @pytest.mark.parametrize("scale_dtype", [torch.float32])
    def test_another_build_would_quantize_again(self, model):
        for build in ("fp8-channel", "bf16"):
            with pytest.raises(PlanError, match=r"is stored in FP8 with scales .*ask for the build that the model was"):
                served_weights(model, build)
        ornith_moe.hf.master_weights(model, torch.bfloat16)
        assert len(list(served_weights(model, "bf16")))

    @pytest.mark.parametrize("scale_dtype", [torch.float32])
    def test_scales_that_are_no_bf16_numbers_are_not_rounded(self, model):
        experts = model.model.layers[0].mlp.experts
        experts.down_proj_scale_inv.data[0].mul_(1 + 2**-20)
        sent = {one.name: one for one in served_weights(model)}
        name = "model.layers.0.mlp.experts.{}.down_proj.weight"
        assert torch.equal(sent[name.format(0)].scale, experts.down_proj_scale_inv[0])
        assert sent[name.format(1)].scale.dtype == torch.bfloat16


def test_fp8_is_the_build_that_the_policy_computes_in():
    model = copy.deepcopy(masters("moe"))
    for word, build in (
        ("eager", "fp8-channel"), ("ornith", "fp8-channel"), ("ornith_fp8", "fp8-block"),
        ("ornith_fp8_full", "fp8-block"), ("ornith_fp8_channel", "fp8-channel"),
    ):  # fmt: skip
        model.set_experts_implementation(word)
        assert fitting_build(model) == build == plan_sync(model).plan.name


def test_a_policy_computes_with_the_codes_that_it_is_served_with():
    """One quantizer: the copy that `ornith_fp8_channel` multiplies with, and what an engine gets."""
    experts = masters("moe").model.layers[1].mlp.experts
    sent = {one.name: one for one in served_weights(masters("moe"), "fp8-channel")}
    gate_up, down = (quantized_weights(w, "fp8_channel") for w in (experts.gate_up_proj, experts.down_proj))
    for expert in range(4):
        gate, up, last = (
            sent[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        for mine, parts in ((gate_up, [gate, up]), (down, [last])):
            codes = torch.cat([one.tensor.view(torch.uint8) for one in parts])
            assert torch.equal(mine.value[expert].view(torch.uint8), codes)
            assert torch.equal(mine.scale[expert], torch.cat([one.scale for one in parts]))


def test_the_twin_of_a_gpu_is_called_as_the_quantizer_is(monkeypatch):
    """In Triton's interpreter: what `_quantize` takes where weights lie on a GPU."""
    w = torch.randn(256, 384)
    expected = {storage: served._quantize(w, storage()) for storage in (FP8Channel, FP8Block)}
    monkeypatch.setattr(served, "fp8", fp8_cast)
    for storage, (q, scale) in expected.items():
        twin_q, twin_scale = served._quantize(w, storage())
        assert torch.equal(twin_q.view(torch.uint8), q.view(torch.uint8)) and torch.equal(twin_scale, scale)


def test_a_tensor_at_a_time():
    """Besides the model a plain sync holds less than an expert in fp32: a weight in BF16, codes and scales, by torch's
    own account."""
    model = hf_models.model(**WIDE)
    experts = model.model.layers[0].mlp.experts
    peak = sync_worker.peak_of(lambda: [None for _ in served_weights(model, "fp8-block")])
    assert 0 < peak < experts.down_proj[0].nbytes + experts.gate_up_proj[0].nbytes


def test_what_is_given_pins_no_more_than_itself():
    """Experts are copies, so that whoever keeps one does not keep the fused tensor; others are the model's own."""
    model = copy.deepcopy(masters("moe")).to(torch.bfloat16)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for one in served_weights(model, "bf16"):
        assert one.tensor.untyped_storage().nbytes() == one.tensor.nbytes
        assert (one.tensor.untyped_storage().data_ptr() in own) == (".experts." not in one.name)


@given(blocks=st.integers(1, 4), block=st.integers(1, 9), taken=st.integers(1, 9))
def test_pieces_hold_every_expert_where_it_arrives(blocks, block, taken):
    """Reference: what a gather of [i, j) of each block gives."""
    cut, ids = Cut(blocks, block, min(taken, block)), torch.arange(blocks * block).view(blocks, block)
    pieces = [ids[:, start : start + cut.taken].flatten().tolist() for start in range(0, block, cut.taken)]
    for number, piece in enumerate(pieces):
        assert cut.experts(number) == {expert: index for index, expert in enumerate(piece)}
        assert {cut.piece(expert) for expert in piece} == {number}


class TestErrors:
    def test_an_unknown_architecture(self):
        with pytest.raises(PlanError, match=r"MixtralForCausalLM: model_type 'mixtral' .*; send its state_dict\(\) as"):
            served_weights(hf_models.model("mixtral"))

    def test_no_model_of_transformers(self):
        with pytest.raises(PlanError, match="Linear: no model of transformers in it"):
            served_weights(torch.nn.Linear(2, 2))

    def test_a_build_that_no_engine_loads(self):
        with pytest.raises(PlanError, match="build gguf:Q8_0: engines load safetensors; ask for fp8-channel"):
            served_weights(masters("moe"), "gguf:Q8_0")
        with pytest.raises(PlanError, match="did you mean fp8-block"):
            served_weights(masters("moe"), "fp8-blok")

    def test_a_dtype_that_no_checkpoint_has(self):
        with pytest.raises(PlanError, match=r"saved_as: expected torch\.bfloat16"):
            served_weights(masters("moe"), saved_as=torch.float64)
        with pytest.raises(PlanError, match=r"torch\.float64 is stored in no build"):
            served_weights(copy.deepcopy(masters("dense")).double())

    def test_a_model_that_its_config_does_not_describe(self):
        model = copy.deepcopy(masters("dense"))
        model.model.value_head = torch.nn.Linear(2, 1)
        with pytest.raises(PlanError, match=r"2 tensors, the first is model\.value_head\.bias, no weight of"):
            served_weights(model)
        model = copy.deepcopy(masters("dense"))
        del model.model.layers[1].mlp.up_proj
        with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj\.weight: the model has no such weight"):
            served_weights(model)
        model = copy.deepcopy(masters("dense"))
        model.model.norm.weight = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(PlanError, match=r"model\.norm\.weight: expected \[256\], got \[3\]"):
            served_weights(model)

    def test_a_tied_head_with_values_of_its_own(self):
        model = copy.deepcopy(masters("gemma"))
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        with pytest.raises(PlanError, match=r"lm_head\.weight: the config ties it to the embedding.*tie_weights\(\)"):
            served_weights(model)

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.experts.gate_up_proj"])
    def test_a_value_that_convert_refuses(self, name, value):
        model = copy.deepcopy(masters("moe"))
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = value
        with pytest.raises(ConversionError, match=rf"the value at \[.*\] is {value}; expected finite weights"):
            list(served_weights(model, "fp8-block"))
