"""Compare builds with their source layer by layer: what no machine that must hold the model can do at home.

    for each layer:  for the source, then each build:   x = layer(x), its weights decoded as they are read
                     |x' - x| / |x|, and the share of experts that a token no longer chooses
    at the end:      logits in slabs of the vocabulary, KL(source || build), likeliest tokens, perplexity

ornith_moe/layerwise.py runs the layers, ornith_moe/divergence.py compares the distributions. In memory are one layer of
one model without its experts, one expert, and a block of positions at the end; activations of all models lie in a
folder (ornith_moe/streamed_state.py), from which an interrupted comparison goes on at the layer it had come to.

A build is compared as its stored weights: they are decoded to fp32 and activations are not quantized, as its client
does on a CPU, whatever its engine would do to activations. What is compared need not be a build: a `Candidate` is
anything that gives rows of weights, so an encoding is tried in memory, one weight of one layer if need be; until the
first weight that it `changes` it is the source, and costs nothing.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
import xxhash

from ornith_moe.clients import quiet_transformers, require
from ornith_moe.divergence import Divergences, Found, mean, quantile
from ornith_moe.layerwise import Layerwise, SourceWeights, Watch, Weights, batches
from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.conversion.convert import peak_rss_bytes
from ornith_moe.quant.files import refuse_stray_links
from ornith_moe.quant.source.source import Source
from ornith_moe.streamed_state import State

POSITIONS, VOCABULARY = 2048, 2048  # whose logits stand at once
MODELS = 16  # with that many positions; of more models fewer stand
Progress = Callable[[str, int, int], None]  # phase, windows times layers or tokens of the vocabulary done, and in all


class Candidate(Weights, Protocol):
    """Weights to be compared with those of the source, under the same names and in the same shapes."""

    @property
    def kind(self) -> str:
        """What it is, as "gguf:Q4_K_M"."""

    @property
    def fingerprint(self) -> str:
        """Of all that it is: an interrupted comparison goes on while it is the same."""

    def changes(self, name: str) -> bool:
        """Whether weight `name` may be another than the source's."""


@dataclass(frozen=True)
class LayerFigures:
    """What became of a build's activations by the end of a layer."""

    layer: int
    error: float  # mean over tokens of |x' - x| / |x|
    flipped: float | None  # share of a token's experts that the source chose and the build did not; None: no experts


@dataclass(frozen=True)
class BuildFigures:
    """How far a build is from its source; `_se` are standard errors over windows, None of one window."""

    build: str
    kind: str
    kl_mean: float  # nats per token, KL(source || build)
    kl_mean_se: float | None
    kl_p99: float
    kl_p99_se: float | None
    kl_max: float
    top1: float  # from 0 to 1
    top1_se: float | None
    perplexity: float
    log_perplexity_change: float  # log(perplexity / the source's)
    log_perplexity_change_se: float | None
    kl_windows: tuple[float, ...]  # means of the windows: two builds are best compared window by window
    layers: tuple[LayerFigures, ...]


@dataclass(frozen=True)
class StreamedComparison:
    """What `compare_streamed` found; field names are those of the CLI's JSON."""

    source: str
    windows: int
    window_tokens: int
    positions: int  # in all windows together
    perplexity: float  # of the source
    builds: tuple[BuildFigures, ...]
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...]


@budgeted
def compare_streamed(
    source: Source,
    builds: Sequence[Candidate],
    tokens: np.ndarray,
    positions: Sequence[int] | None = None,
    *,
    state: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> StreamedComparison:
    """Compare builds with `source`, all in one pass over the layers.

    Args:
        source: an opened checkpoint without MTP, `open_source(folder, mtp="drop")`.
        builds: `open_decoded(path, source)` of each, or other candidates.
        tokens: ids of one window (L) or several (W, L); windows are independent.
        positions: ascending, each below L - 1, the same in every window; default all after the first eighth, which only
            gives context.
        state: folder of the activations, 8 * W * L * H bytes for each model; gone when the comparison is done. Default
            one of the system's for temporary files, which nothing goes on from.
        resume: go on from `state`.
        progress: called with phase "layers", then "head".
    Returns:
        StreamedComparison: builds in the order given.
    Raises:
        ValueError: tokens or positions that are none. PlanError: `resume` with nothing to go on from, or with other
        inputs; a config alone. CheckpointError: transformers does not know the model. ConversionError: activations
        that are not finite.
    Numerics: fp32 layers and logits, fp64 sums; the log-probabilities are transformers' up to the order of sums.
    """
    began = time.monotonic()
    require("transformers", "hf")
    source.require("a comparison")
    windows = _checked(tokens, source.architecture.vocabulary)
    chosen = list(range(windows.shape[1] // 8, windows.shape[1] - 1)) if positions is None else list(positions)
    if not chosen or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] <= windows.shape[1] - 2:
        raise ValueError(f"positions: expected ascending indices up to {windows.shape[1] - 2}, got {chosen[:8]}")
    head = {
        "source": source.fingerprint,
        "builds": [[build.name, build.fingerprint] for build in builds],
        "tokens": [list(windows.shape), xxhash.xxh3_128_hexdigest(windows.tobytes())],
    }
    shape = (*windows.shape, source.architecture.hidden)
    with tempfile.TemporaryDirectory() if state is None else nullcontext(state) as folder:
        with quiet_transformers(), torch.inference_mode():
            refuse_stray_links(source.folder)
            kept = State(Path(folder), head, shape, resume=resume)
            try:
                run = _Run(
                    Layerwise(source), SourceWeights(source), builds, windows, kept, progress or (lambda *_: None)
                )
                run.layers()
                apart = run.divergences(chosen)
                lines = kept.lines[1:]
            finally:
                kept.close()
        if state is not None:
            kept.remove()
    return StreamedComparison(
        source=str(source.folder),
        windows=len(windows),
        window_tokens=windows.shape[1],
        positions=len(windows) * len(chosen),
        perplexity=math.exp(-apart.log_likelihood[0].mean()),
        builds=tuple(_figures(build, number, apart, lines, len(windows)) for number, build in enumerate(builds)),
        seconds=round(time.monotonic() - began, 3),
        peak_rss_bytes=peak_rss_bytes(),
        notes=source.notes,
    )


class _Routes(Watch):
    """The experts that every token chose in a layer."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def routed(self, indices: torch.Tensor) -> None:
        self.batches.append(indices)

    def lost(self, other: _Routes) -> float | None:
        """Share of these choices that `other` did not make."""
        if not self.batches:
            return None
        here, there = torch.cat(self.batches), torch.cat(other.batches)
        return 1.0 - float((here[:, :, None] == there[:, None, :]).any(2).double().mean())


class _Run:
    """The source, model 0, and the builds side by side; `state` has their activations after each stage.

    Stage 0 is the embedding, stage n + 1 layer n. A build that has changed nothing yet shares the source's.
    """

    def __init__(
        self,
        model: Layerwise,
        source: Weights,
        builds: Sequence[Candidate],
        windows: np.ndarray,
        state: State,
        progress: Progress,
    ):
        self.model, self.windows, self.state, self.progress = model, windows, state, progress
        self.source, self.builds = source, builds
        self.begins = [self._first_change(build) for build in builds]  # the first stage that is not the source's
        self.total = self.done = 0

    def _first_change(self, build: Candidate) -> int:
        """The first stage with a weight that it changes; one beyond the last if it changes the head at most."""
        if build.changes(f"{self.model.prefix}embed_tokens.weight"):
            return 0
        for number in range(len(self.model.layers)):
            if any(map(build.changes, self.model.of_layer(number))):
                return number + 1
        return len(self.model.layers) + 1

    def layers(self) -> None:
        """All stages that are left."""
        stages = len(self.model.layers) + 1
        models = sum(max(stages - max(begin, 1), 0) for begin in self.begins) + stages - 1
        self.total = models * len(self.windows)
        for stage in range(stages):
            working = [number for number, begin in enumerate(self.begins) if begin <= stage]
            if stage < len(self.state.lines):
                self._count(len(self.windows) * (1 + len(working)) if stage else 0)
                continue
            routes = _Routes()
            self._advance(stage, self.source, 0, 0, routes)
            figures = [[0.0, None if not routes.batches else 0.0] for _ in self.builds]
            for number in working:
                chosen, shared = _Routes(), stage == self.begins[number]
                self._advance(stage, self.builds[number], 0 if shared else number + 1, number + 1, chosen)
                figures[number] = [self._error(stage, number + 1), routes.lost(chosen)]
            self.state.record({"figures": figures})

    def _advance(self, stage: int, weights: Weights, model_in: int, model: int, routes: _Routes) -> None:
        out = self.state.activations(model, stage)
        if stage == 0:
            self.model.embed(weights, self.windows, out)
            return
        x = self.state.activations(model_in, stage - 1)
        self.model.advance(stage - 1, weights, x, out, self.state.folder, watch=routes, done=self._count)

    def _count(self, windows: int) -> None:
        self.done += windows
        self.progress("layers", self.done, self.total)

    def _error(self, stage: int, model: int) -> float:
        """Mean over tokens of |x' - x| / |x|."""
        x, other = self.state.activations(0, stage), self.state.activations(model, stage)
        errors = []
        for batch in batches(x):
            size = np.linalg.norm(x[batch], axis=-1).astype(np.float64)
            errors.append(np.linalg.norm(other[batch] - x[batch], axis=-1) / np.maximum(size, 1e-30))
        return float(np.concatenate(errors).mean())

    def divergences(self, positions: Sequence[int]) -> Found:
        """Of all builds, at these positions of every window."""

        def last(model: int) -> np.ndarray:
            shared = model and self.begins[model - 1] > len(self.model.layers)
            return self.state.activations(0 if shared else model, len(self.model.layers))

        return divergences(self.model, [self.source, *self.builds], last, self.windows, positions, self.progress)


def divergences(
    model: Layerwise,
    weights: Sequence[Weights],
    last: Callable[[int], np.ndarray],
    windows: np.ndarray,
    positions: Sequence[int],
    progress: Progress,
) -> Found:
    """Of models by their activations after the last layer, at these positions of every window.

    Args:
        weights: of the source, then of each `Candidate`.
        last: fp32 [W, L, H] of model 0, the source, or of candidate n - 1.
    """
    window, position = (each.reshape(-1) for each in np.meshgrid(range(len(windows)), positions, indexing="ij"))
    targets = windows[window, position + 1]
    source, builds = weights[0], cast("Sequence[Candidate]", weights[1:])
    rows, size, parts = model.shapes[model.head][0], max(POSITIONS * MODELS // max(len(weights), MODELS), 1), []
    blocks = [slice(start, start + size) for start in range(0, len(targets), size)]
    for number, block in enumerate(blocks):
        found = Divergences(targets[block], len(builds))
        normed = [
            model.norm(each)(torch.from_numpy(last(i)[window[block], position[block]]))
            for i, each in enumerate(weights)
        ]
        for start in range(0, rows, VOCABULARY):
            count = min(VOCABULARY, rows - start)
            own = source.rows(model.head, start, count)
            logits = (
                _logits(model, x, build.rows(model.head, start, count) if build.changes(model.head) else own)
                for x, build in zip(normed[1:], builds, strict=True)
            )
            found.add(start, _logits(model, normed[0], own), logits)
            progress("head", number * rows + start + count, len(blocks) * rows)
        parts.append(found.found())
    return Found(*(np.concatenate(each, axis=1) for each in zip(*parts, strict=True)))


def _logits(model: Layerwise, x: torch.Tensor, head: np.ndarray) -> torch.Tensor:
    logits = F.linear(x, torch.from_numpy(head))
    return logits if model.softcap is None else (logits / model.softcap).tanh() * model.softcap


def _figures(
    build: Candidate, number: int, found: Found, lines: Sequence[dict[str, Any]], windows: int
) -> BuildFigures:
    def of_windows(values: np.ndarray) -> np.ndarray:
        return values.reshape(windows, -1)

    kl = of_windows(found.kl[number])
    likelihood = found.log_likelihood
    change = mean(of_windows(likelihood[0] - likelihood[number + 1]))
    average, tail, same = mean(kl), quantile(kl, 0.99), mean(of_windows(found.same_top[number]))
    return BuildFigures(
        build=build.name,
        kind=build.kind,
        kl_mean=average.value,
        kl_mean_se=average.error,
        kl_p99=tail.value,
        kl_p99_se=tail.error,
        kl_max=float(kl.max()),
        top1=same.value,
        top1_se=same.error,
        perplexity=math.exp(-likelihood[number + 1].mean()),
        log_perplexity_change=change.value,
        log_perplexity_change_se=change.error,
        kl_windows=tuple(map(float, kl.mean(1))),
        layers=tuple(LayerFigures(layer, *line["figures"][number]) for layer, line in enumerate(lines)),
    )


def _checked(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """int64 [W, L]."""
    windows = np.atleast_2d(np.asarray(tokens))
    if windows.ndim != 2 or windows.dtype.kind not in "iu" or windows.shape[1] < 2 or not len(windows):
        raise ValueError(f"tokens: expected integers (L) or (W, L) of two or more, got {windows.dtype} {windows.shape}")
    if not 0 <= windows.min() <= windows.max() < vocabulary:
        raise ValueError(f"tokens: expected ids from 0 to {vocabulary - 1}, got up to {windows.max()}")
    return windows.astype(np.int64)
