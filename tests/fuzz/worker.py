"""Run the command line case after case in a forked process, and say how each ended.

The parent imports everything once; a worker is a fork of it with a limit of memory, and an audit hook that notes every
file opened outside the folder of the case. A worker that hangs or dies is replaced.
"""

import gc
import json
import os
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

clients.LlamaCpp.__init__.__kwdefaults__["threads"] = 1  # more of them wait for one another by spinning

SECONDS, MEMORY, LONGEST = 20, int(2.2 * 2**30), 2_000
DATA_LIMIT = 6 << 30  # beyond MEMORY, so that the peak is measured and not only a MemoryError
GOOD = ("ok", "sentence", "usage")
_ROOT = str(Path(cli.__file__).resolve().parent.parent)
_SYSTEM = ("/usr/", "/lib", "/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/", sys.prefix, sys.base_prefix, _ROOT)
_CACHES = tuple(filter(None, (os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("PYTHONPYCACHEPREFIX"))))


class Worker:
    """Runs cases in a fork; `run` gives what became of one."""

    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self.pid = 0

    def run(self, argv: list[str]) -> dict:
        """{"outcome", "text", "where", "seconds", "rss", "outside"} of `ornith-moe` with these arguments."""
        if not self.pid:
            self._start()
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
        return found | {"seconds": seconds}

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
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT, DATA_LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        outside: set[str] = set()
        sys.addaudithook(lambda event, arguments: self._note(event, arguments, outside))
        command = typer.main.get_command(cli.app)
        for line in os.fdopen(take, "rb"):
            outside.clear()
            os.chdir(self.folder)
            with open("/proc/self/clear_refs", "w") as file:  # the peak starts at what is resident now
                file.write("5")
            found = _call(command, [os.fsdecode(word.encode("utf-8", "surrogateescape")) for word in json.loads(line)])
            status = Path("/proc/self/status").read_text()
            found["rss"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
            found["outside"] = sorted(outside)[:3]
            os.write(give, json.dumps(found).encode() + b"\n")

    def _note(self, event: str, arguments: tuple, outside: set[str]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.symlink", "os.link"):
            return
        paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
        for path in paths:
            if isinstance(path, str | bytes):
                real = os.path.realpath(os.fsdecode(path))
                fine = real == self.folder or real.startswith((self.folder + "/", *_SYSTEM, *_CACHES))
                if not fine and not real.startswith(os.path.join(tempfile.gettempdir(), "tmp")):
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
