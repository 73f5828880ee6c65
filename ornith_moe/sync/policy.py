"""A live policy as a source: which of a model's tensors holds which weight of its checkpoint.

    model -> config -> architecture -> weights (experts one by one) -> rows of the model's tensors

To a build this is one more `Source` (quant/source/source.py): the architecture says what weights there are, the build
what becomes of each, and neither asks whether they lie in a file or in a trainer. Names are those of the checkpoint
that `save_pretrained` would write, whatever wraps the model: DDP, torch.compile, PEFT, FSDP or a multimodal model.

Tensors come from `state_dict()`, which has the buffers that a checkpoint has (Gemma 4's `layer_scalar`) and which FSDP2
answers with its shards, whatever it has gathered at the time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.source.accounts import bare, some
from ornith_moe.quant.source.architectures import FAMILIES, Architecture, architecture
from ornith_moe.quant.source.architectures.weight import Weight
from ornith_moe.quant.source.reconcile import HEAD
from ornith_moe.quant.source.source import ConfigSource
from ornith_moe.quant.source.tensor_names import canonical_names, is_adapter, is_buffer, is_quantization

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
SCALES = ("_scale_inv", "_scale")  # how the scales of a stored FP8 tensor are called, after its own name


@dataclass(frozen=True, slots=True)
class Place:
    """Rows [row, row + rows of the weight) of the model's tensor `tensor`, seen as a matrix."""

    tensor: str
    row: int
    is_fused: bool  # with other experts
    dtype: torch.dtype
    scale: str | None = None  # the tensor with its scales, if it is stored FP8


@dataclass(frozen=True, kw_only=True)
class Policy(ConfigSource):
    """The weights of a model in memory, enough for a plan; `saved_as` is the dtype that its checkpoint would have."""

    places: tuple[Place, ...]
    saved_as: torch.dtype | None

    def dtype(self, index: int) -> str:
        """Stored FP8 counts as BF16: that is what its build was made from."""
        return DTYPES.get(self.saved_as or self.places[index].dtype, "BF16")


def open_policy(model: torch.nn.Module, saved_as: torch.dtype | None) -> Policy:
    """Tie every weight of the model's architecture to its tensors; nothing is read or gathered.

    Raises:
        PlanError: no model of transformers, or of an architecture that is known; an adapter that is not merged; a
            weight that is missing, of another shape, or of a dtype that no checkpoint has.
    """
    module = config_holder(model)
    config = json.loads(module.config.to_json_string())
    known = [name for family in FAMILIES for name in family.MODEL_TYPES]
    if config.get("model_type") not in known:
        raise PlanError(
            f"{type(module).__name__}: model_type {brief(config.get('model_type'))} is of no architecture that builds "
            f"know, expected one of {', '.join(known)}; send its state_dict() as it is, or describe it by a subclass "
            "of ornith_moe.quant.source.architectures.Architecture"
        )
    family = architecture(config)
    state = tensors_of(model)
    prefix = _saved_prefix(module, family)
    names = {canonical: name for name, canonical in canonical_names(state, prefix).items()}
    if family.tied and HEAD in names:
        if state[names[HEAD]] is not state[names.get(f"{prefix}embed_tokens.weight", names[HEAD])]:
            raise PlanError(
                f"{names[HEAD]}: the config ties it to the embedding, but it is a parameter of its own; call "
                "model.tie_weights() before it is sharded, or set config.tie_word_embeddings to False"
            )
        del names[HEAD]
    vision = any(map(family.is_vision, names))
    weights = tuple(family.weights(prefix, vision=vision, mtp=any(map(family.is_mtp, names))))
    places = tuple(_place(weight, names, state) for weight in weights)
    held = {place.tensor for place in places} | {place.scale for place in places}
    if stray := sorted(name for name in names.values() if name not in held and not is_quantization(name)):
        raise PlanError(
            f"{type(module).__name__}: {some('tensor', stray)}, no weight of {brief(config['model_type'])}; remove "
            "what was added to the model, or send its state_dict() as it is"
        )
    return Policy(
        name=type(module).__name__,
        config=config,
        architecture=family,
        weights=weights,
        has_mtp=any(weight.role == "mtp" for weight in weights),
        places=places,
        saved_as=saved_as,
    )


def config_holder(model: torch.nn.Module) -> Any:
    """The model of transformers in whatever wraps it.

    Raises:
        PlanError: there is none.
    """
    from transformers import PreTrainedModel  # not at import: it takes seconds

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise PlanError(
        f"{type(model).__name__}: no model of transformers in it, so nothing says which weights it has; pass one with "
        "a config, such as AutoModelForCausalLM gives"
    )


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{name: the model's own tensor} of all that a checkpoint would hold, adapters that are merged left out.

    Raises:
        PlanError: an adapter that is not merged.
    """
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    state = {name: tensor for name, tensor in state.items() if not is_buffer(name)}
    if adapter := [name for name in state if is_adapter(name)]:
        if not _adapters_are_merged(model.modules()):
            raise PlanError(
                f"{some('tensor', adapter)}, of an adapter that is not merged; call merge_adapter() before the sync "
                "and unmerge_adapter() after it"
            )
        state = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    return state


def _adapters_are_merged(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether every layer with an adapter of PEFT has it in its base weight."""
    layers = [module for module in modules if hasattr(module, "merged_adapters") and hasattr(module, "base_layer")]
    return bool(layers) and all(layer.merged for layer in layers)


def _saved_prefix(module: Any, family: Architecture) -> str:
    """How names of the text model begin in the checkpoint that `save_pretrained` writes.

    A text model that was loaded from a multimodal checkpoint gets that one's prefix back, which transformers alone
    knows; it is asked for the name of one empty tensor.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers before 5
        return family.prefix
    probe = f"{family.prefix}embed_tokens.weight"
    return family.prefix_of(revert_weight_conversion(module, {probe: torch.empty(0, device="meta")}))


def _place(weight: Weight, names: Mapping[str, str], state: Mapping[str, torch.Tensor]) -> Place:
    """Where the model holds `weight`: in a tensor of its own, or in the fused one of all experts."""
    packed = weight.packed
    name, shape, row = names.get(weight.name), weight.shape, 0
    if name is None and packed is not None:
        name, shape, row = names.get(packed.name), packed.shape, packed.row
    if name is None:
        raise PlanError(
            f"{weight.name}: the model has no such weight{f' (nor {packed.name})' if packed else ''}; sync the whole "
            "model, as its config describes it"
        )
    tensor = state[name]
    if tuple(tensor.shape) != shape:
        raise PlanError(
            f"{name}: expected {list(shape)}, got {list(tensor.shape)}; local shards are given as DTensors, or as the "
            "whole tensor"
        )
    if tensor.dtype in DTYPES:
        return Place(name, row, shape != weight.shape, tensor.dtype)
    scale = next((name + suffix for suffix in SCALES if name + suffix in state), None)
    if tensor.dtype != torch.float8_e4m3fn or scale is None:
        raise PlanError(
            f"{bare(name)}: {tensor.dtype} is stored in no build of ours; expected float32, bfloat16, float16, or "
            "float8_e4m3fn with its scales beside it"
        )
    return Place(name, row, shape != weight.shape, tensor.dtype, scale)
