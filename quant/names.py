"""Names as people write them: in any case, with `_` for `-`, and with the nearest known name when they are none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 3  # names in a suggestion


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean A or B?)` with the known names that `name` begins, or those nearest to it, or nothing.

    Example:
        >>> did_you_mean("gguf:Q4_K", ["gguf:Q4_K_M", "gguf:Q8_0"])
        ' (did you mean gguf:Q4_K_M?)'
        >>> did_you_mean("", ["bf16"])
        ''
    """
    plain = {plain_name(one): one for one in known}
    asked = plain_name(name[:64])
    near = [one for one in plain if asked and (one.endswith(f":{asked}") or one.startswith(asked))]
    near = near or difflib.get_close_matches(asked, plain, n=2, cutoff=0.75)
    return f" (did you mean {' or '.join(plain[one] for one in near[:MOST])}?)" if near else ""


def plain_name(name: str) -> str:
    return name.strip().lower().replace("_", "-")
