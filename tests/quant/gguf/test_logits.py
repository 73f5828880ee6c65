"""Every transform between Hugging Face and GGUF, proved by running both: llama.cpp and transformers on one model.

Reference: transformers in fp32 on random fixtures, whose norms, A_log, convolutions and scalars are all random, so that
a forgotten shift or a wrong head order moves the logits. The bars on |d logprob| are 4e-4 for Qwen (measured 9e-5) and
4e-2 for Gemma (measured 3e-2), whose activation llama.cpp tabulates in fp16. Not covered: quality, which needs trained
weights, and context beyond 48 tokens.
"""

import json

import fixtures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ornith_moe.clients import open_client
from ornith_moe.compare import compare, log_probs
from ornith_moe.imatrix import make_imatrix
from ornith_moe.quant.builds.stored import read_gguf_tensors
from ornith_moe.quant.codecs.gguf import ENCODERS
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.fp8 import dequantize_fp8
from ornith_moe.quant.gguf.imatrix import open_imatrix
from ornith_moe.quant.gguf.mixtures import FILE_TYPES
from ornith_moe.quant.source.weights import open_source

TOKENS = np.random.default_rng(0).integers(0, 230, 48)  # ids every fixture's tokenizer has
POSITIONS = [3, 11, 19, 27, 35, 43, 46]
CASES = {
    "qwen35moe": ("qwen35moe", {}, 4e-4),
    "qwen35moe fused": ("qwen35moe", {"experts_layout": "fused", "seed": 1}, 4e-4),
    "qwen35moe with MTP and vision": ("qwen35moe", {"mtp": True, "vision": True, "seed": 2}, 4e-4),
    "qwen35": ("qwen35", {}, 4e-4),
    "qwen35 with MTP": ("qwen35", {"mtp": True, "seed": 3}, 4e-4),
    "gemma4": ("gemma4", {}, 4e-2),
}


@pytest.mark.parametrize("case", CASES)
def test_f32_gguf_computes_what_transformers_computes(tmp_path, case):
    kind, options, bar = CASES[case]
    folder = getattr(fixtures, kind)(tmp_path / "model", **options)
    report = convert(open_source(folder), tmp_path / "out", ["gguf:F32"])
    with open_client(folder) as truth, open_client(report.builds[0].path) as client:
        p, q = (log_probs(c, TOKENS[None], POSITIONS) for c in (truth, client))
        assert np.abs(p - q).max() < bar
        assert (p.argmax(-1) == q.argmax(-1)).all()
        assert np.ptp(p, axis=-1).min() > 5, "logits that differ, or the comparison shows nothing"


@pytest.mark.parametrize("tensor", ["A_log", "in_proj_z.weight", "linear_attn.norm.weight", "q_norm.weight"])
def test_the_comparison_would_see_a_wrong_transform(tmp_path, tensor):
    """Disturb one small tensor of the source by 3 % or swap two heads: the bar is passed by far."""
    folder = fixtures.qwen35moe(tmp_path / "model")
    report = convert(open_source(folder), tmp_path / "out", ["gguf:F32"])
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(tensor):
            tensors[name] = tensors[name].roll(128, 0) if tensor == "in_proj_z.weight" else tensors[name] * 1.03
    save_file(tensors, folder / "model.safetensors")
    with open_client(folder) as disturbed, open_client(report.builds[0].path) as client:
        p, q = (log_probs(c, TOKENS[None], POSITIONS) for c in (disturbed, client))
    assert np.abs(p - q).max() > 10 * 4e-4


@pytest.mark.parametrize("build", ["gguf:BF16", "gguf:F16", "gguf:Q8_0"])
def test_other_types_load_and_complete(tmp_path, build):
    folder = fixtures.qwen35moe(tmp_path / "model")
    path = convert(open_source(folder), tmp_path / "out", [build]).builds[0].path
    with open_client(folder) as truth, open_client(path) as client:
        assert isinstance(client.complete("def route(", 4), str)
        found = compare(truth, client, TOKENS, POSITIONS)
    assert 0 < found.kl_mean < 1  # random weights: no measure of quality


def test_llama_cpp_loads_every_mixture(tmp_path):
    """K-quants, codebooks, ternary and mixed types: each set of types once; it loads, and its logits are no noise."""
    folder = fixtures.qwen35moe(tmp_path / "model", experts=4, top_k=2, mtp=True)
    source, text = open_source(folder, mtp="drop"), tmp_path / "text.txt"  # which measures no MTP layer
    text.write_text("def route(x):\n    return x\n" * 40)
    make_imatrix(source, text, tmp_path / "im.gguf", chunks=2, ctx=64, process_output=True)  # some types insist on one
    types = [name for name, kind in FILE_TYPES.items() if kind.base in ENCODERS and not kind.name.endswith("K_S")]
    builds = [f"gguf:{name}" for name in types]
    report = convert(source, tmp_path / "out", builds, imatrix=open_imatrix(tmp_path / "im.gguf"))
    by_types = {frozenset(t.dtype for t in read_gguf_tensors(build.path).values()): build for build in report.builds}
    assert len(by_types) > 12
    with open_client(folder) as truth:
        p = log_probs(truth, TOKENS[None], POSITIONS)
        for build in by_types.values():
            with open_client(build.path) as client:
                q = log_probs(client, TOKENS[None], POSITIONS)
            assert np.isfinite(q).all(), build.build
            if "TQ" not in build.build:  # ternary numbers say nothing of other weights
                assert np.corrcoef(p.reshape(-1), q.reshape(-1))[0, 1] > 0.2, build.build  # 0.02 by chance


@pytest.mark.parametrize("build", ["fp8-channel", "fp8-block", "bf16"])
@pytest.mark.parametrize("kind", ["qwen35moe", "qwen35", "gemma4"])
def test_transformers_loads_every_safetensors_build(tmp_path, kind, build):
    """No missing, unexpected or mismatched key (open_client raises), and the weights are the dequantized ones."""
    folder = getattr(fixtures, kind)(tmp_path / "model")
    path = convert(open_source(folder), tmp_path / "out", [build]).builds[0].path
    with open_client(folder) as truth, open_client(path) as client:
        found = compare(truth, client, TOKENS, POSITIONS)
    assert found.kl_mean < 1 and (build == "bf16") == (found.kl_mean == 0)
    assert json.loads((path / "config.json").read_bytes())["model_type"].startswith(("qwen3_5", "gemma4"))


def test_compressed_tensors_decompresses_the_channel_build(tmp_path):
    """The library behind the format makes every weight dense, from our config and names, to our own values."""
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

    folder = fixtures.qwen35moe(tmp_path / "model", mtp=True, vision=True)
    path = convert(open_source(folder), tmp_path / "out", ["fp8-channel"]).builds[0].path
    stored = load_file(path / "model.safetensors")
    dense = CompressedTensorsDequantizer(path).validate(dict(stored))
    assert dense.keys() == load_file(folder / "model.safetensors").keys()
    for name, tensor in dense.items():
        scale = stored.get(f"{name}_scale")
        expected = stored[name] if scale is None else dequantize_fp8(stored[name], scale)
        assert torch.equal(tensor, expected), name
