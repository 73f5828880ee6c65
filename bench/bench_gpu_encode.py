"""Encoders on the GPU against our own on the CPU, whose bytes they must give; needs a GPU, and none was timed yet.

Rows of a group: the kernels on a matrix in device memory; the same for a slab from and to main memory, as a conversion
uses them; and the CPU, all cores for FP8 and one thread for GGUF. The limit is the time to read the BF16 matrix and to
write the blocks at the device's copy bandwidth, measured on 512 MiB. The matrix is larger than any GPU's L2 cache.
"""

from functools import cache

import numpy as np
import pytest
import torch

import ornith_moe as om
from ornith_moe.bench.limits import COPY_BYTES, best_seconds

REASON = "needs a CUDA or ROCm device, torch sees none"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=REASON)]
ROWS, COLUMNS = 32768, 4096  # 256 MiB in BF16
GGUF = ("Q8_0", "Q4_K", "Q5_K", "Q6_K")
CODERS = ("ours, GPU", "ours, GPU, from and to main memory", "ours, CPU")


@cache
def copy_gb_s() -> float:
    source, target = (torch.zeros(COPY_BYTES["cuda"], dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * COPY_BYTES["cuda"] / best_seconds(waited(lambda: target.copy_(source)), 10) / 1e9


@cache
def matrix() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()


def waited(call):
    def run():
        result = call()
        torch.cuda.synchronize()
        return result

    return run


def bench(measure, group, coder, calls):
    """Check every coder's bytes against the CPU's, and time one."""
    call = calls[coder]
    got, expected = (
        [torch.as_tensor(part).cpu().view(torch.uint8) for part in run()] for run in (call, calls["ours, CPU"])
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    nbytes = matrix().nbytes + sum(part.nbytes for part in expected)
    info = measure(
        f"{group} encode, {ROWS}x{COLUMNS} from BF16", coder, call, peer=coder == "ours, CPU", nbytes=nbytes,
        limit_s=nbytes / copy_gb_s() / 1e9, rounds=3 if coder == "ours, CPU" else 20,
    )  # fmt: skip
    info["note"] = torch.cuda.get_device_name()


def from_main_memory(storage):
    from ornith_moe.gpu_encoders import gpu_encoders
    from ornith_moe.quant.source.slab import Slab

    slab = Slab(matrix().view(torch.uint8).numpy(), "BF16")
    encoder = gpu_encoders("cuda")[storage.name]
    return lambda: encoder(storage, slab)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("important", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", GGUF)
def test_gguf(measure, name, important, coder):
    from ornith_moe.kernels.gguf_encode import quantize_gguf
    from ornith_moe.quant.builds.storages.gguf import Gguf

    if important and name == "Q8_0":
        pytest.skip("Q8_0 uses no importance")
    importance = np.random.default_rng(1).random(COLUMNS, np.float32) if important else None
    storage, x, rows = Gguf(name), matrix().cuda(), matrix().float().numpy()
    storage.importance = (lambda: importance) if important else None
    calls = {
        "ours, GPU": waited(lambda: (quantize_gguf(x, name, imatrix=importance),)),
        "ours, GPU, from and to main memory": from_main_memory(storage),
        "ours, CPU": lambda: (om.quantize_gguf(rows, name, imatrix=importance),),
    }
    bench(measure, f"{name}{' with importance' * important}", coder, calls)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("recipe", ["block", "channel"])
def test_fp8(measure, recipe, coder):
    from ornith_moe.kernels import fp8_cast
    from ornith_moe.quant.builds.storages.fp8 import FP8Block, FP8Channel

    cast, storage = f"quantize_fp8_{recipe}", {"block": FP8Block, "channel": FP8Channel}[recipe]()
    x = matrix().cuda()
    calls = {
        "ours, GPU": waited(lambda: getattr(fp8_cast, cast)(x, scale="bf16")),
        "ours, GPU, from and to main memory": from_main_memory(storage),
        "ours, CPU": lambda: getattr(om, cast)(matrix(), scale="bf16"),
    }
    bench(measure, f"FP8 {recipe}", coder, calls)
