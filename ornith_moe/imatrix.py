"""Measure an importance matrix: run a checkpoint on text, one layer at a time, and watch what its weights see.

    every linear layer with input a [T, K]:  sums[k] += sum_t a[t, k]^2, count += T, largest = max |a|
    every expert e, its tokens a [T_e, .]:   sums[e] += sum a^2 of gate and up, and of down, count[e] += T_e

ornith_moe/layerwise.py runs it: transformers' own layers in fp32, a layer and an expert in memory at a time, what they
compute on disk, each weight read once.

The file is llama-imatrix's (quant/gguf/imatrix.py): GGUF names, columns in GGUF order, so the input of DeltaNet's
output projection is reordered as its columns are. As there, chunks of `ctx` tokens are independent, begin with the
tokenizer's BOS where it has one, a rest of text is left out, and the head is left out unless asked for: its
importance matrix does more harm than good (llama-imatrix's --process-output). MTP layers do not run and get no entry.

Sums are fp64, stored as fp32. Letters: T tokens, E experts, H hidden, K columns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ornith_moe.clients import encode, quiet_transformers, require
from ornith_moe.compare import begin_windows, read_text
from ornith_moe.layerwise import Layerwise, SourceWeights, Watch, batches, files_of_zeros
from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.conversion.convert import peak_rss_bytes
from ornith_moe.quant.errors import CheckpointError, PlanError
from ornith_moe.quant.files import published, refuse_stray_links
from ornith_moe.quant.gguf.imatrix import Coverage, write_imatrix
from ornith_moe.quant.gguf.mixtures import FILE_TYPES, tensor_types
from ornith_moe.quant.gguf.tensor_types import EMBEDDING, HEAD
from ornith_moe.quant.source.architectures.weight import Place
from ornith_moe.quant.source.source import Source

Progress = Callable[[str, int, int], None]  # phase, layers times chunks done, and in all


@dataclass(frozen=True)
class ImatrixReport:
    path: Path
    chunks: int
    ctx: int
    coverage: tuple[Coverage, ...]
    seconds: float
    peak_rss_bytes: int
    notes: tuple[str, ...]


@budgeted
def make_imatrix(
    source: Source,
    text: str | Path,
    output: str | Path,
    *,
    chunks: int | None = None,
    ctx: int = 512,
    process_output: bool = False,
    progress: Progress | None = None,
) -> ImatrixReport:
    """Run `source` on `text` and write the importance of its columns to `output`.

    Args:
        source: an opened checkpoint without MTP, `open_source(folder, mtp="drop")`.
        text: a UTF-8 file; the more like the model's later work, the better.
        output: a GGUF that does not exist yet; `convert(imatrix=open_imatrix(output))` and llama-quantize read it.
        chunks: at most so many chunks of `ctx` tokens, default all of the text.
        process_output: the output head too.
        progress: called with phase "imatrix".
    Returns:
        ImatrixReport: coverage tells for each tensor how many experts were reached and by how many tokens.
    Raises:
        CheckpointError: text or tokenizer that cannot be read, or too short. PlanError: `output` exists, or a config
        alone. ConversionError: activations that are not finite.
    Numerics: fp32 layers, fp64 sums; equal up to summation order to what hooks in the whole model see.
    """
    output, began = Path(output), time.monotonic()
    require("transformers", "hf")
    source.require("an importance matrix")
    if os.path.lexists(output):
        raise PlanError(f"{output}: exists already; move it away or name another with --output")
    if not output.absolute().parent.is_dir():
        raise PlanError(f"{output}: expected its folder to exist")
    ids = _chunks(source, Path(text), chunks, ctx)
    with quiet_transformers(), torch.inference_mode():
        refuse_stray_links(source.folder)
        model = _Run(source, ids, output.absolute().parent, process_output, progress or (lambda *_: None))
        entries = [(name, matrices, columns) for members in model.entries for name, matrices, columns in members]
        with published(output) as file:
            write_imatrix(
                file,
                entries,
                model.sums(),
                architecture=source.architecture.gguf_architecture,
                datasets=[os.fsencode(Path(text).name).decode(errors="replace")],
                chunk_count=len(ids),
                chunk_size=ctx,
            )
    return ImatrixReport(
        output,
        len(ids),
        ctx,
        tuple(model.coverage),
        round(time.monotonic() - began, 3),
        peak_rss_bytes(),
        source.notes,
    )


def _chunks(source: Source, text: Path, chunks: int | None, ctx: int) -> np.ndarray:
    """int64 [chunks, ctx]."""
    folder = source.folder
    ids = encode(folder, read_text(text))
    whole = len(ids) // ctx
    if not whole:
        raise CheckpointError(f"{text}: has {len(ids)} tokens, a chunk has {ctx}; give more text or a smaller --ctx")
    windows = np.array(ids[: whole * ctx], np.int64).reshape(whole, ctx)[:chunks]
    if windows.max() >= source.architecture.vocabulary:
        raise CheckpointError(
            f"{folder}: tokenizer.json gives token {windows.max()}, the model knows "
            f"{source.architecture.vocabulary}; they are not of one model"
        )
    return begin_windows(folder, windows)


def _quantized_places(source: Source) -> dict[str, list[Place]]:
    """Hugging Face name -> places of every weight that a quantized GGUF quantizes."""
    model = source.architecture
    places = {weight.name: model.gguf_places(weight) for weight in source.weights}
    shapes = {place.name: place.shape for each in places.values() for place in each}
    types, _ = tensor_types(shapes.items(), FILE_TYPES["Q8_0"], layers=source.layers, experts=model.experts)
    wanted = {name for name, kind in types.items() if kind != "F32"} - {EMBEDDING, HEAD}
    quantized = {name: [place for place in each if place.name in wanted] for name, each in places.items()}
    return {name: each for name, each in quantized.items() if each}


class _Run:
    """A checkpoint that runs layer by layer; `entries` are those of each layer, in the order in which `sums` gives."""

    def __init__(self, source: Source, ids: np.ndarray, folder: Path, process_output: bool, progress: Progress):
        self.weights, self.ids, self.folder, self.progress = SourceWeights(source), ids, folder, progress
        self.model, self.hidden = Layerwise(source), source.architecture.hidden
        self.places = _quantized_places(source)
        self.coverage: list[Coverage] = []
        self.entries = [self._entries_of(number) for number in range(len(self.model.layers))]
        if process_output and "lm_head.weight" in self.model.shapes:
            self.entries.append([(HEAD, 1, self.hidden)])
            self.places["lm_head.weight"] = [Place(HEAD, self.model.shapes["lm_head.weight"])]

    def _entries_of(self, layer: int) -> list[tuple[str, int, int]]:
        """(GGUF name, E, K) of a layer's entries, each once."""
        of_layer = (self.places.get(name, ()) for name in self.model.of_layer(layer))
        found = {place.name: place.shape for each in of_layer for place in each}
        return [(name, shape[0] if len(shape) == 3 else 1, shape[-1]) for name, shape in found.items()]

    def sums(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Sums [E, K], counts [E] and largest magnitudes [E] of every entry, layer by layer."""
        self.total, self.done = len(self.entries) * len(self.ids), 0
        with files_of_zeros(self.folder, (*self.ids.shape, self.hidden), 1) as (x,):
            self.model.embed(self.weights, self.ids, x)
            for number, members in enumerate(self.entries):
                sums = _Sums(self.places, self.model.experts)
                if number < len(self.model.layers):
                    self.model.advance(number, self.weights, x, x, self.folder, watch=sums, done=self._done)
                else:
                    norm = self.model.norm(self.weights)
                    for batch in batches(x):
                        sums.linear("lm_head.weight", norm(torch.from_numpy(np.array(x[batch]))))
                        self._done(batch.stop - batch.start)
                for name, matrices, columns in members:
                    values, counts, largest = sums.of(name, matrices, columns)
                    reached = int((counts > 0).sum())
                    self.coverage.append(Coverage(name, "", matrices, reached, int(counts.min()), int(counts.max())))
                    yield values, counts, largest

    def _done(self, chunks: int) -> None:
        self.done += chunks
        self.progress("imatrix", self.done, self.total)


class _Sums(Watch):
    """Sums of squares, counts and largest magnitudes by GGUF name: fp64 [E, K], [E] and [E]."""

    def __init__(self, places: Mapping[str, Sequence[Place]], experts: int) -> None:
        self.places, self.experts = places, experts
        self.values: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.largest: dict[str, torch.Tensor] = {}

    def linear(self, name: str, x: torch.Tensor) -> None:
        for place in self.places.get(name, ()):
            columns = place.transform.columns
            index = None if columns is None else torch.from_numpy(columns.source_index(x.shape[-1]))
            self.add([place.name], 1, 0, x.flatten(0, -2), index)

    def expert(self, owner: str, expert: int, x: torch.Tensor, inner: torch.Tensor) -> None:
        gate, up, down = (self.places[f"{owner}.0.{kind}_proj.weight"][0].name for kind in ("gate", "up", "down"))
        self.add((gate, up), self.experts, expert, x)
        self.add((down,), self.experts, expert, inner)

    def add(
        self, names: Sequence[str], matrices: int, matrix: int, x: torch.Tensor, columns: torch.Tensor | None = None
    ) -> None:
        """What matrix `matrix` of each of these tensors sees: x [T, K], whose `columns` lie in another order there."""
        squares = x.square().sum(0, dtype=torch.float64)
        squares = squares if columns is None else squares[columns]
        low, high = x.aminmax() if x.numel() else torch.zeros(2)
        most = torch.maximum(high, -low).double()
        for name in names:
            if name not in self.values:
                self.values[name] = torch.zeros(matrices, len(squares), dtype=torch.float64)
                self.counts[name] = torch.zeros(matrices, dtype=torch.float64)
                self.largest[name] = torch.zeros(matrices, dtype=torch.float64)
            self.values[name][matrix] += squares
            self.counts[name][matrix] += len(x)
            self.largest[name][matrix] = torch.maximum(self.largest[name][matrix], most)

    def of(self, name: str, matrices: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if name not in self.values:
            return np.zeros((matrices, columns), np.float32), *np.zeros((2, matrices), np.float32)
        found = self.values[name], self.counts[name], self.largest[name]
        values, counts, largest = (of_all.float().numpy() for of_all in found)
        return values, counts, largest
