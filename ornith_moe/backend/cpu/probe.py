"""How this machine multiplies BF16: measured at its first use, once per process.

    bf16_kind     AVX-512's BF16 dot product, or BF16 widened to float32 in registers
    torch_wins    whether torch.mm leaves both behind, as it does with AMX: experts with many rows go through `loop`
    describe      what was found, in words

The measurement takes some 20 milliseconds. It is a product that stays in cache, one expert with 128 rows; a dot product
is half as fast as the widened form on some servers and twice as fast on others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from ornith_moe.backend.cpu.native import Native
from ornith_moe.backend.cpu.register_tiles import BF16_DOT, BF16_WIDE, HAS_BF16_DOT, VECTOR_BYTES
from ornith_moe.backend.cpu.routed import group_by_expert
from ornith_moe.quant.operand import Operand

_WINS = 3.0  # AMX is at eight; a product this small flatters torch.mm


class Rates(NamedTuple):
    """GFLOP/s of a BF16 product of 128 x 1024 by 1024 x 1024; 0 for what the processor has not, or only in software."""

    dot: float
    wide: float
    torch_mm: float


def bf16_kind() -> int:
    """The faster of `BF16_DOT` and `BF16_WIDE` here."""
    if not HAS_BF16_DOT:
        return BF16_WIDE
    rates = bf16_rates()
    return BF16_DOT if rates.dot >= rates.wide else BF16_WIDE


def torch_wins() -> bool:
    """Whether experts with many rows go through torch.mm."""
    rates = bf16_rates()
    return rates.torch_mm > _WINS * max(rates.dot, rates.wide)


def describe() -> str:
    """How BF16 is multiplied here and why, in one sentence."""
    rates = bf16_rates()
    how = "AVX-512 dot product" if bf16_kind() == BF16_DOT else "widened to float32 in registers"
    if torch_wins():
        how = f"torch.mm for experts with many rows, else {how}"
    dot = f"{rates.dot:.0f}" if rates.dot else "not there"
    found = f"dot {dot}, widened {rates.wide:.0f}, torch.mm {rates.torch_mm:.0f}"
    return f"BF16: {how} (GFLOP/s of a product in cache: {found}); vectors of {VECTOR_BYTES} bytes"


@cache
def bf16_rates() -> Rates:
    m, k, n = 128, 1024, 1024
    x, w = (torch.ones(size, k, dtype=torch.bfloat16, device="cpu") for size in (m, n))
    rows = group_by_expert(torch.zeros(m, 1, dtype=torch.int64, device="cpu"), 1)
    weight = Operand(w[None])

    def rate(product: Callable[[], object]) -> float:
        product()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            product()
            times.append(time.perf_counter() - began)
        return 2 * m * k * n / min(times) / 1e9

    dot, wide = (
        rate(partial(Native(kind).gate_up, x, rows, weight, False))
        if kind != BF16_DOT or HAS_BF16_DOT else 0.0
        for kind in (BF16_DOT, BF16_WIDE)
    )  # fmt: skip
    hopeless = False
    for _ in range(2):  # in software torch.mm has been seen at 1 GFLOP/s: a small product first, its second call counts
        began = time.perf_counter()
        torch.mm(x[:16, :256], w[:256, :256].T)
        hopeless = time.perf_counter() - began > 1e-3
    return Rates(dot, wide, 0.0 if hopeless else rate(lambda: torch.mm(x, w.T)))
