"""Weights below the range of a type's scales: counted where they are lost, and judged by what the type can hold.

Reference: the stored numbers themselves. Bytes stay ggml's (test_gguf_codecs.py). Not covered: types without encoder.
"""

import json

import fixtures
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ornith_moe.quant.builds.storages.fp8 import FP8Block, FP8Channel
from ornith_moe.quant.builds.storages.gguf import SCALES, Gguf
from ornith_moe.quant.builds.stored import StoredBuild, read_gguf_tensors
from ornith_moe.quant.builds.underflow import limit, lost_weights
from ornith_moe.quant.codecs.gguf import ENCODERS
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

NORMAL = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32) * np.float32(0.02)


def lost(storage, weights):
    slab = Slab(np.ascontiguousarray(weights, np.float32).view(np.uint8), "F32")
    return lost_weights(storage, slab, storage.encode(slab))


def test_every_type_counts_what_it_loses():
    """A row far below the range of the scales is lost, all but its zero; one of 0.02 is not, nor one of zeros.

    FP8 loses none: its BF16 scales reach as far down as the BF16 weights that it encodes.
    """
    storages = {name: Gguf(name, lambda: np.ones(256, np.float32)) for name in ENCODERS if name not in ("F32", "BF16")}
    storages |= {storage.name: storage for storage in (FP8Channel(), FP8Block())}
    assert storages.keys() == SCALES.keys() | {FP8Channel.name, FP8Block.name}
    for name, storage in storages.items():
        weights = NORMAL.copy()
        assert lost(storage, NORMAL) == 0, name
        weights[3] = np.float32(limit(storage) * (1e-3 if name.startswith("F8") else 1e-4)) * np.sign(NORMAL[3])
        weights[3, 7], weights[5] = 0, 0
        assert lost(storage, weights) == (0 if name.startswith("F8") else 255), name
        assert lost(storage, np.zeros_like(NORMAL)) == 0, name


def test_rows_that_differ_a_little_are_not_called_lost():
    """Shortly below the limit a scale has few digits, but the weights are there."""
    for name in ("Q8_0", "Q4_0", "Q6_K", "F16"):
        weights = NORMAL / np.abs(NORMAL).max() * np.float32(limit(Gguf(name)) * 0.9)
        assert lost(Gguf(name), weights) < 0.05 * weights.size, name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A dense model with two rows of 1e-9 in one matrix."""
    folder = fixtures.qwen35(tmp_path_factory.mktemp("src") / "tiny")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][10:12] = tensors[name][10:12].sign() * 1e-9
    save_file(tensors, folder / "model.safetensors")
    return folder, int((tensors[name][10:12] != 0).sum())


def test_builds_that_lose_weights_say_so_and_verify(tiny, tmp_path):
    folder, count = tiny
    builds = ["gguf:Q8_0", "gguf:Q4_K_M", "gguf:F16", "gguf:BF16", "fp8-channel"]
    report = convert(open_source(folder), tmp_path, builds)
    for build in report.builds:
        expected = {"blk.1.ffn_up.weight": count} if build.build in builds[:3] else {}
        assert build.underflow == expected, build.build
        manifest = json.loads(StoredBuild(build.path).manifest.read_bytes())
        assert manifest.get("underflow", {}) == expected
        result = verify(build.path, open_source(folder))
        assert result.ok, (build.build, result.problems)
        told = [note for note in [*build.notes, *result.notes] if "are too small for the range of" in note]
        assert len(told) == 2 * bool(expected)
        assert not result.roles["mlp"]["exact"] or build.build == "gguf:BF16"
    again = convert(open_source(folder), tmp_path, builds)
    assert [build.underflow for build in again.builds] == [build.underflow for build in report.builds]


def test_damage_among_weights_too_small_is_found(tiny, tmp_path):
    """A scale that came to be one, in a block that holds nothing: the floor looks away, the bound does not."""
    folder = tiny[0]
    path = convert(open_source(folder), tmp_path, ["gguf:Q8_0"]).builds[0].path
    tensor = read_gguf_tensors(path)["blk.1.ffn_up.weight"]
    StoredBuild(path).manifest.unlink()
    row = tensor.nbytes // tensor.shape[0]
    with open(path, "r+b") as file:
        file.seek(tensor.offset + 10 * row)
        file.write(np.float16(1).tobytes() + bytes([1] * 32))
    assert "layers.1.mlp.up_proj.weight: SQNR -inf" in verify(path, open_source(folder)).problems[0]


def test_forged_counts_are_a_problem(tiny, tmp_path):
    folder = tiny[0]
    path = convert(open_source(folder), tmp_path, ["gguf:F32"]).builds[0].path
    manifest = json.loads(StoredBuild(path).manifest.read_bytes())
    for forged in ([], {"x": 1}, {"token_embd.weight": "1"}, {"token_embd.weight": -1}, 7):
        StoredBuild(path).manifest.write_text(json.dumps(manifest | {"underflow": forged}))
        assert any("counts lost weights" in problem for problem in verify(path).problems), forged
