"""kernels/arithmetic.py: BF16 as torch rounds it, and NaN for every NaN.

On a GPU `narrow` is the processor's own cast. The rest of the file is covered by the kernels that use it.
"""

import numpy as np
import pytest
import torch
from numeric import bits_at_the_edges_of_bf16

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from ornith_moe.kernels.arithmetic import narrow

pytestmark = pytest.mark.device


@triton.jit
def _narrow(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, narrow(tl.load(x_ptr + offs, mask=offs < count), tl.bfloat16), mask=offs < count)


def test_narrow_rounds_as_torch_and_nan_stays_nan():
    """A NaN whose payload lies in the lower half was infinity in the interpreter."""
    values = bits_at_the_edges_of_bf16().view(np.float32)
    x = torch.from_numpy(values).to("cuda" if torch.cuda.is_available() else "cpu")
    y = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    _narrow[(triton.cdiv(len(x), 1 << 18),)](x, y, len(x), BLOCK=1 << 18)
    nan = x.isnan()
    assert torch.equal(y[~nan].view(torch.int16), x[~nan].bfloat16().view(torch.int16))
    assert y[nan].isnan().all()
