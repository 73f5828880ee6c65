"""The two limits of a machine, measured.

    limit_s = max(bytes / copy bandwidth, flops / GEMM peak)

`bytes` is the least traffic: every input read once and every output written once. Bandwidth counts both directions of a
copy of 512 MiB, far beyond any cache, so a shape whose data stays in cache may show a share above 100 %. The GEMM peak
is torch.mm of 1024^3; for BF16 it is the better of BF16 and FP32, because BF16 operands can be widened: a CPU without
BF16 instructions loses a factor of fifty there, and that is a loss, not a limit. Limits are the best of a few calls,
rows are medians.
"""

import time
from collections.abc import Callable
from functools import cache

import torch

COPY_BYTES = 512 << 20
GEMM_SIZE = 1024


def best_seconds(call: Callable[[], object], calls: int = 3) -> float:
    """Wall seconds of the fastest of a few calls, the first one not counted."""
    call()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


class Limits:
    """What this machine can do at torch's current number of threads; measured once per number, when first asked."""

    def __init__(self) -> None:
        self.measured: dict[str, float] = {}

    def copy_gb_s(self) -> float:
        return self._once(f"copy, {_threads()}, GB/s", _copy_gb_s)

    def gemm_gflop_s(self, dtype: torch.dtype) -> float:
        name = str(dtype).removeprefix("torch.")
        return self._once(f"torch.mm {name}, {_threads()}, GFLOP/s", lambda: _gemm_gflop_s(dtype))

    def seconds(self, nbytes: int, flops: int = 0, dtype: torch.dtype = torch.float32) -> float:
        memory = nbytes / self.copy_gb_s() / 1e9
        if not flops:
            return memory
        return max(memory, flops / max(map(self.gemm_gflop_s, {dtype, torch.float32})) / 1e9)

    def _once(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.measured:
            self.measured[key] = round(measure(), 2)
        return self.measured[key]


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def _copy_gb_s() -> float:
    source, target = (torch.zeros(COPY_BYTES, dtype=torch.uint8) for _ in range(2))
    source += 1  # untouched zero pages would be read from cache
    return 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source)) / 1e9


def _gemm_gflop_s(dtype: torch.dtype) -> float:
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    return 2 * GEMM_SIZE**3 / best_seconds(lambda: a @ b) / 1e9


@cache
def cpu_name() -> str:
    """The processor's name as Linux gives it, which says more than `platform.processor()`."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"
