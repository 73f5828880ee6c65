"""nvfp4:fit= and nvfp4:bpw=, from the name to a folder in ModelOpt's layout.

References: every tensor is that of nvfp4, or of nvfp4 with attention in FP8, both of which tests/quant/builds/
test_modelopt.py holds against ModelOpt's own; vLLM's rules for what a config may list, written down again; sizes of the
files on disk. Not covered: an engine, which needs a GPU.
"""

import json
import math
from dataclasses import replace

import fixtures
import numpy as np
import pytest

import ornith_moe.quant.conversion.convert as convert_module
from ornith_moe.quant.builds.build import AskedNvfp4, Options, find_build
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.stored import read_safetensors_build
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.conversion.sensitivity import measure_sensitivity
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.fitting.sensitivity import Effect
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.decoded import open_decoded
from ornith_moe.quant.verification.verify import verify

pytest.importorskip("scipy", reason="scipy, the extra `fit`, is not installed")
FUSED = (("q_proj", "k_proj", "v_proj"), ("in_proj_qkv", "in_proj_z"), ("gate_proj", "up_proj"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A source, and its sensitivity with effects made up: random weights alike are hard to choose among."""
    base, random = tmp_path_factory.mktemp("nvfp4_fit"), np.random.default_rng(0)
    source = open_source(fixtures.qwen35moe(base / "moe", experts=4), name="moe")
    found = measure_sensitivity(source, base / "s.json", types=["nvfp4"]).sensitivity
    effects = [Effect((t.name,), "W4A16_NVFP4", float(np.exp(2 * random.normal()) * 1e-3), None) for t in found.tensors]
    return source, replace(found, text="made up", effects=tuple(effects))


@pytest.fixture(scope="module")
def names(model):
    """Two sizes between the least and the largest."""
    source, found = model
    with pytest.raises(PlanError, match="give at least nvfp4:fit=") as told:
        plan_build(source, "nvfp4:fit=1kB", sensitivity=found)
    least = float(str(told.value).rpartition("=")[2].removesuffix("MB"))
    return [f"nvfp4:fit={1.1 * least:.3f}MB", f"nvfp4:fit={1.3 * least:.3f}MB"]


@pytest.fixture(scope="module")
def made(model, names, tmp_path_factory):
    source, found = model
    out = tmp_path_factory.mktemp("out")
    return {build.build: build.path for build in convert(source, out, names, sensitivity=found).builds}


def summary(folder):
    return {
        name: (tensor.dtype, tensor.shape, tensor.read(0, tensor.nbytes).tobytes())
        for name, tensor in read_safetensors_build(folder).items()
    }


def listed(path):
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION" and config["ignore"] == []
    other = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    assert other["quantized_layers"] == config["quantized_layers"]
    return {module: entry["quant_algo"] for module, entry in config["quantized_layers"].items()}


def test_sizes_and_every_tensor(model, made, tmp_path):
    source, _ = model
    (plain,) = convert(source, tmp_path / "a", ["nvfp4"], nvfp4=AskedNvfp4(True, "fp8")).builds
    reference = summary(plain.path)
    for name, path in made.items():
        limit = 1e6 * float(name.partition("=")[2].removesuffix("MB"))
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        assert 0.9 * limit < size <= limit
        algorithms, found = listed(path), summary(path)
        assert {*algorithms.values()} == {"W4A16_NVFP4", "FP8"}
        for module, kind in algorithms.items():
            one = module + (".0.up_proj" if module.endswith(".experts") else "")
            own = {tensor: entry for tensor, entry in found.items() if tensor.startswith(f"{one}.")}
            assert len(own) == 3 and (f"{one}.input_scale" in own) == (kind == "FP8")
            theirs = {tensor: entry for tensor, entry in reference.items() if tensor.startswith(f"{one}.")}
            assert own == theirs or (f"{one}.input_scale" in theirs) != (kind == "FP8")


def test_what_vllm_reads(made):
    for path in made.values():
        algorithms = listed(path)
        experts = [module for module in algorithms if module.endswith(".experts")]
        assert len(experts) == 4, "routed experts are never left out"
        for module in algorithms:
            parent, _, leaf = module.rpartition(".")
            for group in FUSED:
                if leaf in group:
                    assert {algorithms.get(f"{parent}.{each}") for each in group} == {algorithms[module]}


def test_it_is_verified_and_read_back(model, made, tmp_path):
    source, _ = model
    for path in made.values():
        assert verify(path, source).ok and verify(path).ok
        (path / MANIFEST).rename(tmp_path / "away")
        assert verify(path, source).ok and open_decoded(path, source).kind == "nvfp4"
        (tmp_path / "away").rename(path / MANIFEST)


def test_bytes_do_not_depend_on_the_cut(model, names, made, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "slabs", lambda *limits: (2, 1))
    (again,) = convert(model[0], tmp_path, names[:1], sensitivity=model[1]).builds
    assert summary(again.path) == summary(made[again.build])


def test_all_the_room_there_is_is_fp8_or_as_it_was(model, tmp_path):
    source, found = model
    (build,) = convert(source, tmp_path, ["nvfp4:fit=1GB"], sensitivity=found).builds
    assert {*listed(build.path).values()} == {"FP8"} and verify(build.path, source).ok


def test_alternatives(model, names, monkeypatch):
    source, found = model
    monkeypatch.setattr("ornith_moe.quant.builds.target.NEIGHBOURS", (1.1,))
    plan = plan_build(source, names[1], sensitivity=found)
    others = find_build(names[1]).alternatives(source, plan, Options(sensitivity=found))
    assert [each.build for each in others if each.build == "nvfp4"] and len(others) == 3
    exact = plan_build(source, "nvfp4").tensor_bytes
    assert math.isclose(next(each.nbytes for each in others if each.build == "nvfp4"), exact, rel_tol=0.1)
