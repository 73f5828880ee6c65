"""Memory whose pages cost little: for weight gradients, which have the size of all experts, and for intermediates.

A first write to a page is a fault. Here 1 GiB took 0.5 s in pages of 4 KiB, as malloc gives them, and 0.1 s in huge
pages, up to 1 s where the hypervisor had to find memory too; the same bytes are written in 0.04 s once they are there.
So large tensors get huge pages of their own, which go to a pool when the tensor dies. They are marked as free: the
system takes them when it needs memory, and until then the next step writes into them without a fault.

The pool keeps at most a quarter of the machine's memory; `release` empties it.
"""

import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np
import torch

from ornith_moe.quant.memory import advise, huge_pages

LARGE_BYTES = 4 << 20
_HUGE_PAGE = 2 << 20
_KEPT_SHARE = 4  # of the machine's memory: a quarter
_MANY = 8  # one active expert in so many, and clearing the others is cheaper than new pages
_pool: list[mmap.mmap] = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor with any content, to be written."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if nbytes < LARGE_BYTES or _wants_nan():
        return torch.empty(shape, dtype=dtype, device="cpu")
    return _tensor(_from_pool(nbytes) or _new(nbytes), shape, dtype)


def weight_gradient(shape: Sequence[int], dtype: torch.dtype, active: list[int]) -> torch.Tensor:
    """[E, ...] for a gradient that will be written for the experts in `active` and is zero for the others.

    Where few are active, their pages alone come into being; where many are, memory of the last step is used again.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if nbytes < LARGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    many = _MANY * len(active) >= shape[0]
    reused = _from_pool(nbytes) if many else None
    gradient = _tensor(reused or _new(nbytes), shape, dtype, keep=many)
    if reused is not None:
        start = 0
        for stop in [*active, shape[0]]:  # ascending
            gradient[start:stop].zero_()
            start = stop + 1
    return gradient


def release() -> None:
    """Give all unused memory back to the system."""
    _pool.clear()


def _wants_nan() -> bool:
    """torch's own way to make unwritten memory visible, which tests use."""
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # set by its class
    return torch.are_deterministic_algorithms_enabled() and fills


def _new(nbytes: int) -> mmap.mmap:
    return huge_pages(nbytes + _HUGE_PAGE)


def _tensor(memory: mmap.mmap, shape: Sequence[int], dtype: torch.dtype, keep: bool = True) -> torch.Tensor:
    whole = np.frombuffer(memory, np.uint8)
    if keep:
        weakref.finalize(whole, _give_back, memory).atexit = False
    start = -whole.ctypes.data % _HUGE_PAGE
    tensor = torch.empty(0, dtype=dtype, device="cpu")  # no view of a tensor of bytes: results are changed in place
    storage = torch.from_numpy(whole).untyped_storage()
    return tensor.set_(storage, start // dtype.itemsize, torch.Size(shape))  # type: ignore[call-overload]  # no strides


def _from_pool(nbytes: int) -> mmap.mmap | None:
    """The smallest of the pool that fits and is not twice as large."""
    fitting = [m for m in _pool if nbytes + _HUGE_PAGE <= len(m) < 2 * (nbytes + _HUGE_PAGE)]
    for memory in sorted(fitting, key=len):
        try:
            _pool.remove(memory)
        except ValueError:  # another thread was faster
            continue
        return memory
    return None


def _give_back(memory: mmap.mmap) -> None:
    kept = sum(map(len, _pool)) + len(memory)
    if kept <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _KEPT_SHARE:
        advise(memory, "MADV_FREE")
        _pool.append(memory)
