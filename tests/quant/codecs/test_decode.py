"""GGUF decoders against ggml's C and gguf-py, bit for bit; of NaN only that it is one.

Reference: gguf-py for every type, and for block types ggml's decoders as libggml-python, xllamacpp and libgguf built
them. Random bytes, blocks that hypothesis writes, every scale a block can store, weights of every kind as our encoders
store them. Not covered: other processors; big-endian files.
"""

from concurrent.futures import ThreadPoolExecutor

import codec_cases
import ggml
import gguf
import numpy as np
import pytest
from codec_cases import IMPORTANCE
from hypothesis import given, settings
from hypothesis import strategies as st

import ornith_moe as om
from ornith_moe.quant.codecs.codec import DECODED, BlockCodec
from ornith_moe.quant.codecs.gguf import DECODERS, ENCODERS, dequantize_gguf, quantize_gguf
from ornith_moe.quant.codecs.sizes import block_shape

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about NaN and infinities
BLOCK_TYPES = [name for name, codec in DECODERS.items() if isinstance(codec, BlockCodec)]
HALVES = {name: DECODERS[name].halves for name in BLOCK_TYPES if DECODERS[name].halves} | {"IQ1_S": (0,)}


def by_gguf_py(encoded: np.ndarray, name: str) -> np.ndarray:
    return gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[name])


def random_bytes(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * block_shape(name)[1]), np.uint8)


def assert_same_floats(actual: np.ndarray, expected: np.ndarray) -> None:
    """The same bits, signs of zeros included, but for NaN."""
    assert actual.dtype == expected.dtype == np.float32 and actual.shape == expected.shape
    both_nan = np.isnan(actual) & np.isnan(expected)
    different = (actual.view(np.uint32) != expected.view(np.uint32)) & ~both_nan
    if different.any():
        where = tuple(np.argwhere(different)[0])
        raise AssertionError(f"{different.mean():.2%} of the values, at {where} {actual[where]}, not {expected[where]}")


def test_every_type_of_gguf_py_has_a_decoder():
    decoded = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
    assert decoded == DECODERS.keys()
    assert ENCODERS.keys() == decoded - {"IQ1_S", "IQ1_M"}


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("build", ggml.BUILDS)
def test_random_bytes_decode_as_in_ggml(name, build):
    """Every code, every byte of scale, and fp16 scales that are infinite, NaN and subnormal."""
    encoded = random_bytes(name, 40, 9)
    assert_same_floats(dequantize_gguf(encoded, name), ggml.dequantize(encoded, name, build=build))


@pytest.mark.parametrize("name", DECODERS)
def test_random_bytes_decode_as_in_gguf_py(name):
    """More than one chunk of blocks, and a last one that is not full."""
    block = block_shape(name)[0]
    encoded = random_bytes(name, 3, DECODED // 2 // block + 7, seed=1)
    assert_same_floats(dequantize_gguf(encoded, name), by_gguf_py(encoded, name))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_number_of_two_bytes(name):
    encoded = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(64, -1)
    assert_same_floats(dequantize_gguf(encoded, name), by_gguf_py(encoded, name))


@pytest.mark.parametrize("name", HALVES)
def test_every_fp16_scale(name):
    """Each scale of a block, all 65536 of it, over random codes; of large blocks one in thirteen and the edges."""
    every = np.arange(1 << 16)
    if block_shape(name)[0] == 256:
        every = every[(every % 13 == 0) | (every % 1024 < 2) | (every % 1024 == 1023)]
    scales = every.astype(np.uint16).view(np.uint8).reshape(-1, 2)
    for at in HALVES[name]:
        encoded = random_bytes(name, len(scales), 1, seed=2)
        encoded[:, at : at + 2] = scales
        assert_same_floats(dequantize_gguf(encoded, name), ggml.dequantize(encoded, name))


def test_every_scale_of_iq1_m():
    """Which lies in four places; one in sixteen of the numbers."""
    encoded = random_bytes("IQ1_M", 1 << 12, 1)
    d = np.arange(0, 1 << 16, 16, np.uint16) + np.arange(1 << 12, dtype=np.uint16) % 16
    words = encoded[:, 48:].view(np.uint16)
    for quarter in range(4):
        words[:, quarter] = words[:, quarter] & 0xFFF | (d >> 4 * quarter & 15) << 12
    assert_same_floats(dequantize_gguf(encoded, "IQ1_M"), ggml.dequantize(encoded, "IQ1_M"))


@pytest.mark.parametrize(("name", "size", "places"), [("MXFP4", 17, 1), ("NVFP4", 36, 4)])
def test_every_scale_of_one_byte(name, size, places):
    """NVFP4's are unsigned, and 127 is 0, not NaN; MXFP4's end in subnormal numbers and where 12 d is infinite."""
    encoded = random_bytes(name, 256, 1)
    assert encoded.shape[1] == size
    encoded[:, :places] = np.arange(256)[:, None]
    for build in ggml.BUILDS:
        assert_same_floats(dequantize_gguf(encoded, name), ggml.dequantize(encoded, name, build=build))
    assert_same_floats(dequantize_gguf(encoded, name), by_gguf_py(encoded, name))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", codec_cases.WEIGHTS)
def test_encoded_weights(name, kind):
    rows = codec_cases.WEIGHTS[kind][:3]
    if name == "F16":
        rows = np.clip(rows, -6e4, 6e4)
    encoded = quantize_gguf(rows, name, imatrix=IMPORTANCE["even"] if name in ("IQ2_XXS", "IQ2_XS") else None)
    decoded = dequantize_gguf(encoded, name)
    assert_same_floats(decoded, by_gguf_py(encoded, name))
    if name in BLOCK_TYPES:
        assert_same_floats(decoded, ggml.dequantize(encoded, name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_block(name, data):
    few = data.draw(st.binary(min_size=1, max_size=block_shape(name)[1]))
    encoded = np.resize(np.frombuffer(few, np.uint8), (1, data.draw(st.integers(1, 3)) * block_shape(name)[1]))
    decoded = dequantize_gguf(encoded, name)
    assert_same_floats(decoded, by_gguf_py(encoded, name))
    assert_same_floats(decoded, ggml.dequantize(encoded, name))


@pytest.mark.parametrize("name", DECODERS)
def test_shapes_and_memory(name):
    """Stacks, no rows, no columns; read-only, askew and strided memory; nothing is written beyond the values."""
    encoded = random_bytes(name, 6, 3)
    expected = dequantize_gguf(encoded, name)
    columns = expected.shape[1]
    assert columns == 3 * block_shape(name)[0]
    assert_same_floats(dequantize_gguf(encoded.reshape(1, 3, 2, -1), name), expected.reshape(1, 3, 2, columns))
    assert_same_floats(dequantize_gguf(encoded[0], name), expected[0])
    assert dequantize_gguf(encoded[:0], name).shape == (0, columns)
    assert dequantize_gguf(encoded[:, :0], name).shape == (6, 0)
    frozen = encoded.copy()
    frozen.flags.writeable = False
    assert_same_floats(dequantize_gguf(frozen, name), expected)
    assert_same_floats(dequantize_gguf(encoded[::2], name), expected[::2])
    askew = np.empty(encoded.size + 1, np.uint8)[1:].reshape(encoded.shape)
    askew[:] = encoded
    assert_same_floats(dequantize_gguf(askew, name), expected)
    if name in BLOCK_TYPES:
        guarded = np.full(columns * 6 + 64, 7, np.float32)
        frozen = encoded.reshape(-1)
        frozen.flags.writeable = False
        DECODERS[name].decode_blocks(frozen, guarded[32:-32])
        assert_same_floats(guarded[32:-32].reshape(6, columns), expected)
        assert (guarded[:32] == 7).all() and (guarded[-32:] == 7).all()


@pytest.mark.parametrize("name", DECODERS)
def test_two_threads(name):
    encoded = random_bytes(name, 16, DECODED // 8 // block_shape(name)[0])
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda part: dequantize_gguf(part, name), np.split(encoded, 8)))
    assert_same_floats(np.concatenate(parts), dequantize_gguf(encoded, name))


def test_read_only_rows_are_no_second_compilation():
    from ornith_moe.quant.codecs.blocks32 import decode_q8_0

    encoded = random_bytes("Q8_0", 2, 2)
    dequantize_gguf(encoded, "Q8_0")
    encoded.flags.writeable = False
    dequantize_gguf(encoded, "Q8_0")
    assert len(decode_q8_0.signatures) == 1


@pytest.mark.parametrize(
    ("rows", "name", "word"),
    [
        (np.zeros((1, 34), np.uint8), "Q8", "GGUF type"),
        (np.zeros((1, 292), np.uint8), "Q8_K", "no decoder for Q8_K in this version; have F32, F16"),
        (np.zeros((1, 33), np.uint8), "Q8_0", "whole 34-byte"),
        (np.zeros((1, 34), np.int8), "Q8_0", "whole 34-byte Q8_0 blocks, got int8"),
        (np.zeros((), np.uint8), "F16", "whole 2-byte"),
    ],
)
def test_wrong_use_is_refused(rows, name, word):
    with pytest.raises(ValueError, match=word):
        om.dequantize_gguf(rows, name)


def test_a_row_written_by_hand():
    """Q4_0 holds values 0 to 15 in low nibbles, then 16 to 31."""
    codes = np.arange(16, dtype=np.uint8)
    row = np.concatenate([np.array([0.5], np.float16).view(np.uint8), codes | (15 - codes) << 4])
    expected = np.concatenate([codes, 15 - codes]).astype(np.float32) * 0.5 - 4
    assert np.array_equal(dequantize_gguf(row, "Q4_0"), expected)
