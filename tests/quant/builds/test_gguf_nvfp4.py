"""gguf:NVFP4 is what llama.cpp's converter makes of our nvfp4 build, as nvfp4_gguf.json records; llama.cpp runs it.

Reference: that record, and the repacking written a second time over the build's tensors. Keys of the architecture and
the tokenizer are test_converter's. Not covered: Blackwell's kernel.
"""

import json
import shutil
from pathlib import Path

import gguf
import modelopt_models
import numpy as np
import pytest
import torch
from record_converter import summary
from record_nvfp4_gguf import NAME, WIDTHS
from safetensors.torch import load_file, save_file

from ornith_moe.clients import LlamaCpp
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.stored import read_gguf_tensors
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import OrnithError
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

RECORD = json.loads(Path(__file__).with_name("nvfp4_gguf.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(modelopt_models.make(tmp_path_factory.mktemp("gguf") / NAME, "mixed", **WIDTHS))


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    return {b.build: b.path for b in convert(source, tmp_path_factory.mktemp("out"), ["nvfp4", "gguf:NVFP4"]).builds}


def test_it_is_what_llama_cpps_converter_repacks(made):
    found = summary(made["gguf:NVFP4"])
    assert found["tensors"] == RECORD["tensors"]
    ours, theirs = (
        {k: v for k, v in keys.items() if k.startswith("general.")} for keys in (found["keys"], RECORD["keys"])
    )
    assert ours == theirs and ours["general.file_type"] == "UINT32 39"


def test_codes_and_scales_are_those_of_nvfp4(made):
    """The first layer's up projections, stacked: low nibbles are the first half of each sixteen, a scale per expert."""
    stored = load_file(made["nvfp4"] / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(made["gguf:NVFP4"]).tensors}
    for expert in range(3):
        name = f"model.language_model.layers.0.mlp.experts.{expert}.up_proj.weight"
        codes = stored[name].unflatten(1, (-1, 8))
        values = torch.stack([codes & 15, codes >> 4], -1).flatten(2)
        halves = (values[..., :8] | values[..., 8:] << 4).unflatten(1, (-1, 4)).flatten(2)
        scales = stored[f"{name}_scale"].view(torch.uint8).unflatten(1, (-1, 4))
        blocks = torch.cat([scales, halves], -1).flatten(1).numpy()
        assert np.array_equal(tensors["blk.0.ffn_up_exps.weight"].data[expert], blocks)
        assert tensors["blk.0.ffn_up_exps.scale"].data[expert] == stored[f"{name}_scale_2"].item()


def test_llama_cpp_runs_it_and_verify_reads_it(source, made, tmp_path):
    result = verify(made["gguf:NVFP4"], source)
    assert result.ok and result.build == "gguf:NVFP4" and 18 < result.roles["expert"]["sqnr_db"] < 24, result.problems
    with LlamaCpp(made["gguf:NVFP4"], context=64) as client:
        assert np.isfinite(client.log_probs([5, 6, 7, 8], [3])).all()
    path = shutil.copy(made["gguf:NVFP4"], tmp_path / "damaged.gguf")
    scale = read_gguf_tensors(path)["blk.1.ffn_down_exps.scale"]
    with path.open("r+b") as file:
        file.seek(scale.offset + 4)
        file.write(np.float32(-1).tobytes())
    assert any("is not a number above zero" in problem for problem in verify(path).problems)


def test_rows_of_no_whole_blocks_are_bf16():
    plan = plan_build(modelopt_models.planned(**WIDTHS), "gguf:NVFP4")
    assert plan.types["blk.0.ffn_down_exps.weight"] == plan.types["blk.0.ffn_up_shexp.weight"] == "NVFP4"
    shapes = {tensor.name: (tensor.shape, tensor.nbytes) for tensor in plan.tensors}
    assert shapes["blk.0.ffn_down_exps.scale"] == ((3,), 12) and shapes["blk.0.ffn_up_shexp.scale"] == ((1,), 4)
    plan = plan_build(modelopt_models.planned(moe_intermediate_size=48), "gguf:NVFP4")
    assert plan.types["blk.0.ffn_down_exps.weight"] == "BF16" and "no blocks of 64" in plan.fallbacks[0]


@pytest.fixture(scope="module")
def nvfp4(source, made):
    """Our nvfp4 build as a source of the same name."""
    return open_source(made["nvfp4"], name=source.name)


def test_an_nvfp4_source_is_repacked(nvfp4, made, tmp_path):
    """To the bytes that are made of BF16 at once, which are those of llama.cpp's converter."""
    (build,) = convert(nvfp4, tmp_path, ["gguf:NVFP4"]).builds
    assert build.path.read_bytes() == made["gguf:NVFP4"].read_bytes()
    assert any("keep the codes and scales of the source" in note for note in build.notes)
    result = verify(build.path, nvfp4)
    assert result.ok and result.roles["expert"]["exact"], result.problems
    stored = load_file(made["nvfp4"] / "model.safetensors")
    index, weight = next((i, w) for i, w in enumerate(nvfp4.weights) if w.expert == 1 and w.leaf == "down_proj")
    packed = stored[weight.name]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = table[torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()]
    scales = stored[f"{weight.name}_scale"].float() * stored[f"{weight.name}_scale_2"]
    expected = values * scales.repeat_interleave(16, 1)
    assert np.array_equal(nvfp4.read(index, 0, weight.shape[0]).float32, expected.numpy())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, n: t.pop(n + "_scale"), "with scales none, F32"),
        (lambda t, n: t.update({n: t[n][:, 1:].contiguous()}), r"NVFP4 of \[\d+, \d+\] has F8_E4M3"),
        (lambda t, n: t.pop(n + "_scale_2"), "is U8; expected BF16"),
        (lambda t, n: t.update({n + "_scale_2": torch.tensor(-1.0)}), "_scale_2 is -1; expected a positive number"),
        (
            lambda t, n: t[n + "_scale"].view(torch.uint8).fill_(0x7F),
            "_scale, row 0, column 0 is nan; expected a positive",
        ),
    ],
)
def test_half_of_it_is_refused(made, tmp_path, change, words):
    folder = Path(shutil.copytree(made["nvfp4"], tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors, next(name for name in tensors if name.endswith("experts.0.up_proj.weight")))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OrnithError, match=words):
        convert(open_source(folder), tmp_path / "out", ["gguf:NVFP4"])
