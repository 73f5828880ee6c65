"""What every test gets: a fixed seed, fresh memory full of NaN, and a reason where a GPU is missing.

Without a GPU the Triton kernels run in Triton's interpreter. It is chosen by a variable that Triton reads when a kernel
is defined, so it is set here, before any test module is imported.
"""

import functools
import os
import random
import sys

# A thread of numpy that waits spins. Beside other busy processes, as under xdist, a product of 128 x 128 x 128, which
# Triton's interpreter makes all day, took 3.1 ms of CPU by two threads and 0.14 ms by one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # torch's likewise: the cores are shared out among the processes
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """A test marked `device` needs a GPU only where there is one: `-m gpu` and `-m 'not gpu'` are its complements."""
    for item in items:
        if HAS_GPU and item.get_closest_marker("device"):
            item.add_marker(pytest.mark.gpu)
        elif not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device, torch sees none"))


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def fresh_memory_is_nan():
    """torch fills `empty` with NaN (integers: their maximum) in deterministic mode: no unwritten output can pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1000).isnan().all()


@pytest.fixture(autouse=True, scope="session")
def llama_cpp_shares_the_cores():
    """Under xdist: its threads, as many as there are cores, wait for one another by spinning."""
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
        from ornith_moe.clients import LlamaCpp

        LlamaCpp.__init__.__kwdefaults__["threads"] = int(os.environ["OMP_NUM_THREADS"])


@pytest.fixture(autouse=True, scope="session")
def interpreter_does_nothing_twice():
    """Triton's interpreter exchanges the functions of its language at every call of a jit function, in a kernel too,
    where they are exchanged already; makes the table of numpy's dtypes anew at every load, store and cast; and converts
    each element of a tile of FP8 by bit arithmetic, though a byte has 256 values."""
    if HAS_GPU or "triton" not in sys.modules:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, numpy_dtype, convert = interpreter._patch_lang, interpreter._get_np_dtype, interpreter._convert_float
    numpy_dtypes = {}

    def patch_once(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        done = all(language.load.__module__ == interpreter.__name__ for language in languages)
        return interpreter._LangPatchScope() if done else patch(fn)

    def numpy_dtype_once(dtype):
        if dtype.name not in numpy_dtypes:
            numpy_dtypes[dtype.name] = numpy_dtype(dtype)
        return numpy_dtypes[dtype.name]

    @functools.cache
    def converted_bytes(*dtypes_and_rounding):
        return convert(np.arange(256, dtype=np.uint8), *dtypes_and_rounding)

    def convert_bytes_once(data, dtype, *to):
        return converted_bytes(dtype, *to)[data] if data.dtype == np.uint8 else convert(data, dtype, *to)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, numpy_dtype_once
    interpreter._convert_float = convert_bytes_once


def pytest_sessionfinish(session):
    """In CI a test that was skipped for want of a package is a failure: without Triton all kernels would be green."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and os.environ.get("CI"):
        wanted = [f"{name} is not installed" for name in ("triton", "libggml", "libgguf", "xllamacpp")]
        reasons = [str(report.longrepr) for report in reporter.stats.get("skipped", ())]
        skipped = [reason for reason in reasons if any(want in reason for want in wanted)]
        if skipped:
            reporter.write_line(f"{len(skipped)} tests were skipped for want of Triton or ggml", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
