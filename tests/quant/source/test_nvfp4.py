"""NVFP4 checkpoints as sources: what is NVFP4 again has their codes and scales, what is not is made of the product.

Reference: compressed-tensors 0.20, whose compressor writes one of the sources and whose dequantizer says what each is;
of ModelOpt's layout the same formula with a product. Not covered: the vendors' files, which are too large; llama.cpp's
converter, which tests/quant/builds/test_gguf_nvfp4.py has.
"""

import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import modelopt_models
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from ornith_moe.quant.builds.build import AskedNvfp4
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.sensitivity import measure_sensitivity
from ornith_moe.quant.errors import CheckpointError, OrnithError, PlanError
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

WIDTHS = {"hidden_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
SCHEME = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES["NVFP4A16"])
EXPERT = "model.language_model.layers.1.mlp.experts.1.down_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("nvfp4")


@pytest.fixture(scope="module")
def sources(root):
    """{layout: a checkpoint in it}, all of one name: `theirs` is compressed-tensors' own, of activations in NVFP4."""
    model = modelopt_models.make(root / "bf16" / "m", "mixed", **WIDTHS)
    built = {b.build: b.path for b in convert(open_source(model), root / "built", ["nvfp4", "nvfp4-ct"]).builds}
    folders = {layout: Path(shutil.copytree(path, root / layout / "m")) for layout, path in built.items()}
    folders["theirs"] = Path(shutil.copytree(folders["nvfp4-ct"], root / "theirs" / "m"))
    tensors = load_file(folders["theirs"] / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]:
        rows, packed = tensors[f"{name}_packed"].shape
        for key, tensor in compressed(torch.randn(rows, 2 * packed, generator=generator)).items():
            tensors[name.removesuffix("weight") + key] = tensor
        tensors[name.removesuffix("weight") + "input_global_scale"] = torch.ones(1)
    save_file(tensors, folders["theirs"] / "model.safetensors")
    return folders


def compressed(weight):
    groups, whole = weight.unflatten(1, (-1, 16)), generate_gparam(weight.amin(), weight.amax()).reshape(1)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), SCHEME.weights, global_scale=whole)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": whole}
    return BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").compress(state, SCHEME)


def product(tensors, name):
    """Weight `name` of a checkpoint in fp32."""
    codes = tensors.get(f"{name}_packed", tensors.get(name))
    if codes.dtype != torch.uint8:
        return codes
    values = unpack_fp4_from_uint8(codes, codes.shape[0], 2 * codes.shape[1], dtype=torch.float32)
    scale = tensors[f"{name}_scale"].float()
    if f"{name}_scale_2" in tensors:
        return values * (scale * tensors[f"{name}_scale_2"]).repeat_interleave(16, 1)
    whole = tensors[f"{name}_global_scale"]
    return dequantize(values, scale, args=SCHEME.weights, global_scale=whole, dtype=torch.float32)


@pytest.mark.parametrize("layout", ["nvfp4", "nvfp4-ct", "theirs"])
def test_weights_are_what_its_reader_computes(sources, layout):
    source, tensors = open_source(sources[layout]), load_file(sources[layout] / "model.safetensors")
    count = 0
    for index, weight in enumerate(source.weights):
        if source.codes(index):
            count += 1
            assert np.array_equal(source.read(index, 0, weight.shape[0]).float32, product(tensors, weight.name).numpy())
    assert count == 24 and any(
        note.startswith(f"24 of {len(source.weights)} weights are NVFP4") for note in source.notes
    )
    left = [name for entry in source.left_out for name in entry.names]
    assert len(left) == (24 if layout == "theirs" else 0)


def test_other_builds_are_those_of_the_product_in_fp32(sources, root):
    layout, folder = "theirs", sources["theirs"]
    tensors = load_file(folder / "model.safetensors")
    plain = Path(shutil.copytree(folder, root / f"{layout}-f32" / "m"))
    names = dict.fromkeys(re.sub(r"_(packed|scale|scale_2|global_scale)$", "", n) for n in tensors)
    names = [name for name in names if not name.endswith("input")]
    save_file({name: product(tensors, name) for name in names}, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    builds = ["gguf:Q4_0", "fp8-channel", "bf16"]
    source = open_source(folder)
    ours = convert(source, root / layout / "out", builds).builds
    for a, b in zip(ours, convert(open_source(plain), root / f"{layout}-f32" / "out", builds).builds, strict=True):
        assert verify(a.path, source).ok
        if a.path.is_file():
            assert a.path.read_bytes() == b.path.read_bytes()
            continue
        got, want = (load_file(build.path / "model.safetensors") for build in (a, b))
        assert got.keys() == want.keys()
        for name in got:  # BF16 of what an F32 checkpoint keeps in F32
            assert got[name].view(torch.uint8).equal(want[name].to(got[name].dtype).view(torch.uint8)), name


@pytest.mark.parametrize("layout", ["nvfp4", "theirs"])
def test_what_is_nvfp4_again_is_copied(sources, root, layout):
    """Also codes and scales that no encoder of ours would give; only the scale of all is inverted between layouts."""
    source, stored = open_source(sources[layout]), load_file(sources[layout] / "model.safetensors")
    builds = {b.build: b for b in convert(source, root / layout / "again", ["nvfp4", "nvfp4-ct", "gguf:NVFP4"]).builds}
    for build in builds.values():
        result = verify(build.path, source)
        assert result.ok and any("24 weights keep the codes and scales" in note for note in build.notes), (
            result.problems
        )
        same = (build.build == "nvfp4-ct") == (layout == "theirs")
        assert result.roles["expert"]["exact"] if same else result.roles["expert"]["sqnr_db"] > 130
    scales = {}
    for name, suffix in (("nvfp4", ""), ("nvfp4-ct", "_packed")):
        tensors = load_file(builds[name].path / "model.safetensors")
        for owner in [n.removesuffix("_scale_2") for n in tensors if n.endswith("_scale_2")] or [EXPERT]:
            assert tensors[owner + suffix].equal(stored[owner + ("_packed" if layout == "theirs" else "")]), owner
            assert tensors[f"{owner}_scale"].view(torch.uint8).equal(stored[f"{owner}_scale"].view(torch.uint8))
        scales[name] = tensors[EXPERT + ("_global_scale" if suffix else "_scale_2")]
    if layout == "theirs":
        whole = stored[f"{EXPERT}_global_scale"]
        assert scales["nvfp4"].equal(1 / whole[0]) and scales["nvfp4-ct"].equal(whole)
    else:
        whole = stored[f"{EXPERT}_scale_2"]
        assert scales["nvfp4"].equal(whole) and scales["nvfp4-ct"].equal((1 / whole).reshape(1))
    blocks = {tensor.name: tensor.data for tensor in GGUFReader(builds["gguf:NVFP4"].path).tensors}
    assert blocks["blk.1.ffn_down_exps.scale"][1] == scales["nvfp4"]


HELD = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "linear_attn.out_proj",
    "lm_head",
)
HALF = "linear_attn.in_proj_qkv"  # in_proj_z, which engines fuse with it, is not NVFP4


def with_attention(folder, layout):
    """The checkpoint with attention and head in NVFP4 too; the names of these weights."""
    tensors = load_file(folder / "model.safetensors")
    names = [n for n in tensors if n.removesuffix(".weight").endswith((*HELD, HALF)) and not n.startswith("mtp.")]
    for name in names:
        parts = compressed(tensors.pop(name).float())
        if layout == "nvfp4":
            parts = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"],
                     "weight_scale_2": 1 / parts["weight_global_scale"][0]}  # fmt: skip
        tensors |= {name.removesuffix("weight") + key: tensor for key, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    return [name for name in names if HALF not in name]


def is_listed(config, module):
    """Whether a config's skip list means a module, as vLLM reads it."""
    if config["quant_method"] == "modelopt":
        return any(fnmatch(module, item) for item in config["ignore"])
    patterns = [
        item.removeprefix("re:") if item.startswith("re:") else re.escape(item) + "$" for item in config["ignore"]
    ]
    return any(re.match(pattern, module) for pattern in patterns)


@pytest.mark.parametrize("layout", ["nvfp4", "theirs"])
def test_attention_that_is_nvfp4_stays_so(sources, root, tmp_path, layout):
    """Its codes and scales are not touched, no list names it, and what is fused with BF16 is BF16."""
    folder = Path(shutil.copytree(sources[layout], tmp_path / "m"))
    held, stored = with_attention(folder, layout), load_file(folder / "model.safetensors")
    source, packed = open_source(folder), "_packed" if layout == "theirs" else ""
    linear = {w.owner: w.name for w in source.weights if w.is_linear and w.role not in ("mtp", "vision", "expert")}
    assert len(held) == 6
    for build in convert(source, tmp_path / "out", ["nvfp4", "nvfp4-ct"]).builds:
        result = verify(build.path, source)
        assert result.ok and any("30 weights keep the codes" in note for note in build.notes), result.problems
        tensors, ours = load_file(build.path / "model.safetensors"), "_packed" if build.build == "nvfp4-ct" else ""
        for name in held:
            assert tensors[name + ours].equal(stored[name + packed]), name
            assert tensors[f"{name}_scale"].view(torch.uint8).equal(stored[f"{name}_scale"].view(torch.uint8))
            assert torch.allclose(product(tensors, name), product(stored, name), rtol=1e-6, atol=0)
        half = next(name for name in linear.values() if HALF in name)
        assert tensors[half].dtype == torch.bfloat16 and tensors[half].equal(product(stored, half).bfloat16())
        config = json.loads((build.path / "config.json").read_text())["quantization_config"]
        for module, name in linear.items():
            assert is_listed(config, module) == (f"{name}_scale" not in tensors), module
        again = open_source(build.path)
        assert sum(again.codes(index) is not None for index in range(len(again.weights))) == 30
        if layout == "nvfp4":  # as `compare` has the original
            original = verify(build.path, open_source(root / "bf16" / "m"))
            assert original.roles["attention"]["sqnr_db"] > 15
            assert [half in problem for problem in original.problems] == [True], "its BF16 is that of NVFP4"


def test_a_fit_keeps_all_that_is_nvfp4(sources, tmp_path):
    """Whatever room there is: what is left to choose is what its source has in BF16."""
    pytest.importorskip("scipy", reason="scipy, the extra `fit`, is not installed")
    folder = Path(shutil.copytree(sources["nvfp4"], tmp_path / "m"))
    with_attention(folder, "nvfp4")
    source, stored = open_source(folder), load_file(folder / "model.safetensors")
    found = measure_sensitivity(source, tmp_path / "s.json", types=["nvfp4"]).sensitivity
    with pytest.raises(PlanError, match="give at least nvfp4:bpw=") as told:
        plan_build(source, "nvfp4:bpw=1", sensitivity=found)
    least = str(told.value).rpartition(" ")[2]
    chosen = []
    for build in convert(source, tmp_path / "out", [least, "nvfp4:fit=1GB"], sensitivity=found).builds:
        result, tensors = verify(build.path, source), load_file(build.path / "model.safetensors")
        assert result.ok and any("30 weights keep the codes" in note for note in build.notes), result.problems
        kept = [name for name in stored if f"{name}_scale" in stored and "in_proj_" not in name]
        assert len(kept) == 30 and all(tensors[name].equal(stored[name]) for name in kept)
        layers = json.loads((build.path / "config.json").read_text())["quantization_config"]["quantized_layers"]
        chosen.append({module.rpartition(".")[2] for module, entry in layers.items() if entry["quant_algo"] == "FP8"})
    assert chosen == [{"in_proj_qkv", "in_proj_z"}, set()]


def test_attention_is_fp8_where_that_is_asked(sources, tmp_path):
    folder = Path(shutil.copytree(sources["nvfp4"], tmp_path / "m"))
    held = with_attention(folder, "nvfp4")
    plan = plan_build(open_source(folder), "nvfp4", nvfp4=AskedNvfp4(rest="fp8"))
    assert {plan.types[name] for name in held} == {"F8_E4M3", "U8"}
    assert plan.config["quantized_layers"]["lm_head"]["quant_algo"] == "W4A16_NVFP4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(EXPERT + "_global_scale"), r"F8_E4M3 \[128, 4\], none; NVFP4 of \[128, 64\] has .* F32 \[1\]"),
        (lambda t: t.update({EXPERT + "_packed": t[EXPERT + "_packed"][:, 1:].contiguous()}), "is U8 .128, 31. with"),
        (lambda t: t.pop(EXPERT + "_packed"), "already quantized, but tensor .* belongs to no weight"),
        (lambda t: t.update({EXPERT: torch.ones(128, 64)}), "belongs to no weight"),
        (lambda t: t.update({EXPERT + "_global_scale": torch.zeros(1)}), "_global_scale is 0; expected a positive"),
        (lambda t: t.update({EXPERT + "_global_scale": torch.full((1,), 1e-38)}), "is 1e-38; expected a positive"),
        (
            lambda t: t[EXPERT + "_scale"].view(torch.uint8).fill_(0),
            "_scale, row 0, column 0 is 0; expected a positive",
        ),
    ],
)
def test_half_of_it_is_refused(sources, tmp_path, change, words):
    folder = Path(shutil.copytree(sources["nvfp4-ct"], tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OrnithError, match=words):
        convert(open_source(folder), tmp_path / "out", ["nvfp4-ct"])


def test_other_kinds_of_packed_weights_are_refused(sources, tmp_path):
    folder = Path(shutil.copytree(sources["nvfp4-ct"], tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["config_group_0"]["weights"]["type"] = "int"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="already quantized"):
        open_source(folder)
