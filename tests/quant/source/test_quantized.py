"""FP8 checkpoints as sources: every build is that of code * scale in fp32, and the same layout is copied.

Reference: the same checkpoint with its FP8 weights multiplied out by torch and saved in F32, whose builds must be equal
to the byte. Layouts: our own fp8-channel and fp8-block builds, which those of the vendors are, and what our builds do
not write: F32 scales, one scale per tensor, stacked experts. Not covered: the vendors' files, which are too large.
"""

import json
import re
import shutil
from pathlib import Path

import fixtures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.conversion import prepare
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import OrnithError
from ornith_moe.quant.source.slab import QuantizedSlab, e4m3_values
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

BUILDS = {
    "fp8-channel": ("fp8-channel", "fp8-block", "bf16", "gguf:Q4_K_M"),
    "fp8-block": ("gguf:F32",),
    "tensor": ("fp8-block",),
    "stacked": ("fp8-block", "gguf:Q8_0"),
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt", "version": "0.47.0"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fp8")


@pytest.fixture(scope="module")
def model(root):
    return fixtures.qwen35moe(root / "m", experts=2, top_k=1, mtp=True, vision=True)


@pytest.fixture(scope="module")
def sources(root, model):
    """{layout: folder of a checkpoint in it}, all of one name."""
    built = {b.build: b.path for b in convert(open_source(model), root / "built", ["fp8-channel", "fp8-block"]).builds}
    folders = {layout: Path(shutil.copytree(path, root / layout / "m")) for layout, path in built.items()}
    for layout, change in (("tensor", _per_tensor), ("stacked", _stacked)):
        folders[layout] = Path(shutil.copytree(built["fp8-block"], root / layout / "m"))
        config = json.loads((folders[layout] / "config.json").read_text())
        tensors = change(load_file(folders[layout] / "model.safetensors"), config)
        (folders[layout] / "config.json").write_text(json.dumps(config))
        save_file(tensors, folders[layout] / "model.safetensors")
    return folders


def _per_tensor(tensors, config):
    """ModelOpt's: F32 scalars, and scales of activations beside them."""
    config["quantization_config"] = MODELOPT
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale = tensors.pop(name)
        tensors[name.removesuffix("_inv")] = scale.float().mean()
        tensors[name.replace("weight_scale_inv", "input_scale")] = torch.tensor(1.0)
    return tensors


def _stacked(tensors, config):
    """transformers' own: experts [E, 2I, H] with F32 scales [E, 2I / 128, H / 128], MTP one by one."""
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = tensors[name].float() * 1.001  # no BF16 any more
    for prefix in {name.split("experts.0.")[0] for name in tensors if "layers" in name and "experts.0." in name}:
        if prefix.startswith("mtp"):
            continue
        for suffix in (".weight", ".weight_scale_inv"):
            names = {p: [f"{prefix}experts.{e}.{p}_proj{suffix}" for e in range(2)] for p in ("gate", "up", "down")}
            gate, up, down = ([tensors.pop(name) for name in names[p]] for p in ("gate", "up", "down"))
            end = suffix.removeprefix(".weight")
            view = (lambda t: t.view(torch.uint8)) if not end else (lambda t: t)
            both = [torch.cat([view(g), view(u)]) for g, u in zip(gate, up, strict=True)]
            tensors[f"{prefix}experts.gate_up_proj{end}"] = torch.stack(both).view(gate[0].dtype)
            tensors[f"{prefix}experts.down_proj{end}"] = torch.stack([view(d) for d in down]).view(down[0].dtype)
    return tensors


def multiplied_out(folder: Path, out: Path) -> Path:
    """The checkpoint with its FP8 weights in F32, by torch."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]:
        codes = tensors[name].float()
        scale = tensors.pop(f"{name}_scale_inv" if f"{name}_scale_inv" in tensors else f"{name}_scale").float()
        for dim in range(-2, 0):
            if scale.dim():
                scale = scale.repeat_interleave(codes.shape[dim] // scale.shape[dim], dim)
        tensors[name] = codes * scale
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("input_scale")}
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("layout", BUILDS)
def test_builds_are_those_of_the_product_in_fp32(sources, root, layout):
    folder = sources[layout]
    source, plain = open_source(folder), open_source(multiplied_out(folder, root / f"{layout}-f32" / "m"))
    ours = convert(source, root / layout / "out", BUILDS[layout]).builds
    theirs = convert(plain, root / f"{layout}-f32" / "out", BUILDS[layout]).builds
    for a, b in zip(ours, theirs, strict=True):
        assert verify(a.path, source).ok
        if a.path.is_file():
            assert a.path.read_bytes() == b.path.read_bytes(), a.build
            continue
        copied = json.loads((a.path / "ornith_manifest.json").read_text()).get("copied", 0)
        assert (copied > 0) == (a.build == layout or (layout, a.build) == ("stacked", "fp8-block"))
        assert "quantization_config" not in json.loads((a.path / "config.json").read_text()) or a.build != "bf16"
        got, want = (load_file(build.path / "model.safetensors") for build in (a, b))
        assert got.keys() == want.keys()
        for name in () if copied else got:  # kept weights: BF16 of what an F32 checkpoint keeps in F32
            assert got[name].equal(want[name].to(got[name].dtype)), name


@pytest.mark.parametrize("layout", ["fp8-channel", "fp8-block"])
def test_the_same_layout_is_copied(sources, root, layout):
    """Codes that no encoder of ours would give, too: each scale is a power of two too large."""
    folder = Path(shutil.copytree(sources[layout], root / f"{layout}-other" / "m"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            tensors[name] = (tensor.float() / 2).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    (build,) = convert(open_source(folder), root / f"{layout}-other" / "out", [layout]).builds
    stored = load_file(build.path / "model.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype and stored[name].view(torch.uint8).equal(tensor.view(torch.uint8))
    assert any("keep the codes and scales of the source" in note for note in build.notes)
    assert verify(build.path, open_source(folder)).ok
    assert not verify(build.path, open_source(sources[layout])).ok


def test_stacked_experts_with_f32_scales_are_copied(sources, root):
    """Rows of the gate, and of an expert, are whole blocks there; the scales keep their dtype."""
    (build,) = convert(open_source(sources["stacked"]), root / "unstacked", ["fp8-block"]).builds
    stored, stacked = (load_file(path / "model.safetensors") for path in (build.path, sources["stacked"]))
    prefix = "model.language_model.layers.1.mlp.experts."
    up = stacked[f"{prefix}gate_up_proj_scale_inv"][1, 2:]
    assert stored[f"{prefix}1.up_proj.weight_scale_inv"].equal(up) and up.dtype == torch.float32
    codes = stacked[f"{prefix}gate_up_proj"].view(torch.uint8)[1, 256:]
    assert stored[f"{prefix}1.up_proj.weight"].view(torch.uint8).equal(codes)


def test_slabs_change_no_byte(sources, root, monkeypatch):
    whole = convert(open_source(sources["stacked"]), root / "stacked" / "out", BUILDS["stacked"]).builds
    monkeypatch.setattr(prepare, "MAX_SLAB_BYTES", 1)
    cut = convert(open_source(sources["stacked"]), root / "cut", BUILDS["stacked"], jobs=2).builds
    assert whole[1].path.read_bytes() == cut[1].path.read_bytes()
    assert (whole[0].path / "model.safetensors").read_bytes() == (cut[0].path / "model.safetensors").read_bytes()


def test_blocks_that_are_not_whole():
    """A matrix of 200 x 300 has blocks of 72 rows and of 44 columns at its edges."""
    codes = torch.randn(200, 300).to(torch.float8_e4m3fn)
    factors = np.random.RandomState(0).rand(200, 3).astype(np.float32)
    slab = QuantizedSlab((codes.view(torch.uint8).numpy(), np.zeros((2, 6), np.uint8)), factors, 128)
    expected = codes.float() * torch.from_numpy(factors).repeat_interleave(128, 1)[:, :300]
    assert np.array_equal(slab.float32, expected.numpy()) and slab.rows == 200 and slab.tensor.equal(expected)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(e4m3_values(), every, equal_nan=True) and np.array_equal(
        np.signbit(every[:127]), [False] * 127
    )


def test_a_nan_may_stay(sources, root):
    folder = Path(shutil.copytree(sources["fp8-block"], root / "nan" / "m"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.3.self_attn.k_proj.weight"))
    tensors[name].view(torch.uint8)[3, 4] = 0xFF
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OrnithError, match=r"k_proj.weight: row 3, column 4 is nan; expected finite"):
        convert(open_source(folder), root / "nan" / "a", ["fp8-block"])
    builds = convert(open_source(folder), root / "nan" / "b", ["fp8-block", "bf16"], non_finite="keep-bf16").builds
    for build in builds:
        assert verify(build.path, open_source(folder)).ok
        assert load_file(build.path / "model.safetensors")[name].isnan().sum() == 1


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("fp8-block", lambda t, n, s: t.pop(s), r"q_proj.weight is F8_E4M3 and needs one scale, but no .*use its BF16"),
        ("fp8-block", lambda t, n, s: t.update({n + "_scale": t[s].clone()}), "both .* are here"),
        ("fp8-block", lambda t, n, s: t.update({s: t[s][:1].clone()}), r"_scale_inv is BF16 \[1, 2\]"),
        ("fp8-block", lambda t, n, s: t.update({s: t[s].double()}), "_scale_inv is F64"),
        ("fp8-block", lambda t, n, s: t.update({n: t[n].float()}), "_scale_inv belongs to no weight in FP8"),
        ("fp8-block", lambda t, n, s: t.update({n: t[n].float().to(torch.float8_e5m2)}), "is F8_E5M2; .*only FP8"),
        ("fp8-block", lambda t, n, s: t.update({n: t[n].view(torch.uint8)}), "is U8; expected"),
        ("fp8-channel", lambda t, n, s: t.update({s: t[s][1:].clone()}), r"_scale is BF16 \[1023, 1\]"),
        ("tensor", lambda t, n, s: t.update({s: torch.ones(2)}), r"_scale is F32 \[2\]"),
    ],
)
def test_half_of_a_quantized_weight_is_refused(sources, tmp_path, layout, change, words):
    folder = Path(shutil.copytree(sources[layout], tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.3.self_attn.q_proj.weight"))
    change(
        tensors, name, next(f"{name}{suffix}" for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in tensors)
    )
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OrnithError, match=words) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e38])
def test_a_scale_is_a_positive_number(sources, tmp_path, value):
    folder = Path(shutil.copytree(sources["tensor"], tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.3.self_attn.q_proj.weight_scale"))
    save_file(tensors | {name: torch.tensor(value)}, folder / "model.safetensors")
    with pytest.raises(OrnithError, match=rf"{re.escape(name)}, row 0, column 0 is {re.escape(f'{value:.4g}')}"):
        convert(open_source(folder), tmp_path / "out", ["bf16"])


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "awq"}, {"quant_method": "gptq"}, {"quant_method": "bitsandbytes"}, {"quant_method": "mxfp4"},
        {"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}, "fp8", {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}},
    ],
)  # fmt: skip
def test_other_methods_are_refused(sources, tmp_path, section):
    folder = Path(shutil.copytree(sources["fp8-block"], tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    for path in (folder, folder / "config.json"):
        with pytest.raises(OrnithError, match=r"already quantized .*BF16 original"):
            open_source(path)


def test_the_size_of_a_block_is_the_configs(sources, tmp_path):
    folder = Path(shutil.copytree(sources["fp8-block"], tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OrnithError, match=r"_scale_inv is BF16"):
        open_source(folder)
    config["quantization_config"]["weight_block_size"] = [128, "128"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OrnithError, match="expected blocks of two sizes"):
        open_source(folder)


@pytest.mark.parametrize("layout", ["fp8-channel", "fp8-block", "tensor"])
def test_a_config_alone_is_planned(sources, model, layout):
    alone, checkpoint = open_source(sources[layout] / "config.json", mtp="keep"), open_source(sources[layout])
    assert "of a quantized checkpoint" in alone.notes[0] and "quantization_config" not in alone.config
    for build in ("fp8-channel", "fp8-block", "bf16", "gguf:Q4_K_M"):
        first, second = plan_build(alone, build), plan_build(checkpoint, build)
        assert first.tensor_bytes == second.tensor_bytes and first.types == second.types
        assert [tensor.shape for tensor in first.tensors] == [tensor.shape for tensor in second.tensors]
