"""`--lora`: an adapter of PEFT merged while it is read, in fp32.

Reference: PEFT's own merge of the same adapter on the same model in fp32, which sums in another order, and the formula
in fp64. Not covered: adapters of trainers that write other names.
"""

import json
import shutil
from pathlib import Path

import fixtures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ornith_moe import cli
from ornith_moe.quant.conversion import prepare
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.opening import open_any
from ornith_moe.quant.source.lora import add_product
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
MOE = {"experts": 2, "top_k": 1}
TARGETS = ["q_proj", "o_proj", "in_proj_qkv", "shared_expert.up_proj"]
EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
OPTIONS = {
    "plain": {"target_modules": TARGETS, "target_parameters": EXPERTS, "alpha_pattern": {"o_proj": 20}},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "modules_to_save": ["lm_head"]},
    "ranks": {"target_modules": TARGETS, "rank_pattern": {r"layers\.3\..*o_proj": 2}},
}


def adapted(folder, base, **options):
    """An adapter of random factors in `folder`, and the tensors of PEFT's merge."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("lora") / "m", dtype=torch.float32, mtp=True, **MOE)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {kind: adapted(root / kind, base, **options) for kind, options in OPTIONS.items()}


def values(source):
    return {
        weight.name: source.read(index, 0, int(np.prod(weight.shape[:-1] or weight.shape))).float32.reshape(
            weight.shape
        )
        for index, weight in enumerate(source.weights)
    }


@pytest.mark.parametrize("kind", OPTIONS)
def test_it_is_what_peft_merges(base, adapters, kind):
    ours, before = values(open_any(base, lora=adapters[kind])), values(open_source(base))
    theirs = values(open_source(adapters[kind] / "merged"))  # without MTP, which transformers does not load
    touched = [name for name, value in theirs.items() if not np.array_equal(value, before[name])]
    assert len(touched) == {"plain": 3 + 2 + 4 + 4 * 2 * 3 + 4, "rslora": 2, "ranks": 3 + 2 + 4}[kind]
    for name, value in theirs.items():
        if name in touched:
            assert np.abs(ours[name] - value).max() < 4e-7 * np.abs(value).max(), name
        else:
            assert np.array_equal(ours[name], before[name]), name
    assert np.array_equal(ours["mtp.fc.weight"], before["mtp.fc.weight"])


def test_the_formula():
    random = np.random.RandomState(0)
    left, right, w = (random.standard_normal(shape).astype(np.float32) for shape in ((300, 5), (5, 70), (300, 70)))
    got = w.copy()
    add_product(got, left, right, 0.3)
    exact = w + 0.3 * (left.astype(np.float64) @ right)
    assert np.abs(got - exact).max() < 1e-5
    cut = w.copy()
    add_product(cut[:7], left[:7], right, 0.3), add_product(cut[7:], left[7:], right, 0.3)
    assert np.array_equal(cut, got)


def test_builds_round_once(base, adapters, tmp_path, monkeypatch):
    """Those of a checkpoint of the sums in F32, whatever the slab; a BF16 base keeps what is not quantized in BF16."""
    source = open_any(base, lora=adapters["plain"])
    whole = Path(shutil.copytree(base, tmp_path / "m"))
    save_file(
        {name: torch.from_numpy(value.copy()) for name, value in values(source).items()}, whole / "model.safetensors"
    )
    builds = ["gguf:Q8_0", "bf16"]
    ours, theirs = (
        convert(source, tmp_path / "a", builds).builds,
        convert(open_source(whole), tmp_path / "b", builds).builds,
    )
    assert ours[0].path.read_bytes() == theirs[0].path.read_bytes()
    assert (ours[1].path / "model.safetensors").read_bytes() == (theirs[1].path / "model.safetensors").read_bytes()
    manifest = json.loads((ours[1].path / "ornith_manifest.json").read_text())
    assert manifest["lora"] == "plain" and any("adapter plain is merged" in note for note in source.notes)
    monkeypatch.setattr(prepare, "MAX_SLAB_BYTES", 1)
    cut = convert(source, tmp_path / "c", builds[:1], jobs=2).builds
    assert cut[0].path.read_bytes() == ours[0].path.read_bytes()

    rounded = fixtures.qwen35moe(tmp_path / "bf16" / "m", **MOE)
    source = open_any(rounded, lora=adapters["plain"])
    (build,) = convert(source, tmp_path / "d", ["fp8-channel"]).builds
    stored = load_file(build.path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float8_e4m3fn}
    name = "model.layers.0.linear_attn.in_proj_qkv.weight"
    assert stored[name].equal(torch.from_numpy(values(source)[name]).bfloat16())
    assert verify(build.path, source).ok


def test_factors_of_peft_before_0_19(base, adapters, tmp_path):
    """Of the transposed experts, which their shape tells; of square ones the version does."""
    folder = Path(shutil.copytree(adapters["plain"], tmp_path / "old"))
    tensors = load_file(folder / "adapter_model.safetensors")
    ours = values(open_any(base, lora=folder))
    for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name].view(2, 4, -1), tensors[other].view(-1, 4, 2)  # E r K, N r E
        tensors[name] = b.permute(2, 1, 0).reshape(8, -1).contiguous()
        tensors[other] = a.permute(2, 1, 0).reshape(-1, 8).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_version"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    old = values(open_any(base, lora=folder))
    assert all(np.array_equal(old[name], value) for name, value in ours.items())
    config["peft_version"] = "0.21.2"  # which would have them the other way: gate_up is told by its shape still
    (folder / "adapter_config.json").write_text(json.dumps(config))
    new = values(open_any(base, lora=folder))
    same = {name: np.array_equal(new[name], value) for name, value in ours.items()}
    assert same["model.layers.0.mlp.experts.0.up_proj.weight"]
    assert not same["model.layers.0.mlp.experts.0.down_proj.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora is True, which is more than w"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": [1]}, r"init_lora_weights is \[1\]"),
        ({"lora_alpha": "8"}, "lora_alpha and alpha_pattern to be numbers"),
        ({"alpha_pattern": [1]}, "lora_alpha and alpha_pattern to be numbers"),
        ({"alpha_pattern": {"(": 1}}, r"\("),
        (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(4, 3)}), "x has no pair of lora_A and"),
        (lambda t: t.update({"base_model.model.x.weight": torch.ones(3)}), "is of no weight of the model; give the"),
        (lambda t: t.update({n: t[n][:3].clone() for n in t if "q_proj.lora_A" in n}), "do not fit model.layers.3"),
        (lambda t: t.update({n: t[n][:6].clone() for n in t if "experts.lora_A" in n}), "do not fit model.layers"),
        (lambda t: t.update({n: t[n].to(torch.int8) for n in list(t)[:1]}), "is I8; merge it with peft"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 3)}), r"is \[3, 3\] and lm_head.weight"),
        (lambda t: t.update({"lm_head.lora_embedding_A": torch.ones(3, 3)}), "lora_embedding_A is of no weight"),
    ],
)  # fmt: skip
def test_other_adapters_are_refused(base, adapters, tmp_path, change, words):
    folder = Path(shutil.copytree(adapters["plain"], tmp_path / "a"))
    if isinstance(change, dict):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
    else:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(Exception, match=words) as caught:
        open_any(base, lora=folder)
    assert "\n" not in str(caught.value)


def test_commands_take_it(base, adapters, tmp_path, capsys):
    def run(*arguments):
        cli.app([*map(str, arguments), "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    lora = ("--lora", adapters["rslora"])
    run("plan", base, "--to", "bf16", *lora)
    (made,) = run("convert", base, tmp_path, "--to", "bf16", "--device", "cpu", *lora)["builds"]
    assert run("verify", made["path"], "--against", base, *lora)["ok"]
    (tmp_path / "text").write_text("A router reads each token once and names the experts. " * 4)
    files = [tmp_path / f"{name}.gguf" for name in ("with", "without")]
    for file, more in zip(files, (lora, ()), strict=True):
        run("imatrix", base, "--text", tmp_path / "text", "--output", file, "--chunks", "1", "--ctx", "16", *more)
    assert len({file.read_bytes() for file in files}) == 2
    with pytest.raises(CheckpointError, match="was made with --lora 'rslora'; give the same with --lora"):
        run("verify", made["path"], "--against", base)
    with pytest.raises(CheckpointError, match="expected an adapter of PEFT"):
        run("plan", base, "--to", "bf16", "--lora", base)
