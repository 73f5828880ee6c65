"""MLX's affine groups, bit for bit.

Reference: the definition in numpy, written a second time over whole rows, and codes packed bit by bit; the definition
itself is held against mlx's own kernel by the recorded folders of tests/quant/builds/test_mlx.py. On every kind of
weights of tests/codec_cases.py, in BF16 and fp32, `mx.quantize` of mlx 0.32.4 on a CPU gave the same bytes. Not
covered: mlx's kernels for Metal and CUDA, which round differently.
"""

import numpy as np
import pytest
from codec_cases import WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.quant.builds.storages.mlx import FLOOR_DB, MlxAffine
from ornith_moe.quant.codecs.mlx import BITS, GROUP, decode_affine, encode_affine
from ornith_moe.quant.errors import UnstorableError
from ornith_moe.quant.source.slab import Slab

EVERY_BITS = pytest.mark.parametrize("bits", BITS)


def definition(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes, scales, biases, and what they mean."""
    groups, top = rows.reshape(len(rows), -1, GROUP), np.float32(2**bits - 1)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    below = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, np.float32(1e-7)) * np.where(below, 1, -1).astype(np.float32)
    edge = np.where(below, low, high)
    steps = np.rint(edge / scale)
    scale = np.where(steps != 0, edge / np.where(steps != 0, steps, 1), scale).astype(np.float32)
    bias = np.where(steps != 0, edge, 0).astype(np.float32)
    codes = np.clip(np.rint((groups - bias) / scale), 0, top)
    fields = codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    packed = np.packbits(fields.reshape(len(rows), -1), axis=-1, bitorder="little")
    values = codes.astype(np.float32) * scale + bias
    return packed, scale[..., 0], bias[..., 0], values.reshape(rows.shape)


def assert_equals_definition(rows: np.ndarray, bits: int) -> None:
    codes, scales, biases = encode_affine(rows, bits)
    plain = rows if rows.dtype == np.float32 else (rows.astype(np.uint32) << 16).view(np.float32)
    *expected, values = definition(plain, bits)
    for found, wanted in zip((codes, scales, biases), expected, strict=True):
        assert np.array_equal(found, wanted)
    assert np.array_equal(decode_affine(codes, scales, biases, bits), values)


@EVERY_BITS
@pytest.mark.parametrize("kind", WEIGHTS)
def test_codes_and_values_are_those_of_the_definition(kind, bits):
    assert_equals_definition(WEIGHTS[kind], bits)
    assert_equals_definition((WEIGHTS[kind].view(np.uint32) >> 16).astype(np.uint16), bits)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=GROUP, max_size=GROUP), st.sampled_from(BITS))
def test_a_group_of_any_values(values, bits):
    assert_equals_definition(np.array([values], np.float32), bits)


@EVERY_BITS
def test_both_ends_are_kept(bits):
    """The end of larger magnitude exactly, whatever the bits; zero too where the other end has the other sign."""
    row = np.linspace(-1, 3, GROUP, dtype=np.float32)[None]
    decoded = decode_affine(*encode_affine(row, bits), bits)
    assert decoded[0, -1] == 3 and np.abs(decoded - row).max() <= 4 / (2**bits - 1)


def test_no_rows_are_no_rows():
    for part in encode_affine(np.empty((0, GROUP), np.float32), 4):
        assert part.shape[0] == 0


@EVERY_BITS
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_storage_decodes_what_it_encodes_far_above_its_floor(bits, dtype):
    random = np.random.default_rng(bits)
    storage = MlxAffine(bits, dtype)
    for rows in (random.standard_normal((8, 2048)), random.standard_t(3, (8, 2048))):
        slab = Slab((rows * 0.02).astype(np.float32).view(np.uint8), "F32")
        decoded = storage.decode(storage.encode(slab), 2048, "F32").astype(np.float64)
        noise = ((decoded - slab.float32) ** 2).sum()
        assert 10 * np.log10((slab.float32.astype(np.float64) ** 2).sum() / noise) > FLOOR_DB[bits] + 1.5


@pytest.mark.parametrize(("dtype", "largest"), [("BF16", 3e38), ("F16", 7e4)])
def test_a_span_beyond_its_dtype_is_refused(dtype, largest):
    rows = np.zeros((2, 2 * GROUP), np.float32)
    rows[1, GROUP:] = np.linspace(-largest, largest, GROUP)
    with pytest.raises(UnstorableError, match=r"row 1"):
        MlxAffine(4, dtype).encode(Slab(rows.view(np.uint8), "F32"))
