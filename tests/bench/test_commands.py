"""Whole commands: what processes used, steps as one command, tools that are missing or made something else.

The reference is what small Python programs are told to allocate, read and write. Not covered: the tools themselves,
which live in environments of their own, and `read_bytes`, which are none where the folder is in memory.
"""

import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from ornith_moe.bench import real_tools
from ornith_moe.bench.command import Command, Step, digests
from ornith_moe.bench.peers import Unable
from ornith_moe.bench.process_tree import run
from ornith_moe.bench.real_tools import TOOLS, Place, same_bytes

MIB = 1 << 20
GRANDCHILD = f"import time; held = bytearray({96 * MIB}); open('made', 'wb').write(held[:{MIB}]); time.sleep(0.5)"
CHILD = f"import subprocess, sys; held = bytearray({64 * MIB}); subprocess.run([sys.executable, '-c', {GRANDCHILD!r}])"


@pytest.mark.skipif(sys.platform != "linux", reason="counters are those of /proc")
def test_a_command_and_what_it_starts_are_counted_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = np.ones(256 * MIB, np.uint8)  # of this process, which must not be counted
    ended = run([sys.executable, "-c", CHILD])
    assert ended.code == 0 and ended.used["seconds"] > 0.5 and ended.used["user_s"] > 0
    assert 160 * MIB < ended.used["peak_own_bytes"] <= ended.used["peak_rss_bytes"] < held.nbytes
    assert MIB <= ended.used["wchar"] < 2 * MIB


def test_a_command_says_why_it_failed(tmp_path):
    ended = run([sys.executable, "-c", "import sys; print('out'); sys.exit('no such model')"])
    assert (ended.code, ended.out, ended.errors) == (1, "out\n", "no such model\n")
    command = Command([Step([sys.executable, "-c", "raise SystemExit('no such model')"])], tmp_path, tmp_path / "out")
    with pytest.raises(AssertionError, match="exit code 1: no such model"):
        command()


def test_steps_are_one_command(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "weights").write_bytes(bytes(3 * MIB))
    copy = "import sys; open(sys.argv[2], 'wb').write(open(sys.argv[1], 'rb').read())"
    between, last = out / "between", out / "last"
    steps = [Step([sys.executable, "-c", copy, str(source / "weights"), str(between)])]
    steps += [Step([sys.executable, "-c", copy + "; print('done')", str(between), str(last)], [between])]
    command = Command(steps, source, out, versions="copy 1.0", into=True)
    for number in range(2):
        command.prepare()
        assert list(out.iterdir()) == []
        assert command() == "done\n" and last.read_bytes() == bytes(3 * MIB)
        if number == 0 and sys.platform == "linux":
            first = dict(command.used)
            assert 6 * MIB <= first["wchar"] < 7 * MIB and first["rchar"] >= 6 * MIB
    assert {name: command.used[name] for name in first if "char" in name} == {k: first[k] for k in ("rchar", "wchar")}
    assert " s user, " in command.told and " + " in command.told and command.told.endswith(" s, copy 1.0")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_missing_tool_says_how_to_get_it(tool, tmp_path, monkeypatch):
    for variable in (real_tools.LLAMA_CPP, real_tools.MODELOPT, real_tools.LLMCOMPRESSOR, real_tools.MLX):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(Unable, match=r"pip install|clone llama\.cpp|does not start") as raised:
        tool.find()
    assert raised.value.status == "missing" and "ORNITH_BENCH_" in raised.value.why
    if tool.name.endswith("llama-quantize"):
        (tmp_path / "convert_hf_to_gguf.py").touch()
        with pytest.raises(Unable, match="cmake --build"):
            tool.find()


def test_a_python_without_the_package_is_no_tool(monkeypatch):
    monkeypatch.setenv(real_tools.MLX, sys.executable)
    with pytest.raises(Unable, match="no-such-package is not installed in ORNITH_BENCH_MLX; pip install it"):
        real_tools.find_python(real_tools.MLX, "no-such-package", "pip install it")
    found = real_tools.find_python(real_tools.MLX, "numpy", "pip install numpy")
    assert found.version == f"numpy {np.__version__}"


def test_other_bytes_are_found(tmp_path):
    tensors = {"model.language_model.a": np.arange(8, dtype=np.float32), "b": np.ones((2, 2), np.int8)}
    for name, changes in {"ours": {}, "same": {}, "changed": {"b": np.zeros((2, 2), np.int8)}}.items():
        (tmp_path / name).mkdir()
        save_file(tensors | changes, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    ours = digests(tmp_path / "ours")
    check, place = same_bytes(lambda place: place.out), Place(tmp_path, tmp_path / "same")
    assert check(place, lambda: {name.replace("language_model.", ""): d for name, d in ours.items()}) == 0.0
    with pytest.raises(AssertionError, match="1 of 2 tensors are not those of ours, the first b"):
        check(replace(place, out=tmp_path / "changed"), lambda: ours)
    with pytest.raises(AssertionError, match="1 tensors are in one of the two only, the first b"):
        check(place, lambda: {name: digest for name, digest in ours.items() if name != "b"})
