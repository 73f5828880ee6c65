"""Memory to serve: what a sequence costs beyond the weights.

References: transformers' own cache after a run; megabytes per 1,024 tokens of Qwen3.5 as Llama-macOS's catalogue has
them. llama.cpp's log says the same of the first model: 4.00 MiB of keys and values for 4,096 tokens, 0.79 MiB of state.
Not covered: what an engine takes for itself.
"""

import json
import re
import subprocess
import sys

import fixtures
import pytest
import torch
from command import ornith_moe

from ornith_moe.clients import quiet_transformers
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.serving import RESERVE, room, serving
from ornith_moe.quant.conversion.convert import convert
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


@pytest.mark.parametrize(
    ("preset", "sequences", "published"),
    [("qwen3.5-35b-a3b", 4, "251"), ("qwen3.6-27b", 3, "448.88"), ("qwen3.5-9b", 1, "50.25")],
)
def test_a_state_is_what_users_of_llama_cpp_report(preset, sequences, published):
    """Logs of others, MiB: an article on Qwen3.5-35B-A3B at b8183, of four slots; ggml-org/llama.cpp #23792; one
    sequence of the 9B at b8744, lmstudio-ai/lmstudio-bug-tracker #1563 (50.251, with 1 KB around the state).
    """
    state = open_source(preset).architecture.cached(65536).state
    assert f"{sequences * 4 * state / 2**20:.{len(published.partition('.')[2])}f}" == published


def test_weights_and_a_sequence_of_as_many_tokens_as_are_asked_for():
    model = open_source("qwen3.5-9b")
    plans = [plan_build(model, build) for build in ("gguf:Q8_0", "gguf:mmproj")]
    text, tower = (serving(model, plan, 1024) for plan in plans)
    assert text.kv_bytes == 32 << 20 and serving(model, plans[0], 4096).kv_bytes == 32 << 22
    assert text.total_bytes == plans[0].tensor_bytes + text.kv_bytes + text.state_bytes
    assert (tower.total_bytes, tower.kv_bytes) == (plans[1].tensor_bytes, 0), "a tower keeps nothing"
    assert serving(model, plans[0]).context == 262_144


# What llama.cpp logs when it loads a model, its server's context of one sequence, flash attention on. A server that is
# dropped before its loop runs waits for it without end (seen in xllamacpp 2026.10), hence the question.
LOADS = """
import sys, xllamacpp as llama
for context in sys.argv[2:]:
    s = llama.CommonParams()
    s.model.path, s.n_ctx, s.n_parallel, s.n_gpu_layers, s.verbosity = sys.argv[1], int(context), 1, 0, 5
    s.cpuparams.n_threads = s.cpuparams_batch.n_threads = 1
    s.warmup = s.fit_params = False
    s.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    server = llama.Server(s)
    server.handle_completions({"prompt": [0], "n_predict": 1})
"""


def test_a_card_holds_what_llama_cpp_reports(tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    source = open_source(fixtures.qwen35moe(tmp_path / "model"))
    path = convert(source, tmp_path / "out", ["gguf:Q8_0"]).builds[0].path
    command = [sys.executable, "-c", LOADS, path, "1024", "16384"]
    # A model of random weights answers with any byte, which the log repeats.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    log = done.stdout + done.stderr
    mib = {what: re.findall(rf"{what} buffer size = +([0-9.]+) MiB", log) for what in ("KV", "RS", "compute")}
    for number, context in enumerate((1024, 16384)):
        found = room(source, 24 * 10**9, context)
        assert found.kv_bytes / 2**20 == pytest.approx(float(mib["KV"][number]), abs=0.01)
        assert found.state_bytes / 2**20 == pytest.approx(float(mib["RS"][number]), abs=0.01)
        assert found.buffer_bytes / 2**20 == pytest.approx(float(mib["compute"][number]), rel=0.03)
        rest = found.kv_bytes + found.state_bytes + found.buffer_bytes + RESERVE
        assert found.weights_bytes == 24 * 10**9 - rest


def test_the_command_finds_what_fits():
    for model, build in (("qwen3.5-35b-a3b", "gguf:Q4_K_M"), ("qwen3.5-9b", "gguf:Q8_0")):
        told = json.loads(ornith_moe("plan", model, "--for", "24GB", "--ctx", "65536", "--json").stdout)
        (found,) = told["builds"]
        assert found["build"] == build and found["tensor_bytes"] <= told["room"]["weights_bytes"]
        assert found["serving"]["context"] == told["room"]["context"] == 65536
    ornith_moe("plan", "qwen3.5-9b", code=2)
