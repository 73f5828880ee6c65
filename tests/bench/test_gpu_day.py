"""bench/gpu_day.py: what must not go wrong in fifteen minutes that cannot be repeated.

Parts are worked on machines and by clocks that are made here; the whole script runs dry, in Triton's interpreter, as
`make gpu-day ARGS=--dry` does. References: the order, the sentences and the constants that the tests put in. Not
covered: a GPU.
"""

import json
import os
import runpy
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from ornith_moe.bench import gpu_day, rows
from ornith_moe.bench.day import bits, launches, machine, wheels
from ornith_moe.bench.day.parts import Journal, Part, Task, shared_out, supervise, work
from ornith_moe.bench.rows import Row, Run
from ornith_moe.kernels.examine import catalog
from ornith_moe.kernels.examine.compile import Loop, Report
from ornith_moe.kernels.examine.model import DEVICES, estimate, routing_counts
from ornith_moe.quant.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


class Fake:
    """A machine that answers as long as it is told to."""

    def __init__(self, answers=True):
        self.answers = lambda: answers


@pytest.fixture
def journal(tmp_path):
    made = Journal(Run("2026-01-01T00:00:00", "", settings={}), tmp_path / "gpu-day.json")
    made.save()
    return made


def ok(name):
    return Row("test", "group", name, peer=False, median_s=1e-3)


def part(*named, seconds=10.0):
    """A part of tasks (name, what it runs, which may give rows)."""

    def tasks(on, journal):
        for name, run in named:
            yield Task("group", name, lambda name=name, run=run: run() or [ok(name)])

    return Part("x", "test", "a part", seconds, tasks)


def fails():
    raise ValueError("the kernel gave nonsense\nand a page of it")


def told(journal):
    """(name, status) of every row on disk."""
    return [(row.name, row.status) for row in rows.load(journal.path).rows]


def test_a_row_is_on_disk_before_the_next_task_and_an_error_is_a_red_row(journal):
    seen = []
    names = [("one", lambda: None), ("two", fails), ("three", lambda: seen.append(told(journal)))]
    assert work(part(*names), Fake(), journal, deadline=1.0, now=lambda: 0.0)
    assert seen == [[("one", "ok"), ("two", "red")]]
    assert told(journal) == [("one", "ok"), ("two", "red"), ("three", "ok")]
    assert rows.load(journal.path).rows[1].why == "'ValueError: the kernel gave nonsense'"


def test_an_overrun_ends_the_part_and_says_what_was_not_measured(journal):
    clock = [0.0]

    def takes(seconds):
        clock[0] += seconds

    names = [("one", lambda: takes(8)), ("two", lambda: takes(8)), ("three", lambda: takes(8))]
    assert work(part(*names, seconds=10), Fake(), journal, deadline=10.0, now=lambda: clock[0])
    assert told(journal) == [("one", "ok"), ("two", "ok"), ("three", "skipped")] and clock == [16.0]
    assert rows.load(journal.path).rows[2].why == "the 10 s of part x were over"


def test_a_part_that_cannot_name_its_tasks_is_one_red_row(journal):
    def tasks(on, journal):
        yield Task("group", "one", lambda: [ok("one")])
        raise RuntimeError("no more")

    assert work(Part("x", "test", "a part", 9.0, tasks), Fake(), journal, deadline=1.0, now=lambda: 0.0)
    assert told(journal) == [("one", "ok"), ("the part itself", "red")]


def test_behind_a_lost_device_another_process_goes_on(journal):
    names = [("one", lambda: None), ("lost", fails), ("three", lambda: None)]
    assert not work(part(*names), Fake(answers=False), journal, deadline=1.0, now=lambda: 0.0)
    assert told(journal) == [("one", "ok"), ("lost", "red")]
    supervise(part(*names), lambda: Fake(answers=False), journal, 30.0)
    assert told(journal)[2:] == [("one", "ok"), ("lost", "red"), ("three", "ok")]


def test_a_process_that_dies_takes_one_task_with_it(journal):
    supervise(part(("one", lambda: None), ("two", lambda: os._exit(11)), ("three", lambda: None)), Fake, journal, 30.0)
    assert told(journal) == [("one", "ok"), ("two", "red"), ("three", "ok")]
    assert rows.load(journal.path).rows[1].why == "its process ended with exit code 11"


def test_a_kernel_that_never_ends_is_killed_and_the_cut_run_can_be_read(journal):
    hangs = part(("one", lambda: None), ("two", lambda: time.sleep(600)), ("three", lambda: None))
    supervise(hangs, Fake, journal, 1.0, grace_s=0.5)
    assert told(journal) == [("one", "ok"), ("two", "red")]
    run = rows.load(journal.path)
    assert run.rows[1].why == "it did not end and was killed"
    assert run.settings["at"] == {"part": "x", "number": 1, "group": "group", "name": "two"}


def test_a_machine_that_is_not_there_is_a_red_row(journal):
    def missing():
        raise RuntimeError("no CUDA GPUs are available")

    supervise(part(("one", lambda: None)), missing, journal, 5.0)
    assert told(journal) == [("the machine", "red")]


def test_parts_come_in_order_and_fit_the_day():
    every = gpu_day.parts()
    assert [each.letter for each in every] == ["0", "a", "b", "c", "d", "e", "f"]
    seconds = {each.letter: each.seconds for each in every}
    assert [seconds[letter] for letter in "abcd"] == [90, 240, 180, 180] and sum(seconds.values()) == gpu_day.BUDGET_S
    assert shared_out(every, 900) == seconds
    assert shared_out(every, 420) == {letter: own / 2 for letter, own in seconds.items()}


def test_wheels_are_fetched_or_said_to_be_missing_and_unpacked_where_imports_look(tmp_path, monkeypatch):
    def pip(command, **_):
        found = command[-1] == "gguf"
        if found:
            with zipfile.ZipFile(tmp_path / "gguf-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("carried_here/__init__.py", "there = True")
        return subprocess.CompletedProcess(command, not found, "", "" if found else "ERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", pip)
    said = wheels.fetch(tmp_path)
    assert len(said) == 4 and said[0].startswith("gguf-1.0-py3-none-any.whl: 0.0 MB")
    assert said[1] == "xllamacpp: missing, its rows will say so (ERROR: No matching distribution)"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert wheels.unpack(tmp_path, tmp_path / "site") == ["gguf-1.0-py3-none-any.whl"]
    import carried_here

    assert carried_here.there and sys.path[-1] == str(tmp_path / "site")
    assert os.environ["PYTHONPATH"] == f"elsewhere{os.pathsep}{tmp_path / 'site'}"  # of the processes that compile


def test_a_card_is_known_by_its_name():
    assert machine.card_of("NVIDIA H100 80GB HBM3", "sm90") == DEVICES["sm90"]
    h200 = machine.card_of("NVIDIA H200", "sm90")
    assert (h200.name, h200.hbm, h200.flops) == ("H200", 4.8e12, DEVICES["sm90"].flops)
    with pytest.raises(ValueError, match=r"arch: expected one of .*sm90.*, got 'sm75' \(Tesla T4\); add it to DEVICES"):
        machine.card_of("Tesla T4", "sm75")


def test_constants_are_found_again():
    """Launches timed by the model itself, with other constants than it is started with."""
    report = Report("sm90", 8, 128, 0, 64 << 10, {}, 0, True, 0, 100, Loop(60, 8, 10), "")
    true = launches.with_constants(
        DEVICES["sm90"],
        {"hbm_share": 0.7, "l2": 5e12, "tile_us": 3.0, "launch_us": 5.0, "sustained 1": 0.6, "sustained 2": 0.7},
    )
    observed = []
    for tokens, recipe in ((64, "bf16"), (32768, "bf16"), (64, "fp8"), (32768, "fp8")):
        for way in ("forward", "backward"):
            which = catalog.Pass("35B", tokens, way, RECIPES[recipe])
            pairs = [(one, report) for one in catalog.record("sm90", which)]
            counts = routing_counts(catalog.SHAPES["35B"], tokens)
            seconds = [each.us / 1e6 for each in estimate("sm90", pairs, counts, true)]
            observed.append(launches.Observed(tokens, pairs, np.asarray(counts), seconds))
    before = launches.rms("sm90", DEVICES["sm90"], observed)
    fitted = launches.fit("sm90", DEVICES["sm90"], observed, least=0.02)
    assert before > 0.2 and launches.rms("sm90", fitted, observed) < 0.05
    for name in ("hbm_share", "launch_us"):  # others may hide behind a longer term
        assert launches.constants(fitted)[name] == pytest.approx(launches.constants(true)[name], rel=0.1), name
    assert fitted.name == true.name and replace(fitted, sustained=()).flops == true.flops


def test_every_recorded_bit_has_its_case():
    assert list(bits.recorded()) == [f"{suite}: {name}" for suite, name, _ in bits.cases()]


@pytest.mark.slow
def test_the_whole_day_runs_dry(tmp_path, monkeypatch):
    """In this process, where the interpreter does nothing twice (conftest.py); each part is a fork of it."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of them does not survive a fork
    with mock.patch.dict(os.environ):
        assert runpy.run_path(str(ROOT / "bench" / "gpu_day.py"))["main"](["--dry", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    run = rows.load(tmp_path / "gpu-day.json")
    assert not run.red and not [row for row in run.rows if "were over" in row.why]
    suites = {row.suite for row in run.rows if row.status == "ok"}
    assert suites >= {"compile", "casts", "encoders", "plan", "routing", "correct", "moe", "launches", "tiles"}
    assert run.limits and run.machine["torch"] and run.settings["constants"]["fitted"]
    table = json.loads((tmp_path / "tiles-sm90.json").read_text())
    assert {"bf16", "fp8", "fp32"} == table.keys() and json.loads((tmp_path / "constants.json").read_text())
