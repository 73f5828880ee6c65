"""ggml's own quantizers, which benchmarks call too; a test that asks for a build that is not installed is skipped."""

import pytest

from ornith_moe.bench import ggml
from ornith_moe.bench.ggml import BUILDS, PACKAGES  # noqa: F401


def quantize(*arguments, build="libggml-python"):
    """`ornith_moe.bench.ggml.quantize`."""
    return _there(build) and ggml.quantize(*arguments, build=build)


def dequantize(*arguments, build="libggml-python"):
    """`ornith_moe.bench.ggml.dequantize`."""
    return _there(build) and ggml.dequantize(*arguments, build=build)


def _there(build):
    return pytest.importorskip(PACKAGES[build], reason=f"{PACKAGES[build]} is not installed")
