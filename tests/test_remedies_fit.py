"""Remedies of messages about sensitivities, and about builds that are fitted to a size."""

import fcntl
import json

import pytest
from remedies import edit, follows, refused, tiny

from ornith_moe.quant.conversion.sensitivity import measure_sensitivity
from ornith_moe.quant.fitting.sensitivity import read_sensitivity
from ornith_moe.quant.source.weights import open_source


@follows("is the sensitivity of another source, importance or types; move it away or name another with --output")
def test_another_sensitivity_is_moved_or_named(tmp_path):
    source, out = open_source(tiny(tmp_path / "m")), tmp_path / "s.json"
    measure_sensitivity(source, out, types=["Q8_0"])
    refused("move it away or name another with --output", measure_sensitivity, source, out, types=["Q4_0"])
    measure_sensitivity(source, tmp_path / "other.json", types=["Q4_0"])
    out.rename(tmp_path / "away.json")
    measure_sensitivity(source, out, types=["Q4_0"])


@follows("is of another source, importance or types; remove it and run the command again")
@follows("column {} is {}; expected finite weights, so mend the checkpoint first")
@follows("has no encoder in this version; choose out of {}")
def test_what_cannot_be_measured(tmp_path):
    m, out = tiny(tmp_path / "m"), tmp_path / "s.json"
    refused("choose out of F32, F16", measure_sensitivity, open_source(m), out, types=["IQ1_S"])
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    before = edit(m, lambda tensors: tensors.update({name: tensors[name] * float("nan")}))
    refused("so mend the checkpoint first", measure_sensitivity, open_source(m), out, types=["Q8_0"])
    edit(m, lambda tensors: tensors.update(before))
    again = "remove it and run the command again"
    refused(again, measure_sensitivity, open_source(m), out, types=["Q4_0"])
    out.with_name("s.json.partial").unlink()
    measure_sensitivity(open_source(m), out, types=["Q4_0"])


@follows("is no sensitivity, {}; make it again with")
@follows("this version reads {}; measure it again")
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
