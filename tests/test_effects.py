"""KL of one kind of tensor alone.

Reference: a GGUF in which those tensors have that type and all else is as the source has it, written by a conversion
and compared with the source by ornith_moe/streamed.py. Not covered: whether measured weights choose better types than
constants do, which docs/quality.md says of trained weights.
"""

import json
from dataclasses import replace

import fixtures
import numpy as np
import pytest
import torch
from command import ornith_moe
from remedies import refused, tiny

from ornith_moe.effects import measure_effects, trials
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.sensitivity import measure_sensitivity
from ornith_moe.quant.fitting.loss import EXPONENT, Loss
from ornith_moe.quant.fitting.sensitivity import read_sensitivity, sensitivity_bytes
from ornith_moe.quant.gguf.tensor_types import parse_asked_types
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.decoded import open_decoded
from ornith_moe.streamed import compare_streamed

TYPES = ("Q8_0", "Q4_0")
WINDOWS = np.random.default_rng(0).integers(0, 500, (3, 24))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_source(fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=4, top_k=2), mtp="drop")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A source of two layers, and its sensitivity."""
    folder = tmp_path_factory.mktemp("small")
    source = open_source(tiny(folder / "m", torch.float32, tie_word_embeddings=True), mtp="drop")
    return source, measure_sensitivity(source, folder / "s.json", types=TYPES).sensitivity


def test_effects_are_those_of_files_with_those_types(model, tmp_path):
    measured = measure_sensitivity(model, tmp_path / "s.json", types=TYPES).sensitivity
    found = measure_effects(model, WINDOWS, measured, groups=2).effects
    assert {name for effect in found for name in effect.tensors} == set(measured.by_name)
    wanted = ("token_embd", "output.", "blk.0.ssm_out", "blk.0.ffn_down_exps", "blk.2.ffn_gate_exps", "blk.3.attn_q.")
    chosen = [next(e for e in found if any(name.startswith(w) for name in e.tensors)) for w in wanted]
    files = []
    for number, effect in enumerate(chosen):
        asked = parse_asked_types([*(f"^{name}$={effect.type}" for name in effect.tensors), ".*=F32"])
        made = convert(model, tmp_path / str(number), ["gguf:Q8_0"], asked=asked).builds[0]
        files.append(open_decoded(made.path, model))
    compared = compare_streamed(model, files, WINDOWS)
    for effect, build in zip(chosen, compared.builds, strict=True):
        assert effect.kl == pytest.approx(build.kl_mean, rel=1e-4) and effect.kl > 0
        assert effect.kl_se == pytest.approx(build.kl_mean_se, rel=1e-3)


def test_lots_are_kept_and_not_measured_again(small, monkeypatch):
    model, measured = small
    whole = measure_effects(model, WINDOWS, measured, groups=1)
    monkeypatch.setattr("ornith_moe.effects.LOT", 5)
    kept = []

    class Stopped(Exception):
        pass

    def keep(found):
        kept.append(found)
        if len(kept) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        measure_effects(model, WINDOWS, measured, groups=1, keep=keep)
    assert [len(found.effects) for found in kept] == [5, 10]
    again = measure_effects(model, WINDOWS, kept[-1], groups=1, keep=kept.append)
    assert again.effects[:10] == kept[1].effects and len(again.effects) > 10
    for one, other in zip(again.effects, whole.effects, strict=True):
        assert (one.tensors, one.type) == (other.tensors, other.type) and one.kl == pytest.approx(other.kl, rel=1e-4)
    assert again.text == whole.text and len(kept) == 2 + -(-(len(again.effects) - 10) // 5)


def test_a_file_holds_effects_and_the_loss_has_their_weights(small, tmp_path):
    model, measured = small
    found = measure_effects(model, WINDOWS, measured, groups=2)
    (tmp_path / "s.json").write_bytes(sensitivity_bytes(found))
    assert read_sensitivity(tmp_path / "s.json") == found
    loss = Loss(found, 2)
    for effect in found.effects:
        types = dict.fromkeys(effect.tensors, effect.type)
        assert loss.kl(types) == pytest.approx(effect.kl, rel=1e-6)  # one type was tried: it predicts what it was told
    tensors = found.effects[3].tensors
    share = sum(found.by_name[name].relative(found.effects[3].type) for name in tensors)
    assert loss.weight(tensors[0]) == pytest.approx(found.effects[3].kl ** (1 / EXPONENT) / share)


def test_a_tied_embedding_has_all_of_its_effect_as_a_head(small):
    source, measured = small
    found = measure_effects(source, WINDOWS, measured)
    loss, (effect,) = Loss(found, 2), [e for e in found.effects if e.tensors == ("token_embd.weight",)]
    assert loss.head == "token_embd.weight" and loss.weight(loss.head) == 0
    assert loss.kl({loss.head: effect.type}) == pytest.approx(effect.kl, rel=1e-6)
    (trial,) = [trial for trial in trials(source, measured, None, 1) if trial.tensors == effect.tensors]
    assert trial.changes("model.embed_tokens.weight")


def test_effects_of_one_text_and_importance(tmp_path):
    source, windows = open_source(tiny(tmp_path / "m"), mtp="drop"), np.arange(32).reshape(2, 16)
    measured = measure_sensitivity(source, tmp_path / "s.json", types=["Q8_0"]).sensitivity
    found = measure_effects(source, windows, measured, groups=1)
    refused("the same --text and --windows, or name another file", measure_effects, source, windows[:1], found)
    assert measure_effects(source, windows, found, groups=1) == found
    other = measure_sensitivity(source, tmp_path / "other.json", types=["Q8_0"]).sensitivity
    measure_effects(source, windows[:1], other, groups=1)
    weighed = replace(measured, imatrix="0" * 32)
    refused("give the same with --imatrix", measure_effects, source, windows, weighed, groups=1)
    assert measure_effects(source, windows, measured, groups=1) == found


def test_the_command_keeps_effects_in_the_file(tmp_path):
    model, out, text = tiny(tmp_path / "m"), tmp_path / "s.json", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    given = ("sensitivity", model, "--output", out, "--types", "q8_0,q4_0")
    ornith_moe(*given)
    more = (*given, "--text", text, "--windows", 2, "--layer-groups", 1)
    told = json.loads(ornith_moe(*more, "--json").stdout)
    found = read_sensitivity(out)
    assert [effect["kl"] for effect in told["effects"]] == [effect.kl for effect in found.effects] and found.effects
    before = out.read_bytes()
    shown = ornith_moe(*more).stdout
    assert out.read_bytes() == before and "KL of a kind of tensor" in shown and "ffn_down_exps" in shown
