"""`bench/rows.py`: rows survive their file, a cut run keeps them, strict JSON, ratios by group, the closing table.

The reference is arithmetic on three made-up times. Not covered: what measures them.
"""

import json
from dataclasses import replace

import pytest

from ornith_moe.bench.rows import Row, Run, from_json, load, rated, save, table, to_json
from ornith_moe.quant.errors import OrnithError

OURS = Row(
    "moe", "layer", "ours", False, median_s=0.010, p20_s=0.009, p80_s=0.011, rounds=3, bytes=10**7, limit_s=0.005
)
SLOW = replace(OURS, name="eager", peer=True, median_s=0.040, p20_s=0.040, p80_s=0.040)
FAST = replace(OURS, name="grouped_mm", peer=True, median_s=0.020, p20_s=0.020, p80_s=0.020)
MISSING = Row("moe", "layer", "liger", True, "missing", "liger-kernel is not installed; pip install liger-kernel")
RED = Row("moe", "layer", "broken", False, "red", "y: relative RMS error 1.0e+00, allowed 1e-02")


def run_of(*rows):
    return Run("2026-11-29T12:00:00Z", "0" * 40, machine={"cores": 2}, limits={"copy, GB/s": 10.0}, rows=list(rows))


def test_a_file_gives_the_run_back(tmp_path):
    run = run_of(replace(OURS, seconds=(0.01, 0.02), control=(0.5, 0.5), case={"tokens": 64}), SLOW, MISSING, RED)
    save(run, tmp_path / "new" / "run.json")
    again = load(tmp_path / "new" / "run.json")
    assert again.rows == rated(run.rows) and again.machine == run.machine and again.red == [RED]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]
    assert len((tmp_path / "new" / "run.json").read_text().splitlines()) == 14 + len(run.rows)  # a row is a line


def test_a_failed_save_leaves_the_file_before_it(tmp_path):
    path = tmp_path / "run.json"
    save(run_of(OURS), path)
    with pytest.raises(ValueError, match="JSON"):
        save(run_of(OURS, replace(SLOW, error=float("nan"))), path)
    assert load(path).rows == rated([OURS])


def test_ratio_is_to_the_fastest_peer_with_a_time():
    ours, slow, fast, missing, red = rated([OURS, SLOW, FAST, MISSING, RED])
    assert (ours.ratio, ours.share) == (2.0, 0.5)
    assert (slow.ratio, fast.ratio, missing.ratio, red.ratio, red.share) == (None,) * 5
    other_group = replace(OURS, group="other")
    assert rated([other_group, FAST])[0].ratio is None


@pytest.mark.parametrize(
    "wrong",
    [{"status": "red", "why": "wrong"}, {"why": "but it is right"}, {"median_s": None}, {"status": "fast"}],
    ids=["red with a time", "ok with a reason", "ok without a time", "unknown status"],
)
def test_a_row_that_is_not_ok_has_no_time(wrong):
    with pytest.raises(ValueError, match=r"status|a time"):
        replace(OURS, **wrong)


def test_the_table_gives_every_row_its_reason_or_its_time():
    lines = table([OURS, SLOW, FAST, MISSING, RED])
    assert len(lines) == 2 + 5 and lines[1] == "layer"
    assert lines[2].split() == ["ours", "10.000", "20%", "1.00", "-", "50.0%", "2.00x", "-", "-"]
    assert lines[5].endswith(f"missing: {MISSING.why}") and lines[6].endswith(f"red: {RED.why}")
    assert len(table([])) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [1]}', '{"rows": [{"suite": "moe"}], "date": ""}', "\xff"])
def test_what_is_no_run_is_one_sentence(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(OrnithError, match=r"other\.json"):
        load(path)


def test_keys_of_later_versions_are_ignored():
    told = json.loads(json.dumps(to_json(run_of(OURS))))
    told["rows"][0]["colour"] = "blue"
    assert from_json(told, "test").rows == rated([OURS])
