"""GGUF metadata of the three architectures and of their tokenizers.

Reference: what llama.cpp's loaders for qwen35, qwen35moe and gemma4 require (found by leaving each key out of a file
that loads) and the known values of published models. That the file then computes the same logits, and that llama.cpp
splits text into the same ids, is tests/quant/gguf/test_logits.py; nothing is run here.
"""

import json
import re
from pathlib import Path

import fixtures
import gguf
import pytest

import ornith_moe
from ornith_moe.quant.errors import CheckpointError, OrnithError, PlanError
from ornith_moe.quant.gguf.header import Entry
from ornith_moe.quant.gguf.metadata import gguf_metadata
from ornith_moe.quant.gguf.tokenizer import PRE_BY_PATTERN, tokenizer_entries
from ornith_moe.quant.source.architectures import architecture
from ornith_moe.quant.source.tokenizer_files import read_tokenizer

PRESETS = Path(ornith_moe.__file__).parent / "quant" / "source" / "presets"
REQUIRED = {"context_length", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon"}
REQUIRED |= {"block_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"}
REQUIRED_QWEN = {"rope.dimension_sections", "rope.dimension_count", "rope.freq_base", "ssm.conv_kernel"}
REQUIRED_QWEN |= {"ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size"}
REQUIRED_BY_ARCHITECTURE = {
    "qwen35": REQUIRED | REQUIRED_QWEN | {"feed_forward_length"},
    "qwen35moe": REQUIRED
    | REQUIRED_QWEN
    | {"expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length"},
    "gemma4": REQUIRED
    | {"feed_forward_length", "attention.key_length_swa", "attention.value_length_swa", "attention.sliding_window"}
    | {"attention.sliding_window_pattern", "embedding_length_per_layer_input", "rope.dimension_count_swa"}
    | {"rope.freq_base", "final_logit_softcapping"},
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("qwen"), experts=4, top_k=2)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return fixtures.gemma4(tmp_path_factory.mktemp("gemma"))


@pytest.fixture
def editable(qwen, tmp_path):
    """A copy of the Qwen fixture's small files whose tokenizer.json a test may damage."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((qwen / name).read_bytes())
    return tmp_path


def preset(name: str) -> dict:
    return json.loads((PRESETS / f"{name}.json").read_text())


def entries_of(folder, *, mtp_layers=0, pre=None) -> list[Entry]:
    config = json.loads((folder / "config.json").read_text())
    model = architecture(config)
    files = read_tokenizer(folder, model.vocabulary)
    tokenizer = tokenizer_entries(files, config, model.vocabulary, pre=pre, fallback=model.BYTE_FALLBACK)
    return gguf_metadata(config, folder, name="x", file_type=0, mtp_layers=mtp_layers, tokenizer=tokenizer)


def values(folder, **options) -> dict:
    return {entry.key: entry.value for entry in entries_of(folder, **options)}


def hyperparameters(config: dict, mtp_layers: int = 0) -> dict:
    entries = gguf_metadata(config, None, name="x", file_type=32, mtp_layers=mtp_layers)
    return {entry.key: entry.value for entry in entries}


def edit_tokenizer(folder, change) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("qwen3.5-9b", "qwen35"),
        ("ornith-1.0-35b", "qwen35moe"),
        ("ornith-1.0-397b", "qwen35moe"),
        ("gemma-4-31b", "gemma4"),
    ],
)
def test_every_key_the_loader_requires_is_there(name, architecture):
    found = hyperparameters(preset(name))
    assert found["general.architecture"] == architecture
    missing = {f"{architecture}.{key}" for key in REQUIRED_BY_ARCHITECTURE[architecture]} - found.keys()
    assert not missing
    foreign = [key for key in found if not key.startswith((architecture + ".", "general."))]
    assert not foreign


def test_values_of_the_35b_are_those_of_the_published_file():
    found = hyperparameters(preset("ornith-1.0-35b"))
    expected = {
        "block_count": 40,
        "context_length": 262144,
        "embedding_length": 2048,
        "attention.head_count": 16,
        "attention.head_count_kv": 2,
        "attention.key_length": 256,
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        "rope.freq_base": 1e7,
        "expert_count": 256,
        "expert_used_count": 8,
        "expert_feed_forward_length": 512,
        "expert_shared_feed_forward_length": 512,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.group_count": 16,
        "ssm.time_step_rank": 32,
        "ssm.inner_size": 4096,
        "full_attention_interval": 4,
        "attention.recurrent_layers": ([True] * 3 + [False]) * 10,
    }
    assert {key: found[f"qwen35moe.{key}"] for key in expected} == expected
    assert "qwen35moe.feed_forward_length" not in found


def test_values_of_gemma_31b():
    found = hyperparameters(preset("gemma-4-31b"))
    expected = {
        "block_count": 60,
        "attention.head_count_kv": ([16] * 5 + [4]) * 10,
        "attention.key_length": 512,
        "attention.key_length_swa": 256,
        "attention.sliding_window": 1024,
        "attention.sliding_window_pattern": ([True] * 5 + [False]) * 10,
        "rope.dimension_count": 512,
        "rope.dimension_count_swa": 256,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "final_logit_softcapping": 30.0,
    }
    assert {key: found[f"gemma4.{key}"] for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_global_key_value_heads": None}, 16),
        ({"attention_k_eq_v": False}, 16),  # which the number of global heads goes with
        ({"layer_types": ["full_attention"] * 60}, [4] * 60),
    ],
)
def test_gemma_counts_key_heads_per_layer_only_where_they_differ(changes, expected):
    """As llama.cpp's converter, which was run on such configs."""
    config = preset("gemma-4-31b")
    config.get("text_config", config).update(changes)
    assert hyperparameters(config)["gemma4.attention.head_count_kv"] == expected


def test_mtp_is_announced_only_when_the_file_has_it():
    config = preset("qwen3.5-35b-a3b")
    assert config["text_config"]["mtp_num_hidden_layers"] == 1
    without, having = hyperparameters(config), hyperparameters(config, mtp_layers=1)
    assert without["qwen35moe.block_count"] == 40 and "qwen35moe.nextn_predict_layers" not in without
    assert having["qwen35moe.block_count"] == 41 and having["qwen35moe.nextn_predict_layers"] == 1
    assert having["qwen35moe.attention.recurrent_layers"] == [*without["qwen35moe.attention.recurrent_layers"], False]


def test_rope_sections_are_written_even_when_the_config_has_none():
    config = preset("qwen3.5-9b")
    del config["text_config"]["rope_parameters"]["mrope_section"]
    assert hyperparameters(config)["qwen35.rope.dimension_sections"] == [11, 11, 10, 0]


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("rope_parameters", {"rope_type": "dynamic", "factor": 4.0}, PlanError),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2}, PlanError),
        ("rope_parameters", {"mrope_section": "11"}, CheckpointError),
        ("rms_norm_eps", "small", CheckpointError),
        ("rms_norm_eps", float("nan"), CheckpointError),
        ("max_position_embeddings", None, CheckpointError),
        ("num_experts_per_tok", 257, CheckpointError),
        ("linear_value_head_dim", 64, PlanError),
    ],
)
def test_a_config_that_cannot_be_expressed_is_one_sentence(key, value, error):
    config = preset("qwen3.5-35b-a3b")
    config["text_config"][key] = value
    with pytest.raises(error) as caught:
        hyperparameters(config)
    assert "\n" not in str(caught.value) and key.split("_")[0] in str(caught.value)


def test_equal_checkpoints_give_equal_metadata_without_paths(qwen, editable):
    assert values(qwen) | {"tokenizer.chat_template": ""} == values(editable) | {"tokenizer.chat_template": ""}
    assert not any(str(qwen) in str(value) for value in values(qwen).values())


@pytest.mark.parametrize("make", [fixtures.qwen35, fixtures.gemma4])
def test_every_entry_survives_a_real_file(make, tmp_path):
    folder = make(tmp_path / "checkpoint")
    entries = entries_of(folder)
    writer = gguf.GGUFWriter(tmp_path / "metadata.gguf", "")
    writer.kv_data[0].clear()
    for entry in entries:
        assert isinstance(entry, Entry)
        writer.add_key_value(*entry)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = gguf.GGUFReader(tmp_path / "metadata.gguf").fields
    for entry in entries:
        found = read[entry.key].contents()
        assert found == pytest.approx(entry.value, rel=1e-6) if isinstance(entry.value, float) else found == entry.value


def test_byte_level_tokens_have_the_type_that_llama_cpp_needs(qwen):
    found = values(qwen)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    type_of = dict(zip(tokens, map(gguf.TokenType, types), strict=True))
    assert len(tokens) == len(set(tokens)) == fixtures.VOCAB_ROWS
    assert type_of["<|im_end|>"] == type_of["<|endoftext|>"] == gguf.TokenType.CONTROL
    assert type_of["<think>"] == type_of["</think>"] == gguf.TokenType.USER_DEFINED
    assert type_of["Ġ"] == gguf.TokenType.NORMAL
    padding = [index for index, kind in enumerate(types) if kind == gguf.TokenType.UNUSED]
    assert padding == list(range(padding[0], fixtures.VOCAB_ROWS))
    assert tokens[padding[0]] == f"[PAD{padding[0]}]"
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "qwen35"
    assert tokens[found["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert tokens[found["tokenizer.ggml.padding_token_id"]] == "<|endoftext|>"
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == fixtures.QWEN_TEMPLATE


def test_gemma_tokens_have_bytes_scores_and_a_beginning(gemma):
    found = values(gemma)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert found["tokenizer.ggml.model"] == "gemma4" and found["tokenizer.ggml.add_bos_token"] is True
    assert types.count(gguf.TokenType.BYTE) == 256
    assert types[tokens.index("<bos>")] == gguf.TokenType.CONTROL
    assert types[tokens.index("<turn|>")] == gguf.TokenType.CONTROL
    assert len(found["tokenizer.ggml.scores"]) == len(tokens) == fixtures.VOCAB_ROWS
    assert found["tokenizer.ggml.add_space_prefix"] is False


def test_merges_are_the_same_in_both_spellings(qwen, editable):
    def spell_old(tokenizer):
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]

    edit_tokenizer(editable, spell_old)
    assert values(editable)["tokenizer.ggml.merges"] == values(qwen)["tokenizer.ggml.merges"]


def test_patterns_are_those_of_transformers():
    from transformers.models.qwen2 import tokenization_qwen2
    from transformers.models.qwen3_5 import tokenization_qwen3_5

    assert PRE_BY_PATTERN[tokenization_qwen3_5.PRETOKENIZE_REGEX] == "qwen35"
    assert PRE_BY_PATTERN[tokenization_qwen2.PRETOKENIZE_REGEX] == "qwen2"


def test_an_unknown_pattern_is_named_and_can_be_overridden(editable):
    def unknown(tokenizer):
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d{7}|.+"

    edit_tokenizer(editable, unknown)
    with pytest.raises(PlanError, match=re.escape(r"\d{7}|.+") + r".*--tokenizer-pre"):
        values(editable)
    assert values(editable, pre="qwen2")["tokenizer.ggml.pre"] == "qwen2"


def test_a_second_split_is_not_overlooked(editable):
    def split_digits(tokenizer):
        tokenizer["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})

    edit_tokenizer(editable, split_digits)
    with pytest.raises(PlanError, match="Digits then"):
        values(editable)


def _bigger_than_the_embedding(tokenizer):
    tokenizer["model"]["vocab"]["beyond"] = fixtures.VOCAB_ROWS


def _same_id_twice(tokenizer):
    tokenizer["model"]["vocab"]["again"] = 7


def _unigram(tokenizer):
    tokenizer["model"] = {"type": "Unigram", "vocab": [["a", -1.0]]}


def _merge_of_three(tokenizer):
    tokenizer["model"]["merges"][3] = ["a", "b", "c"]


def _negative_id(tokenizer):
    tokenizer["model"]["vocab"]["!"] = -1


def _added_tokens_of_another_kind(tokenizer):
    tokenizer["added_tokens"] = ["<think>"]


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (_bigger_than_the_embedding, PlanError, "beyond"),
        (_same_id_twice, CheckpointError, "id 7 is both"),
        (_unigram, PlanError, "Unigram"),
        (_merge_of_three, CheckpointError, "merge of two"),
        (_negative_id, CheckpointError, "id -1"),
        (_added_tokens_of_another_kind, CheckpointError, "added_tokens"),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(editable, damage, error, named):
    edit_tokenizer(editable, damage)
    with pytest.raises(error, match=named) as caught:
        values(editable)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": 3}'])
def test_hostile_tokenizer_files_end_in_our_error(editable, content):
    path = editable / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(OrnithError, match=re.escape("tokenizer.json")):
        values(editable)
