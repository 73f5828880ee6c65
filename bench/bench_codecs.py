"""Codecs on one thread, against what a user would write or install instead.

FP8 (encode from BF16, decode to BF16): machine code for slabs (`codecs/fp8_slabs.py`) and the functions of tensors that
run it (`quant/fp8.py`), against the rule on the whole tensor at once in plain torch, and the same function under
torch.compile. GGUF (encode from FP32, with and without importance; decode to FP32): ggml's C, and gguf-py where it has
the type. What a second thread adds: two_threads.py. Before it is timed, each row must give the bytes of a
reference: the plain formulation for FP8, ggml's C for GGUF, and gguf-py where values are decoded.
"""

import shutil
from functools import cache

import gguf
import numpy as np
import pytest
import torch

import ornith_moe as om
from ornith_moe.bench import ggml
from ornith_moe.bench.numeric import assert_same_bits, relative_rms
from ornith_moe.bench.shapes import MATRICES, SEARCHED
from ornith_moe.quant.codecs.fp8_slabs import decode_fp8, encode_fp8
from ornith_moe.quant.codecs.gguf import DECODERS, ENCODERS
from ornith_moe.quant.codecs.grids import GridCodec
from ornith_moe.quant.codecs.sizes import row_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = 128
SCALES = {"block": torch.float32, "channel": torch.bfloat16}  # as each recipe's files store them
BLOCKS = {"block": (BLOCK, BLOCK), "channel": (1, None)}
FP8_CODERS = ("ours", "ours, for tensors", "torch", "torch.compile")


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


def as_arrays(q, scale):
    bits = scale.view(torch.uint16) if scale.dtype == torch.bfloat16 else scale
    return q.view(torch.uint8).numpy(), bits.numpy()


def encoder(coder, recipe):
    """A function of w that gives (q, scale); ours gives arrays."""
    if coder == "ours":
        scale = "fp32" if SCALES[recipe] == torch.float32 else "bf16"
        return lambda w: encode_fp8(w.view(torch.uint16).numpy(), BLOCKS[recipe], scale=scale)
    if coder == "ours, for tensors":
        return om.quantize_fp8_block if recipe == "block" else om.quantize_fp8_channel
    function = plain_encode if coder == "torch" else compiled(plain_encode)
    return lambda w: function(w, recipe)


def decoder(coder, recipe, q, scale):
    """A function that gives the decoded matrix; ours an array."""
    if coder == "ours":
        arrays = as_arrays(q, scale)
        return lambda: decode_fp8(*arrays, BLOCKS[recipe], dtype="bf16")
    decode = {"ours, for tensors": om.dequantize_fp8, "torch": plain_decode}.get(coder) or compiled(plain_decode)
    return lambda: decode(q, scale)


def nbytes(*tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("coder", FP8_CODERS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("recipe", SCALES)
def test_fp8_encode(measure, recipe, matrix, coder):
    w = torch.randn(MATRICES[matrix]).bfloat16()
    encode = encoder(coder, recipe)
    q, scale = plain_encode(w, recipe)
    assert relative_rms(plain_decode(q, scale), w) < 0.03
    encoded = encode(w)
    encoded = encoded if coder == "ours" else as_arrays(*encoded)
    assert all(np.array_equal(ours, expected) for ours, expected in zip(encoded, as_arrays(q, scale), strict=True))
    group = f"FP8 {recipe} encode, {matrix} from BF16"
    measure(group, coder, lambda: encode(w), peer="ours" not in coder, nbytes=nbytes(w, q, scale))


@pytest.mark.parametrize("coder", FP8_CODERS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("recipe", SCALES)
def test_fp8_decode(measure, recipe, matrix, coder):
    q, scale = plain_encode(torch.randn(MATRICES[matrix]).bfloat16(), recipe)
    decode, w = decoder(coder, recipe, q, scale), plain_decode(q, scale)
    decoded = decode()
    assert_same_bits("decoded", torch.from_numpy(decoded).view(torch.bfloat16) if coder == "ours" else decoded, w)
    group = f"FP8 {recipe} decode, {matrix} to BF16"
    measure(group, coder, decode, peer="ours" not in coder, nbytes=nbytes(q, scale, w))


GGUF_PY = ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0")  # what gguf-py 0.19 encodes
CODERS = ("ours", "gguf-py", "ggml")
PLAIN = ("F32", "F16", "BF16", "Q8_0")
SEARCHES = [name for name in ENCODERS if name not in PLAIN and not ENCODERS[name].needs_importance]
IMPORTANT = [name for name in ENCODERS if name not in PLAIN and ENCODERS[name].important]


def cases(names):
    return [(name, coder) for name in names for coder in CODERS if coder != "gguf-py" or name in GGUF_PY]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(("name", "coder"), cases(["F16", "BF16", "Q8_0"]))
def test_gguf_encode(measure, benchmark, matrix, name, coder):
    encode_gguf(measure, benchmark, name, matrix, coder, f"{name} encode, {matrix} from FP32")


def searched(name):
    """The searches are bound by arithmetic, and ggml's take seconds on a large matrix."""
    return "256x2048" if isinstance(ENCODERS[name], GridCodec) else "1024x2048"


@pytest.mark.parametrize(("name", "coder"), cases(SEARCHES))
def test_gguf_search(measure, benchmark, name, coder):
    encode_gguf(measure, benchmark, name, searched(name), coder, f"{name} encode, {searched(name)} from FP32")


@pytest.mark.parametrize(("name", "coder"), [case for case in cases(IMPORTANT) if case[1] != "gguf-py"])
def test_gguf_search_with_importance(measure, benchmark, name, coder):
    group = f"{name} encode with importance, {searched(name)} from FP32"
    encode_gguf(measure, benchmark, name, searched(name), coder, group, importance=True)


def encode_gguf(measure, benchmark, name, matrix, coder, group, importance=False):
    rows = np.random.default_rng(0).standard_normal(SEARCHED[matrix], np.float32)
    imatrix = np.random.default_rng(1).random(rows.shape[1], np.float32) if importance else None
    encode = {
        "ours": lambda: om.quantize_gguf(rows, name, imatrix=imatrix),
        "gguf-py": lambda: gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name]),
        "ggml": lambda: ggml.quantize(rows, name, imatrix),
    }[coder]
    encoded = encode()
    assert np.array_equal(encoded, ggml.quantize(rows, name, imatrix))
    info = measure(group, coder, encode, peer=coder != "ours", nbytes=nbytes(rows, encoded))
    info["note"] = f"{rows.size / benchmark.stats.stats.median / 1e6:.1f} Mweights/s"


DECODED = [(name, "1024x2048") for name in DECODERS if name != "F32"]
DECODED += [(name, "4096x4096") for name in ("BF16", "Q8_0", "Q4_K", "Q6_K")]


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(("name", "matrix"), DECODED)
def test_gguf_decode(measure, benchmark, name, matrix, coder):
    """Random bytes below 0x70, so that no scale is infinite. Every call makes its result: new pages in the larger."""
    if coder == "ggml" and name in PLAIN[:3]:
        pytest.skip("no symbol of ggml's C")
    rows, columns = MATRICES[matrix]
    encoded = np.random.default_rng(0).integers(0, 0x70, (rows, row_bytes(name, columns)), np.uint8)
    kind = gguf.GGMLQuantizationType[name]
    decode = {
        "ours": lambda: om.dequantize_gguf(encoded, name),
        "gguf-py": lambda: gguf.quants.dequantize(encoded, kind),
        "ggml": lambda: ggml.dequantize(encoded, name),
    }[coder]
    decoded = decode()
    assert np.array_equal(decoded.view(np.uint32), gguf.quants.dequantize(encoded, kind).view(np.uint32))
    group = f"{name} decode, {matrix} to FP32"
    measure(group, coder, decode, peer=coder != "ours", nbytes=nbytes(encoded, decoded))
    benchmark.extra_info["note"] = f"{decoded.size / benchmark.stats.stats.median / 1e6:.1f} Mweights/s"
