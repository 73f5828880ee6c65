"""What the name of a tensor tells. Reference: names that transformers saves, and those of wrappers as users saw them.

Not covered: names of programs nobody reported.
"""

import json
from importlib import resources

import pytest

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source.tensor_names import canonical_names, is_adapter, is_buffer, is_quantization
from ornith_moe.quant.source.weights import source_from_config

LAYER = "layers.0.self_attn.q_proj.weight"
TEXT = ["model.embed_tokens.weight", f"model.{LAYER}", "model.norm.weight", "lm_head.weight", "mtp.norm.weight"]


def test_no_weight_is_taken_for_anything_else():
    """Every weight of one small and one wrapped preset keeps its name and is neither buffer, adapter nor scale."""
    for preset in ("qwen3.5-9b", "gemma-4-31b"):
        config = json.loads(resources.files("ornith_moe.quant.source").joinpath(f"presets/{preset}.json").read_bytes())
        names = [weight.name for weight in source_from_config(config, name=preset).weights]
        assert canonical_names(names, "model.language_model.") == dict(zip(names, names, strict=True))
        assert not [n for n in names if is_buffer(n) or is_adapter(n) or is_quantization(n)]


@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "base_model.model.{}", "_forward_module.module.{}",
        "_fsdp_wrapped_module.{}", "model.{}", "model.model.{}", "actor.module.{}", "student.{}",
    ],
)  # fmt: skip
def test_a_wrapper_around_the_model(wrap):
    assert canonical_names([wrap.format(name) for name in TEXT], "model.") == {wrap.format(n): n for n in TEXT}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        (f"model.language_model.language_model.language_model.{LAYER}", f"model.language_model.{LAYER}"),
        (f"language_model.model.{LAYER}", f"model.language_model.{LAYER}"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("visual.blocks.0.norm1.bias", "model.visual.blocks.0.norm1.bias"),
        ("model.model.visual.blocks.0.norm1.bias", "model.visual.blocks.0.norm1.bias"),
        ("model.mtp.layers.0.mlp.gate.weight", "mtp.layers.0.mlp.gate.weight"),
        (
            "model.layers.1._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.gate.weight",
            "model.language_model.layers.1.mlp.gate.weight",
        ),
        (
            "base_model.model.model.layers.1.mlp.up_proj.base_layer.weight",
            "model.language_model.layers.1.mlp.up_proj.weight",
        ),
        ("audio_tower.layers.0.norm.weight", "audio_tower.layers.0.norm.weight"),
        ("ema.model.layers.0.norm.weight", "ema.model.layers.0.norm.weight"),
    ],
)
def test_one_name(name, canonical):
    assert canonical_names([name, "unknown"], "model.language_model.") == {name: canonical, "unknown": "unknown"}


def test_two_tensors_of_one_name_are_told():
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' and 'module.model.norm.weight' are both"):
        canonical_names(["model.norm.weight", "module.model.norm.weight"], "model.")


def test_leftovers_adapters_and_scales_have_names_of_their_own():
    for name in (
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.full_attention_inv_freq",
        "visual.rotary_pos_emb.inv_freq", "model.position_ids", "h.0.attn.masked_bias", "h.0.attn.bias",
        "model.bn.num_batches_tracked", "model.layers.0.mlp._extra_state",
    ):  # fmt: skip
        assert is_buffer(name) and not is_quantization(name), name
    assert is_adapter("base_model.model.model.layers.0.q_proj.lora_A.default.weight")
    assert is_adapter("lm_head.modules_to_save.default.weight")
    for name in ("a.weight_scale", "a.weight_scale_inv", "a.qweight", "a.weight.absmax", "a.down_proj_blocks", "a.SCB"):
        assert is_quantization(name), name
