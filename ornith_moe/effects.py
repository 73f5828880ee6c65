"""What a type does to a model's predictions when one kind of tensor alone has it: KL, measured layer by layer.

    for each layer:  x[c] = layer(x[c])     of the source and of every trial c, side by side
    at the end:      KL(source || trial)

A `Trial` is the source, but for one kind of tensor in some consecutive layers, which is encoded as a GGUF would hold it
and decoded again as it is read; the embedding and the head are kinds of their own. Until the first weight that it
changes a trial is the source, and where it changes nothing it runs together with the source and all other such trials,
so a layer's weights are read once for these, and once for each trial that changes the layer. Activations lie in files,
4 * W * L * H bytes for each trial and four times as many while a layer with experts works; of `LOT` trials at a time,
each lot being one pass over the layers.

ornith_moe/layerwise.py runs the layers; quant/fitting/loss.py makes weights of what is found.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash

from ornith_moe.clients import quiet_transformers, require
from ornith_moe.divergence import mean
from ornith_moe.layerwise import Layerwise, SourceWeights, files_of_zeros
from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.builds.build import Options, find_build
from ornith_moe.quant.builds.plan import Step
from ornith_moe.quant.conversion.noise import restored, storage_named
from ornith_moe.quant.conversion.sensitivity import PLAIN
from ornith_moe.quant.conversion.stream import Unit, read_unit
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.files import refuse_stray_links
from ornith_moe.quant.fitting.loss import kind_of
from ornith_moe.quant.fitting.sensitivity import Effect, Sensitivity
from ornith_moe.quant.fitting.types import standing
from ornith_moe.quant.gguf.imatrix import Imatrix
from ornith_moe.quant.gguf.mixtures import NEEDS_IMATRIX
from ornith_moe.quant.source.source import Source, weight_matrix
from ornith_moe.streamed import Progress, divergences

TRIED = ("Q3_K", "IQ4_XS", "MLX3", "W4A16_NVFP4")  # whose noise is neither too small to see nor beyond what adds up
MOST = 2  # types that are tried
GROUPS = 4  # of layers
LOT = 48  # trials at a time


@dataclass(frozen=True)
class Trial(SourceWeights):
    """The source, with some tensors of a GGUF of it as `kind` would leave them."""

    tensors: tuple[str, ...]
    kind: str
    steps: dict[str, tuple[tuple[str, Step], ...]]  # {weight: (tensor, way into it)} of those it changes
    imatrix: Imatrix | None

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint} {self.kind} {self.tensors}"

    def changes(self, name: str) -> bool:
        return name in self.steps

    def rows(self, name: str, start: int, count: int) -> np.ndarray:
        if name not in self.steps:
            return super().rows(name, start, count)
        weight = self.source.weights[self._index[name]]
        slab, total = read_unit(self.source, Unit(self._index[name], start, count)), weight_matrix(weight)[0]
        values = slab.float32.copy()
        for tensor, step in self.steps[name]:
            targets = step.transform.targets(start, count, total)
            rows = step.transform.forward(step.transform.taken(slab, start, total)).float32
            importance = None
            if self.imatrix and self.imatrix.entry_of(tensor):
                importance = self.imatrix.importance(tensor, weight.expert or 0, rows.shape[1])
            kind = standing(self.kind, rows.shape[1])
            back = step.transform.inverse(restored(rows, storage_named(kind, importance)))
            values[slice(None) if targets is None else targets >= 0] = back
        return values


@budgeted
def measure_effects(
    source: Source,
    tokens: np.ndarray,
    measured: Sensitivity,
    *,
    imatrix: Imatrix | None = None,
    groups: int = GROUPS,
    keep: Callable[[Sensitivity], None] = lambda found: None,
    progress: Progress = lambda phase, done, total: None,
) -> Sensitivity:
    """`measured` with the effect of every kind of tensor in every one of `groups` runs of layers.

    Args:
        source: opened without MTP; that of `measured`.
        tokens: int64 [W, L]; KL is taken at all positions after the first eighth of a window.
        imatrix: that of `measured`.
        keep: called with what is known after each lot of trials, so that an interrupted measurement goes on there.
    Raises:
        PlanError: effects on another text, or with another importance matrix; a config alone. CheckpointError:
        transformers does not know the model. ConversionError: activations that are not finite.
    Numerics: fp32 layers, fp64 sums, as `compare_streamed`.
    """
    require("transformers", "hf")
    source.require("a measurement of effects")
    refuse_stray_links(source.folder)
    text = f"{list(tokens.shape)} {xxhash.xxh3_128_hexdigest(np.ascontiguousarray(tokens, np.int64).tobytes())}"
    if measured.effects and measured.text != text:
        raise PlanError(
            "the sensitivity has effects on another text; give the same --text and --windows, or name another file "
            "with --output"
        )
    if measured.imatrix != (imatrix.digest if imatrix else None):
        raise PlanError("the sensitivity was measured with another importance matrix; give the same with --imatrix")
    known = {(effect.tensors, effect.type) for effect in measured.effects}
    todo = [trial for trial in trials(source, measured, imatrix, groups) if (trial.tensors, trial.kind) not in known]
    for start in range(0, len(todo), LOT):
        lot = todo[start : start + LOT]
        with tempfile.TemporaryDirectory() as folder, quiet_transformers(), torch.inference_mode():
            kl = _Pass(source, lot, tokens, Path(folder), progress).run()
        found = [
            Effect(trial.tensors, trial.kind, figure.value, figure.error)
            for trial, figure in zip(lot, map(mean, kl), strict=True)
        ]
        measured = replace(measured, text=text, effects=(*measured.effects, *found))
        keep(measured)
    return measured


def trials(source: Source, measured: Sensitivity, imatrix: Imatrix | None, groups: int) -> Iterator[Trial]:
    """Kinds of tensor by runs of layers, in the order in which they begin to differ from the source."""
    plan = find_build(PLAIN).plan(source, Options())
    ways: dict[str, list[tuple[str, Step]]] = {}
    for step in plan.steps:
        ways.setdefault(plan.tensors[step.tensors[0]].name, []).append((source.weights[step.weight].name, step))
    layers = source.architecture.layers
    members: dict[tuple[int, str], list[str]] = {}
    for name in (tensor.name for tensor in measured.tensors if tensor.name in ways):
        layer = re.match(r"blk\.(\d+)\.", name)
        run = int(layer[1]) * min(groups, layers) // layers if layer else -1 if name.startswith("token") else groups
        members.setdefault((run, kind_of(name)), []).append(name)
    usable = [kind for kind in measured.types if imatrix or kind not in NEEDS_IMATRIX]
    kinds = [kind for kind in TRIED if kind in usable][:MOST] or usable[len(usable) // 2 :][:1]
    for _, names in sorted(members.items()):
        steps: dict[str, list[tuple[str, Step]]] = {}
        for tensor in names:
            for weight, step in ways[tensor]:
                steps.setdefault(weight, []).append((tensor, step))
        for kind in dict.fromkeys(kinds):
            if all(standing(kind, measured.by_name[name].shape[-1]) in measured.by_name[name].errors for name in names):
                yield Trial(source, tuple(names), kind, {name: tuple(way) for name, way in steps.items()}, imatrix)


class _Pass:
    """The source, model 0, and trials side by side through all layers."""

    def __init__(self, source: Source, lot: Sequence[Trial], windows: np.ndarray, folder: Path, progress: Progress):
        self.model, self.source, self.lot = Layerwise(source), SourceWeights(source), lot
        self.windows, self.folder, self.progress = windows, folder, progress
        self.shape = (1 + len(lot), *windows.shape, source.architecture.hidden)
        self.begun: set[int] = set()
        self.done = 0

    @cached_property
    def changing(self) -> list[list[int]]:
        """Models that change each layer."""
        layers = [self.model.of_layer(number) for number in range(len(self.model.layers))]
        return [[m for m, t in enumerate(self.lot, 1) if any(map(t.changes, names))] for names in layers]

    def run(self) -> np.ndarray:
        """KL [C, W, P]."""
        positions = list(range(self.windows.shape[1] // 8, self.windows.shape[1] - 1))
        with files_of_zeros(self.folder, self.shape, 1) as (x,):
            self.model.embed(self.source, self.windows, x[0])
            for model, trial in enumerate(self.lot, 1):
                if trial.changes(f"{self.model.prefix}embed_tokens.weight"):
                    self.model.embed(trial, self.windows, x[model])
                    self.begun.add(model)
            for number in range(len(self.model.layers)):
                self._layer(number, x)
            found = divergences(
                self.model,
                [self.source, *self.lot],
                lambda model: x[model if model in self.begun else 0],
                self.windows,
                positions,
                self.progress,
            )
        return found.kl.reshape(len(self.lot), len(self.windows), -1)

    def _layer(self, number: int, x: np.ndarray) -> None:
        for model in self.changing[number]:
            self._advance(number, self.lot[model - 1], x[model if model in self.begun else 0], x[model])
            self.begun.add(model)
        together = [0, *sorted(self.begun - set(self.changing[number]))]
        with files_of_zeros(self.folder, (len(together), *self.shape[1:]), 1) as (side,):
            for place, model in enumerate(together):
                side[place] = x[model]
            flat = side.reshape(-1, *self.shape[2:])
            self._advance(number, self.source, flat, flat)
            for place, model in enumerate(together):
                x[model] = side[place]

    def _advance(self, number: int, weights: SourceWeights, x: np.ndarray, out: np.ndarray) -> None:
        self.model.advance(number, weights, x, out, self.folder, done=self._count)

    def _count(self, windows: int) -> None:
        self.done += windows
        self.progress("layers", self.done, self._total)

    @cached_property
    def _total(self) -> int:
        """Windows times layers times models."""
        begun = {m for m, t in enumerate(self.lot, 1) if t.changes(f"{self.model.prefix}embed_tokens.weight")}
        total = 0
        for changing in self.changing:
            begun |= set(changing)
            total += 1 + len(begun)
        return total * len(self.windows)
