"""Remedies of messages about sensitivities, and about builds that are fitted to a size."""

import fcntl
import json
from dataclasses import replace

import pytest
from remedies import edit, follows, refused, tiny

from ornith_moe.quant.builds.build import Options
from ornith_moe.quant.builds.gguf_fit import builds_within
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.serving import room
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.sensitivity import measure_sensitivity
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.fitting.sensitivity import read_sensitivity
from ornith_moe.quant.gguf.tensor_types import parse_asked_types
from ornith_moe.quant.source.architectures import Architecture
from ornith_moe.quant.source.weights import open_source


@follows("is the sensitivity of another source, importance or types; move it away or name another with --output")
def test_another_sensitivity_is_moved_or_named(tmp_path):
    source, out = open_source(tiny(tmp_path / "m")), tmp_path / "s.json"
    measure_sensitivity(source, out, types=["Q8_0"])
    refused("move it away or name another with --output", measure_sensitivity, source, out, types=["Q4_0"])
    measure_sensitivity(source, tmp_path / "other.json", types=["Q4_0"])
    out.rename(tmp_path / "away.json")
    measure_sensitivity(source, out, types=["Q4_0"])


@follows("is of another source, importance or types; drop it and run the command again")
@follows("column {} is {}; expected finite weights, so mend the checkpoint first")
@follows("has no encoder in this version; choose out of {}")
def test_what_cannot_be_measured(tmp_path):
    m, out = tiny(tmp_path / "m"), tmp_path / "s.json"
    refused("choose out of F32, F16", measure_sensitivity, open_source(m), out, types=["IQ1_S"])
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    before = edit(m, lambda tensors: tensors.update({name: tensors[name] * float("nan")}))
    refused("so mend the checkpoint first", measure_sensitivity, open_source(m), out, types=["Q8_0"])
    edit(m, lambda tensors: tensors.update(before))
    again = "drop it and run the command again"
    refused(again, measure_sensitivity, open_source(m), out, types=["Q4_0"])
    out.with_name("s.json.partial").unlink()
    measure_sensitivity(open_source(m), out, types=["Q4_0"])


@follows("is no sensitivity, {}; make it again with")
@follows("this version reads {}; make it again")
@pytest.mark.parametrize("change", [{"format": 0}, {"tensors": 1}])
def test_a_bad_file_is_made_again(tmp_path, change):
    source, out = open_source(tiny(tmp_path / "m")), tmp_path / "s.json"
    made = measure_sensitivity(source, out, types=["Q4_0"]).sensitivity
    out.write_text(json.dumps(json.loads(out.read_text()) | change))
    refused("again", read_sensitivity, out)
    out.unlink()
    assert measure_sensitivity(source, out, types=["Q4_0"]).sensitivity == made


@follows("another measurement writes here; wait for it or choose another --output")
def test_two_at_once_have_two_names(tmp_path):
    source, out = open_source(tiny(tmp_path / "m")), tmp_path / "s.json"
    with open(tmp_path / "s.json.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused("choose another --output", measure_sensitivity, source, out, types=["Q8_0"])
        measure_sensitivity(source, tmp_path / "other.json", types=["Q8_0"])
    measure_sensitivity(source, out, types=["Q8_0"])


@pytest.fixture
def fitted(tmp_path):
    """(source, its sensitivity)"""
    pytest.importorskip("scipy", reason="scipy, the extra `fit`, is not installed")
    source = open_source(tiny(tmp_path / "m"))
    return source, measure_sensitivity(source, tmp_path / "s.json", types=["Q4_0", "Q8_0"]).sensitivity


@follows("needs a sensitivity, which 'ornith-moe sensitivity SRC' makes; give it with --sensitivity")
@follows("no measured types make it that small; give at least {}")
def test_a_sensitivity_is_given_and_the_least_size_asked_for(fitted):
    source, found = fitted
    refused("give it with --sensitivity", plan_build, source, "gguf:bpw=5")
    for name in ("gguf:bpw=2", "gguf:fit=10kB"):
        with pytest.raises(PlanError, match="give at least") as told:
            plan_build(source, name, sensitivity=found)
        plan_build(source, str(told.value).rpartition(" ")[2], sensitivity=found)


@follows("and here {}; make one of this source, with the same --mtp")
@follows("that is not the one given here; give the same with --imatrix, or make it again")
def test_a_sensitivity_of_something_else_is_measured_again(tmp_path, fitted):
    source, found = fitted
    other = open_source(tiny(tmp_path / "other", vocab_size=576))
    refused("make one of this source", plan_build, other, "gguf:bpw=8", sensitivity=found)
    again = measure_sensitivity(other, tmp_path / "t.json", types=["Q4_0", "Q8_0"]).sensitivity
    plan_build(other, "gguf:bpw=8", sensitivity=again)
    refused("or make it again", plan_build, source, "gguf:bpw=8", sensitivity=replace(found, imatrix="of another"))
    plan_build(source, "gguf:bpw=8", sensitivity=found)


@follows("which the sensitivity has not measured of it; make one with --types {}")
def test_a_type_that_is_asked_for_is_measured(tmp_path, fitted):
    source, found = fitted
    asked = parse_asked_types(["attn_qkv=q5_0"])
    refused("with --types Q5_0 and the others", plan_build, source, "gguf:bpw=8", asked=asked, sensitivity=found)
    more = measure_sensitivity(source, tmp_path / "t.json", types=["Q5_0", "Q4_0", "Q8_0"]).sensitivity
    types = plan_build(source, "gguf:bpw=8", asked=asked, sensitivity=more).types
    assert types["blk.0.attn_qkv.weight"] == "Q5_0"


def test_a_sensitivity_that_nobody_heeds_is_left_out(tmp_path, fitted):
    source, found = fitted
    with pytest.raises(
        PlanError,
        match="--sensitivity are for gguf:fit=SIZE, gguf:bpw=BITS, mlx:fit=SIZE, mlx:bpw=BITS, nvfp4:fit=SIZE, ",
    ):
        convert(source, tmp_path / "out", ["gguf:Q8_0"], sensitivity=found)
    convert(source, tmp_path / "out", ["gguf:Q8_0"])


@follows("hold no sequence of {} tokens of {}; give a smaller --context")
@follows("GB for weights are less than {} needs, {}; give a larger --for or a smaller --context")
def test_a_card_that_is_too_small():
    model = open_source("qwen3.5-9b")
    refused("give a smaller --context", room, model, 6 * 10**9, 262_144)
    assert room(model, 6 * 10**9, 4096).weights_bytes > 0
    refused(
        "give a larger --for or a smaller", builds_within, model, room(model, 4 * 10**9, 4096).weights_bytes, Options()
    )
    assert builds_within(model, room(model, 6 * 10**9, 4096).weights_bytes, Options()) == ["gguf:Q3_K_M"]


@follows("--for: what {} keeps of a sequence is not known; leave --for out")
def test_an_architecture_that_says_nothing_of_its_cache(monkeypatch):
    model = open_source("qwen3.5-9b")
    monkeypatch.setattr(type(model.architecture), "cached", Architecture.cached)
    refused("leave --for out", room, model, 24 * 10**9)
    plan_build(model, "gguf:Q8_0")


@follows("the sensitivity has no type that may be chosen for it; make one with more --types")
def test_more_types_are_measured(tmp_path, fitted):
    source, found = fitted
    tensors = tuple(replace(tensor, errors={}) for tensor in found.tensors)
    refused("make one with more --types", plan_build, source, "gguf:bpw=8", sensitivity=replace(found, tensors=tensors))
    more = measure_sensitivity(source, tmp_path / "t.json", types=["Q8_0"]).sensitivity
    plan_build(source, "gguf:bpw=9", sensitivity=more)


@follows("the sensitivity has no types of MLX; make one with --types mlx")
def test_types_of_mlx_are_measured(tmp_path):
    source = open_source(tiny(tmp_path / "m", full_attention_interval=2))
    found = measure_sensitivity(source, tmp_path / "s.json", types=["Q8_0"]).sensitivity
    refused("make one with --types mlx", plan_build, source, "mlx:bpw=9", sensitivity=found)
    more = measure_sensitivity(source, tmp_path / "t.json", types=["mlx"]).sensitivity
    plan_build(source, "mlx:bpw=9", sensitivity=more)


@follows("the sensitivity lacks NVFP4 or FP8; make one with --types nvfp4")
def test_types_of_modelopt_are_measured(tmp_path, fitted):
    source, found = fitted
    refused("make one with --types nvfp4", plan_build, source, "nvfp4:bpw=9", sensitivity=found)
    more = measure_sensitivity(source, tmp_path / "t.json", types=["nvfp4"]).sensitivity
    plan_build(source, "nvfp4:bpw=12", sensitivity=more)
