"""Verification: sound builds pass with the error their format has, and every kind of damage is found.

Reference: the error computed from whole tensors in float64. Damage is done to real builds, one kind at a time. Not
covered: a wrong transform that its own inverse undoes; test_gguf_logits.py is for that.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fixtures
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.codecs.gguf import DECODERS
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.accounts import account
from ornith_moe.quant.verification.inspect import inspect
from ornith_moe.quant.verification.result import verification_json
from ornith_moe.quant.verification.verify import build_has_mtp, open_against, verify

BUILDS = ["fp8-channel", "fp8-block", "bf16", "gguf:F32", "gguf:BF16", "gguf:F16", "gguf:Q8_0"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=4, mtp=True, vision=True))


@pytest.fixture(scope="module")
def paths(source, tmp_path_factory):
    report = convert(source, tmp_path_factory.mktemp("out"), BUILDS)
    return {build.build: build.path for build in report.builds}


@pytest.fixture
def build(paths, tmp_path, request):
    """A copy of a build that a test may damage, with its manifest."""
    path = paths[request.param]
    if path.is_dir():
        return Path(shutil.copytree(path, tmp_path / path.name))
    shutil.copy(f"{path}.manifest.json", tmp_path)
    return Path(shutil.copy(path, tmp_path))


@pytest.mark.parametrize("name", BUILDS)
def test_sound_builds_pass(paths, source, name):
    result = verify(paths[name], source)
    assert result.ok and result.build == name and not result.notes, result.problems
    roles = {weight.role for weight in source.weights if name.startswith("gguf") is False or weight.role != "vision"}
    assert result.roles.keys() == roles
    low, high = {"fp8-channel": (31, 33), "fp8-block": (31, 33), "gguf:Q8_0": (44, 47)}.get(name, (None, None))
    if low:
        assert low < result.roles["expert"]["sqnr_db"] < high
    elif name != "gguf:F16":
        assert result.roles["expert"] == {"sqnr_db": None, "max_abs_error": 0.0, "exact": True}
    assert result.roles["router"]["exact"]
    assert verify(paths[name]).ok, "without a source"


def test_error_is_the_error(paths, source):
    """SQNR and largest error of a role against the same figures from whole tensors."""
    stored = load_file(paths["fp8-channel"] / "model.safetensors")
    signal = noise = largest = 0.0
    for name, tensor in load_file(source.folder / "model.safetensors").items():
        if ".self_attn." in name and "norm" not in name and not name.startswith("mtp"):
            back = stored[name].double() * stored[f"{name}_scale"].double()
            signal, noise = signal + tensor.double().square().sum(), noise + (back - tensor.double()).square().sum()
            largest = max(largest, (back - tensor.double()).abs().max().item())
    found = verify(paths["fp8-channel"], source).roles["attention"]
    assert found["sqnr_db"] == pytest.approx(10 * torch.log10(signal / noise).item(), abs=1e-3)
    assert found["max_abs_error"] == pytest.approx(largest, rel=1e-6)


def edit(folder, change, *, forge=True):
    """Rewrite the one shard of a safetensors build; `forge` brings the manifest along, as a forger would."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if forge:
        (folder / MANIFEST).unlink()


def some(tensors, ending):
    return next(name for name in sorted(tensors) if name.endswith(ending))


def flip_bit(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def weights_file(build):
    return build / "model.safetensors" if build.is_dir() else build


def test_what_a_build_leaves_out_is_told(tmp_path, source, paths):
    """Buffers, a dropped MTP layer, a file beside the model and, of a GGUF, the vision tower: all of the source."""
    folder = tmp_path / "moe"
    folder.mkdir()
    buffers = {"model.position_ids": torch.arange(5)}
    tensors = load_file(source.folder / "model.safetensors")
    save_file(tensors | buffers, folder / "model.safetensors")
    save_file(buffers, folder / "adapter_model.safetensors")
    shutil.copy(source.folder / "config.json", folder)
    mtp = {name for name in tensors if name.startswith("mtp.")}
    tower = {name for name in tensors if name.startswith("model.visual.")}
    for name, expected in {"bf16": [buffers.keys()], "gguf:F32": [buffers.keys(), tower]}.items():
        found = verification_json(verify(paths[name], open_against(paths[name], folder)))
        entries = [entry for entry in found["left_out"] if entry["what"] == "tensor"]
        assert found["ok"] and [set(entry["names"]) for entry in entries] == expected
        (file,) = (entry for entry in found["left_out"] if entry["what"] == "file")
        assert file["names"] == ["adapter_model.safetensors"]
    dropped = account(open_source(folder, mtp="drop"), plan_build(open_source(folder, mtp="drop"), "bf16"))
    assert {name for entry in dropped[0] for name in entry.names} > mtp and dropped[1] == []


def test_what_is_left_out_without_a_reason_is_a_problem(source, paths):
    lost = replace(source, weights=source.weights[1:], rows=source.rows[1:])
    problems = verify(paths["bf16"], lost).problems
    assert any("embed_tokens.weight, of the source and nowhere in the build" in problem for problem in problems)


def test_mtp_that_the_manifest_has_is_missed(source, tmp_path):
    """A build without MTP is held against a source without it only if its manifest does not say otherwise."""
    report = convert(open_source(source.folder, mtp="drop"), tmp_path / "out", ["bf16"])
    path = report.builds[0].path
    assert verify(path, open_against(path, source.folder)).ok
    text = json.loads((path / MANIFEST).read_bytes())
    assert json.loads((path / "config.json").read_bytes())["text_config"]["mtp_num_hidden_layers"] == 0
    (path / MANIFEST).write_text(json.dumps(text | {"mtp": True}))
    assert any("mtp." in problem for problem in verify(path, open_against(path, source.folder)).problems)


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_one_flipped_bit_is_found(build):
    flip_bit(weights_file(build), weights_file(build).stat().st_size // 2)
    assert any("sha256" in problem for problem in verify(build).problems)


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_truncation_is_found(build):
    os.truncate(weights_file(build), weights_file(build).stat().st_size - 100)
    result = verify(build)
    assert not result.ok and "\n" not in result.problems[0]


@pytest.mark.parametrize("build", ["fp8-block", "gguf:Q8_0"], indirect=True)
@pytest.mark.parametrize("size", [0, 3, 8, 1000])
def test_what_is_left_of_a_build_is_found(build, size):
    os.truncate(weights_file(build), size)
    assert not verify(build).ok


@pytest.mark.parametrize(
    ("build", "ending", "change", "word"),
    [
        ("fp8-block", "gate_proj.weight_scale_inv", lambda t: t * 2, "SQNR"),
        ("fp8-block", "gate_proj.weight_scale_inv", lambda t: t * 0, "not positive"),
        ("fp8-block", "gate_proj.weight_scale_inv", lambda t: t[:1].clone(), "needs a scale"),
        ("fp8-channel", "k_proj.weight_scale", lambda t: t.flip(0), "SQNR"),
        ("fp8-channel", "k_proj.weight_scale", lambda t: t * float("nan"), "not positive"),
        ("fp8-channel", "k_proj.weight", lambda t: torch.full_like(t.float(), float("nan")).to(t.dtype), "NaN"),
        ("fp8-channel", "experts.1.up_proj.weight", lambda t: t.flip(0), "experts.1.up_proj.weight: SQNR"),
        ("fp8-channel", "conv1d.weight", lambda t: t + 0.01, "conv1d.weight: SQNR"),
        ("bf16", "A_log", lambda t: t * 1.01, "A_log: SQNR"),
        ("bf16", "norm.weight", lambda t: t * float("inf"), "NaN or an infinity"),
        ("bf16", "lm_head.weight", lambda t: t[:-1].clone(), "expected BF16 [520, 256], got BF16 [519, 256]"),
    ],
    indirect=["build"],
)
def test_wrong_values_are_found(build, source, ending, change, word):
    edit(build, lambda tensors: tensors.update({some(tensors, ending): change(tensors[some(tensors, ending)])}))
    result = verify(build, source)
    assert any(word in problem for problem in result.problems), result.problems
    assert "no manifest" in result.notes[0]


@pytest.mark.parametrize("build", ["fp8-channel"], indirect=True)
def test_missing_extra_and_scaleless_tensors_are_found(build, source):
    edit(build, lambda tensors: tensors.pop(some(tensors, "layers.0.mlp.gate.weight")))
    assert "layers.0.mlp.gate.weight is missing" in verify(build, source).problems[0]
    edit(build, lambda tensors: tensors.update(more=torch.zeros(2)), forge=False)
    assert any("tensor more belongs to no weight" in problem for problem in verify(build, source).problems)
    edit(build, lambda tensors: tensors.pop(some(tensors, "k_proj.weight_scale")), forge=False)
    assert "needs a scale" in verify(build).problems[0]


@pytest.mark.parametrize("build", ["gguf:F32", "gguf:Q8_0"], indirect=True)
def test_wrong_values_in_a_gguf_are_found(build, source):
    """Two heads exchanged, as a wrong transform would: hashes forged, only the comparison can tell."""
    os.unlink(f"{build}.manifest.json")
    reader = gguf.GGUFReader(build, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.attn_gate.weight")
    tensor.data[:256] = np.concatenate([tensor.data[128:256], tensor.data[:128]])
    reader.data.flush()
    del reader, tensor
    result = verify(build, source)
    assert result.build == f"gguf:{build.stem.rsplit('-', 1)[1]}"
    assert "in_proj_z.weight: SQNR" in result.problems[0]


@pytest.mark.parametrize("build", ["gguf:Q8_0"], indirect=True)
def test_a_gguf_of_another_source_is_found(build, tmp_path):
    other = open_source(fixtures.qwen35moe(tmp_path / "moe", experts=4, mtp=True, vision=True, seed=5))
    assert "SQNR" in verify(build, other).problems[0]
    fewer = open_source(fixtures.qwen35moe(tmp_path / "few" / "moe", experts=3, mtp=True, vision=True))
    assert "expected" in verify(build, fewer).problems[0]


@pytest.mark.parametrize("build", ["bf16"], indirect=True)
@pytest.mark.parametrize(
    "manifest",
    [
        {}, {"files": []}, {"files": {"a": 1}}, {"files": {"model.safetensors": {"bytes": "1", "sha256": 2}}},
        {"files": {"../config.json": {"bytes": 1, "sha256": ""}}}, {"files": {}}, {"build": 7}, {"build": "gguf:Q9"},
        {"tensors": "many"}, {"tensors": float("nan")},
    ],
)  # fmt: skip
def test_forged_manifests_are_problems(build, source, manifest):
    text = json.loads((build / MANIFEST).read_bytes())
    (build / MANIFEST).write_text(json.dumps(text | manifest if manifest else {}))
    assert not verify(build, source).ok


@pytest.mark.parametrize("build", ["bf16"], indirect=True)
def test_a_lost_file_is_found(build):
    (build / "tokenizer.json").unlink()
    assert "tokenizer.json: expected" in verify(build).problems[0]


def rewritten(source, folder, change):
    """A copy of a source whose weights `change` has edited in place."""
    shutil.copytree(source.folder, folder)
    edit(folder, change, forge=False)
    return open_source(folder)


def test_small_norms_and_decays_pass(source, tmp_path):
    """A GGUF rounds w + 1 and -exp(w): next to that the error is small, next to a small w it is not."""

    def shrink(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("norm.weight", "A_log")):
                tensors[name] = (tensor.float() * 1e-4).to(tensor.dtype)

    small = rewritten(source, tmp_path / "small", shrink)
    for build in convert(small, tmp_path / "out", ["gguf:F32", "gguf:BF16"]).builds:
        result = verify(build.path, small)
        assert result.ok, result.problems
        assert result.roles["norm"]["sqnr_db"] > 140


def test_a_norm_without_its_shift_is_found(source, paths, tmp_path):
    """The same norms one higher: what a GGUF that had forgotten the shift would be held against."""

    def shift(tensors):
        tensors["model.language_model.norm.weight"] += 1

    assert "norm.weight: SQNR" in verify(paths["gguf:F32"], rewritten(source, tmp_path / "moe", shift)).problems[0]


def test_noise_on_nothing_is_strict_json(source, tmp_path):
    """A role of zeros that came out as something else has no SQNR; it is a problem and no infinity in the JSON."""

    def clear(tensors):
        for name in tensors:
            if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
                tensors[name].zero_()

    zeros = rewritten(source, tmp_path / "zeros", clear)
    path = convert(zeros, tmp_path / "out", ["bf16"]).builds[0].path
    edit(path, lambda tensors: tensors[some(tensors, "layers.0.mlp.gate.weight")].fill_(1))
    result = verification_json(verify(path, zeros))
    assert any("SQNR -inf" in problem for problem in result["problems"])
    assert result["roles"]["router"] == {"sqnr_db": None, "max_abs_error": 1.0, "exact": False}
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("build", ["fp8-channel"], indirect=True)
@pytest.mark.filterwarnings("error")
def test_values_that_overflow_are_found(build, source):
    edit(build, lambda tensors: tensors[some(tensors, "experts.1.up_proj.weight_scale")].fill_(3e38))
    assert any("experts.1.up_proj.weight: SQNR -inf" in problem for problem in verify(build, source).problems)


@pytest.mark.parametrize("dtype", ["int64", "int32", "float64", "uint8", "float8_e5m2", "bool"])
def test_values_that_are_not_decoded_are_noted(tmp_path, dtype):
    save_file({"t": torch.zeros(4, 3).to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    result = verify(tmp_path)
    assert result.ok and result.notes[1].startswith("tensor t: ") and "not decoded here" in result.notes[1]


def written_gguf(path, name, array, kind=None, **keys):
    writer = gguf.GGUFWriter(path, "test")
    for key, value in keys.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["I64", "F64", "Q8_K", "Q1_0", "TQ1_0", "IQ2_XXS"])
@pytest.mark.parametrize("rows", [(), (3,)])
def test_any_gguf_type_is_verified_or_noted(tmp_path, kind, rows):
    """Vectors of blocks too, of which a row is no whole number of bytes."""
    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    data = np.zeros((*rows, 5 * block_bytes), np.uint8)
    if kind in ("I64", "F64"):
        data = data.view(np.int64 if kind == "I64" else np.float64)
        result = verify(written_gguf(tmp_path / "x.gguf", "t", data))
    else:
        result = verify(written_gguf(tmp_path / "x.gguf", "t", data, kind))
    noted = kind in ("I64", "F64", "Q8_K", "Q1_0")
    assert result.ok
    assert result.notes[1:] == noted * [f"tensor t: {kind} is not decoded here, its values are unchecked"]


@pytest.mark.parametrize("build", ["gguf:Q8_0"], indirect=True)
def test_a_codec_wrong_both_ways_is_found(build, source, monkeypatch):
    """Encoder and decoder agree on twice the values, so only another decoder can tell."""
    codec = DECODERS["Q8_0"]
    sound = codec.decode_blocks

    def doubled(blocks, out):
        sound(blocks, out)
        out *= 2

    assert verify(build).ok
    monkeypatch.setattr(codec, "decode_blocks", doubled)
    problems = verify(build, source).problems
    assert problems and all("Q8_0 from row 0 on decodes to other values with the gguf package" in p for p in problems)


@pytest.mark.parametrize(("shape", "block", "row"), [((7, 68), 11, 5), ((34 * 8,), 7, 7 * 32)])
def test_a_block_of_nan_is_found_in_its_row(tmp_path, shape, block, row):
    data = np.zeros(shape, np.uint8)
    data.reshape(-1, 34)[block, :2] = [0, 0x7E]  # an fp16 scale
    result = verify(written_gguf(tmp_path / "x.gguf", "t", data, "Q8_0"))
    assert f"tensor t, row {row} holds a NaN" in result.problems[0]


@pytest.mark.parametrize("file_type", ["Q8_0", [7, 7], 7.0, True])
def test_a_file_type_that_is_no_number_is_unknown(tmp_path, file_type):
    path = written_gguf(tmp_path / "x.gguf", "t", np.ones(4, np.float32), **{"general.file_type": file_type})
    assert verify(path).build == "gguf:unknown"


@pytest.mark.parametrize("method", [[], {}, 7, None])
def test_a_quant_method_that_is_no_name_is_none(tmp_path, method):
    save_file({"t": torch.zeros(4, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    assert verify(tmp_path).build == "bf16"


def test_mtp_is_told_by_names(source, paths, tmp_path):
    without = open_source(source.folder, mtp="drop")
    for build in convert(without, tmp_path, ["fp8-channel", "gguf:F32"]).builds:
        assert build_has_mtp(paths[build.build]) and not build_has_mtp(build.path)


def test_a_gguf_is_inspected_without_its_long_values(tmp_path):
    keys = {"long": "x" * 200, "many": list(range(17)), "few": ["y" * 200, "z"], "number": 3}
    metadata = inspect(written_gguf(tmp_path / "x.gguf", "t", np.ones(4, np.float32), **keys))["metadata"]
    assert metadata["long"] == "x" * 120 + "..." and metadata["many"] == "[17 values]" and metadata["number"] == 3
    assert metadata["few"] == ["y" * 120 + "...", "z"]


def test_a_device_is_no_build():
    with pytest.raises(CheckpointError, match="something that is neither"):
        verify("/dev/null")


def test_no_build_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no build here"):
        verify(tmp_path / "nothing")


def test_inspect_tells_what_is_there(paths, source):
    for name, path in paths.items():
        found = inspect(path)
        assert found["tensors"] == verify(path).tensors
        assert sum(entry["bytes"] for entry in found["dtypes"].values()) == found["tensor_bytes"], name
    assert inspect(paths["fp8-block"])["metadata"]["quant_method"] == "fp8"
    assert inspect(paths["gguf:Q8_0"])["metadata"]["general.architecture"] == "qwen35moe"
    assert inspect(paths["bf16"] / "model.safetensors")["kind"] == "safetensors file"
    json.dumps(inspect(paths["gguf:F32"]))
    with pytest.raises(CheckpointError, match="expected a folder"):
        inspect("setup.py")


COLD = """
import sys
from ornith_moe.quant.verification.verify import verify
assert verify(sys.argv[1], progress=lambda phase, done, total: print(phase)).ok
"""


@pytest.mark.parametrize("build", ["gguf:Q8_0"], indirect=True)
def test_machine_code_is_told_where_it_is_made(build, tmp_path):
    """A first process on a machine makes it, a second one finds it on the disk."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COLD, str(build)]
    phases = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    assert set(phases[0]) == {"hash", "compile", "read"}
    assert set(phases[1]) == {"hash", "read"}
