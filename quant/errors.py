"""The named failures of reading, planning, converting and verifying a checkpoint.

Each message is one sentence: what, where (file, tensor, coordinate), expected, got, what to do.
The CLI prints it and exits with `exit_code`; a traceback means a bug of ours.
"""


class OrnithError(Exception):
    """A failure that the user can act on."""

    exit_code = 1


class CheckpointError(OrnithError):
    """The source is not a checkpoint we can read: damaged, hostile, incomplete or of an unknown architecture."""


class PlanError(OrnithError):
    """The source is sound but the requested build cannot be made from it."""


class ConversionError(OrnithError):
    """The work stopped half way: full disk, non-finite weight, changed source, lost journal."""


class VerificationError(OrnithError):
    """A build is not what its manifest or its source says it is."""

    exit_code = 3
