"""Hostile inputs against the command line, in forked workers: the corpus of minimised ones, and 300 made from seed 0.

tests/fuzz/ makes and runs them; `make fuzz ARGS="--cases 5000 --seed 7"` makes others. `imatrix` and `compare`, which
run models, have a fourth and a tenth of the share of another class. Before them the judge is judged, by commands that
end badly in each way that it is there to find.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from fuzz import worker

from ornith_moe.quant.errors import OrnithError

FUZZ = Path(__file__).parent / "fuzz" / "run.py"


@pytest.mark.slow
def test_hostile_inputs_end_in_a_sentence():
    asked = [sys.executable, str(FUZZ), "--corpus", "--cases", "300", "--seed", "0"]
    done = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


MORE = 256 << 20  # bytes: what a fork shares with its parent comes and goes by tens of megabytes
BAD = {  # outcome: a command of one argument, a place outside the folder of the cases
    "ok": lambda place: print("done"),
    "sentence": lambda place: refuse("it is so"),
    "many lines": lambda place: refuse("it is so\nand so", typer.BadParameter),  # of ours `shown` makes one line
    "long": lambda place: refuse("it is so " * 300, typer.BadParameter),
    "exit 7": lambda place: sys.exit(7),
    "traceback": lambda place: {}["x"],
    "traceback of a limit": lambda place: bytearray(worker.DATA_LIMIT),
    "killed": lambda place: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda place: spin(),
    "hang, asleep": lambda place: time.sleep(600),
    "memory": lambda place: bytearray(b"x" * MORE),
    "outside: read": lambda place: (place / "there").read_text(),
    "outside: written": lambda place: (place / "new").write_text("x"),
    "outside: by a link": lambda place: (Path("case/leads out") / "new").write_text("x"),
    "outside: linked": lambda place: (place / "link").symlink_to("there"),
    "outside: renamed": lambda place: os.rename("case/in/m", place / "m"),
    "outside: removed": lambda place: (place / "there").unlink(),
    "outside: of the system": lambda place: open(Path(sys.prefix) / "pyvenv.cfg", "r+").close(),
    "lost: removed": lambda place: Path("case/in/m").unlink(),
    "lost: cut": lambda place: os.truncate("case/in/m", 1),
    "lost: written over": lambda place: Path("base/m").write_text("other"),
    "lost: replaced": lambda place: os.replace("case/out/new", "case/in/m"),
    "ok: a build": lambda place: Path("case/out/new").write_text("another build"),
}


def refuse(why, kind=OrnithError):
    raise kind(why)


def command(run):
    def one(place: str):
        run(Path(place))

    return one


def spin():
    while True:
        pass


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    app = typer.Typer()
    for name, run in BAD.items():
        app.command(name)(command(run))
    made = worker.Worker(tmp_path_factory.mktemp("cases"), typer.main.get_command(app))
    yield made
    made.close()


def limit_memory(judge, monkeypatch):
    """To little more than a fork has that does nothing: it holds what its parent holds, gigabytes after some tests."""
    monkeypatch.setattr(worker, "MEMORY", judge.run(["ok", "."])["rss"] + MORE // 2)


@pytest.mark.parametrize("name", BAD)
def test_the_judge_finds(judge, tmp_path, monkeypatch, name):
    """Each in a folder as the cases have it, where a hang or a death before has cost the next its process."""
    folder = Path(judge.folder)
    for path in ("base/m", "case/in/m", "case/out/new"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("given")
    (tmp_path / "there").write_text("x")
    (folder / "case" / "leads out").unlink(missing_ok=True)
    (folder / "case" / "leads out").symlink_to(tmp_path)
    limit_memory(judge, monkeypatch)
    if "hang" in name:
        monkeypatch.setattr(worker, "SECONDS", 0.3)
    found = judge.run([name, str(tmp_path)])
    expected = name.partition(":")[0].partition(",")[0].removesuffix(" of a limit")
    assert found["outcome"] == expected, found
    if expected == "outside":
        assert found["outside"]
    if expected == "lost":
        assert found["lost"] == [str(folder / ("base/m" if "over" in name else "case/in/m"))]


def test_the_judge_knows_a_usage_error(judge, monkeypatch):
    limit_memory(judge, monkeypatch)
    assert judge.run(["ok"])["outcome"] == judge.run(["no such command"])["outcome"] == "usage"
