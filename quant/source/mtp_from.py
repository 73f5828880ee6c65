"""Multi-token prediction of another checkpoint: `--mtp-from`.

    weights = base without its own MTP  +  MTP of the donor

A head that was never trained drafts tokens that are thrown away; one of a sibling that was, whose hidden states are
near enough, drafts well. The donor's must be the base's in every shape, and its config must say the same of all that
MTP computes with; its rest is not read and need not be there. It may be in FP8 where the base is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import xxhash

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.source.architectures import Architecture, architecture
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.checkpoint import Checkpoint
from ornith_moe.quant.source.derived import Derived
from ornith_moe.quant.source.quantized import Codes, is_of_activations
from ornith_moe.quant.source.reconcile import mtp_beside, named_tensors
from ornith_moe.quant.source.shards import MTP_ADVICE
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.source import CheckpointSource, Source
from ornith_moe.quant.source.weights import DROPPED_MTP, locate_all, model_name, quantized_notes

REPLACED_MTP = "multi-token prediction, replaced by that of --mtp-from"


@dataclass(frozen=True, kw_only=True)
class Grafted(Derived):
    """`base` without MTP, followed by the weights of `donor`, which is nothing but MTP."""

    donor: CheckpointSource

    def _of(self, index: int) -> tuple[Source, int]:
        own = len(self.base.weights)
        return (self.base, index) if index < own else (self.donor, index - own)

    def dtype(self, index: int) -> str:
        source, index = self._of(index)
        return source.dtype(index)

    def kept(self, index: int) -> str:
        source, index = self._of(index)
        return source.kept(index)

    def codes(self, index: int) -> Codes | None:
        source, index = self._of(index)
        return source.codes(index)

    @property
    def identity(self) -> str:
        return "\n".join(filter(None, (self.base.identity, self.donor.identity)))

    def read(self, index: int, start: int, rows: int) -> Slab:
        source, index = self._of(index)
        return source.read(index, start, rows)

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{self.base.fingerprint} {self.donor.fingerprint}".encode())

    def position(self, index: int) -> tuple[Any, ...]:
        source, within = self._of(index)
        return (source is self.donor, *source.position(within))

    def changed(self) -> bool:
        return self.base.changed() or self.donor.changed()

    def modified_ns(self) -> int:
        return max(self.base.modified_ns(), self.donor.modified_ns())

    def follow(self, follow: Callable[[int, int], None]) -> None:
        self.base.follow(follow)
        self.donor.follow(follow)

    @property
    def held_bytes(self) -> int:
        return self.base.held_bytes + self.donor.held_bytes

    def is_remote(self, index: int) -> bool:
        source, index = self._of(index)
        return source.is_remote(index)

    def tensor_of(self, index: int) -> str:
        source, within = self._of(index)
        return f"{self.donor.name}: {source.tensor_of(within)}" if source is self.donor else source.tensor_of(within)

    def tensor_sizes(self) -> Mapping[str, int]:
        used = {held.tensor.name for held in self.donor.rows}
        taken = {f"{self.donor.name}: {name}": n for name, n in self.donor.tensor_sizes().items() if name in used}
        return {**self.base.tensor_sizes(), **taken}


def with_mtp_from(base: Source, checkpoint: Checkpoint) -> Grafted:
    """`base`, opened with its own MTP dropped, with that of another checkpoint.

    Raises:
        CheckpointError: it has none, or one that is not the base's in shapes and config.
    """
    donor = mtp_alone(checkpoint)
    config = _announcing(base, donor.architecture.mtp_layers)
    model = architecture(config)
    weights = tuple(model.mtp_weights())
    _check(base, model, weights, donor, f"{checkpoint.folder}: --mtp-from")
    left_out = tuple(
        replace(entry, reason=REPLACED_MTP) if entry.reason == DROPPED_MTP else entry for entry in base.left_out
    )
    said = {str(old): str(new) for old, new in zip(base.left_out, left_out, strict=True)}
    notes = [said.get(note, note) for note in base.notes]
    notes.append(f"multi-token prediction is that of {donor.name}: {len(weights):,} weights")
    return Grafted(
        name=base.name,
        config=config,
        architecture=model,
        weights=(*base.weights, *weights),
        has_mtp=True,
        notes=(*notes, *(f"{donor.name}: {note}" for note in donor.notes)),
        left_out=left_out,
        added={**base.added, "mtp_from": donor.name},
        base=base,
        donor=donor,
    )


def mtp_alone(checkpoint: Checkpoint) -> CheckpointSource:
    """The MTP of a checkpoint, whether or not the rest of it is there.

    Raises:
        CheckpointError: it has none, or not all of it.
    """
    model = architecture(checkpoint.config)
    notes: list[str] = []
    tensors = named_tensors(checkpoint, model, notes)
    if not any(map(model.is_mtp, tensors)):
        checkpoint, found = mtp_beside(checkpoint, model, tensors, notes)
        tensors |= found
    mtp = {key: info for key, info in tensors.items() if model.is_mtp(key) and not is_of_activations(key)}
    if not mtp or not model.mtp_layers:
        raise CheckpointError(
            f"{checkpoint.folder}: --mtp-from, but there is no {model.MTP_PREFIX}* tensor or config.json says "
            f"{model.MTP_LAYERS_KEY} 0; give a checkpoint that has multi-token prediction"
        )
    weights = tuple(model.mtp_weights())
    try:
        rows = locate_all(checkpoint, model, weights, mtp)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(MTP_ADVICE, "")) from None  # it was asked for
    return CheckpointSource(
        name=model_name(checkpoint.folder),
        config=checkpoint.config,
        architecture=model,
        weights=weights,
        has_mtp=True,
        notes=(*notes, *quantized_notes(rows)),
        checkpoint=checkpoint,
        rows=rows,
    )


def _announcing(base: Source, layers: int) -> dict[str, Any]:
    """The base's config, with as many MTP layers as there will be."""
    key = base.architecture.MTP_LAYERS_KEY
    if "text_config" in base.config:
        return {**base.config, "text_config": {**base.config["text_config"], key: layers}}
    return {**base.config, key: layers}


def _check(base: Source, model: Architecture, weights: tuple[Weight, ...], donor: CheckpointSource, where: str) -> None:
    """Whether MTP of the donor is that of the base, by shapes and by what it computes with."""
    advice = "; give a checkpoint of the same architecture and size"
    for ours, theirs in zip_longest(weights, donor.weights):
        if (ours and (ours.name, ours.shape)) != (theirs and (theirs.name, theirs.shape)):
            one, other = (f"{weight.name} {list(weight.shape)}" if weight else "no more" for weight in (ours, theirs))
            raise CheckpointError(f"{where}: MTP of {brief(base.name)} has {one} where this has {other}{advice}")
    for key in model.MTP_KEYS:
        one, other = _setting(model, key), _setting(donor.architecture, key)
        if None not in (one, other) and one != other:
            raise CheckpointError(
                f"{where}: MTP computes with {key}, which is {brief(one)} for {brief(base.name)} and {brief(other)} "
                f"here{advice}"
            )


def _setting(model: Architecture, key: str) -> Any:
    """A value of the text config, or of its rotary section."""
    rope = model.text.section("rope_parameters") or model.text.section("rope_scaling")
    return model.text.values.get(key, rope.values.get(key) if rope else None)
