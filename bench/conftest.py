"""What every bench gets: `measure`, the limits of the machine, and one closing table instead of pytest-benchmark's.

Benches marked `slow` run only when -m asks for them.
"""

import os
from collections.abc import Callable

import pytest
import torch

from ornith_moe.bench.limits import Limits, cpu_name
from ornith_moe.bench.rows import Row, table

LIMITS = Limits()
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
LOAD_AT_START = os.getloadavg()[0]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = True  # --benchmark-verbose brings pytest-benchmark's own table back
    config.option.benchmark_disable_gc = True  # what a collection costs depends on what else was imported


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def limits():
    return LIMITS


@pytest.fixture
def measure(benchmark, limits):
    """Time `call` as one row of the table. The caller has run it and checked its result, so it is warm."""

    def run(
        group: str,
        name: str,
        call: Callable[[], object],
        *,
        peer: bool,
        nbytes: int,
        flops: int = 0,
        dtype: torch.dtype = torch.float32,
        limit_s: float | None = None,
        rounds: int | None = None,
        setup: Callable[[], None] | None = None,
    ) -> dict:
        benchmark.group = group
        limit_s = limits.seconds(nbytes, flops, dtype)[0] if limit_s is None else limit_s
        benchmark.extra_info.update(name=name, peer=peer, bytes=nbytes, flops=flops, limit_ms=limit_s * 1e3)
        benchmark.extra_info.update(note="", threads=torch.get_num_threads())
        if rounds is None:
            benchmark(call)
        else:
            benchmark.pedantic(call, setup=setup, rounds=rounds)
        return benchmark.extra_info

    return run


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["cores"] = os.cpu_count()
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["load_at_start"] = LOAD_AT_START
    machine_info["environment"] = {name: os.environ[name] for name in THREAD_SETTINGS if name in os.environ}


def pytest_benchmark_update_json(output_json):
    output_json["limits"] = LIMITS.measured
    output_json["machine_info"].pop("node", None)  # a host name is nobody's business
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)  # every single round: megabytes


def pytest_terminal_summary(terminalreporter, config):
    benchmarks = config._benchmarksession.benchmarks
    if not benchmarks:
        return
    terminalreporter.section("benchmarks")
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    limits = [f"{name} {value:g}" for name, value in LIMITS.measured.items()]
    lines = [f"{machine}, torch {torch.__version__}, load {LOAD_AT_START:.1f} at start", *limits, ""]
    for line in lines + table([row_of(each) for each in benchmarks if each and not each.has_error]):
        terminalreporter.write_line(line)


def row_of(benchmark):
    info, stats = benchmark.extra_info, benchmark.stats
    return Row(
        suite="", group=benchmark.group, name=info["name"], peer=info["peer"], median_s=stats.median, p20_s=stats.q1,
        p80_s=stats.q3, rounds=stats.rounds, bytes=info["bytes"], flops=info["flops"], limit_s=info["limit_ms"] / 1e3,
        note=info["note"],
    )  # fmt: skip
