"""Codecs on one thread, against what a user would write or install instead.

FP8 (encode from BF16, decode to BF16): the rule of `ornith_moe.quant.fp8` on the whole tensor at once in plain torch,
and the same function under torch.compile. GGUF (encode from FP32, with and without importance): ggml's C, and gguf-py
where it has the type. Before it is timed, each row must give the bytes of a reference: the plain formulation for FP8,
ggml's C for GGUF.
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
from ornith_moe.quant.gguf_codecs import ENCODERS

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
def test_gguf_encode(measure, benchmark, name, matrix, coder):
    encode_gguf(measure, benchmark, name, MATRICES[matrix], coder, f"{name} encode, {matrix} from FP32")


GGUF_PY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0")  # what gguf-py 0.19 encodes
SMALL = "1024x2048"  # the searches are bound by arithmetic, and ggml's take seconds on the large matrix


@pytest.mark.parametrize("coder", ["ours", "gguf-py", "ggml"])
@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ("F32", "F16", "BF16", "Q8_0")])
def test_gguf_search(measure, benchmark, name, coder):
    if coder == "gguf-py" and name not in GGUF_PY:
        pytest.skip(f"gguf-py does not encode {name}")
    encode_gguf(measure, benchmark, name, MATRICES[SMALL], coder, f"{name} encode, {SMALL} from FP32")


@pytest.mark.parametrize("coder", ["ours", "ggml"])
@pytest.mark.parametrize("name", [name for name, codec in ENCODERS.items() if getattr(codec, "important", False)])
def test_gguf_search_with_importance(measure, benchmark, name, coder):
    importance = np.random.default_rng(1).random(MATRICES[SMALL][1], np.float32)
    group = f"{name} encode with importance, {SMALL} from FP32"
    encode_gguf(measure, benchmark, name, MATRICES[SMALL], coder, group, importance)


def encode_gguf(measure, benchmark, name, shape, coder, group, importance=None):
    rows = np.random.default_rng(0).standard_normal(shape, np.float32)
    kind = gguf.GGMLQuantizationType[name]
    encode = {
        "ours": lambda: om.quantize_gguf(rows, name, imatrix=importance),
        "gguf-py": lambda: gguf.quants.quantize(rows, kind),
        "ggml": lambda: ggml.quantize(rows, name, importance),
    }[coder]
    encoded = encode()
    assert np.array_equal(encoded, ggml.quantize(rows, name, importance))
    info = measure(group, coder, encode, peer=coder != "ours", nbytes=nbytes(rows, encoded))
    info["note"] = f"{rows.size / benchmark.stats.stats.median / 1e6:.0f} Mweights/s"
