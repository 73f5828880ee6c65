"""Measuring an importance matrix layer by layer.

References: hooks in the whole model as transformers runs it, and llama.cpp's own inputs of every matrix product on the
F32 GGUF of the same checkpoint, which is what llama-imatrix sums (tests/llama.py). Random fixtures say whether sums are
those of the right columns, not whether they help: the demo measures that. Not covered: models larger than memory.
"""

import json
import weakref

import fixtures
import gguf
import llama
import numpy as np
import pytest
import torch
from command import ornith_moe
from transformers import AutoModelForCausalLM

from ornith_moe import layerwise
from ornith_moe.clients import encode
from ornith_moe.imatrix import make_imatrix
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError, ConversionError, PlanError
from ornith_moe.quant.gguf.imatrix import open_imatrix
from ornith_moe.quant.source.weights import open_source

CTX, CHUNKS = 32, 6
KINDS = {
    "qwen35moe": ("qwen35moe", {"experts_layout": "fused", "mtp": True, "vision": True}),
    "qwen35": ("qwen35", {"dtype": torch.float32}),
    "gemma4": ("gemma4", {}),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(kind, checkpoint, report, importance matrix) of a fixture, its head included where it has one."""
    kind, options = KINDS[request.param]
    base = tmp_path_factory.mktemp(kind)
    folder = getattr(fixtures, kind)(base / "model", **options)
    (base / "text.txt").write_text(fixtures.TEXT)
    source = open_source(folder, mtp="drop")
    report = make_imatrix(
        source, base / "text.txt", base / "im.gguf", chunks=CHUNKS, ctx=CTX, process_output=kind != "gemma4"
    )
    return kind, folder, report, open_imatrix(base / "im.gguf")


def windows(folder):
    ids = np.array(encode(folder, fixtures.TEXT)[: CTX * CHUNKS]).reshape(CHUNKS, CTX)
    begin = encode(folder, "", special=True)
    ids[:, 0] = begin[0] if begin else ids[:, 0]
    return ids


def sums_and_counts(imatrix, name):
    entry = imatrix.entries[name]
    return imatrix._values(entry, 0, entry.size).reshape(entry.counts.size, -1), entry.counts


def whole_model(folder, source):
    """{GGUF name: (sums, counts, largest)} of the linear layers, from hooks in the whole model, experts left out."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    places = {
        w.name.replace("language_model.", ""): place
        for w in source.weights
        for place in source.architecture.gguf_places(w)
    }
    found = {}

    def add(place, x):
        squares = x.flatten(0, -2).double().square().sum(0).numpy()
        if swap := place.transform.columns:  # written out: value heads by key head become tiled
            heads = squares.reshape(swap.groups, swap.ratio, swap.size)
            squares = heads.swapaxes(0, 1).reshape(-1)
        sums, count, largest = found.get(place.name, (0, 0, 0.0))
        found[place.name] = sums + squares, count + x.flatten(0, -2).shape[0], max(largest, x.abs().max().item())

    for name, layer in model.named_modules():
        place = places.get(f"{name}.weight")
        if isinstance(layer, torch.nn.Linear) and place:
            layer.register_forward_pre_hook(lambda _, inputs, place=place: add(place, inputs[0]))
    with torch.inference_mode():
        model(torch.from_numpy(windows(folder)), use_cache=False)
    return found


def test_sums_are_those_of_the_whole_model(made):
    _, folder, _, imatrix = made
    expected = whole_model(folder, open_source(folder, mtp="drop"))
    linear = {name for name in imatrix.entries if "_exps" not in name}
    assert linear >= {name for name in expected if "gate_inp" not in name and name != "token_embd.weight"} - {
        "output.weight"
    }
    for name in linear:
        sums, counts = sums_and_counts(imatrix, name)
        assert counts.tolist() == [expected[name][1]] == [CHUNKS * CTX]
        assert np.allclose(sums[0], expected[name][0], rtol=1e-3, atol=1e-5 * expected[name][0].mean()), name
        assert imatrix.entries[name].largest == pytest.approx(expected[name][2], rel=1e-3), name
    for name in imatrix.entries.keys() - linear:  # of experts: between the largest mean of squares and the largest sum
        sums, counts = sums_and_counts(imatrix, name)
        assert (sums / np.maximum(counts, 1)[:, None]).max() < imatrix.entries[name].largest ** 2 <= sums.max(), name


@pytest.mark.skipif(llama.INSTALLED != llama.VERSION, reason=f"tests/llama.py knows the structs of {llama.VERSION}")
def test_sums_are_those_of_llama_cpp(made, tmp_path):
    """Experts, counts and the order of columns: llama.cpp sees the same inputs at the same places."""
    kind, folder, _, imatrix = made
    path = convert(open_source(folder, mtp="drop"), tmp_path, ["gguf:F32"]).builds[0].path
    expected = llama.collect(path, windows(folder))
    assert imatrix.entries.keys() - {"output.weight"} <= expected.keys()
    bar = 2e-2 if kind == "gemma4" else 2e-3  # llama.cpp tabulates Gemma's activation in fp16
    for name in imatrix.entries:
        sums, counts = sums_and_counts(imatrix, name)
        assert counts.tolist() == expected[name][1].tolist(), name
        assert sums.sum(-1).min() > 0 or (counts == 0).any()
        scale = expected[name][0].mean(-1, keepdims=True) + 1e-30
        assert (np.abs(sums - expected[name][0]) / scale).max() < bar, name


def test_every_quantized_weight_has_an_entry(made, tmp_path):
    """All but embedding and head; MTP does not run. Coverage counts tokens and experts."""
    kind, folder, report, imatrix = made
    quantized = convert(open_source(folder, mtp="drop"), tmp_path, ["gguf:Q8_0"]).builds[0].path
    names = {t.name for t in gguf.GGUFReader(quantized).tensors if t.tensor_type.name == "Q8_0"}
    head = {"output.weight"} if kind != "gemma4" else set()
    assert imatrix.entries.keys() == names - {"token_embd.weight", "output.weight"} | head
    assert {found.tensor for found in report.coverage} == imatrix.entries.keys()
    for found in report.coverage:
        counts = imatrix.entries[found.tensor].counts
        assert (found.matrices, found.covered) == (counts.size, (counts > 0).sum())
        assert (found.least, found.most) == (counts.min(), counts.max())
        if found.matrices > 1:
            assert counts.sum() == 4 * CHUNKS * CTX  # top_k of every token
    assert (imatrix.chunk_count, imatrix.chunk_size, imatrix.datasets) == (CHUNKS, CTX, ("text.txt",))


def test_one_layer_at_a_time_and_the_same_bytes(made, tmp_path, monkeypatch):
    """When a layer is loaded, the one before is gone; batches of another size give the same file but for rounding."""
    _, folder, _, imatrix = made
    loaded, load = [], layerwise.Layerwise._load

    def watched(self, number, weights, watch):
        assert all(reference() is None for reference in loaded)
        found = load(self, number, weights, watch)
        loaded.append(weakref.ref(next(found[0].parameters())))
        return found

    monkeypatch.setattr(layerwise.Layerwise, "_load", watched)
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", CTX)
    (tmp_path / "text.txt").write_text(fixtures.TEXT)
    head = "output.weight" in imatrix.entries
    source = open_source(folder, mtp="drop")
    make_imatrix(source, tmp_path / "text.txt", tmp_path / "im.gguf", chunks=CHUNKS, ctx=CTX, process_output=head)
    again = open_imatrix(tmp_path / "im.gguf")
    assert len(loaded) == 4 and again.entries.keys() == imatrix.entries.keys()
    for name in imatrix.entries:
        for one, other in zip(sums_and_counts(imatrix, name), sums_and_counts(again, name), strict=True):
            assert np.allclose(one, other, rtol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["im.gguf", "text.txt"]


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    base = tmp_path_factory.mktemp("cli")
    (base / "text.txt").write_text(fixtures.TEXT)
    return fixtures.qwen35moe(base / "moe", experts=16, top_k=1), base / "text.txt"


def test_the_command_makes_what_convert_takes(moe, tmp_path):
    folder, text = moe
    path = tmp_path / "im.gguf"
    done = ornith_moe("imatrix", folder, "--text", text, "--output", path, "--ctx", 16, "--chunks", 2, "--json")
    report = json.loads(done.stdout)
    assert done.stderr == "" and (report["path"], report["chunks"], report["ctx"]) == (str(path), 2, 16)
    partial = [found for found in report["coverage"] if found["covered"] < found["matrices"]]
    assert partial, "32 tokens do not reach 16 experts everywhere"
    options = ["--imatrix", path, "--tensor-type", "attn_gate=q6_k", "--to", "gguf:Q3_K_M"]
    text = ornith_moe("plan", folder, *options).stdout
    assert "experts reached" in text and "were never reached and count all columns alike" in text
    build = json.loads(ornith_moe("convert", folder, tmp_path / "out", *options, "--json").stdout)["builds"][0]
    assert len(build["imatrix"]) == len(report["coverage"]) and any("im.gguf covers" in n for n in build["notes"])
    verified = json.loads(ornith_moe("verify", build["path"], "--against", folder, "--json").stdout)
    assert verified["ok"] and any("are not of the types that Q3_K_M alone means" in n for n in verified["notes"])
    assert "exists already" in ornith_moe("imatrix", folder, "--text", text, "--output", path, code=1).stderr


def test_what_cannot_be_run_is_told(moe, tmp_path):
    folder, text = moe
    source = open_source(folder, mtp="drop")
    with pytest.raises(CheckpointError, match="give more text or a smaller --ctx"):
        make_imatrix(source, text, tmp_path / "im.gguf", ctx=1 << 15)
    with pytest.raises(PlanError, match="expected its folder to exist"):
        make_imatrix(source, text, tmp_path / "nowhere" / "im.gguf")
    with pytest.raises(PlanError, match="needs the checkpoint folder"):
        make_imatrix(open_source("ornith-1.0-9b"), text, tmp_path / "im.gguf")
    assert not list(tmp_path.iterdir())


def test_activations_that_are_not_finite_are_told(moe, tmp_path, monkeypatch):
    folder, text = moe
    rows = layerwise.SourceWeights.rows

    def huge(self, name, start, count):
        found = rows(self, name, start, count)
        return found * np.float32("inf") if "layers.2.linear_attn.out_proj" in name else found

    monkeypatch.setattr(layerwise.SourceWeights, "rows", huge)
    with pytest.raises(ConversionError, match="layer 2 makes activations that are not finite on chunks 0 to"):
        make_imatrix(open_source(folder, mtp="drop"), text, tmp_path / "im.gguf", ctx=16, chunks=2)
    assert not list(tmp_path.iterdir())
