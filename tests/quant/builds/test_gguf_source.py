"""A GGUF as a source: back to Hugging Face's names and numbers, through every command.

Reference: the checkpoint that the GGUF was made of, and for Q8_0 the `gguf` package's decoder. Not covered: files of
other programs, whose tensors are ours byte for byte (test_converter.py).
"""

import json
import shutil
from pathlib import Path

import fixtures
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ornith_moe import cli
from ornith_moe.quant.conversion import prepare
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import OrnithError
from ornith_moe.quant.gguf.header import gguf_header
from ornith_moe.quant.gguf.splits import Split
from ornith_moe.quant.opening import open_any
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

MOE = {"experts": 2, "top_k": 1, "mtp": True}
SIDES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def models(root):
    made = {"moe": fixtures.qwen35moe(root / "moe", experts_layout="fused", **MOE)}
    made["f32"] = fixtures.qwen35moe(root / "f32", dtype=torch.float32, **MOE)
    return made | {"gemma": fixtures.gemma4(root / "gemma")}


def packed(models, root, name, kind):
    """A GGUF of a model, with what must lie beside it."""
    folder = root / f"{name}-{kind}"
    if not folder.exists():
        (build,) = convert(open_source(models[name]), folder, [f"gguf:{kind}"]).builds
        for side in SIDES:
            if (models[name] / side).exists():
                shutil.copy(models[name] / side, folder)
        assert build.path.parent == folder
    return folder / f"{name}-{kind}.gguf"


@pytest.mark.parametrize("name", ["moe", "gemma"])
def test_bf16_comes_back_to_the_bit(models, root, name, tmp_path, monkeypatch):
    """w + 1 and -exp(w), which a GGUF holds in F32, round to the BF16 that they came from."""
    monkeypatch.setattr(prepare, "MAX_SLAB_BYTES", 1)
    source = open_any(packed(models, root, name, "BF16"))
    assert source.name == name and source.has_mtp == (name == "moe")
    (back,) = convert(source, tmp_path / "back", ["bf16"], jobs=2).builds
    (straight,) = convert(open_source(models[name]), tmp_path / "straight", ["bf16"]).builds
    ours, theirs = (load_file(build.path / "model.safetensors") for build in (back, straight))
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert ours[tensor].equal(value), tensor
    assert verify(back.path, source).ok and (back.path / "tokenizer.json").exists()


def test_other_builds_are_made_of_it(models, root, tmp_path):
    """From F32 all bytes but those of A = -exp(A_log), whose logarithm is rounded; a folder keeps no F32 of BF16."""
    source = open_any(packed(models, root, "f32", "F32"))
    (back,), (straight,) = (
        convert(each, tmp_path / out, ["gguf:Q4_K_M"]).builds
        for each, out in ((source, "back"), (open_source(models["f32"]), "straight"))
    )
    for ours, theirs in zip(*(gguf.GGUFReader(b.path).tensors for b in (back, straight)), strict=True):
        assert ours.name == theirs.name
        if ours.name.endswith("ssm_a"):
            assert np.allclose(ours.data, theirs.data, rtol=1e-6)
        else:
            assert np.array_equal(ours.data, theirs.data), ours.name
    (build,) = convert(open_any(packed(models, root, "moe", "BF16")), tmp_path, ["fp8-channel"]).builds
    dtypes = {tensor.dtype for tensor in load_file(build.path / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.float8_e4m3fn}


def test_q8_0_is_what_it_rounded(models, root, tmp_path):
    path = packed(models, root, "moe", "Q8_0")
    source = open_any(path)
    assert any("of a GGUF of F32, Q8_0: what that rounded stays so" in note for note in source.notes)
    (build,) = convert(source, tmp_path, ["bf16"]).builds
    stored = load_file(build.path / "model.safetensors")
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.3.ffn_down_exps.weight")
    value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
    assert stored["model.layers.3.mlp.experts.1.down_proj.weight"].equal(value[1])
    assert verify(build.path, source).ok


def test_a_file_in_parts_is_the_same_source(models, root, tmp_path):
    whole = open_any(packed(models, root, "moe", "BF16"))
    out = tmp_path / "out"
    convert(open_source(models["moe"]), out, ["gguf:BF16"], split=Split(max_tensors=20))
    shutil.copy(models["moe"] / "config.json", out)
    parts = sorted(out.glob("*.gguf"))
    source = open_any(parts[1])
    assert len(parts) > 2 and source.name == "moe" and source.weights == whole.weights
    for index, weight in enumerate(source.weights):
        assert np.array_equal(source.read(index, 0, 1).raw, whole.read(index, 0, 1).raw), weight.name


def test_commands_take_it(models, root, tmp_path, capsys):
    def run(*arguments):
        cli.app([*map(str, arguments), "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    path = packed(models, root, "moe", "BF16")
    (planned,) = run("plan", path, "--to", "bf16", "--mtp", "drop")["builds"]
    (made,) = run("convert", path, tmp_path, "--to", "bf16", "--device", "cpu", "--mtp", "drop")["builds"]
    assert made["tensor_bytes"] == planned["tensor_bytes"] and "mtp.fc.weight" not in load_file(
        Path(made["path"]) / "model.safetensors"
    )
    assert run("verify", made["path"], "--against", path)["ok"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            "does not hold its config; copy config.json and the",
        ),
        (
            {"model_type": "qwen3_5_text", "intermediate_size": 64},
            "'qwen35moe' and the config.json .* means qwen35;",
        ),
        (
            {"moe_intermediate_size": 128},
            r"ffn_gate_exps.weight, for .* is \[2, 256, 256\]; config.json means \[2, 128",
        ),
        ({"num_hidden_layers": 3, "layer_types": None}, "means|is of no weight that config.json means; copy"),
        ({"num_hidden_layers": 8, "layer_types": None}, "is not there; config.json means"),
    ],
)
def test_another_config_is_refused(models, root, tmp_path, change, words):
    path = packed(models, root, "moe", "BF16")
    folder = Path(shutil.copytree(path.parent, tmp_path / "x"))
    if callable(change):
        change(folder)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(OrnithError, match=words) as caught:
        open_any(folder / path.name)
    assert "\n" not in str(caught.value)


def test_quantized_further_it_is_refused(models, root):
    path = packed(models, root, "moe", "Q4_K_M")
    with pytest.raises(OrnithError, match=r"which lost too much; give a GGUF of BF16"):
        open_any(path)
    with pytest.raises(OrnithError, match="not a whole GGUF"):
        (path.parent / "bad.gguf").write_bytes(gguf_header([], [])[:9])
        open_any(path.parent / "bad.gguf")
