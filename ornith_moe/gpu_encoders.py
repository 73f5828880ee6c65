"""The GPU's encoders for a conversion: the same bytes as the CPU's, from the same slabs.

    convert(source, out, builds, encoders=gpu_encoders("cuda"))

`quant` encodes on the CPU unless it is handed encoders, each under the name of the storage that it serves. Here are
those of FP8 (kernels/fp8_cast.py) and of Q8_0, Q4_K, Q5_K and Q6_K (kernels/gguf_encode.py), which hold nearly all
bytes of the usual builds; every other storage stays with the CPU, in the same conversion. As the bytes are equal, a
conversion begun on one device can be resumed on another.

A worker uploads its slab, starts the kernels and waits for the blocks to come back. Kernels are started by one worker
at a time, which Triton's interpreter needs and which compiles each of them once; copies and the GPU's work overlap.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from ornith_moe.quant.builds.storages.fp8 import FP8Block, FP8Channel
from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.errors import ConversionError, PlanError
from ornith_moe.quant.source.slab import Slab

if TYPE_CHECKING:  # a conversion on the CPU needs no torch, whose import takes longer than a small one
    import torch

    from ornith_moe.quant.conversion.workers import Encoders  # nor does `doctor` need a conversion


def choose_device(request: str = "auto") -> tuple[str, str]:
    """("cuda" or "cpu", why) for a conversion.

    Args:
        request: "auto" takes a CUDA or ROCm device where there is one, "cpu" does not, "cuda" insists.
    Raises:
        PlanError: "cuda", and there is none that we can use.
    """
    if request == "cpu":
        return "cpu", "as asked"
    if request == "auto" and not _has_driver():
        return "cpu", "no CUDA or ROCm driver is installed"
    import torch

    from ornith_moe.backend.choice import backends

    triton = backends()["triton"]
    if triton.available and torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    if request == "cuda":
        raise PlanError(f"device: expected a CUDA or ROCm device, but {triton.reason}; pass --device cpu")
    return "cpu", triton.reason


def _has_driver() -> bool:
    """Whether a driver is there through which torch could see a GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return True
    except OSError:
        return Path("/dev/kfd").exists()


def gpu_encoders(device: str | torch.device) -> Encoders:
    """Encoders on `device` for `convert(..., encoders=)`, by name of the storage.

    Args:
        device: of CUDA or ROCm; "cpu" in Triton's interpreter.
    Raises:
        ConversionError: from an encoder, for a value that is not finite, a scale beyond fp16 or a failing GPU.
    Example:
        >>> from ornith_moe.gpu_encoders import gpu_encoders                                          # doctest: +SKIP
        >>> convert(source, "out", ["gguf:Q4_K_M", "fp8-block"], encoders=gpu_encoders("cuda"))      # doctest: +SKIP
    """
    import torch

    from ornith_moe.kernels.fp8_cast import quantize_fp8_block, quantize_fp8_channel  # Triton: where there is a GPU
    from ornith_moe.kernels.gguf_encode import ENCODED, encode, raise_if_set, upload

    Run = Callable[[Storage, torch.Tensor], tuple[torch.Tensor, ...]]
    starting = Lock()

    def fp8(cast: Callable[..., tuple[torch.Tensor, ...]]) -> Run:
        def run(storage: Storage, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with starting:
                return cast(x, scale="bf16")

        return run

    def gguf(storage: Storage, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert isinstance(storage, Gguf)
        importance = upload(storage.importance() if storage.importance else None, x.shape, x.device)
        with starting:
            blocks, flags = encode(x, storage.name, importance)
        raise_if_set(flags, x, storage.name)
        return (blocks,)

    def on_device(run: Run) -> Callable[[Storage, Slab], tuple[np.ndarray, ...]]:
        def encoder(storage: Storage, slab: Slab) -> tuple[np.ndarray, ...]:
            try:
                parts = run(storage, slab.tensor.to(device))
                return tuple(part.view(torch.uint8).cpu().numpy() for part in parts)
            except RuntimeError as error:  # out of memory, or a device that is lost
                reason = str(error).strip().partition("\n")[0]
                raise ConversionError(
                    f"the GPU failed ({reason}); run it again with --device cpu, it goes on"
                ) from error

        return encoder

    runs = {FP8Block.name: fp8(quantize_fp8_block), FP8Channel.name: fp8(quantize_fp8_channel)}
    return {name: on_device(run) for name, run in (runs | dict.fromkeys(ENCODED, gguf)).items()}
