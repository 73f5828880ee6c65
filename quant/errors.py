"""The named failures of reading, planning, converting and verifying a checkpoint.

Each message is one sentence: what, where (file, tensor, coordinate), expected, got, what to do.
The CLI prints it and exits with `exit_code`; a traceback means a bug of ours. A value that comes from a file or from
the command line goes into a message as `brief(value)`: whatever it holds, the message stays one readable line.
"""

import reprlib
from typing import Any

BRIEF = 120  # characters of a value in a message


class _Brief(reprlib.Repr):
    def __init__(self, limit: int):
        super().__init__()
        self.maxstring = self.maxother = limit
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = limit // 4

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 256:  # Python refuses to print thousands of digits
            return f"an integer of {value.bit_length()} bits"
        return repr(value)


def brief(value: object, limit: int = BRIEF) -> str:
    """`repr(value)` in at most `limit` characters, the middle left out, whatever `value` holds and however much of it.

    Example:
        >>> brief("a" * 500, limit=20)
        "'aaaaaaa...aaaaaaaa'"
        >>> brief({"layers": 10**5000})
        "{'layers': an integer of 16610 bits}"
    """
    text = _Brief(limit).repr(value)
    if len(text) <= limit:
        return text
    head = (limit - 3) // 2
    return f"{text[:head]}...{text[head + 3 - limit :]}"


class OrnithError(Exception):
    """A failure that the user can act on."""

    exit_code = 1


class CheckpointError(OrnithError):
    """The source is not a checkpoint we can read: damaged, hostile, incomplete or of an unknown architecture."""


class PlanError(OrnithError):
    """The source is sound but the requested build cannot be made from it."""


class ConversionError(OrnithError):
    """The work stopped half way: full disk, non-finite weight, changed source, lost journal."""


class UnstorableError(ConversionError):
    """A value that a storage has no number for: too large, or not a number at all."""


class BuildsFailed(ConversionError):
    """Some builds could not be made; `report` tells of those that could, which are finished."""

    def __init__(self, sentence: str, report: Any):
        super().__init__(sentence)
        self.report = report  # a ConversionReport


class VerificationError(OrnithError):
    """A build is not what its manifest or its source says it is."""

    exit_code = 3
