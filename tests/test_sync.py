"""Weight sync: what a live policy gives is what `convert` writes of the checkpoint it saves, byte for byte.

Reference: the safetensors files and the index that `convert` wrote of the same model, saved by transformers'
`save_pretrained` in BF16. Masters are fp32 and not BF16 numbers. Sharded models are transformers' own, on two gloo
processes (sync_worker.py). Engines are fakes with the published signatures: vLLM 0.29, SGLang of November 2026. Not
covered: the engines themselves, GPUs, FSDP1, more than two processes.
"""

import ast
import copy
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import fixtures
import hf_models
import peft
import pytest
import sync_worker
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear

import ornith_moe.hf
from ornith_moe.fp8_weights import quantized_weights
from ornith_moe.kernels import fp8_cast
from ornith_moe.quant.builds.storages.fp8 import FP8Block, FP8Channel
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError, ConversionError, PlanError
from ornith_moe.quant.source.weights import open_source
from ornith_moe.sync import Served, engines, named_tensors, plan_sync, served, served_weights
from ornith_moe.sync.check import differences, file_digests, stored_digests
from ornith_moe.sync.engines import buckets, send, send_to_sglang, vllm_weight_source
from ornith_moe.sync.held import Cut
from ornith_moe.sync.served import TORCH, fitting_build

BUILDS = ("fp8-channel", "fp8-block", "bf16")
SHARD_BYTES = 2 << 20
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 16, "num_hidden_layers": 2}
ODD = WIDE | {"num_experts": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sync")


@pytest.fixture(scope="module")
def models(folder):
    """fp32 masters, moved off the BF16 numbers that their checkpoints hold."""
    made = {
        "moe": AutoModelForCausalLM.from_pretrained(
            fixtures.qwen35moe(folder / "source-moe", experts=4, top_k=2), dtype=torch.float32
        ),
        "vision": transformers.AutoModelForImageTextToText.from_pretrained(
            fixtures.qwen35moe(folder / "source-vision", experts=4, top_k=2, vision=True), dtype=torch.float32
        ),
        "text of vision": transformers.Qwen3_5MoeForCausalLM.from_pretrained(
            folder / "source-vision", dtype=torch.float32
        ),
        "dense": AutoModelForCausalLM.from_pretrained(fixtures.qwen35(folder / "source-dense"), dtype=torch.float32),
        "gemma": AutoModelForCausalLM.from_pretrained(fixtures.gemma4(folder / "source-gemma"), dtype=torch.float32),
    }
    with torch.no_grad():
        for model in made.values():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.rand_like(parameter) / 256)
    return made


MODELS = ("moe", "vision", "text of vision", "dense", "gemma")


@pytest.fixture(scope="module")
def built(models, folder):
    """{model: {build: its folder}}, of checkpoints saved in BF16."""
    return {name: save_and_convert(model, folder / name, torch.bfloat16) for name, model in models.items()}


def save_and_convert(model, folder, dtype):
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    report = convert(open_source(folder), folder / "builds", BUILDS, max_shard_bytes=SHARD_BYTES)
    return {build.build: build.path for build in report.builds}


def stored(path):
    """{name: tensor} of a build, whose index names the same."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    return tensors


def assert_same_bytes(pairs, expected):
    """Names, dtypes, shapes and bytes of (name, tensor) pairs, each name once."""
    pairs = list(pairs)
    found = dict(pairs)
    assert len(found) == len(pairs) and found.keys() == expected.keys()
    for name, truth in expected.items():
        assert (found[name].dtype, found[name].shape) == (truth.dtype, truth.shape), name
        assert found[name].is_contiguous()
        assert torch.equal(found[name].view(torch.uint8), truth.view(torch.uint8)), name


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_those_of_the_build(models, built, model, build):
    expected = stored(built[model][build])
    sent = list(served_weights(models[model], build))
    assert_same_bytes(named_tensors(sent), expected)
    scaled = [one for one in sent if one.scale is not None]
    assert {one.scale_name for one in scaled} == {name for name in expected if "_scale" in name}
    assert all(one.tensor.dtype == torch.float8_e4m3fn and one.scale_name.startswith(one.name) for one in scaled)
    assert bool(scaled) == (build != "bf16")
    announced = [(tensor.name, TORCH[tensor.dtype], tensor.shape) for tensor in plan_sync(models[model], build).tensors]
    assert announced == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named_tensors(sent)]


@pytest.fixture(scope="module")
def in_dtype(models, folder):
    """{dtype: {build: its folder}} of the MoE's checkpoints in other dtypes."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16}
    return {name: save_and_convert(models["moe"], folder / name, dtype) for name, dtype in dtypes.items()}


@pytest.mark.parametrize("build", BUILDS)
def test_a_checkpoint_in_fp32_keeps_what_is_not_quantized_in_fp32(models, built, in_dtype, build):
    """What is quantized is the same whichever was saved: `convert` rounds to BF16 before it quantizes."""
    in_fp32, in_bf16 = stored(in_dtype["fp32"][build]), stored(built["moe"][build])
    assert_same_bytes(named_tensors(served_weights(models["moe"], build, saved_as=None)), in_fp32)
    differ = {name for name in in_fp32 if in_fp32[name].dtype != in_bf16[name].dtype}
    assert_same_bytes(
        ((name, in_fp32[name]) for name in in_fp32 if name not in differ),
        {name: tensor for name, tensor in in_bf16.items() if name not in differ},
    )
    kept = {name for name, tensor in in_bf16.items() if tensor.dtype == torch.bfloat16 and "_scale" not in name}
    assert differ == (set() if build == "bf16" else kept)


@pytest.mark.parametrize("build", BUILDS)
def test_a_checkpoint_in_fp16_is_rounded_twice(models, built, in_dtype, build):
    """First to fp16, as it is saved, then to BF16: other numbers than those of masters rounded once."""
    expected = stored(in_dtype["fp16"][build])
    assert_same_bytes(named_tensors(served_weights(models["moe"], build, saved_as=torch.float16)), expected)
    once = stored(built["moe"][build])
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert not torch.equal(expected[name].view(torch.uint8), once[name].view(torch.uint8))


def test_the_next_pass_sees_the_next_step(models, built):
    model = copy.deepcopy(models["moe"])
    sync = plan_sync(model, "fp8-block")
    assert_same_bytes(named_tensors(sync), stored(built["moe"]["fp8-block"]))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3].mul_(-1)
    before = stored(built["moe"]["fp8-block"])
    changed = [name for name, tensor in named_tensors(sync) if not torch.equal(tensor.float(), before[name].float())]
    assert changed == ["model.layers.1.mlp.experts.3.down_proj.weight"]


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_names_do_not_depend_on_wrappers(models, built, wrapper):
    """As DDP, torch.compile and FSDP1 name what they hold."""
    outer = torch.nn.Module()
    setattr(outer, wrapper, models["dense"])
    assert_same_bytes(named_tensors(served_weights(outer, "bf16")), stored(built["dense"]["bf16"]))


def test_a_merged_adapter_is_in_its_weight_and_another_is_refused(models, built):
    """Of linear layers, and of the fused experts by `target_parameters`."""
    fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=fused, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(models["moe"]), config)
    with pytest.raises(PlanError, match=r"call merge_adapter\(\) before the sync"):
        served_weights(model, "bf16")
    model.merge_adapter()
    merged, before = dict(named_tensors(served_weights(model, "bf16"))), stored(built["moe"]["bf16"])
    assert merged.keys() == before.keys()
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {name for name in merged if "q_proj" in name or ".experts." in name}
    base = copy.deepcopy(model).merge_and_unload()
    assert_same_bytes(named_tensors(served_weights(base, "bf16")), merged)


class TestStoredFP8:
    """Experts that a model holds in FP8, as transformers loads them on a GPU: (q, scale)."""

    @pytest.fixture
    def model(self, models, built, scale_dtype):
        """The MoE with the experts of its fp8-block build, by transformers' own replacement of modules."""
        model = copy.deepcopy(models["moe"]).to(torch.bfloat16)
        model.set_experts_implementation("ornith_fp8")
        files = stored(built["moe"]["fp8-block"])
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
    def test_stored_bytes_are_given_as_they_are(self, model, built):
        expected = stored(built["moe"]["fp8-block"])
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


def test_fp8_is_the_build_that_the_policy_computes_in(models):
    model = copy.deepcopy(models["moe"])
    for word, build in (
        ("eager", "fp8-channel"), ("ornith", "fp8-channel"), ("ornith_fp8", "fp8-block"),
        ("ornith_fp8_full", "fp8-block"), ("ornith_fp8_channel", "fp8-channel"),
    ):  # fmt: skip
        model.set_experts_implementation(word)
        assert fitting_build(model) == build == plan_sync(model).plan.name


def test_a_policy_computes_with_the_codes_that_it_is_served_with(models):
    """One quantizer: the copy that `ornith_fp8_channel` multiplies with, and what an engine gets."""
    experts = models["moe"].model.layers[1].mlp.experts
    sent = {one.name: one for one in served_weights(models["moe"], "fp8-channel")}
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


def test_what_is_given_pins_no_more_than_itself(models):
    """Experts are copies, so that whoever keeps one does not keep the fused tensor; others are the model's own."""
    model = copy.deepcopy(models["moe"]).to(torch.bfloat16)
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

    def test_a_build_that_no_engine_loads(self, models):
        with pytest.raises(PlanError, match="build gguf:Q8_0: engines load safetensors; ask for fp8-channel"):
            served_weights(models["moe"], "gguf:Q8_0")
        with pytest.raises(PlanError, match="did you mean fp8-block"):
            served_weights(models["moe"], "fp8-blok")

    def test_a_dtype_that_no_checkpoint_has(self, models):
        with pytest.raises(PlanError, match=r"saved_as: expected torch\.bfloat16"):
            served_weights(models["moe"], saved_as=torch.float64)
        with pytest.raises(PlanError, match=r"torch\.float64 is stored in no build"):
            served_weights(copy.deepcopy(models["dense"]).double())

    def test_a_model_that_its_config_does_not_describe(self, models):
        model = copy.deepcopy(models["dense"])
        model.model.value_head = torch.nn.Linear(2, 1)
        with pytest.raises(PlanError, match=r"2 tensors, the first is model\.value_head\.bias, no weight of"):
            served_weights(model)
        model = copy.deepcopy(models["dense"])
        del model.model.layers[1].mlp.up_proj
        with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj\.weight: the model has no such weight"):
            served_weights(model)
        model = copy.deepcopy(models["dense"])
        model.model.norm.weight = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(PlanError, match=r"model\.norm\.weight: expected \[256\], got \[3\]"):
            served_weights(model)

    def test_a_tied_head_with_values_of_its_own(self, models):
        model = copy.deepcopy(models["gemma"])
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        with pytest.raises(PlanError, match=r"lm_head\.weight: the config ties it to the embedding.*tie_weights\(\)"):
            served_weights(model)

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.experts.gate_up_proj"])
    def test_a_value_that_convert_refuses(self, models, name, value):
        model = copy.deepcopy(models["moe"])
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = value
        with pytest.raises(ConversionError, match=rf"the value at \[.*\] is {value}; expected finite weights"):
            list(served_weights(model, "fp8-block"))


class TestEngines:
    def test_no_engine_is_imported_before_it_is_asked_for(self):
        """Nor transformers: by the syntax trees, function bodies left out."""
        for path in Path(engines.__file__).parent.glob("*.py"):
            named = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not [line for line in map(ast.unparse, named) if re.search("vllm|sglang|transformers", line)]

    def test_load_weights(self, models, built):
        class Worker:
            """`load_weights` of a model of vLLM or SGLang."""

            def load_weights(self, weights):
                self.loaded = {name: tensor.clone() for name, tensor in weights}
                return set(self.loaded)

        worker = Worker()
        assert worker.load_weights(named_tensors(served_weights(models["moe"], "fp8-block")))
        assert_same_bytes(worker.loaded.items(), stored(built["moe"]["fp8-block"]))

    def test_vllm_pulls_a_weight_source(self, models, built, monkeypatch):
        for part in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
        monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.base", vllm_base())
        source = vllm_weight_source(models["moe"], "fp8-channel")
        assert isinstance(source, sys.modules["vllm.distributed.weight_transfer.base"].WeightSource)
        for _ in range(2):  # a fresh pass per round
            assert_same_bytes(receive(source), stored(built["moe"]["fp8-channel"]))

    def test_without_vllm_one_sentence(self, models, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(ImportError, match=r"needs vllm >= 0\.26 .*; install it, or send named_tensors"):
            vllm_weight_source(models["moe"])

    @pytest.mark.parametrize("bucket_bytes", [1, 300_000, 1 << 30])
    def test_sglang_flushes_once(self, models, built, bucket_bytes):
        engine = Engine()
        sent = send_to_sglang(engine, served_weights(models["moe"], "fp8-block"), bucket_bytes=bucket_bytes)
        expected = stored(built["moe"]["fp8-block"])
        assert_same_bytes([pair for bucket in engine.buckets for pair in bucket], expected)
        assert sent == sum(tensor.nbytes for tensor in expected.values())
        assert engine.flushed == [False] * (len(engine.buckets) - 1) + [True]

    def test_what_sglang_cannot_load_is_told(self, models):
        engine = Engine(answer=(False, "unexpected key"))
        with pytest.raises(RuntimeError, match=r"SGLang did not load .*: unexpected key; start the engine from"):
            send_to_sglang(engine, served_weights(models["moe"], "fp8-block"))
        assert send_to_sglang(None, []) == 0

    def test_a_callback_gets_buckets_of_whole_weights(self, models, built):
        got = []
        sent = send(served_weights(models["moe"], "fp8-channel"), got.append, bucket_bytes=200_000)
        assert_same_bytes([pair for bucket in got for pair in bucket], stored(built["moe"]["fp8-channel"]))
        sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in got]
        assert sum(sizes) == sent and len(sizes) > 2
        for bucket, size in zip(got, sizes, strict=True):
            names = {name for name, _ in bucket}
            assert size <= 200_000 or len(names) <= 2
            assert {name.removesuffix("_scale") for name in names} <= names
        with pytest.raises(ValueError, match="bucket_bytes: expected at least 1"):
            next(buckets([], 0))


def vllm_base():
    """vllm/distributed/weight_transfer/base.py of vLLM 0.29, as far as a source sees it."""
    module = ModuleType("vllm.distributed.weight_transfer.base")
    code = """
from abc import ABC, abstractmethod
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple

class WeightSource(ABC):
    @abstractmethod
    def metadata(self): ...
    @abstractmethod
    def __iter__(self): ...
"""
    exec(code, module.__dict__)
    return module


def receive(source):
    """(name, tensor) as a worker of the NCCL engine receives them: memory by metadata, then one broadcast each."""
    names = [(meta.name, str(meta.dtype).removeprefix("torch."), list(meta.shape)) for meta in source.metadata()]
    for (name, dtype, shape), (_, sent) in zip(names, source, strict=True):
        weight = torch.empty(shape, dtype=getattr(torch, dtype))
        assert sent.is_contiguous() and sent.nbytes == weight.nbytes
        weight.view(torch.uint8).copy_(sent.view(weight.shape).view(torch.uint8))
        yield name, weight


class Engine:
    """`sglang.Engine`, as far as a sync sees it."""

    def __init__(self, answer=(True, "Success")):
        self.buckets, self.flushed, self.answer = [], [], answer

    def update_weights_from_tensor(self, named_tensors, load_format=None, flush_cache=True):
        assert isinstance(named_tensors, list) and load_format is None
        self.buckets.append([(name, tensor.clone()) for name, tensor in named_tensors])
        self.flushed.append(flush_cache)
        return self.answer


class TestCheck:
    @pytest.mark.parametrize("build", BUILDS)
    def test_digests_are_those_of_the_manifest(self, models, built, build):
        path = built["moe"][build]
        found = file_digests(models["moe"], build, max_shard_bytes=SHARD_BYTES)
        assert found == stored_digests(path) and len(found) > 1

    @pytest.mark.parametrize("build", BUILDS)
    def test_a_build_of_this_policy(self, models, built, build):
        assert differences(models["moe"], built["moe"][build]) == []

    def test_another_policy_is_told_by_its_tensors(self, models, built):
        path, model = built["moe"]["fp8-block"], copy.deepcopy(models["moe"])
        with torch.no_grad():
            model.model.layers[2].mlp.experts.gate_up_proj[1, 300].mul_(-1)
        name = "model.layers.2.mlp.experts.1.up_proj.weight"
        assert differences(model, path) == [f"{name}: holds other values in the build than in the policy"]
        told = differences(models["dense"], path, most=1000)
        for half in ("is in the policy and not in the build", "is in the build and not in the policy"):
            assert any(half in one for one in told)
        assert differences(models["dense"], path, most=3) == told[:3]

    def test_a_checkpoint_of_another_dtype(self, models, built):
        told = differences(models["moe"], built["moe"]["fp8-block"], saved_as=None, most=1000)
        assert told and all("is BF16" in one and "torch.float32" in one for one in told)

    def test_what_is_no_build(self, models, built, tmp_path):
        with pytest.raises(CheckpointError, match="no build here"):
            differences(models["moe"], tmp_path / "none")
        with pytest.raises(CheckpointError, match=r"no ornith_manifest\.json here; compare with differences"):
            stored_digests(tmp_path)


@pytest.fixture(scope="module")
def results(models, built, folder):
    """Of both ranks, for every case of sync_worker; the two processes start once."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    for name in ("moe", "gemma"):
        models[name].save_pretrained(folder / "two" / name)
    for name, changes in (("wide", WIDE), ("odd", ODD)):
        torch.manual_seed(1)
        hf_models.model(**changes).save_pretrained(folder / "two" / name)
    torch.multiprocessing.spawn(sync_worker.run, (str(folder / "two"),), nprocs=2)
    return [torch.load(folder / f"two/results-{rank}.pt") for rank in range(2)]


def pairs(sent):
    return list(named_tensors(Served(*one) for one in sent))


class TestTwoProcesses:
    @pytest.mark.parametrize("name", sync_worker.LAYOUTS)
    def test_every_weight_on_both_ranks(self, built, results, name):
        for result in results:
            for build in BUILDS:
                assert_same_bytes(pairs(result[name][build]), stored(built["moe"][build]))
            assert_same_bytes(pairs(result[name]["in pieces"]), stored(built["moe"]["fp8-block"]))

    @pytest.mark.parametrize("name", sync_worker.LAYOUTS)
    def test_experts_from_the_ranks_that_hold_them(self, built, results, name):
        ranks = [dict(pairs(result[name]["own experts"])) for result in results]
        experts = [{part for part in rank if ".experts." in part} for rank in ranks]
        assert all(experts) and not experts[0] & experts[1]
        assert {part for part in ranks[0] if part not in experts[0]} == ranks[1].keys() - experts[1]
        assert_same_bytes((ranks[0] | ranks[1]).items(), stored(built["moe"]["fp8-block"]))

    @pytest.mark.parametrize("name", sync_worker.LAYOUTS)
    def test_only_one_rank_is_given_tensors(self, built, results, name):
        assert_same_bytes(pairs(results[0][name]["to rank 0"]), stored(built["moe"]["fp8-block"]))
        assert results[1][name]["to rank 0"] == []

    def test_experts_that_make_no_equal_blocks_or_pieces(self, results, folder):
        plain = {
            name: AutoModelForCausalLM.from_pretrained(folder / "two" / name, dtype=torch.float32)
            for name in ("odd", "wide")
        }
        expected = {name: dict(named_tensors(served_weights(model, "fp8-block"))) for name, model in plain.items()}
        for result in results:
            assert_same_bytes(pairs(result["odd"]["whole"]), expected["odd"])
            assert_same_bytes(pairs(result["odd"]["by threes"]), expected["wide"])
        ranks = [dict(pairs(result["odd"]["own experts"])) for result in results]
        assert_same_bytes((ranks[0] | ranks[1]).items(), expected["odd"])
        own = [sum("layers.0.mlp.experts" in name and "scale" not in name for name in rank) for rank in ranks]
        assert own == [3 * 4, 3 * 3]

    def test_experts_that_are_cut_or_lie_in_turns(self, built, results):
        for result in results:
            assert_same_bytes(pairs(result["cut"]["tp"]), stored(built["moe"]["fp8-block"]))
            assert "which cuts them; shard them by Shard(0), or gather" in result["cut"]["own experts"]
            assert result["cut"]["in turns"]

    def test_pieces_save_memory(self, results):
        for result in results:
            pieces, whole = (result["peak"][torch.bfloat16, size] for size in (sync_worker.PIECE_BYTES, 1 << 30))
            assert whole > 2 * pieces

    def test_a_tied_embedding_in_shards(self, built, results):
        for result in results:
            assert_same_bytes(pairs(result["by hand"]), stored(built["gemma"]["fp8-channel"]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_at_most_a_layer_of_extra_memory(self, results, dtype):
        """By torch's own account, with the buffers of the collective, of which gloo needs as much again as it fills."""
        layer = sum(p.numel() for p in hf_models.model(**WIDE).model.layers[0].parameters()) * dtype.itemsize
        for result in results:
            assert 0 < result["peak"][dtype, sync_worker.PIECE_BYTES] < layer / 2

    @pytest.mark.parametrize("name", sync_worker.LAYOUTS)
    def test_a_nan_stops_both_ranks(self, results, name):
        for result in results:
            assert "down_proj.weight: the value at" in result[name]["refused"]
