"""Memory that a build needs to serve one sequence.

    weights, as the build stores them
  + keys and values of every attention layer, 16 bits each, for the tokens that the layer looks back on
  + state of every recurrent layer, 32 bits, however long the sequence

Not counted: activations and graphs of the engine (1 to 4 GB of a GPU), further sequences, which need their keys, values
and state again, and the cache of an MTP layer, which an engine keeps only while it drafts. A cache in 8 bits halves the
second line. Sources: transformers' and llama.cpp's caches of Qwen3.5 and Gemma 4 (tests/quant/builds/test_serving.py).

What is left of a card for weights is what llama.cpp leaves, a token batch (`-ub`) of 512 and flash attention on:

    room = card - keys and values - state - 512 * context * 2 - activations - RESERVE

The fourth term is the mask of attention in F16, the fifth what the widest layer holds of 512 tokens in F32: for a
mixture of experts gate, up and product of the chosen experts, and their outputs before and after weighting. llama.cpp
reports both as one compute buffer. RESERVE is for the driver's own context, which no program reports; drivers take 0.3
to 0.6 GB. llama.cpp leaves the token embedding to the CPU, so a little more fits than is said.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.source.source import Source

if TYPE_CHECKING:
    from ornith_moe.quant.builds.plan import BuildPlan

UBATCH, RESERVE = 512, 1 << 29  # tokens at a time, llama.cpp's default; bytes of a driver
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
    return Serving(context, plan.tensor_bytes, plan.kv_bytes * cached.keys_and_values, STATE_BYTES * cached.state)


@dataclass(frozen=True, slots=True)
class Room:
    """What of a card is left for weights beside one sequence of `context` tokens in llama.cpp; bytes."""

    card: int
    context: int
    kv_bytes: int
    state_bytes: int
    buffer_bytes: int
    reserve_bytes: int = RESERVE

    @property
    def weights_bytes(self) -> int:
        return self.card - self.kv_bytes - self.state_bytes - self.buffer_bytes - self.reserve_bytes

    def __str__(self) -> str:
        return (
            f"of {self.card / 1e9:g} GB, one sequence of {self.context:,} tokens in llama.cpp leaves "
            f"{self.weights_bytes / 1e9:.2f} GB for weights: {self.kv_bytes / 1e9:.2f} are of keys and values, "
            f"{self.state_bytes / 1e9:.2f} of recurrent state, {self.buffer_bytes / 1e9:.2f} of buffers and "
            f"{self.reserve_bytes / 1e9:.2f} of the driver"
        )

    def json(self) -> dict[str, int]:
        """As `ornith-moe plan --json` prints it."""
        return asdict(self) | {"weights_bytes": self.weights_bytes}


def room(source: Source, card: int, context: int | None = None) -> Room:
    """What a card of `card` bytes has for weights of `source`.

    Raises:
        PlanError: the architecture does not say what it caches, or nothing is left.
    """
    model, context = source.architecture, context or source.architecture.context or CONTEXT
    cached = model.cached(context)
    if cached is None or not model.widest:
        raise PlanError(f"--for: what {source.name} keeps of a sequence is not known; leave --for out")
    buffers = UBATCH * (KV_BYTES * context + 4 * model.widest)
    found = Room(card, context, KV_BYTES * cached.keys_and_values, STATE_BYTES * cached.state, buffers)
    if found.weights_bytes <= 0:
        raise PlanError(
            f"--for: {card / 1e9:g} GB hold no sequence of {context:,} tokens of {source.name}; give a smaller "
            "--context"
        )
    return found
