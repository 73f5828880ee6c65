"""kernels/fp8_cast.py against quant/fp8.py: the same bytes and the same scales, for every BF16 value.

Without a GPU the kernels run in Triton's interpreter, which shows the arithmetic as written, and are compiled for four
GPUs, which shows IEEE division, kept denormals and no spills. What a real GPU then computes is covered only by running
this file on one (the tests are the same there). Not covered: speed.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from ahead_of_time import TARGETS, compile_kernels

from ornith_moe.kernels import fp8_cast
from ornith_moe.quant import fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CARRIER = {4: torch.int32, 2: torch.int16, 1: torch.uint8}

# Inf / Inf inside the interpreter's numpy, which is the NaN we want
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def assert_same_bits(got, expected):
    for name, a, b in zip(("q", "scale"), got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        a, b = (t.cpu().contiguous().view(CARRIER[t.element_size()]) for t in (a, b))
        at = (a != b).nonzero()
        assert not len(at), f"{name}: {len(at)} differ, first at {at[0].tolist()}: {a[*at[0]]} != {b[*at[0]]}"


def every_bf16_value():
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
def test_every_bf16_value_as_its_own_amax(kind):
    """One large tile with a scale per row; the launcher's tile size would make this 2048 programs."""
    x = every_bf16_value()[:, None]
    dtype, carrier, shift = fp8.SCALES[kind]
    q = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)
    s = torch.empty(x.shape, dtype=carrier, device=DEVICE)
    rows = 1024 if DEVICE == "cuda" else 65536
    args = (x.to(DEVICE), q, s, 65536, 1, 65536, 1, 1)
    fp8_cast.quantize_tile_kernel[(65536 // rows,)](*args, rows, 1, True, shift, False)
    expected = fp8.quantize_fp8_block(x, block=(1, 1), scale=kind)
    assert_same_bits((q.view(torch.float8_e4m3fn), s.view(dtype)), expected)


@pytest.mark.parametrize("amax", [448.0, 448.0 * 2**-126, 2.0**-130, 3e38])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
def test_every_bf16_value_below_an_amax(kind, amax):
    """At 448 the scale is 1 and the codes show the cast alone, at the others tiny and huge scales."""
    x = every_bf16_value()
    x = torch.where(x.float().abs() <= amax, x, amax).view(256, 256).to(DEVICE)
    assert_same_bits(
        fp8_cast.quantize_fp8_block(x, block=(256, 256), scale=kind),
        fp8.quantize_fp8_block(x, block=(256, 256), scale=kind),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (129, 257), (2, 130, 140)], ids=str)
def test_every_recipe_on_odd_shapes(shape, dtype):
    x = (torch.randn(shape) * torch.logspace(-6, 3, shape[-1])).to(dtype).to(DEVICE)
    x[..., :3] = 0
    x.view(-1)[-1] = -float("nan")
    for kind in fp8.SCALES:
        assert_same_bits(fp8_cast.quantize_fp8_block(x, scale=kind), fp8.quantize_fp8_block(x, scale=kind))
    assert_same_bits(fp8_cast.quantize_fp8_channel(x, scale="bf16"), fp8.quantize_fp8_channel(x, scale="bf16"))
    for group, kind in [(128, "fp32"), (128, "ue8m0"), (32, "fp32"), (None, "fp32")]:
        expected = fp8.quantize_fp8_tokens(x, group=group, scale=kind)
        assert_same_bits(fp8_cast.quantize_fp8_tokens(x, group=group, scale=kind), expected)


def test_strided_weights_are_read_in_place():
    """The gate half of fused experts, and a transposed weight."""
    w = torch.randn(3, 64, 96).bfloat16().to(DEVICE)
    for view in (w[:, :20], w.transpose(1, 2), w[1:, :, ::2]):
        assert_same_bits(fp8_cast.quantize_fp8_block(view), fp8.quantize_fp8_block(view))
        assert_same_bits(fp8_cast.quantize_fp8_channel(view), fp8.quantize_fp8_channel(view))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 4)], ids=str)
def test_empty_input(shape):
    x = torch.empty(shape, device=DEVICE)
    for name in ("quantize_fp8_block", "quantize_fp8_channel", "quantize_fp8_tokens"):
        assert_same_bits(getattr(fp8_cast, name)(x), getattr(fp8, name)(x))


def test_one_token_without_a_batch():
    x = torch.randn(300, device=DEVICE)
    assert_same_bits(fp8_cast.quantize_fp8_tokens(x), fp8.quantize_fp8_tokens(x))


def test_errors_name_the_argument():
    w = torch.randn(4, 4, device=DEVICE)
    with pytest.raises(TypeError, match=r"w: .*float64"):
        fp8_cast.quantize_fp8_block(w.double())
    with pytest.raises(ValueError, match=r"w: .*\[4\]"):
        fp8_cast.quantize_fp8_channel(w[0])
    with pytest.raises(ValueError, match=r"scale: .*'ue8m0'"):
        fp8_cast.quantize_fp8_channel(w, scale="ue8m0")
    with pytest.raises(ValueError, match=r"powers of two, got 96"):
        fp8_cast.quantize_fp8_tokens(w, group=96)
    with pytest.raises(ValueError, match=r"x: .*strides.*contiguous"):
        fp8_cast.quantize_fp8_tokens(torch.randn(4, 6, 8, device=DEVICE).transpose(0, 1))


MATRIX = {"N": "i32", "K": "i32", "stride_xe": "i64", "stride_xn": "i64", "stride_xk": 1}
KERNELS = [  # what the launchers launch: tokens, 128x128 blocks of an fp32 master weight, rows
    (
        "quantize_tile_kernel",
        {"x_ptr": "*bf16", "q_ptr": "*u8", "scale_ptr": "*i32", **MATRIX}
        | {"BLOCK_N": 32, "BLOCK_K": 128, "PER_ROW": True, "SHIFT": 0, "THROUGH_BF16": False},
        4,
    ),
    (
        "quantize_tile_kernel",
        {"x_ptr": "*fp32", "q_ptr": "*u8", "scale_ptr": "*u8", **MATRIX}
        | {"BLOCK_N": 128, "BLOCK_K": 128, "PER_ROW": False, "SHIFT": 23, "THROUGH_BF16": True},
        8,
    ),
    (
        "quantize_row_kernel",
        {"x_ptr": "*bf16", "q_ptr": "*u8", "scale_ptr": "*i16", **MATRIX}
        | {"BLOCK_N": 16, "BLOCK_K": 256, "SHIFT": 16, "THROUGH_BF16": False},
        4,
    ),
]


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_every_target(target):
    for (name, *_), report in zip(KERNELS, compile_kernels(target, fp8_cast.__name__, KERNELS), strict=True):
        asm = report["asm"]
        assert report["spills"] == 0, name
        if target.startswith("sm"):
            assert "div.rn.f32" in asm and "div.full" not in asm and ".ftz" not in asm, name
            assert "st.global.v4.b32" in asm, f"{name}: codes are not stored 16 bytes at a time"
        else:
            assert "v_div_fixup_f32" in asm and "denorm_mode_32 3" in asm, f"{name}: division or denormals are not IEEE"
