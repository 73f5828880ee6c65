"""quant/source/transforms.py: what happens to values, rows and columns on their way into a build, and back.

Reference: Python's decimal exponential at 40 digits, and orders written out. That whole files come out right, however
they are cut, is test_convert.py and test_toy_architecture.py; that the transforms mean what llama.cpp means by them,
test_logits.py and test_converter.py.
"""

from decimal import Decimal, localcontext

import numpy as np
import pytest

from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.transforms import AddOne, Every, HeadSwap, NegativeExp, Same, Transform

DECAY = Transform(NegativeExp())


def slab_of(values: np.ndarray) -> Slab:
    return Slab(np.ascontiguousarray(values, np.float32).view(np.uint8), "F32")


def decay(values: np.ndarray) -> np.ndarray:
    return DECAY.forward(slab_of(values.reshape(-1, 1))).float32.reshape(-1)


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
    assert np.abs(DECAY.inverse(decay(values)) - values).max() < 1e-7 * 80
    assert decay(np.array([89, -104, np.inf, -np.inf], np.float32)).tolist() == [-np.inf, -0.0, -np.inf, -0.0]
    assert np.isnan(decay(np.array([np.nan], np.float32))).all()


def test_positions_of_an_order():
    assert HeadSwap(1, 2, 3, 1).source_index(8).tolist() == [0, 1, 4, 2, 5, 3, 6, 7]
    assert Every(1, 2, 4).source_index(8).tolist() == [1, 2, 5, 6]
    assert Every(1, 2, 4).target_index(8).tolist() == [-1, 0, 1, -1, -1, 2, 3, -1]
    parts = [Every(start, size, 5).source_index(20) for start, size in ((0, 3), (3, 1), (4, 1))]
    assert sorted(np.concatenate(parts)) == list(range(20)), "parts that lie interleaved are the whole"


@pytest.mark.parametrize("values", [Same(), AddOne(), NegativeExp()])
@pytest.mark.parametrize("columns", [None, HeadSwap(1, 2, 3, 1)])
def test_a_transform_comes_back(values, columns):
    """To the bit where it says so, and within the rounding of the stored value otherwise."""
    weights = np.random.RandomState(0).standard_normal((3, 8)).astype(np.float32)
    transform = Transform(values, columns=columns)
    back = transform.inverse(transform.forward(slab_of(weights)).float32)
    assert np.abs(back - weights).max() <= (0 if transform.exact else 2**-23 * 4)
    assert transform.exact == (values == Same())


@pytest.mark.parametrize("rows", [HeadSwap(2, 2, 3, 1), Every(1, 2, 4)])
def test_slabs_of_rows_are_the_rows_of_the_whole(rows):
    weights = np.arange(16, dtype=np.float32).reshape(8, 2)
    transform = Transform(rows=rows)
    built = np.full((len(rows.source_index(8)), 2), np.nan, np.float32)
    for start in range(0, 8, 3):
        slab = slab_of(weights[start : start + 3])
        targets = transform.targets(start, len(slab.raw), 8)
        built[targets[targets >= 0]] = transform.taken(slab, start, 8).float32
    assert np.array_equal(built, weights[rows.source_index(8)])
