"""Expert weights in FP8, quantized when their numbers have changed and not once per call.

A copy has the scales of the recipe (`ornith_moe.quant.recipes`), and the same numbers transposed beside it where the
recipe casts the gradient of the input and the backend multiplies FP8 only with the contraction contiguous.

A copy is kept per weight, and beside it a 64-bit digest of the numbers that each expert was quantized from. Every use,
in a forward, a recomputation or a backward, reads the experts that the call routes to, and quantizes again those whose
digest differs. So it does not matter who wrote the weight or how: an optimizer, `.data`, a flat buffer, numpy, a merged
adapter, another process. No sign that torch gives of a change, `_version` or an address, is trusted to show them all.

| what happens to a weight | what becomes of its copy |
|---|---|
| any write, of one element or all | the experts that it changed are quantized again, in place, when one is next used |
| other shape, strides, dtype, cast or scale | replaced |
| `weight.data = ...`, offloading: another storage | goes with the storage it was made from |
| FSDP2 empties the storage after use | goes when the next copy is made, so a model in shards is not kept whole in FP8 |
| `with unchanged():` | not checked again |

What a use sees is the weight as it is then. A backward after a write that autograd cannot see takes the new numbers, as
it does with weights that are not quantized. Refreshing in place is safe because no copy is saved between the passes:
autograd keeps the weight. A write while another thread multiplies is a race, as it is without FP8.

The check costs one reading of the routed experts (docs/numerics.md). On a CPU the digest is XXH3 of the bytes. On a GPU
it is computed by the kernel that quantizes, tile by tile: nothing waits for the device.

Quantized at every use, the routed experts alone: results of differentiable operations, such as weights under a
parametrization; tensors that are not plain memory; and all weights while a CUDA graph is captured, which then quantizes
whenever it is replayed.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import xxhash

from ornith_moe.quant import fp8
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import RECIPES, Cast

_THREAD_BYTES = 1 << 20  # of weights that pay for another thread


@dataclass(eq=False)
class _Copy:
    """Memory for the copy of one weight, and what is known of each expert in it."""

    made_as: tuple[Any, ...]
    operand: Operand
    storage: Callable[[], torch.UntypedStorage | None] | None = None  # a weak reference; None: used once
    digests: Any = None  # by expert on a CPU, by tile on a GPU, where 0 is a tile not quantized yet
    trust: tuple[Any, ...] = ()  # the promise and version under which `trusted` were compared
    trusted: set[int] = field(default_factory=set)
    lock: Any = field(default_factory=threading.Lock)


_copies: dict[tuple[int, Any], _Copy] = {}  # by id of the storage, removed before that id is free again, and offset
_lock = threading.RLock()  # backward runs in threads of its own
_promise: ContextVar[object | None] = ContextVar("unchanged", default=None)


def quantized_weights(
    weight: torch.Tensor,
    recipe: str,
    scale: str = "fp32",
    experts: torch.Tensor | None = None,
    *,
    transposed: bool | None = None,
) -> Operand:
    """The FP8 copy of `weight` that `recipe` needs, as the weight is now.

    Args:
        weight: [E, N, K] (or [..., N, K]), fp32, fp16 or BF16: a parameter, an alias or a view of one.
        recipe: one that casts weights, of `ornith_moe.quant.recipes`.
        scale: dtype of block scales, "fp32", "bf16" or "ue8m0"; those of rows are always BF16, as in their files.
        experts: [E] bool on the device of the weight, those to be looked at; None for all. What the others hold is
            undefined, or old.
        transposed: with the transposed pair; None: where the recipe casts the gradient of the input.
    Returns:
        Operand. The next use of the weight gives the same tensors, refreshed in place; nobody else may write to them.
    Raises:
        ValueError: unknown recipe or scale. TypeError: another dtype.
    Numerics: `ornith_moe.quant.fp8` on the CPU and its Triton twin elsewhere, which give the same bits. A changed
        expert is missed with probability 2^-64 on a CPU; a GPU always sees one changed element of a tile, and misses
        other changes about as seldom.
    Streams: quantized on the current stream. Work on another stream waits for it as it does for the weight.
    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.randn(2, 256, 384))
        >>> first = quantized_weights(weight, "fp8")
        >>> weight.data[1].mul_(2) is None, weight._version
        (False, 0)
        >>> quantized_weights(weight, "fp8") is first, first.scale[1].equal(quantized_weights(weight[1], "fp8").scale)
        (True, True)
    """
    row = RECIPES.get(recipe)
    if row is None or row.weights is None:
        known = ", ".join(name for name, one in RECIPES.items() if one.is_fp8)
        raise ValueError(f"recipe: expected one of {known}, got {recipe!r}")
    if scale not in fp8.SCALES:
        raise ValueError(f"scale: expected 'fp32', 'bf16' or 'ue8m0', got {scale!r}")
    if weight.dtype not in fp8.FLOATS:
        raise TypeError(f"weight: expected float32, float16 or bfloat16, got {weight.dtype}; convert it first")
    transposed = row.input_gradient is not None if transposed is None else transposed
    copy = _copy_of(weight, row.weights, row.scale_of_weights(scale), transposed)
    with copy.lock, torch.no_grad():
        _refresh(copy, weight.detach(), row.weights, experts)
    return copy.operand


@contextmanager
def unchanged() -> Iterator[None]:
    """Inside, this thread's calls check each expert of a weight once and not again: the caller writes to no weight.

    For a rollout between two updates, or the micro-batches between two optimizer steps; end it before the step. A write
    inside that raises `weight._version` is still seen, one past it is not. Autograd runs a backward on a GPU in a
    thread of its own, which checks. On a GPU the first use checks all experts, not those that it routes to.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 128, 128))
        >>> with unchanged():
        ...     before = quantized_weights(weight, "fp8").scale.clone()
        ...     _ = weight.data.mul_(2)  # against the promise
        ...     print(quantized_weights(weight, "fp8").scale.equal(before))
        True
        >>> quantized_weights(weight, "fp8").scale.equal(before)
        False
    """
    token = _promise.set(_promise.get() or object())
    try:
        yield
    finally:
        _promise.reset(token)


def forget_quantized_weights() -> None:
    """Drop every copy and free its memory; no change of a weight needs it."""
    with _lock:
        _copies.clear()


def _copy_of(weight: torch.Tensor, block: Cast, scale: str, transposed: bool) -> _Copy:
    """The copy kept for `weight`, or memory for one."""
    made_as = (block, scale, transposed, weight.shape, weight.stride(), weight.dtype)
    if not _is_lasting(weight):
        return _Copy(made_as, _allocate(weight, block, scale, transposed))
    storage = weight.untyped_storage()
    key = (id(storage), weight.storage_offset())

    def drop(_: object = None) -> None:
        _copies.pop(key, None)

    with _lock:
        copy = _copies.get(key)
        if copy is None or copy.storage is None or copy.storage() is not storage or copy.made_as != made_as:
            del copy
            drop()  # the old copy goes before memory for the new one is taken
            _drop_emptied()
            with torch.inference_mode(False):  # what is made inside of it could not be saved for a backward pass
                operand = _allocate(weight, block, scale, transposed)
                digests = {} if weight.is_cpu else _device_casts().new_digests(weight, block)
            _copies[key] = copy = _Copy(made_as, operand, weakref.ref(storage, drop), digests)
        return copy


def _is_lasting(weight: torch.Tensor) -> bool:
    """Whether `weight` is plain memory that comes again."""
    plain = type(weight).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and not weight.is_meta
    if not plain or not weight.is_leaf:
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _drop_emptied() -> None:
    for key, copy in _copies.copy().items():
        storage = copy.storage() if copy.storage else None
        if storage is None or not storage.size():
            _copies.pop(key, None)


def _allocate(weight: torch.Tensor, block: Cast, scale: str, transposed: bool) -> Operand:
    (bn, bk), (*lead, n, k) = block, weight.shape
    grid = (-(-n // bn), -(-k // bk) if bk else 1)
    sizes: list[tuple[tuple[int, ...], torch.dtype]] = [((n, k), torch.float8_e4m3fn), (grid, fp8.SCALES[scale][0])]
    if transposed:
        sizes += [((k, n), torch.float8_e4m3fn), (grid[::-1], fp8.SCALES[scale][0])]
    return Operand(*(torch.empty(*lead, *size, dtype=dtype, device=weight.device) for size, dtype in sizes))


def _refresh(copy: _Copy, weight: torch.Tensor, block: Cast, experts: torch.Tensor | None) -> None:
    """Quantize what has changed of `experts`."""
    promise = _promise.get()
    trust = (promise, None if weight.is_inference() else weight._version)
    if promise is None or copy.trust != trust:
        copy.trust, copy.trusted = trust, set()
    refresh = _refresh_on_cpu if weight.is_cpu else _refresh_on_device
    refresh(copy, weight, block, experts, promise is not None and copy.storage is not None)


def _refresh_on_device(copy: _Copy, weight: torch.Tensor, block: Cast, experts: Any, trusting: bool) -> None:
    if not copy.trusted:
        experts = None if trusting else experts  # which those are, only the device knows
        _device_casts().quantize_fp8_experts(weight, *copy.operand, experts, copy.digests, block=block)
        copy.trusted = set(range(len(weight))) if trusting else set()


def _refresh_on_cpu(copy: _Copy, weight: torch.Tensor, block: Cast, experts: Any, trusting: bool) -> None:
    weight = _matrices(weight)
    chosen = range(len(weight)) if experts is None else experts.nonzero().flatten().tolist()
    chosen = [e for e in chosen if e not in copy.trusted]
    if copy.storage is None:
        _quantize(weight, copy.operand, block, chosen)
        return
    found = _digests(weight, chosen)
    if any(copy.digests.get(e) != digest for e, digest in found.items()):
        # Whatever wrote one expert has written others: all that changed, so that a step's next batch has none to do.
        found |= _digests(weight, [e for e in range(len(weight)) if e not in found])
        stale = {e: digest for e, digest in sorted(found.items()) if copy.digests.get(e) != digest}
        for e in stale:
            copy.digests.pop(e, None)  # should quantizing fail
        _quantize(weight, copy.operand, block, list(stale))
        copy.digests |= stale
    if trusting:
        copy.trusted.update(found)


def _quantize(weight: torch.Tensor, copy: Operand, block: Cast, experts: list[int]) -> None:
    assert copy.scale is not None
    q, scale = _matrices(copy.value), _matrices(copy.scale)
    fp8.quantize_fp8_experts(weight, q, scale, experts, block=block)
    if copy.value_t is not None and copy.scale_t is not None:
        q_t, scale_t = _matrices(copy.value_t), _matrices(copy.scale_t)
        for e in experts:
            q_t[e], scale_t[e] = q[e].mT, scale[e].mT


def _matrices(t: torch.Tensor) -> torch.Tensor:
    return t.flatten(0, -3) if t.dim() > 2 else t[None]


def _device_casts() -> ModuleType:
    from ornith_moe.kernels import fp8_cast  # a machine without a GPU may have no Triton

    return fp8_cast


def _digests(weight: torch.Tensor, experts: Sequence[int]) -> dict[int, int]:
    """{expert: XXH3 of its memory}, read by address: torch never resizes a storage that numpy() has lent out."""
    per_thread = max(1, _THREAD_BYTES // max(weight[:1].nbytes, 1))
    threads = min(torch.get_num_threads(), -(-len(experts) // per_thread))
    if threads < 2:
        return {e: _digest(weight[e]) for e in experts}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(experts, pool.map(lambda e: _digest(weight[e]), experts), strict=True))


def _digest(matrix: torch.Tensor) -> int:
    if not (matrix.is_contiguous() or matrix.mT.is_contiguous()):
        matrix = matrix.contiguous()
    return xxhash.xxh3_64_intdigest((ctypes.c_char * matrix.nbytes).from_address(matrix.data_ptr()))
