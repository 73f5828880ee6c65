"""Codecs on one thread, against what a user would write or install instead.

FP8 (encode from BF16, decode to BF16): the rule of `ornith_moe.quant.fp8` on the whole tensor at once in plain torch,
and the same function under torch.compile. GGUF (encode from FP32): gguf-py, and ggml's C. Before it is timed, each row
must give the bytes of a reference: the plain formulation for FP8, ggml's C for GGUF.
"""

import shutil
from functools import cache

import ggml
import gguf
import numpy as np
import pytest
import torch
from numeric import assert_same_bits, relative_rms
from shapes import MATRICES

import ornith_moe as om

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = 128
SCALES = {"block": torch.float32, "channel": torch.bfloat16}  # as each recipe's files store them
FP8_CODERS = ("ours", "torch", "torch.compile")


def plain_encode(w, recipe):
    """Blocks [N/bn, bn, K/bk, bk] of the whole matrix, one scale each."""
    rows, columns = w.shape
    bn, bk = (BLOCK, BLOCK) if recipe == "block" else (1, columns)
    blocks = w.float().view(rows // bn, bn, columns // bk, bk)
    scale = (blocks.abs().amax(dim=(1, 3)) / 448).to(SCALES[recipe])
    q = (blocks / scale.float()[:, None, :, None]).to(torch.float8_e4m3fn)
    return q.view(rows, columns), scale


def plain_decode(q, scale):
    (rows, columns), (gn, gk) = q.shape, scale.shape
    blocks = q.float().view(gn, rows // gn, gk, columns // gk) * scale.float()[:, None, :, None]
    return blocks.view(rows, columns).bfloat16()


@cache
def compiled(function):
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    return torch.compile(function, dynamic=False)


def encoder(coder, recipe):
    if coder == "ours":
        return om.quantize_fp8_block if recipe == "block" else om.quantize_fp8_channel
    function = plain_encode if coder == "torch" else compiled(plain_encode)
    return lambda w: function(w, recipe)


def nbytes(*tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("coder", FP8_CODERS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("recipe", SCALES)
def test_fp8_encode(measure, recipe, matrix, coder):
    w = torch.randn(MATRICES[matrix]).bfloat16()
    encode = encoder(coder, recipe)
    (q, scale), expected = encode(w), plain_encode(w, recipe)
    assert_same_bits("codes", q.view(torch.uint8), expected[0].view(torch.uint8))
    assert_same_bits("scale", scale, expected[1])
    assert relative_rms(plain_decode(q, scale), w) < 0.03
    group = f"FP8 {recipe} encode, {matrix} from BF16"
    measure(group, coder, lambda: encode(w), peer=coder != "ours", nbytes=nbytes(w, q, scale))


@pytest.mark.parametrize("coder", FP8_CODERS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("recipe", SCALES)
def test_fp8_decode(measure, recipe, matrix, coder):
    q, scale = plain_encode(torch.randn(MATRICES[matrix]).bfloat16(), recipe)
    decode = {"ours": om.dequantize_fp8, "torch": plain_decode}.get(coder) or compiled(plain_decode)
    w = decode(q, scale)
    assert_same_bits("decoded", w, plain_decode(q, scale))
    group = f"FP8 {recipe} decode, {matrix} to BF16"
    measure(group, coder, lambda: decode(q, scale), peer=coder != "ours", nbytes=nbytes(q, scale, w))


@pytest.mark.parametrize("coder", ["ours", "gguf-py", "ggml"])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", ["Q8_0", "BF16"])
def test_gguf_encode(measure, name, matrix, coder):
    rows = np.random.default_rng(0).standard_normal(MATRICES[matrix], np.float32)
    kind = gguf.GGMLQuantizationType[name]
    encode = {
        "ours": lambda: om.quantize_gguf(rows, name),
        "gguf-py": lambda: gguf.quants.quantize(rows, kind),
        "ggml": lambda: ggml.quantize(rows, name),
    }[coder]
    encoded = encode()
    assert np.array_equal(encoded, ggml.quantize(rows, name))
    group = f"{name} encode, {matrix} from FP32"
    measure(group, coder, encode, peer=coder != "ours", nbytes=nbytes(rows, encoded))
