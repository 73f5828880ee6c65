"""Verdicts: whether a row is faster or slower than it was, beyond the noise.

Pairs of runs that took turns (`paired`; in_turn.py makes them):

    change_p      ln of a row's median then over its median now, of pair p of n
    [low, high]   mean(change) -+ t(n - 1, 95 %) * deviation(change) / sqrt(n)
    faster        low > ln(1 + FLOOR)           slower: high < -ln(1 + FLOOR)           no difference otherwise

What differs so is measured again in as many new pairs, and differs if it does so again in the same direction
(`confirmed`): one row in some hundred of one commit seems to have changed once, and a run has a hundred.

Two runs, of which one is a file (`compare`):

    [low, high]   95 % confidence interval of the median of a row's rounds, by their ranks
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
UNUSABLE, something disturbed that group, and there is no verdict) and FLOOR. A change of 10 % is found in pairs, and
rarely in two runs.

A row that is red or has no time on one side gets no verdict, and neither does a run of another machine, unless asked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev

from ornith_moe.bench.rows import Row, Run
from ornith_moe.quant.errors import OrnithError, brief

FLOOR, UNUSABLE = 0.03, 2.0
SAME_MACHINE = ("cpu", "cores", "threads", "card", "environment")
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t of 1, 2, ... degrees of freedom


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

    @property
    def differs(self) -> bool:
        return self.verdict in ("faster", "slower")

    def again(self, other: "Verdict") -> "Verdict":
        """That of the new pairs, but for a difference that the first ones did not show."""
        return replace(other, verdict="no difference") if other.differs and other.verdict != self.verdict else other

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


def paired(then: Sequence[Run], now: Sequence[Run]) -> list[Verdict]:
    """A verdict for each row from two or more pairs of runs that took turns."""
    sides = [[{row.key: row for row in run.rows} for run in runs] for runs in (then, now)]
    found = []
    for row in now[-1].rows:
        pairs = [_measured(row, *(rows.get(row.key) for rows in both)) for both in zip(*sides, strict=True)]
        told = next((pair for pair in pairs if isinstance(pair, Verdict)), None)
        found.append(told or _of_pairs(row, [pair.change for pair in pairs if isinstance(pair, _Pair)]))
    return found


def confirmed(first: Sequence[Verdict], second: Sequence[Verdict]) -> list[Verdict]:
    """The first verdicts, but "no difference" for a row that differs and did not do so again in the second."""
    again = {(each.suite, each.group, each.name): each for each in second}
    return [each if not each.differs else each.again(again[each.suite, each.group, each.name]) for each in first]


def _of_pairs(row: Row, changes: Sequence[float]) -> Verdict:
    who = row.suite, row.group, row.name
    change, half = fmean(changes), T_95[len(changes) - 2] * stdev(changes) / math.sqrt(len(changes))
    noise = math.exp(half) * (1 + FLOOR)
    if row.peer:
        return Verdict(*who, "yardstick", math.exp(change), noise)
    word = "no difference" if abs(change) <= math.log(noise) else "faster" if change > 0 else "slower"
    return Verdict(*who, word, math.exp(change), noise)


def compare(then: Run, now: Run, *, any_machine: bool = False) -> list[Verdict]:
    """A verdict for each row of `now`.

    Raises:
        OrnithError: the runs are of different machines.
    """
    if not any_machine:
        _check_machines(then, now)
    before = {row.key: row for row in then.rows}
    pairs = {row.key: _measured(row, before.get(row.key), row) for row in now.rows}
    same = then.machine.get("versions") == now.machine.get("versions")
    yardstick = _Yardstick.of([pair for pair in pairs.values() if isinstance(pair, _Pair) and pair.row.peer and same])
    return [pair if isinstance(pair, Verdict) else _verdict(pair, yardstick) for pair in pairs.values()]


@dataclass(frozen=True)
class _Pair:
    """A row that was measured on both sides."""

    then: Row
    row: Row

    @property
    def change(self) -> float:
        """ln of median then over median now."""
        return math.log(median(self.then.seconds) / median(self.row.seconds))


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


def _measured(row: Row, then: Row | None, now: Row | None) -> _Pair | Verdict:
    for when, each in (("then", then), ("now", now)):
        if each is None or each.status != "ok" or not each.seconds:
            why = "it was not measured" if each is None else f"{each.status}: {each.why or 'rounds were not kept'}"
            return Verdict(row.suite, row.group, row.name, "no verdict", why=f"{when} {why}")
    assert then and now
    return _Pair(then, now)


def _verdict(pair: _Pair, yardstick: _Yardstick) -> Verdict:
    who = pair.row.suite, pair.row.group, pair.row.name
    if pair.row.peer:
        return Verdict(*who, "yardstick", math.exp(pair.change))
    moved, drift = yardstick.moved.get(pair.row.group), yardstick.scatter
    if moved is None or drift is None:
        drift = _drift(pair)
    shift = math.exp(moved or 0.0)
    if not 1 / UNUSABLE < shift < UNUSABLE:
        why = f"peers beside it changed by {max(shift, 1 / shift):.1f}x, so something disturbed them; measure again"
        return Verdict(*who, "no verdict", why=why)
    (old_low, old_high), (new_low, new_high) = interval(pair.then.seconds), interval(pair.row.seconds)
    new_low, new_high = new_low * shift, new_high * shift
    old_median, new_median = median(pair.then.seconds), median(pair.row.seconds) * shift
    margin, ratio = math.exp(drift) * (1 + FLOOR), old_median / new_median
    to_be_faster = margin * (new_high / new_median) * (old_median / old_low)
    to_be_slower = margin * (new_median / new_low) * (old_high / old_median)
    if new_high * margin < old_low:
        return Verdict(*who, "faster", ratio, to_be_faster)
    if new_low > old_high * margin:
        return Verdict(*who, "slower", ratio, to_be_slower)
    return Verdict(*who, "no difference", ratio, max(to_be_faster, to_be_slower))


def _drift(pair: _Pair) -> float:
    medians = [median(row.control) for row in (pair.then, pair.row) if row.control]
    return math.log(max(medians) / min(medians)) if len(medians) == 2 else 0.0


def as_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A count of each verdict, and a line for each row that differs or has none."""
    counts: dict[str, int] = {}
    for each in verdicts:
        counts[each.verdict] = counts.get(each.verdict, 0) + 1
    silent = ("no difference", "yardstick")
    told = [f"  {each.group}: {each.name}  {each}" for each in verdicts if each.verdict not in silent]
    return ["compared: " + ", ".join(f"{count} {name}" for name, count in counts.items()), *told]
