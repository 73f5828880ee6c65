"""Memory that a build needs to serve one sequence.

    weights, as the build stores them
  + keys and values of every attention layer, 16 bits each, for the tokens that the layer looks back on
  + state of every recurrent layer, 32 bits, however long the sequence

Not counted: activations and graphs of the engine (1 to 4 GB of a GPU), further sequences, which need their keys, values
and state again, and the cache of an MTP layer, which an engine keeps only while it drafts. A cache in 8 bits halves the
second line. Sources: transformers' and llama.cpp's caches of Qwen3.5 and Gemma 4 (tests/quant/builds/test_serving.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ornith_moe.quant.source.source import Source

if TYPE_CHECKING:
    from ornith_moe.quant.builds.plan import BuildPlan

CONTEXT = 262_144  # where a config does not say
KV_BYTES, STATE_BYTES = 2, 4
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Serving:
    """Bytes, and the tokens of the sequence."""

    context: int
    weights_bytes: int
    kv_bytes: int
    state_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.state_bytes

    @property
    def gib(self) -> float:
        return round(self.total_bytes / GIB, 2)

    def __str__(self) -> str:
        kept = f"{self.kv_bytes / GIB:.2f} GiB of keys and values, {self.state_bytes / GIB:.3f} of recurrent state"
        return f"to serve is weights and one sequence of {self.context:,} tokens: {kept}; an engine's own comes on top"

    def json(self) -> dict[str, Any]:
        """As `ornith-moe plan --json` prints it."""
        return asdict(self) | {"total_bytes": self.total_bytes, "total_gib": self.gib}


def serving(source: Source, plan: BuildPlan, context: int | None = None) -> Serving | None:
    """What the build of `plan` needs for a sequence of `context` tokens, by default as many as its model takes.

    None where the architecture does not say what it caches.
    """
    context = context or source.architecture.context or CONTEXT
    cached = plan.build.cached(source, context)
    if cached is None:
        return None
    return Serving(context, plan.tensor_bytes, KV_BYTES * cached.keys_and_values, STATE_BYTES * cached.state)
