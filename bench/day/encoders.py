"""Part e: encoders of FP8 and GGUF at the bandwidth of the memory, on a matrix larger than any L2.

The first rows must have the bytes of the CPU's encoders where those run without a compiler (FP8), and of the same
kernels on those rows alone elsewhere; that the kernels give ggml's bytes is part a's business. Limit: to read the BF16
matrix and write the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from ornith_moe.bench.day.bits import exact
from ornith_moe.bench.day.machine import Machine
from ornith_moe.bench.day.parts import Journal, Task
from ornith_moe.bench.rows import Row
from ornith_moe.kernels import fp8_cast, gguf_encode
from ornith_moe.quant import fp8

ROWS = 256  # that are checked: whole blocks of every format
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def tasks(machine: Machine, journal: Journal) -> Iterator[Task]:
    rows, columns = machine.sizes.matrix
    for name, encode, reference in _encoders(machine):
        group = f"{name} encode, {rows}x{columns} from BF16"
        yield Task(group, "ours", partial(_encoder, machine, journal, group, encode, reference), {"type": name})


def _encoders(machine: Machine) -> Iterator[tuple[str, Encode, Encode]]:
    yield "FP8 block", partial(fp8_cast.quantize_fp8_block, scale="bf16"), partial(fp8.quantize_fp8_block, scale="bf16")
    yield "FP8 row", fp8_cast.quantize_fp8_channel, fp8.quantize_fp8_channel
    for name in gguf_encode.ENCODED:
        if machine.dry and name != "Q8_0":
            continue

        def encode(x: torch.Tensor, name: str = name) -> tuple[torch.Tensor, ...]:
            return (gguf_encode.encode(x, name)[0],)

        yield name, encode, encode


@cache
def _matrix(rows: int, columns: int, device: str) -> torch.Tensor:
    return exact(8, min(rows, 4 * ROWS), columns).bfloat16().repeat(-(-rows // (4 * ROWS)), 1)[:rows].to(device)


def _encoder(machine: Machine, journal: Journal, group: str, encode: Encode, reference: Encode) -> Iterator[Row]:
    x = _matrix(*machine.sizes.matrix, machine.device)
    some = x[:ROWS].contiguous()
    on_cpu = reference is not encode
    expected = reference(some.cpu() if on_cpu else some)
    got = encode(x)
    for a, b in zip(got, expected, strict=True):
        a, b = (t.cpu().view(torch.uint8) for t in (a[: len(b)].contiguous(), b.contiguous()))
        if not torch.equal(a, b):
            why = f"{int((a != b).sum())} of {b.numel()} bytes of the first rows are others than expected"
            yield Row("encoders", group, "ours", False, status="red", why=why, device=machine.device)
            return
    nbytes = x.nbytes + sum(part.nbytes for part in got)
    row = Row("encoders", group, "ours", False, median_s=0.0, error=0.0, bytes=nbytes)
    yield machine.timed(row, machine.time({"ours": lambda: encode(x)})["ours"], journal)
