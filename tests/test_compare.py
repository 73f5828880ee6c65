"""ornith_moe/compare.py: metrics against hand computation, and what the two clients promise.

References: sums written out by hand for two or three tokens, in plain Python for random rows; for the transformers
client, the model called directly; for llama.cpp, transformers on the same weights (within what fp32 summation order
explains). Not covered: vocabularies too large to list, and figures of trained weights, which `make demo` prints.
"""

import json
import math
import shutil
import sys

import fixtures
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ornith_moe.clients import LlamaCpp, MlxLm, Transformers, encode, open_client
from ornith_moe.compare import (
    Comparison,
    compare,
    default_positions,
    held_out_windows,
    kl_divergence,
    log_probs,
    perplexity,
    read_text,
    top1_agreement,
)
from ornith_moe.quant.builds.stored import read_gguf_tensors
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError, OrnithError, VerificationError
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.decoded import open_decoded
from ornith_moe.streamed import compare_streamed


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("qwen"), experts=4, top_k=2)


@pytest.fixture(scope="module")
def builds(qwen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("builds")
    convert(open_source(qwen), folder, ["gguf:F32", "fp8-block", "fp8-channel"])
    return folder


@pytest.fixture(scope="module")
def qwen_gguf(builds):
    return next(builds.glob("*.gguf"))


class Table:
    """A client that knows its answers: row `p` of a table for position p, whatever the tokens."""

    def __init__(self, name, table):
        self.name, self.table, self.vocabulary = name, np.asarray(table), np.shape(table)[1]

    def log_probs(self, tokens, positions):
        return self.table[list(positions)]


def random_rows(rows, vocabulary, seed=0):
    logits = np.random.default_rng(seed).normal(size=(rows, vocabulary)) * 3
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def test_kl_divergence_by_hand():
    p, q = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.25, 0.75], [0.25, 0.75]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(p, q) == pytest.approx([expected, 0.0], abs=1e-15)


def test_kl_divergence_is_not_symmetric_and_never_negative():
    p, q = random_rows(100, 63), random_rows(100, 63, seed=1)
    assert (kl_divergence(p, q) > 0).all() and not np.allclose(kl_divergence(p, q), kl_divergence(q, p))


def test_tokens_that_p_excludes_add_nothing_and_that_q_excludes_add_infinity():
    certain, even = np.array([[0.0, -np.inf]]), np.log([[0.5, 0.5]])
    assert kl_divergence(certain, even) == pytest.approx([math.log(2)])
    assert kl_divergence(certain, certain) == pytest.approx([0.0])
    assert np.isposinf(kl_divergence(even, certain)).all()


def test_top1_and_perplexity_by_hand():
    p = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    q = np.log([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.3, 0.3, 0.4]])
    assert top1_agreement(p, q) == pytest.approx(2 / 3)
    assert perplexity(p, np.array([0, 1, 2])) == pytest.approx((0.7 * 0.8 * 0.4) ** (-1 / 3))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    rows = np.full((5, 100), -math.log(100))
    assert perplexity(rows, np.arange(5)) == pytest.approx(100)


def test_compare_reads_the_token_after_each_position():
    p, q = random_rows(8, 10), random_rows(8, 10, seed=1)
    windows = np.random.default_rng(2).integers(0, 10, (3, 8))
    found = compare(Table("a", p), Table("b", q), windows, [1, 6])
    picked = [(position, window[position + 1]) for window in windows for position in (1, 6)]
    divergence = [sum(math.exp(p[i, t]) * (p[i, t] - q[i, t]) for t in range(10)) for i, _ in picked]
    assert found == Comparison(
        client_a="a",
        client_b="b",
        positions=6,
        kl_mean=pytest.approx(np.mean(divergence)),
        kl_max=pytest.approx(max(divergence)),
        top1=pytest.approx(np.mean([p[i].argmax() == q[i].argmax() for i, _ in picked])),
        perplexity_a=pytest.approx(math.exp(-np.mean([p[i, t] for i, t in picked]))),
        perplexity_b=pytest.approx(math.exp(-np.mean([q[i, t] for i, t in picked]))),
    )


@pytest.mark.parametrize("positions", [[], [7], [3, 2], [2, 2], [-1, 2], [100]])
def test_positions_without_a_next_token_or_order_are_refused(positions):
    client = Table("a", random_rows(8, 10))
    with pytest.raises(ValueError, match="positions"):
        compare(client, client, np.zeros((2, 8), dtype=int), positions)


@pytest.mark.parametrize("tokens", [[0, 10], [-1, 2], [0.5, 1.0], [[[1, 2]]]])
def test_tokens_that_are_no_ids_are_refused(tokens):
    with pytest.raises(ValueError, match="tokens"):
        log_probs(Table("a", random_rows(8, 10)), np.array(tokens), [0])


def test_vocabularies_of_two_models_are_not_compared():
    with pytest.raises(VerificationError, match="10 tokens and b 11"):
        compare(Table("a", random_rows(8, 10)), Table("b", random_rows(8, 11)), np.zeros(8, dtype=int))


@pytest.mark.parametrize("length", [2, 3, 17, 256])
def test_default_positions_have_a_next_token(length):
    positions = default_positions(length)
    assert positions == sorted(set(positions)) and 0 <= positions[0] and positions[-1] == length - 2
    assert len(positions) == min(16, length - 1 - length // 8)


@pytest.mark.parametrize(("available", "shape"), [(10_000, (8, 256)), (600, (2, 256)), (63, (1, 63))])
def test_held_out_windows_span_the_text(available, shape):
    windows = held_out_windows(list(range(available)), windows=8, length=256)
    assert windows.shape == shape and windows[0, 0] == 0 and windows[-1, -1] == available - 1
    assert (np.diff(windows, axis=1) == 1).all()
    starts = windows[:, 0]
    assert (np.diff(starts) >= shape[1]).all(), "windows overlap"


def test_unlisted_tokens_count_as_one():
    p = np.log([[0.6, 0.2, 0.1, 0.1]])
    q = np.log([[0.5, 0.2, 0.25, 0.05]])
    unlisted = q.copy()
    unlisted[0, [2, 3]] = np.nan
    assert kl_divergence(p, unlisted) == pytest.approx([0.6 * math.log(0.6 / 0.5) + 0.2 * math.log(0.2 / 0.3)])
    unlisted[0, 1] = np.nan
    assert kl_divergence(p, unlisted) == pytest.approx([0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)])
    assert kl_divergence(p, unlisted) < kl_divergence(p, q)


def test_short_lists_of_equal_distributions_do_not_diverge():
    p = random_rows(50, 1000)
    listed = np.where(p >= np.sort(p)[:, -100:-99], p, np.nan)
    assert np.isnan(listed).sum() == 50 * 900
    assert np.abs(kl_divergence(p, listed)).max() < 1e-12
    assert np.abs(kl_divergence(listed, p)).max() < 1e-12
    assert top1_agreement(p, listed) == 1


def test_an_unlisted_target_has_an_even_share_but_never_more_than_a_listed_one():
    p = np.log([[0.6, 0.3, 0.05, 0.05]])
    p[0, 2:] = np.nan
    assert perplexity(p, np.array([3])) == pytest.approx(1 / 0.05)
    q = np.log([[0.5, 0.1, 0.4]])
    q[0, 2] = np.nan
    assert perplexity(q, np.array([2])) == pytest.approx(1 / 0.1)


def test_transformers_client_equals_the_model_called_directly(qwen, capfd):
    from transformers import Qwen3_5MoeForCausalLM

    tokens = np.random.default_rng(0).integers(0, 500, (2, 33))
    with open_client(qwen) as client:
        assert isinstance(client, Transformers) and client.vocabulary == fixtures.VOCAB_ROWS
        found = log_probs(client, tokens, [0, 5, 32])
        text = client.complete("def route(", 4)
    assert capfd.readouterr() == ("", "")
    model = Qwen3_5MoeForCausalLM.from_pretrained(qwen).float()
    with torch.inference_mode():
        logits = model(torch.tensor(tokens)).logits.double()
    expected = logits.log_softmax(-1)[:, [0, 5, 32]].reshape(6, -1).numpy()
    assert found.dtype == np.float64 and np.abs(found - expected).max() < 1e-4
    assert isinstance(text, str) and text


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_folder_is_one_quiet_sentence(qwen, tmp_path, name, capfd):
    for file in ("config.json", "model.safetensors"):
        content = (qwen / file).read_bytes()
        (tmp_path / file).write_bytes(content[: len(content) // 2] if file == name else content)
    with pytest.raises(CheckpointError) as caught:
        open_client(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_transformers_client_opens_no_pickle(qwen, tmp_path):
    (tmp_path / "config.json").write_bytes((qwen / "config.json").read_bytes())
    torch.save(load_file(qwen / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        open_client(tmp_path)


def test_a_quant_method_that_is_no_name_is_none(qwen, tmp_path):
    config = json.loads((qwen / "config.json").read_text()) | {"quantization_config": {"quant_method": []}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((qwen / "model.safetensors").read_bytes())
    with open_client(tmp_path) as client:
        assert client.vocabulary == fixtures.VOCAB_ROWS


def test_transformers_client_refuses_missing_unexpected_and_mismatched_keys(qwen, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((qwen / name).read_bytes())
    weights, key = load_file(qwen / "model.safetensors"), "model.layers.1.mlp.gate.weight"

    def opened(changed):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return open_client(tmp_path)

    with pytest.raises(VerificationError, match=f"1 missing keys, first {key}"):
        opened({name: tensor for name, tensor in weights.items() if name != key})
    with pytest.raises(VerificationError, match=r"1 unexpected keys, first model\.layers\.1\.mlp\.other"):
        opened(weights | {"model.layers.1.mlp.other": torch.zeros(2)})
    with pytest.raises(OrnithError, match=r"size mismatch|mismatched"):
        opened(weights | {key: torch.zeros(5, 256)})


@pytest.mark.parametrize("build", ["fp8-block", "fp8-channel"])
def test_transformers_client_runs_fp8_folders_dequantized(qwen, builds, build, capfd):
    with open_client(qwen) as source, open_client(builds / build) as client:
        weights = dict(source._model.named_parameters())
        for name, found in client._model.named_parameters():
            assert found.dtype == torch.float32
            noise = (found - weights[name]).norm() / weights[name].norm()
            assert noise < 0.03, name  # e4m3 keeps 3 mantissa bits: about 0.026 for normal values
        figures = compare(source, client, np.arange(48))
    assert capfd.readouterr() == ("", "")
    assert 0 < figures.kl_mean < 1


@pytest.fixture(scope="module")
def qwen_mlx(qwen, tmp_path_factory):
    """{build: folder}"""
    report = convert(open_source(qwen), tmp_path_factory.mktemp("mlx"), ["mlx:bf16", "mlx:8"])
    return {build.build: build.path for build in report.builds}


def test_mlx_lm_agrees_with_transformers_where_norms_are_rounded_alike(qwen, qwen_mlx, capfd):
    pytest.importorskip("mlx_lm", reason="needs mlx-lm and mlx[cpu], which the environment of the tests does without")
    tokens = np.random.default_rng(0).integers(0, 500, (2, 24))
    with open_client(qwen) as a, open_client(qwen_mlx["mlx:bf16"]) as b, open_client(qwen_mlx["mlx:8"]) as c:
        assert isinstance(b, MlxLm) and b.vocabulary == fixtures.VOCAB_ROWS
        for name, weight in a._model.named_parameters():
            if name.endswith("norm.weight") and "linear_attn" not in name:
                weight.data = (weight.data + 1).bfloat16().float() - 1
        found, coarse = compare(a, b, tokens, range(23)), compare(a, c, tokens, range(23))
        assert a.complete("def route(", 8) == b.complete("def route(", 8)
    assert capfd.readouterr() == ("", "")
    assert found.positions == 46 and found.top1 == 1 and found.kl_max < 1e-7 < coarse.kl_mean


def test_a_folder_for_mlx_needs_mlx_lm(qwen_mlx, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(
        OrnithError, match=r"mlx\.core is not installed; install it with: pip install 'ornith-moe\[mlx\]'"
    ):
        open_client(qwen_mlx["mlx:8"])


def test_a_damaged_folder_for_mlx_is_one_quiet_sentence(qwen_mlx, tmp_path, capfd):
    pytest.importorskip("mlx_lm", reason="needs mlx-lm and mlx[cpu], which the environment of the tests does without")
    folder = shutil.copytree(qwen_mlx["mlx:8"], tmp_path / "mlx")
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="mlx-lm refuses it") as caught:
        open_client(folder)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_llama_cpp_agrees_with_transformers_and_is_quiet(qwen, qwen_gguf, capfd):
    tokens = np.random.default_rng(0).integers(0, 500, (2, 24))
    with open_client(qwen) as a, open_client(qwen_gguf) as b:
        assert isinstance(b, LlamaCpp)
        found = compare(a, b, tokens, range(23))
        assert a.complete("def route(", 8) == b.complete("def route(", 8)
    assert capfd.readouterr() == ("", "")
    assert found.positions == 46 and found.top1 == 1 and found.kl_max < 1e-7
    assert found.perplexity_a == pytest.approx(found.perplexity_b, rel=1e-4)


def test_llama_cpp_of_decoded_weights_has_the_streamed_kl(qwen, tmp_path):
    """What it adds to KL of a quantized file is of activations, which it rounds to eight bits there."""
    source, tokens = open_source(qwen, mtp="drop"), np.random.default_rng(0).integers(0, 500, (1, 24))
    paths = {build.build: build.path for build in convert(source, tmp_path, ["gguf:F32", "gguf:Q2_K"]).builds}
    plain = read_gguf_tensors(paths.pop("gguf:F32"))
    found = compare_streamed(source, [open_decoded(path, source) for path in paths.values()], tokens, range(23))
    with open_client(qwen) as a:
        for path, ours in zip(paths.values(), found.builds, strict=True):
            for name, tensor in read_gguf_tensors(path).items():  # decoded by the gguf package, into the file of F32
                if tensor.dtype != "F32":
                    values = gguf.quants.dequantize(
                        tensor.read(0, tensor.nbytes), gguf.GGMLQuantizationType[tensor.dtype]
                    )
                    with plain[name].path.open("r+b") as file:
                        file.seek(plain[name].offset)
                        file.write(values.astype("<f4").tobytes())
            with LlamaCpp(plain["output.weight"].path, threads=1) as b:
                theirs = compare(a, b, tokens, range(23))
            assert ours.kl_mean > 1e-4 and theirs.kl_mean == pytest.approx(ours.kl_mean, rel=1e-3)


def test_a_short_list_from_llama_cpp_holds_the_likeliest(qwen_gguf):
    tokens = np.random.default_rng(0).integers(0, 500, 24)
    with LlamaCpp(qwen_gguf) as client:
        full = log_probs(client, tokens, [3, 22])
    with LlamaCpp(qwen_gguf, listed=40) as client:
        short = log_probs(client, tokens, [3, 22])
    for wide, narrow in zip(full, short, strict=True):
        top = np.argsort(wide)[::-1][:40]
        assert set(np.flatnonzero(~np.isnan(narrow))) == set(top)
        assert narrow[top] == pytest.approx(wide[top], abs=1e-4)
    assert np.abs(kl_divergence(full, short)).max() < 1e-5


def test_a_prompt_beyond_the_context_is_a_sentence(qwen_gguf):
    with LlamaCpp(qwen_gguf, context=256) as client, pytest.raises(OrnithError, match="context"):
        client.log_probs([1] * 300, [299])


def _empty(path):
    path.write_bytes(b"")


def _not_a_gguf(path):
    path.write_bytes(b"PK\3\4" * 100)


def _cut_off(path):
    path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize("damage", [_empty, _not_a_gguf, _cut_off])
def test_a_damaged_gguf_is_one_quiet_sentence(qwen_gguf, tmp_path, damage, capfd):
    path = tmp_path / "model.gguf"
    path.write_bytes(qwen_gguf.read_bytes())
    damage(path)
    with pytest.raises(CheckpointError, match=r"model\.gguf") as caught:
        open_client(path)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_a_path_that_no_client_runs_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    for path in (tmp_path, tmp_path / "weights.bin", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"expected a \.gguf file or a folder"):
            open_client(path)


def test_a_missing_client_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    with pytest.raises(OrnithError, match=r"pip install 'ornith-moe\[llama\]'"):
        LlamaCpp("model.gguf")


def test_text_is_a_file_of_bounded_size(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_text("naïve", encoding="utf-8")
    assert read_text(path) == "naïve" and len(read_text(None)) > 100_000
    monkeypatch.setattr("ornith_moe.compare.MAX_TEXT_BYTES", 5)
    for refused, found in (
        (path, r"a file of 6 bytes \(limit 5\)"),
        (tmp_path, r"a folder of \d+ bytes \(limit 5\)"),
        (tmp_path / "absent", "No such file"),
        ("/dev/null", r"a device of 0 bytes \(limit 5\)"),
    ):
        with pytest.raises(CheckpointError, match=f"expected a text file in UTF-8, .*{found}"):
            read_text(refused)


def test_encode_reads_the_tokenizer_of_the_folder(qwen, tmp_path):
    ids = encode(qwen, "<|im_start|>def route")
    tokens = json.loads((qwen / "tokenizer.json").read_text())["added_tokens"]
    assert ids[0] == next(token["id"] for token in tokens if token["content"] == "<|im_start|>")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        encode(tmp_path, "text")
