"""One run: the machine, the suites under pytest, and a file that is whole after every row.

run(Settings(suites=("codecs",), quick=True), Path("run.json")) -> Run
python -m ornith_moe.bench.session SETTINGS.json RUN.json        the same as one process of two; see in_turn.py
"""

import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles
from typing import Any

import ornith_moe
from ornith_moe.bench.rows import Row, Run, save
from ornith_moe.bench.tasks import Settings, Turn
from ornith_moe.quant.errors import OrnithError

HERE = Path(__file__).parent
VERSIONS = ("torch", "triton", "numpy", "numba", "transformers", "gguf", "xllamacpp", "liger-kernel", "torchao")
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
Told = Callable[[Row, int, int], None]  # a new row, how many there are, how many there will be


def check_installed() -> None:
    """OrnithError with the remedy unless pytest and pytest-benchmark can be imported."""
    for module, package in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if find_spec(module) is None:
            raise OrnithError(f"bench: {package}, which runs it, is not installed; pip install 'ornith-moe[bench]'")


def run(
    settings: Settings, out: Path, told: Told = lambda row, done, total: None, turn: Turn = lambda what: None
) -> Run:
    """Measure what `settings` ask for, and write `out` after every row; `turn` as of `Bench`.

    Raises:
        OrnithError: pytest-benchmark or the device is missing, nothing is selected, or a model or a routing is unknown.
    """
    check_installed()
    load = os.getloadavg()[0]
    import pytest

    from ornith_moe.bench.plugin import Plugin
    from ornith_moe.bench.tasks import Bench

    bench = Bench(settings, turn=turn)
    made = Run(
        datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit_of(Path(ornith_moe.__file__).parent),
        machine(bench.clock.state(), load),
    )
    made.settings = asdict(settings)

    def add(row: Row, done: int, total: int) -> None:
        made.rows.append(row)
        made.limits, made.control = bench.limits.measured, control_of(made.rows)
        save(made, out)
        told(row, done, total)

    plugin, log = Plugin(bench, add), io.StringIO()
    with (
        tempfile.TemporaryDirectory(prefix="ornith-bench-") as storage,  # pytest-benchmark makes one where it runs
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = pytest.main([*_arguments(settings), f"--benchmark-storage=file://{storage}"], plugins=[plugin])
    if plugin.failed:
        raise plugin.failed
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        asked = f"-k {settings.keyword!r} of {', '.join(settings.suites)}"
        raise OrnithError(f"bench: no row fits {asked}; names look like moe-nano-T1-uniform-bf16-bf16-forward-ours")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise OrnithError(f"bench: pytest ended with {code!s} ({' '.join(log.getvalue().split())[-600:]})")
    made.machine["after"] = bench.clock.state()
    save(made, out)
    return made


def _arguments(settings: Settings) -> list[str]:
    """Of pytest: no configuration but ours, whatever folder it runs in."""
    gpu = {"codecs": "gpu_encode"} if settings.device == "cuda" else {}
    files = [str(HERE / f"bench_{gpu.get(suite, suite)}.py") for suite in settings.suites]
    options = ["-c", os.devnull, "--rootdir", str(HERE), "--import-mode=importlib", "-p", "no:cacheprovider"]
    keyword = ["-k", settings.keyword] if settings.keyword else []
    return [*files, *options, *keyword, "-o", "python_files=bench_*.py", "-q", "--benchmark-quiet", "-p", "no:randomly"]


def control_of(rows: list[Row]) -> dict[str, Any]:
    """torch.mm over all rounds so far: median_s, and the spread of its medians beside one group and another."""
    seconds = [s for row in rows for s in row.control]
    if len(seconds) < 2:
        return {}
    cuts = quantiles(seconds, n=10, method="inclusive")
    return {"what": "torch.mm", "median_s": cuts[4], "spread": round((cuts[7] - cuts[1]) / cuts[4], 4)}


def machine(clocks: dict[str, float], load: float) -> dict[str, Any]:
    """What rows were measured on; no name of a host, which is nobody's business."""
    import torch

    from ornith_moe.bench.limits import cpu_name

    told: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS if (found := _version(name))},
        "load_at_start": round(load, 2),
        "environment": {name: os.environ[name] for name in THREAD_SETTINGS if name in os.environ},
    }
    if torch.cuda.is_available():
        told |= {
            "card": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda or torch.version.hip,
            "clocks": clocks,
        }
    return told


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit_of(folder: Path) -> str:
    """HEAD of the checkout that tracks the package in `folder`, "+" at its end with changes, "" outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder.resolve()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!bench")  # a link where compared
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def main(settings: str, out: str) -> None:
    """Run what the file `settings` holds, in turn with another process."""
    from ornith_moe.bench.in_turn import asking

    asks, answers = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))  # pytest takes the streams themselves
    told: dict[str, Any] = json.loads(Path(settings).read_text(encoding="utf-8"))
    told |= {key: tuple(value) for key, value in told.items() if isinstance(value, list)}
    asked = Settings(**told)
    try:
        run(asked, Path(out), turn=asking(asks, answers))
    except OrnithError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
