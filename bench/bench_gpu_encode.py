"""Encoders on the GPU against our own on the CPU, whose bytes they must give; none was timed yet.

Rows of a group: the kernels on a matrix in device memory; the same for a slab from and to main memory, as a conversion
uses them; and the CPU, all cores for FP8 and one thread for GGUF. The limit is the time to read the BF16 matrix and to
write the blocks at the device's copy bandwidth. The matrix is larger than any GPU's L2 cache. This is what
`ornith-moe bench --suite codecs --device cuda` runs.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

import ornith_moe as om
from ornith_moe.bench.bench_codecs import same_bytes
from ornith_moe.bench.tasks import Settings, Side, Task, Work

ROWS, COLUMNS = 32768, 4096  # 256 MiB in BF16
QUICK_ROWS = 8192
GGUF = ("Q8_0", "Q4_K", "Q5_K", "Q6_K")
CODERS = {"ours, GPU": False, "ours, GPU, from and to main memory": False, "ours, CPU": True}


def tasks(settings: Settings) -> list[Task]:
    """FP8 by block and channel, and the GGUF types that have a kernel, with and without importance."""
    rows = QUICK_ROWS if settings.quick else ROWS
    kinds = [("block", False), ("channel", False)]
    kinds += [(name, importance) for name in GGUF for importance in (False, True) if name != "Q8_0" or not importance]
    return [_task(kind, importance, rows) for kind, importance in kinds]


def _task(kind: str, importance: bool, rows: int) -> Task:
    name = kind if kind in GGUF else f"FP8 {kind}"
    case = {"type": name, "way": "encode", "matrix": f"{rows}x{COLUMNS}"} | ({"importance": True} if importance else {})
    group = f"{name} encode{' with importance' * importance}, {rows}x{COLUMNS} from BF16"
    prepare = partial(_prepare_gguf, kind, importance, rows) if kind in GGUF else partial(_prepare_fp8, kind, rows)
    return Task("codecs", group, case, CODERS, prepare)


@cache
def matrix(rows: int) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()


def from_main_memory(storage: Any, x: torch.Tensor) -> Callable[[], Any]:
    from ornith_moe.gpu_encoders import gpu_encoders
    from ornith_moe.quant.source.slab import Slab

    slab = Slab(x.view(torch.uint8).numpy(), "BF16")
    encoder = gpu_encoders("cuda")[storage.name]
    return lambda: encoder(storage, slab)


def _work(calls: dict[str, Callable[[], Any]], x: torch.Tensor) -> Work:
    def parts(result: Any) -> list[np.ndarray]:
        return [torch.as_tensor(part).cpu().contiguous().view(torch.uint8).numpy() for part in result]

    expected = parts(calls["ours, CPU"]())
    sides = {
        name: partial(Side, call, lambda result: same_bytes(expected, parts(result))) for name, call in calls.items()
    }
    return Work(sides, x.nbytes + sum(part.nbytes for part in expected))


def _prepare_gguf(name: str, importance: bool, rows: int) -> Work:
    from ornith_moe.kernels.gguf_encode import quantize_gguf
    from ornith_moe.quant.builds.storages.gguf import Gguf

    imatrix = np.random.default_rng(1).random(COLUMNS, np.float32) if importance else None
    storage, x, wide = Gguf(name), matrix(rows).cuda(), matrix(rows).float().numpy()
    storage.importance = (lambda: imatrix) if importance else None  # type: ignore[assignment]
    calls: dict[str, Callable[[], Any]] = {
        "ours, GPU": lambda: (quantize_gguf(x, name, imatrix=imatrix),),
        "ours, GPU, from and to main memory": from_main_memory(storage, matrix(rows)),
        "ours, CPU": lambda: (om.quantize_gguf(wide, name, imatrix=imatrix),),
    }
    return _work(calls, matrix(rows))


def _prepare_fp8(recipe: str, rows: int) -> Work:
    from ornith_moe.kernels import fp8_cast
    from ornith_moe.quant.builds.storages.fp8 import FP8Block, FP8Channel

    cast, storage = f"quantize_fp8_{recipe}", {"block": FP8Block, "channel": FP8Channel}[recipe]()
    x = matrix(rows).cuda()
    calls: dict[str, Callable[[], Any]] = {
        "ours, GPU": lambda: getattr(fp8_cast, cast)(x, scale="bf16"),
        "ours, GPU, from and to main memory": from_main_memory(storage, matrix(rows)),
        "ours, CPU": lambda: getattr(om, cast)(matrix(rows), scale="bf16"),
    }
    return _work(calls, matrix(rows))


def test_gpu_encode(measure: Callable[[Task, str], None], task: Task, name: str) -> None:
    measure(task, name)
