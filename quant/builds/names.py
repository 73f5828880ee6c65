"""The builds that can be asked for, by name."""

from __future__ import annotations

from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.gguf.mixtures import FILE_TYPES
from ornith_moe.quant.names import did_you_mean, plain_name

SAFETENSORS_BUILDS = ("fp8-channel", "fp8-block", "bf16")
BUILDS = (*SAFETENSORS_BUILDS, *(f"gguf:{name}" for name in FILE_TYPES))


def build_name(name: str) -> str:
    """The build that `name` means, in any case, with `_` for `-`.

    Raises:
        PlanError: no build is called that; the sentence suggests the nearest.
    Example:
        >>> build_name("GGUF:q4_k_m"), build_name("fp8_block")
        ('gguf:Q4_K_M', 'fp8-block')
    """
    found = {plain_name(build): build for build in BUILDS}.get(plain_name(name))
    if found is None:
        raise PlanError(
            f"build {brief(name)} is unknown{did_you_mean(name, BUILDS)}; expected one of {', '.join(BUILDS)}"
        )
    return found
