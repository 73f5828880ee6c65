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
from safetensors.torch import load_file

from ornith_moe.clients import LlamaCpp
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.stored import read_gguf_tensors
from ornith_moe.quant.conversion.convert import convert
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
