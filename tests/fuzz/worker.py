"""Run the command line case after case in a forked process, and say how each ended.

The parent imports everything once; a worker is a fork of it with a limit of memory, and an audit hook that notes every
file opened, made or removed outside the folder of the case. A worker that hangs or dies is replaced. What a command was
given it must leave as it was: the parent compares. tests/test_fuzz.py shows each of these to be found. Not seen: files
that C code opens.
"""

import gc
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import gguf  # noqa: F401  imported before the fork, as all that a command may need
import regex  # noqa: F401
import rich.progress  # noqa: F401
import torch  # noqa: F401
import typer

from ornith_moe import cli, clients, gpu_encoders  # noqa: F401
from ornith_moe.quant.codecs import fp8_slabs  # noqa: F401
from ornith_moe.quant.codecs import gguf as gguf_codecs  # noqa: F401
from ornith_moe.quant.conversion import convert  # noqa: F401
from ornith_moe.quant.source import hub  # noqa: F401
from ornith_moe.quant.verification import inspect, verify  # noqa: F401

SECONDS, MEMORY, LONGEST = 20, int(2.2 * 2**30), 2_000
DATA_LIMIT = 6 << 30  # beyond MEMORY, so that the peak is measured and not only a MemoryError
GOOD = ("ok", "sentence", "usage")
_ROOT = str(Path(cli.__file__).resolve().parent.parent)
_SYSTEM = ("/usr/", "/lib", "/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/", sys.prefix, sys.base_prefix, _ROOT)
_CACHES = tuple(filter(None, (os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("PYTHONPYCACHEPREFIX"))))
_TEMPORARY = os.path.join(tempfile.gettempdir(), "tmp")
_OUTPUTS = re.compile(r"case/(?:in/)?out\b")
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {  # audit events, and which of their arguments are paths that change
    "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,),
    "os.truncate": (0,), "os.chmod": (0,), "os.utime": (0,),
}  # fmt: skip


class Worker:
    """Runs cases in a fork; `run` gives what became of one. `command` is that of `ornith-moe`, or one to be judged."""

    def __init__(self, folder: Path, command: typer.core.TyperGroup | None = None):
        self.folder = os.path.realpath(folder)
        self.command = command or typer.main.get_command(cli.app)
        self.pid = 0

    def run(self, argv: list[str]) -> dict:
        """{"outcome", "text", "where", "seconds", "rss", "outside", "lost"} of `ornith-moe` with these arguments."""
        if not self.pid:
            self._start()
        given = self._given()
        began, data, hung = time.monotonic(), b"", False
        os.write(self.orders, json.dumps(argv).encode() + b"\n")
        cpu = self._cpu_seconds()
        while not data.endswith(b"\n"):
            if not select.select([self.answers], [], [], 1)[0]:
                hung = (
                    self._cpu_seconds() - cpu > SECONDS or time.monotonic() - began > 6 * SECONDS
                )  # of a busy machine
                if hung:
                    break
                continue
            piece = os.read(self.answers, 1 << 16)
            if not piece:
                break
            data += piece
        seconds = time.monotonic() - began
        if not data.endswith(b"\n"):
            self.close()
            found = {"outcome": "hang" if hung else "killed", "text": "", "where": "", "rss": 0, "outside": []}
        else:
            found = json.loads(data)
            found["outcome"] = _outcome(found)
        now = self._given()
        lost = sorted(path for path, what in given.items() if now.get(path) != what)
        if lost and found["outcome"] in GOOD:
            found["outcome"] = "lost"
        return found | {"seconds": seconds, "lost": lost[:3]}

    def _given(self) -> dict[str, tuple[int, int, int]]:
        """{path: inode, size and time of change} of what is in the folder, but for places where commands put builds."""
        found = {}
        for root in ("base", "case"):
            for folder, _, names in os.walk(f"{self.folder}/{root}"):
                for path in (os.path.join(folder, name) for name in names):
                    if not _OUTPUTS.match(path[len(self.folder) + 1 :]):
                        stat = os.lstat(path)
                        found[path] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return found

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.orders), os.close(self.answers)
            self.pid = 0

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _start(self) -> None:
        (take, self.orders), (self.answers, give) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.orders), os.close(self.answers)
            try:
                self._serve(take, give)
            finally:
                os._exit(0)
        os.close(take), os.close(give)

    def _serve(self, take: int, give: int) -> None:
        gc.freeze()
        clients.LlamaCpp.__init__.__kwdefaults__["threads"] = 1  # more of them wait for one another by spinning
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT, DATA_LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        outside: set[str] = set()
        sys.addaudithook(lambda event, arguments: self._note(event, arguments, outside))
        for line in os.fdopen(take, "rb"):
            os.chdir(self.folder)
            with open("/proc/self/clear_refs", "w") as file:  # the peak starts at what is resident now
                file.write("5")
            outside.clear()
            argv = [os.fsdecode(word.encode("utf-8", "surrogateescape")) for word in json.loads(line)]
            found = _call(self.command, argv)
            status = Path("/proc/self/status").read_text()
            found["rss"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
            found["outside"] = sorted(outside)[:3]
            os.write(give, json.dumps(found).encode() + b"\n")

    def _note(self, event: str, arguments: tuple, outside: set[str]) -> None:
        if event == "open":
            paths, changes = arguments[:1], bool(arguments[2] & _TO_WRITE)
        else:
            paths, changes = [arguments[place] for place in _CHANGES.get(event, ())], True
        for path in paths:
            if isinstance(path, str | bytes):
                real = os.path.realpath(os.fsdecode(path))
                if event != "open":  # of the link itself, not of what it leads to
                    folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
                    real = os.path.join(os.path.realpath(folder), name)
                fine = real == self.folder or real.startswith((self.folder + "/", "/dev/null", *_CACHES, _TEMPORARY))
                fine = fine or ("/__pycache__/" in real + "/" if changes else real.startswith(_SYSTEM))
                if not fine:
                    outside.add(real[:200])


def _call(command, argv: list[str]) -> dict:
    """The command as `cli.main` ends it: exit code, what it says, and where a traceback comes from."""
    text, where = "", ""
    try:
        command.main(argv, prog_name="ornith-moe", standalone_mode=False)
        code = 0
    except cli.OrnithError as error:
        code, text = error.exit_code, cli.shown(f"ornith-moe: {error}")
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        code, text = 1, cli.shown(f"ornith-moe: {reason}")
    except SystemExit as error:
        code = error.code or 0
    except cli.Stopped:
        code = 130
    except BaseException as error:
        if hasattr(error, "format_message"):  # click's, which typer brings along
            return {"code": error.exit_code, "text": error.format_message(), "where": ""}
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if _ROOT in frame.filename]
        code, text = 99, f"{type(error).__name__}: {str(error)[:200]}"
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return {"code": code, "text": text[: LONGEST + 1], "where": where}


def _outcome(found: dict) -> str:
    if found["code"] == 99:
        return "traceback"
    if found["rss"] > MEMORY:
        return "memory"
    if found["outside"]:
        return "outside"
    if len(found["text"]) > LONGEST:
        return "long"
    if "\n" in found["text"]:
        return "many lines"
    return {0: "ok", 1: "sentence", 2: "usage", 3: "sentence"}.get(found["code"], f"exit {found['code']}")
