"""GGUF encoders against ggml's C, byte for byte. The decoders have test_gguf_decode.py.

Reference: ggml's quantizers as libggml-python, xllamacpp and libgguf built them, three builds by different hands. Kinds
of weights: normal, heavy-tailed, constant, tiny, large, zeros, exact halves, blocks and columns of very different size,
ternary, almost constant, trained. Kinds of importance: even, sparse, of very different size, zero blocks, all zero.
Where C's result is undefined or wrong, or two builds disagree, a test of its own shows it. Not covered: other
processors; the same code runs there, but nobody has compared the bytes.
"""

from concurrent.futures import ThreadPoolExecutor

import codec_cases
import ggml
import gguf
import numpy as np
import pytest
import torch
from codec_cases import COLUMNS, FEW, IMPORTANCE
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.quant.codecs.codec import CHUNK, BlockCodec
from ornith_moe.quant.codecs.gguf import ENCODERS, dequantize_gguf, quantize_gguf
from ornith_moe.quant.codecs.grids import GridCodec
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.errors import ConversionError
from ornith_moe.quant.simd.fp16 import half_bits, half_value

NORMAL = np.random.default_rng(0).standard_normal((512, COLUMNS)).astype(np.float32)  # a million
WEIGHTS = codec_cases.WEIGHTS | {"normal": NORMAL}
EVEN = IMPORTANCE["even"]
BLOCK_TYPES = [name for name, codec in ENCODERS.items() if isinstance(codec, BlockCodec)]
IMPORTANT_TYPES = [name for name in BLOCK_TYPES if ENCODERS[name].important]
PLAIN_TYPES = [name for name in ENCODERS if not ENCODERS[name].needs_importance]
GRIDS = [name for name in BLOCK_TYPES if isinstance(ENCODERS[name], GridCodec)]


def needed(name: str, columns: int = COLUMNS) -> np.ndarray | None:
    """Importance for a type that is not encoded without."""
    return None if name in PLAIN_TYPES else EVEN[:columns]


def overflows(encoded: np.ndarray, name: str) -> bool:
    """True if ggml stored a scale that fp16 cannot hold, where we raise."""
    blocks = encoded.reshape(-1, block_shape(name)[1])
    halves = [blocks[:, at : at + 2].copy().view(np.float16) for at in ENCODERS[name].halves]
    return any(not np.isfinite(half).all() for half in halves)


def misplaced(encoded: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """IQ3_S as ggml writes it, see `test_where_ggml_loses_values_of_iq3_s`: it gives zero sub-blocks no place."""
    blocks = encoded.reshape(-1, 110).copy()
    for block, zero in zip(blocks, (rows == 0).reshape(-1, 8, 32).all(axis=2), strict=True):
        for part in (block[2:66].reshape(8, 8), block[74:106].reshape(8, 4)):
            kept = part[~zero].copy()
            part[:] = 0
            part[: len(kept)] = kept
    return blocks.reshape(encoded.shape)


def assert_equals_ggml(rows, name, imatrix=None, build="xllamacpp"):
    expected = ggml.quantize(rows, name, imatrix, build=build)
    if isinstance(ENCODERS[name], BlockCodec) and overflows(expected, name):
        with pytest.raises(ConversionError, match="beyond fp16"):
            quantize_gguf(rows, name, imatrix=imatrix)
        return
    encoded = quantize_gguf(rows, name, imatrix=imatrix)
    if name == "IQ3_S":
        encoded = misplaced(encoded, rows)
    different = encoded != expected
    assert not different.any(), f"{different.mean():.2%} of the bytes, first at {np.argwhere(different)[0]}"


def sample(name: str, kind: str) -> np.ndarray:
    """Fewer of the types whose search takes ggml a second for a million weights."""
    rows = WEIGHTS[kind]
    return rows if name not in GRIDS else rows[: 100 if kind == "normal" else 9]


@pytest.mark.parametrize("name", PLAIN_TYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bytes_equal_ggml(name, kind):
    rows = sample(name, kind)
    if name == "F16":
        rows = np.clip(rows, -6e4, 6e4)
    if name == "MXFP4" and kind == "subnormal":
        return  # undefined in C, see below
    assert_equals_ggml(rows, name, build="xllamacpp" if name in GRIDS else "libggml-python")


@pytest.mark.parametrize("name", IMPORTANT_TYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bytes_with_importance_equal_ggml(name, kind):
    """A million normal weights with even importance, the other kinds with all."""
    for imatrix in [EVEN] if kind == "normal" else IMPORTANCE.values():
        assert_equals_ggml(sample(name, kind), name, imatrix)


def trained() -> np.ndarray:
    """A layer after a short training, so with rows and columns that differ as data made them."""
    random = torch.Generator().manual_seed(0)
    teacher = torch.randn(80, COLUMNS, generator=random) * torch.logspace(-2, 0, COLUMNS)
    w = (torch.randn(80, COLUMNS, generator=random) / COLUMNS**0.5).requires_grad_()
    step = torch.optim.AdamW([w], lr=3e-3, weight_decay=0.1)
    for _ in range(40):
        x = torch.randn(64, COLUMNS, generator=random) * torch.logspace(0, -1, COLUMNS)
        loss = (torch.tanh(x @ w.T) - torch.tanh(x @ teacher.T)).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
    return w.detach().bfloat16().float().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_a_million_weights_equal_two_builds_for_any_slabs_and_threads(name):
    """Eighty rows of each kind; slabs of seven rows on two threads and the whole on one."""
    random = np.random.default_rng(1)
    normal = random.standard_normal((80, COLUMNS)).astype(np.float32)
    kinds = [normal, normal**5, np.full_like(normal, 0.37), normal * np.float32(1e-30), 0 * normal, trained()]
    kinds.append(np.clip(normal * np.exp(4 * random.standard_normal(normal.shape)), -6e4, 6e4).astype(np.float32))
    huge = normal * np.float32(1e30)
    if name == "F16" or getattr(ENCODERS[name], "halves", ()):
        with pytest.raises(ConversionError, match="beyond fp16"):
            quantize_gguf(huge, name, imatrix=needed(name))
    else:
        kinds.append(huge)
    rows = np.concatenate(kinds)
    assert rows.size > 1e6
    for imatrix in (None, EVEN):
        if imatrix is None and name not in PLAIN_TYPES:
            continue
        whole = quantize_gguf(rows, name, imatrix=imatrix)
        for build in ("libggml-python", "libgguf"):
            assert np.array_equal(whole, ggml.quantize(rows, name, imatrix, build=build)), build
        with ThreadPoolExecutor(2) as pool:
            cuts = [rows[start : start + 7] for start in range(0, len(rows), 7)]
            slabs = pool.map(lambda cut, imatrix=imatrix: quantize_gguf(cut, name, imatrix=imatrix), cuts)
            assert np.array_equal(whole, np.concatenate(list(slabs)))


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name not in GRIDS])
def test_the_builds_of_ggml_agree(name):
    """Of the grids each build takes seconds to make its tables: the slow test above has them."""
    for imatrix in (None, EVEN):
        encoded = [ggml.quantize(FEW[:9], name, imatrix, build=build) for build in ggml.BUILDS]
        assert all(np.array_equal(encoded[0], other) for other in encoded[1:])


def test_where_ggml_loses_values_of_iq3_s():
    """Its writer does not step over a sub-block of zeros, so all later ones of the super-block land 32 values early."""
    rows = FEW[:1, :256].copy()
    rows[:, 32:64] = 0
    encoded, theirs = quantize_gguf(rows, "IQ3_S"), ggml.quantize(rows, "IQ3_S")
    assert all(np.array_equal(theirs, ggml.quantize(rows, "IQ3_S", build=build)) for build in ggml.BUILDS)
    assert np.array_equal(misplaced(encoded, rows), theirs)
    errors = [np.linalg.norm(dequantize_gguf(e, "IQ3_S") - rows) / np.linalg.norm(rows) for e in (encoded, theirs)]
    assert errors[0] < 0.2 < 1 < errors[1]


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in PLAIN_TYPES])
def test_importance_is_demanded_where_ggml_demands_it(name):
    with pytest.raises(ValueError, match=f"imatrix: {name} is not encoded without one"):
        quantize_gguf(FEW, name)


def test_where_ggml_changed_we_follow_the_newer():
    """make_qkx3_quants of 2026-10 clamps before it rounds; before, a candidate could round a number beyond 2^22.

    One block in a hundred of these, which span twelve decades, and only because most columns have no importance.
    """
    random = np.random.default_rng(0)
    rows = random.standard_normal((32, COLUMNS)) * np.exp(8 * random.standard_normal((32, COLUMNS)))
    rows = np.clip(rows, -1e10, 1e10).astype(np.float32) * np.float32(2**-24)
    sparse = (random.random(COLUMNS) * (random.random(COLUMNS) < 0.1)).astype(np.float32)
    old, new = (ggml.quantize(rows, "Q5_K", sparse, build=build) for build in ("libggml-python", "xllamacpp"))
    assert (old != new).any()
    assert np.array_equal(quantize_gguf(rows, "Q5_K", imatrix=sparse), new)


values = st.floats(width=32, allow_nan=False, min_value=-60000, max_value=60000)


@pytest.mark.parametrize("build", ggml.BUILDS)
@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_a_scale_without_a_finite_reciprocal(name, build):
    """Importance of 1e-45 leaves a subnormal scale; 0 / it is NaN, which hypothesis found to get another code."""
    rows, weights = (np.resize(np.array(few, np.float32), 256) for few in ([0, 1, 0, 0, 0], [0, 1e-45, 0, 0, 1]))
    assert_equals_ggml(rows[None], name, weights, build)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_block_equals_ggml(name, data):
    """Blocks of a few values that hypothesis likes to make nasty, repeated; the smallest number is above 2^-125."""
    few = data.draw(st.lists(values.map(lambda v: v if abs(v) > 1e-37 else 0.0), min_size=1, max_size=48))
    rows = np.resize(np.array(few, np.float32), (1, 256))
    assert_equals_ggml(rows, name, needed(name, 256))
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
    def encode(rows):
        return quantize_gguf(rows, name, imatrix=needed(name, rows.shape[-1]))

    rows = NORMAL[:7, :768].copy()
    whole = encode(rows)
    assert np.array_equal(whole, np.concatenate([encode(rows[i : i + 1]) for i in range(7)]))
    assert np.array_equal(whole, encode(NORMAL[:7].reshape(7, 1, COLUMNS)[..., :768]).reshape(7, -1))
    assert np.array_equal(encode(NORMAL[:150])[-1:], encode(NORMAL[149:150]))  # several chunks


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_as_the_bits_of_bf16_are_their_values(name):
    """Across a chunk, and with an error that tells the value and its place."""
    bits = torch.randn(CHUNK // 512 + 3, 512).bfloat16().view(torch.uint16).numpy()
    columns = np.linspace(0.1, 1, 512, dtype=np.float32) if ENCODERS[name].needs_importance else None
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(
        quantize_gguf(bits, name, imatrix=columns), quantize_gguf(values, name, imatrix=columns), equal_nan=True
    )
    if name not in ("F32", "BF16"):
        bits[-1, 7] = 0x7F80
        with pytest.raises(ConversionError, match=f"row {len(bits) - 1}, column 7 is inf"):
            quantize_gguf(bits, name, imatrix=columns)


@pytest.mark.parametrize("name", IMPORTANT_TYPES)
def test_importance_of_a_stack_is_that_of_its_matrices(name):
    stack, imatrix = NORMAL[:24].reshape(3, 8, COLUMNS), np.stack([IMPORTANCE[k] for k in ("even", "wide", "zero")])
    encoded = quantize_gguf(stack, name, imatrix=imatrix)
    for e in range(3):
        assert np.array_equal(encoded[e], quantize_gguf(stack[e], name, imatrix=imatrix[e]))


@pytest.mark.parametrize("name", IMPORTANT_TYPES)
def test_importance_lowers_the_error_where_it_is(name):
    errors = []
    for imatrix in (needed(name), IMPORTANCE["wide"]):
        decoded = dequantize_gguf(quantize_gguf(FEW, name, imatrix=imatrix), name)
        errors.append(float((IMPORTANCE["wide"] * (decoded - FEW).astype(np.float64) ** 2).sum()))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("name", IMPORTANT_TYPES)
def test_importance_never_makes_a_nan(name):
    for imatrix in IMPORTANCE.values():
        for kind in ("normal", "zeros", "sparse", "tiny"):
            assert np.isfinite(dequantize_gguf(quantize_gguf(WEIGHTS[kind][:8], name, imatrix=imatrix), name)).all()


@pytest.mark.parametrize("name", IMPORTANT_TYPES)
@pytest.mark.parametrize("factor", [1e-42, 1e-35, 1e30])
def test_importance_of_any_size_equals_ggml_and_is_finite(name, factor):
    """Sums that underflow or whose squares overflow."""
    imatrix = EVEN * np.float32(factor)
    assert_equals_ggml(FEW[:3], name, imatrix)
    assert np.isfinite(dequantize_gguf(quantize_gguf(FEW[:3], name, imatrix=imatrix), name)).all()


SQNR = {  # dB on normal weights, a little below what was measured
    "F16": 73, "BF16": 55, "Q8_0": 45, "Q4_0": 21.3, "Q4_1": 22.1, "Q5_0": 27.3, "Q5_1": 28.4, "Q2_K": 10.5, "Q3_K": 15,
    "Q4_K": 22, "Q5_K": 28, "Q6_K": 34, "IQ2_XXS": 8, "IQ2_XS": 9, "IQ2_S": 10.5, "IQ3_XXS": 12.4, "IQ3_S": 14.4,
    "IQ4_NL": 22, "IQ4_XS": 22, "MXFP4": 18, "NVFP4": 20, "TQ1_0": 0.5, "TQ2_0": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", SQNR)
def test_decode_is_near(name):
    """With gguf-py's decoder, which shares no code with either encoder."""
    rows, kind = NORMAL[:64], gguf.GGMLQuantizationType[name]
    error = gguf.quants.dequantize(quantize_gguf(rows, name, imatrix=needed(name)), kind).astype(np.float64) - rows
    sqnr = 10 * np.log10((rows.astype(np.float64) ** 2).sum() / (error**2).sum())
    assert SQNR[name] < sqnr < SQNR[name] + 2


def test_f32_is_exact():
    assert np.array_equal(dequantize_gguf(quantize_gguf(NORMAL, "F32"), "F32"), NORMAL)


@pytest.mark.parametrize("name", ENCODERS)
def test_empty_and_read_only_rows_are_normal_input(name):
    def encode(rows):
        return quantize_gguf(rows, name, imatrix=needed(name, rows.shape[-1]))

    assert encode(np.empty((0, 256), np.float32)).shape == (0, encode(FEW[:1, :256]).shape[1])
    rows = FEW[:1].copy()
    rows.flags.writeable = False
    assert np.array_equal(encode(rows), encode(FEW[:1]))


@pytest.mark.parametrize("name", [*BLOCK_TYPES, "F16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_an_error(name, value):
    row = CHUNK // COLUMNS + 3  # not in the first chunk
    rows = NORMAL[: row + 2].copy()
    rows[row, 777] = value
    with pytest.raises(ConversionError, match=f"row {row}, column 777 is {value}; expected finite"):
        quantize_gguf(rows, name, imatrix=needed(name))


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if ENCODERS[name].halves])
def test_a_scale_beyond_fp16_is_an_error(name):
    """ggml writes an infinite scale, none at all where the square of the value is infinite, or aborts (the grids)."""
    row = CHUNK // COLUMNS + 3
    rows = NORMAL[: row + 2].copy()
    rows[row, 777] = 1e30
    if name not in GRIDS:
        encoded = ggml.quantize(rows, name)
        assert overflows(encoded, name) or dequantize_gguf(encoded, name)[row, 777] == 0
    with pytest.raises(ConversionError, match=rf"row {row}, column 777: 1e\+30 is beyond fp16"):
        quantize_gguf(rows, name, imatrix=needed(name))


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
