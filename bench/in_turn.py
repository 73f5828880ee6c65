"""A commit measured beside what is here: processes of both, which take turns round by round.

    process of the commit   task 1: prepare, wait      round 1 |         | round 2 | round 3 |         | ...
    process of the checkout              prepare, wait         | round 1 | round 2 |         | round 3 | ...

Both do the same tasks in the same order, and one of them works at a time: it asks for its turn before each task and
each round, and the order of a pair of rounds alternates. A machine that slows down, or a neighbour that comes, so meets
both alike. What is left is how the two processes differ, by where their pages lie for instance; it is drawn anew for
each of PAIRS pairs, and `comparison.paired` reads the verdict from how far the pairs agree.

Source: original in its rounds; restarts as the outermost level of repetition are those of Kalibera and Jones, "Rigorous
benchmarking in reasonable time", ISMM 2013.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from ornith_moe.bench.comparison import Verdict, confirmed, paired
from ornith_moe.bench.rows import Run, load
from ornith_moe.bench.tasks import ROUND, Settings, Turn, id_of
from ornith_moe.quant.errors import OrnithError, brief

PAIRS = 5
HERE = Path(__file__).parent


def asking(asks: IO[str], answers: IO[str]) -> Turn:
    """The turn of a process that is one of two: says what it is about to do, and waits until it may."""

    def turn(what: str) -> None:
        print(what, file=asks, flush=True)
        if not answers.readline():
            sys.exit("the other process of the pair has ended")

    return turn


def against_commit(
    ref: str, settings: Settings, told: Callable[[int, int], None], root: Path | None = None, pairs: int = PAIRS
) -> tuple[Run, list[Verdict]]:
    """A run of the checkout, and verdicts against commit `ref`, by `pairs` of runs and as many of what differs in them.

    Both are measured by this very folder: the commit is checked out beside, with a link to it for its own.

    Raises:
        OrnithError: no checkout, no such commit, or one of them cannot run this folder.
    """
    root = root or HERE.resolve().parent
    with checked_out(ref, root) as tree:
        then, now = _in_pairs(tree, root, settings, lambda done: told(done, pairs), pairs)
        found = paired(then, now)
        differing = {(each.suite, each.group) for each in found if each.differs}
        if differing:
            words = {id_of(row) for row in now[-1].rows if (row.suite, row.group) in differing}
            suites = tuple(suite for suite in settings.suites if suite in {suite for suite, _ in differing})
            again = replace(settings, suites=suites, keyword=" or ".join(sorted(words)))
            found = confirmed(
                found, paired(*_in_pairs(tree, root, again, lambda done: told(pairs + done, 2 * pairs), pairs))
            )
    return now[-1], found


def _in_pairs(
    tree: Path, root: Path, settings: Settings, told: Callable[[int], None], pairs: int
) -> tuple[list[Run], list[Run]]:
    then: list[Run] = []
    now: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="ornith-bench-") as folder:
        asked = Path(folder, "settings.json")
        asked.write_text(json.dumps(asdict(settings)), encoding="utf-8")
        for number in range(pairs):
            told(number)
            files = [Path(folder, f"{side}-{number}.json") for side in ("then", "now")]
            with ExitStack() as stack:
                both = zip((tree, root), files, strict=True)
                take_turns([stack.enter_context(_Process(where, file, asked)) for where, file in both])
            for runs, file in zip((then, now), files, strict=True):
                runs.append(load(file))
        told(pairs)
    return then, now


def take_turns(sides: Sequence[_Process]) -> None:
    """Let each of two processes work when it is its turn, until both have ended; who goes first alternates.

    Tasks begin together: a process that is through with one waits until the other is.
    """
    asked: dict[_Process, str] = {side: side.wait() for side in sides}
    number = 0
    while any(asked.values()):
        running = [side for side in sides if asked[side] == ROUND] or [side for side in sides if asked[side]]
        for side in reversed(running) if number % 2 else running:
            side.go()
            asked[side] = side.wait()
        number += 1


class _Process:
    """A process that runs bench/session.py of this folder, with the package of `tree`, into the file `out`."""

    def __init__(self, tree: Path, out: Path, settings: Path, environment: Mapping[str, str] = os.environ):
        self.tree, self.out = tree, out
        command: list[Any] = [sys.executable, "-m", "ornith_moe.bench.session", settings, out]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, cwd=out.parent, env={**environment, "PYTHONPATH": str(tree)}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def go(self) -> None:
        assert self._process.stdin
        print(file=self._process.stdin, flush=True)

    def wait(self) -> str:
        """What the process asks its turn for next; "" if it has ended well.

        Raises:
            OrnithError: it has ended otherwise.
        """
        assert self._process.stdout
        asked = self._process.stdout.readline().strip()
        if not asked and (self._process.wait() or not self.out.exists()):
            self._errors.seek(0)
            words = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise OrnithError(f"compare: {self.tree.name} could not be measured ({brief(words)})")
        return asked

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


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
