"""mlx:fit= and mlx:bpw=, from the name to a folder that mlx-lm runs.

References: every tensor is that of the build that has its bits throughout, which tests/quant/builds/test_mlx.py holds
against mlx-lm's own; sizes of the files on disk; mlx-lm where it is installed, whose logits are those of the decoded
weights. Not covered: the choice itself (tests/quant/fitting/).
"""

import json
import math
from dataclasses import replace

import fixtures
import numpy as np
import pytest
from record_mlx import summary

import ornith_moe.quant.conversion.convert as convert_module
from ornith_moe.clients import MlxLm, open_client
from ornith_moe.compare import compare
from ornith_moe.quant.builds.build import Options, find_build
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.conversion.sensitivity import measure_sensitivity
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.fitting.sensitivity import Effect
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.decoded import open_decoded
from ornith_moe.quant.verification.verify import verify
from ornith_moe.streamed import compare_streamed

pytest.importorskip("scipy", reason="scipy, the extra `fit`, is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A source, and its sensitivity with effects made up: random weights alike are hard to choose among."""
    base, random = tmp_path_factory.mktemp("mlx_fit"), np.random.default_rng(0)
    source = open_source(fixtures.qwen35moe(base / "moe", experts=4), name="moe")
    found = measure_sensitivity(source, base / "s.json", types=["mlx"]).sensitivity
    effects = [Effect((t.name,), "MLX3", float(np.exp(random.normal()) * 1e-3), None) for t in found.tensors]
    return source, replace(found, text="made up", effects=tuple(effects))


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    source, found = model
    names = ["mlx:fit=4.8MB", "mlx:bpw=6"]
    return {build.build: build.path for build in convert(source, out, names, sensitivity=found).builds}


def test_sizes_and_bits_of_every_tensor(model, made, tmp_path):
    source, _ = model
    plain = {
        build.build: summary(build.path)
        for build in convert(source, tmp_path, ["mlx:2", "mlx:3", "mlx:4", "mlx:5", "mlx:6", "mlx:8"]).builds
    }
    for name, path in made.items():
        config = json.loads((path / "config.json").read_text())
        quantization = config["quantization"]
        assert quantization == config["quantization_config"] and quantization["mode"] == "affine"
        paths = {key: value["bits"] for key, value in quantization.items() if isinstance(value, dict)}
        assert len(set(paths.values()) | {quantization["bits"]}) > 2, "they differ"
        for tensor, entry in summary(path).items():
            bits = paths.get(tensor.rpartition(".")[0], quantization["bits"])
            assert entry == plain[f"mlx:{bits}"][tensor]
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        if "fit" in name:
            assert 0.95 * 4_800_000 < size <= 4_800_000
        weights = sum(math.prod(w.shape) for w in source.weights if w.role != "mtp")
        assert "fit" in name or size < 6.2 / 8 * weights + 40_000


def test_it_is_verified_and_read_back(model, made, tmp_path):
    source, _ = model
    for path in made.values():
        assert verify(path, source).ok and verify(path).ok
        (path / MANIFEST).rename(tmp_path / "away")
        assert verify(path, source).ok and open_decoded(path, source).kind.startswith("mlx:")
        (tmp_path / "away").rename(path / MANIFEST)


def test_bytes_do_not_depend_on_the_cut(model, made, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "slabs", lambda *limits: (2, 1))
    (again,) = convert(model[0], tmp_path, ["mlx:bpw=6"], sensitivity=model[1]).builds
    assert summary(again.path) == summary(made["mlx:bpw=6"])


def test_alternatives_grow_better_with_size(model, monkeypatch):
    source, found = model
    monkeypatch.setattr("ornith_moe.quant.builds.target.NEIGHBOURS", (0.9, 1.1))
    plan = plan_build(source, "mlx:bpw=6", sensitivity=found)
    others = find_build("mlx:bpw=6").alternatives(source, plan, Options(sensitivity=found))
    fits = [each.kl for each in others if "bpw" in each.build]
    assert len(fits) == 3 and fits == sorted(fits, reverse=True)
    six = next(each for each in others if each.build == "mlx:6")
    (made,) = [each for each in others if each.build == "mlx:bpw=6"]
    assert made.nbytes < six.nbytes and {"mlx:2", "mlx:8"} <= {each.build for each in others}
    assert max(each.kl for each in others if each.nbytes >= six.nbytes and "bpw" in each.build) < six.kl


def test_effects_move_bits(model):
    source, found = model
    names = [f"blk.{layer}.ffn_down_exps.weight" for layer in (0, 1)]

    def bits(*kl):
        effects = [effect for effect in found.effects if effect.tensors[0] not in names]
        effects += [Effect((name,), "MLX3", each, None) for name, each in zip(names, kl, strict=True)]
        config = plan_build(source, "mlx:bpw=6", sensitivity=replace(found, effects=tuple(effects))).config
        paths = [f"language_model.model.layers.{layer}.mlp.switch_mlp.down_proj" for layer in (0, 1)]
        return [config.get(path, config)["bits"] for path in paths]

    first, second = bits(1.0, 1e-6)
    assert first > second and bits(1e-6, 1.0) == [second, first]


def test_refusals(model, tmp_path):
    source, found = model
    with pytest.raises(PlanError, match="give at least mlx:bpw="):
        plan_build(source, "mlx:bpw=1", sensitivity=found)
    with pytest.raises(PlanError, match="expected a number as in mlx:"):
        find_build("mlx:fit=")
    gguf = measure_sensitivity(source, tmp_path / "g.json", types=["Q8_0"]).sensitivity
    with pytest.raises(PlanError, match="make one with --types mlx"):
        plan_build(source, "mlx:bpw=5", sensitivity=gguf)


def test_mlx_lm_runs_it(model, made):
    pytest.importorskip("mlx_lm", reason="needs mlx-lm and mlx[cpu], which the environment of the tests does without")
    source, tokens = model[0], np.random.default_rng(0).integers(0, 500, (2, 24))
    text = open_source(source.folder, mtp="drop")
    path = made["mlx:bpw=6"]
    with open_client(source.folder) as a, open_client(path) as b:
        assert isinstance(b, MlxLm)
        theirs = compare(a, b, tokens, range(23))
    (ours,) = compare_streamed(text, [open_decoded(path, text)], tokens, range(23)).builds
    assert theirs.kl_mean == pytest.approx(ours.kl_mean, rel=2e-2) and theirs.kl_mean > 1e-4
    assert theirs.top1 == pytest.approx(ours.top1, abs=0.03)
