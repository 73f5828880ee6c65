"""Weights that hold a NaN or an infinity: told with their place, or kept unquantized by leave.

Reference: the source's own bytes, and transformers, which must load what is partly unquantized without a missing or
unexpected key. Not covered: what a model with such weights computes.
"""

import json

import fixtures
import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ornith_moe.quant.conversion.convert as convert_module
from ornith_moe.clients import open_client
from ornith_moe.quant.builds import gguf as gguf_build
from ornith_moe.quant.builds.stored import read_gguf_tensors
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.conversion.scan import non_finite_weights
from ornith_moe.quant.conversion.workers import Workers
from ornith_moe.quant.errors import ConversionError, PlanError
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

BUILDS = ["fp8-channel", "fp8-block", "bf16", "gguf:Q4_K_M", "gguf:F16"]
READS_FP8_EXPERTS = (5, 15)  # of both layouts
LAYER = "model.layers.{}."
EXPERT = LAYER.format(1) + "mlp.experts.3.up_proj.weight"
KEY = LAYER.format(3) + "self_attn.k_proj.weight"
NORM = LAYER.format(2) + "input_layernorm.weight"
PLACES = {EXPERT: (200, 77, float("nan")), KEY: (5, 0, float("-inf")), NORM: (9, 0, float("nan"))}


@pytest.fixture(scope="module", params=["each", "fused"])
def broken(request, tmp_path_factory):
    """A checkpoint with a value of `PLACES` in three weights, experts one by one or fused."""
    folder = fixtures.qwen35moe(tmp_path_factory.mktemp(request.param) / "moe", experts_layout=request.param)
    tensors = load_file(folder / "model.safetensors")
    for name, (row, column, value) in PLACES.items():
        if name in tensors:
            tensors[name].view(len(tensors[name]), -1)[row, column] = value  # a vector is a column
        else:
            tensors[LAYER.format(1) + "mlp.experts.gate_up_proj"][3, 256 + row, column] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def kept(broken, tmp_path_factory):
    out = tmp_path_factory.mktemp("kept")
    return out, convert(open_source(broken), out, BUILDS, non_finite="keep-bf16")


def test_a_scan_finds_the_first_of_each_weight(broken):
    source = open_source(broken)
    for slab, jobs in ((1 << 14, 3), (1 << 25, 1)):
        found = non_finite_weights(source, Workers(jobs, slab))
        assert {source.weights[index].name: where for index, where in found.items()} == {
            name: f"row {row}, column {column} is {value}" for name, (row, column, value) in PLACES.items()
        }


def test_without_leave_it_is_an_error_that_names_the_place(broken, tmp_path):
    """Of the three, whichever is met first."""
    with pytest.raises(ConversionError, match=r"column (77|0) is (nan|-inf).*--non-finite keep-bf16"):
        convert(open_source(broken), tmp_path / "out", ["gguf:Q4_K_M"])
    with pytest.raises(ValueError, match="non_finite: expected one of error, keep-bf16"):
        convert(open_source(broken), tmp_path / "out", ["bf16"], non_finite="zero")


def test_a_gguf_keeps_the_whole_stack(broken, kept):
    path = next(build.path for build in kept[1].builds if build.build == "gguf:Q4_K_M")
    types = {name: tensor.dtype for name, tensor in read_gguf_tensors(path).items()}
    assert types["blk.1.ffn_up_exps.weight"] == types["blk.3.attn_k.weight"] == "BF16"
    assert types["blk.2.attn_norm.weight"] == "F32"
    assert sum(kind == "BF16" for kind in types.values()) == 2
    stack = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up_exps.weight").data
    tensors = load_file(broken / "model.safetensors")
    fused = tensors.get(LAYER.format(1) + "mlp.experts.gate_up_proj")
    expert = tensors[EXPERT] if fused is None else fused[3, 256:]
    assert np.array_equal(stack.reshape(16, 256, 512)[3], expert.contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block"])
def test_an_fp8_build_keeps_what_is_fused_with_it(kept, name):
    """All experts of the layer, q k v; nothing else; and its skip list says so, so that clients load it."""
    folder = kept[0] / name
    stored = load_file(folder / "model.safetensors")
    scale = "_scale" if name == "fp8-channel" else "_scale_inv"
    linear = {name for name in stored if name.endswith("proj.weight") and ".linear_attn." not in name}
    plain = {name.removesuffix(".weight") for name in linear if stored[name].dtype == torch.bfloat16}
    experts = {f"{LAYER.format(1)}mlp.experts.{e}.{k}_proj" for e in range(16) for k in ("gate", "up", "down")}
    assert plain == experts | {f"{LAYER.format(3)}self_attn.{k}_proj" for k in "qkv"}
    assert f"{LAYER.format(2)}mlp.experts.3.up_proj.weight{scale}" in stored
    if tuple(map(int, transformers.__version__.split(".")[:2])) < READS_FP8_EXPERTS:
        pytest.skip(f"transformers {transformers.__version__} does not read experts of both FP8 layouts")
    with open_client(folder) as client:  # raises if a key is missing, unexpected or of another shape
        experts = dict(client._model.named_parameters())[LAYER.format(1) + "mlp.experts.gate_up_proj"]
        assert torch.isnan(experts[3, 256 + 200, 77]) and torch.isnan(experts).sum() == 1


def test_reports_and_manifests_say_it(broken, kept):
    for build in kept[1].builds:
        sentences = [s for s in build.fallbacks if " is nan; tensor " in s or " is -inf; tensor " in s]
        assert len(sentences) == 3 and any(s.startswith(f"{EXPERT}: row 200, column 77 is nan; ") for s in sentences)
        beside = build.path.with_name(f"{build.path.name}.manifest.json")
        manifest = build.path / MANIFEST if build.path.is_dir() else beside
        assert len(json.loads(manifest.read_bytes())["non_finite"]) == 3
        result = verify(build.path, open_source(broken))
        assert result.ok, (build.build, result.problems)
        assert sum("holds a NaN or an infinity, as its source does" in note for note in result.notes) == 3


def test_verify_takes_no_leave_that_was_not_given(broken, tmp_path):
    out = tmp_path / "out"
    convert(open_source(broken), out, ["fp8-block"], non_finite="keep-bf16")
    folder = out / "fp8-block"
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for listed in (None, [], "all", [1], ["nothing"], [f"{LAYER.format(0)}mlp.experts.0.up_proj.weight"]):
        (folder / MANIFEST).write_text(json.dumps(manifest | {"non_finite": listed}))
        assert not verify(folder).ok
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_bytes())
    skipped = config["quantization_config"]["modules_to_not_convert"]
    skipped.remove(KEY.removesuffix(".weight"))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.nan_to_num(t) if t.dtype == torch.bfloat16 else t for name, t in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    assert any("are not on its skip list" in problem for problem in verify(folder, open_source(broken)).problems)


def test_resume_goes_on_with_the_same_leave_only(broken, kept, tmp_path, monkeypatch):
    source, out = open_source(broken), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(convert_module.Journal, "record_checked", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, ["fp8-block", "gguf:Q4_K_M"], non_finite="keep-bf16")
    with pytest.raises(PlanError, match="begun with other options"):
        convert(source, out, ["fp8-block", "gguf:Q4_K_M"])
    report = convert(source, out, ["fp8-block", "gguf:Q4_K_M"], non_finite="keep-bf16")
    assert report.bytes_read == 0
    for name in ("fp8-block/model.safetensors", "fp8-block/config.json", "moe-Q4_K_M.gguf"):
        assert (out / name).read_bytes() == (kept[0] / name).read_bytes()


def test_sound_checkpoints_are_as_without(tmp_path):
    source = open_source(fixtures.qwen35(tmp_path / "moe"))
    for policy in ("error", "keep-bf16"):
        convert(source, tmp_path / policy, ["fp8-block", "gguf:Q8_0"], non_finite=policy)
    for name in ("fp8-block/model.safetensors", f"fp8-block/{MANIFEST}", "moe-Q8_0.gguf"):
        assert (tmp_path / "error" / name).read_bytes() == (tmp_path / "keep-bf16" / name).read_bytes()


def test_the_tokenizer_is_read_once_for_both_plans(broken, tmp_path, monkeypatch):
    read, calls = gguf_build.read_tokenizer, []
    monkeypatch.setattr(gguf_build, "read_tokenizer", lambda *where: calls.append(where) or read(*where))
    convert(open_source(broken), tmp_path, ["gguf:BF16", "gguf:F32"], non_finite="keep-bf16")
    assert len(calls) == 1
