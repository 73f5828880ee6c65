"""The weights that a live policy is served with: the tensors of a build, bit for bit, one after another and on no disk.

    for one in served_weights(model, "fp8-block"):        name, tensor, scale, scale_name
        ...                                               as in `ornith-moe convert` of the saved checkpoint

The policy is a source (policy.py) and the build plans it, so names, skip lists, dtypes and what is quantized are those
of the files; the cast is `ornith_moe.quant.fp8`, or its twin on a GPU. Masters in fp32 are rounded to `saved_as` first,
as the checkpoint of a trainer in BF16 has them, and then quantized.

    tensor of the model -> gathered if it is a DTensor -> each weight in it, expert by expert -> rounded -> quantized

One tensor of the model is held at a time, of fused experts `gather_bytes` of it, rounded before it is gathered, which
halves traffic and memory of fp32 masters. What is given is new memory, or of tensors that are kept and need no
gathering the model's own, unchanged until the next optimizer step.

Gathering is collective: all ranks iterate, in the same order and to the end. A weight that holds a NaN or an infinity
is an error on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import torch

import ornith_moe.quant.builds  # noqa: F401, which registers them
from ornith_moe.quant import fp8
from ornith_moe.quant.builds.build import BUILDS, Options, find_build
from ornith_moe.quant.builds.folder import SafetensorsBuild
from ornith_moe.quant.builds.plan import BuildPlan, OutputTensor, Step
from ornith_moe.quant.builds.storages.fp8 import FP8
from ornith_moe.quant.builds.storages.plain import Keep, ToBF16
from ornith_moe.quant.errors import ConversionError, PlanError
from ornith_moe.quant.names import plain_name
from ornith_moe.quant.recipes import RECIPES, ROW
from ornith_moe.quant.source.slab import matrix_shape
from ornith_moe.quant.source.transforms import UNCHANGED
from ornith_moe.sync.held import Cut, Held, cut_of, hold, hold_local
from ornith_moe.sync.policy import DTYPES, Place, Policy, config_holder, open_policy, tensors_of

ANY_FP8 = "fp8"  # the FP8 build that fits the policy, as `fitting_build` says
OFFICIAL_FP8 = "fp8-channel"  # of the official Ornith-1.0 FP8 builds
GATHER_BYTES = 512 << 20
TORCH = {name: dtype for dtype, name in DTYPES.items()} | {"F8_E4M3": torch.float8_e4m3fn}


class Served(NamedTuple):
    """A weight as an engine loads it; `scale` and its name are None where the build does not quantize it."""

    name: str
    tensor: torch.Tensor
    scale: torch.Tensor | None = None
    scale_name: str | None = None

    def pairs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the weight, then of its scale."""
        yield self.name, self.tensor
        if self.scale is not None and self.scale_name is not None:
            yield self.scale_name, self.scale


def served_weights(
    model: torch.nn.Module,
    build: str = "FP8",
    *,
    saved_as: torch.dtype | None = torch.bfloat16,
    gather: bool = True,
    gather_bytes: int = GATHER_BYTES,
    to_rank: int | None = None,
) -> Iterator[Served]:
    """The tensors of `build` of the checkpoint that `model` would save, as it is now.

    Args:
        model: of transformers, in whatever wraps it: plain, fully_shard (FSDP2), expert- or tensor-parallel (DTensor
            parameters), DDP, torch.compile, PEFT with merged adapters.
        build: "fp8-channel", "fp8-block", "bf16", or another registered one of safetensors. "FP8": `fitting_build`, the
            one of the policy's own quantization or experts implementation, else "fp8-channel".
        saved_as: dtype of the checkpoint, to which masters are rounded first; None: each parameter's own, as
            `save_pretrained` writes the model as it is.
        gather: False: experts are not gathered, and each rank gives those that it holds, under their names in the whole
            model. Everything else is gathered and given by all ranks.
        gather_bytes: of fused experts that are gathered at a time, one expert of each rank at least.
        to_rank: only this rank of the default group gets tensors; the iterators of the others take part in gathering
            and give nothing.
    Returns:
        Served per weight, experts singly, in the order of the model's tensors. Scales multiply. Besides the model one
        of its tensors is held at most, of fused experts about `gather_bytes` and what the collective itself takes.
    Raises:
        PlanError: at once: an unknown architecture or build, a model that its config does not describe, an adapter that
            is not merged, stored FP8 that is not the build's. ConversionError: on the way, a NaN or an infinity.
    Numerics: equal to the build's files in every byte, on any device and for any sharding. Stored FP8 experts are given
        as they are, not quantized again.
    Example:
        >>> from transformers import AutoModelForCausalLM, Qwen3_5TextConfig
        >>> config = Qwen3_5TextConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> next(one for one in served_weights(model) if one.scale is not None).scale_name
        'model.layers.0.mlp.gate_proj.weight_scale'
    """
    sync = plan_sync(model, build, saved_as=saved_as, gather=gather, gather_bytes=gather_bytes, to_rank=to_rank)
    return iter(sync)


def named_tensors(served: Iterable[Served]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all weights and scales, as the `load_weights` of engines takes them."""
    for one in served:
        yield from one.pairs()


def fitting_build(model: torch.nn.Module) -> str:
    """The FP8 build whose scales reach as far as the policy's: of its quantization, of its experts implementation under
    a word of `ornith_moe.hf`, or the official one.

    The words of `ornith_moe.hf` compute with the very codes and scales that this build then stores.
    """
    config = config_holder(model).config
    quantized = getattr(config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
    word = str(getattr(config.get_text_config(), "_experts_implementation", None))
    recipe = RECIPES.get(word.removeprefix("ornith_"))
    for name, build in BUILDS.items():
        casts = {one.block for one in build.storages if issubclass(one, FP8) and not one.needs}
        if casts and (getattr(build, "quant_method", None) == method or (recipe and recipe.weights in casts)):
            return name
    return OFFICIAL_FP8


def plan_sync(
    model: torch.nn.Module,
    build: str = "FP8",
    *,
    saved_as: torch.dtype | None = torch.bfloat16,
    gather: bool = True,
    gather_bytes: int = GATHER_BYTES,
    to_rank: int | None = None,
) -> Sync:
    """`served_weights` of these arguments, planned once and to be iterated after every step; it raises the same."""
    if saved_as not in (None, *DTYPES):
        raise PlanError(f"saved_as: expected torch.bfloat16, float16, float32 or None, got {saved_as}")
    found = find_build(fitting_build(model) if plain_name(build) == ANY_FP8 else build)
    if not isinstance(found, SafetensorsBuild):
        raise PlanError(
            f"build {found.name}: engines load safetensors; ask for fp8-channel, fp8-block or bf16, or save the model "
            "and convert it"
        )
    policy, state = open_policy(model, saved_as), tensors_of(model)
    sync = Sync(model, policy, found.plan(policy, Options()), gather, gather_bytes, to_rank)
    for step in sync.plan.steps:
        sync.check(step, state)
    return sync


@dataclass(frozen=True)
class Sync:
    """What `plan_sync` gives: an iterable of Served, anew after every step of the optimizer."""

    model: torch.nn.Module
    policy: Policy
    plan: BuildPlan
    gather: bool
    gather_bytes: int
    to_rank: int | None

    @cached_property
    def cuts(self) -> dict[str, Cut | None]:
        """How each fused tensor is gathered."""
        state = tensors_of(self.model)
        fused = {place.tensor for place in self.policy.places if place.is_fused}
        return {name: cut_of(state[name], self.policy.saved_as, self.gather_bytes) for name in fused if self.gather}

    @cached_property
    def steps(self) -> list[Step]:
        """In the order of the model's tensors, of pieces in them, and of rows."""
        order = {name: index for index, name in enumerate(tensors_of(self.model))}

        def place(step: Step) -> tuple[int, int, int]:
            tensor, piece = self._source(step)
            return order[tensor], piece, self.policy.places[step.weight].row

        return sorted(self.plan.steps, key=place)

    def _source(self, step: Step) -> tuple[str, int]:
        """Tensor that holds a weight, and the piece of it."""
        place, expert = self.policy.places[step.weight], self.policy.weights[step.weight].expert
        cut = self.cuts.get(place.tensor)
        return place.tensor, 0 if cut is None or expert is None else cut.piece(expert)

    @property
    def tensors(self) -> list[OutputTensor]:
        """Of the whole model, in the order in which iteration gives weights and their scales."""
        return [self.plan.tensors[index] for step in self.steps for index in step.tensors]

    @property
    def receives(self) -> bool:
        """Whether this rank is given tensors."""
        return self.to_rank is None or torch.distributed.get_rank() == self.to_rank

    def __iter__(self) -> Iterator[Served]:
        return self.walk(self.steps)

    @torch.no_grad()
    def walk(self, steps: Sequence[Step]) -> Iterator[Served]:
        """The weights of `steps` in that order; what holds them is kept from the first of its weights to the last."""
        state = tensors_of(self.model)
        held: dict[tuple[str, int], Held] = {}
        last = {self._source(step): index for index, step in enumerate(steps)}
        for index, step in enumerate(steps):
            source, place = self._source(step), self.policy.places[step.weight]
            if source not in held:
                held[source] = self._hold(place, source[1], state)
            weight = self.policy.weights[step.weight]
            found = held[source].rows_of(weight, place.row)
            if last[source] == index:
                del held[source]
            if found is not None:
                rows, scale = found
                if scale is None:
                    rows = rows.to(self.policy.saved_as or rows.dtype)
                    rows = rows if isinstance(step.storage, FP8) else rows.to(TORCH[step.parts[0].dtype])
                _check_finite(weight.name, rows)
                if self.receives:
                    yield self._served(step, rows, scale)
                del rows, scale
            del found

    def _hold(self, place: Place, piece: int, state: Mapping[str, torch.Tensor]) -> Held:
        tensor, scale = state[place.tensor], state[place.scale] if place.scale else None
        if place.is_fused and not self.gather:
            return hold_local(tensor, scale)
        return hold(tensor, scale, self.policy.saved_as, self.cuts.get(place.tensor), piece)

    def _served(self, step: Step, rows: torch.Tensor, scale: torch.Tensor | None) -> Served:
        names = [self.plan.tensors[index].name for index in step.tensors]
        if not isinstance(step.storage, FP8):
            return Served(names[0], _own(rows))
        if scale is None:
            q, scale = _quantize(rows, step.storage)
            return Served(names[0], q, scale, names[1])
        narrow = scale.to(TORCH[step.parts[1].dtype])  # of a file, which transformers may hold in fp32
        return Served(names[0], _own(rows), _own(narrow if narrow.float().equal(scale.float()) else scale), names[1])

    def check(self, step: Step, state: Mapping[str, torch.Tensor]) -> None:
        """Refuse a step that is not a cast of ours, or that would quantize again what the model stores in FP8.

        Raises:
            PlanError: which weight, and what to do.
        """
        weight, place, storage = self.policy.weights[step.weight], self.policy.places[step.weight], step.storage
        if not isinstance(storage, FP8 | Keep | ToBF16) or step.transform != UNCHANGED:
            raise PlanError(
                f"{weight.name}: {self.plan.name} stores it as {storage.name}, which needs a conversion of "
                "the saved checkpoint; ask for fp8-channel, fp8-block or bf16"
            )
        if place.scale is None:
            return
        rows, columns = matrix_shape(tuple(state[place.tensor].shape))
        expected = storage.scale_shape(rows, columns) if isinstance(storage, FP8) else "no scale"
        if (got := matrix_shape(tuple(state[place.scale].shape))) != expected:
            raise PlanError(
                f"{weight.name}: is stored in FP8 with scales {list(got)}, of which {self.plan.name} expects "
                f"{expected}; ask for the build that the model was loaded from, or ornith_moe.hf.master_weights(model)"
            )


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, contiguous; a copy of what is part of a larger one, which whoever keeps it would keep whole."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _quantize(rows: torch.Tensor, storage: FP8) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and BF16 scales of a matrix."""
    cast: ModuleType = fp8
    if rows.device.type != "cpu":
        from ornith_moe.kernels import fp8_cast as cast  # a machine without a GPU may have no Triton
    if storage.block == ROW:
        return cast.quantize_fp8_channel(rows, scale="bf16")
    return cast.quantize_fp8_block(rows, block=storage.block, scale="bf16")


def _check_finite(name: str, rows: torch.Tensor) -> None:
    """Refuse what `convert` refuses; on every rank alike, or the others would wait for this one."""
    if rows.dtype not in DTYPES or torch.stack(rows.aminmax()).isfinite().all():  # a GPU waits here
        return
    place = torch.nonzero(~rows.isfinite())[0].tolist()
    raise ConversionError(
        f"{name}: the value at {place} is {rows[tuple(place)].item()}; expected finite weights, so go back to a "
        "checkpoint before the step that made it"
    )
