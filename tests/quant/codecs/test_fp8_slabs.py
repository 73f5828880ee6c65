"""FP8 of slabs in machine code, bit for bit.

Reference: the rule in torch, `ornith_moe.quant.fp8`, whose own tests hold it against a second formulation. NaN
payloads of decoded values are not compared. Not covered: other processors; the arithmetic is integer or IEEE.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from ornith_moe.quant import fp8
from ornith_moe.quant.builds.storages.fp8 import FP8Block, FP8Channel
from ornith_moe.quant.codecs.fp8_slabs import decode_fp8, encode_fp8
from ornith_moe.quant.simd.lanes import LANES, load, store
from ornith_moe.quant.simd.small_floats import larger_magnitude, largest_magnitude, rounded
from ornith_moe.quant.source.slab import Slab


def by_rule(function):
    """A function of quant/fp8.py as it computes in torch: on a CPU it would call what is tested here."""

    def call(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fp8, "_has_machine_code", lambda *_: False)
            return function(*arguments, **options)

    return call


quantize_fp8_block, quantize_fp8_channel, quantize_fp8_tokens, dequantize_fp8 = map(
    by_rule, (fp8.quantize_fp8_block, fp8.quantize_fp8_channel, fp8.quantize_fp8_tokens, fp8.dequantize_fp8)
)
RANDOM = np.random.default_rng(0)
EVERY_BF16 = np.arange(1 << 16, dtype=np.uint16)
RECIPES = {  # name: block, definition, scales, rounded to BF16 first
    "block": ((128, 128), quantize_fp8_block, ("fp32", "bf16", "ue8m0"), True),
    "channel": ((1, None), quantize_fp8_channel, ("bf16", "fp32"), True),
    "tokens": ((1, 128), quantize_fp8_tokens, ("fp32", "ue8m0"), False),
}
CASES = [(recipe, scale) for recipe, (_, _, scales, _) in RECIPES.items() for scale in scales]
every_case = pytest.mark.parametrize(("recipe", "scale"), CASES)


def tensor(rows: np.ndarray) -> torch.Tensor:
    t = torch.from_numpy(rows.copy())
    return t.view(torch.bfloat16) if rows.dtype == np.uint16 else t


def raw(t: torch.Tensor) -> np.ndarray:
    """The bytes; an empty tensor has strides of zero, which torch does not view as bytes."""
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(*t.shape[:-1], t.shape[-1] * t.itemsize)


def assert_equals_definition(rows, recipe, scale):
    block, define, _, bf16_first = RECIPES[recipe]
    q, s = encode_fp8(rows, block, scale=scale, bf16_first=bf16_first)
    expected_q, expected_s = define(tensor(rows), scale=scale)
    assert s.shape == expected_s.shape
    assert np.array_equal(q, raw(expected_q))
    assert np.array_equal(np.ascontiguousarray(s).view(np.uint8), raw(expected_s))
    for dtype, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        decoded = decode_fp8(q, s, block, dtype=dtype)
        expected = dequantize_fp8(expected_q, expected_s, block=block if block[1] else None, dtype=torch_dtype)
        decoded = tensor(decoded)
        assert torch.equal(decoded.isnan(), expected.isnan())
        assert np.array_equal(raw(decoded.nan_to_num(0)), raw(expected.nan_to_num(0)))


@every_case
def test_every_bf16_in_every_position(recipe, scale):
    """Neighbours together, then mixed so that each is a fraction of another's magnitude, in all lanes."""
    finite = EVERY_BF16[(EVERY_BF16 & 0x7FFF) < 0x7F80]
    mixed = RANDOM.permutation(np.concatenate([finite, finite[: len(EVERY_BF16) - len(finite)]]))
    assert_equals_definition(EVERY_BF16.reshape(256, 256), recipe, scale)
    for shift in range(LANES):
        assert_equals_definition(np.roll(mixed, shift).reshape(256, 256), recipe, scale)
        scaled = np.roll(mixed, shift).reshape(256, 256).copy()
        scaled[:, 255] = 0x7F00  # every row and block has the same large scale, so small values reach its subnormals
        assert_equals_definition(scaled, recipe, scale)


@every_case
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 15), (130, 129), (256, 300), (3, 2048), (0, 16)])
def test_shapes_and_dtypes(recipe, scale, dtype, shape):
    rows = RANDOM.standard_normal(shape).astype(np.float32) * np.float32(3)
    assert_equals_definition(
        rows.view(np.uint16)[..., ::2].copy() if dtype is np.uint16 else rows.astype(dtype), recipe, scale
    )


@every_case
def test_random_bits_of_fp32(recipe, scale):
    """Every exponent, subnormals, NaN and Inf in some blocks and in none."""
    bits = RANDOM.integers(0, 1 << 32, (256, 1024), np.uint32).view(np.float32)
    assert_equals_definition(bits, recipe, scale)
    assert_equals_definition(np.where(np.isfinite(bits), bits, np.float32(1)), recipe, scale)
    with np.errstate(invalid="ignore"):
        assert_equals_definition(bits * np.float32(1e-38), recipe, scale)


@every_case
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_values(recipe, scale, data):
    few = data.draw(st.lists(st.floats(width=32), min_size=1, max_size=40))
    assert_equals_definition(np.resize(np.array(few, np.float32), (2, 144)), recipe, scale)


@pytest.mark.parametrize("scale", ["fp32", "bf16", "ue8m0"])
def test_every_code_decodes_as_torch_casts_it(scale):
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    s = {
        "fp32": np.array([[0.1]], np.float32),
        "bf16": np.array([[0x3DCC]], np.uint16),
        "ue8m0": np.array([[130]], np.uint8),
    }[scale]
    factor = {"fp32": 0.1, "bf16": 0.099609375, "ue8m0": 8.0}[scale]
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float() * torch.tensor(factor)
    for block in ((128, 128), (16, None)):
        assert np.array_equal(decode_fp8(codes, s, block), expected.numpy(), equal_nan=True)
        bf16 = tensor(decode_fp8(codes, s, block, dtype="bf16"))
        assert torch.equal(bf16.nan_to_num(9), expected.bfloat16().nan_to_num(9))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    ("storage", "define"), [(FP8Block(), quantize_fp8_block), (FP8Channel(), quantize_fp8_channel)]
)
def test_a_conversion_writes_the_definition(storage, define, dtype):
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    w = w.to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype])
    rows = raw(w)
    rows.flags.writeable = False  # as a mapped file
    encoded = storage.encode(Slab(rows, dtype))
    q, s = define(w, scale="bf16")
    assert np.array_equal(encoded[0], raw(q))
    assert np.array_equal(encoded[1], raw(s))
    expected = dequantize_fp8(q, s, dtype=torch.float32).numpy()
    assert np.array_equal(storage.decode(encoded, w.shape[1], dtype), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_non_finite_value_is_found(dtype, value):
    w = torch.randn(5, 48).to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype])
    assert Slab(raw(w), dtype).first_non_finite() is None
    assert Slab(raw(w[:0]), dtype).first_non_finite() is None
    w[3, 41] = w[4, 0] = value
    assert str(Slab(raw(w), dtype).first_non_finite()) == str((3, 41, value))


def test_a_block_that_is_no_whole_lanes_is_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        encode_fp8(np.ones((2, 40), np.float32), (1, 20), scale="fp32")


def test_lanes_round_and_compare_as_the_bits_do():
    values = np.array(
        [0, -0.0, 1, -1.00390625, 3.3e38, np.inf, -np.inf, np.nan, 1e-40, -3e-45, 65504, 1.5, -2, 7, 8, 9], np.float32
    )
    values[7:8].view(np.uint32)[0] = 0xFFFFFFFF  # a NaN whose bits rounding would carry past the sign

    @njit
    def run(x, short, out):
        store(short, 0, load(x, 0))
        store(out, 0, rounded(load(x, 0)))
        store(out, LANES, larger_magnitude(load(x, 0), load(short, 0)))
        return largest_magnitude(load(x, 0))

    short, out = np.zeros(LANES, np.uint16), np.zeros(2 * LANES, np.float32)
    assert np.isnan(run(values, short, out))
    expected = torch.from_numpy(values).bfloat16()
    assert torch.equal(tensor(short).nan_to_num(4), expected.nan_to_num(4))
    assert np.array_equal(out[:LANES], expected.float().numpy(), equal_nan=True)
    larger = np.maximum(np.abs(values), expected.float().abs().numpy())
    assert np.array_equal(out[LANES:], larger, equal_nan=True)
    values[7] = 1
    assert run(values, short, out) == np.inf


def test_every_ue8m0_exponent_decodes_as_torch_does():
    """2^-127 and NaN, which our scales never are, but those of a file may be."""
    scale = np.arange(256, dtype=np.uint8)[:, None]
    codes = np.resize(np.array([0x38, 0xB8, 0x01, 0x7F], np.uint8), (256, 16))
    expected = dequantize_fp8(
        torch.from_numpy(codes).view(torch.float8_e4m3fn),
        torch.from_numpy(scale).view(torch.float8_e8m0fnu),
        block=(1, 16),
        dtype=torch.float32,
    )
    assert np.array_equal(decode_fp8(codes, scale, (1, None)), expected.numpy(), equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("function", ["quantize_fp8_block", "quantize_fp8_channel", "quantize_fp8_tokens"])
def test_tensors_take_the_same_bits_from_any_number_of_threads(function, threads, monkeypatch):
    w = torch.randn(3, 300, 272, requires_grad=True)
    expected = by_rule(getattr(fp8, function))(w)
    monkeypatch.setattr(fp8, "_TILE_ELEMENTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    strided = torch.nn.Parameter(w.mT.contiguous()).mT
    for weight in (w, w.detach(), strided):
        got = getattr(fp8, function)(weight)
        assert all(np.array_equal(raw(a), raw(b)) for a, b in zip(got, expected, strict=True))
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            assert torch.equal(fp8.dequantize_fp8(*got, dtype=dtype), dequantize_fp8(*expected, dtype=dtype))


def test_a_parameter_that_was_quantized_can_still_be_freed():
    """FSDP frees unsharded parameters by resizing their storage, which torch forbids after `numpy()`."""
    weight = torch.nn.Parameter(torch.randn(128, 256))
    q, scale = fp8.quantize_fp8_block(weight)
    fp8.dequantize_fp8(q, scale)
    for tensor in (weight, q, scale):
        tensor.untyped_storage().resize_(0)
