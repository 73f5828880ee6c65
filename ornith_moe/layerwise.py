"""Run a checkpoint, or a build of it, one layer and one expert in memory at a time, on text that is kept in files.

    x = embedding                                                        x [W, L, H] in a file
    for each layer, in order:                                            read its weights, but those of its experts
        for each batch of windows:    m = mixer(norm(x)), u, routes      as far as the experts, which get u [T, H]
        for each expert e, read alone:
            for each batch:           y[t] += weight[t, e] * expert(u[t])       of the tokens t that chose it
        for each batch:               x = the rest of the layer, with m and y

The layers are transformers' own classes in fp32, whose experts and mixer (attention or DeltaNet) are stopped and handed
what was kept. So each weight is read once however much text there is, a layer of 512 experts costs the memory of one
expert, and what is computed in between is what transformers computes. A layer without experts runs in one go.

`Weights` give the numbers: those of a source (`SourceWeights`), of a build that is decoded as it is read
(quant/verification/decoded.py), or of anything else that has rows under Hugging Face's names. A `Watch` is told what
the matrices of a layer see. `make_imatrix` and `compare_streamed` are made of this. MTP layers do not run.

Letters: W windows, L tokens of each, T tokens of a batch, E experts, H hidden, I expert intermediate, K columns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ornith_moe.clients import failures_told, one_line
from ornith_moe.quant.conversion.stream import SLAB_ROWS, Unit, read_unit
from ornith_moe.quant.errors import CheckpointError, ConversionError
from ornith_moe.quant.files import reserve, scratch_file
from ornith_moe.quant.source.slab import matrix_shape
from ornith_moe.quant.source.source import Source

BATCH_TOKENS = 2048  # run at once
SLAB_BYTES = 4 << 20  # of a weight in fp32, read at once
EMBEDDING_ROWS = 4096  # read at once


class Weights(Protocol):
    """The numbers of one model, whoever holds or makes them."""

    @property
    def name(self) -> str:
        """For messages."""

    def rows(self, name: str, start: int, count: int) -> np.ndarray:
        """fp32 [count, K]: rows of the weight that Hugging Face calls `name`, experts one by one; from any thread.

        A weight of one dimension [n] has n rows of one value. `start` is a multiple of 128.
        """


@dataclass(frozen=True)
class SourceWeights:
    """Those of a source, in whatever layout they lie."""

    source: Source

    @property
    def name(self) -> str:
        return str(self.source.folder)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {weight.name: number for number, weight in enumerate(self.source.weights)}

    def rows(self, name: str, start: int, count: int) -> np.ndarray:
        return read_unit(self.source, Unit(self._index[name], start, count)).float32


class Watch:
    """What is told of a layer while it runs, batch by batch; this one does not listen."""

    def linear(self, name: str, x: torch.Tensor) -> None:
        """The linear layer of weight `name` sees x [..., K]."""

    def routed(self, indices: torch.Tensor) -> None:
        """The experts [T, top_k] that the tokens of a batch have chosen; batches in order."""

    def expert(self, owner: str, expert: int, x: torch.Tensor, inner: torch.Tensor) -> None:
        """Gate and up of an expert of module `owner` see x [T_e, H], down sees inner [T_e, I]."""


class Layerwise:
    """The text model of `source`, without weights: every method is told whose.

    Raises:
        CheckpointError: transformers does not know the model.
    """

    def __init__(self, source: Source):
        import transformers

        self.shapes = {weight.name: weight.shape for weight in source.weights}
        self.prefix = source.weights[0].name.removesuffix("embed_tokens.weight")
        self.experts = source.architecture.experts
        self.folder = source.folder
        try:
            config = transformers.AutoConfig.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            ).get_text_config(decoder=True)
            with torch.device("meta"):
                whole = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=False
                )
        except Exception as error:  # whatever its reader of configs raises
            raise CheckpointError(f"{source.folder}: transformers refuses it: {one_line(error)}") from None
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.head = "lm_head.weight" if "lm_head.weight" in self.shapes else f"{self.prefix}embed_tokens.weight"
        self.text = whole.get_decoder()
        self.text.rotary_emb = type(self.text.rotary_emb)(self.text.config)  # its frequencies are computed, not stored
        self.layers = list(self.text.layers)
        self._norm, self.text.norm = self.text.norm, torch.nn.Identity()
        self.text.layers = torch.nn.ModuleList(_Recorder() for _ in self.layers)
        self._called: torch.Size | None = None

    def embed(self, weights: Weights, ids: np.ndarray, x: np.ndarray) -> None:
        """x[w, t] = embedding of ids[w, t], the embedding read in slabs of rows."""
        name = f"{self.prefix}embed_tokens.weight"
        rows = self.shapes[name][0]
        scale = np.float32(getattr(self.text.embed_tokens, "scalar_embed_scale", 1.0))
        flat, ids = x.reshape(-1, x.shape[-1]), ids.reshape(-1)
        order = np.argsort(ids, kind="stable")
        for start in range(0, rows, EMBEDDING_ROWS):
            first, last = np.searchsorted(ids[order], (start, start + EMBEDDING_ROWS))
            if first < last:
                slab = weights.rows(name, start, min(EMBEDDING_ROWS, rows - start))
                chosen = order[first:last]
                flat[chosen] = slab[ids[chosen] - start] * scale

    def advance(
        self,
        number: int,
        weights: Weights,
        x: np.ndarray,
        out: np.ndarray,
        scratch: Path,
        *,
        watch: Watch | None = None,
        done: Callable[[int], None] = lambda windows: None,
    ) -> None:
        """out = layer `number` of x, both fp32 [W, L, H]; they may be one array.

        Args:
            scratch: a folder for files without a name.
            done: called after each batch with its windows.
        Raises:
            CheckpointError: transformers cannot run it. ConversionError: activations that are not finite.
        """
        watch = watch or Watch()
        layer, seen = self._load(number, weights, watch)
        run = partial(self._run, layer, number)
        owner = next((name for name, module in layer.named_modules() if hasattr(module, "gate_up_proj")), None)
        work = batches(x)
        if owner is None:
            for batch in work:
                seen.clear()
                out[batch] = self._finite(run(x[batch]), weights, number, batch)
                done(batch.stop - batch.start)
            return
        with files_of_zeros(scratch, x.shape, 3) as kept:
            cut = _Cut(layer, layer.get_submodule(owner), *kept)
            heard = []
            for batch in work:
                seen.clear()
                cut.collect(batch, partial(run, x[batch]))
                watch.routed(cut.indices[-1])
                heard.append(frozenset(seen))
            cut.run_experts(self._reader(number, weights, owner), partial(watch.expert, self._name(number, owner)))
            for place, batch in enumerate(work):
                seen.clear()
                seen.update(heard[place])
                out[batch] = self._finite(cut.finish(place, partial(run, x[batch])), weights, number, batch)
                done(batch.stop - batch.start)
            cut.release()

    def norm(self, weights: Weights) -> torch.nn.Module:
        """The last norm, after which the head multiplies."""
        norm = copy.deepcopy(self._norm)
        norm.load_state_dict({"weight": self._tensor(weights, f"{self.prefix}norm.weight")}, assign=True)
        return norm

    def of_layer(self, number: int) -> Sequence[str]:
        """Names of the weights of a layer, experts one by one."""
        start = f"{self.prefix}layers.{number}."
        return [name for name in self.shapes if name.startswith(start)]

    def _name(self, number: int, module: str) -> str:
        return f"{self.prefix}layers.{number}.{module}"

    def _load(self, number: int, weights: Weights, watch: Watch) -> tuple[torch.nn.Module, set[str]]:
        """The layer with its weights, experts apart, and the names that `watch` was told since it was cleared."""
        layer = copy.deepcopy(self.layers[number])
        tensors = {}
        for name, tensor in layer.state_dict().items():
            if name.rpartition(".")[2] not in ("gate_up_proj", "down_proj"):
                tensors[name] = self._tensor(weights, self._name(number, name)).reshape(tensor.shape)
        layer.load_state_dict(tensors, assign=True, strict=False)
        layer.eval()
        seen: set[str] = set()

        def told(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if name not in seen:  # what comes before the experts runs again after them
                seen.add(name)
                watch.linear(name, inputs[0])

        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(partial(told, self._name(number, f"{name}.weight")))
        return layer, seen

    def _tensor(self, weights: Weights, name: str) -> torch.Tensor:
        """A weight in fp32."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder}: transformers' model has {name}, the checkpoint does not")
        whole = np.empty(matrix_shape(self.shapes[name]), np.float32)
        _fill(whole, weights, name)
        return torch.from_numpy(whole).reshape(self.shapes[name])

    def _reader(self, number: int, weights: Weights, owner: str) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
        """What gives gate over up [2I, H] and down [H, I] of an expert, until it is asked for the next but one."""
        start, kinds = self._name(number, owner), ("gate", "up", "down")
        missing = [f"{start}.{e}.{kind}_proj.weight" for e in range(self.experts) for kind in kinds]
        missing = [name for name in missing if name not in self.shapes]
        if missing:
            raise CheckpointError(f"{self.folder}: transformers' model has {missing[0]}, the checkpoint does not")
        inner, hidden = self.shapes[f"{start}.0.gate_proj.weight"]
        room = [(np.empty((2 * inner, hidden), np.float32), np.empty((hidden, inner), np.float32)) for _ in range(2)]

        def read(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
            room.reverse()  # fresh memory for each costs the system more time than decoding takes
            gate_up, down = room[0]
            for kind, part in zip(kinds, (gate_up[:inner], gate_up[inner:], down), strict=True):
                _fill(part, weights, f"{start}.{expert}.{kind}_proj.weight")
            return torch.from_numpy(gate_up), torch.from_numpy(down)

        return read

    def _run(self, layer: torch.nn.Module, number: int, batch: np.ndarray) -> torch.Tensor:
        """The layer with what the text model passes to it besides x: masks, rotations, positions."""
        x = torch.from_numpy(np.array(batch))
        with failures_told(self.folder):
            if self._called != x.shape:
                self.text(inputs_embeds=torch.zeros_like(x), use_cache=False)
                self._called = x.shape
            arguments, keywords = self.text.layers[number].call
            return layer(x, *arguments, **keywords)

    @staticmethod
    def _finite(x: torch.Tensor, weights: Weights, number: int, batch: slice) -> np.ndarray:
        if not torch.isfinite(x).all():
            raise ConversionError(
                f"{weights.name}: layer {number} makes activations that are not finite on chunks {batch.start} to "
                f"{batch.stop - 1} of the text; verify it"
            )
        return x.numpy()


class _Recorder(torch.nn.Module):
    """Stands in for a decoder layer and keeps what it is called with besides the hidden states."""

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self.call = arguments, keywords
        return hidden_states


class _AtExpertsError(BaseException):
    """The layer has come to its experts; nobody but `_Cut` catches it."""


class _Cut:
    """A layer that is cut at its experts: what its mixer gives, and what the experts see and give, lie in files.

    Args:
        mixed, inputs, outputs: fp32 [W, L, H], the last full of zeros.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        experts: torch.nn.Module,
        mixed: np.ndarray,
        inputs: np.ndarray,
        outputs: np.ndarray,
    ):
        self.mixed, self.inputs, self.outputs = mixed, inputs, outputs
        self.batches: list[slice] = []
        self.indices: list[torch.Tensor] = []  # [T, top_k] of each batch
        self.weights: list[torch.Tensor] = []
        self.act: Callable[[torch.Tensor], torch.Tensor] = getattr(experts, "act_fn")  # noqa: B009  # a module's
        self.finishing: slice | None = None
        self.has_more = False  # the mixer gives a pair
        mixer: torch.nn.Module = next(child for name, child in layer.named_children() if name.endswith("_attn"))
        self.changed = mixer, experts
        mixer.forward = partial(self._mix, mixer.forward)
        experts.forward = self._experts

    def release(self) -> None:
        """The modules as they were, so that the layer's memory goes with it: what replaces a method refers to it."""
        for module in self.changed:
            del module.forward

    def _mix(self, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """The mixer, which is run once; some give what they attended to beside what they found."""
        if self.finishing is not None:
            found = torch.from_numpy(np.array(self.mixed[self.finishing]))
            return (found, None) if self.has_more else found
        given = forward(*arguments, **keywords)
        self.has_more = isinstance(given, tuple)
        self.mixed[self.batches[-1]] = (given[0] if self.has_more else given).numpy()
        return given

    def _experts(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.finishing is not None:
            return torch.from_numpy(np.array(self.outputs[self.finishing])).reshape(x.shape)
        batch = self.batches[-1]
        self.inputs[batch] = x.reshape(self.inputs[batch].shape).numpy()
        self.indices.append(indices)
        self.weights.append(weights)
        raise _AtExpertsError

    def collect(self, batch: slice, run: Callable[[], torch.Tensor]) -> None:
        self.batches.append(batch)
        try:
            run()
        except _AtExpertsError:
            return
        raise AssertionError("a layer with experts that does not ask them")

    def finish(self, place: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.finishing = self.batches[place]
        return run()

    def run_experts(
        self,
        read: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        told: Callable[[int, torch.Tensor, torch.Tensor], None],
    ) -> None:
        """outputs[t] = sum over k of weights[t, k] * expert(inputs[t]), each read while the one before works."""
        reached = torch.cat(self.indices).unique().tolist()
        views = [
            (torch.from_numpy(self.inputs[b]).flatten(0, 1), torch.from_numpy(self.outputs[b]).flatten(0, 1))
            for b in self.batches
        ]
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(read, reached[0]) if reached else None
            for expert, following in zip(reached, [*reached[1:], None], strict=True):
                assert coming is not None
                gate_up, down = coming.result()
                coming = None if following is None else pool.submit(read, following)
                for indices, weights, (inputs, outputs) in zip(self.indices, self.weights, views, strict=True):
                    tokens, slots = torch.where(indices == expert)
                    if not len(tokens):
                        continue
                    x = inputs[tokens]
                    gates, ups = F.linear(x, gate_up).chunk(2, dim=-1)
                    inner = self.act(gates) * ups
                    told(expert, x, inner)
                    outputs.index_add_(0, tokens, F.linear(inner, down) * weights[tokens, slots, None])


def _fill(whole: np.ndarray, weights: Weights, name: str) -> None:
    """Read a weight into fp32 [rows, K], in slabs."""
    rows, columns = whole.shape
    slab = max(SLAB_BYTES // (4 * columns) // SLAB_ROWS, 1) * SLAB_ROWS
    for start in range(0, rows, slab):
        whole[start : start + slab] = weights.rows(name, start, min(slab, rows - start))


def batches(x: np.ndarray) -> list[slice]:
    """Windows that run at once."""
    windows, length = x.shape[:2]
    size = max(1, BATCH_TOKENS // length)
    return [slice(start, min(start + size, windows)) for start in range(0, windows, size)]


@contextmanager
def files_of_zeros(folder: Path, shape: tuple[int, ...], count: int) -> Iterator[list[np.ndarray]]:
    """fp32 arrays of zeros in files of `folder` that have no name; a full disk fails here."""
    opened = []
    try:
        for _ in range(count):
            opened.append(scratch_file(folder))
            reserve(opened[-1].fileno(), 4 * math.prod(shape))
        yield [np.memmap(file, np.float32, "r+", shape=shape) for file in opened]
    finally:
        for file in opened:
            file.close()
