"""A choice of types as a file: `^tensor$=type`, one a line, for our --recipe and llama-quantize's --tensor-type-file.

What is to be said of it stands before, in lines that begin with # and are comments to us. llama-quantize knows no
comments and reads words, so each is one word of the form PATTERN=f32, whose pattern no tensor has: no blanks, and no
other equals sign.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NOTHING = "=f32"


def recipe(types: Mapping[str, str], notes: Mapping[str, object]) -> str:
    """The text of the file; `notes` are {what: value}."""
    lines = [f"#{_word(what)}:{_word(value)}{NOTHING}" for what, value in notes.items()]
    return "\n".join([*lines, *(f"^{re.escape(name)}$={kind.lower()}" for name, kind in types.items())]) + "\n"


def _word(value: object) -> str:
    """Letters, digits and signs that no regular expression minds."""
    return re.sub(r"[^\w.:,%/-]+", "_", str(value))
