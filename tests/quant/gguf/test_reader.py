"""Headers of GGUFs: sound ones as the `gguf` package reads them, damaged and hostile ones refused in one sentence.

Reference: gguf.GGUFReader, on real builds and on a file with every kind of value. Not covered: files larger than
memory, whose payload is never read.
"""

import struct
import time

import fixtures
import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.gguf import reader as gguf_reader
from ornith_moe.quant.gguf.reader import read_gguf_header
from ornith_moe.quant.source.weights import open_source

HUGE = 1 << 60


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    source = open_source(fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=4, mtp=True))
    report = convert(source, tmp_path_factory.mktemp("out"), ["gguf:F32", "gguf:Q8_0"])
    return {build.build: build.path for build in report.builds}


@pytest.fixture
def every_value(tmp_path):
    """Every kind of number, arrays of them, strings, an alignment of its own and quantized tensors of 1 to 4 sizes."""
    path = tmp_path / "every.gguf"
    writer = gguf.GGUFWriter(path, "test")
    for kind, dtype in gguf_reader.NUMBERS.items():
        kind, value = gguf.GGUFValueType(kind), np.dtype(dtype).type(3).item()
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"some.{kind.name}", [value] * 5, gguf.GGUFValueType.ARRAY, kind)
    writer.add_string("string", "Żółć\n")
    writer.add_array("strings", ["a", "", "日本語"])
    writer.add_custom_alignment(64)
    for kind, shape in [("Q4_K", (3, 144)), ("Q8_0", (34,)), ("TQ1_0", (2, 3, 108)), ("F16", (2, 1, 5, 2))]:
        data = np.zeros(shape, np.float16 if kind == "F16" else np.uint8)
        writer.add_tensor(kind, data, raw_dtype=None if kind == "F16" else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_as_the_package_reads(path):
    keys, tensors = read_gguf_header(path)
    reader = gguf.GGUFReader(path)
    assert [(t.name, t.dtype, list(t.shape), t.offset, t.nbytes) for t in tensors] == [
        (t.name, t.tensor_type.name, [int(n) for n in reversed(t.shape)], t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    expected = {name: entry.contents() for name, entry in reader.fields.items() if not name.startswith("GGUF.")}
    assert {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in keys.items()} == expected
    return keys, tensors


@pytest.mark.parametrize("build", ["gguf:F32", "gguf:Q8_0"])
def test_builds_equal_the_package(builds, build):
    keys, tensors = assert_as_the_package_reads(builds[build])
    assert keys["general.architecture"] == "qwen35moe" and len(tensors) > 50


def test_every_kind_of_value_equals_the_package(every_value):
    keys, tensors = assert_as_the_package_reads(every_value)
    assert keys["general.alignment"] == 64 and keys["one.BOOL"] is True and keys["strings"][2] == "日本語"
    assert [tensor.shape for tensor in tensors] == [(3, 256), (32,), (2, 3, 512), (2, 1, 5, 2)]


def test_truncation_is_refused(builds, tmp_path):
    whole = builds["gguf:Q8_0"].read_bytes()
    last = max(tensor.offset + tensor.nbytes for tensor in read_gguf_header(builds["gguf:Q8_0"])[1])
    path = tmp_path / "cut.gguf"
    for size in [*range(64), *range(64, 40_000, 997), last // 2, last - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: not a whole GGUF"):
            read_gguf_header(path)
    path.write_bytes(whole[:last])
    read_gguf_header(path)


def string(text):
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text)) + text


def key(name, kind, payload):
    return string(name) + struct.pack("<I", kind) + payload


def array(kind, count, payload=b""):
    return struct.pack("<IQ", kind, count) + payload


def info(name, shape=(4,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def raw_gguf(keys=(), tensors=(), *, key_count=None, tensor_count=None, version=3, payload=128):
    counts = (len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32 + payload)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (raw_gguf(tensor_count=HUGE), "are announced"),
        (raw_gguf(key_count=HUGE), "are announced"),
        (raw_gguf([key("a", 9, array(4, HUGE))]), "are announced"),
        (raw_gguf([key("a", 9, array(0, 1 << 40))]), "are announced"),
        (raw_gguf([key("a", 9, array(8, HUGE))]), "are announced"),
        (raw_gguf([key("a", 8, struct.pack("<Q", HUGE))]), "a string of"),
        (raw_gguf([key("a", 8, struct.pack("<Q", 1 << 26))]), "are announced"),
        (raw_gguf([struct.pack("<Q", (1 << 64) - 8)], key_count=1), "a string of"),
        (raw_gguf([key("a", 9, array(9, 1) * 100_000)]), "value of type 9"),
        (raw_gguf(tensors=[string("t") + struct.pack("<I", 0xFFFFFFFF)]), "4294967295 dimensions"),
        (raw_gguf(tensors=[info("t", (HUGE, HUGE, HUGE))]), "ends beyond"),
        (raw_gguf(tensors=[info("t", offset=HUGE)]), "ends beyond"),
    ],
)
def test_bombs_are_refused_at_once(tmp_path, raw, words):
    path = tmp_path / "bomb.gguf"
    path.write_bytes(raw)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=words):
        read_gguf_header(path)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"PK\3\4" * 8, "begin with GGUF"),
        (raw_gguf(version=1), "version 1"),
        (raw_gguf(version=0x03000000), "little-endian"),
        (raw_gguf([key("a", 0, b"\1")] * 2), "key 'a' is there twice"),
        (raw_gguf([key(b"\xff", 0, b"\1")]), "not UTF-8"),
        (raw_gguf([key("a", 99, b"\1")]), "type 99"),
        (raw_gguf([key("n" * 70_000, 0, b"\1")]), "a string of 70000 bytes"),
        (raw_gguf([key("general.alignment", 4, struct.pack("<I", 1 << 31))]), "alignment"),
        (raw_gguf([key("general.alignment", 4, struct.pack("<I", 0))]), "alignment"),
        (raw_gguf([key("general.alignment", 4, struct.pack("<I", 24))]), "alignment"),
        (raw_gguf([key("general.alignment", 7, b"\1")]), "alignment"),
        (raw_gguf([key("general.alignment", 8, string("32"))]), "alignment"),
        (raw_gguf(tensors=[info("t"), info("t", offset=32)]), "twice"),
        (raw_gguf(tensors=[info("a"), info("b")]), "overlaps"),
        (raw_gguf(tensors=[info("a", (16,)), info("b", offset=32)]), "'b' overlaps"),
        (raw_gguf(tensors=[info("a", offset=16)]), "not aligned"),
        (raw_gguf(tensors=[info("a", (33,), kind=8)]), "not whole Q8_0 blocks"),
        (raw_gguf(tensors=[info("a", kind=4)]), "type 4"),
        (raw_gguf(tensors=[info("a", ())]), "0 dimensions"),
        (raw_gguf(tensors=[info("a", (1,) * 5)]), "5 dimensions"),
    ],
)
def test_damage_is_one_sentence(tmp_path, raw, words):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_gguf_header(path)
    assert str(caught.value).startswith("x.gguf: not a whole GGUF: ") and len(str(caught.value)) < 400


def test_tensors_may_lie_in_any_order_and_be_empty(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw_gguf(tensors=[info("b", offset=32), info("none", (0, 4), offset=32), info("a")]))
    start = path.stat().st_size - 128
    assert [(t.name, t.offset - start, t.nbytes) for t in read_gguf_header(path)[1]] == [
        ("b", 32, 16), ("none", 32, 0), ("a", 0, 16),
    ]  # fmt: skip


def test_a_header_beyond_the_limit_is_refused(builds, monkeypatch):
    monkeypatch.setattr(gguf_reader, "MAX_HEADER_BYTES", 10_000)
    with pytest.raises(CheckpointError, match="limit of a header 10000"):
        read_gguf_header(builds["gguf:F32"])


SOUND = raw_gguf(
    [key("general.alignment", 4, struct.pack("<I", 32)), key("s", 8, string("x")), key("n", 9, array(0, 1, b"y"))],
    [info("a"), info("b", (2, 32), 8, 32)],
)


@settings(max_examples=300, deadline=2000)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=200).map(lambda raw: SOUND[:24] + raw),
        st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    )
)
def test_no_bytes_crash_it(tmp_path_factory, change):
    raw = bytearray(SOUND if isinstance(change, list) else change)
    for position, byte in change if isinstance(change, list) else ():
        raw[position] = byte
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(raw)
    try:
        _, tensors = read_gguf_header(path)
    except CheckpointError:
        return
    assert all(tensor.offset + tensor.nbytes <= len(raw) for tensor in tensors)
