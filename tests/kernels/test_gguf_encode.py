"""kernels/gguf_encode.py against ggml's C and quant/codecs/gguf.py, byte for byte.

References: ggml_quantize_chunk of xllamacpp, and our CPU encoders, on the kinds of weights and importance that those
are tested on. Without a GPU the kernels run in Triton's interpreter, which shows the arithmetic as
written, and are compiled for four GPUs as the launcher starts them. That shows IEEE division and root, kept denormals,
no spills, and that no product is contracted with a sum: every fused multiply-add of the machine code is one of those
that a division or a root expands to. What a real GPU then computes is covered only by running this file on one (the
tests are the same there). Not covered: speed.
"""

import dataclasses

import ggml
import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from codec_cases import FEW, IMPORTANCE, WEIGHTS
from machine_code import FORMS, look_up

from ornith_moe.kernels import gguf_encode
from ornith_moe.kernels.examine.compile import specialize
from ornith_moe.kernels.gguf_encode import ENCODED, quantize_gguf
from ornith_moe.kernels.gguf_search import nearest
from ornith_moe.kernels.launch import recording
from ornith_moe.quant.codecs import gguf as gguf_codecs
from ornith_moe.quant.errors import ConversionError

# Infinities and NaNs inside the interpreter's numpy, where a GPU has them too
pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPORTANT = [name for name in ENCODED if name != "Q8_0"]


def kinds(rows):
    """(weights [R, K] with `rows` rows of each kind, the kind of each row)"""
    some = {kind: weights[:rows] for kind, weights in WEIGHTS.items()}
    return np.concatenate(list(some.values())), [kind for kind, weights in some.items() for _ in weights]


def on_gpu(rows, name, imatrix=None):
    return quantize_gguf(torch.from_numpy(np.ascontiguousarray(rows)).to(DEVICE), name, imatrix=imatrix).cpu().numpy()


def assert_equal(got, expected, labels):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    rows = np.flatnonzero((got != expected).any(axis=1))
    assert not rows.size, f"{len(rows)} rows differ, of {sorted({labels[row] for row in rows})}"


@pytest.mark.parametrize("name", ENCODED)
def test_bytes_equal_ggml_and_the_cpu(name):
    """37 rows of 2048 for most kinds: a million weights. The interpreter runs several programs, the last not full."""
    rows, labels = kinds(37)
    got = on_gpu(rows, name)
    assert_equal(got, gguf_codecs.quantize_gguf(rows, name), labels)
    assert_equal(got, ggml.quantize(rows, name, build="xllamacpp"), labels)


@pytest.mark.parametrize("name", IMPORTANT)
def test_bytes_with_importance_equal_ggml_and_the_cpu(name):
    """A stack of five matrices with an importance of its own for each, as experts have."""
    rows, labels = kinds(2)
    stack, imatrix = np.stack([rows] * len(IMPORTANCE)), np.stack(list(IMPORTANCE.values())).astype(np.float32)
    got = on_gpu(stack, name, imatrix)
    by_kind, labels = labels, [f"{kind} with {importance}" for importance in IMPORTANCE for kind in labels]
    expected = gguf_codecs.quantize_gguf(stack, name, imatrix=imatrix)
    assert_equal(got.reshape(len(labels), -1), expected.reshape(len(labels), -1), labels)
    for encoded, row in zip(got, imatrix, strict=True):
        assert_equal(encoded, ggml.quantize(rows, name, row, build="xllamacpp"), by_kind)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Q8_0", torch.bfloat16), ("Q8_0", torch.float16), ("Q5_K", torch.bfloat16), ("Q6_K", torch.float16)],
    ids=str,
)
def test_any_dtype_shape_and_stride(name, dtype):
    """BF16 and FP16 are widened; leading dimensions are rows; a slice of columns is not contiguous."""
    x = torch.from_numpy(FEW[:6, :1024]).to(dtype).view(2, 3, 1024)[..., 256:].to(DEVICE)
    expected = gguf_codecs.quantize_gguf(x.float().cpu().numpy(), name)
    got = quantize_gguf(x, name)
    assert got.device == x.device and np.array_equal(got.cpu().numpy(), expected)
    if name == "Q8_0":
        assert np.array_equal(quantize_gguf(x[1, 2], name).cpu().numpy(), expected[1, 2])
    assert quantize_gguf(x[:0], name).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("name", ["Q8_0", "Q5_K", "Q6_K"])
def test_what_cannot_be_stored_is_the_error_of_the_cpu(name):
    """Row and column of the first value, whatever it is; and a scale beyond fp16, which only the search finds."""
    beyond = {"Q8_0": 65519 * 127, "Q5_K": 65519 * 31 * 63, "Q6_K": 65519 * 32 * 128}[name]
    for value in (np.nan, -np.inf, 1e30, beyond * 1.001) if name == "Q8_0" else (np.nan, beyond * 1.001):
        rows = FEW[:3, :512].copy()
        rows[1, 300] = value
        errors = []
        for quantize in (gguf_codecs.quantize_gguf, on_gpu):
            with pytest.raises(ConversionError, match=r"^row 1, column 300") as caught:
                quantize(rows, name)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    rows[1, 300] = beyond * 0.9
    assert np.array_equal(on_gpu(rows, name), gguf_codecs.quantize_gguf(rows, name))


@triton.jit
def nearest_kernel(v_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, nearest(tl.load(v_ptr + i)))


def test_nearest_is_that_of_x86():
    """Ties, both sides of 2^22, infinities; and NaNs as x86, AMD and NVIDIA make them, which all count as 0."""
    v = [0.5, 1.5, -2.5, 2**22 - 1, 2**22, 2**22 + 3, -(2**22), -(2**22) - 2, 3e9, -3e9, 1e38, np.inf, -np.inf]
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF], np.uint32).view(np.float32)
    v = np.concatenate([np.array(v, np.float32), nan])
    bits = (v[:-3] + np.float32(12582912)).view(np.int32)  # ggml's nearest_int
    expected = np.append((bits & 0x7FFFFF) - 0x400000, [0, 0, 0])
    out = torch.empty(16, device=DEVICE)
    nearest_kernel[(1,)](torch.from_numpy(v).to(DEVICE), out, 16)
    assert np.array_equal(out.cpu().numpy(), expected)


def test_wrong_use_is_refused():
    x = torch.ones(2, 256, device=DEVICE)
    with pytest.raises(ValueError, match=r"type_name: no GPU encoder for Q3_K; have Q8_0, Q4_K"):
        quantize_gguf(x, "Q3_K")
    with pytest.raises(ValueError, match="GGUF type"):
        quantize_gguf(x, "Q8")
    with pytest.raises(ValueError, match="blocks of 256"):
        quantize_gguf(x[:, :128], "Q4_K")
    with pytest.raises(ValueError, match="scalar"):
        quantize_gguf(x[0, 0], "Q8_0")
    with pytest.raises(TypeError, match=r"x: .*float64"):
        quantize_gguf(x.double(), "Q8_0")
    for name in ("Q8_0", "Q4_K"):
        with pytest.raises(ValueError, match=r"imatrix: .*got -1.0 at"):
            quantize_gguf(x, name, imatrix=np.full(256, -1, np.float32))


def launches(arch):
    """What the launchers start for a layer of the 35B shape; Q5_K and Q6_K with importance."""
    x = torch.empty(256 * 512, 2048, dtype=torch.bfloat16, device="meta")
    importance = torch.empty(256, 2048, device="meta")
    with recording(arch) as started:
        for name in ENCODED:
            gguf_encode.encode(x, name, importance if name in ("Q5_K", "Q6_K") else None)
    # Q4_K without importance has a search of its own; its other kernels are in Q5_K's
    return [one for one in started if "Q4_K" not in one.label or "search" in one.label]


def fused(arch, seen):
    """(fused multiply-adds, how many of them divisions and roots expand to): in PTX both are one instruction."""
    # v_fmamk and v_fmaak are of 64-bit integer division; v_fma_mix is an FP16 product with an addend of 0
    return seen["fused"], 0 if arch.startswith("sm") else 5 * seen["divisions"] + 2 * seen["roots"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", FORMS)
def test_compiles_for_every_target_without_contraction(arch):
    started = launches(arch)
    requests = [specialize(arch, one) for one in started]
    (control,) = (r for r, one in zip(requests, started, strict=True) if "Q6_K with importance search" in one.label)
    control = dataclasses.replace(control, options=control.options | {"enable_fp_fusion": True})
    *compiled, (_, fusing) = look_up([*requests, control])
    for one, (report, seen) in zip(started, compiled, strict=True):
        where = f"{one.label} for {arch}"
        assert report.spills == 0, where
        found, allowed = fused(arch, seen)
        assert found == allowed, f"{where}: {found} fused multiply-adds, {allowed} of divisions and roots"
        assert seen["divisions"] and not seen["inexact"], where
        assert seen["denormals"] or arch.startswith("sm"), where
        if arch.startswith("sm") and "search" in one.label:
            assert not seen["shuffles"] and not seen["shared memory"], where
    found, allowed = fused(arch, fusing)
    assert found > allowed, f"{arch}: fusion does not show where it is on"
