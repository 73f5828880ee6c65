"""The pytest plugin of a run: a test per row, of which the first of a group times all of it.

A suite is a file bench_<suite>.py with `tasks(settings)` and one test that takes `measure`, `task` and `name`. Rows are
written as they come. pytest-benchmark gets the recorded seconds by a timer that plays them back, so that its
statistics, --benchmark-json and --benchmark-compare work on them as on any other.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ornith_moe.bench.rows import Row
from ornith_moe.bench.tasks import Bench, Task
from ornith_moe.quant.errors import OrnithError


class Replay:
    """A timer that moves by the recorded seconds when `advance` is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.coming: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += next(self.coming)


class Plugin:
    """Collects the rows of a run; `failed` is what ended it before its time, if anything did."""

    def __init__(self, bench: Bench, add: Callable[[Row, int, int], None]) -> None:
        self.bench, self.add = bench, add
        self.replay = Replay()
        self.failed: BaseException | None = None
        self.names: dict[str, list[str]] = defaultdict(list)
        self.rows: dict[tuple[str, str], Row] = {}
        self.total = 0

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if {"task", "name"} <= set(metafunc.fixturenames):
            try:
                tasks = metafunc.module.tasks(self.bench.settings)
            except OrnithError as error:
                self.failed = error
                raise
            rows = [pytest.param(t, n, id=f"{t.id}-{n.replace(' ', '-')}") for t in tasks for n in t.names]
            metafunc.parametrize(("task", "name"), rows)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=self.replay))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            parameters: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
            self.names[parameters["task"].group].append(parameters["name"])
        self.total = len(session.items)

    @pytest.fixture
    def measure(self, benchmark: Any) -> Callable[[Task, str], None]:
        """Time the group of `task` if it was not yet, and end the test as the row of `name` ended."""

        def run(task: Task, name: str) -> None:
            row = self._row(task, name)
            if row.status == "red":
                pytest.fail(row.why, pytrace=False)
            if row.status != "ok":
                pytest.skip(f"{row.status}: {row.why}")
            benchmark.group = task.group
            benchmark.extra_info.update(row.case, name=name, peer=row.peer, bytes=row.bytes, flops=row.flops)
            self.replay.coming = iter(row.seconds)
            benchmark.pedantic(self.replay.advance, rounds=row.rounds)

        return run

    def _row(self, task: Task, name: str) -> Row:
        if (task.group, name) not in self.rows:
            try:
                made = self.bench.rows_of(task, self.names[task.group])
            except BaseException as error:  # a signal, which pytest would take for a failed test, or an OrnithError
                self.failed = error
                pytest.exit(type(error).__name__, returncode=1)
            for row in made:
                self.rows[task.group, row.name] = row
                self.add(row, len(self.rows), self.total)
        return self.rows[task.group, name]
