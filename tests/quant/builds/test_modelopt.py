"""nvfp4 and nvfp4-w4a4: what modelopt 0.47.0 writes of the same weights, which record_modelopt.py has recorded.

Reference: those bytes and configs; published sizes by arithmetic. Not covered: an engine that serves such a folder, for
which a GPU is needed; llama.cpp runs what its own converter makes of one (demo/run.py).
"""

import json
import shutil
from pathlib import Path

import modelopt_models
import numpy as np
import pytest
import torch
from record_modelopt import describe
from safetensors.torch import load_file, save_file

import ornith_moe.quant.conversion.convert as convert_module
from ornith_moe.quant.builds.build import AskedNvfp4
from ornith_moe.quant.builds.modelopt import with_wildcards
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.serving import serving
from ornith_moe.quant.builds.storages.fp8 import FP8Tensor
from ornith_moe.quant.builds.underflow import lost_weights, small_blocks
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.gguf.imatrix import open_imatrix, write_imatrix
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.weights import open_source, source_from_config
from ornith_moe.quant.verification.verify import verify

RECORD = json.loads((Path(__file__).parent / "modelopt.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("modelopt")
    return {layout: modelopt_models.make(root / layout, layout) for layout in ("fused", "each", "mixed")}


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    """{recording: folder} of the fused source."""
    out, source = tmp_path_factory.mktemp("out"), open_source(sources["fused"])
    more = AskedNvfp4(**modelopt_models.BUILDS["nvfp4 head fp8"][1])
    both = convert(source, out / "plain", ["nvfp4", "nvfp4-w4a4"]).builds
    (other,) = convert(source, out / "more", ["nvfp4"], nvfp4=more).builds
    return {"nvfp4": both[0].path, "nvfp4-w4a4": both[1].path, "nvfp4 head fp8": other.path}


@pytest.mark.parametrize("name", modelopt_models.BUILDS)
def test_bytes_and_configs_are_modelopts(sources, made, name):
    """Every tensor but MTP, which modelopt loses, and the input scales of FP8, which it measures."""
    source, theirs = load_file(sources["each"] / "model.safetensors"), dict(RECORD[name])
    stored = load_file(made[name] / "model.safetensors")
    mtp = {key: stored.pop(key) for key in list(stored) if key.startswith("mtp.")}
    assert mtp.keys() == {key for key in source if key.startswith("mtp.")}
    assert all(tensor.equal(source[key]) for key, tensor in mtp.items())
    scales = {key: stored.pop(key) for key in stored.keys() - theirs["tensors"].keys()}
    assert all(key.endswith("input_scale") and tensor == 1 and tensor.shape == () for key, tensor in scales.items())
    assert len(scales) == (7 if name == "nvfp4 head fp8" else 0)
    assert {key: describe(tensor) for key, tensor in stored.items()} == theirs["tensors"]

    config = json.loads((made[name] / "config.json").read_text("utf-8"))["quantization_config"]
    theirs["quantization_config"]["ignore"] += ["mtp*"] if name != "nvfp4 head fp8" else []
    assert config == theirs["quantization_config"]
    theirs["hf_quant_config"]["quantization"].get("exclude_modules", []).extend(["mtp*"])
    assert json.loads((made[name] / "hf_quant_config.json").read_text("utf-8")) == theirs["hf_quant_config"]


@pytest.mark.parametrize(("layout", "jobs", "slab"), [("each", 1, 1 << 13), ("mixed", 2, 1 << 12)])
def test_bytes_do_not_depend_on_the_source_or_the_cut(sources, made, tmp_path, monkeypatch, layout, jobs, slab):
    monkeypatch.setattr(convert_module, "slabs", lambda *limits: (jobs, slab))
    (build,) = convert(open_source(sources[layout]), tmp_path, ["nvfp4-w4a4"]).builds
    expected = load_file(made["nvfp4-w4a4"] / "model.safetensors")
    stored = load_file(build.path / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(tensor.view(torch.uint8).equal(expected[key].view(torch.uint8))
               for key, tensor in stored.items() if tensor.dim())  # fmt: skip
    assert all(tensor.equal(expected[key]) for key, tensor in stored.items() if not tensor.dim())


@pytest.mark.parametrize("name", modelopt_models.BUILDS)
def test_it_is_verified_and_recognized(sources, made, tmp_path, name):
    source = open_source(sources["fused"])
    result = verify(made[name], source)
    assert result.ok and not result.notes and result.build == modelopt_models.BUILDS[name][0], result.problems
    assert 18 < result.roles["expert"]["sqnr_db"] < 24 and result.roles["mtp"]["exact"]
    assert result.roles["head"]["exact"] == result.roles["attention"]["exact"] == (name != "nvfp4 head fp8")
    folder = shutil.copytree(made[name], tmp_path / "copy")
    (folder / MANIFEST).unlink()
    again = verify(folder, source)
    assert again.ok and again.build == result.build and len(again.notes) == 1


PROJECTION = "model.language_model.layers.1.mlp.experts.2.up_proj."


@pytest.mark.parametrize(
    ("tensor", "change", "words"),
    [
        ("weight", lambda t: t.flip(0), "below the floor"),
        ("weight_scale", lambda t: t.view(torch.uint8).index_fill(1, torch.tensor([1]), 0x7F).view(t.dtype),
         "row 0 of the scales"),
        ("weight_scale", lambda t: -t.float(), "needs scales [48, 4] in F8_E4M3, got F32"),
        ("weight_scale", lambda t: t[:-1].contiguous(), "needs scales [48, 4]"),
        ("weight_scale_2", lambda t: t * 0, "is 0.0; expected a number above zero"),
        ("weight_scale_2", lambda t: t * 4, "below the floor"),
        ("weight_scale_2", lambda t: t.reshape(1), "is F32 [1], expected F32 []"),
        ("input_scale", lambda t: t * 0, "not the constants"),
        ("input_scale", lambda t: None, "is missing from the build"),
    ],
)  # fmt: skip
def test_damage_is_found(sources, made, tmp_path, tensor, change, words):
    folder = shutil.copytree(made["nvfp4-w4a4"], tmp_path / "copy")
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(PROJECTION + tensor))
    tensors |= {} if changed is None else {PROJECTION + tensor: changed}
    save_file(tensors, folder / "model.safetensors")
    problems = verify(folder, open_source(sources["fused"])).problems
    assert any(words in problem for problem in problems), problems


def importance(path, source, largest):
    """An importance matrix that tells what every weight of this source has seen: `largest` {GGUF name: [E]}, else 3."""
    model, entries = source.architecture, {}
    for weight in source.weights:
        for place in model.gguf_places(weight) if weight.is_linear and weight.role not in ("mtp", "router") else ():
            entries[place.name] = (place.name, place.shape[0] if len(place.shape) == 3 else 1, place.shape[-1])
    with open(path, "wb") as file:
        write_imatrix(
            file, list(entries.values()),
            ((np.ones((e, k)), np.ones(e), np.array(largest.get(name, [3.0] * e))) for name, e, k in entries.values()),
            architecture=model.gguf_architecture, datasets=[], chunk_count=1, chunk_size=8,
        )  # fmt: skip
    return open_imatrix(path)


def test_scales_of_activations_can_be_measured(sources, tmp_path):
    """amax / 2688 of all experts of a layer, amax / 448 for FP8, amax 0.5 where no token came; verify takes them."""
    source = open_source(sources["fused"])
    seen = {"blk.0.ffn_up_exps.weight": [1.5, 0.0, 7.25], "blk.1.ffn_down_exps.weight": [0.0] * 3}
    seen |= {"blk.1.attn_k.weight": [12.5]}
    made = importance(tmp_path / "im.gguf", source, seen)
    rest = AskedNvfp4(rest="fp8")
    (build,) = convert(source, tmp_path / "out", ["nvfp4-w4a4"], imatrix=made, nvfp4=rest).builds
    assert any("scales of activations are from im.gguf" in note for note in build.notes)
    stored, layers = load_file(build.path / "model.safetensors"), "model.language_model.layers."
    for name, value in {
        "0.mlp.experts.1.up_proj": np.float32(7.25) / np.float32(2688),
        "0.mlp.experts.2.gate_proj": np.float32(3) / np.float32(2688),
        "1.mlp.experts.0.down_proj": np.float32(0.5) / np.float32(2688),
        "1.self_attn.k_proj": np.float32(12.5) / np.float32(448),
    }.items():
        assert stored[f"{layers}{name}.input_scale"].item() == value, name
    assert verify(build.path, source).ok
    assert convert(source, tmp_path / "out", ["nvfp4-w4a4"], imatrix=made, nvfp4=rest).builds[0].was_finished
    other = importance(tmp_path / "other.gguf", source, {})
    with pytest.raises(PlanError, match="exists already"):
        convert(source, tmp_path / "out", ["nvfp4-w4a4"], imatrix=other, nvfp4=rest)


def changed_source(sources, tmp_path, name, change):
    folder = shutil.copytree(sources["each"], tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    return open_source(folder)


def test_zeros_and_what_is_too_small(sources, tmp_path):
    """A projection of zeros has the scale 1; what is far below the largest of its tensor is lost, and counted."""
    name = PROJECTION + "weight"

    def shrink(tensor):
        tensor[:] = 0
        tensor[0, 0], tensor[1] = 1, 1e-7

    down = name.replace("up_proj", "down_proj")
    source = changed_source(sources, tmp_path, name, shrink)
    folder = shutil.copytree(source.folder, tmp_path / "zeros")
    tensors = load_file(folder / "model.safetensors")
    tensors[down][:] = 0
    save_file(tensors, folder / "model.safetensors")
    source = open_source(folder)
    (build,) = convert(source, tmp_path / "out", ["nvfp4"]).builds
    stored = load_file(build.path / "model.safetensors")
    assert stored[down + "_scale_2"] == 1 and not stored[down].any()
    assert build.underflow == {name: 64}
    assert verify(build.path, source).ok


def test_a_nan_may_stay(sources, tmp_path):
    """With leave, the experts of its layer stay as they are, and config.json says so with one wildcard."""
    source = changed_source(sources, tmp_path, PROJECTION + "weight", lambda tensor: tensor[3, 4:5].fill_(float("nan")))
    (build,) = convert(source, tmp_path / "out", ["nvfp4"], non_finite="keep-bf16").builds
    config = json.loads((build.path / "config.json").read_text("utf-8"))["quantization_config"]
    assert "model.language_model.layers.1.mlp.experts*" in config["ignore"]
    result = verify(build.path, source)
    assert result.ok and any("9 weights" in note and "unquantized" in note for note in result.notes), result.notes


def test_wildcards_reach_nothing_that_is_quantized():
    """layers.1 is not layers.10, and a module may have the name of another's beginning."""
    quantized = ["m.layers.10.mlp.up", "m.layers.2.mlp_gate.a", "m.head.a"]
    others = ["m.layers.1.mlp.up", "m.layers.1.attn.q", "m.layers.2.mlp.up", "m.norm", "m.headless"]
    assert with_wildcards(others, quantized) == {"m.layers.1.*", "m.layers.2.mlp.*", "m.norm", "m.headless"}


def test_the_published_size():
    """Ornith-1.5-9B-NVFP4 by its header, to the byte: MLP and head in four bits, attention in FP8, MTP in BF16."""
    plan = plan_build(open_source("ornith-1.5-9b"), "nvfp4", nvfp4=AskedNvfp4(True, "fp8"))
    assert (plan.tensor_bytes, len(plan.tensors), plan.max_tensor_parallel) == (8_817_959_588, 1177, 16)


def test_the_cache_in_fp8_is_a_flag_and_nothing_else(sources, made, tmp_path):
    """In the words of modelopt's recipes with kv_fp8_cast, which write no tensor for it."""
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    for name, asked in (("nvfp4", AskedNvfp4()), ("nvfp4 head fp8", AskedNvfp4(True, "fp8"))):
        (build,) = convert(
            open_source(sources["fused"]), tmp_path / name, ["nvfp4"], nvfp4=asked, kv_cache="fp8"
        ).builds
        assert any("keep keys and values in FP8, with scales of 1.0" in note for note in build.notes)
        for file, section, flag in (
            ("config.json", "quantization_config", {"kv_cache_scheme": scheme}),
            ("hf_quant_config.json", "quantization", {"kv_cache_quant_algo": "FP8"}),
        ):
            with_it, without = (json.loads((path / file).read_text("utf-8")) for path in (build.path, made[name]))
            assert with_it[section] == without[section] | flag and with_it.keys() == without.keys()
        with_it, without = (load_file(path / "model.safetensors") for path in (build.path, made[name]))
        assert with_it.keys() == without.keys()
        (build.path / MANIFEST).unlink()
        again = verify(build.path, open_source(sources["fused"]))
        assert again.ok and again.build == "nvfp4", again.problems
    source = open_source("ornith-1.5-9b")
    half, whole = (serving(source, plan_build(source, "nvfp4", kv_cache=kind)).kv_bytes for kind in ("fp8", "bf16"))
    assert 2 * half == whole


def test_every_projection_of_four_bits_has_an_input_scale():
    plan = plan_build(modelopt_models.planned(num_experts=64), "nvfp4-w4a4", nvfp4=AskedNvfp4(rest="fp8"))
    names = {tensor.name for tensor in plan.tensors}
    scaled = {name.removesuffix("weight_scale") for name in names if name.endswith(".weight_scale")}
    assert scaled == {name.removesuffix("input_scale") for name in names if name.endswith(".input_scale")}
    assert len(scaled) == 2 * 64 * 3 + 7 and plan.config["quant_algo"] == "MIXED_PRECISION"


def test_rows_of_no_whole_groups_are_kept():
    config = json.loads(json.dumps(open_source("ornith-1.0-9b").config))
    config["text_config"]["intermediate_size"] = 12288 + 8
    plan = plan_build(source_from_config(config, name="odd"), "nvfp4")
    assert len(plan.fallbacks) == 32 and "rows of no whole 16" in plan.fallbacks[0]
    assert plan.types["model.language_model.layers.0.mlp.down_proj.weight"] == "BF16"
    assert plan.types["model.language_model.layers.0.mlp.up_proj.weight"] == "U8"


def test_fp8_of_a_matrix_takes_rows_of_any_width():
    """72 columns are no whole runs of 16, in which what is too small for the scale is looked for."""
    storage = FP8Tensor().given(1.0)
    weights = np.full((3, 72), 1e-6, np.float32)
    weights[0, 0], weights[1] = 1, 0
    small = small_blocks(weights, storage)
    assert small[2].all() and small[0, 8:].all() and not small[0, :8].any() and not small[1].any()
    slab = Slab(weights.view(np.uint8), "F32")
    assert lost_weights(storage, slab, storage.encode(slab)) == 72 + 64


@pytest.mark.parametrize(
    ("name", "build", "asked", "words"),
    [
        ("gemma-4-31b", "nvfp4", AskedNvfp4(head=True), "its embedding; leave the option out"),
        ("ornith-1.0-9b", "nvfp4-w4a4", AskedNvfp4(head=True), "activations of four bits"),
    ],
)
def test_what_cannot_be_is_refused(name, build, asked, words):
    with pytest.raises(PlanError, match=words):
        plan_build(open_source(name), build, nvfp4=asked)
