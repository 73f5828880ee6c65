"""Machine code on disk: made once, told, and never older than the sources it may hold.

Each case is a process of its own with a cache of its own. Not covered: other versions of numba.
"""

import ast
import importlib
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numba
import pytest
from numba.core.caching import FunctionCache

from ornith_moe.backend.cpu import backward, forward
from ornith_moe.quant.codecs import k_quants
from ornith_moe.quant.simd.compiled import StampedFiles, compiled, compiling

COLD = """
import numpy as np
from ornith_moe.quant.simd.compiled import compiling
from ornith_moe.quant.codecs.gguf import quantize_gguf
with compiling(print):
    quantize_gguf(np.ones((1, 256), np.float32), "Q6_K")
"""
CALLER = """
from low.kernels import double
from ornith_moe.quant.simd.compiled import compiled, compiling

@compiled
def twice(x):
    return double(x)

with compiling(print):
    print(twice(3))
"""
CALLED = """
from ornith_moe.quant.simd.compiled import compiled
{extra}

@compiled
def double(x):
    return {factor} * x
"""


def run(code: str, cache: Path, path: Path | None = None) -> list[str]:
    """What a process with this cache printed: the functions it compiled, and results."""
    search = os.pathsep.join(filter(None, [str(path or ""), *sys.path]))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_machine_code_is_made_once_told_and_kept(tmp_path):
    """A first process on a machine is told what is compiled, a second one finds it on the disk."""
    assert "encode_signed" in run(COLD, tmp_path)
    assert run(COLD, tmp_path) == []


def test_a_call_without_compiling_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))  # else it may be there from a run before
    told = []
    with compiling(told.append):
        twice = compiled(lambda x: 2 * x)
        assert twice(3) == twice(4) - 2 == 6
    twice(3.0)
    assert told == ["<lambda>"]


def named(kernel) -> set[str]:
    return {name for name, *_ in kernel._cache._cache_file.sources}


def test_a_kernel_is_as_new_as_every_file_whose_code_it_may_hold():
    """numba looks at the file of a kernel only."""
    dialect = {"simd/lanes.py", "simd/small_floats.py", "simd/compiled.py"}
    assert dialect | {"codecs/search.py", "codecs/k_quants.py"} <= named(k_quants.encode_signed)
    assert dialect | {"cpu/rows.py", "cpu/forward.py", "cpu/register_tiles.py"} <= named(backward.weight_gradient)
    assert not any(name.startswith("codecs/") for name in named(forward.gate_up))


def test_kernels_name_nothing_of_rooms_that_are_not_in_their_stamp():
    """A constant of another folder would be machine code that nobody renews."""
    root, seen = Path(compiled.__code__.co_filename).parents[2], 0
    for file in [*root.glob("quant/**/*.py"), *root.glob("backend/**/*.py")]:
        text = file.read_text(encoding="utf-8")
        if "simd.compiled import compiled\n" not in text:
            continue
        name = ".".join(("ornith_moe", *file.relative_to(root).with_suffix("").parts))
        rooms = (name.rpartition(".")[0], "ornith_moe.quant.simd")
        imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
        foreign = [
            i for i in imports if i.module.startswith("ornith_moe.") and i.module.rpartition(".")[0] not in rooms
        ]
        names = {alias.asname or alias.name for node in foreign for alias in node.names}
        for kernel in vars(importlib.import_module(name)).values():
            if hasattr(kernel, "py_func") and kernel.py_func.__module__ == name:
                seen += 1
                assert not names & set(kernel.py_func.__code__.co_names), f"{name}.{kernel.__name__}"
    assert seen > 100


@pytest.fixture
def folders(tmp_path):
    """high/main.py calls a kernel of low/kernels.py."""
    for name, code in {"low/kernels.py": CALLED.format(factor=2, extra=""), "high/main.py": CALLER}.items():
        file = tmp_path / name
        file.parent.mkdir()
        file.write_text(textwrap.dedent(code))
    return tmp_path


MAIN = "import high.main"


@pytest.mark.parametrize("change", ["the kernel that is called", "a file beside it"])
def test_a_change_in_another_folder_is_seen(folders, change):
    cache = folders / "cache"
    assert run(MAIN, cache, folders) == ["twice", "double", "6"]
    assert run(MAIN, cache, folders) == ["6"]
    if change == "a file beside it":
        (folders / "low" / "numbers.py").write_text("THREE = 3")
        return_value, extra = "THREE", "from low.numbers import THREE"
    else:
        return_value, extra = "3", ""
    (folders / "low" / "kernels.py").write_text(CALLED.format(factor=return_value, extra=extra))
    assert run(MAIN, cache, folders)[-1] == "9"
    if change == "a file beside it":
        (folders / "low" / "numbers.py").write_text("THREE = 30")
        assert run(MAIN, cache, folders) == ["twice", "double", "90"]
    assert run(MAIN, cache, folders)[-1] in ("9", "90")


@pytest.mark.parametrize("damage", ["a module that has moved", "an index cut short", "code cut short"])
def test_what_cannot_be_read_is_made_again(folders, damage):
    cache = folders / "cache"
    assert run(MAIN, cache, folders) == ["twice", "double", "6"]
    ending = "nbc" if damage == "code cut short" else "nbi"
    (file,) = cache.rglob(f"main.twice-*.{ending}")
    if damage == "a module that has moved":
        with file.open("rb") as index:
            version = pickle.load(index)
        file.write_bytes(pickle.dumps(version) + b"cornith_moe.moved\nLanesType\n.")
    else:
        file.write_bytes(file.read_bytes()[:-20])
    assert run(MAIN, cache, folders) == ["twice", "6"]
    assert run(MAIN, cache, folders) == ["6"]


def test_code_of_an_older_index_is_not_run():
    """numba writes the index first: a process killed in between leaves a fresh index of old code."""
    files = {}

    class Files:
        load, save, flush = files.get, files.__setitem__, files.clear

    old, new = (StampedFiles(Files, [("a.py", 1, time)]) for time in (1, 2))
    old.save("key", b"old")
    assert old.load("key") == b"old"
    assert new.load("key") is None and new.load("other") is None
    new.save("key", b"new")
    assert new.load("key") == b"new"


@pytest.mark.parametrize("missing", ["_cache_file", "_cache"])
def test_a_numba_without_these_files_keeps_nothing_and_computes(missing, monkeypatch):
    """They are private to numba."""
    if missing == "_cache_file":

        def without(self, function, init=FunctionCache.__init__):
            init(self, function)
            del self._cache_file

        monkeypatch.setattr(FunctionCache, "__init__", without)
    else:
        monkeypatch.setattr("numba.core.dispatcher.Dispatcher.enable_caching", lambda self: delattr(self, "_cache"))
    kernel = compiled(lambda x: 3 * x)
    assert kernel(2) == 6 and not hasattr(getattr(kernel, "_cache", None), "_cache_file")
