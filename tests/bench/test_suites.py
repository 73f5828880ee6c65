"""`bench/tasks.py`, the suites and `ornith-moe bench`: right rows get a time, wrong ones are red, the rest say why.

The reference is the implementation broken on purpose. Times are real here and nothing is asserted of them. Not covered:
suites on a GPU.
"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from command import ornith_moe

import ornith_moe as om
from ornith_moe.bench import bench_codecs, bench_convert, bench_gpu_encode, bench_moe, bench_rl
from ornith_moe.bench.plugin import Plugin
from ornith_moe.bench.rows import load
from ornith_moe.bench.shapes import MODELS
from ornith_moe.bench.tasks import SLOWEST_S, Bench, Settings, Side, Task, Work
from ornith_moe.quant.errors import OrnithError

QUICK = Settings(quick=True)
SUITES = {"moe": bench_moe, "codecs": bench_codecs, "convert": bench_convert, "rl": bench_rl}
ALL = [
    (suite, settings)
    for suite in SUITES
    for settings in (QUICK, Settings(), Settings(quick=True, device="cuda"), Settings(models=("mixtral-8x7b",)))
]


class Still:
    """A clock on which every call takes a second."""

    device, flushes = "cpu", False

    def seconds(self, call, repeat=1):
        call()
        return 1.0

    def state(self):
        return {}


@pytest.fixture
def bench():
    made = Bench(QUICK, Still())
    made.limits._copy_gb_s, made.limits._gemm_gflop_s = lambda: 1.0, lambda dtype: 1.0
    return made


def rows_of(bench, task):
    return {row.name: row for row in bench.rows_of(task, list(task.names))}


def named(suite, group):
    (task,) = (task for task in SUITES[suite].tasks(QUICK) if task.group == group)
    return task


def test_a_turn_is_asked_for_before_each_task_and_each_round(bench):
    asked = []
    bench.turn = asked.append
    made = rows_of(bench, named("codecs", "Q8_0 decode, 1024x2048 to FP32"))
    rounds = max(row.rounds for row in made.values())
    assert asked == ["task", *["round"] * rounds] and rounds >= 3


def without_expert_0(x, indices, *rest, moe_mlp=om.moe_mlp, **options):
    return moe_mlp(x, torch.where(indices == indices[0, 0], -1, indices), *rest, **options)


def test_a_broken_kernel_turns_its_rows_red_and_no_other(bench, monkeypatch):
    task = named("moe", "moe nano bf16, T = 64, uniform, forward+backward")
    right = rows_of(bench, task)
    assert right["ours"].status == "ok" and right["ours"].median_s == 1.0 and 0 < right["ours"].error < 1e-2
    monkeypatch.setattr(om, "moe_mlp", without_expert_0)
    rows = rows_of(bench, task)
    assert rows["ours"].status == "red" and rows["ours"].median_s is None and "relative RMS error" in rows["ours"].why
    assert rows["grouped_mm"].status == "ok" and rows["grouped_mm"].peer
    assert rows["liger"].status == "skipped" and rows["batched_mm"].status == "skipped"


def test_a_wrong_byte_turns_a_codec_red(bench, monkeypatch):
    def one_byte(rows, name, quantize=om.quantize_gguf, **options):
        encoded = quantize(rows, name, **options)
        encoded[3, 7] ^= 1
        return encoded

    monkeypatch.setattr(om, "quantize_gguf", one_byte)
    rows = rows_of(bench, named("codecs", "Q8_0 encode, 1024x2048 from FP32"))
    assert rows["ours"].why == "1 of 2228224 bytes differ from the reference's" and rows["ours"].status == "red"
    assert rows["ggml"].status == "ok" and rows["ggml"].error == 0.0


@pytest.mark.parametrize("kind", ["loss", "replay"])
def test_the_rows_of_rl_are_right(bench, kind):
    (task,) = (task for task in bench_rl.tasks(QUICK) if task.case["what"] == kind)
    rows = rows_of(bench, task)
    assert {row.status for row in rows.values()} == {"ok"} and rows["ours"].error < 1e-5


def test_an_fp8_row_says_what_the_recipe_costs_and_a_size_that_it_refuses(bench):
    task = bench_moe._task("nano", 8, "zipf", "bf16", "fp8", "forward", "cpu")
    rows = rows_of(bench, task)
    assert rows["ours"].status == rows["masters"].status == rows["unchanged masters"].status == "ok"
    assert 0.03 < rows["ours"].error < 0.1 and rows["grouped_mm"].error < 0.01
    odd = replace(task, prepare=lambda: bench_moe._prepare(
        MODELS["nano"]._replace(inner=100), 2, "uniform", "bf16", "fp8", False, "cpu", "",
    ))  # fmt: skip
    assert rows_of(bench, odd)["ours"].why == "recipe fp8 takes an expert size that is a multiple of 128, not 100"


def test_what_raises_is_red_and_the_others_are_measured(bench):
    def raises():
        raise RuntimeError("out of\nluck")

    sides = {"good": lambda: Side(lambda: 1, float), "bad": lambda: Side(raises, float)}
    task = Task("moe", "group", {}, {"good": False, "bad": True}, lambda: Work(sides, 8))
    good, bad = bench.rows_of(task, ["good", "bad"])
    assert good.status == "ok" and (bad.status, bad.why) == ("red", "RuntimeError: out of luck")
    for row in bench.rows_of(replace(task, prepare=raises), ["good", "bad"]):
        assert (row.status, row.why) == ("red", "inputs: RuntimeError: out of luck")


def test_threads_of_a_task_are_given_back(bench):
    before, seen = torch.get_num_threads(), []
    side = Side(lambda: seen.append(torch.get_num_threads()), lambda _: 0.0)
    bench.rows_of(Task("codecs", "group", {}, {"a": False}, lambda: Work({"a": lambda: side}, 8), threads=1), ["a"])
    assert set(seen) == {1} and torch.get_num_threads() == before


def test_what_says_itself_what_it_used_is_called_once_to_be_checked_and_once_in_all_if_slow(bench):
    used, calls = {"peak_rss_bytes": 5, "rchar": 7}, []
    side = Side(lambda: calls.append(1), lambda _: 0.0, used=lambda: used)
    task = Task("convert", "group", {}, {"a": False}, lambda: Work({"a": lambda: side}, 8), budget=1e-9)
    (row,) = bench.rows_of(task, ["a"])
    assert (row.used, row.peak_bytes, row.rounds, len(calls)) == (used, 5, 3, 4)
    bench.clock.seconds = lambda call, repeat=1: (call(), SLOWEST_S + 1)[1]
    (row,) = bench.rows_of(task, ["a"])
    assert (row.median_s, row.rounds, len(calls)) == (SLOWEST_S + 1, 1, 5)


@pytest.mark.parametrize(("suite", "settings"), ALL, ids=str)
def test_rows_have_names_of_their_own(suite, settings, monkeypatch):
    monkeypatch.setattr(bench_moe, "_free_bytes", lambda device: 8 << 30)
    module = bench_gpu_encode if suite == "codecs" and settings.device == "cuda" else SUITES[suite]
    tasks = module.tasks(settings)
    names = [(task.group, name) for task in tasks for name in task.names]
    ids = [f"{task.id}-{name}" for task in tasks for name in task.names]
    assert len(names) == len(set(names)) and len(ids) == len(set(ids))
    assert all(task.suite == suite and json.dumps(task.case) for task in tasks)
    assert bool(tasks) == (suite != "convert" or settings.device == "cpu")


def test_a_model_that_does_not_fit_is_cut(monkeypatch):
    monkeypatch.setattr(bench_moe, "_free_bytes", lambda device: 8 << 30)
    tasks = bench_moe.tasks(Settings(models=("mixtral-8x7b",)))
    assert {task.case["model"] for task in tasks} == {"mixtral-8x7b/4"}
    assert bench_moe._cut_note("mixtral-8x7b/4") == "2 of 8 experts, top_k 1 of 2"


def test_a_gpu_is_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OrnithError, match="--device cuda needs a CUDA or ROCm device"):
        Bench(Settings(device="cuda"))


def test_the_command_writes_rows_and_prints_one_object(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("record.npy", np.array([[[0, 1, 2, 3]]], np.int16))
    rows = "nano-T1-record.npy-bf16-bf16-forward-ours or nano-T1-record.npy-bf16-bf16-forward-grouped_mm"
    options = ("--suite", "moe", "--quick", "--model", "nano", "--routing", "record.npy", "-k", rows)
    told = json.loads(ornith_moe("bench", *options, "--json", "--out", "run.json").stdout)
    run = load(tmp_path / "run.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.npy", "run.json"]
    assert {row.name: row.status for row in run.rows} == {"ours": "ok", "grouped_mm": "ok"}
    ours = run.rows[0]
    assert ours.peer is False and ours.rounds == len(ours.seconds) == len(ours.control) and ours.ratio and ours.share
    assert ours.case["routing"] == "record.npy" and ours.case["pass"] == "forward"
    assert told["rows"][0]["median_s"] == ours.median_s and told["settings"]["quick"] is True
    assert run.control["what"] == "torch.mm" and run.limits
    assert torch.__version__.startswith(run.machine["versions"]["torch"])  # of PyPI's 2.13.0 it says 2.13.0+cu130


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("-k", "no-such-row"), "no row fits -k 'no-such-row'"),
        (("--model", "gpt-5"), "model: expected one of"),
        (("--model", "nano", "--routing", "missing.npy", "-k", "nano-T1- and ours"), "routing: expected uniform"),
    ],
    ids=lambda value: str(value[0]),
)
def test_what_cannot_be_measured_is_one_sentence(arguments, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ornith_moe("bench", "--suite", "moe", "--quick", *arguments, code=1)
    assert what in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--suite", "speed"), ("--device", "tpu")], ids=str)
def test_usage_errors(arguments):
    assert "Invalid value" in ornith_moe("bench", *arguments, code=2).stderr


def test_without_pytest_benchmark_there_is_a_remedy(tmp_path):
    code = (
        "import sys; sys.modules['pytest_benchmark'] = None; sys.argv = ['ornith-moe', 'bench'];"
        "from ornith_moe.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "pip install 'ornith-moe[bench]'" in done.stderr and done.stderr.count("\n") == 1


def test_a_signal_ends_the_run_and_leaves_its_rows(bench):
    class Stopped(BaseException):
        pass

    def stop():
        raise Stopped

    task = Task("moe", "group", {}, {"a": False}, lambda: Work({"a": lambda: Side(stop, float)}, 8))
    plugin = Plugin(bench, lambda *row: None)
    plugin.names["group"] = ["a"]
    with pytest.raises(pytest.exit.Exception):
        plugin._row(task, "a")
    assert isinstance(plugin.failed, Stopped)
