"""nvfp4-ct, mxfp4, int4-ct: compressed-tensors reads what we write, and writes the same int4 and MXFP4.

Reference: compressed-tensors' own compressors and dequantizer, and nvfp4's codes. Not covered: an engine that serves.
"""

import json
import shutil

import modelopt_models
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

from ornith_moe.clients import open_client
from ornith_moe.quant.builds.build import AskedNvfp4, storage_of
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.stored import read_safetensors_build
from ornith_moe.quant.codecs.mxfp4 import encode_mxfp4
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

BUILDS = ("nvfp4-ct", "mxfp4", "int4-ct", "int4-ct-g32")
PARTS = {"nvfp4-ct": ("_packed", "_scale", "_global_scale"), "mxfp4": ("_packed", "_scale")}
INT4_PARTS = ("_packed", "_scale", "_shape")
MORE = {"hidden_size": 128, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return modelopt_models.make(tmp_path_factory.mktemp("ct") / "source", "mixed", **MORE)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """{build: folder}; nvfp4 beside them."""
    report = convert(open_source(source), tmp_path_factory.mktemp("out"), ["nvfp4", *BUILDS])
    return {build.build: build.path for build in report.builds}


def scheme(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return next(iter(QuantizationConfig.model_validate(config).config_groups.values()))


@pytest.mark.parametrize("build", BUILDS)
def test_its_own_dequantizer_gives_our_numbers(made, build):
    """Every quantized weight is targeted, nothing else is, and each decodes to our numbers, which BF16 may round."""
    stored = load_file(made[build] / "model.safetensors")
    found = read_safetensors_build(made[build])
    owners = [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]
    dense = CompressedTensorsDequantizer(made[build], dtype=torch.float32).validate(dict(stored))
    assert len(owners) == 24 and dense.keys() == {*owners, *(n for n in stored if ".weight_" not in n)}
    for owner in owners:
        parts = [stored[owner + suffix].contiguous() for suffix in PARTS.get(build, INT4_PARTS)]
        raw = [part.view(-1).view(torch.uint8).reshape(max(part.shape[0], 1) if part.dim() > 1 else 1, -1).numpy()
               for part in parts]  # fmt: skip
        ours = torch.from_numpy(storage_of(f"{owner}_packed", found).decode(tuple(raw), 0, "BF16"))
        assert dense[owner].equal(ours.bfloat16().float()), owner


@pytest.mark.parametrize("build", ["fp8-channel", "nvfp4-ct", "int4-ct"])
def test_the_cache_in_fp8_is_what_compressed_tensors_reads(build):
    source = open_source("ornith-1.0-9b")
    configs = [plan_build(source, build, kv_cache=kind).config for kind in ("bf16", "fp8")]
    scheme = QuantizationConfig.model_validate(configs[1]).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy, scheme.dynamic) == (8, "float", "tensor", False)
    assert configs[1] | {"kv_cache_scheme": None} == configs[0]


def test_nvfp4_has_the_codes_of_nvfp4(made):
    ours, theirs = (load_file(made[name] / "model.safetensors") for name in ("nvfp4-ct", "nvfp4"))
    for name in [name for name in theirs if name.endswith("_scale_2")]:
        owner = name.removesuffix("_scale_2")
        assert ours[f"{owner}_packed"].equal(theirs[owner])
        assert ours[f"{owner}_scale"].view(torch.uint8).equal(theirs[f"{owner}_scale"].view(torch.uint8))
        assert ours[f"{owner}_global_scale"].equal((1 / theirs[name]).reshape(1))


@pytest.mark.parametrize("build", ["mxfp4", "int4-ct", "int4-ct-g32"])
def test_its_own_compressor_writes_the_same(source, made, build):
    stored, dense = load_file(made[build] / "model.safetensors"), load_file(source / "model.safetensors")
    for name in [name for name in dense if ".1.mlp.shared_expert." in name or ".1.mlp.experts.2." in name]:
        for key, tensor in compressed(dense[name], scheme(made[build]), build).items():
            assert stored[name.removesuffix("weight") + key].equal(tensor), (name, key)


def compressed(weight, arguments, build):
    """What compressed-tensors makes of a weight."""
    groups = weight.unflatten(1, (-1, arguments.weights.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(
        "mxfp4-pack-quantized" if build == "mxfp4" else "pack-quantized"
    )
    return compressor.compress(state, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_at_the_edges(made, dtype):
    """Scales that round up, ties, zeros and their signs, groups of zeros, the smallest and the largest numbers."""
    around = torch.tensor([1.7421875, 1.75, 1.7578125, 1.0, 1.9921875, 0.25, 2.5, 5.0, 3.5, -0.0, 0.0, -0.05])
    rows = [around.repeat(3)[:32] * 2.0**power for power in (-126, -120, -3, 0, 1, 125)]
    rows += [torch.zeros(32), torch.full((32,), 2.0**-133), torch.randn(32, generator=torch.Generator().manual_seed(0))]
    weight = torch.stack(rows).to(dtype)
    raw = weight.view(torch.uint16) if dtype == torch.bfloat16 else weight
    codes, scales = encode_mxfp4(raw.numpy())
    expected = compressed(weight, scheme(made["mxfp4"]), "mxfp4")
    assert torch.from_numpy(scales).equal(expected["weight_scale"])
    assert torch.from_numpy(codes).equal(expected["weight_packed"])


@pytest.mark.parametrize("build", BUILDS)
def test_it_is_verified_and_recognized(source, made, tmp_path, build):
    opened = open_source(source)
    result = verify(made[build], opened)
    assert result.ok and not result.notes and result.build == build, (result.problems, result.notes)
    assert (
        result.roles["expert"]["sqnr_db"] > 14 and result.roles["attention"]["exact"] and result.roles["mtp"]["exact"]
    )
    folder = shutil.copytree(made[build], tmp_path / "copy")
    (folder / MANIFEST).unlink()
    again = verify(folder, opened)
    expected = "int4-ct-g32" if build == "int4-ct" else build  # an expert of width 96 has no groups of 128
    assert again.ok and again.build == expected, again.problems


PROJECTION = "model.language_model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("build", "part", "change", "words"),
    [
        ("nvfp4-ct", "_global_scale", lambda t: t * 0, "expected a number above zero"),
        ("nvfp4-ct", "_global_scale", lambda t: 1 / t, "below the floor"),
        ("nvfp4-ct", "_scale", lambda t: t[:1].contiguous(), "needs scales"),
        ("mxfp4", "_scale", lambda t: t[:1].contiguous(), "needs scales [96, 4] in U8"),
        ("mxfp4", "_scale", lambda t: t * 0 + 255, "is no number"),
        ("mxfp4", "_packed", lambda t: t.flip(0), "below the floor"),
        ("int4-ct", "_scale", lambda t: -t, "not positive everywhere"),
        ("int4-ct", "_scale", lambda t: t[:1].contiguous(), "needs scales of 96 rows in BF16"),
        ("int4-ct", "_shape", lambda t: t.flip(0), "its weight_shape says [128, 96]"),
        ("int4-ct", "_packed", lambda t: t.flip(0), "below the floor"),
    ],
)
def test_damage_is_found(source, made, tmp_path, build, part, change, words):
    folder = shutil.copytree(made[build], tmp_path / "copy")
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors[PROJECTION + part] = change(tensors[PROJECTION + part])
    save_file(tensors, folder / "model.safetensors")
    problems = verify(folder, open_source(source)).problems
    assert any(words in problem for problem in problems), problems


def test_a_client_that_computes_something_else_is_refused(made):
    """transformers 5.23 gives packed experts without `weight_global_scale` to their decompressor."""
    with pytest.raises(CheckpointError, match="without their weight_global_scale"):
        open_client(made["nvfp4-ct"])


def test_groups_follow_the_rows():
    nine = open_source("ornith-1.0-9b")
    for build, columns in (("int4-ct", 128), ("int4-ct-g32", 32)):
        plan = plan_build(nine, build)
        assert plan.config["config_groups"]["config_group_0"]["weights"]["group_size"] == columns
        assert plan.max_tensor_parallel == 16 and not plan.fallbacks
    head = plan_build(nine, "nvfp4-ct", nvfp4=AskedNvfp4(head=True))
    assert "lm_head" not in head.config["ignore"] and "lm_head.weight_packed" in head.types
