"""Which implementation computes the routed experts here, and why.

`triton` is for CUDA and ROCm, `cpu` for machines without a GPU, `reference` is a loop in plain float32 torch for any
device. A request is honoured or refused with a reason; nothing falls back silently to something slower.
"""

import importlib.util
import os
from dataclasses import dataclass, field
from functools import cache

import torch

from ornith_moe.backend.protocol import load
from ornith_moe.quant.recipes import RECIPES, recipe_of

DEFAULT_OF_DEVICE = {"cpu": "cpu"}  # every other device: triton


@dataclass(frozen=True)
class Availability:
    """Whether one of `ornith_moe.backend.protocol.NAMES` can be used here, and for what.

    Attributes:
        name: "triton", "cpu" or "reference". available: whether it can be used here.
        reason: what it is for, or why it cannot be used.
        refused: recipe -> why this backend does not compute it here; the other recipes of `RECIPES` it does.
    """

    name: str
    available: bool
    reason: str
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes that it computes here."""
        return tuple(recipe for recipe in RECIPES if self.available and recipe not in self.refused)


def backends() -> dict[str, Availability]:
    """Every backend by name: available or why not, and which recipes it computes or why not; nothing is timed for it.

    Returns:
        {"triton": Availability, "cpu": Availability, "reference": Availability}

    Example:
        >>> import ornith_moe as om
        >>> om.backends()["cpu"].recipes
        ('bf16', 'fp8', 'fp8_full', 'fp8_channel')
    """
    return dict(_backends(os.environ.get("TRITON_INTERPRET") == "1"))


@cache
def _backends(interpreted: bool) -> dict[str, Availability]:
    listed = (
        _triton(interpreted),
        Availability("cpu", True, "tensors in main memory; the default there"),
        Availability(
            "reference", True, "any device, float32 or float64; a loop over experts for comparison, not for speed"
        ),
    )
    return {backend.name: backend for backend in listed}


def _triton(interpreted: bool) -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability("triton", False, "Triton is not installed; torch's CUDA and ROCm builds bring it")
    if torch.cuda.is_available():
        return Availability(
            "triton", True, f"kernels for {torch.cuda.get_device_name()}; the default there", _refused()
        )
    if interpreted:
        return Availability("triton", True, "no GPU: kernels run in Triton's interpreter, for tests and not for speed")
    return Availability("triton", False, "torch sees no CUDA or ROCm device")


def _refused() -> dict[str, str]:
    """recipe -> why the kernels do not compute it on the current GPU."""
    fp8 = [name for name, recipe in RECIPES.items() if recipe.is_fp8]
    if torch.version.hip:
        arch = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
        known = arch in ("gfx942", "gfx950")
        return {} if known else dict.fromkeys(fp8, f"FP8 needs gfx942 or gfx950, this GPU is {arch}")
    have = torch.cuda.get_device_capability()
    if have >= (8, 9):
        return {}
    return dict.fromkeys(fp8, "FP8 needs compute capability 8.9 or more, this GPU has {}.{}".format(*have))


def choose_backend(
    request: str | None,
    device: torch.device,
    recipe: str = "bf16",
    *,
    dtype: torch.dtype = torch.float32,
    batch_invariant: bool = False,
) -> str:
    """The backend for tensors on `device`: the requested one, or by default the fast one of that device.

    Args:
        request: "triton", "cpu", "reference", or None to choose by device.
        device: torch.device of the operands. On "meta" nothing is computed, so any request is served, by its shapes.
        recipe, dtype, batch_invariant: what it has to compute, for x of this dtype, and whether it has to promise that
            a token's bits do not follow its batch.

    Raises:
        ValueError: the request is no backend, or does not serve this device or recipe, or is unavailable (the reason
            is given), or cannot promise. TypeError: a dtype that the backend or the recipe does not take.
    """
    name = _choose(request, device, recipe)
    if dtype == torch.float64 and (recipe_of(recipe).is_fp8 or not load(name).takes_float64):
        what = f"recipe {recipe!r}" if load(name).takes_float64 else f"the {name} backend"
        raise TypeError(f"x: {what} takes 16- and 32-bit floats, got float64; use backend='reference', recipe='bf16'")
    if batch_invariant and not load(name).is_batch_invariant:
        raise ValueError(
            f"batch_invariant: the {name} backend cannot promise it, because torch chooses a GEMM by its shape; "
            "use backend='triton' or batch_invariant=False"
        )
    return name


def _choose(request: str | None, device: torch.device, recipe: str) -> str:
    name = request if request is not None else DEFAULT_OF_DEVICE.get(device.type, "triton")
    known = _backends(os.environ.get("TRITON_INTERPRET") == "1")
    if name not in known:
        raise ValueError(f"backend: expected one of {', '.join(known)}, got {name!r}")
    if device.type == "meta":
        return name
    backend = known[name]
    if not backend.available:
        raise ValueError(
            f"backend: {name!r} is unavailable for tensors on {device}: {backend.reason}; "
            "move the model to the CPU or ask for backend='reference'"
        )
    if name == "triton" and device.type == "cpu" and torch.cuda.is_available():
        raise ValueError("backend: 'triton' takes tensors on the GPU, got tensors on the CPU; move them to cuda")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"backend: 'cpu' takes tensors in main memory, got tensors on {device}; ask for backend='reference'"
        )
    if recipe in backend.refused:
        served = ", ".join(repr(one) for one in backend.recipes)
        raise ValueError(f"recipe: {name!r} does not compute {recipe!r} here: {backend.refused[recipe]}; use {served}")
    return name


# What `torch.compiler.assume_constant_result` sets. As a decorator it would import the compiler, 1.8 s, for everyone.
vars(choose_backend)["_dynamo_marked_constant"] = True
