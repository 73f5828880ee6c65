"""A conversion on a Ray cluster of two workers on this machine, one of which dies.

Reference: the same conversion on threads, byte for byte. Not covered: several machines, and their file system.
"""

import os
import signal
from pathlib import Path

import fixtures
import pytest

import ornith_moe.quant.conversion.convert as convert_module
from ornith_moe.quant.conversion.convert import PARTIAL, convert
from ornith_moe.quant.source.weights import open_source

ray = pytest.importorskip("ray")
BUILDS = ["fp8-channel", "gguf:Q8_0", "nvfp4"]


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def workers():
    """Process ids of the workers, which Ray names so."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::Worker"):
                yield int(path.parent.name)
        except OSError:
            pass


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the processes of workers in /proc")
def test_two_workers_and_one_that_dies(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "slabs", lambda *limits: (2, 1 << 16))
    source = open_source(fixtures.qwen35moe(tmp_path / "moe"))
    convert(source, tmp_path / "local", BUILDS)
    convert(source, tmp_path / "ray", BUILDS, executor="ray")
    expected = contents(tmp_path / "local")
    assert contents(tmp_path / "ray") == expected
    done, killed = [], []

    def kill(phase, *_):
        if phase == "convert":
            done.append(phase)
        if len(done) == 20 and not killed:
            killed.append(next(workers()))
            os.kill(killed[0], signal.SIGKILL)

    convert(source, tmp_path / "killed", BUILDS, executor="ray", progress=kill)
    assert killed and len(done) > 20 and contents(tmp_path / "killed") == expected


def test_it_goes_on_on_threads(cluster, tmp_path):
    """And the other way round: a journal does not know who has encoded."""
    source = open_source(fixtures.qwen35moe(tmp_path / "moe", experts=3, top_k=2))

    def stop(phase, done, total):
        if phase == "convert" and done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", ["bf16"], executor="ray", progress=stop)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PARTIAL]
    report = convert(source, tmp_path / "out", ["bf16"])
    convert(source, tmp_path / "local", ["bf16"])
    assert report.resumed_units > 0 and contents(tmp_path / "out") == contents(tmp_path / "local")
