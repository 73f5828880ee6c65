"""MLX's groups of small floats, bit for bit.

Reference: the definition in numpy and torch, written a second time: scales by logarithms, codes by distance to every
value. The definition itself is held against mlx's own kernel by the recorded folders of tests/quant/builds/test_mlx.py;
on every kind of weights of tests/codec_cases.py, in BF16 and fp32, `mx.quantize` of mlx 0.32.4 on a CPU gave the same
bytes, but for subnormal fp32 in mxfp4 and mxfp8, where its scales wrap.
"""

import math

import numpy as np
import pytest
import torch
from codec_cases import WEIGHTS

from ornith_moe.quant.builds.storages.mlx import MODES, MlxFloat
from ornith_moe.quant.codecs.mlx_float import decode_float, encode_float
from ornith_moe.quant.errors import UnstorableError
from ornith_moe.quant.source.slab import Slab

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
SUBNORMAL = np.float32(2.0**-126)


def e4m3(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and values, saturating."""
    rounded = torch.from_numpy(np.clip(values, -448, 448).astype(np.float32)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy(), rounded.float().numpy()


def definition(rows: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes, one a byte, and scales."""
    group, bits, *_ = MODES[mode]
    groups = rows.reshape(len(rows), -1, group)
    reach = np.abs(groups).max(-1) / np.float32(6 if bits == 4 else 448)
    if mode == "nvfp4":
        scales, values = e4m3(reach)
    else:
        powers = np.array([max(math.ceil(math.log2(r)), -127) if r else 0 for r in reach.reshape(-1).tolist()])
        scales = (powers + 127).astype(np.uint8).reshape(reach.shape)
        values = np.ldexp(np.float32(1), powers).reshape(reach.shape)
    with np.errstate(all="ignore"):
        quotients = np.where(values[..., None] > 0, groups / values[..., None], 0).reshape(rows.shape)
    if bits == 8:
        return e4m3(quotients)[0], scales
    codes = np.abs(np.abs(quotients)[..., None] - E2M1).argmin(-1)  # the first of the nearest
    return np.where((quotients < 0) & (codes > 0), codes + 8, codes).astype(np.uint8), scales


def unpacked(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)


@EVERY_MODE
@pytest.mark.parametrize("kind", WEIGHTS)
def test_codes_and_scales_are_those_of_the_definition(kind, mode):
    group, bits, *_ = MODES[mode]
    narrow = np.ascontiguousarray(WEIGHTS[kind][:3, : 2 * group + group])  # an odd number of groups
    for rows in (WEIGHTS[kind], narrow):
        for given in (rows, (rows.view(np.uint32) >> 16).astype(np.uint16)):
            plain = given if given.dtype == np.float32 else (given.astype(np.uint32) << 16).view(np.float32)
            plain = np.where(np.abs(plain) < SUBNORMAL, 0 * plain, plain) if kind == "subnormal" else plain
            codes, scales = encode_float(np.ascontiguousarray(plain) if kind == "subnormal" else given, group, bits)
            expected, wanted = definition(plain, mode)
            assert np.array_equal(scales, wanted)
            assert np.array_equal(unpacked(codes, bits), expected)


@EVERY_MODE
def test_values_are_codes_times_scales(mode):
    group, bits, *_ = MODES[mode]
    codes, scales = encode_float(WEIGHTS["normal"], group, bits)
    fields = unpacked(codes, bits)
    if bits == 8:
        values = torch.from_numpy(fields.copy()).view(torch.float8_e4m3fn).double().numpy()
    else:
        values = np.where(fields & 8, -1, 1) * E2M1[fields & 7]
    if mode == "nvfp4":
        steps = torch.from_numpy(scales.copy()).view(torch.float8_e4m3fn).double().numpy()
    else:
        steps = 2.0 ** (scales.astype(int) - 127)
    assert np.array_equal(decode_float(codes, scales, group, bits), values * steps.repeat(group, axis=1))


@EVERY_MODE
def test_weights_below_every_scale_become_zero_and_are_finite(mode):
    group, bits, *_ = MODES[mode]
    rows = np.full((2, 2 * group), 1e-42, np.float32)
    assert np.abs(decode_float(*encode_float(rows, group, bits), group, bits)).max() <= 2.0**-125


@EVERY_MODE
def test_a_storage_decodes_what_it_encodes_far_above_its_floor(mode):
    storage = MlxFloat(mode)
    slab = Slab(np.ascontiguousarray(WEIGHTS["normal"]).view(np.uint8), "F32")
    decoded = storage.decode(storage.encode(slab), 2048, "F32").astype(np.float64)
    noise = ((decoded - slab.float32) ** 2).sum()
    assert 10 * np.log10((slab.float32.astype(np.float64) ** 2).sum() / noise) > storage.floor_db + 5


def test_nvfp4_refuses_what_its_scale_cannot_reach():
    rows = np.full((2, 16), 2780, np.float32)
    MlxFloat("nvfp4").encode(Slab(rows.view(np.uint8), "F32"))
    rows[1, 3] = 2800
    with pytest.raises(UnstorableError, match=r"row 1, column 3: 2800 is beyond 2784"):
        MlxFloat("nvfp4").encode(Slab(rows.view(np.uint8), "F32"))
