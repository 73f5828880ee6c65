"""Folders for MLX: every tensor as mlx-lm and mlx-vlm write it, and what else their loaders need.

mlx.json was recorded by tests/record_mlx.py, which says how: an MoE with a tower in BF16, a dense model in F32 with a
tied head and columns that fill no groups, one in F16, a Gemma 4. Not covered: the loaders themselves, which `make demo`
and, where mlx-lm is installed, tests/test_compare.py run.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from record_mlx import BUILDS, LAYOUTS, RECORDED, make, summary
from safetensors.torch import load_file, save_file

import ornith_moe.quant.conversion.convert as convert_module
from ornith_moe.quant.builds.build import Options, recognize
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.source.architectures import Architecture
from ornith_moe.quant.source.weights import open_source, source_from_config
from ornith_moe.quant.verification.inspect import inspect
from ornith_moe.quant.verification.verify import verify

RECORD = json.loads(Path(__file__).with_name("mlx.json").read_text(encoding="utf-8"))
INDEX = "model.safetensors.index.json"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{(model, layout): (checkpoint, {build: path})}"""
    root = tmp_path_factory.mktemp("mlx")

    def once(name, layout):
        folder = make(name, root / f"{name}-{layout}", layout)
        report = convert(open_source(folder), root / f"{name}-{layout}-out", RECORDED[name])
        return folder, {build.build: build.path for build in report.builds}

    pairs = [("moe", layout) for layout in LAYOUTS] + [("dense", "each"), ("half", "each"), ("gemma", "each")]
    return {pair: once(*pair) for pair in pairs}


@pytest.mark.parametrize("build", BUILDS)
def test_every_tensor_is_that_of_mlx(made, build):
    for (name, layout), (_, paths) in made.items():
        if build in paths:
            expected, found = RECORD[f"{name} {build}"], paths[build]
            assert summary(found) == dict(sorted(expected["tensors"].items())), layout
            config = read(found / "config.json")
            assert config.get("quantization") == config.get("quantization_config") == expected["quantization"]
            assert list(config) == sorted(config)


def test_the_index_is_always_there_and_counts_parameters(made):
    folder, paths = made["half", "each"]
    index, recorded = read(paths["mlx:4"] / INDEX), RECORD["half mlx:4"]["index"]
    assert index["metadata"]["total_size"] == recorded["total_size"]
    uncounted = sum(
        weight.shape[0] for weight in open_source(folder).weights if weight.name.endswith(("A_log", "bias"))
    )
    assert index["metadata"]["total_parameters"] - uncounted == recorded["total_parameters"]  # of no layer of mlx's
    assert list(index["weight_map"]) == sorted(RECORD["half mlx:4"]["tensors"])


def test_shards_are_of_at_most_5_gib_unless_another_size_is_asked_for():
    """As `make_shards` of mlx-lm 0.32.2 cuts the same tensors in the same order; other folders are cut at 5 GB."""
    source = open_source("ornith-1.5-9b")
    plan = plan_build(source, "mlx:8")
    layout = plan.build.lay_out(source, plan, Options())
    sizes, names, filled = [0], [file.name for file in layout.files], 0
    for tensor in plan.tensors:
        if filled + tensor.nbytes > 5 << 30:
            sizes.append(0)
            filled = 0
        filled += tensor.nbytes
        sizes[-1] = filled
    assert [file.size - len(file.header) for file in layout.files] == sizes and max(sizes) > 5_000_000_000
    assert names == [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    index = plan.build.index(source, plan, layout)
    assert index["metadata"]["total_size"] == sum(sizes) and sorted(set(index["weight_map"].values())) == names
    parameters = sum(math.prod(weight.shape) for weight in source.weights if weight.role != "mtp")
    assert index["metadata"]["total_parameters"] == parameters
    assert plan.build.files(plan, Options()) == 2 and plan.build.files(plan, Options(max_shard_bytes=2 << 30)) > 4
    dense = plan_build(source, "bf16")
    largest = max(file.size - len(file.header) for file in dense.build.lay_out(source, dense, Options()).files)
    assert largest <= 5_000_000_000


def test_a_config_says_what_is_in_the_folder(made, tmp_path):
    moe, dense = (read(made[key][1]["mlx:bf16"] / "config.json") for key in (("moe", "each"), ("dense", "each")))
    assert "vision_config" in moe and "quantization" not in moe
    assert dense["text_config"]["dtype"] == dense["dtype"] == "bfloat16" and dense["text_config"]["tie_word_embeddings"]
    config = read(made["half", "each"][0] / "config.json")
    folder = shutil.copytree(made["half", "each"][0], tmp_path / "flat")
    text = config["text_config"] | {"eos_token_id": 7, "quantization_config": {"quant_method": "stale"}}
    (folder / "config.json").write_text(json.dumps(text))
    tensors = load_file(folder / "model.safetensors")
    flat = {name.replace("language_model.", ""): tensor for name, tensor in tensors.items()}
    save_file(flat, folder / "model.safetensors")
    (build,) = convert(open_source(folder), tmp_path / "out", ["mlx:4"]).builds
    assert summary(build.path) == summary(made["half", "each"][1]["mlx:4"])
    found = read(build.path / "config.json")
    assert (found["model_type"], found["text_config"]["model_type"]) == ("qwen3_5", "qwen3_5_text")
    assert found["eos_token_id"] == 7 and found["quantization"]["bits"] == 4


def test_bytes_do_not_depend_on_the_cut(made, tmp_path, monkeypatch):
    folder, paths = made["moe", "mixed"]
    monkeypatch.setattr(convert_module, "slabs", lambda *limits: (2, 1))
    for build in convert(open_source(folder), tmp_path, ["mlx:6", "mlx:bf16"]).builds:
        assert summary(build.path) == summary(paths[build.build])


def test_every_build_is_recognized(made):
    for build, path in made["moe", "each"][1].items():
        assert recognize(StoredBuild(path)) == build


@pytest.mark.parametrize("build", ["mlx:3", "mlx:4", "mlx:bf16", "mlx:nvfp4", "mlx:mxfp8"])
def test_it_is_verified_and_recognized_with_and_without_its_source(made, tmp_path, build):
    folder, paths = made["moe", "mixed"]
    result = verify(paths[build], open_source(folder))
    assert result.ok and not result.notes, (result.problems, result.notes)
    assert result.roles["vision"]["exact"] and result.roles["norm"]["sqnr_db"] > 40
    assert any("multi-token prediction" in entry.reason for entry in result.left_out)
    assert verify(paths[build]).ok
    copy = shutil.copytree(paths[build], tmp_path / "copy")
    (copy / MANIFEST).unlink()
    assert recognize(StoredBuild(copy)) == build and verify(copy, open_source(folder)).ok
    found = inspect(copy)["metadata"]
    assert [found.get(key) for key in ("mode", "bits")] == [
        read(copy / "config.json").get("quantization", {}).get(key) for key in ("mode", "bits")
    ]


@pytest.mark.parametrize(
    ("ending", "build", "change", "word"),
    [
        ("switch_mlp.up_proj.weight", "mlx:4", lambda t: t.flip(0), "below the floor"),
        ("q_proj.scales", "mlx:4", lambda t: t * 1.2, "below the floor"),
        ("q_proj.biases", "mlx:4", lambda t: t * float("nan"), "holds a NaN"),
        ("q_proj.scales", "mlx:4", lambda t: t[:, :1].contiguous(), "needs biases [256, 1] in F16"),
        ("q_proj.biases", "mlx:4", lambda t: t.float(), "needs biases [256, 2] in F16"),
        ("conv1d.weight", "mlx:4", lambda t: t.flip(1), "below the floor"),
        ("q_norm.weight", "mlx:4", lambda t: t - 1, "below the floor"),
        ("q_proj.scales", "mlx:mxfp8", lambda t: t + 1, "below the floor"),
        ("q_proj.scales", "mlx:mxfp8", lambda t: t * 0 + 255, "holds a NaN"),
        ("q_proj.scales", "mlx:mxfp8", lambda t: t[1:].contiguous(), "needs scales [256, 4] in U8"),
        ("q_proj.weight", "mlx:mxfp8", lambda t: t.view(torch.uint8).fill_(0x7F).view(torch.uint32), "holds a NaN"),
    ],
)
def test_damage_is_found(made, tmp_path, ending, build, change, word):
    name = "moe" if "switch" in ending else "half"
    folder, paths = made[name, "each"]
    copy = shutil.copytree(paths[build], tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    changed = next(key for key in sorted(tensors) if key.endswith(ending))
    save_file(tensors | {changed: change(tensors[changed])}, copy / "model.safetensors")
    (copy / MANIFEST).unlink()
    result = verify(copy, open_source(folder))
    assert any(word in problem for problem in result.problems), result.problems


def test_a_stack_that_holds_a_nan_may_stay_as_it_is(made, tmp_path):
    folder = shutil.copytree(made["moe", "each"][0], tmp_path / "moe")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("experts.2.up_proj.weight"))
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    (build,) = convert(open_source(folder), tmp_path / "out", ["mlx:4"], non_finite="keep-bf16").builds
    stored = load_file(build.path / "model.safetensors")
    stack = "language_model.model.layers.0.mlp.switch_mlp.{}_proj.weight"
    assert stored[stack.format("up")].dtype == torch.bfloat16 and stored[stack.format("down")].dtype == torch.uint32
    result = verify(build.path, open_source(folder))
    assert result.ok and any("unquantized" in note for note in result.notes), result.notes


def test_sizes_of_the_published_builds():
    """Parameters on the card of Ornith-1.5-35B-MLX-8bit, text alone; sizes in GB of that and of the other sizes."""
    expected = {
        ("9b", 4): "5.04", ("9b", 6): "7.28", ("9b", 8): "9.51", ("35b-a3b", 8): "36.83",
        ("397b", 4): "223.0",
    }  # fmt: skip
    sources = {size: open_source(f"ornith-1.5-{size}") for size, _ in expected}
    for (size, bits), gigabytes in expected.items():
        tensors = plan_build(sources[size], f"mlx:{bits}").tensors
        text = [tensor for tensor in tensors if tensor.name.startswith("language_model.")]
        assert f"{sum(tensor.nbytes for tensor in text) / 1e9:.{len(gigabytes.split('.')[1])}f}" == gigabytes
        if (size, bits) == ("35b-a3b", 8):
            assert sum(math.prod(tensor.shape) for tensor in text) == 9_749_130_368


def test_what_mlx_cannot_hold_is_refused(made, monkeypatch):
    config = read(made["moe", "each"][0] / "config.json")
    config["text_config"] |= {"layer_types": ["full_attention", "linear_attention"]}
    with pytest.raises(PlanError, match="follows no full_attention_interval"):
        plan_build(source_from_config(config, name="m"), "mlx:4")
    source = open_source("ornith-1.0-9b")
    monkeypatch.setattr(type(source.architecture), "mlx_places", Architecture.mlx_places)
    with pytest.raises(PlanError, match="no names for MLX"):
        plan_build(source, "mlx:4")


def test_the_tower_of_gemma_has_the_names_of_mlx_vlm():
    """Of the 31B; with six layers and two blocks, names and shapes are those of mlx-vlm 0.7.10's model, all 116."""
    names = [tensor.name for tensor in plan_build(open_source("gemma-4-31b"), "mlx:bf16").tensors]
    assert len(names) == 1188
    assert {name.split(".")[0] for name in names} == {"language_model", "vision_tower", "embed_vision"}
    assert "vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight" in names
    assert "embed_vision.embedding_projection.weight" in names


def test_columns_that_fill_no_groups_are_told(made):
    plan = plan_build(open_source(made["dense", "each"][0]), "mlx:4")
    assert [fallback.kind for fallback in plan.fallbacks] == ["96 columns fill no groups of 64, stored as F32"] * 2
