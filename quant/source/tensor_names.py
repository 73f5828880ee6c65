"""What the name of a tensor tells: a buffer, a part of an adapter, quantized storage, or a weight behind a wrapper.

Checkpoints carry more than weights, and weights under more than one name. Training code wraps a model (`module.` of
DDP, `_orig_mod.` of torch.compile, `base_model.model.` of PEFT, `_fsdp_wrapped_module.` in the middle), or reverts a
renaming once too often (`model.language_model.language_model.`). A canonical name is what transformers saves:

    {wrappers}{model., language_model. any number of times}layers.0.x  ->  {prefix}layers.0.x

The lists are narrow on purpose: what none of them knows stays what it is, and is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.source.architectures import mtp_segments, top_level

# Computed by the model itself, or bookkeeping: what other programs, or older ones, saved beside the weights.
_BUFFER = re.compile(
    r"(?:^|\.)(?:"
    r"rotary\w*\.\w*(?:inv_freq|cos_cached|sin_cached)|position_ids|embed_tokens\.embed_scale"
    r"|(?:self_)?attn(?:ention)?\.(?:masked_bias|bias|mask|causal_mask)|masked_bias|causal_mask"
    r"|rope\.freqs|freqs_cis|token_type_ids|num_batches_tracked"
    r"|_extra_state|total_ops|total_params"  # of Megatron and thop
    r")$"
)
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_\w+|hada_\w+|lokr_\w+|oft_\w+|vera_\w+|ia3_\w+|modules_to_save)(?:\.|$)", re.I)
_QUANTIZED = re.compile(
    r"(?:^|\.)(?:\w*(?:weight|input|output|proj|[qkv])_(?:scale|scale_inv|scale_2|global_scale|scales|blocks|packed|zero_point|shape)"
    r"|qweight|qzeros|scales|g_idx|SCB"
    r"|weight\.(?:absmax|quant_map|nested_\w+|quant_state\.\w+))$"
)
_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
     "base_layer"}
)  # fmt: skip
_ROOTS = frozenset({"model", "base_model", "language_model"})


def is_buffer(name: str) -> bool:
    """Whether it is a buffer that every model computes for itself."""
    return _BUFFER.search(name) is not None


def is_mtp(name: str) -> bool:
    """Whether it belongs to multi-token prediction, under whatever wrapper."""
    return next((part for part in name.split(".") if part not in _WRAPPERS | _ROOTS), None) in mtp_segments()


def is_spare(name: str) -> bool:
    """Whether a model may be whole without it, so that an index and its shards may differ in it."""
    return is_buffer(name) or is_mtp(name) or name.endswith("lm_head.weight")


def is_adapter(name: str) -> bool:
    """Whether it belongs to an adapter (LoRA and its kin) that was not merged into the weights."""
    return _ADAPTER.search(name) is not None


def is_quantization(name: str) -> bool:
    """Whether it is a scale, a zero point or packed codes of a quantized weight."""
    return _QUANTIZED.search(name) is not None and not is_buffer(name)


def canonical_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """{name: canonical name}, one-to-one; names that are not recognized stay.

    Args:
        names: of all tensors of a checkpoint; leading segments that all of them share are a wrapper's too.
        prefix: of the text model, `model.` or `model.language_model.`.
    Raises:
        CheckpointError: two tensors would have one name.
    """
    places = top_level()
    split = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in names}
    shared = _shared(list(split.values()))
    canonical: dict[str, str] = {}
    holder: dict[str, str] = {}
    for name, parts in split.items():
        known = [part in places for part in parts]
        start = known.index(True) if True in known else len(parts)
        recognized = start < len(parts) and all(part in _ROOTS for part in parts[min(shared, start) : start])
        before = places[parts[start]] if recognized else None
        target = (prefix if before is None else before) + ".".join(parts[start:]) if recognized else name
        if target in holder:
            raise CheckpointError(
                f"tensors {brief(holder[target])} and {brief(name)} are both {brief(target)}; keep one of them"
            )
        canonical[name], holder[target] = target, name
    return canonical


def _shared(lists: list[list[str]]) -> int:
    """How many leading items all of the lists share."""
    first, last = min(lists, default=[]), max(lists, default=[])
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
