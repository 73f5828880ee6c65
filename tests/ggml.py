"""ggml's own quantizers, which benchmarks call too: `ornith_moe.bench.ggml`."""

from ornith_moe.bench.ggml import BUILDS, LIBRARIES, dequantize, quantize  # noqa: F401
