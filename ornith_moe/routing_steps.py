"""The passes of a `generate`, joined to one record per sequence: which rows belong to the tokens that were kept.

A pass runs some new tokens behind a cache. What the cache holds before a pass says which rows are still valid:

    greedy, sampling, chunked prefill      all that were recorded
    assisted decoding, prompt lookup       those of accepted tokens: the cache was cut to them
    without a cache                        none: the pass runs everything again, and its rows take their place
    beam search                            unknown: the cache was reordered, and other beams are returned in the end

What cannot be told is refused: rows of other tokens would steer a replay wrongly, and nothing else would show it.

Letters: B sequences of a pass, S tokens of each.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

_REMEDY = "record a plain forward pass over the sequences that generate returned instead"


@dataclass
class Step:
    """One pass: tokens [B, S] (None for embeddings), the length of its cache before it (None: not told), and whether
    the cache is another than the pass before had left."""

    shape: tuple[int, int]
    tokens: torch.Tensor | None
    cached: int | torch.Tensor | None
    moved: bool


@dataclass
class Steps:
    """The passes of a recording by key, and how much of the last one its cache kept in the end."""

    by_key: dict[Any, Step] = field(default_factory=dict)
    next: Step | None = None  # the pass that runs now
    cache: Any = None  # while the recording is open
    left: Callable[[], torch.Tensor | None] = lambda: None  # a weak reference to the keys that the last pass has left
    kept: int | torch.Tensor | None = None

    def add(self, key: Any) -> None:
        """The pass that runs now is recorded as `key`."""
        if self.next is not None:
            self.by_key.setdefault(key, self.next)

    @contextlib.contextmanager
    def watch(self, model: torch.nn.Module) -> Iterator[None]:
        """Note every pass of a model that is called with token ids or embeddings."""
        handles = (
            model.register_forward_pre_hook(torch.compiler.disable(self._before), with_kwargs=True, prepend=True),
            model.register_forward_hook(torch.compiler.disable(self._after)),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.kept, self.cache, self.next = _length(self.cache), None, None

    def _before(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, embedded = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        given = ids if ids is not None else embedded
        self.next = None
        if not isinstance(given, torch.Tensor) or (given is ids and (ids.dim() != 2 or ids.is_floating_point())):
            return
        self.cache = kwargs.get("past_key_values")
        keys = _keys(self.cache)
        tokens = None if ids is None else ids.detach().clone()
        cached = 0 if self.cache is None and kwargs.get("cache") is None else _length(self.cache)
        self.next = Step((given.shape[0], given.shape[1]), tokens, cached, keys is not None and keys is not self.left())

    def _after(self, _module: torch.nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        keys = _keys(self.cache)
        self.left = (lambda: None) if keys is None else weakref.ref(keys)


def join(records: dict[Any, torch.Tensor], steps: Steps, batch: int) -> torch.Tensor:
    """[batch, tokens, layers, top_k] of records [B * S, layers, top_k] by key."""
    rows: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    for key, record in records.items():
        step = steps.by_key.get(key) or _untold(key, record, batch, rows)
        if step.shape[0] != batch or len(record) != batch * step.shape[1]:
            raise ValueError(
                f"trace[{key!r}]: expected passes of {batch} sequences, got {step.shape[0]} x {step.shape[1]} tokens in"
                f" {len(record)} rows; read other batches as they ran, and after beam search or packing {_REMEDY}"
            )
        begin = _begin(key, step, 0 if rows is None else rows.shape[1], tokens)
        rows = _behind(rows, begin, record.unflatten(0, (batch, -1)))
        tokens = None if step.tokens is None else _behind(tokens, begin, step.tokens)
    if rows is None:
        raise ValueError("trace: expected at least one recorded pass, got none; read it after the model has run")
    kept = steps.kept if steps.cache is None else _length(steps.cache)
    return rows if kept is None else rows[:, : int(kept)] if int(kept) else rows


def _behind(before: torch.Tensor | None, begin: int, new: torch.Tensor) -> torch.Tensor | None:
    """`new` [B, S, ...] behind the first `begin` of `before`; None where those are not told."""
    if not begin:
        return new
    return None if before is None else torch.cat((before[:, :begin], new), 1)


def _begin(key: Any, step: Step, past: int, tokens: torch.Tensor | None) -> int:
    """How many of the `past` rows of earlier passes precede those of this one."""
    if step.cached is None:
        raise ValueError(f"trace[{key!r}]: expected a cache that tells its length, got one that does not; {_REMEDY}")
    begin = int(step.cached)  # host sync where the cache counts on the device
    if begin > past:
        raise ValueError(
            f"trace[{key!r}]: expected a pass at token {past}, where the one before ended, got one at {begin};"
            f" record from the first pass on, or {_REMEDY}"
        )
    if begin and begin == past and step.moved:
        raise ValueError(
            f"trace[{key!r}]: expected the cache that the pass before left, got one that was reordered, as beam search"
            f" does, so that rows belong to other tokens than are returned; {_REMEDY}"
        )
    if begin == 0 and past:
        prefix = None if step.tokens is None else step.tokens[:, :past]
        if prefix is None or tokens is None or prefix.shape != tokens.shape or not torch.equal(prefix, tokens):
            raise ValueError(
                f"trace[{key!r}]: expected a pass over the tokens of the one before and more, got other tokens; "
                f"read trace[key] pass by pass, or {_REMEDY}"
            )
    return begin


def _untold(key: Any, record: torch.Tensor, batch: int, rows: torch.Tensor | None) -> Step:
    """The step of a pass of which only the rows are known: the first is as good as any, and no more."""
    if rows is not None:
        raise ValueError(f"trace[{key!r}]: expected passes of a model that takes input_ids, got others; {_REMEDY}")
    return Step((batch, len(record) // batch), None, 0, False)


def _keys(cache: Any) -> torch.Tensor | None:
    layers = getattr(cache, "layers", None) or ()
    return next((k for k in (getattr(layer, "keys", None) for layer in layers) if isinstance(k, torch.Tensor)), None)


def _length(cache: Any) -> int | torch.Tensor | None:
    """Tokens in a cache, counted on its device where it is there; None: it does not tell."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return None
    length = cache.get_seq_length()
    return length.clone() if isinstance(length, torch.Tensor) else length
