"""GGUF codecs against ggml's C, byte for byte, and decode against gguf-py.

Reference: `ggml_quantize_chunk` of libggml-python. Kinds of weights: normal, heavy-tailed, constant, tiny, huge, zeros,
exact halves. Not covered: K-quants, which have no encoder yet.
"""

import ggml
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.quant.errors import ConversionError
from ornith_moe.quant.gguf_codecs import ENCODERS, dequantize_gguf, quantize_gguf

COLUMNS = 2048
NORMAL = np.random.default_rng(0).standard_normal((512, COLUMNS)).astype(np.float32)
WEIGHTS = {
    "normal": NORMAL,  # a million
    "heavy-tailed": (NORMAL**5)[:64],
    "bf16": (NORMAL.view(np.uint32) & 0xFFFF0000).view(np.float32)[:64],
    "constant": np.full((4, COLUMNS), -0.37, np.float32),
    "tiny": NORMAL[:64] * np.float32(1e-30),
    "subnormal": NORMAL[:64] * np.float32(1e-41),
    "large": NORMAL[:64] * np.float32(1e4),
    "zeros": np.zeros((4, COLUMNS), np.float32),
    "halves": (np.arange(4 * COLUMNS, dtype=np.float32).reshape(4, COLUMNS) % 255 - 127) / 2,
    "negative zero": np.full((1, 32), -0.0, np.float32),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bytes_equal_ggml(name, kind):
    rows = WEIGHTS[kind]
    if name == "F16" and kind == "heavy-tailed":
        rows = np.clip(rows, -6e4, 6e4)
    expected = ggml.quantize(rows, name)
    assert np.array_equal(quantize_gguf(rows, name), expected)


def test_bf16_rounds_as_ggml_does_at_the_edges():
    """Ties, the largest numbers, infinities and NaNs of every kind."""
    high = np.array([0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF], np.uint32)
    low = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = ((high[:, None] << 16) | low).reshape(-1)
    rows = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32).reshape(3, 32)
    assert np.array_equal(quantize_gguf(rows, "BF16"), ggml.quantize(rows, "BF16"))


@pytest.mark.parametrize("name", ENCODERS)
def test_bytes_do_not_depend_on_the_cut(name):
    whole = quantize_gguf(NORMAL[:7, :96], name)
    assert np.array_equal(whole, np.concatenate([quantize_gguf(NORMAL[i : i + 1, :96], name) for i in range(7)]))
    assert np.array_equal(whole, quantize_gguf(NORMAL[:7].reshape(7, 1, COLUMNS)[..., :96].copy(), name).reshape(7, -1))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-60000, max_value=60000), min_size=32, max_size=32))
def test_q8_0_equals_ggml_on_any_block(values):
    rows = np.array([values], np.float32)
    assert np.array_equal(quantize_gguf(rows, "Q8_0"), ggml.quantize(rows, "Q8_0"))


@pytest.mark.parametrize(("name", "bits"), [("F32", 24), ("F16", 11), ("BF16", 8), ("Q8_0", 7)])
def test_decode_is_near(name, bits):
    """Half a unit in the last place; for Q8_0 of the block's largest value, plus the rounding of its fp16 scale."""
    decoded = dequantize_gguf(quantize_gguf(NORMAL, name), name)
    scale = np.abs(NORMAL).reshape(-1, 32).max(1).repeat(32).reshape(NORMAL.shape) if name == "Q8_0" else np.abs(NORMAL)
    smallest = 2.0**-25 if name == "F16" else 0  # half of fp16's subnormal step
    assert (np.abs(decoded - NORMAL) <= scale * 2.0**-bits * 1.2 + smallest).all()
    assert name != "F32" or np.array_equal(decoded, NORMAL)


def test_empty_rows_are_normal_input():
    assert quantize_gguf(np.empty((0, 64), np.float32), "Q8_0").shape == (0, 68)


def test_beyond_fp16_is_an_error():
    rows = np.zeros((3, 64), np.float32)
    rows[2, 40] = 1e6
    with pytest.raises(ConversionError, match="row 2, column 40"):
        quantize_gguf(rows, "F16")
    rows[2, 40] = 1e8
    with pytest.raises(ConversionError, match="row 2, column 40"):
        quantize_gguf(rows, "Q8_0")


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ((np.ones((2, 33), np.float32), "Q8_0"), ValueError, "blocks of 32"),
        ((np.ones((2, 32)), "Q8_0"), TypeError, "float32"),
        ((np.ones((2, 256), np.float32), "Q4_K"), ValueError, "no encoder for Q4_K"),
        ((np.ones((2, 32), np.float32), "Q8"), ValueError, "GGUF type"),
    ],
)
def test_wrong_use_is_refused(arguments, error, word):
    with pytest.raises(error, match=word):
        quantize_gguf(*arguments)
    with pytest.raises(ValueError, match="whole 34-byte"):
        dequantize_gguf(np.zeros((1, 33), np.uint8), "Q8_0")
