"""Files read back while they are written: their sha256, and what is not as it was written.

Reference: hashlib and xxhash over the whole file, read as usual. Not covered: a disk that gives back something else
than the page cache holds; what follows of damage is in test_convert.py.
"""

import errno
import hashlib
import os
import random

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.quant.conversion import readback
from ornith_moe.quant.conversion.readback import ReadBack
from ornith_moe.quant.errors import ConversionError

PAGE = 4096


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(readback, "CHUNK", 2 * PAGE)
    monkeypatch.setattr(readback, "SPAN", 4 * PAGE)


@pytest.fixture(params=["direct", "cached", "refused"])
def way(request, monkeypatch):
    """Past the page cache, through it, and where the system takes back what it has promised."""
    if request.param == "cached":
        monkeypatch.setattr(readback, "past_the_cache", lambda *file: None)
    if request.param == "refused":
        preadv, past = os.preadv, readback.past_the_cache
        direct = set()

        def refuse(descriptor, *rest):
            if descriptor in direct:
                direct.remove(descriptor)
                raise OSError(errno.EINVAL, "no direct reading here")
            return preadv(descriptor, *rest)

        def noted(*file):
            found = past(*file)
            direct.add(found)
            return found

        monkeypatch.setattr(readback, "past_the_cache", noted)
        monkeypatch.setattr(os, "preadv", refuse)


def written(folder, lengths, gaps, seed):
    """A file of extents of these `lengths`, each behind a gap of bytes that no weight owns: (descriptor, its bytes,
    owned ranges, extents)."""
    generator = random.Random(seed)
    content, owned, extents = generator.randbytes(100), [], []
    for length, gap in zip(lengths, gaps, strict=True):
        content += bytes(gap)
        payload = generator.randbytes(length)
        owned.append((len(content), len(content) + length))
        extents.append((0, len(content), length, xxhash.xxh3_128_hexdigest(payload)))
        content += payload
    descriptor = os.open(folder / f"{seed}", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.pwrite(descriptor, content, 0)
    return descriptor, content, owned, extents


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 5 * PAGE), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_any_order_of_extents(tmp_path_factory, lengths, seed):
    folder, gaps = tmp_path_factory.mktemp("file"), [n % 3 * 31 for n in lengths]
    descriptor, content, owned, extents = written(folder, lengths, gaps, seed)
    told = []
    with ReadBack([descriptor], [len(content)], [owned], 2, lambda *done: told.append(done)) as back:
        for unit in random.Random(seed).sample(range(len(extents)), len(extents)):
            back.written(unit, [extents[unit]])
        assert back.finish([0]) == ({0: hashlib.sha256(content).hexdigest()}, set())
    assert told[-1] == (len(content), len(content))
    os.close(descriptor)


def test_damage_is_found_where_it_is(tmp_path, way):
    """Bytes that changed after they were written, an extent that was lost, and one that claims another's bytes."""
    descriptor, content, owned, extents = written(tmp_path, [3 * PAGE, 900, 5 * PAGE], [0, 7, 0], 1)
    os.pwrite(descriptor, b"?", owned[1][0] + 5)
    with ReadBack([descriptor], [len(content)], [owned], 1, lambda *done: None) as back:
        for unit, extent in enumerate(extents):
            back.written(unit, [extent])
        assert back.finish([0])[1] == {1}
    os.ftruncate(descriptor, len(content) - 10)
    with ReadBack([descriptor], [len(content)], [owned], 1, lambda *done: None) as back:
        for unit, extent in enumerate(extents):
            back.written(unit, [extent])
        assert back.finish([0])[1] == {1, 2}
    os.pwrite(descriptor, content, 0)
    with ReadBack([descriptor], [len(content)], [owned], 1, lambda *done: None) as back:
        back.written(0, extents)
        back.written(1, [(0, owned[0][0] + 1, 10, "")])
        assert back.finish([0]) == ({0: hashlib.sha256(content).hexdigest()}, {1})
    with (
        ReadBack([descriptor], [len(content)], [owned], 1, lambda *done: None) as back,
        pytest.raises(ConversionError, match=f"covers {8 * PAGE} bytes of file 0 and its weights own {8 * PAGE + 900}"),
    ):
        back.written(0, [extents[0], extents[2]])
        back.finish([0])
    os.close(descriptor)


def test_a_file_is_read_before_the_last_of_it_is_written(tmp_path):
    descriptor, content, owned, extents = written(tmp_path, [PAGE] * 40, [0] * 40, 2)
    told = []
    with ReadBack([descriptor], [len(content)], [owned], 1, lambda *done: told.append(done)) as back:
        for unit, extent in enumerate(extents[:-1]):
            back.written(unit, [extent])
        back._reading[0].result()
        assert told and told[-1][0] >= 4 * PAGE
        back.written(39, [extents[39]])
        assert back.finish([0])[0] == {0: hashlib.sha256(content).hexdigest()}
    os.close(descriptor)
