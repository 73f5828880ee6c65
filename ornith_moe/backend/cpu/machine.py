"""The threads of this machine: one kernel on as many as torch may use, the caller's among them."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ornith_moe.backend.cpu.forward import Thread

_THREAD_NS = 60_000  # of work that pays for waking another thread
_local = threading.local()
_pool: ThreadPoolExecutor | None = None


def run(kernel: Callable, tasks: int, work_ns: int, scratch_bytes: int, arguments: tuple) -> None:
    """kernel(Thread, *arguments) on up to `tasks` threads; returns when all tasks are done.

    Tasks are taken from a counter, by whichever thread is free, and none of them shares a sum: the number of threads
    changes no bit. Threads of torch's own pool sleep meanwhile.
    """
    counter = ctypes.c_int64(0)
    counter_address = ctypes.addressof(counter)

    def work() -> None:
        kernel(Thread(counter_address, _scratch(scratch_bytes), scratch_bytes), *arguments)

    threads = min(tasks, torch.get_num_threads(), 1 + work_ns // _THREAD_NS)
    others = [_threads().submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        if not other.cancel():  # it may not have begun: all callers share the pool
            other.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), "ornith-moe")
    return _pool


def _forget_threads() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_threads)  # a child has none of its parent's threads


def _scratch(nbytes: int) -> int:
    """Address of memory of this thread's own, kept for the next call: at most a few MB."""
    if getattr(_local, "nbytes", -1) < nbytes:
        _local.memory, _local.nbytes = np.empty(nbytes + 64, np.uint8), nbytes
        _local.address = -(-_local.memory.ctypes.data // 64) * 64
    address: int = _local.address
    return address
