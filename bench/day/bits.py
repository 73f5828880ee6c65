"""What a GPU must give bit for bit, recorded in Triton's interpreter: casts, encoders, plan and routing.

    python bench/gpu_day.py --record        writes bits.json, {what: SHA-256 of dtypes, shapes and bytes}

Inputs are made by integer arithmetic and exact in FP32, so that every machine has the same ones. Not recorded: what is
summed by a matrix unit, and routing weights, whose exp differs in its last bits; the router's logits are quarters, so
that what it chooses cannot follow from those.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from ornith_moe.kernels import fp8_cast, gguf_encode, plan, routing
from ornith_moe.quant.recipes import BLOCK, ROW

RECORD = Path(__file__).with_name("bits.json")
Tensors = Sequence[torch.Tensor]
Case = tuple[str, str, Callable[[str], Tensors]]  # suite, name, what computes it on a device


def exact(seed: int, *shape: int) -> torch.Tensor:
    """About normal numbers: four random integers of 16 bits, added and scaled by a power of two."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 16, (4, *shape))
    return torch.from_numpy(((drawn.sum(0) - (1 << 17)) * 2.0**-15).astype(np.float32))


def digest(tensors: Tensors) -> str:
    """SHA-256 of dtypes, shapes and bytes, in 24 digits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:24]


def cases() -> Iterator[Case]:
    """Every recorded case."""
    yield from _casts()
    yield from _encoders()
    yield from _plans()
    yield from _routings()


def _casts() -> Iterator[Case]:
    w, x = exact(1, 2, 130, 200), exact(2, 17, 300)
    for dtype in (torch.bfloat16, torch.float32):
        of = f"of {str(dtype).removeprefix('torch.')}"
        for scale in ("fp32", "bf16", "ue8m0"):
            yield "casts", f"block, {scale}, {of}", _on(fp8_cast.quantize_fp8_block, w.to(dtype), scale=scale)
        yield "casts", f"block both ways, {of}", _on(fp8_cast.quantize_fp8_block_both, w.to(dtype))
        for scale in ("fp32", "bf16"):
            yield "casts", f"row, {scale}, {of}", _on(fp8_cast.quantize_fp8_channel, w.to(dtype), scale=scale)
        for scale in ("fp32", "ue8m0"):
            yield "casts", f"tokens, {scale}, {of}", _on(fp8_cast.quantize_fp8_tokens, x.to(dtype), scale=scale)
        yield "casts", f"whole tokens, {of}", _on(fp8_cast.quantize_fp8_tokens, x.to(dtype), group=None)
        yield "casts", f"tokens and back, {of}", _on(lambda x: (fp8_cast.roundtrip_fp8_tokens(x),), x.to(dtype))
    both, row = fp8_cast.quantize_fp8_block_both, fp8_cast.quantize_fp8_channel
    yield "casts", "block, digests", _on(lambda w: _digests(w, both(w), BLOCK), w.bfloat16())
    yield "casts", "row, digests", _on(lambda w: _digests(w, row(w), ROW), w.bfloat16())


def _digests(w: torch.Tensor, copy: Tensors, block: tuple[int, int | None]) -> Tensors:
    q, scale, *both = (torch.zeros_like(t.view(torch.uint8)).view(t.dtype) for t in copy)
    q_t, scale_t = both or (None, None)
    digests = fp8_cast.new_digests(w, block)
    fp8_cast.quantize_fp8_experts(w, q, scale, q_t, scale_t, None, digests, block=block)
    return (q, scale, digests)


def _encoders() -> Iterator[Case]:
    importance = exact(4, 512).abs().numpy() + np.float32(2**-10)
    for name in gguf_encode.ENCODED:
        for imatrix in (None, importance) if name != "Q8_0" else (None,):
            with_it = " with importance" if imatrix is not None else ""

            def encode(x: torch.Tensor, name: str = name, imatrix: np.ndarray | None = imatrix) -> Tensors:
                return (gguf_encode.quantize_gguf(x, name, imatrix=imatrix),)

            yield "encoders", f"{name}{with_it}", _on(encode, exact(3, 3, 512).bfloat16())


def _plans() -> Iterator[Case]:
    def made(indices: torch.Tensor, block_m: int) -> Tensors:
        found = plan.build_plan(indices, 60, block_m)
        every = (getattr(found, each.name) for each in fields(found))
        return [t for t in every if isinstance(t, torch.Tensor)]

    drawn = np.random.default_rng(5).integers(-3, 63, (300, 4))  # sentinels on both sides
    for block_m in (16, 64, 128):
        yield "plan", f"300 x 4 of 60, tiles of {block_m}", _on(made, torch.from_numpy(drawn), block_m=block_m)


def _routings() -> Iterator[Case]:
    logits = torch.from_numpy(np.random.default_rng(6).integers(-24, 25, (40, 64)) / np.float32(4))
    bias = torch.from_numpy(np.random.default_rng(7).integers(-4, 5, 64) / np.float32(4))
    for score, groups in itertools.product(("softmax", "sigmoid"), (None, 8)):

        def made(logits: torch.Tensor, score: str = score, groups: int | None = groups) -> Tensors:
            there = bias.to(logits.device) if groups else None
            open_groups = groups and 3
            indices, _, counts, *_ = routing.route_forward(
                logits, 6, score=score, n_group=groups, topk_group=open_groups, bias=there
            )
            return indices, counts

        yield "routing", f"{score}, 6 of 64{', 3 of 8 groups' if groups else ''}", _on(made, logits)


def _on(call: Callable[..., Tensors], tensor: torch.Tensor, **options: object) -> Callable[[str], Tensors]:
    """`call` of the tensor on a device."""
    return lambda device: call(tensor.to(device), **options)


def record() -> dict[str, str]:
    """Compute every case in the interpreter."""
    return {f"{suite}: {name}": digest(run("cpu")) for suite, name, run in cases()}


def write(path: Path = RECORD) -> None:
    path.write_text(json.dumps(record(), indent=0) + "\n", encoding="utf-8")


def recorded(path: Path = RECORD) -> dict[str, str]:
    return json.loads(path.read_text(encoding="utf-8"))
