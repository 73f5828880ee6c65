"""Names as people write them: in any case, with `_` for `-`, and with the nearest known name when they are none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.gguf_types import FILE_TYPES

SAFETENSORS_BUILDS = ("fp8-channel", "fp8-block", "bf16")
BUILDS = (*SAFETENSORS_BUILDS, *(f"gguf:{name}" for name in FILE_TYPES))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean A or B?)` with the known names nearest to `name`, or nothing.

    Example:
        >>> did_you_mean("gguf:Q4_K", ["gguf:Q4_K_M", "gguf:Q8_0"])
        ' (did you mean gguf:Q4_K_M?)'
        >>> did_you_mean("", ["bf16"])
        ''
    """
    plain = {_plain(one): one for one in known}
    asked = _plain(name[:64])
    near = difflib.get_close_matches(asked, plain, n=2, cutoff=0.75) or [
        one for one in plain if asked and (one.endswith(f":{asked}") or one.startswith(asked))
    ]
    return f" (did you mean {' or '.join(plain[one] for one in near[:2])}?)" if near else ""


def build_name(name: str) -> str:
    """The build that `name` means, in any case, with `_` for `-`.

    Raises:
        PlanError: no build is called that; the sentence suggests the nearest.
    Example:
        >>> build_name("GGUF:q4_k_m"), build_name("fp8_block")
        ('gguf:Q4_K_M', 'fp8-block')
    """
    found = {_plain(build): build for build in BUILDS}.get(_plain(name))
    if found is None:
        raise PlanError(
            f"build {brief(name)} is unknown{did_you_mean(name, BUILDS)}; expected one of {', '.join(BUILDS)}"
        )
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")
