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
from ornith_moe.quant.source import open_source, weight_matrix


def values(source):
    """{weight name: bytes} read through the rows of the checkpoint."""
    read = source.checkpoint.read_rows
    return {
        weight.name: read(info, row, weight_matrix(weight)[0]).tobytes()
        for weight, (info, row) in zip(source.weights, source.rows, strict=True)
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
        (lambda t, c: text(c).update(mtp_num_hidden_layers=0), "mtp_num_hidden_layers 0"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, each, change, word):
    with pytest.raises(CheckpointError, match="(?s)" + word.replace("*", r"\*")) as caught:
        open_source(edit(each, tmp_path / "x", change))
    assert "\n" not in str(caught.value)


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
