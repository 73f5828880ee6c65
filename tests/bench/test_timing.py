"""`bench/timing.py` by a clock that adds up what calls claim to take, and by a GPU made of Python.

The reference is the sum itself: no test waits or reads a real clock. Not covered: what a real GPU's events say.
"""

import gc
from itertools import pairwise
from types import SimpleNamespace

import pytest

from ornith_moe.bench.limits import Limits
from ornith_moe.bench.timing import LEAST, LEAST_LONG, CudaClock, Times, WallClock, interleave, peak_bytes


class Sand:
    """A clock on which a call takes what it returns."""

    device = "cpu"

    def __init__(self, flushes=False):
        self.flushes = flushes

    def seconds(self, call, repeat=1):
        return sum(call() for _ in range(repeat)) / repeat

    def state(self):
        return {}


def told(order, name, seconds):
    def call():
        order.append(name)
        return seconds

    return call


def test_rounds_alternate_with_the_control_in_each():
    order = []
    calls = {name: told(order, name, 0.05) for name in "abc"}
    times = interleave(calls, Sand(), budget_s=0.05 * 3 * LEAST, control=told(order, "|", 0.01))
    assert "".join(order).endswith("|" + "abc|cba|" * 2 + "abc|")
    assert {len(times[name].seconds) for name in "abc"} == {LEAST}
    assert times["a"] == Times((0.05,) * LEAST, (0.01,) * LEAST)


def test_a_slow_implementation_sits_rounds_out_evenly():
    order = []
    calls = {"fast": told(order, "f", 0.05), "slow": told(order, "s", 1.0)}
    times = interleave(calls, Sand(), budget_s=1.0, control=told(order, "|", 0.01))
    assert len(times["fast"].seconds) == 10 and len(times["slow"].seconds) == LEAST_LONG
    slow = [i for i, turn in enumerate("".join(order).split("|")[1:]) if "s" in turn]
    assert len(slow) == LEAST_LONG and max(b - a for a, b in pairwise(slow)) <= 4
    assert len(times["slow"].control) == LEAST_LONG


def test_short_calls_are_repeated_and_warm_except_where_the_cache_is_flushed():
    for flushes, calls_of_a_round in ((False, 1 + 20), (True, 1)):
        order = []
        times = interleave({"a": told(order, "a", 1e-5)}, Sand(flushes), budget_s=0, control=told([], "|", 0.01))
        assert len(order) == 1 + LEAST * calls_of_a_round
        assert times["a"].seconds == pytest.approx((1e-5,) * LEAST)


def test_a_setup_comes_before_every_call_and_once_for_the_estimate():
    order = []
    interleave({"a": told(order, "a", 0.5)}, Sand(), budget_s=1, control=told([], "|", 0.1),
               setups={"a": told(order, "s", 0)})  # fmt: skip
    assert "".join(order) == "sa" * (1 + LEAST_LONG)


def test_garbage_waits():
    seen = []

    def call():
        seen.append(gc.isenabled())
        return 0.1

    interleave({"a": call}, Sand(), budget_s=0, control=lambda: 0.1)
    assert seen[0] and not any(seen[1:]) and gc.isenabled()


def test_summary_is_of_the_rounds():
    summary = Times(tuple(i / 10 for i in range(1, 12)), (1.0,) * 11).summary
    assert (summary["median_s"], summary["p20_s"], summary["p80_s"]) == pytest.approx((0.6, 0.3, 0.9))
    assert summary["rounds"] == 11 and Times((2.0,), (1.0,)).summary["p80_s"] == 2.0


class FakeCuda:
    """A stream: events note its time, and it advances when a call says so."""

    def __init__(self):
        self.now_ms, self.log = 0.0, []

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: (setattr(event, "at", self.now_ms), self.log.append("event"))
        event.synchronize = lambda: self.log.append("wait")
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def current_device(self):
        return 1

    def work(self, name, ms):
        def call():
            self.log.append(name)
            self.now_ms += ms

        return call


def test_a_gpu_is_timed_between_events_after_its_cache_was_flushed():
    cuda = FakeCuda()
    clock = CudaClock(cuda, flush=cuda.work("flush", 7.0), ask=lambda command: "")
    assert clock.seconds(cuda.work("call", 2.0)) == pytest.approx(2e-3)
    assert cuda.log == ["flush", "event", "call", "event", "wait"]
    times = interleave({"a": cuda.work("a", 3.0)}, clock, budget_s=0, control=cuda.work("mm", 0.5))
    assert times["a"].seconds == pytest.approx((3e-3,) * LEAST) and times["a"].control == pytest.approx((5e-4,) * LEAST)
    assert cuda.log.count("flush") == cuda.log.count("wait") == 1 + 1 + 1 + 2 * LEAST


def test_clocks_are_those_of_the_current_card():
    answer = "1980, 2619, 96.3, 31\n1410, 2619, 700.0, 70\n"
    clock = CudaClock(FakeCuda(), flush=lambda: None, ask=lambda command: answer)
    assert clock.state() == {"clocks.sm": 1410, "clocks.mem": 2619, "power.draw": 700.0, "temperature.gpu": 70}

    def missing(command):
        raise FileNotFoundError(command[0])

    for ask in (missing, lambda command: "[N/A], [N/A], 1, 2\n" * 2, lambda command: ""):
        assert CudaClock(FakeCuda(), flush=lambda: None, ask=ask).state() == {}


def test_limits_choose_what_binds(monkeypatch):
    limits = Limits(WallClock())
    monkeypatch.setattr(limits, "_copy_gb_s", lambda: 10.0)
    monkeypatch.setattr(limits, "_gemm_gflop_s", lambda dtype: 100.0)
    assert limits.seconds(10**9) == (pytest.approx(0.1), "copy")
    assert limits.seconds(10**9, 10**10) == (pytest.approx(0.1), "copy")
    assert limits.seconds(10**9, 2 * 10**10) == (pytest.approx(0.2), "matrix")
    assert all(value in (10.0, 100.0) for value in limits.measured.values()) and len(limits.measured) == 2


def test_peak_is_what_a_call_added():
    held = []
    peak = peak_bytes(lambda: held.append(bytearray(b"x" * (64 << 20))), "cpu")
    assert peak is None or 60 << 20 < peak < 200 << 20
