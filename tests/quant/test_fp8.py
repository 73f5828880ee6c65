"""quant/fp8.py against the definition, written a second time in float64 and integers.

The reference here finds the nearest of the 256 e4m3fn codes by search in a table and builds each scale with exact
rational arithmetic (`Fraction`), so it shares no operation with the code under test except IEEE fp32 division, which
numpy does. Every test runs twice, by the rule in torch and as a CPU does it, in machine code. Not covered: devices
other than the CPU (tests/kernels compares the Triton twin with this file's subject).
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ornith_moe.quant import fp8
from ornith_moe.quant.fp8 import (
    dequantize_fp8,
    quantize_fp8_block,
    quantize_fp8_block_both,
    quantize_fp8_channel,
    quantize_fp8_tokens,
    roundtrip_fp8_tokens,
)


@pytest.fixture(autouse=True, params=["machine code", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(fp8, "_has_machine_code", lambda *_: False)


STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "ue8m0": torch.float8_e8m0fnu}


def e4m3_table():
    """The value of codes 0..126 by the format's definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


TABLE = e4m3_table()


def nearest_e4m3(x):
    """Codes of float64 `x`, ties to even, beyond 448 saturated."""
    magnitude = np.minimum(np.abs(x), 448.0)
    above = np.clip(np.searchsorted(TABLE, magnitude), 1, 126)
    to_above, to_below = TABLE[above] - magnitude, magnitude - TABLE[above - 1]
    take_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    codes = np.where(take_above, above, above - 1)
    return (codes | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def reference_scale(amax, kind):
    """The scale of one block as a Python float, from the exact quotient amax / 448."""
    if not np.isfinite(amax):
        return float("nan")
    if amax == 0:
        return 1.0
    exact = Fraction(float(amax)) / 448
    smallest = Fraction(2) ** -126
    if kind == "ue8m0":
        e = max(-126, int(np.frexp(amax)[1]) - 11)  # a start that is too low
        while Fraction(2) ** e < exact:
            e += 1
        return 2.0**e
    if exact <= smallest:
        return 2.0**-126
    fp32 = float(np.float32(amax) / np.float32(448))
    if kind == "fp32":
        return fp32
    e = np.frexp(fp32)[1] - 8  # BF16 has 8 significant bits; Python's round() is half to even
    return round(Fraction(fp32) / Fraction(2) ** int(e)) * 2.0 ** int(e)


def reference(x, bn, bk, kind):
    """Codes (uint8) and scales (float64) of a matrix of fp32 values, block by block."""
    x = x.float().numpy()
    n, k = x.shape
    grid = -(-n // bn), -(-k // bk)
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = slice(i * bn, (i + 1) * bn), slice(j * bk, (j + 1) * bk)
            with np.errstate(all="ignore"):
                s = scales[i, j] = reference_scale(np.abs(x[at]).max(), kind)
                quotient = (x[at] / np.float32(s)).astype(np.float64)
            codes[at] = 0x7F if np.isnan(s) else nearest_e4m3(quotient)
    return codes, scales


def assert_same(got, expected, kind):
    q, scale = got
    codes, scales = expected
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == STORED[kind]
    assert q.shape == codes.shape and scale.shape == scales.shape
    np.testing.assert_array_equal(scale.double().numpy(), scales)
    np.testing.assert_array_equal(q.view(torch.uint8).numpy(), codes)


def sqnr_db(x, y):
    x, y = x.double(), y.double()
    return 10 * torch.log10(x.square().sum() / (x - y).square().sum()).item()


def all_bf16():
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
def test_every_bf16_value_as_its_own_amax(kind):
    x = all_bf16().view(2, -1).T  # each value beside its negative
    assert_same(quantize_fp8_block(x, block=(1, 2), scale=kind), reference(x, 1, 2, kind), kind)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
def test_every_finite_bf16_value_against_a_fixed_amax(kind):
    """Beside 448 the scale is 1, so the codes show the cast alone: ties, subnormals, signed zeros."""
    x = all_bf16()
    x = x[x.float().abs() <= 448][:, None]
    x = torch.cat([x, torch.full_like(x, 448)], dim=1)
    q, scale = quantize_fp8_block(x, block=(1, 2), scale=kind)
    assert (scale.float() == 1).all()
    np.testing.assert_array_equal(q.view(torch.uint8)[:, 0].numpy(), nearest_e4m3(x[:, 0].double().numpy()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 21),
    k=st.integers(1, 37),
    block=st.tuples(st.integers(1, 9), st.sampled_from([*range(1, 10), 16, 32])),
    kind=st.sampled_from(["fp32", "bf16", "ue8m0"]),
    bits=st.randoms(use_true_random=False),
)
def test_any_bits_any_shape_any_block(n, k, block, kind, bits):
    raw = torch.tensor([bits.getrandbits(16) for _ in range(n * k)], dtype=torch.int32).to(torch.int16)
    x = raw.view(torch.bfloat16).view(n, k)
    assert_same(quantize_fp8_block(x, block=block, scale=kind), reference(x, *block, kind), kind)


@pytest.mark.parametrize("kind", ["fp32", "ue8m0"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 128), (5, 129), (63, 300)], ids=str)
def test_tokens_take_fp32_as_given(shape, kind):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    assert_same(quantize_fp8_tokens(x, scale=kind), reference(x, 1, 128, kind), kind)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
@pytest.mark.parametrize("block", [(128, 128), (64, 30)], ids=str)
def test_block_both_is_the_cast_of_both_orientations(block, kind):
    w = torch.randn(2, 130, 261).bfloat16()
    q, scale, q_t, scale_t = quantize_fp8_block_both(w, block=block, scale=kind)
    assert q_t.is_contiguous() and scale_t.is_contiguous()
    for e in range(2):
        assert_same((q[e], scale[e]), reference(w[e], *block, kind), kind)
        assert_same((q_t[e], scale_t[e]), reference(w[e].T, *block[::-1], kind), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [128, None])
@pytest.mark.parametrize("kind", ["fp32", "ue8m0"])
def test_round_trip_is_one_product_and_one_rounding(kind, group, dtype):
    x = (torch.randn(7, 300) * torch.logspace(-3, 3, 300)).to(dtype)
    codes, scales = reference(x, 1, group or 300, kind)
    values = np.where(codes & 0x80, -1, 1) * TABLE[codes & 0x7F]
    expected = values.astype(np.float32) * scales.repeat(group or 300, axis=1)[:, :300].astype(np.float32)
    got = roundtrip_fp8_tokens(x, group=group, scale=kind)
    assert got.dtype == dtype and torch.equal(got, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_channel_is_one_block_per_row(kind):
    w = torch.randn(37, 201).bfloat16()
    assert_same(quantize_fp8_channel(w, scale=kind), reference(w, 1, 201, kind), kind)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
@pytest.mark.parametrize("shape", [(128, 128), (129, 127), (1, 300), (257, 384)], ids=str)
def test_block_128(shape, kind):
    w = (torch.randn(shape) * 0.02).bfloat16()
    assert_same(quantize_fp8_block(w, scale=kind), reference(w, 128, 128, kind), kind)


def test_weights_are_rounded_to_bf16_first_and_activations_are_not():
    w = torch.randn(130, 140)
    for f in (quantize_fp8_block, quantize_fp8_channel):
        for got, expected in zip(f(w), f(w.bfloat16()), strict=True):
            assert torch.equal(got.float(), expected.float())
    assert not torch.equal(quantize_fp8_tokens(w)[1], quantize_fp8_tokens(w.bfloat16())[1])


@pytest.mark.parametrize("amax", [1e-30, 1e-36, 1e-38, 1e-40, 1e-44, 3e38, 3.2e38], ids=str)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
def test_tiny_and_huge_stay_finite(amax, kind):
    x = torch.randn(4, 8).clamp(-1, 1)
    x[0, 0] = 1
    x = (x * amax).bfloat16()
    q, scale = quantize_fp8_block(x, scale=kind)
    assert_same((q, scale), reference(x, 128, 128, kind), kind)
    back = dequantize_fp8(q, scale, dtype=torch.float32)
    assert scale.float().min() >= 2.0**-126 and back.isfinite().all()
    # half a step of e4m3 relative to the value (1/16), or half its smallest number relative to the scale (2^-10)
    bound = torch.maximum(x.double().abs() / 16, scale.double() * 2.0**-10)
    assert ((back.double() - x.double()).abs() <= bound * (1 + 1e-6)).all()


def test_zero_block_has_scale_one_and_zero_codes():
    w = torch.randn(256, 256)
    w[:128, 128:] = 0
    for kind in STORED:
        q, scale = quantize_fp8_block(w, scale=kind)
        assert scale[0, 1].float() == 1 and not q[:128, 128:].float().any()
        assert (scale.float() != 1).sum() == 3


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_non_finite_value_makes_its_own_block_nan_and_no_other(bad):
    w = torch.randn(200, 300)
    clean = quantize_fp8_block(w)
    w[130, 290] = bad
    for kind in STORED:
        q, scale = quantize_fp8_block(w, scale=kind)
        assert scale[1, 2].float().isnan() and scale.float().isnan().sum() == 1
        assert (q.view(torch.uint8)[128:, 256:] == 0x7F).all()
        assert dequantize_fp8(q, scale).isnan().sum() == 72 * 44
    assert torch.equal(quantize_fp8_block(w)[0][:128].view(torch.uint8), clean[0][:128].view(torch.uint8))


@pytest.mark.parametrize("exponent", [-117, -60, -1, 0, 8, 90, 119])
def test_ue8m0_at_its_boundaries(exponent):
    """448 * 2^k needs exactly 2^k; the next fp32 number above needs twice that; a power of two is no special case."""
    at = torch.tensor(448.0 * 2.0**exponent)
    up = torch.nextafter(at, torch.tensor(torch.inf))
    down = torch.nextafter(at, torch.tensor(0.0))
    power = torch.tensor(2.0**exponent)
    _, scale = quantize_fp8_tokens(torch.stack([down, at, up, power])[:, None], scale="ue8m0")
    expected = [2.0**exponent, 2.0**exponent, 2.0 ** (exponent + 1), 2.0 ** (exponent - 8)]
    assert scale.double().flatten().tolist() == expected


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
def test_sqnr_on_normal_weights(kind):
    w = (torch.randn(512, 768) * 0.02).bfloat16()
    assert sqnr_db(w, dequantize_fp8(*quantize_fp8_block(w, scale=kind), dtype=torch.float32)) > 31.3


def test_rounding_the_scale_afterwards_is_worse():
    """The rule, and the two bugs it prevents: values quantized with a scale that is not the stored one."""
    w = (torch.randn(512, 768) * 0.02).bfloat16()
    q_fp32, s_fp32 = quantize_fp8_block(w)
    q_bf16, s_bf16 = quantize_fp8_block(w, scale="bf16")
    assert torch.equal(s_bf16, s_fp32.bfloat16())
    assert not torch.equal(q_fp32.view(torch.uint8), q_bf16.view(torch.uint8))
    first = sqnr_db(w, dequantize_fp8(q_bf16, s_bf16, dtype=torch.float32))
    after = sqnr_db(w, dequantize_fp8(q_fp32, s_bf16, dtype=torch.float32))
    assert first > after + 0.003
    q_up, s_up = quantize_fp8_block(w, scale="ue8m0")
    assert sqnr_db(w, dequantize_fp8(q_fp32, s_up, dtype=torch.float32)) < 15
    assert sqnr_db(w, dequantize_fp8(q_up, s_up, dtype=torch.float32)) > 31.3


def test_batches_slices_and_tiles_change_no_bit(monkeypatch):
    w = torch.randn(3, 260, 300).bfloat16()
    whole = quantize_fp8_block(w)
    for e in range(3):
        q, scale = quantize_fp8_block(w[e])
        assert torch.equal(q.view(torch.uint8), whole[0][e].view(torch.uint8)) and torch.equal(scale, whole[1][e])
    strided = quantize_fp8_block(w.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(strided[0].view(torch.uint8), whole[0].view(torch.uint8))
    back = dequantize_fp8(*whole)
    monkeypatch.setattr(fp8, "_TILE_ELEMENTS", 1)
    tiled = quantize_fp8_block(w)
    assert torch.equal(tiled[0].view(torch.uint8), whole[0].view(torch.uint8)) and torch.equal(tiled[1], whole[1])
    assert torch.equal(dequantize_fp8(*tiled), back)


def test_tokens_of_a_batch_are_those_of_its_rows():
    x = torch.randn(2, 3, 5, 200)
    q, scale = quantize_fp8_tokens(x)
    q_row, scale_row = quantize_fp8_tokens(x[1, 2, 4])
    assert scale.shape == (2, 3, 5, 2) and scale_row.shape == (2,)
    assert torch.equal(q[1, 2, 4].view(torch.uint8), q_row.view(torch.uint8)) and torch.equal(scale[1, 2, 4], scale_row)
    assert torch.equal(dequantize_fp8(q, scale)[1, 2, 4], dequantize_fp8(q_row, scale_row))
    assert quantize_fp8_tokens(x, group=None)[1].shape == (2, 3, 5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
def test_dequantize_is_one_product_and_one_rounding(kind, dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1).view(torch.float8_e4m3fn)
    scale = torch.tensor([[0.0123], [4.7]]).to(STORED[kind])
    magnitude = np.append(TABLE, np.nan)
    values = np.concatenate([magnitude, -magnitude]).astype(np.float32)
    expected = torch.from_numpy(values * scale.float().numpy()).to(dtype)
    got = dequantize_fp8(codes, scale, dtype=dtype)
    assert got.dtype == dtype and torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert torch.equal(torch.signbit(got[:, [0, 128]]), torch.tensor([[False, True]] * 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stored", [torch.float64, torch.float16])
def test_dequantize_takes_scales_that_we_never_write(stored, dtype):
    q, scale = quantize_fp8_channel(torch.randn(5, 64), scale="fp32")
    expected = q.float() * scale.to(stored).float()
    assert torch.equal(dequantize_fp8(q, scale.to(stored), dtype=dtype), expected.to(dtype))


@pytest.mark.parametrize("n,k", [(1, 1), (1, 300), (128, 128), (129, 128), (300, 129), (2, 256)])
def test_dequantize_finds_the_block_from_the_shapes(n, k):
    x = torch.randn(n, k)
    for q, scale, block in [
        (*quantize_fp8_block(x), (128, 128)),
        (*quantize_fp8_tokens(x), (1, 128)),
        (*quantize_fp8_channel(x), (1, k)),
    ]:
        assert torch.equal(dequantize_fp8(q, scale), dequantize_fp8(q, scale, block=block))
    q, scale = quantize_fp8_block(x, block=(3, 5))
    assert sqnr_db(x, dequantize_fp8(q, scale, block=(3, 5))) > 25


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 4), (0, 4, 4)], ids=str)
def test_empty_input_is_normal_input(shape):
    x = torch.empty(shape)
    for f in (quantize_fp8_block, quantize_fp8_channel, quantize_fp8_tokens):
        q, scale = f(x)
        assert q.shape == x.shape and dequantize_fp8(q, scale).shape == x.shape
    q_t, scale_t = quantize_fp8_block_both(x)[2:]
    assert q_t.shape == x.mT.shape and dequantize_fp8(q_t, scale_t).shape == x.mT.shape
    assert roundtrip_fp8_tokens(x).shape == x.shape


def test_no_gradient_is_recorded():
    q, scale = quantize_fp8_channel(torch.nn.Parameter(torch.randn(4, 4)))
    assert not q.requires_grad and not scale.requires_grad


@pytest.mark.parametrize("function", [quantize_fp8_block, quantize_fp8_channel, quantize_fp8_tokens])
def test_torch_compile_changes_no_bit(function):
    """Its own code for the rule would leave out the rounding to BF16, and so change a quarter of the values."""
    w = torch.randn(130, 160)
    q, scale = function(w)
    got = torch.compile(lambda w: (*function(w), dequantize_fp8(*function(w))))(w)
    for a, b in zip(got, (q, scale, dequantize_fp8(q, scale)), strict=True):
        assert torch.equal(a.float(), b.float())


def test_errors_name_the_argument():
    w = torch.randn(4, 4)
    q, scale = quantize_fp8_block(w)
    with pytest.raises(TypeError, match=r"w: .*float64"):
        quantize_fp8_block(w.double())
    with pytest.raises(TypeError, match=r"x: .*list"):
        quantize_fp8_tokens([1.0])
    with pytest.raises(ValueError, match=r"w: .*2 dimension.*\[4\]"):
        quantize_fp8_channel(w[0])
    with pytest.raises(ValueError, match=r"scale: .*'fp16'"):
        quantize_fp8_block(w, scale="fp16")
    with pytest.raises(ValueError, match=r"scale: .*'ue8m0'"):
        quantize_fp8_channel(w, scale="ue8m0")
    with pytest.raises(ValueError, match="block: "):
        quantize_fp8_block(w, block=(0, 128))
    with pytest.raises(ValueError, match="group: "):
        quantize_fp8_tokens(w, group=0)
    with pytest.raises(TypeError, match=r"q: .*uint8"):
        dequantize_fp8(q.view(torch.uint8), scale)
    with pytest.raises(ValueError, match=r"scale: .*\[3, 1\]"):
        dequantize_fp8(q, torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"scale: .*2x2"):
        dequantize_fp8(q, scale, block=(2, 2))
