"""Weights tied to rows: every layout of experts gives the same weights, and every wrong tensor table is refused.

Reference: the fixtures of tests/fixtures.py, whose layouts hold the same numbers. Not covered: real checkpoints.
"""

import json

import fixtures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source.source import weight_matrix
from ornith_moe.quant.source.weights import checked_name, model_name, open_source


def values(source):
    """{weight name: bytes} read through the rows of the checkpoint."""
    read = source.checkpoint.read_rows
    return {
        weight.name: read(info, row, weight_matrix(weight)[0]).tobytes()
        for weight, (info, row, _) in zip(source.weights, source.rows, strict=True)
    }


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("each"), experts=6, mtp=True)


def edit(folder, out, change):
    """A copy of a one-file checkpoint with `change(tensors, config)` applied."""
    out.mkdir()
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(("layout", "shards"), [("fused", 1), ("mixed", 1), ("each", 3), ("fused", 2)])
def test_layouts_hold_the_same_weights(tmp_path, each, layout, shards):
    other = fixtures.qwen35moe(tmp_path / "x", experts=6, mtp=True, experts_layout=layout, shards=shards)
    assert values(open_source(other)) == values(open_source(each))


def test_fused_rows_are_gate_then_up(tmp_path):
    fused = open_source(fixtures.qwen35moe(tmp_path / "x", experts=3, experts_layout="fused"))
    name = next(n for n in fused.checkpoint.tensors if n.endswith("layers.0.mlp.experts.gate_up_proj"))
    truth = load_file(fused.folder / "model.safetensors")[name]
    found = values(fused)
    for expert in range(3):
        gate, up = (found[f"{name.removesuffix('gate_up_proj')}{expert}.{p}_proj.weight"] for p in ("gate", "up"))
        expected = truth[expert].view(torch.uint8).numpy().tobytes()
        assert gate + up == expected


def test_mtp_present_dropped_absent_and_insisted_on(tmp_path, each):
    present = open_source(each)
    dropped = open_source(each, mtp="drop")
    assert present.has_mtp and not dropped.has_mtp
    assert (
        len(present.weights) - len(dropped.weights) == 4 + 6 + 2 + 5 + 3 * 6
    )  # joint, attention, norms, shared, experts
    absent = fixtures.qwen35moe(tmp_path / "x", experts=2)
    source = open_source(absent)
    assert not source.has_mtp and any("no mtp.* tensor exists" in note for note in source.notes)
    with pytest.raises(CheckpointError, match="--mtp keep"):
        open_source(absent, mtp="keep")


def test_vision_tower_is_part_of_the_source(tmp_path):
    source = open_source(fixtures.qwen35(tmp_path / "x", vision=True))
    vision = [weight for weight in source.weights if weight.role == "vision"]
    assert vision and all(weight.name.startswith("model.visual.") for weight in vision)
    assert sum(np.prod(weight.shape) for weight in source.weights) * 2 == sum(
        info.nbytes for info in source.checkpoint.tensors.values()
    )


def drop(name):
    return lambda tensors, config: tensors.pop(next(n for n in tensors if n.endswith(name)))


def reshape(name):
    def change(tensors, config):
        key = next(n for n in tensors if n.endswith(name))
        tensors[key] = tensors[key][:-1]

    return change


def rename(new_name):
    def change(tensors, config):
        for name in list(tensors):
            tensors[new_name(name)] = tensors.pop(name)

    return change


def duplicate(tensors, config):
    gate = next(n for n in tensors if n.endswith("layers.0.mlp.experts.0.gate_proj.weight"))
    rows, columns = tensors[gate].shape
    tensors[gate.split("0.gate_proj")[0] + "gate_up_proj"] = torch.zeros(6, 2 * rows, columns, dtype=torch.bfloat16)


def text(config):
    return config.get("text_config", config)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (drop("layers.1.mlp.experts.3.up_proj.weight"), "experts.3.up_proj.weight is missing"),
        (drop("layers.3.self_attn.k_norm.weight"), "k_norm.weight is missing"),
        (reshape("lm_head.weight"), "lm_head.weight has shape"),
        (duplicate, "on its own and inside"),
        (lambda t, c: t.update({"model.extra.weight": torch.zeros(2)}), "model.extra.weight"),
        (lambda t, c: c.update(model_type="llama"), "model_type 'llama'"),
        (lambda t, c: c.pop("model_type"), "model_type None"),
        (lambda t, c: c.update(text_config=[]), "text_config to be an object"),
        (lambda t, c: text(c).update(num_experts=1 << 14, num_hidden_layers=4096, layer_types=None), "more than the"),
        (lambda t, c: text(c).update(hidden_size="256"), "hidden_size"),
        (lambda t, c: text(c).update(num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda t, c: text(c).update(layer_types=["full_attention"]), "layer_types"),
        (lambda t, c: text(c).update(linear_num_value_heads=3), "linear_num_value_heads"),
        (lambda t, c: text(c).update(mtp_num_hidden_layers=0), "mtp_num_hidden_layers 0; --mtp drop leaves"),
        (drop("mtp.norm.weight"), "mtp.norm.weight is missing, .*--mtp drop leaves"),
        (reshape("mtp.norm.weight"), "mtp.norm.weight has shape .*--mtp drop leaves"),
        (lambda t, c: t.update({"mtp.layers.1.a": torch.zeros(2)}), "the first is mtp.layers.1.a.*--mtp drop leaves"),
        (drop("lm_head.weight"), "random head; if the head is the embedding, say tie_word_embeddings true"),
        (lambda t, c: t.update({"model.norm.weight.absmax": torch.zeros(2)}), "already quantized"),
        (lambda t, c: t.update({"x.lora_A.weight": torch.zeros(2)}), "adapter .*not merged.*merge_and_unload"),
        (lambda t, c: t.update({"module.lm_head.weight": torch.zeros(2)}), "are both 'lm_head.weight'; keep one"),
        (rename("{}.old".format), "no tensor has the name of a weight of 'qwen3_5_moe_text': expected model"),
        (
            lambda t, c: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}),
            "model.norm.weight is I8; .*BF16 original",
        ),
    ],
)
def test_wrong_tables_are_refused(tmp_path, each, change, word):
    with pytest.raises(CheckpointError, match=word) as caught:
        open_source(edit(each, tmp_path / "x", change))
    assert "\n" not in str(caught.value) and "fetch" not in str(caught.value)


def test_following_the_advice_on_mtp_works(tmp_path, each):
    """Incomplete, misshapen, unannounced or of an unknown dtype: --mtp drop does not look at it."""

    def spoil(tensors, config):
        tensors.pop("mtp.norm.weight")
        tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"][:3].to(torch.float8_e4m3fn)
        config["mtp_num_hidden_layers"] = 0

    folder = edit(each, tmp_path / "x", spoil)
    dropped = open_source(folder, mtp="drop")
    assert values(dropped) == values(open_source(each, mtp="drop")) and not dropped.has_mtp
    (left,) = dropped.left_out
    assert set(left.names) == {name for name in dropped.checkpoint.tensors if name.startswith("mtp.")}
    with pytest.raises(CheckpointError, match="--mtp drop"):
        open_source(folder)


def test_mtp_in_a_file_that_the_index_leaves_out(tmp_path, each):
    folder, held = tmp_path / "x", {}
    edit(each, folder, lambda t, c: held.update({n: t.pop(n) for n in list(t) if n.startswith("mtp.")}))
    save_file(held, folder / "extra.safetensors")
    found = open_source(folder)
    assert not found.has_mtp and any("--mtp keep takes the mtp.* tensors of file extra" in n for n in found.notes)
    assert found.left_out[0].names == ("extra.safetensors",)
    kept = open_source(folder, mtp="keep")
    assert kept.has_mtp and kept.left_out == () and values(kept) == values(open_source(each))
    assert folder / "extra.safetensors" in kept.checkpoint.files, "a change of it is a change of the source"
    save_file({"mtp.norm.weight": held.pop("mtp.norm.weight")}, folder / "again.safetensors")
    save_file(held, folder / "extra.safetensors")
    assert values(open_source(folder, mtp="keep")) == values(open_source(each)), "from two files"
    save_file(held, folder / "again.safetensors")
    with pytest.raises(CheckpointError, match="both hold mtp"):
        open_source(folder, mtp="keep")
    (folder / "again.safetensors").unlink()
    save_file(held | load_file(folder / "model.safetensors"), folder / "extra.safetensors")
    with pytest.raises(CheckpointError, match="no tensor named mtp"):  # an older whole save is no part of this one
        open_source(folder, mtp="keep")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("make", [fixtures.qwen35, fixtures.qwen35moe, fixtures.gemma4])
def test_a_head_is_tied_if_its_values_are(tmp_path, tiny, make, nested):
    """config.json ties the head; the tensors decide, and the config that builds get says what they decided."""

    def tie(tensors, config):
        if nested and make is not fixtures.gemma4:  # as a wrapper has it
            config["text_config"] = {**config, "tie_word_embeddings": True}
            config["model_type"] = config["model_type"].removesuffix("_text")
            config.pop("tie_word_embeddings", None)
        elif not nested:
            config["tie_word_embeddings"] = True  # Gemma's default where it is not said
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def untie(tensors, config):
        tie(tensors, config)
        tensors["lm_head.weight"][-1, -1] += 1

    def tie_in_f32(tensors, config):  # another dtype is no other value
        tie(tensors, config)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()

    tied = open_source(edit(tiny(make), tmp_path / "tied", tie_in_f32 if nested else tie))
    assert not [w for w in tied.weights if w.role == "head"] and tied.architecture.tied
    assert [entry.names for entry in tied.left_out] == [("lm_head.weight",)]
    untied = open_source(edit(tiny(make), tmp_path / "untied", untie))
    assert [w.name for w in untied.weights if w.role == "head"] == ["lm_head.weight"]
    assert untied.config["tie_word_embeddings"] is False and text(untied.config)["tie_word_embeddings"] is False
    assert any("the head is kept" in note for note in untied.notes) and untied.left_out == ()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Each kind of fixture, made once."""
    made = {}

    def of(make):
        if make not in made:
            made[make] = make(tmp_path_factory.mktemp("tiny"), **({"experts": 2} if make is fixtures.qwen35moe else {}))
        return made[make]

    return of


def test_a_head_without_an_embedding_is_both(tmp_path, tiny):
    def swap(tensors, config):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    swapped = open_source(edit(tiny(fixtures.gemma4), tmp_path / "x", swap))
    assert values(swapped) == values(open_source(tiny(fixtures.gemma4)))


@pytest.mark.parametrize(
    "wrap",
    ["module.{}", "base_model.model.{}", "model.model.{}", "_orig_mod.module.{}"],
)
def test_wrapped_names_are_mapped(tmp_path, tiny, wrap):
    folder = edit(tiny(fixtures.qwen35), tmp_path / "x", rename(wrap.format))
    found, truth = open_source(folder), open_source(tiny(fixtures.qwen35))
    assert values(found) == values(truth) and found.weights == truth.weights
    assert any("named by a wrapper" in note for note in found.notes)


def test_buffers_are_left_out(tmp_path, tiny):
    buffers = {"model.position_ids": torch.arange(5), "model.layers.0.rotary_emb.inv_freq": torch.ones(3)}
    found = open_source(edit(tiny(fixtures.qwen35), tmp_path / "x", lambda t, c: t.update(buffers)))
    assert [set(entry.names) for entry in found.left_out] == [buffers.keys()]
    assert sum("2 tensors, the first is" in note for note in found.notes) == 1


def test_the_name_of_a_model(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--tiny-moe" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert model_name(snapshot) == model_name(f"{snapshot}/.") == model_name(snapshot / "x" / "..") == "tiny-moe"
    assert model_name(tmp_path / "link") == "link"
    monkeypatch.chdir(snapshot)
    assert model_name(".") == "tiny-moe" and model_name("..") == "snapshots"
    assert model_name("/") == "model" and model_name("a\x1b[2J\udcff") == "a_[2J_"
    assert len(model_name("é" * 200).encode()) == 200
    for name in ("", ".", "..", "a/b", "a\\b", "a\n", "é" * 101):
        with pytest.raises(CheckpointError, match="--name"):
            checked_name(name)


def test_a_name_of_ones_own(tiny):
    assert open_source(tiny(fixtures.qwen35), name="mine").name == "mine"
    assert open_source("qwen3.5-9b", name="mine").has_mtp, "what is known of the preset is not lost"


@pytest.mark.parametrize("key", ["enable_moe_block", "hidden_size_per_layer_input", "num_kv_shared_layers"])
def test_gemma_variants_we_do_not_know_are_refused(tmp_path, key):
    folder = fixtures.gemma4(tmp_path / "g")
    with pytest.raises(CheckpointError, match=key):
        open_source(edit(folder, tmp_path / "x", lambda t, c: text(c).update({key: 7})))


def test_gemma_config_saved_again_by_transformers(tmp_path):
    """transformers 5.23 saves the settings of full-attention layers per layer; the model is the same."""
    folder = fixtures.gemma4(tmp_path / "g")
    before = open_source(folder).weights
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_bytes())
    assert "global_head_dim" not in text(config) and text(config)["per_layer_config"]
    assert open_source(folder).weights == before
    text(config)["per_layer_config"] = {"00": {"head_dim": 7}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="per_layer_config"):
        open_source(folder)


@pytest.mark.parametrize("source", ["nowhere", "ornith-2.0", "README.md"])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
        open_source(source)
