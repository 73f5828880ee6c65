"""Measure an importance matrix: run a checkpoint on text, one layer in memory at a time, and watch what weights see.

    for each layer, in order:                        read its weights
        for each batch of chunks:                    x = layer(x), x [chunks, ctx, H] kept in a file
            every linear layer with input a [T, K]:  sums[k] += sum_t a[t, k]^2, count += T, largest = max |a|
            every expert e, its tokens a [T_e, .]:   sums[e] += sum a^2 of gate and up, and of down, count[e] += T_e

The layers are transformers' own classes in fp32, the weights come from our checkpoint reader in whatever layout they
lie, so the model is never in memory: one layer is (its experts in the dtype of the checkpoint, widened one by one), and
x lies on disk. Layers run layer by layer over all text, so each weight is read once.

The file is llama-imatrix's (quant/gguf/imatrix.py): GGUF names, columns in GGUF order, so the input of DeltaNet's
output projection is reordered as its columns are. As there, chunks of `ctx` tokens are independent, begin with the
tokenizer's BOS where it has one, a rest of text is left out, and the head is left out unless asked for: its
importance matrix does more harm than good (llama-imatrix's --process-output). MTP layers do not run and get no entry.

Sums are fp64, stored as fp32. Letters: T tokens, E experts, H hidden, K columns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ornith_moe.clients import encode, failures_told, one_line, quiet_transformers, require
from ornith_moe.compare import read_text
from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.conversion.convert import peak_rss_bytes
from ornith_moe.quant.conversion.stream import Unit, read_unit
from ornith_moe.quant.errors import CheckpointError, ConversionError, PlanError
from ornith_moe.quant.files import published, refuse_stray_links, scratch_file
from ornith_moe.quant.gguf.imatrix import Coverage, write_imatrix
from ornith_moe.quant.gguf.mixtures import FILE_TYPES, tensor_types
from ornith_moe.quant.gguf.tensor_types import EMBEDDING, HEAD
from ornith_moe.quant.source.architectures.weight import Place
from ornith_moe.quant.source.source import Source, weight_matrix

BATCH_TOKENS = 2048  # run at once
SLAB_ROWS = 4096  # of the embedding, read at once
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
        model = _Model(source, ids, output.absolute().parent, process_output, progress or (lambda *_: None))
        entries = [(name, matrices, columns) for members in model.entries for name, matrices, columns in members]
        with published(output) as file:
            write_imatrix(
                file,
                entries,
                model.run(),
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
    begin = encode(folder, "", special=True)
    if begin:
        windows[:, 0] = begin[0]
    return windows


class _Recorder(torch.nn.Module):
    """Stands in for a decoder layer and keeps what it is called with besides the hidden states."""

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self.call = arguments, keywords
        return hidden_states


class _Model:
    """A checkpoint that runs layer by layer; `entries` are those of each layer, in the order in which `run` sums."""

    def __init__(self, source: Source, ids: np.ndarray, folder: Path, process_output: bool, progress: Progress):
        import transformers

        self.source, self.ids, self.folder, self.progress = source, ids, folder, progress
        self.index = {weight.name: number for number, weight in enumerate(source.weights)}
        self.prefix = source.weights[0].name.removesuffix("embed_tokens.weight")
        self.coverage: list[Coverage] = []
        try:
            config = transformers.AutoConfig.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            )
            with torch.device("meta"):
                whole = transformers.AutoModelForCausalLM.from_config(
                    config.get_text_config(decoder=True), dtype=torch.float32, trust_remote_code=False
                )
        except Exception as error:  # whatever its reader of configs raises
            raise CheckpointError(f"{source.folder}: transformers refuses it: {one_line(error)}") from None
        self.text = whole.get_decoder()
        self.text.rotary_emb = type(self.text.rotary_emb)(self.text.config)  # its frequencies are computed, not stored
        self.layers = list(self.text.layers)
        self.norm, self.text.norm = self.text.norm, torch.nn.Identity()
        self.text.layers = torch.nn.ModuleList(_Recorder() for _ in self.layers)
        self.places = self._quantized_places()
        self.entries = [self._entries_of(layer) for layer in range(len(self.layers))]
        self.head = process_output and "lm_head.weight" in self.index
        if self.head:
            self.entries.append([(HEAD, 1, source.architecture.hidden)])

    def _quantized_places(self) -> dict[str, list[Place]]:
        """Hugging Face name -> places of every weight that a quantized GGUF quantizes."""
        model = self.source.architecture
        places = {weight.name: model.gguf_places(weight) for weight in self.source.weights}
        shapes = {place.name: place.shape for each in places.values() for place in each}
        types, _ = tensor_types(shapes.items(), FILE_TYPES["Q8_0"], layers=self.source.layers, experts=model.experts)
        wanted = {name for name, kind in types.items() if kind != "F32"} - {EMBEDDING, HEAD}
        quantized = {name: [place for place in each if place.name in wanted] for name, each in places.items()}
        return {name: each for name, each in quantized.items() if each}

    def _entries_of(self, layer: int) -> list[tuple[str, int, int]]:
        """(GGUF name, E, K) of a layer's entries, each once."""
        start = f"{self.prefix}layers.{layer}."
        of_layer = (each for name, each in self.places.items() if name.startswith(start))
        found = {place.name: place.shape for each in of_layer for place in each}
        return [(name, shape[0] if len(shape) == 3 else 1, shape[-1]) for name, shape in found.items()]

    def run(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Sums [E, K], counts [E] and largest magnitudes [E] of every entry, layer by layer."""
        chunks, ctx = self.ids.shape
        shape = (chunks, ctx, self.source.architecture.hidden)
        total, done = len(self.entries) * chunks, 0
        with scratch_file(self.folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * int(np.prod(shape)))  # a full disk fails here
            hidden = np.memmap(file, np.float32, "r+", shape=shape)
            self._embed(hidden)
            for number, members in enumerate(self.entries):
                sums = _Sums()
                step = self._load_layer(number, sums) if number < len(self.layers) else self._load_head(sums)
                for start in range(0, chunks, size := max(1, BATCH_TOKENS // ctx)):
                    batch = hidden[start : start + size]
                    with failures_told(self.source.folder):
                        x = step(torch.from_numpy(np.array(batch)))
                    if not torch.isfinite(x).all():
                        raise ConversionError(
                            f"{self.source.folder}: layer {number} makes activations that are not finite on chunks "
                            f"{start} to {start + len(batch) - 1}; verify the checkpoint"
                        )
                    batch[:] = x.numpy()
                    done += len(batch)
                    self.progress("imatrix", done, total)
                for name, matrices, columns in members:
                    values, counts, largest = sums.of(name, matrices, columns)
                    reached = int((counts > 0).sum())
                    self.coverage.append(Coverage(name, "", matrices, reached, int(counts.min()), int(counts.max())))
                    yield values, counts, largest
                del step

    def _embed(self, hidden: np.ndarray) -> None:
        """hidden[c, t] = embedding of ids[c, t], the embedding read in slabs of rows."""
        rows, index = self.source.architecture.vocabulary, self.index[f"{self.prefix}embed_tokens.weight"]
        scale = np.float32(getattr(self.text.embed_tokens, "scalar_embed_scale", 1.0))
        flat, ids = hidden.reshape(-1, hidden.shape[-1]), self.ids.reshape(-1)
        order = np.argsort(ids, kind="stable")
        for start in range(0, rows, SLAB_ROWS):
            first, last = np.searchsorted(ids[order], (start, start + SLAB_ROWS))
            if first < last:
                slab = read_unit(self.source, Unit(index, start, min(SLAB_ROWS, rows - start))).float32
                chosen = order[first:last]
                flat[chosen] = slab[ids[chosen] - start] * scale

    def _load_layer(self, number: int, sums: _Sums) -> Callable[[torch.Tensor], torch.Tensor]:
        """The layer with its weights, its hooks set to add to `sums`."""
        layer, start = self.layers[number], f"{self.prefix}layers.{number}."
        tensors = {name: self._tensor(start + name, tuple(of.shape)) for name, of in layer.state_dict().items()}
        layer.load_state_dict(tensors, assign=True)
        self.layers[number] = None  # the last reference but the caller's: its weights go with it
        layer.eval()
        for name, module in layer.named_modules():
            places = self.places.get(f"{start}{name}.weight", ())
            if isinstance(module, torch.nn.Linear) and places:
                module.register_forward_pre_hook(partial(sums.add_linear, places))
            elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
                names = [self.places[f"{start}{name}.0.{kind}_proj.weight"][0].name for kind in ("gate", "up", "down")]
                module.forward = partial(_experts, module, sums, names)
        return lambda x: layer(x, *self._call(number, x)[0], **self._call(number, x)[1])

    def _load_head(self, sums: _Sums) -> Callable[[torch.Tensor], torch.Tensor]:
        name = f"{self.prefix}norm.weight"
        self.norm.load_state_dict({"weight": self._tensor(name, tuple(self.norm.weight.shape))}, assign=True)
        place = Place(HEAD, self.source.weights[self.index["lm_head.weight"]].shape)

        def head(x: torch.Tensor) -> torch.Tensor:
            sums.add_linear([place], None, (self.norm(x),))
            return x

        return head

    def _call(self, number: int, x: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """What the text model passes to layer `number` besides x: masks, rotations, positions."""
        if getattr(self, "_called", None) != x.shape:
            self.text(inputs_embeds=torch.zeros_like(x), use_cache=False)
            self._called = x.shape
        return self.text.layers[number].call

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of the model, fp32; packed experts from their parts, in the dtype of the checkpoint."""
        if name in self.index:
            return self._weight(self.index[name], torch.float32).reshape(shape)
        parent, _, kind = name.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind, ())
        names = [[f"{parent}.{e}.{part}.weight" for part in parts] for e in range(shape[0])]
        if not parts or any(part not in self.index for members in names for part in members):
            raise CheckpointError(f"{self.source.folder}: transformers' model has {name}, the checkpoint does not")
        stored = self.source.dtype(self.index[names[0][0]])
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)
        packed = torch.empty(shape, dtype=dtype)
        for expert, members in zip(packed, names, strict=True):
            for rows, part in zip(expert.chunk(len(members)), members, strict=True):
                rows.copy_(self._weight(self.index[part], dtype))
        return packed

    def _weight(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        weight = self.source.weights[number]
        slab = read_unit(self.source, Unit(number, 0, weight_matrix(weight)[0]))
        return slab.tensor.to(dtype).reshape(weight.shape)


class _Sums:
    """Sums of squares, counts and largest magnitudes by GGUF name: fp64 [E, K], [E] and [E]."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.largest: dict[str, torch.Tensor] = {}

    def add_linear(
        self, places: Sequence[Place], module: torch.nn.Module | None, inputs: tuple[torch.Tensor, ...]
    ) -> None:
        x = inputs[0].flatten(0, -2)
        for place in places:
            columns = place.transform.columns
            index = None if columns is None else torch.from_numpy(columns.source_index(x.shape[-1]))
            self.add([place.name], 1, 0, x, index)

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


class _Experts(Protocol):
    """What transformers' modules of packed experts have."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    act_fn: Callable[[torch.Tensor], torch.Tensor]


def _experts(
    module: _Experts,
    sums: _Sums,
    names: Sequence[str],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """y[t] = sum over k of weights[t, k] * expert(x[t]), an expert at a time; `names`: of gate, up and down."""
    gate, up, down = names
    y = torch.zeros_like(hidden_states)
    experts = len(module.gate_up_proj)
    for expert in top_k_index.unique().tolist():
        tokens, slots = torch.where(top_k_index == expert)
        x = hidden_states[tokens]
        sums.add((gate, up), experts, expert, x)
        gates, ups = F.linear(x, module.gate_up_proj[expert].float()).chunk(2, dim=-1)
        inner = module.act_fn(gates) * ups
        sums.add((down,), experts, expert, inner)
        rows = F.linear(inner, module.down_proj[expert].float()) * top_k_weights[tokens, slots, None]
        y.index_add_(0, tokens, rows)
    return y
