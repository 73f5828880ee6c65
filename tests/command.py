"""`ornith-moe` in a process of its own, with or without the seconds that its imports take.

    done = ornith_moe("plan", "ornith-1.0-9b", "--to", "bf16", code=1)      done.stdout, done.stderr

`ornith_moe` forks it from a process that has imported what commands import and done nothing else: exit code, signals,
streams and memory are its own, as if a user had started it. `fresh` starts Python anew, for what an import, the
environment or a signal decides. Both check the exit code, and that a failure is one sentence. `python` runs a script of
a document in such a fork, as its `__main__`.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

PRELOADED = (  # what the commands import when they run
    "gguf", "regex", "rich.progress", "torch", "transformers", "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
    "ornith_moe.candidates", "ornith_moe.cli", "ornith_moe.clients", "ornith_moe.compare", "ornith_moe.gpu_encoders",
    "ornith_moe.imatrix",
    "ornith_moe.quant.conversion.convert", "ornith_moe.quant.source.hub", "ornith_moe.quant.verification.inspect",
    "ornith_moe.quant.verification.verify",
)  # fmt: skip
_server: subprocess.Popen | None = None


def ornith_moe(*arguments, code=0, timeout=600):
    return _checked(_forked(list(map(str, arguments)), os.getcwd(), timeout), code)


def python(script, cwd):
    done = _forked(script, str(cwd), 600)
    assert done.returncode == 0, done.stderr
    return done


def _forked(what, cwd, timeout):
    global _server
    if _server is None:
        command = [sys.executable, "-c", f"import sys; sys.path = {sys.path!r}; import command; command.serve()"]
        _server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(_server.communicate)  # the end of its input ends it
    with tempfile.TemporaryDirectory(prefix="ornith-command-") as folder:
        json.dump([folder, cwd, timeout, what], _server.stdin)
        print(file=_server.stdin, flush=True)
        returncode = int(_server.stdout.readline())
        stdout, stderr = (Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)


def fresh(*arguments, code=0, **options):
    command = [sys.executable, "-m", "ornith_moe", *map(str, arguments)]
    return _checked(subprocess.run(command, capture_output=True, text=True, **options), code)


def _checked(done, code):
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    if code in (1, 3):
        assert done.stderr.startswith("ornith-moe: ") and done.stderr.count("\n") == 1, done.stderr
    return done


def serve():
    """Fork a process for each line of the input; its exit code is a line of the output."""
    for module in PRELOADED:
        __import__(module)
    sys.modules["ornith_moe.clients"].LlamaCpp.__init__.__kwdefaults__["threads"] = 1  # which spin, waiting
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(folder, cwd, timeout, what):
    """In the fork: the command with these arguments, or the script, to the end of the process."""
    for number, name in enumerate(("null", "stdout", "stderr")):
        path = os.devnull if name == "null" else f"{folder}/{name}"
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    signal.alarm(timeout)
    code = 1
    try:
        if isinstance(what, str):
            exec(compile(what, "<script>", "exec"), vars(sys.modules["__main__"]))
            code = 0
        else:
            sys.argv = ["ornith-moe", *what]
            sys.modules["ornith_moe.cli"].main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
