"""`bench/comparison.py`: verdicts on rounds that are drawn, not measured, and the order in which a commit is measured.

The reference is how the rounds were made. Not covered: whether real noise is within what is allowed, which is for
`bench/README.md`; that a run asks for its turns, which is tests/bench/test_suites.py's.
"""

import random
import subprocess
from dataclasses import replace
from unittest import mock

import pytest

from ornith_moe.bench.comparison import FLOOR, as_lines, compare, confirmed, interval, paired
from ornith_moe.bench.in_turn import against_commit, take_turns
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
    (found,) = compare(then, now)
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

    found = compare(run(1, 1, 1), run(2, ours, peers))
    assert [each.verdict for each in found] == [expected, "yardstick", "yardstick"]
    if expected == "no verdict":
        assert "peers beside it changed by 9" in found[0].why
    other_torch = compare(run(1, 1, 1), run(2, ours, peers, version="2"))  # whose peers may have changed themselves
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
        compare(then, now)
    assert compare(then, now, any_machine=True)[0].verdict == "no difference"


def pairs_of(seed, factor=1.0, count=5, between=0.02):
    """Pairs of runs whose processes differ by `between` for reasons of their own, as those of a machine do."""
    draw = random.Random(seed)

    def side(seconds):
        return [
            run_of(draw.random(), seconds * draw.lognormvariate(0, between), control=draw.choice([1e-3, 2e-3]))
            for _ in range(count)
        ]

    return side(0.05), side(0.05 * factor)


def test_pairs_of_one_commit_do_not_differ_twice():
    first, second = ([paired(*pairs_of(seed + start)) for seed in range(100)] for start in (0, 1000))
    found = [confirmed(*both)[0].verdict for both in zip(first, second, strict=True)]
    assert set(found) == {"no difference"} and sum(each.differs for (each,) in first) <= 3


@pytest.mark.parametrize(("factor", "expected"), [(1.1, "slower"), (1 / 1.1, "faster")])
def test_ten_percent_are_found_between_pairs_of_processes(factor, expected):
    """In nineteen of twenty, where processes differ by two percent."""
    found = [paired(*pairs_of(seed, factor))[0] for seed in range(40)]
    assert {each.verdict for each in found} <= {expected, "no difference"}
    assert sum(each.verdict == expected for each in found) >= 38
    assert all(each.ratio == pytest.approx(1 / factor, rel=0.05) and each.noise < 1.11 for each in found)


def test_what_differs_must_do_so_again_in_the_same_direction():
    slower, faster, same = (paired(*pairs_of(7, factor)) for factor in (1.3, 1 / 1.3, 1))
    assert [each[0].verdict for each in (slower, faster, same)] == ["slower", "faster", "no difference"]
    assert confirmed(slower, slower) == slower and confirmed(same, slower) == same
    assert confirmed(slower, faster)[0].verdict == confirmed(slower, same)[0].verdict == "no difference"


class Taker:
    """A process of a pair that asks for its turns as listed, and notes when it gets them."""

    def __init__(self, name, asks, log):
        self.name, self.asks, self.log = name, iter(asks), log

    def wait(self):
        self.next = next(self.asks, "")
        return self.next

    def go(self):
        self.log.append((self.name, self.next))


def test_one_of_two_works_at_a_time_and_tasks_begin_together():
    log = []
    asks = {"a": ["task", "round", "round", "task", "round"], "b": ["task", "round", "round", "round", "task", "round"]}
    take_turns([Taker(name, listed, log) for name, listed in asks.items()])
    assert [name + what[0] for name, what in log] == "at bt br ar ar br br at bt br ar".split()


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True).stdout


SESSION = """
import json, sys, time
from pathlib import Path
asked, out = (Path(word) for word in sys.argv[1:])
root = Path(__file__).parents[1]
code, folder = (root / "code.py").read_text(), (root / "bench/rows.py").read_text()
if code == "broken":
    sys.exit("no such kernel")
for what in ("task", "round", "round"):
    print(what, flush=True)
    sys.stdin.readline()
row = {"suite": "moe", "group": "layer", "name": "ours", "peer": False, "case": {"model": "a, b"}}
seconds = [float(code) + 0.001 * (time.time_ns() // 1000 % 10)] * 5
rows = [row | {"median_s": seconds[0], "rounds": 5, "seconds": seconds, "control": seconds}]
out.write_text(json.dumps(dict(date="", commit=folder, machine={}, limits={}, control={}, rows=rows,
               settings=json.loads(asked.read_text()))))
"""


def test_a_commit_is_measured_in_turn_by_todays_folder(tmp_path):
    root = tmp_path / "root"
    (root / "ornith_moe").mkdir(parents=True)
    (root / "bench").mkdir()
    (root / "ornith_moe" / "__init__.py").touch(), (root / "ornith_moe" / "code.py").write_text("1.0")
    (root / "bench" / "session.py").write_text(SESSION), (root / "bench" / "rows.py").write_text("old")
    (root / "ornith_moe" / "bench").symlink_to("../bench")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "one")
    (root / "bench" / "rows.py").write_text("new")
    for code, expected, turns in (("1.2", "slower", 6), ("1.0", "no difference", 3)):
        (root / "ornith_moe" / "code.py").write_text(code)
        told = mock.Mock()
        now, (found,) = against_commit("HEAD", Settings(), told, root, pairs=3)
        assert found.verdict == expected and now.commit == "new" and told.call_args.args == (turns, turns)
        assert now.rows[0].median_s == pytest.approx(float(code), abs=0.01)
    (root / "ornith_moe" / "code.py").write_text("broken")
    with pytest.raises(OrnithError, match=r"root could not be measured \(.*no such kernel"):
        against_commit("HEAD", Settings(), lambda *done: None, root)
    assert len(git(root, "worktree", "list").splitlines()) == 1
    with pytest.raises(OrnithError, match="expected a file of a run or a commit"):
        against_commit("no-such-ref", Settings(), lambda *done: None, root)
