"""Pieces that become whole chunks on their way into files.

Reference: the bytes themselves, put together in memory. Not covered: what a power cut leaves.
"""

import errno
import os
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.quant.conversion import writer
from ornith_moe.quant.conversion.writer import Piece, Writer

PAGE = 4096


def write(folder, lengths, order):
    """The file after these units of one piece each, and what should be in it; behind every third lie other bytes."""
    generator, header = random.Random(1), b"header " * 20
    content, owned, pieces = bytearray(header), [], []
    for number, length in enumerate(lengths):
        payload = generator.randbytes(length)
        owned.append((len(content), len(content) + length))
        pieces.append(Piece("build", 0, len(content), length, "", memoryview(payload)))
        content += payload + (b"constant" if number % 3 == 2 else b"")
    descriptor = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, len(content))
    os.pwrite(descriptor, header, 0)
    for number, (_, stop) in enumerate(owned):
        if number % 3 == 2:
            os.pwrite(descriptor, b"constant", stop)
    done = []
    with Writer([descriptor], [len(content)], [owned], done.append) as files:
        for unit in order:
            files.write(unit, [pieces[unit]])
            written = os.pread(descriptor, len(content), 0)
            assert all(written[slice(*owned[unit])] == pieces[unit].payload for unit in done[-3:])
    result = os.pread(descriptor, len(content) + 1, 0)
    os.close(descriptor)
    assert sorted(done) == sorted(order)
    return result, bytes(content)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=15), seed=st.integers(0, 99), few=st.booleans())
def test_any_order_and_few_chunks(tmp_path_factory, lengths, seed, few):
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK", 2 * PAGE)
        patch.setattr(writer, "MOST_OPEN_CHUNKS", 1 if few else 24)
        got, expected = write(tmp_path_factory.mktemp("out"), lengths, order)
    assert got == expected


def test_parts_of_chunks_leave_the_rest_alone(tmp_path, monkeypatch):
    """As after a conversion that was cut short: only what is missing is written again."""
    monkeypatch.setattr(writer, "CHUNK", 2 * PAGE)
    lengths = [3000] * 12
    got, expected = write(tmp_path, lengths, range(12))
    assert got == expected
    assert write(tmp_path, lengths, [3, 4, 8]) == (expected, expected)


def test_a_disk_that_takes_no_whole_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 2 * PAGE)
    write_all, refused = writer.write_all, []

    def refuse(descriptor, view, offset):
        if not refused and len(view) == 2 * PAGE and offset % PAGE == 0:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "not here")
        write_all(descriptor, view, offset)

    monkeypatch.setattr(writer, "write_all", refuse)
    got, expected = write(tmp_path, [PAGE] * 9, range(9))
    assert refused and got == expected
    monkeypatch.setattr(writer, "past_the_cache", lambda *file: None)
    assert write(tmp_path, [PAGE] * 9, range(9)) == (expected, expected)


def test_a_few_chunks_leave_at_a_time_and_no_unit_is_done_before(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 2 * PAGE)
    write_all, gate, begun, done = writer.write_all, threading.Event(), [], []

    def held(descriptor, view, offset):
        begun.append(offset)
        assert gate.wait(60)
        write_all(descriptor, view, offset)

    monkeypatch.setattr(writer, "write_all", held)
    chunks = [bytes([number]) * 2 * PAGE for number in range(writer.DEPTH + 2)]
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, size := sum(map(len, chunks)))
    with Writer([descriptor], [size], [[(0, size)]], done.append) as files:
        for number, payload in enumerate(chunks):
            if number == writer.DEPTH:
                while len(begun) < writer.DEPTH:
                    time.sleep(0.01)
                assert not done and sorted(begun) == [2 * PAGE * n for n in range(writer.DEPTH)]
                gate.set()
            files.write(number, [Piece("build", 0, number * 2 * PAGE, 2 * PAGE, "", memoryview(payload))])
    assert os.pread(descriptor, size, 0) == b"".join(chunks) and sorted(done) == list(range(len(chunks)))
    os.close(descriptor)
