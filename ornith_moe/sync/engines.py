"""From a live policy into an engine: the calls that vLLM and SGLang publish, and a plain callback.

    vLLM       vllm_weight_source(model, ...)            a WeightSource for WeightTransferTrainerFactory.trainer_init
               model.load_weights(named_tensors(...))    inside a worker
    SGLang     send_to_sglang(engine, served)            engine.update_weights_from_tensor, in buckets
    any other  send(served, update)                      update([(name, tensor), ...]), in buckets

Names are those of the build's files, so the engine has to be started from such a build (its config says how the weights
are quantized), and loads a sync by the code that has loaded the files. Neither engine is imported unless it is asked
for. Signatures as read in vLLM 0.29 (vllm/distributed/weight_transfer/base.py) and SGLang's main of November 2026
(python/sglang/srt/entrypoints/engine.py); neither was run here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ornith_moe.sync.served import GATHER_BYTES, TORCH, Served, named_tensors, plan_sync

Bucket = list[tuple[str, torch.Tensor]]
BUCKET_BYTES = 512 << 20


def buckets(served: Iterable[Served], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """[(name, tensor), ...] of at most so many bytes, or of one weight; a weight and its scale are not parted.

    Raises:
        ValueError: `bucket_bytes` below 1.
    Example:
        >>> parts = [Served(name, torch.zeros(4)) for name in "abc"]
        >>> [[name for name, _ in bucket] for bucket in buckets(parts, 32)]
        [['a', 'b'], ['c']]
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes: expected at least 1, got {bucket_bytes}")
    bucket: Bucket = []
    filled = 0
    for one in served:
        pairs = list(one.pairs())
        size = sum(tensor.nbytes for _, tensor in pairs)
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket += pairs
        filled += size
    if bucket:
        yield bucket


def send(served: Iterable[Served], update: Callable[[Bucket], object], *, bucket_bytes: int = BUCKET_BYTES) -> int:
    """Call `update` with one bucket after another: for an engine of one's own, or a transport.

    Returns:
        How many bytes were sent.
    """
    sent = 0
    for bucket in buckets(served, bucket_bytes):
        update(bucket)
        sent += sum(tensor.nbytes for _, tensor in bucket)
    return sent


def send_to_sglang(
    engine: Any, served: Iterable[Served], *, bucket_bytes: int = BUCKET_BYTES, load_format: str | None = None
) -> int:
    """Update an `sglang.Engine`, whose cache is flushed once, with the last bucket.

    Args:
        engine: with `update_weights_from_tensor(named_tensors, load_format, flush_cache)`. With
            `served_weights(..., to_rank=0)` other ranks have nothing to send, and may pass None.
    Returns:
        How many bytes were sent.
    Raises:
        RuntimeError: the engine says that a bucket could not be loaded.
    """
    waiting: Bucket = []
    sent = 0

    def update(bucket: Bucket, *, is_last: bool) -> int:
        answer = engine.update_weights_from_tensor(bucket, load_format=load_format, flush_cache=is_last)
        success, message = answer[:2] if isinstance(answer, tuple) else (answer is not False, "")
        if not success:
            raise RuntimeError(
                f"SGLang did not load {bucket[0][0]} and {len(bucket) - 1} more: {message}; start the engine from the "
                "build that is sent"
            )
        return sum(tensor.nbytes for _, tensor in bucket)

    for bucket in buckets(served, bucket_bytes):
        if waiting:
            sent += update(waiting, is_last=False)
        waiting = bucket
    return sent + (update(waiting, is_last=True) if waiting else 0)


def vllm_weight_source(
    model: torch.nn.Module,
    build: str = "FP8",
    *,
    saved_as: torch.dtype | None = torch.bfloat16,
    gather_bytes: int = GATHER_BYTES,
    to_rank: int | None = None,
) -> Any:
    """A `WeightSource` of vLLM over a live policy: `metadata()` at no cost, and a fresh pass per iteration.

    Args:
        model, build, saved_as, gather_bytes, to_rank: as `served_weights`; planned once. Every rank of the trainer
            iterates, whichever sends.
    Returns:
        An instance of vllm.distributed.weight_transfer.base.WeightSource. Metadata and tensors have one order.
    Raises:
        ImportError: there is no vLLM with that class. PlanError: as `served_weights`.
    Example:
        >>> from vllm.distributed.weight_transfer import WeightTransferTrainerFactory              # doctest: +SKIP
        >>> trainer = WeightTransferTrainerFactory.trainer_init(                                   # doctest: +SKIP
        ...     config, init_info, client=client, source=vllm_weight_source(model, "fp8-channel"))
        >>> trainer.send_weights()                                                                 # doctest: +SKIP
    """
    try:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    except ImportError as error:
        raise ImportError(
            "vllm_weight_source: needs vllm >= 0.26 in the trainer's environment, for its WeightSource; install it, or "
            "send named_tensors(served_weights(model)) by a transport of your own"
        ) from error
    sync = plan_sync(model, build, saved_as=saved_as, gather_bytes=gather_bytes, to_rank=to_rank)

    class PolicySource(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(t.name, TORCH[t.dtype], tuple(t.shape)) for t in sync.tensors]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return named_tensors(sync)

    return PolicySource()
