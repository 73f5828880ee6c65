"""Expert weights in FP8, quantized once per optimizer step and not once per micro-batch.

    recipe        q, scale                        q_t, scale_t
    fp8           128x128 blocks
    fp8_full      128x128 blocks                  the same transposed, for the FP8 gradient of the input
    fp8_channel   one BF16 scale per output row

A parameter has one entry, found by its storage and its place in it: what autograd, checkpointing and compiled graphs
hand to a backward is an alias of the parameter, with the same version. What may change a weight, and what notices it:

- In-place updates (`copy_`, `load_state_dict`, most optimizers) raise `_version`.
- `weight.data = ...`, offloading and reallocation change the storage, its address, the shape or the strides.
- An optimizer may change a weight without raising its version: those of torch with `fused=True` do (torch 2.13), and
  FSDP2, Megatron and DeepSpeed step a shard or a master copy and then write through another tensor. So the end of a
  step of any `torch.optim.Optimizer` drops all entries.
- Nothing notices writes through `weight.data` or a flat buffer outside of a step, such as loading a checkpoint into
  the shards of FSDP2: call `forget_quantized_weights`.

An entry goes with the storage it was made from. FSDP2 empties the storage
of a layer after use; entries of such layers go at the next miss, so that a model kept in shards is not kept whole in
FP8. Quantized at every call are results of differentiable operations, inference tensors (they have no version), meta
tensors, and all weights while a CUDA graph is captured, which must quantize when it is replayed.
"""

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ornith_moe.quant import fp8

_RECIPES = ("fp8", "fp8_full", "fp8_channel")


class FP8Weights(NamedTuple):
    """w' = q * scale; `q_t` [..., K, N] and `scale_t` are q and scale transposed, contiguous, or None."""

    q: torch.Tensor
    scale: torch.Tensor
    q_t: torch.Tensor | None = None
    scale_t: torch.Tensor | None = None


class _Entry(NamedTuple):
    storage: weakref.ref
    state: tuple[Any, ...]
    quantized: tuple[torch.Tensor | None, ...]


_entries: dict[tuple[int, int], _Entry] = {}  # by id of the storage, removed before that id is free again, and address
_lock = threading.RLock()  # backward runs in threads of its own


def quantized_weights(weight: torch.Tensor, recipe: str, scale: str = "fp32") -> FP8Weights:
    """The FP8 copy of `weight` that `recipe` needs, from the cache while the weight has not changed.

    Args:
        weight: [E, N, K] (or [..., N, K]), fp32, fp16 or BF16: a parameter, or an alias of one (`weight.detach()`, but
            not `weight.data`, whose version is another).
        recipe: "fp8", "fp8_full" or "fp8_channel".
        scale: dtype of block scales, "fp32" or "ue8m0"; those of fp8_channel are always BF16, as in its files.
    Returns:
        FP8Weights. With a cache hit these are the same tensors as before; nobody may write to them.
    Raises:
        ValueError: unknown recipe or scale. TypeError: another dtype.
    Numerics: `ornith_moe.quant.fp8` on the CPU and its Triton twin elsewhere, which give the same bits.
    Streams: quantized on the current stream. Work on another stream waits for it as it does for the weight.
    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.randn(2, 256, 384))
        >>> first = quantized_weights(weight, "fp8_full")
        >>> first.q_t.shape, quantized_weights(weight, "fp8_full") is first
        (torch.Size([2, 384, 256]), True)
    """
    if recipe not in _RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(_RECIPES)}, got {recipe!r}")
    return _kept(weight, (recipe, scale), lambda: _quantize(weight, recipe, scale))


def turned_weights(q: torch.Tensor, scale: torch.Tensor) -> FP8Weights:
    """The FP8Weights of a weight that is stored as (q, scale) in 128x128 blocks, with the transposed copy of fp8_full.

    Args:
        q: [E, N, K] e4m3, itself the key of the copy. scale: [E, ceil(N / 128), ceil(K / 128)].
    Returns:
        FP8Weights, kept like those of `quantized_weights`, while neither q nor scale changes.
    Example:
        >>> import torch
        >>> q, scale = torch.zeros(2, 256, 384).to(torch.float8_e4m3fn), torch.ones(2, 2, 3)
        >>> turned_weights(q, scale).q_t.shape
        torch.Size([2, 384, 256])
    """
    state = ("turned", scale.data_ptr(), None if scale.is_inference() else scale._version)
    turned = _kept(q, state, lambda: (q.detach().mT.contiguous(), scale.detach().mT.contiguous()))
    return FP8Weights(q, scale, *turned)  # the entry holds only the copy: holding q, it would keep q alive


def _kept(weight, made_as, make):
    """`make()`, or what it gave before for the same `weight` in the same state."""
    if not _is_lasting(weight):
        return make()
    storage = weight.untyped_storage()
    key = (id(storage), weight.data_ptr())
    state = (*made_as, weight._version, weight.shape, weight.stride(), weight.dtype)

    def drop(_):
        _entries.pop(key, None)

    with _lock:
        entry = _entries.get(key)
        if entry and entry.storage() is storage and entry.state == state:
            return entry.quantized
        del entry
        drop(None)  # the old copy goes before the new one is made
        _drop_emptied()
        with torch.inference_mode(False):  # what is made inside of it could not be saved for a backward pass
            quantized = make()
        _entries[key] = _Entry(weakref.ref(storage, drop), state, quantized)
        return quantized


def forget_quantized_weights() -> None:
    """Drop every copy: after weights were written in a way that the module's table says nothing notices."""
    with _lock:
        _entries.clear()


register_optimizer_step_post_hook(lambda *_: forget_quantized_weights())


def _is_lasting(weight):
    """Whether `weight` is a tensor that comes again and whose changes can be seen."""
    if not weight.is_leaf or weight.is_inference() or weight.is_meta:
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _drop_emptied():
    for key, entry in _entries.copy().items():
        storage = entry.storage()
        if storage is None or not storage.size():
            _entries.pop(key, None)


def _quantize(weight, recipe, scale):
    casts = fp8
    if weight.device.type != "cpu":
        from ornith_moe.kernels import fp8_cast as casts  # a machine without a GPU may have no Triton
    if recipe == "fp8_channel":
        return FP8Weights(*casts.quantize_fp8_channel(weight))
    if recipe == "fp8_full":
        return FP8Weights(*casts.quantize_fp8_block_both(weight, scale=scale))
    return FP8Weights(*casts.quantize_fp8_block(weight, scale=scale))
