"""A kernel is one file: toy_kernel.py, which nothing in the package names, is run, timed, modelled and compiled.

Reference: `weigh_reference` in plain torch, whose bits a single multiplication and rounding must give; bytes counted by
hand. Not covered: a kernel that multiplies matrices, which declares its `Product` (test_launch.py).
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from machine_code import FORMS, compiled
from toy_kernel import weigh, weigh_reference

from ornith_moe.kernels.examine.model import estimate
from ornith_moe.kernels.launch import recording, timing

pytestmark = pytest.mark.device
ROWS = 65536
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(rows, columns, dtype=torch.bfloat16, device=DEVICE):
    return torch.randn(rows, columns, device=device).to(dtype), torch.randn(rows, device=device)


def launches(target):
    with recording(target) as started:
        weigh(torch.empty(ROWS, 2048, dtype=torch.bfloat16, device="meta"), torch.empty(ROWS, device="meta"))
    return started


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_are_those_of_the_reference(dtype):
    x, weights = operands(5, 300, dtype)
    with timing() as times:
        y = weigh(x, weights)
    assert torch.equal(y, weigh_reference(x, weights)) and [time.label for time in times] == ["weigh"]
    assert weigh(x[:0], weights[:0]).shape == (0, 300)


@pytest.mark.parametrize("target", FORMS)
def test_compiles_for_every_target(target):
    (one,) = compiled(target, launches)
    assert not one.report.spills and not one.report.matrix_instructions and not one.seen["atomics"]
    assert not one.seen["fused"] and not one.seen["inexact"]
    (found,) = estimate(target, [(one.launch, one.report)], np.zeros(1))
    assert found.bytes == 2 * ROWS * 2048 * 2 + 4 * ROWS and found.bound == "memory"  # x and y, and the weights
