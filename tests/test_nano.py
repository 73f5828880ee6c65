"""`demo/nano.py` and `demo/layouts.py` on a reduced nano: a real, if brief, training run.

References: transformers' own Qwen3.5 tokenizer code, transformers' loader for every layout, the bytes of a second run.
Not covered: the quality of the full nano (the demo measures it) and llama.cpp (the GGUF tests run it).
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from numeric import assert_same_bits
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parent.parent / "demo"


def demo_module(name):
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nano, layouts = demo_module("nano"), demo_module("layouts")

REDUCED = nano.Settings(
    batch=2,
    length=32,
    learning_rate=1e-2,
    warmup_steps=2,
    vocab_size=512,
    hidden_size=64,
    experts=4,
    expert_size=32,
    text_bytes=400_000,
    heldout_tokens=1024,
)
STEPS = 25


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, record) of a reduced nano."""
    out = tmp_path_factory.mktemp("nano") / "reduced"
    return out, nano.make_nano(out, steps=STEPS, progress=False, settings=REDUCED)


def test_loss_falls_and_the_record_is_kept(trained):
    out, record = trained
    assert record["ppl_after"] < 0.8 * record["ppl_before"]
    assert 0.9 * 512 < record["ppl_before"] < 1.2 * 512  # a fresh model knows nothing
    assert record["steps"] == STEPS and record["seed"] == 0
    assert json.loads((out / "nano.json").read_text()) == record
    assert all(0 <= least <= 1 / 4 <= most <= 1 for least, most in record["expert_share"])


def test_measured_perplexity_is_that_of_the_saved_weights(trained):
    out, record = trained
    model = AutoModelForCausalLM.from_pretrained(out, experts_implementation="grouped_mm").float()
    ids = torch.tensor(nano.heldout_tokens(out, 1024))
    assert nano.perplexity(model, ids, 32) == pytest.approx(record["ppl_after"], rel=1e-4)


def test_same_seed_same_bytes_other_seed_other_bytes(trained, tmp_path):
    first = (trained[0] / "model.safetensors").read_bytes()
    nano.make_nano(tmp_path / "again", steps=STEPS, progress=False, settings=REDUCED)
    assert (tmp_path / "again/model.safetensors").read_bytes() == first
    nano.make_nano(tmp_path / "again", steps=STEPS, seed=1, progress=False, settings=REDUCED)  # replaces the nano there
    assert (tmp_path / "again/model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # no temporary folder is left


def test_training_leaves_the_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    nano.make_nano(tmp_path / "nano", steps=1, progress=False, settings=REDUCED)
    assert_same_bits("state", torch.random.get_rng_state(), before)


def test_an_equal_nano_is_reused(trained, monkeypatch):
    out, record = trained
    monkeypatch.setattr(nano, "_train", None)
    assert nano.make_nano(out, steps=STEPS, progress=False, settings=REDUCED) == record


def test_other_content_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="expected no such folder or an ornith-nano"):
        nano.make_nano(tmp_path, steps=1, settings=REDUCED)
    assert nano.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("nano: ")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nano.PreTrainedTokenizerFast, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        nano.make_nano(tmp_path / "nano", steps=1, progress=False, settings=REDUCED)
    assert not list(tmp_path.iterdir())


def test_checkpoint_is_as_published_ones_are(trained):
    out, _ = trained
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"] and config["dtype"] == "bfloat16"
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert config["mtp_num_hidden_layers"] == 1 and not config["tie_word_embeddings"]
    assert config["linear_num_value_heads"] == 2 * config["linear_num_key_heads"]
    rope = config["rope_parameters"]
    assert config["head_dim"] * rope["partial_rotary_factor"] / 2 == sum(rope["mrope_section"])
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names and not any("mtp" in name for name in names)


class TestTokenizer:
    def test_cuts_text_as_qwen_does(self):
        from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

        assert nano.PRE_TOKENIZER_PATTERN == PRETOKENIZE_REGEX

    def test_round_trip(self, trained):
        tokenizer = AutoTokenizer.from_pretrained(trained[0])
        text = "def f(x):\n    return 'naïve café' * 1234  # don't\t→ 漢字 🙂\r\n\n"
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_markers_are_single_special_tokens(self, trained):
        tokenizer = AutoTokenizer.from_pretrained(trained[0])
        assert len(tokenizer) == 512
        for marker in nano.SPECIAL_TOKENS:
            assert tokenizer.tokenize(f"a{marker}b") == ["a", marker, "b"]
            assert marker in tokenizer.all_special_tokens

    def test_assistant_turn_opens_with_think(self, trained):
        tokenizer = AutoTokenizer.from_pretrained(trained[0])
        messages = [{"role": "user", "content": "Hi"}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"


def test_heldout_text_is_not_trained_on(trained):
    texts = nano._read_library()
    heldout = {name for name, _ in texts if nano._is_heldout(name)}
    assert 0.03 < len(heldout) / len(texts) < 0.1
    assert not any("test" in name.split("/") for name, _ in texts)
    ids = nano.heldout_tokens(trained[0], 3000)
    first = next(text for name, text in texts if name in heldout)
    assert AutoTokenizer.from_pretrained(trained[0]).decode(ids[:100]) in first
    assert nano.heldout_tokens(str(trained[0]), 100) == ids[:100]


LAYOUTS = {
    "per-expert": {},
    "fused": {"experts": "fused"},
    "mixed": {"experts": "mixed"},
    "sharded": {"shards": 5},
    "fused-sharded": {"experts": "fused", "shards": 3},
    "mtp-fused": {"mtp": "fused"},
    "mtp-per-expert-in-fused": {"experts": "fused", "mtp": "per-expert"},
    "language-model-prefix": {"prefix": "model.language_model."},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_loads_bit_for_bit(trained, tmp_path, options):
    expected = AutoModelForCausalLM.from_pretrained(trained[0]).state_dict()
    folder = layouts.rewrite(trained[0], tmp_path / "out", **options)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(name, loaded[name], tensor)


def names_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_layouts_are_the_ones_asked_for(trained, tmp_path):
    fused = names_of(layouts.rewrite(trained[0], tmp_path / "fused", experts="fused", mtp="per-expert"))
    assert fused["model.layers.3.mlp.experts.gate_up_proj"].shape == (4, 64, 64)
    assert not any(".mlp.experts.0." in name for name in fused if name.startswith("model."))
    assert sum(name.startswith("mtp.") for name in fused) == 17 + 3 * 4
    mixed = names_of(layouts.rewrite(trained[0], tmp_path / "mixed", experts="mixed", mtp="fused"))
    assert "model.layers.2.mlp.experts.down_proj" in mixed and "model.layers.3.mlp.experts.0.down_proj.weight" in mixed
    assert sum(name.startswith("mtp.") for name in mixed) == 19  # as in the published fused originals


def test_shards_and_index_agree(trained, tmp_path):
    folder = layouts.rewrite(trained[0], tmp_path / "sharded", shards=4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    for file in files:
        names = {name for name, where in index["weight_map"].items() if where == file}
        assert names == set(load_file(folder / file))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in names_of(folder).values())
    sizes = [(folder / file).stat().st_size for file in files]
    assert max(sizes) < 2 * min(sizes)


def test_layouts_refuse_what_they_cannot_do(trained, tmp_path, capsys):
    with pytest.raises(ValueError, match="experts: expected 'per-expert', 'fused' or 'mixed'"):
        layouts.rewrite(trained[0], tmp_path / "a", experts="each")
    with pytest.raises(ValueError, match="shards: expected 1 to"):
        layouts.rewrite(trained[0], tmp_path / "a", shards=10_000)
    assert layouts.main([str(tmp_path), str(tmp_path / "b")]) == 1
    assert "expected a folder with safetensors files" in capsys.readouterr().err
    assert layouts.main([str(trained[0]), str(tmp_path / "c"), "--experts", "fused"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
