"""`bench/comparison.py`: verdicts on rounds that are drawn, not measured, and the order in which a commit is measured.

The reference is how the rounds were made. Not covered: whether real noise is within what is allowed, which is for
`bench/README.md`; the processes of `--compare GITREF`, of which only the folders and the order are tested.
"""

import random
import subprocess
from dataclasses import replace

import pytest

from ornith_moe.bench.comparison import FLOOR, against_commit, as_lines, compare, interval
from ornith_moe.bench.rows import Row, Run
from ornith_moe.bench.tasks import Settings
from ornith_moe.bench.timing import interleave
from ornith_moe.quant.errors import OrnithError

MACHINE = {"cpu": "a", "cores": 2, "threads": 2, "environment": {}}


class Drawn:
    """A clock on which a call takes what it returns, and 2 % of noise on top; now and then a neighbour takes half."""

    device, flushes = "cpu", False

    def __init__(self, seed):
        self.random = random.Random(seed)

    def seconds(self, call, repeat=1):
        return call() * self.random.lognormvariate(0, 0.02) * self.random.choice([1] * 9 + [1.5])

    def state(self):
        return {}


def run_of(seed, seconds=0.05, control=1e-3, **changes):
    """A run of one row, with rounds that take turns on a drawn clock."""
    times = interleave({"ours": lambda: seconds}, Drawn(seed), budget_s=2.0, control=lambda: control)
    rows = [Row("moe", "layer", "ours", False, **times["ours"].summary)]
    return Run("2026-11-29T00:00:00Z", "", MACHINE | changes, rows=rows)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Each of hundreds of runs would collect garbage before its rounds."""
    monkeypatch.setattr("ornith_moe.bench.timing.gc.collect", lambda: 0)


def verdict(then, now):
    (found,) = compare([then], [now])
    return found


def test_runs_of_one_commit_do_not_differ():
    found = {verdict(run_of(2 * seed), run_of(2 * seed + 1)).verdict for seed in range(200)}
    assert found == {"no difference"}


@pytest.mark.parametrize(("factor", "expected"), [(1.1, "slower"), (1 / 1.1, "faster"), (1 + FLOOR, "no difference")])
def test_ten_percent_are_found(factor, expected):
    found = [verdict(run_of(seed), run_of(1000 + seed, 0.05 * factor)) for seed in range(50)]
    assert {each.verdict for each in found} == {expected}
    assert all(each.ratio == pytest.approx(1 / factor, rel=0.03) for each in found)
    assert str(found[0]).startswith({"no difference": "no difference"}.get(expected, f"{expected} 1."))


def test_a_machine_that_slowed_down_is_not_the_code():
    assert verdict(run_of(1), run_of(2, 0.055, control=1.1e-3)).verdict == "no difference"
    assert verdict(run_of(1), run_of(2, 0.065, control=1.1e-3)).verdict == "slower"


@pytest.mark.parametrize(
    ("peers", "ours", "expected"),
    [
        (1.3, 1.3, "no difference"),
        (1.3, 1.55, "slower"),
        (0.8, 1.0, "slower"),
        (1.3, 1.0, "faster"),
        (9, 1, "no verdict"),
    ],
)
def test_peers_whose_code_is_the_same_tell_how_far_the_machine_moved(peers, ours, expected):
    """The control next to them saw nothing of it: a neighbour takes memory from some shapes and not from others."""

    def run(seed, ours, peers, version="1"):
        calls = {"ours": lambda: 0.01 * ours, "a": lambda: 0.02 * peers, "b": lambda: 0.05 * peers}
        times = interleave(calls, Drawn(seed), budget_s=2.0, control=lambda: 1e-3)
        rows = [Row("moe", "layer", name, name != "ours", **found.summary) for name, found in times.items()]
        return Run("2026-11-29T00:00:00Z", "", MACHINE | {"versions": {"torch": version}}, rows=rows)

    found = compare([run(1, 1, 1)], [run(2, ours, peers)])
    assert [each.verdict for each in found] == [expected, "yardstick", "yardstick"]
    if expected == "no verdict":
        assert "peers beside it changed by 9" in found[0].why
    other_torch = compare([run(1, 1, 1)], [run(2, ours, peers, version="2")])  # whose peers may have changed themselves
    assert other_torch[0].verdict == ("no difference" if ours == 1 else "slower")


def test_the_interval_holds_the_median_in_nineteen_of_twenty_runs():
    draw = random.Random(0)
    inside = 0
    for _ in range(2000):
        low, high = interval([draw.expovariate(1) for _ in range(30)])
        inside += low <= 0.6931 <= high
    assert 0.94 < inside / 2000 < 0.99
    assert interval([3, 1, 2]) == (1, 3) and interval([5.0]) == (5.0, 5.0)


def test_a_red_row_gets_no_verdict():
    red = Row("moe", "layer", "ours", False, "red", "y: wrong")
    for runs in ((run_of(1), replace(run_of(2), rows=[red])), (replace(run_of(1), rows=[red]), run_of(2))):
        found = verdict(*runs)
        assert found.verdict == "no verdict" and "red: y: wrong" in found.why
    assert "then it was not measured" in str(verdict(replace(run_of(1), rows=[]), run_of(2)))
    assert as_lines([verdict(run_of(1), replace(run_of(2), rows=[red]))])[0] == "compared: 1 no verdict"


def test_another_machine_is_refused_unless_asked_for():
    then, now = run_of(1), run_of(2, cpu="b")
    with pytest.raises(OrnithError, match=r"cpu was 'a' then and is 'b' now.*--any-machine"):
        compare([then], [now])
    assert compare([then], [now], any_machine=True)[0].verdict == "no difference"


def test_a_difference_must_hold_in_every_run_of_a_side():
    fast, slow = (run_of(seed, seconds) for seed, seconds in ((1, 0.05), (2, 0.06)))
    assert compare([fast, slow], [fast, slow])[0].verdict == "no difference"
    assert compare([fast, fast], [slow, slow])[0].verdict == "slower"


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True).stdout


def test_a_commit_is_measured_in_turn_by_todays_folder(tmp_path):
    root = tmp_path / "root"
    (root / "ornith_moe").mkdir(parents=True)
    (root / "bench").mkdir()
    (root / "ornith_moe" / "code.py").write_text("old")
    (root / "bench" / "rows.py").write_text("old")
    (root / "ornith_moe" / "bench").symlink_to("../bench")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "one")
    (root / "ornith_moe" / "code.py").write_text("new")
    (root / "bench" / "rows.py").write_text("new")
    seen, told = [], []

    def measure(tree, out):
        seen.append(((tree / "ornith_moe" / "code.py").read_text(), (tree / "ornith_moe/bench/rows.py").read_text()))
        return Run("", seen[-1][0])

    then, now = against_commit("HEAD", Settings(), lambda *done: told.append(done), measure, root)
    assert seen == [("old", "new"), ("new", "new"), ("new", "new"), ("old", "new")]
    assert {run.commit for run in then} == {"old"} and {run.commit for run in now} == {"new"} and told[-1] == (4, 4)
    assert len(git(root, "worktree", "list").splitlines()) == 1
    with pytest.raises(OrnithError, match="expected a file of a run or a commit"):
        against_commit("no-such-ref", Settings(), lambda *done: None, measure, root)
