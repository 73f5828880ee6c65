"""quant/conversion/stream.py: what happens to values on their way into a GGUF, and back.

Reference: Python's decimal exponential at 40 digits. That whole files come out right, however they are cut, is
test_convert.py; that the transforms mean what llama.cpp means by them, test_gguf_logits.py and test_gguf_converter.py.
"""

from decimal import Decimal, localcontext

import numpy as np

from ornith_moe.quant.conversion.stream import transform, untransform
from ornith_moe.quant.source.architectures.weight import GgufPlace
from ornith_moe.quant.source.slab import Slab

DECAY = GgufPlace("ssm_a", (1,), values="negative_exp")


def decay(values: np.ndarray) -> np.ndarray:
    return transform(DECAY, Slab(values.reshape(-1, 1).view(np.uint8), "F32")).float32.reshape(-1)


def test_the_decay_of_a_head_is_correctly_rounded():
    """-exp(A_log) is the fp32 number nearest to the exact value; fp32 exponentials miss it in up to 2 of 5 values."""
    values = (np.random.RandomState(0).randint(-(1 << 23), 1 << 23, 1000) * 2.0**-20).astype(np.float32)  # -8 to 8
    found = decay(values)
    near = np.stack([np.nextafter(found, np.float32(-np.inf)), found, np.nextafter(found, np.float32(0))])
    with localcontext(prec=40):
        for value, candidates in zip(values, near.T, strict=True):
            exact = -Decimal(float(value)).exp()
            distances = [abs(Decimal(float(candidate)) - exact) for candidate in candidates]
            assert distances[1] == min(distances), value


def test_the_decay_comes_back_and_its_ends_are_those_of_fp32():
    values = np.linspace(-80, 80, 4001, dtype=np.float32)
    assert np.abs(untransform(DECAY, decay(values)) - values).max() < 1e-7 * 80
    assert decay(np.array([89, -104, np.inf, -np.inf], np.float32)).tolist() == [-np.inf, -0.0, -np.inf, -0.0]
    assert np.isnan(decay(np.array([np.nan], np.float32))).all()
