"""NVFP4 codes and scales against the rule, written a second time with torch; blocks of a GGUF against its own package.

ModelOpt's bytes are held by tests/quant/builds/test_modelopt.py. Not covered: what is not finite; none is encoded.
"""

import gguf
import numpy as np
import pytest
import torch

from ornith_moe.quant.codecs.fp8_slabs import encode_fp8_with
from ornith_moe.quant.codecs.nvfp4 import (
    decode_nvfp4,
    encode_nvfp4,
    gguf_blocks,
    of_gguf_blocks,
    scale_2_of,
)

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def rule(w: torch.Tensor, scale_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """modelopt's `NVFP4QTensor.quantize`: codes [N, K] and scales [N, K / 16]."""
    groups = w.view(w.shape[0], -1, 16)
    t = groups.abs().amax(-1) / (6 * scale_2)
    scales = torch.where(t == 0, 1.0, t).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    y = (groups / (scales.float() * scale_2)[..., None]).view(w.shape)
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    codes = torch.searchsorted(bounds, y.abs()) + (y.abs()[..., None] == bounds[1::2]).any(-1)
    return codes + 8 * (y < 0), scales


def matrix(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(shape, generator=generator)
    if kind == "ties":  # multiples of a quarter of the step of a block whose scale is 1
        w = torch.randint(-24, 25, shape, generator=generator) / 4
        w[:, ::16] = 6
    if kind == "spread":
        w *= torch.exp(4 * torch.randn(shape, generator=generator))
    if kind == "zeros":
        w[:, : shape[1] // 2] = 0
        w[0, 0] = -0.0
    return w.bfloat16().float()


@pytest.mark.parametrize("kind", ["normal", "ties", "spread", "zeros"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (5, 272), (64, 1024)])
def test_the_rule(kind, shape):
    w = matrix(kind, shape)
    scale_2 = np.float32(1) if kind == "ties" else scale_2_of(w.abs().max().item())
    codes, scales = rule(w, torch.tensor(scale_2))
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).byte().numpy()
    for rows in (w.numpy(), w.bfloat16().view(torch.uint16).numpy()):
        got, got_scales = encode_nvfp4(rows, scale_2)
        assert np.array_equal(got, packed) and np.array_equal(got_scales, scales.view(torch.uint8).numpy())
    sign = torch.where(codes > 7, -1.0, 1.0)
    values = sign * E2M1[codes & 7] * (scales.float() * scale_2).repeat_interleave(16, 1)
    assert np.array_equal(decode_nvfp4(got, got_scales, scale_2), values.numpy())


def test_scale_of_all():
    assert scale_2_of(2688) == 1 and scale_2_of(0) == 1 and scale_2_of(1e-45) == 1
    assert scale_2_of(3.3).tobytes() == (torch.tensor(3.3) / 2688.0).numpy().tobytes()


def test_blocks_of_a_gguf():
    w = matrix("spread", (6, 320))
    scale_2 = scale_2_of(w.abs().max().item())
    codes, scales = encode_nvfp4(w.numpy(), scale_2)
    blocks = gguf_blocks(codes, scales)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.NVFP4)
    assert np.array_equal(theirs, decode_nvfp4(codes, scales, np.float32(1)))
    back = of_gguf_blocks(blocks)
    assert np.array_equal(back[0], codes) and np.array_equal(back[1], scales)


def test_fp8_with_a_scale():
    """modelopt's FP8 of a matrix: a BF16 quotient is rounded to BF16 first, which shows where that is a tie of e4m3."""
    w = matrix("normal", (5, 1000)).bfloat16()
    scale = w.float().abs().max() / 448
    for weight, rows in ((w, w.view(torch.uint16).numpy()), (w.float(), w.float().numpy())):
        expected = (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        assert np.array_equal(encode_fp8_with(rows, np.float32(scale)), expected)
