"""What a command used, itself and all that it started: time, memory, bytes read and written.

    seconds               from its start to its exit
    user_s, system_s      rusage of the command and of every descendant that was waited for
    peak_rss_bytes        the most that its processes together had resident at one time, as top shows it: sampled every
                          PERIOD_S, and of a single process what the kernel remembers as its highest (VmHWM)
    peak_own_bytes        of that what is no mapped file, which the system could drop at any time (RssAnon + RssShmem)
    read_bytes            fetched from the disk, also for a mapped file and for programs themselves (torch is 0.5 GB);
                          nothing for what was in the page cache
    write_bytes           to go to the disk: pages made dirty, and what went past the cache (O_DIRECT)
    rchar, wchar          what it asked for in read and write calls, from wherever it came; mapped files are not in it

The last four are /proc/PID/io of the command when it has ended but was not yet waited for; by then it has those of the
descendants that it waited for. On a system without /proc they and the peaks are left out. A child starts with `execve`,
which starts VmHWM anew, so nothing of this process is in it.
"""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PERIOD_S = 0.05
PROC = Path("/proc")
COUNTERS = ("rchar", "wchar", "read_bytes", "write_bytes")


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, what it printed, and what it used by the names of the module."""

    code: int
    out: str
    errors: str
    used: dict[str, float]


def run(command: Sequence[str]) -> Ended:
    """Run `command` to its end; it gets no input."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        others, began = _processes(), time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True)
        with _Sampler(process.pid, others) as memory:
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its counters stay readable
                counted = _numbers(PROC / str(process.pid) / "io")
            else:
                counted = {}
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)  # else Popen warns that it still runs
        used = {"seconds": seconds, "user_s": usage.ru_utime, "system_s": usage.ru_stime}
        used |= memory.peaks | {name: counted[name] for name in COUNTERS if name in counted}
        for file in (out, errors):
            file.seek(0)
        return Ended(process.returncode, out.read(), errors.read(), used)


def evict(paths: Iterator[Path]) -> None:
    """Drop files from the page cache, so that whoever reads them fetches them from the disk."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # a dirty page stays
            if hasattr(os, "posix_fadvise"):  # not on macOS, where files stay in the cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(paths: Iterator[Path]) -> None:
    """Read files, so that they are in the page cache as far as that has room."""
    buffer = memoryview(bytearray(8 << 20))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@dataclass
class _Sampler:
    """Looks at the processes of session `session`, none of which is among `known`, until it is left."""

    session: int
    known: set[int]
    peaks: dict[str, float] = field(default_factory=dict)
    _members: set[int] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "_Sampler":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._stop.wait(PERIOD_S)

    def _look(self) -> None:
        running = _processes()
        self._members |= {pid for pid in running - self.known if _session(pid) == self.session}
        self.known |= running
        self._members &= running
        told = [numbers for pid in self._members if (numbers := _numbers(PROC / str(pid) / "status")).get("VmRSS")]
        if not told:
            return
        resident = max(sum(each["VmRSS"] for each in told), max(each["VmHWM"] for each in told))
        own = sum(each["RssAnon"] + each["RssShmem"] for each in told)
        for name, kib in (("peak_rss_bytes", resident), ("peak_own_bytes", own)):
            self.peaks[name] = max(self.peaks.get(name, 0), kib << 10)


def _processes() -> set[int]:
    return {int(name) for name in os.listdir(PROC) if name.isdigit()} if PROC.is_dir() else set()


def _session(pid: int) -> int:
    """Which session a process is of; 0 if it is gone."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def _numbers(path: Path) -> dict[str, int]:
    """{name: number} of a file of lines "name: number unit"; {} if the process is gone."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in lines)
    return {name: int(words[0]) for name, value in pairs if (words := value.split()) and words[0].isdigit()}
