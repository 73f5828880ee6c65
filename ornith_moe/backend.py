"""Which implementation computes the routed experts here, and why.

`triton` is for CUDA and ROCm, `cpu` for machines without a GPU, `reference` is a loop in plain float32 torch for any
device. A request is honoured or refused with a reason; nothing falls back silently to something slower.
"""

import importlib.util
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """One implementation. `reason` says what it is for, or why it cannot be used."""

    name: str
    available: bool
    reason: str


def backends() -> dict[str, Backend]:
    """Every backend by name, available or why not.

    Example:
        >>> import ornith_moe as om
        >>> om.backends()["cpu"].available
        True
    """
    listed = (
        _triton(),
        Backend("cpu", True, "tensors in main memory; the default there"),
        Backend("reference", True, "any device, float32 or float64; a loop over experts for comparison, not for speed"),
    )
    return {backend.name: backend for backend in listed}


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", False, "Triton is not installed; torch's CUDA and ROCm builds bring it")
    if torch.cuda.is_available():
        return Backend("triton", True, f"kernels for {torch.cuda.get_device_name()}; the default there")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Backend("triton", True, "no GPU: kernels run in Triton's interpreter, for tests and not for speed")
    return Backend("triton", False, "torch sees no CUDA or ROCm device")


def choose_backend(request: str | None, device) -> str:
    """The backend for tensors on `device`: the requested one, or by default the fast one of that device.

    Args:
        request: "triton", "cpu", "reference", or None to choose by device.
        device: torch.device of the operands.

    Raises:
        ValueError: the request is no backend, or does not serve this device, or is unavailable (the reason is given).
    """
    known = backends()
    name = request if request is not None else ("cpu" if device.type == "cpu" else "triton")
    if name not in known:
        raise ValueError(f"backend: expected one of {', '.join(known)}, got {name!r}")
    if not known[name].available:
        raise ValueError(
            f"backend: {name!r} is unavailable for tensors on {device}: {known[name].reason}; "
            "move the model to the CPU or ask for backend='reference'"
        )
    if name == "triton" and device.type == "cpu" and torch.cuda.is_available():
        raise ValueError("backend: 'triton' takes tensors on the GPU, got tensors on the CPU; move them to cuda")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"backend: 'cpu' takes tensors in main memory, got tensors on {device}; ask for backend='reference'"
        )
    return name
