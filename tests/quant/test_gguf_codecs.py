"""GGUF codecs against ggml's C, byte for byte, and decode against gguf-py.

Reference: `ggml_quantize_chunk` of libggml-python and of xllamacpp, two builds of ggml by different hands. Kinds of
weights: normal, heavy-tailed, constant, tiny, large, zeros, exact halves, blocks and columns of very different size,
ternary, almost constant. Kinds of importance: even, sparse, of very different size, zero blocks, all zero. Where C's
result is undefined, or the two builds disagree, a test of its own shows it. Not covered: other processors; the same
code runs there, but nobody has compared the bytes.
"""

import ggml
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.quant.codecs.codec import CHUNK, BlockCodec
from ornith_moe.quant.codecs.compiled import compiled
from ornith_moe.quant.codecs.tiles import half_bits, half_value
from ornith_moe.quant.errors import ConversionError
from ornith_moe.quant.gguf_codecs import ENCODERS, dequantize_gguf, quantize_gguf
from ornith_moe.quant.gguf_types import block_shape

COLUMNS = 2048
RANDOM = np.random.default_rng(0)
NORMAL = RANDOM.standard_normal((512, COLUMNS)).astype(np.float32)
FEW = NORMAL[:37]  # 296 super-blocks: the last tile of sixteen is not full
SPREAD = np.exp(4 * RANDOM.standard_normal((37, COLUMNS // 32))).repeat(32, axis=1).astype(np.float32)
WEIGHTS = {
    "normal": NORMAL,  # a million
    "heavy-tailed": FEW**5,
    "bf16": (FEW.view(np.uint32) & 0xFFFF0000).view(np.float32),
    "constant": np.full((4, COLUMNS), -0.37, np.float32),
    "almost constant": 1 + FEW * np.float32(1e-6),
    "tiny": FEW * np.float32(1e-30),
    "near the epsilons": FEW * np.float32(1e-14),
    "subnormal fp16": FEW * np.float32(1e-6),
    "subnormal": FEW * np.float32(1e-41),
    "large": FEW * np.float32(1e4),
    "zeros": np.zeros((4, COLUMNS), np.float32),
    "sparse": FEW * (RANDOM.random(FEW.shape) < 0.05),  # zeros of both signs
    "halves": (np.arange(4 * COLUMNS, dtype=np.float32).reshape(4, COLUMNS) % 255 - 127) / 2,
    "positive": np.abs(FEW),
    "ternary": np.sign(np.round(FEW)),
    "mixed blocks": np.clip(FEW * SPREAD, -6e4, 6e4),
    "mixed values": np.clip(FEW * np.exp(8 * RANDOM.standard_normal(FEW.shape)).astype(np.float32), -6e4, 6e4),
    "negative zero": np.full((1, COLUMNS), -0.0, np.float32),
}
EVEN = (0.1 + RANDOM.random(COLUMNS)).astype(np.float32)
IMPORTANCE = {
    "even": EVEN,
    "sparse": EVEN * (RANDOM.random(COLUMNS) < 0.1),
    "wide": np.exp(6 * RANDOM.standard_normal(COLUMNS)).astype(np.float32),
    "zero blocks": EVEN * (np.arange(COLUMNS) // 256 % 2 > 0),
    "zero": np.zeros(COLUMNS, np.float32),
}
BLOCK_TYPES = [name for name, codec in ENCODERS.items() if isinstance(codec, BlockCodec)]
IMPORTANT_TYPES = [name for name in BLOCK_TYPES if ENCODERS[name].important]


def overflows(encoded: np.ndarray, name: str) -> bool:
    """True if ggml stored a scale that fp16 cannot hold, where we raise."""
    blocks = encoded.reshape(-1, block_shape(name)[1])
    halves = [blocks[:, at : at + 2].copy().view(np.float16) for at in ENCODERS[name].halves]
    return any(not np.isfinite(half).all() for half in halves)


def assert_equals_ggml(rows, name, imatrix=None, build="xllamacpp"):
    expected = ggml.quantize(rows, name, imatrix, build=build)
    if isinstance(ENCODERS[name], BlockCodec) and overflows(expected, name):
        with pytest.raises(ConversionError, match="beyond fp16"):
            quantize_gguf(rows, name, imatrix=imatrix)
        return
    encoded = quantize_gguf(rows, name, imatrix=imatrix)
    different = encoded != expected
    assert not different.any(), f"{different.mean():.2%} of the bytes, first at {np.argwhere(different)[0]}"


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bytes_equal_ggml(name, kind):
    rows = WEIGHTS[kind]
    if name == "F16":
        rows = np.clip(rows, -6e4, 6e4)
    if name == "MXFP4" and kind == "subnormal":
        return  # undefined in C, see below
    assert_equals_ggml(rows, name, build="libggml-python")


@pytest.mark.parametrize("name", IMPORTANT_TYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bytes_with_importance_equal_ggml(name, kind):
    """A million normal weights with even importance, the other kinds with all."""
    for imatrix in [EVEN] if kind == "normal" else IMPORTANCE.values():
        assert_equals_ggml(WEIGHTS[kind], name, imatrix)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_two_builds_of_ggml_agree(name):
    for imatrix in (None, EVEN):
        encoded = [ggml.quantize(FEW, name, imatrix, build=build) for build in ggml.BUILDS]
        assert np.array_equal(*encoded)


def test_where_ggml_changed_we_follow_the_newer():
    """make_qkx3_quants of 2026-10 clamps before it rounds; before, a candidate could round a number beyond 2^22.

    One block in a hundred of these, which span twelve decades, and only because most columns have no importance.
    """
    random = np.random.default_rng(0)
    rows = random.standard_normal((32, COLUMNS)) * np.exp(8 * random.standard_normal((32, COLUMNS)))
    rows = np.clip(rows, -1e10, 1e10).astype(np.float32) * np.float32(2**-24)
    sparse = (random.random(COLUMNS) * (random.random(COLUMNS) < 0.1)).astype(np.float32)
    old, new = (ggml.quantize(rows, "Q5_K", sparse, build=build) for build in ggml.BUILDS)
    assert (old != new).any()
    assert np.array_equal(quantize_gguf(rows, "Q5_K", imatrix=sparse), new)


values = st.floats(width=32, allow_nan=False, min_value=-60000, max_value=60000)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_block_equals_ggml(name, data):
    """Blocks of a few values that hypothesis likes to make nasty, repeated; the smallest number is above 2^-125."""
    few = data.draw(st.lists(values.map(lambda v: v if abs(v) > 1e-37 else 0.0), min_size=1, max_size=48))
    rows = np.resize(np.array(few, np.float32), (1, 256))
    assert_equals_ggml(rows, name)
    if ENCODERS[name].important:
        weights = data.draw(st.lists(st.floats(width=32, min_value=0, max_value=1e6), min_size=1, max_size=48))
        assert_equals_ggml(rows, name, np.resize(np.array(weights, np.float32), 256))


def test_bf16_rounds_as_ggml_does_at_the_edges():
    """Ties, the largest numbers, infinities and NaNs of every kind."""
    high = np.array([0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF], np.uint32)
    low = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = ((high[:, None] << 16) | low).reshape(-1)
    rows = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32).reshape(3, 32)
    assert np.array_equal(quantize_gguf(rows, "BF16"), ggml.quantize(rows, "BF16"))


def test_fp16_in_integers_equals_numpy():
    """Every fp16, the middles between neighbours, and the float32 next to each."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = np.append((halves[1:] + halves[:-1]) / 2, np.float32(65520))
    edges = np.concatenate([halves, middles])
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(-1)), np.nextafter(edges, np.float32(1e9))])
    edges = np.concatenate([edges, -edges])
    with np.errstate(over="ignore"):
        expected = edges.astype(np.float16)
    bits = np.array([half_bits(v) for v in edges[::7]], np.uint16)
    assert np.array_equal(bits, expected.view(np.uint16)[::7])
    assert all(half_value(np.uint16(b)) == v for b, v in zip(bits, expected[::7].astype(np.float32), strict=True))


def test_mxfp4_exponents_equal_ggml():
    """An amax at, just below and just above every power of two: C takes the logarithm in float32, which rounds up."""
    powers = np.float32(2) ** np.arange(-124, 128, dtype=np.float32)
    steps = np.arange(-40, 41)
    amax = (powers.view(np.int32)[:, None] + steps).astype(np.int32).view(np.float32).reshape(-1)
    rows = np.repeat(amax[:, None], 32, axis=1) * np.linspace(-1, 1, 32, dtype=np.float32)
    assert_equals_ggml(rows, "MXFP4")
    exponent = quantize_gguf(rows, "MXFP4")[:, 0].reshape(-1, 81)
    assert (np.diff(exponent.astype(int), axis=1).argmax(axis=1) < 39).any()


def test_mxfp4_below_its_smallest_exponent():
    """C casts a negative float to uint8_t, which is undefined: on x86 the exponent is that of 2^126 and more."""
    rows = np.full((1, 32), 1e-38, np.float32)
    assert ggml.quantize(rows, "MXFP4")[0, 0] > 250
    encoded = quantize_gguf(rows, "MXFP4")
    assert encoded[0, 0] == 0
    assert np.allclose(dequantize_gguf(encoded, "MXFP4"), rows, rtol=0.2)


@pytest.mark.parametrize("name", ENCODERS)
def test_bytes_do_not_depend_on_the_cut(name):
    rows = NORMAL[:7, :768].copy()
    whole = quantize_gguf(rows, name)
    assert np.array_equal(whole, np.concatenate([quantize_gguf(rows[i : i + 1], name) for i in range(7)]))
    assert np.array_equal(whole, quantize_gguf(NORMAL[:7].reshape(7, 1, COLUMNS)[..., :768], name).reshape(7, -1))
    assert np.array_equal(quantize_gguf(NORMAL, name)[-1:], quantize_gguf(NORMAL[-1:], name))  # several chunks


@pytest.mark.parametrize("name", IMPORTANT_TYPES)
def test_importance_of_a_stack_is_that_of_its_matrices(name):
    stack, imatrix = NORMAL[:24].reshape(3, 8, COLUMNS), np.stack([IMPORTANCE[k] for k in ("even", "wide", "zero")])
    encoded = quantize_gguf(stack, name, imatrix=imatrix)
    for e in range(3):
        assert np.array_equal(encoded[e], quantize_gguf(stack[e], name, imatrix=imatrix[e]))


@pytest.mark.parametrize("name", IMPORTANT_TYPES)
def test_importance_lowers_the_error_where_it_is(name):
    errors = []
    for imatrix in (None, IMPORTANCE["wide"]):
        decoded = dequantize_gguf(quantize_gguf(FEW, name, imatrix=imatrix), name)
        errors.append(float((IMPORTANCE["wide"] * (decoded - FEW).astype(np.float64) ** 2).sum()))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("name", IMPORTANT_TYPES)
def test_importance_never_makes_a_nan(name):
    for imatrix in IMPORTANCE.values():
        for kind in ("normal", "zeros", "sparse", "tiny"):
            assert np.isfinite(dequantize_gguf(quantize_gguf(WEIGHTS[kind][:8], name, imatrix=imatrix), name)).all()


SQNR = {  # dB on normal weights, a little below what was measured
    "F16": 73, "BF16": 55, "Q8_0": 45, "Q4_0": 21.3, "Q4_1": 22.1, "Q5_0": 27.3, "Q5_1": 28.4, "Q2_K": 10.5, "Q3_K": 15,
    "Q4_K": 22, "Q5_K": 28, "Q6_K": 34, "IQ4_NL": 22, "IQ4_XS": 22, "MXFP4": 18, "NVFP4": 20, "TQ1_0": 0.5,
    "TQ2_0": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", SQNR)
def test_decode_is_near(name):
    """With gguf-py's decoder, which shares no code with either encoder."""
    error = dequantize_gguf(quantize_gguf(NORMAL, name), name).astype(np.float64) - NORMAL
    sqnr = 10 * np.log10((NORMAL.astype(np.float64) ** 2).sum() / (error**2).sum())
    assert SQNR[name] < sqnr < SQNR[name] + 2


def test_f32_is_exact():
    assert np.array_equal(dequantize_gguf(quantize_gguf(NORMAL, "F32"), "F32"), NORMAL)


@pytest.mark.parametrize("name", ENCODERS)
def test_empty_and_read_only_rows_are_normal_input(name):
    assert quantize_gguf(np.empty((0, 256), np.float32), name).shape == (0, quantize_gguf(FEW[:1, :256], name).shape[1])
    rows = FEW[:1].copy()
    rows.flags.writeable = False
    assert np.array_equal(quantize_gguf(rows, name), quantize_gguf(FEW[:1], name))


@pytest.mark.parametrize("name", [*BLOCK_TYPES, "F16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_an_error(name, value):
    row = CHUNK // COLUMNS + 3  # not in the first chunk
    rows = NORMAL[: row + 2].copy()
    rows[row, 777] = value
    with pytest.raises(ConversionError, match=f"row {row}, column 777 is {value}; expected finite"):
        quantize_gguf(rows, name)


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if ENCODERS[name].halves])
def test_a_scale_beyond_fp16_is_an_error(name):
    """ggml writes an infinite scale, or none at all where the square of the value is infinite."""
    row = CHUNK // COLUMNS + 3
    rows = NORMAL[: row + 2].copy()
    rows[row, 777] = 1e30
    encoded = ggml.quantize(rows, name)
    assert overflows(encoded, name) or dequantize_gguf(encoded, name)[row, 777] == 0
    with pytest.raises(ConversionError, match=rf"row {row}, column 777: 1e\+30 is beyond fp16"):
        quantize_gguf(rows, name)


def test_a_value_beyond_fp16_is_an_error():
    rows = np.zeros((3, 64), np.float32)
    rows[2, 40] = 1e6
    with pytest.raises(ConversionError, match="row 2, column 40"):
        quantize_gguf(rows, "F16")


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ((np.ones((2, 33), np.float32), "Q8_0"), ValueError, "blocks of 32"),
        ((np.ones((2, 128), np.float32), "Q4_K"), ValueError, "blocks of 256"),
        ((np.ones((2, 32)), "Q8_0"), TypeError, "float32"),
        ((np.ones((2, 256), np.float32), "IQ1_S"), ValueError, "no encoder for IQ1_S"),
        ((np.ones((2, 32), np.float32), "Q8"), ValueError, "GGUF type"),
    ],
)
def test_wrong_use_is_refused(arguments, error, word):
    with pytest.raises(error, match=word):
        quantize_gguf(*arguments)
    with pytest.raises(ValueError, match="whole 34-byte"):
        dequantize_gguf(np.zeros((1, 33), np.uint8), "Q8_0")


@pytest.mark.parametrize(
    ("imatrix", "word"),
    [
        (np.ones(255, np.float32), r"float32 \(256,\)"),
        (np.ones(256), "float64"),
        (np.ones((3, 256), np.float32), r"\(3, 256\)"),
        (np.full(256, -1, np.float32), "at least 0, got -1.0 at"),
        (np.full(256, np.nan, np.float32), "at least 0, got nan at"),
    ],
)
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_wrong_importance_is_refused(name, imatrix, word):
    with pytest.raises(ValueError, match=word):
        quantize_gguf(np.ones((2, 256), np.float32), name, imatrix=imatrix)


def test_cached_machine_code_is_as_new_as_every_file_of_the_codecs():
    """numba looks at the file of a kernel only, and a kernel holds code of functions from others."""
    _, sources = compiled(lambda x: x + 1)._cache._cache_file._source_stamp
    assert {"lanes.py", "search.py", "k_quants.py", "compiled.py"} <= {name for name, _ in sources}
