"""Verdicts: whether a row is faster or slower than it was, beyond the noise of both runs.

    [low, high]   95 % confidence interval of the median of a row's rounds, by their ranks; of several runs of one
                  side, from the lowest low to the highest high
    moved         how far the machine itself has moved: of the peers of the row's group, whose code is the same on both
                  sides, the median of then / now; of a group without peers, of the control beside the row
    drift         |ln| of what that leaves: of peers in groups of several, how far nine in ten of them lie from `moved`;
                  of a group without peers, of `moved` itself
    margin        exp(drift) * (1 + FLOOR)

    faster        now.high * moved * margin < then.low      (moved: only where it is the peers')
    slower        now.low * moved > then.high * margin
    no difference otherwise; a peer is the yardstick, and so has no verdict

The interval needs no normal distribution: of n sorted rounds it goes from rank floor((n - 1.96 sqrt(n)) / 2) to rank
ceil(1 + (n + 1.96 sqrt(n)) / 2), and over all of them where n is small (Hoefler and Belli, "Scientific benchmarking of
parallel computing systems", SC 2015, rules 5 to 7; Le Boudec, "Performance evaluation", 2010). Two processes differ by
more than rounds of one do, by where their pages lie for instance, which no interval of one run contains: hence peers as
a yardstick (without them, seven of a hundred rows of one commit seemed to have changed; where they moved by more than
UNUSABLE, something disturbed that group, and there is no verdict), FLOOR, and against a commit two runs of each side,
in the order A B B A.

A row that is red or has no time on one side gets no verdict, and neither does a run of another machine, unless asked.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ornith_moe.bench.rows import Row, Run, load
from ornith_moe.bench.tasks import Settings
from ornith_moe.quant.errors import OrnithError, brief

FLOOR, UNUSABLE = 0.03, 2.0
SAME_MACHINE = ("cpu", "cores", "threads", "card", "environment")
HERE = Path(__file__).parent
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Verdict:
    """What became of a row.

    Attributes:
        verdict: "faster", "slower", "no difference", "yardstick" or "no verdict". `why`: one sentence of the last.
        ratio: median then over median now, less what the machine moved; above 1: faster.
        noise: by which ratio medians had to differ at least.
    """

    suite: str
    group: str
    name: str
    verdict: str
    ratio: float | None = None
    noise: float | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.verdict == "no verdict":
            return f"no verdict: {self.why}"
        ratio, noise = self.ratio or 1.0, self.noise or 1.0
        if self.verdict == "yardstick":
            return f"yardstick ({ratio:.2f}x)"
        if self.verdict == "no difference":
            return f"no difference (medians {ratio:.2f}x, noise {noise:.2f}x)"
        return f"{self.verdict} {max(ratio, 1 / ratio):.2f}x (noise {noise:.2f}x)"


def interval(seconds: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median by ranks; the least and the most of fewer than six."""
    ordered, n = sorted(seconds), len(seconds)
    half = 1.96 * math.sqrt(n)
    low, high = math.floor((n - half) / 2), math.ceil(1 + (n + half) / 2)
    return ordered[max(low, 1) - 1], ordered[min(high, n) - 1]


def compare(then: Sequence[Run], now: Sequence[Run], *, any_machine: bool = False) -> list[Verdict]:
    """A verdict for each row of `now`, of which, as of `then`, there may be several runs.

    Raises:
        OrnithError: the runs are of different machines.
    """
    if not any_machine:
        _check_machines(then[0], now[-1])
    sides = [[{row.key: row for row in run.rows} for run in runs] for runs in (then, now)]
    pairs = {row.key: _measured(row, *([rows.get(row.key) for rows in side] for side in sides)) for row in now[-1].rows}
    same = then[0].machine.get("versions") == now[-1].machine.get("versions")
    yardstick = _Yardstick.of([pair for pair in pairs.values() if isinstance(pair, _Pair) and pair.row.peer and same])
    return [pair if isinstance(pair, Verdict) else _verdict(pair, yardstick) for pair in pairs.values()]


@dataclass(frozen=True)
class _Pair:
    """A row that was measured on both sides."""

    row: Row
    then: Sequence[Row]
    now: Sequence[Row]

    @property
    def change(self) -> float:
        """ln of median then over median now."""
        return math.log(_median(self.then) / _median(self.now))


@dataclass(frozen=True)
class _Yardstick:
    """What unchanged code tells of the machine: ln of then over now by group, and how far single peers lie from it."""

    moved: dict[str, float]
    scatter: float | None

    @classmethod
    def of(cls, peers: Sequence[_Pair]) -> "_Yardstick":
        groups: dict[str, list[float]] = {}
        for peer in peers:
            groups.setdefault(peer.row.group, []).append(peer.change)
        moved = {group: median(changes) for group, changes in groups.items()}
        off = sorted(abs(c - moved[g]) for g, changes in groups.items() if len(changes) > 1 for c in changes)
        return cls(moved, off[len(off) * 9 // 10] if off else None)


def _check_machines(then: Run, now: Run) -> None:
    for name in SAME_MACHINE:
        a, b = then.machine.get(name), now.machine.get(name)
        if a != b:
            raise OrnithError(
                f"compare: {name} was {brief(a)} then and is {brief(b)} now, and times of two machines tell nothing of "
                "the code; measure both here, or say --any-machine"
            )


def _measured(row: Row, then: Sequence[Row | None], now: Sequence[Row | None]) -> _Pair | Verdict:
    for when, side in (("then", then), ("now", now)):
        for each in side:
            if each is None or each.status != "ok" or not each.seconds:
                why = "it was not measured" if each is None else f"{each.status}: {each.why or 'rounds were not kept'}"
                return Verdict(row.suite, row.group, row.name, "no verdict", why=f"{when} {why}")
    return _Pair(row, *([each for each in side if each is not None] for side in (then, now)))


def _verdict(pair: _Pair, yardstick: _Yardstick) -> Verdict:
    who = pair.row.suite, pair.row.group, pair.row.name
    if pair.row.peer:
        return Verdict(*who, "yardstick", math.exp(pair.change))
    moved, drift = yardstick.moved.get(pair.row.group), yardstick.scatter
    if moved is None or drift is None:
        drift = _drift(pair.then, pair.now)
    shift = math.exp(moved or 0.0)
    if not 1 / UNUSABLE < shift < UNUSABLE:
        why = f"peers beside it changed by {max(shift, 1 / shift):.1f}x, so something disturbed them; measure again"
        return Verdict(*who, "no verdict", why=why)
    (old_low, old_high), (new_low, new_high) = _pooled(pair.then), _pooled(pair.now)
    new_low, new_high = new_low * shift, new_high * shift
    old_median, new_median = _median(pair.then), _median(pair.now) * shift
    margin, ratio = math.exp(drift) * (1 + FLOOR), old_median / new_median
    to_be_faster = margin * (new_high / new_median) * (old_median / old_low)
    to_be_slower = margin * (new_median / new_low) * (old_high / old_median)
    if new_high * margin < old_low:
        return Verdict(*who, "faster", ratio, to_be_faster)
    if new_low > old_high * margin:
        return Verdict(*who, "slower", ratio, to_be_slower)
    return Verdict(*who, "no difference", ratio, max(to_be_faster, to_be_slower))


def _pooled(rows: Sequence[Row]) -> tuple[float, float]:
    lows, highs = zip(*(interval(row.seconds) for row in rows), strict=True)
    return min(lows), max(highs)


def _median(rows: Sequence[Row]) -> float:
    return median(second for row in rows for second in row.seconds)


def _drift(then: Sequence[Row], now: Sequence[Row]) -> float:
    """Between the sides, and no less than between two runs of one side."""
    medians = [[median(row.control) for row in side if row.control] for side in (then, now)]
    every = [value for side in medians for value in side]
    return math.log(max(every) / min(every)) if all(medians) else 0.0


def as_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A count of each verdict, and a line for each row that differs or has none."""
    counts: dict[str, int] = {}
    for each in verdicts:
        counts[each.verdict] = counts.get(each.verdict, 0) + 1
    silent = ("no difference", "yardstick")
    told = [f"  {each.group}: {each.name}  {each}" for each in verdicts if each.verdict not in silent]
    return ["compared: " + ", ".join(f"{count} {name}" for name, count in counts.items()), *told]


# A commit, measured in turn with what is here.

Measure = Callable[[Path, Path], Run]  # of the package in a folder, into a file


def against_commit(
    ref: str,
    settings: Settings,
    told: Callable[[int, int], None],
    measure: Measure | None = None,
    root: Path | None = None,
) -> tuple[list[Run], list[Run]]:
    """Two runs of commit `ref` and two of the checkout, in the order A B B A, each in a process of its own.

    Both are measured by this very folder: the commit is checked out beside, with a link to it for its own.

    Raises:
        OrnithError: no checkout, no such commit, or the commit cannot run this folder.
    """
    root = root or HERE.resolve().parent
    measure = measure or _process(settings)
    runs: dict[str, list[Run]] = {"then": [], "now": []}
    with checked_out(ref, root) as tree, tempfile.TemporaryDirectory(prefix="ornith-bench-") as folder:
        for number, side in enumerate(("then", "now", "now", "then")):
            told(number, 4)
            runs[side].append(measure(tree if side == "then" else root, Path(folder, f"{number}.json")))
        told(4, 4)
    return runs["then"], runs["now"]


@contextmanager
def checked_out(ref: str, root: Path) -> Iterator[Path]:
    """A throwaway worktree of `ref` whose ornith_moe/bench is the one of `root`."""
    commit = _git(root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if commit is None:
        raise OrnithError(f"compare: expected a file of a run or a commit of {root}, got {brief(ref)}")
    with tempfile.TemporaryDirectory(prefix="ornith-bench-") as folder:
        tree = Path(folder, "tree")
        if _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit) is None:
            raise OrnithError(f"compare: git could not check out {brief(ref)} beside {root}; see git worktree list")
        try:
            link = tree / "ornith_moe" / "bench"
            shutil.rmtree(link) if link.is_dir() and not link.is_symlink() else link.unlink(missing_ok=True)
            link.symlink_to(root / "bench")
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *arguments: str) -> str | None:
    """Output of git in `root`; None where it failed."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _process(settings: Settings, environment: Mapping[str, str] = os.environ) -> Measure:
    def measure(tree: Path, out: Path) -> Run:
        asked = out.with_suffix(".settings")
        asked.write_text(json.dumps(asdict(settings)), encoding="utf-8")
        command: list[Any] = [sys.executable, "-m", "ornith_moe.bench.session", asked, out]
        env = {**environment, "PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=out.parent, env=env, capture_output=True, text=True)
        if done.returncode or not out.exists():
            words = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OrnithError(f"compare: {tree.name} could not be measured ({brief(words)})")
        return load(out)

    return measure
