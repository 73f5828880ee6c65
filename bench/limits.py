"""The two limits of a device, measured.

    limit_s = max(bytes / copy bandwidth, flops / GEMM peak)

`bytes` is the least traffic: every input read once and every output written once. Bandwidth counts both directions of a
copy far beyond any cache, so a shape whose data stays in cache may show a share above 100 %. The GEMM peak is torch.mm
of 512^3 on a CPU and 8192^3 on a GPU. On a CPU that of BF16 is the better of BF16 and FP32, because operands can be
widened: a CPU without BF16 instructions loses a factor of fifty there, and that is a loss, not a limit. FP8 has a peak
of its own where the device multiplies it (torch._scaled_mm, a scale per row), else that of BF16. Limits are the best of
a few calls, rows are medians.
"""

import time
from collections.abc import Callable
from functools import cache

import torch

from ornith_moe.bench.timing import LONG_S, Clock, WallClock

COPY_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
GEMM_SIZE = {"cpu": 512, "cuda": 8192}
CALLS = {"cpu": 3, "cuda": 20}
FP8 = torch.float8_e4m3fn


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
    """What a device can do, on a CPU at torch's current number of threads; measured once per number, when first asked.

    Attributes:
        measured: value by name and unit, in the order of asking.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or WallClock()
        self.device = self.clock.device
        self.measured: dict[str, float] = {}

    def copy_gb_s(self) -> float:
        """Read plus written, in GB/s."""
        return self._once(f"copy, {self._where()}, GB/s", self._copy_gb_s)

    def gemm_gflop_s(self, dtype: torch.dtype) -> float:
        """Of torch.mm in `dtype`."""
        name = str(dtype).removeprefix("torch.")
        return self._once(f"torch.mm {name}, {self._where()}, GFLOP/s", lambda: self._gemm_gflop_s(dtype))

    def seconds(self, nbytes: int, flops: int = 0, dtype: torch.dtype = torch.float32) -> tuple[float, str]:
        """Seconds that the work takes at the limit, and which bounds it: "copy" or "matrix"."""
        memory = nbytes / self.copy_gb_s() / 1e9
        matrix = flops / max(map(self.gemm_gflop_s, self._multiplied(dtype))) / 1e9 if flops else 0.0
        return (memory, "copy") if memory >= matrix else (matrix, "matrix")

    def _multiplied(self, dtype: torch.dtype) -> set[torch.dtype]:
        """The dtypes in which operands of `dtype` may be multiplied."""
        if self.device == "cpu":
            return {torch.bfloat16 if dtype == FP8 else dtype, torch.float32}
        return {dtype, torch.bfloat16} if dtype == FP8 else {dtype}

    def _where(self) -> str:
        if self.device == "cuda":
            return "GPU"
        count = torch.get_num_threads()
        return f"{count} thread{'s' * (count > 1)}"

    def _once(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.measured:
            self.measured[key] = round(measure(), 2)
        return self.measured[key]

    def _best_seconds(self, call: Callable[[], object]) -> float:
        first = self.clock.seconds(call)
        return first if first > LONG_S else min(self.clock.seconds(call) for _ in range(CALLS[self.device]))

    def _copy_gb_s(self) -> float:
        size = COPY_BYTES[self.device]
        source, target = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        source += 1  # untouched zero pages would be read from cache
        return 2 * size / self._best_seconds(lambda: target.copy_(source)) / 1e9

    def _gemm_gflop_s(self, dtype: torch.dtype) -> float:
        size = GEMM_SIZE[self.device]
        a, b = (torch.randn(size, size, device=self.device) for _ in range(2))
        if dtype != FP8:
            a, b = a.to(dtype), b.to(dtype)
            return 2 * size**3 / self._best_seconds(lambda: a @ b) / 1e9
        scale = torch.ones(size, 1, device=self.device)
        a8, b8 = a.to(FP8), b.to(FP8).T
        try:
            product = lambda: torch._scaled_mm(a8, b8, scale, scale.T, out_dtype=torch.bfloat16)  # noqa: E731
            return 2 * size**3 / self._best_seconds(product) / 1e9
        except (NotImplementedError, RuntimeError):  # no such matrix unit
            return 0.0


@cache
def cpu_name() -> str:
    """The processor's name as Linux gives it, which says more than `platform.processor()`."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"
