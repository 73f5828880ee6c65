"""This machine as the CPU backend sees it: its threads, and how it multiplies BF16.

    run           one kernel on as many threads as torch may use, the caller's among them
    bf16_kind     AVX-512's BF16 dot product, or BF16 widened to float32 in registers: measured once per process
    torch_wins    whether torch.mm leaves both behind, as it does with AMX: experts with many rows go through `loop`
    describe      what was found, in words

The measurement takes some 20 milliseconds, at the first use of BF16. It is a product that stays in cache, one expert
with 128 rows; a dot product is half as fast as the widened form on some servers and twice as fast on others.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from ornith_moe.backend.cpu.register_tiles import BF16_DOT, BF16_WIDE, HAS_BF16_DOT, VECTOR_BYTES

_THREAD_NS = 60_000  # of work that pays for waking another thread
_WINS = 3.0  # AMX is at eight; a product this small flatters torch.mm
_local = threading.local()
_pool = None


def run(kernel, tasks, work_ns, scratch_bytes, *arguments):
    """kernel(counter, scratch, *arguments) on up to `tasks` threads; returns when all tasks are done.

    Tasks are taken from a counter, by whichever thread is free, and none of them shares a sum: the number of threads
    changes no bit. Threads of torch's own pool sleep meanwhile.
    """
    counter = np.zeros(1, np.int64)

    def work():
        kernel(counter.ctypes.data, _scratch(scratch_bytes), *arguments)

    threads = min(tasks, torch.get_num_threads(), 1 + work_ns // _THREAD_NS)
    others = [_threads().submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        if not other.cancel():  # it may not have begun: all callers share the pool
            other.result()


def _threads():
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), "ornith-moe")
    return _pool


def _forget_threads():
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_threads)  # a child has none of its parent's threads


def _scratch(nbytes):
    """Address of memory of this thread's own, kept for the next call: at most a few MB."""
    memory = getattr(_local, "memory", None)
    if memory is None or len(memory) < nbytes + 64:
        memory = _local.memory = np.empty(nbytes + 64, np.uint8)
    return -(-memory.ctypes.data // 64) * 64


class Rates(NamedTuple):
    """GFLOP/s of a BF16 product of 128 x 1024 by 1024 x 1024; 0 for what the processor has not, or only in software."""

    dot: float
    wide: float
    torch_mm: float


def bf16_kind() -> int:
    """The faster of `BF16_DOT` and `BF16_WIDE` here."""
    if not HAS_BF16_DOT:
        return BF16_WIDE
    rates = bf16_rates()
    return BF16_DOT if rates.dot >= rates.wide else BF16_WIDE


def torch_wins() -> bool:
    rates = bf16_rates()
    return rates.torch_mm > _WINS * max(rates.dot, rates.wide)


def describe() -> str:
    """How BF16 is multiplied here and why, in one sentence."""
    rates = bf16_rates()
    how = "AVX-512 dot product" if bf16_kind() == BF16_DOT else "widened to float32 in registers"
    if torch_wins():
        how = f"torch.mm for experts with many rows, else {how}"
    dot = f"{rates.dot:.0f}" if rates.dot else "not there"
    found = f"dot {dot}, widened {rates.wide:.0f}, torch.mm {rates.torch_mm:.0f}"
    return f"BF16: {how} (GFLOP/s of a product in cache: {found}); vectors of {VECTOR_BYTES} bytes"


@cache
def bf16_rates() -> Rates:
    from ornith_moe.backend.cpu import native  # which needs `run`
    from ornith_moe.backend.cpu.routed import group_by_expert
    from ornith_moe.quant.operand import Operand

    m, k, n = 128, 1024, 1024
    x, w = (torch.ones(size, k, dtype=torch.bfloat16, device="cpu") for size in (m, n))
    rows = group_by_expert(torch.zeros(m, 1, dtype=torch.int64, device="cpu"), 1)
    weight = Operand(w[None])

    def rate(product):
        product()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            product()
            times.append(time.perf_counter() - began)
        return 2 * m * k * n / min(times) / 1e9

    dot, wide = (
        rate(lambda kind=kind: native.gate_up(x, rows, weight, False, kind=kind))
        if kind != BF16_DOT or HAS_BF16_DOT else 0.0
        for kind in (BF16_DOT, BF16_WIDE)
    )  # fmt: skip
    for _ in range(2):  # in software torch.mm has been seen at 1 GFLOP/s: a small product first, its second call counts
        began = time.perf_counter()
        torch.mm(x[:16, :256], w[:256, :256].T)
        hopeless = time.perf_counter() - began > 1e-3
    return Rates(dot, wide, 0.0 if hopeless else rate(lambda: torch.mm(x, w.T)))
