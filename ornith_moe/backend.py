"""Which implementation computes the routed experts here, and why.

`triton` is for CUDA and ROCm, `cpu` for machines without a GPU, `reference` is a loop in plain float32 torch for any
device. A request is honoured or refused with a reason; nothing falls back silently to something slower.
"""

from dataclasses import dataclass


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
        Backend("triton", False, "this version has no Triton kernel for the experts yet, only for FP8 casts"),
        Backend("cpu", True, "tensors in main memory; the default there"),
        Backend("reference", True, "any device, float32 or float64; a loop over experts for comparison, not for speed"),
    )
    return {backend.name: backend for backend in listed}


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
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"backend: 'cpu' takes tensors in main memory, got tensors on {device}; ask for backend='reference'"
        )
    return name
