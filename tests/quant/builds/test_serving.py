"""Memory to serve: what a sequence costs beyond the weights.

References: transformers' own cache after a run; megabytes per 1,024 tokens of Qwen3.5 as Llama-macOS's catalogue has
them. llama.cpp's log says the same of the first model: 4.00 MiB of keys and values for 4,096 tokens, 0.79 MiB of state.
Not covered: what an engine takes for itself.
"""

import json

import fixtures
import pytest
import torch

from ornith_moe.clients import quiet_transformers
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.serving import serving
from ornith_moe.quant.source.architectures import architecture
from ornith_moe.quant.source.weights import open_source

TOKENS = 40


def tensors_of(value):
    """All tensors of a layer of transformers' cache, however it nests them."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(inner)


@pytest.mark.parametrize("make", [fixtures.qwen35moe, fixtures.gemma4])
def test_it_is_what_transformers_keeps(tmp_path, make):
    from transformers import AutoModelForCausalLM

    folder = make(tmp_path / "model")
    with quiet_transformers(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        kept = model(input_ids=torch.arange(TOKENS)[None], use_cache=True).past_key_values
    keys_and_values = state = 0
    for layer in kept.layers:
        if hasattr(layer, "keys"):
            window = getattr(layer, "sliding_window", None)
            more = window / (window - 1) if window else 1  # the newest token comes on top, when it is asked for
            keys_and_values += more * (layer.keys.numel() + layer.values.numel())
        else:
            (recurrent,), (convolution,) = tensors_of(layer.recurrent_states), tensors_of(layer.conv_states)
            channels = convolution.numel() // convolution.shape[-1]
            state += recurrent.numel() + channels * (model.config.linear_conv_kernel_dim - 1)
    assert architecture(json.loads((folder / "config.json").read_text())).cached(TOKENS) == (keys_and_values, state)


@pytest.mark.parametrize(
    ("preset", "megabytes"),
    [("qwen3.5-9b", 32), ("qwen3.6-27b", 64), ("qwen3.5-35b-a3b", 20), ("qwen3.5-397b-a17b", 30)],
)
def test_a_thousand_tokens(preset, megabytes):
    cached = open_source(preset).architecture.cached
    assert 2 * cached(1024).keys_and_values == megabytes << 20 and cached(1).state == cached(1024).state > 0


def test_weights_and_a_sequence_of_as_many_tokens_as_are_asked_for():
    model = open_source("qwen3.5-9b")
    plans = [plan_build(model, build) for build in ("gguf:Q8_0", "gguf:mmproj")]
    text, tower = (serving(model, plan, 1024) for plan in plans)
    assert text.kv_bytes == 32 << 20 and serving(model, plans[0], 4096).kv_bytes == 32 << 22
    assert text.total_bytes == plans[0].tensor_bytes + text.kv_bytes + text.state_bytes
    assert (tower.total_bytes, tower.kv_bytes) == (plans[1].tensor_bytes, 0), "a tower keeps nothing"
    assert serving(model, plans[0]).context == 262_144
