"""Records of expert choices: what they look like, how engines send them, how they fit a trainer's batch.

    record      [tokens, layers, top_k] int16, one row per token that the engine ran; a row of -1 has no record
    batch       [B * S, layers, top_k] int16, one row per position of the trainer's [B, S], padding included as -1

What engines send, read with `decode`:

    vLLM        an array or nested lists, or base64 text of a .npy file; the prompt may come apart from the completion
    SGLang      base64 text of raw int32, without its shape: rows are tokens - 1
    verifiers   {"data": bytes or base64 text, "shape": [...]}

The last token of a rollout is sampled but never run, so its record may be missing; any other difference in length is an
error, because a record shifted by one steers every token wrongly and nothing else would show it. Layers are either the
MoE layers in order, or all decoder layers by number (SGLang), of which a replay reads those that have a router.

Records come from another machine: they are checked for range, duplicates and length, and nothing in them is executed.

Letters: B sequences, S positions, n tokens of one sequence.
"""

import base64
import binascii
import io
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ornith_moe.routing_steps import Steps, join

MISSING = -1  # in every slot of a row: no record, the router chooses


class Trace(Mapping[Hashable, torch.Tensor]):
    """Expert ids by micro-batch: `trace[key]` is [tokens, layers, top_k] int16, keys count from 0 unless named.

    Attributes:
        layers: names of the routers, in the order of dimension 1.
        num_experts: E.
    """

    def __init__(self, layers: Sequence[str], num_experts: int, records: Mapping[Hashable, torch.Tensor] | None = None):
        self.layers = tuple(layers)
        self.num_experts = num_experts
        self._rows: dict[Hashable, list[torch.Tensor | None]] = {}
        self._steps = Steps()
        for key, record in (records or {}).items():
            self._rows[key] = list(record.unbind(1))

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        return torch.stack([self.row(key, layer) for layer in range(len(self.layers))], dim=1)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Trace({len(self)} micro-batches, {len(self.layers)} layers, {self.num_experts} experts)"

    def add(self, key: Hashable, layer: int, ids: torch.Tensor) -> torch.Tensor:
        """Keep ids [tokens, top_k] as what router `layer` chose in micro-batch `key`; the int16 copy that is kept."""
        rows = self._rows.setdefault(key, [None] * len(self.layers))
        self._steps.add(key)
        if rows[layer] is not None:
            raise ValueError(
                f"trace[{key!r}]: {self.layers[layer]} is recorded already; name each micro-batch once, or none of them"
            )
        kept = rows[layer] = ids.detach().to(torch.int16, copy=True)
        return kept

    def row(self, key: Hashable, layer: int) -> torch.Tensor:
        """[tokens, top_k] int16, what router `layer` chose in micro-batch `key`."""
        row = self._rows[key][layer]
        if row is None:
            name = self.layers[layer]
            raise ValueError(f"trace[{key!r}]: {name} recorded nothing; let the forward pass finish before reading")
        return row

    def load(self) -> torch.Tensor:
        """[layers, E] int64: how many tokens each expert received. Recomputed forward passes were not recorded."""
        load = torch.zeros(len(self.layers), self.num_experts, dtype=torch.int64)
        for key in self:
            load += expert_load(self[key], self.num_experts).cpu()
        return load

    def by_sequence(self, batch: int) -> torch.Tensor:
        """[batch, tokens, layers, top_k]: the rows of the tokens that `generate` kept, the prompt first.

        Args:
            batch: sequences of each pass: prompts times `num_return_sequences`.
        The last generated token has no row (nothing ran it), except without a cache where it may have been run.
        Raises:
            ValueError: the rows of the tokens that were returned cannot be told: beam search, other batches or other
                tokens from pass to pass (`ornith_moe.routing_steps`).
        """
        return join({key: self[key] for key in self}, self._steps, batch)


def expert_load(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[layers, E] int64: tokens per expert in ids [tokens, layers, top_k]; missing rows count nowhere."""
    flat = ids.long().transpose(0, 1).flatten(1)  # [layers, tokens * top_k]
    counts = flat.new_zeros(flat.shape[0], num_experts + 1)
    counts.scatter_add_(1, flat.where(flat >= 0, num_experts), torch.ones_like(flat))
    return counts[:, :num_experts]


def decode(payload: Any, *, layers: int | None = None, top_k: int | None = None) -> torch.Tensor:
    """[tokens, layers, top_k] int16 from what an engine returned for one sequence, or part of one.

    Args:
        payload: array, tensor, nested lists, base64 text of a .npy file or of raw int32, or {"data", "shape"}.
        layers, top_k: needed for raw int32, which does not carry its shape.
    Raises:
        ValueError: not of that form, or ids that int16 cannot hold. TypeError: not integers.
    Example:
        >>> decode(encode(torch.zeros(5, 2, 4, dtype=torch.int16))).shape
        torch.Size([5, 2, 4])
    """
    if isinstance(payload, Mapping):
        array = _raw(payload.get("data"), payload.get("shape"))
    elif isinstance(payload, str | bytes):
        array = _text(payload, layers, top_k)
    elif isinstance(payload, torch.Tensor):
        array = payload.detach().cpu().numpy()
    else:
        array = np.asarray(payload)
        if array.size == 0 and array.ndim < 3:
            array = np.empty((0, layers or 0, top_k or 0), np.int16)
    if array.ndim != 3:
        raise ValueError(f"payload: expected shape [tokens, layers, top_k], got {list(array.shape)}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"payload: expected integers, got {array.dtype}")
    if array.size and not -1 <= array.min() <= array.max() <= np.iinfo(np.int16).max:
        raise ValueError(
            f"payload: expected ids from -1 to 32767, got {array.min()} to {array.max()}; check dtype and shape"
        )
    return torch.from_numpy(array.astype(np.int16))


def encode(ids: torch.Tensor) -> str:
    """Base64 text of a .npy file with ids [tokens, layers, top_k] as int16, the form that vLLM sends."""
    file = io.BytesIO()
    np.save(file, ids.detach().cpu().to(torch.int16).numpy(), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")


def pack(
    records: Sequence[Any], *, attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """The rows of a batch, [B * S, layers, top_k] int16, from one record per sequence; -1 where there is none.

    Args:
        records: per sequence, in the order of the batch: a record as `decode` takes it, a tuple (prompt, completion)
            of two, or None for a sequence without record.
        attention_mask: [B, S], 1 for tokens and 0 for padding, on either side.
        position_ids: [B, S] for packed sequences: each begins at position 0. With a mask, padding is ignored.
    Raises:
        ValueError: the number of sequences, their lengths, layers or top_k do not fit.
    Example:
        >>> record = torch.arange(3).view(3, 1, 1)
        >>> pack([record], attention_mask=torch.tensor([[0, 1, 1, 1]])).flatten().tolist()
        [-1, 0, 1, 2]
    """
    spans, positions = _spans(attention_mask, position_ids)
    if len(records) != len(spans):
        raise ValueError(
            f"records: expected one per sequence, {len(spans)} in this batch, got {len(records)}; "
            "give None for a sequence without record"
        )
    joined = [record if record is None else _joined(record) for record in records]
    shapes = {tuple(record.shape[1:]) for record in joined if record is not None}
    if len(shapes) != 1:
        raise ValueError(f"records: expected one [layers, top_k] for all sequences, got {sorted(shapes) or 'none'}")
    rows = torch.full((positions, *shapes.pop()), MISSING, dtype=torch.int16)
    for index, (record, span) in enumerate(zip(joined, spans, strict=True)):
        if record is None:
            continue
        if len(record) not in (len(span), len(span) - 1):
            raise ValueError(
                f"records[{index}]: expected {len(span)} rows for the {len(span)} tokens of this sequence, or one less "
                f"(the last token of a rollout is not run), got {len(record)}; fill gaps with rows of -1"
            )
        rows[span[: len(record)]] = record
    return rows


def unpack(
    rows: torch.Tensor, *, attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The inverse of `pack`: one record [n, layers, top_k] per sequence, from rows [B * S, layers, top_k]."""
    spans, positions = _spans(attention_mask, position_ids)
    if len(rows) != positions:
        raise ValueError(f"rows: expected {positions}, one per position of the batch, got {len(rows)}")
    rows = rows.cpu()
    return [rows[span] for span in spans]


def check(ids: torch.Tensor, num_experts: int, name: str = "record") -> None:
    """Raise ValueError unless every row of ids [tokens, layers, top_k] names different experts of [0, E), or is all -1.

    One message names the first bad row. Reads one flag back from a GPU.
    """
    missing = (ids == MISSING).all(-1, keepdim=True)
    outside = ~missing & ((ids < 0) | (ids >= num_experts))
    ordered = ids.sort(-1).values
    twice = ~missing[..., 0] & (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    if not bool(outside.any() | twice.any()):
        return
    if outside.any():
        token, layer, slot = outside.nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{token}, {layer}, {slot}]: expected an expert id in [0, {num_experts}), or -1 in the whole row "
            f"for no record, got {ids[token, layer].tolist()}; check that engine and trainer have the same model"
        )
    token, layer = twice.nonzero()[0].tolist()
    raise ValueError(
        f"{name}[{token}, {layer}]: expected {ids.shape[-1]} different experts, got {ids[token, layer].tolist()}; "
        "check the shape, or set the row to -1"
    )


def _spans(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> tuple[list[torch.Tensor], int]:
    """Positions of every sequence in the flattened batch, and how many positions there are."""
    given = attention_mask if attention_mask is not None else position_ids
    if given is None:
        raise ValueError("attention_mask, position_ids: expected one of them, got neither; it says where sequences lie")
    shape = given.shape
    for name, tensor in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if tensor is not None and (tensor.dim() != 2 or tensor.shape != shape):
            raise ValueError(f"{name}: expected shape [B, S] = {list(shape)}, got {list(tensor.shape)}")
    real = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
    flat = torch.arange(real.numel()).view(shape)
    if position_ids is None:
        spans = [row[mask] for row, mask in zip(flat, real, strict=True)]
        for index, span in enumerate(spans):
            if len(span) and int(span[-1] - span[0]) != len(span) - 1:
                raise ValueError(f"attention_mask[{index}]: expected one run of ones, got zeros between them")
        return spans, real.numel()
    tokens, starts = flat[real], (position_ids.cpu()[real] == 0).nonzero().flatten()
    if len(tokens) and (not len(starts) or starts[0] != 0):
        raise ValueError("position_ids: expected 0 at the first token, which begins a sequence")
    return list(tokens.tensor_split(starts[1:])) if len(tokens) else [], real.numel()


def _joined(record: Any) -> torch.Tensor:
    if isinstance(record, tuple):
        parts = [decode(part) for part in record]
        parts = [part for part in parts if part.numel()] or parts[:1]
        return torch.cat(parts)
    return decode(record)


def _text(payload: str | bytes, layers: int | None, top_k: int | None) -> np.ndarray:
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("payload: expected base64 text of a .npy file or of raw int32, got other text") from None
    if not data.startswith(b"\x93NUMPY"):
        if layers is None or top_k is None:
            raise ValueError("payload: raw int32 without shape; give layers and top_k")
        return _raw(data, [-1, layers, top_k])
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("format version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)  # bounded, and evaluates literals only
    except ValueError as error:
        raise ValueError(f"payload: expected a .npy file of version 1.0, got one with {error}") from None
    body = data[file.tell() :]
    if fortran or dtype.kind not in "iu" or len(body) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"payload: expected a .npy file of integers in C order, got {len(body)} bytes for {list(shape)} of {dtype}"
        )
    return np.frombuffer(body, dtype).reshape(shape)


def _raw(data: Any, shape: Any) -> np.ndarray:
    """An array from bytes; the width of an id follows from their number if the shape is complete, else it is int32."""
    if isinstance(data, str):
        data = base64.b64decode(data)
    if not isinstance(data, bytes | bytearray | memoryview) or shape is None or len(shape) != 3:
        raise ValueError("payload: expected {'data': bytes or base64 text, 'shape': [tokens, layers, top_k]}")
    data = bytes(data)
    count = math.prod(shape)
    width = 4 if count < 0 else len(data) // count if count else 1
    kind = {1: np.uint8, 2: np.int16, 4: np.int32}.get(width)
    if kind is None or len(data) % (abs(count) * width or 1) or (count == 0 and data):
        raise ValueError(f"payload: {len(data)} bytes do not make ids of shape {list(shape)}; check layers and top_k")
    return np.frombuffer(data, kind).reshape(shape)
