"""`--mtp-from`: multi-token prediction of another checkpoint, in every build, told in notes and manifest.

Reference: the base with the donor's tensors saved into it. Not covered: whether a grafted head drafts well.
"""

import json
import shutil
from pathlib import Path

import fixtures
import pytest
from safetensors.torch import load_file, save_file

from ornith_moe import cli
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.opening import open_any
from ornith_moe.quant.source.weights import open_source

BUILDS = ("bf16", "fp8-block", "gguf:Q8_0")
MOE = {"experts": 2, "top_k": 1}


def text(folder):
    config = json.loads((folder / "config.json").read_text())
    return config, config.get("text_config", config)


def edit(folder, change):
    config, section = text(folder)
    change(section)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """Another model with a vision tower, whose MTP lies one by one."""
    folder = tmp_path_factory.mktemp("donor") / "donor"
    return fixtures.qwen35moe(folder, mtp=True, vision=True, seed=5, experts_layout="mixed", **MOE)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, donor):
    """The base with the donor's MTP in its own file."""
    folder = fixtures.qwen35moe(tmp_path_factory.mktemp("expected") / "m", experts_layout="fused", **MOE)
    mtp = {name: tensor for name, tensor in load_file(donor / "model.safetensors").items() if name.startswith("mtp.")}
    save_file(load_file(folder / "model.safetensors") | mtp, folder / "model.safetensors")
    return folder


def base(folder, kind):
    made = fixtures.qwen35moe(folder, mtp=kind == "its own", experts_layout="fused", **MOE)
    return edit(made, lambda c: c.update(mtp_num_hidden_layers=0)) if kind == "not announced" else made


@pytest.mark.parametrize("kind", ["its own", "none", "not announced"])
def test_builds_are_those_of_the_base_with_the_donors_tensors(tmp_path, donor, expected, kind):
    source = open_any(base(tmp_path / "m", kind), mtp_from=donor)
    assert source.has_mtp and any("multi-token prediction is that of donor" in note for note in source.notes)
    assert any("replaced by that of --mtp-from" in entry.reason for entry in source.left_out) == (kind == "its own")
    ours, theirs = (convert(s, tmp_path / o, BUILDS) for s, o in ((source, "a"), (open_source(expected), "b")))
    for a, b in zip(ours.builds, theirs.builds, strict=True):
        file, other = (p if p.is_file() else p / "model.safetensors" for p in (a.path, b.path))
        assert file.read_bytes() == other.read_bytes(), a.build
        if a.path.is_dir():
            assert text(a.path)[1]["mtp_num_hidden_layers"] == 1
            assert json.loads((a.path / "ornith_manifest.json").read_text())["mtp_from"] == "donor"


def test_a_donor_in_fp8_alone_in_its_folder(tmp_path, donor):
    """Only its MTP is there, as graft files are published; codes and scales are copied where the layout is that."""
    (block,) = convert(open_source(donor), tmp_path, ["fp8-block"]).builds
    tensors = load_file(block.path / "model.safetensors")
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(mtp, alone / "model-mtp.safetensors")
    shutil.copy(block.path / "config.json", alone)
    source = open_any(base(tmp_path / "m", "none"), mtp_from=alone)
    made = convert(source, tmp_path / "out", ["fp8-block"]).builds[0]
    stored = load_file(made.path / "model.safetensors")
    held = {name: tensor for name, tensor in stored.items() if name.startswith("mtp.")}
    assert held.keys() == mtp.keys() and all(held[name].equal(tensor) for name, tensor in mtp.items())
    assert json.loads((made.path / "ornith_manifest.json").read_text())["copied"] == len(mtp) - len(
        source.donor.weights
    )


def test_commands_take_it(tmp_path, donor, capsys):
    def run(*arguments):
        cli.app([*map(str, arguments), "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    model, out = base(tmp_path / "m", "its own"), tmp_path / "out"
    (planned,) = run("plan", model, "--to", "bf16", "--mtp-from", donor)["builds"]
    command = ("convert", model, out, "--to", "bf16", "--device", "cpu")
    (made,) = run(*command, "--mtp-from", donor)["builds"]
    assert made["tensor_bytes"] == planned["tensor_bytes"]
    assert run("verify", made["path"], "--against", model, "--mtp-from", donor)["ok"]
    with pytest.raises(CheckpointError, match="was made with --mtp-from 'donor'; give the same with"):
        run("verify", made["path"], "--against", model)
    (Path(made["path"]) / "ornith_manifest.json").unlink()
    with pytest.raises(Exception, match=r"SQNR|mtp"):  # the base's own head is another
        run("verify", made["path"], "--against", model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": 3}, r"has mtp.layers.0.mlp.gate.weight \[2, 256\] where this has .*\[3, 256\]; give a checkpoint"),
        (
            {"top_k": 2},
            "computes with num_experts_per_tok, which is 1 for 'm' and 2 here; give a checkpoint of the same",
        ),
        ({"mtp": False}, r"there is no mtp.\* tensor or .*; give a checkpoint that has multi-token prediction"),
        ({"rope_theta": 5e5}, "computes with rope_theta, which is 10000000"),
        (
            {"mtp_num_hidden_layers": 2},
            r"weight mtp.layers.1.input_layernorm.weight is missing and \d+ more, of the \d+",
        ),
    ],
)
def test_other_heads_are_refused(tmp_path, change, words):
    options = {key: value for key, value in change.items() if key in ("experts", "top_k", "mtp")}
    other = fixtures.qwen35moe(tmp_path / "other", **{"mtp": True, **MOE, **options})
    if "rope_theta" in change:
        edit(other, lambda config: config["rope_parameters"].update(change))
    elif not options:
        edit(other, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_any(base(tmp_path / "m", "none"), mtp_from=other)
    assert "--mtp drop" not in str(caught.value)


def test_another_donor_is_another_conversion(tmp_path, donor):
    model = base(tmp_path / "m", "none")
    source = open_any(model, mtp_from=donor)
    second = fixtures.qwen35moe(tmp_path / "second", mtp=True, seed=6, **MOE)
    assert convert(source, tmp_path / "out", ["bf16"]).builds[0].was_finished is False
    assert convert(open_any(model, mtp_from=donor), tmp_path / "out", ["bf16"]).builds[0].was_finished
    other = open_any(model, mtp_from=second)
    assert other.fingerprint != source.fingerprint and not source.changed()
    with pytest.raises(Exception, match="exists already"):
        convert(other, tmp_path / "out", ["bf16"])
    save_file(load_file(donor / "model.safetensors"), donor / "model.safetensors")
    assert source.changed()
