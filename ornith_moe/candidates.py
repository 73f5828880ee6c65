"""What can be compared with a source: a build of it, or another checkpoint of the same weights."""

from __future__ import annotations

from dataclasses import dataclass

from ornith_moe.layerwise import SourceWeights
from ornith_moe.quant.errors import CheckpointError, OrnithError
from ornith_moe.quant.opening import open_any
from ornith_moe.quant.source.source import Source
from ornith_moe.quant.verification.decoded import open_decoded
from ornith_moe.streamed import Candidate


@dataclass(frozen=True)
class Checkpoint(SourceWeights):
    """A checkpoint whose weights have the names and shapes of the source's: a finetune, or FP8 that others made."""

    kind = "checkpoint"

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def changes(self, name: str) -> bool:
        return True


def open_candidate(path: str, source: Source) -> Candidate:
    """The build of `source` at `path`, or the checkpoint there (a folder, `hf://org/name`, a GGUF of BF16 or Q8_0).

    Raises:
        CheckpointError: it is neither.
    """
    try:
        return open_decoded(path, source)
    except CheckpointError as refusal:
        try:
            other = open_any(path, mtp="drop")
            other.require("a comparison")
        except OrnithError:
            raise refusal from None
        if not _text(source).items() <= _text(other).items():
            raise refusal from None
        return Checkpoint(other)


def _text(source: Source) -> dict[str, tuple[int, ...]]:
    return {weight.name: weight.shape for weight in source.weights if weight.role not in ("vision", "mtp")}
