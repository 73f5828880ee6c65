"""Importance matrices: both of llama.cpp's formats, hostile files, and the bytes that a build gets from them.

References: the formats written a second time here (struct, the `gguf` package), and ggml's C given each expert's row of
importance. Not covered: that whole builds equal llama-quantize's files, which needs its library (docs/formats.md has
what was measured).
"""

import struct

import fixtures
import ggml
import gguf
import numpy as np
import pytest

import ornith_moe.quant.conversion.convert as convert_module
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.stored import read_gguf_tensors
from ornith_moe.quant.codecs.codec import BlockCodec
from ornith_moe.quant.codecs.gguf import CODECS
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError, OrnithError, PlanError
from ornith_moe.quant.gguf.imatrix import USES_IMATRIX, open_imatrix, write_imatrix
from ornith_moe.quant.gguf.mixtures import FILE_TYPES, UNMADE_WITHOUT_IMATRIX
from ornith_moe.quant.gguf.reader import read_gguf_header
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

EXPERTS = 6


def write_gguf(path, entries, **keys):
    """As llama-imatrix writes it, with `in_sum` besides; entries are {name: (sums [E, K], counts)}."""
    writer = gguf.GGUFWriter(path, "unused")
    writer.kv_data[0].pop("general.architecture")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["/home/somebody/wiki.train.raw"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for key, value in keys.items():
        writer.add_string(key.replace("_", "."), value)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32).reshape(-1, 1))
        writer.add_tensor(f"{name}.in_sum", np.zeros_like(sums, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path, entries, *, calls=4, chunks=9, dataset="C:\\texts\\wiki.txt"):
    """{name: means [n]} in the older format."""
    data = struct.pack("<i", len(entries))
    for name, means in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(means))
        data += (np.asarray(means, np.float32) * np.float32(calls)).astype("<f4").tobytes()
    if chunks is not None:
        data += struct.pack("<ii", chunks, len(dataset)) + dataset.encode()
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=EXPERTS)


@pytest.fixture(scope="module")
def f32(moe, tmp_path_factory):
    """Tensors of the F32 GGUF: {name: float32}."""
    path = convert(open_source(moe), tmp_path_factory.mktemp("f32"), ["gguf:F32"]).builds[0].path
    data = np.memmap(path, np.uint8, "r")
    return {
        name: data[tensor.offset : tensor.offset + tensor.nbytes].view(np.float32).reshape(tensor.shape)
        for name, tensor in read_gguf_tensors(path).items()
    }


def sums_for(f32, seed=0):
    """Skewed sums for every matrix, one expert of layer 1 never reached, another with a row of zeros."""
    random = np.random.default_rng(seed)
    entries = {}
    for name, tensor in f32.items():
        if tensor.ndim < 2 or not name.startswith("blk.") or "inp" in name or "conv1d" in name:
            continue
        matrices = tensor.shape[0] if tensor.ndim == 3 else 1
        counts = random.integers(1, 500, matrices).astype(np.float32)
        sums = np.exp(2 * random.standard_normal((matrices, tensor.shape[-1]))).astype(np.float32) * counts[:, None]
        if name.startswith("blk.1.") and matrices > 1:
            counts[2], sums[2], sums[4] = 0, 0, 0
        entries[name] = sums, counts
    return entries


@pytest.fixture(scope="module")
def entries(f32):
    return sums_for(f32)


@pytest.fixture
def imatrix(entries, tmp_path):
    return open_imatrix(write_gguf(tmp_path / "im.gguf", entries))


def test_reads_what_llama_imatrix_writes(imatrix, entries):
    assert imatrix.entries.keys() == entries.keys()
    assert (imatrix.chunk_count, imatrix.chunk_size, imatrix.architecture) == (7, 512, None)
    for name, (sums, counts) in entries.items():
        for matrix, (row, count) in enumerate(zip(sums, counts, strict=True)):
            expected = row / count if count and row.any() else np.ones_like(row)
            assert np.array_equal(imatrix.importance(name, matrix, len(row)), expected)


def test_reads_the_older_format(tmp_path):
    means = np.exp(np.random.default_rng(0).standard_normal(24)).astype(np.float32)
    means[8:16] = 0
    found = open_imatrix(write_dat(tmp_path / "im.dat", {"blk.0.ffn_up_exps.weight": means}))
    assert (found.chunk_count, found.datasets) == (9, ("C:\\texts\\wiki.txt",))
    assert found.metadata()["quantize.imatrix.dataset"] == "wiki.txt"
    for matrix in range(3):
        expected = means[8 * matrix : 8 * matrix + 8] if matrix != 1 else np.ones(8, np.float32)
        assert np.allclose(found.importance("blk.0.ffn_up_exps.weight", matrix, 8), expected, rtol=1e-6)
    bare = open_imatrix(write_dat(tmp_path / "bare.dat", {"x": means}, calls=0, chunks=None))
    assert bare.metadata() == {"quantize.imatrix.file": "bare.dat", "quantize.imatrix.entries_count": 1}


@pytest.mark.parametrize("count", [1 << 31, (1 << 63) + 1])
def test_a_number_of_chunks_beyond_reason_is_none(tmp_path, count):
    writer = gguf.GGUFWriter(tmp_path / "\udcff.gguf", "imatrix")
    writer.add_uint64("imatrix.chunk_count", count)
    writer.add_tensor("a.in_sum2", np.ones((1, 4), np.float32))
    writer.add_tensor("a.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    keys = open_imatrix(tmp_path / "\udcff.gguf").metadata()
    assert keys == {"quantize.imatrix.file": "?.gguf", "quantize.imatrix.entries_count": 1}


def test_one_count_serves_all_experts(tmp_path):
    found = open_imatrix(write_gguf(tmp_path / "im.gguf", {"a": (np.arange(12).reshape(3, 4) + 1, [2])}))
    assert np.array_equal(found.importance("a", 2, 4), (np.arange(8, 12) + 1) / 2)


def test_gate_and_up_share_the_entry_of_their_fusion(tmp_path):
    sums = np.arange(8, dtype=np.float32).reshape(2, 4) + 1
    found = open_imatrix(write_gguf(tmp_path / "im.gguf", {"blk.3.ffn_gate_up_exps.weight": (sums, [1, 1])}))
    for kind in ("gate", "up"):
        assert np.array_equal(found.importance(f"blk.3.ffn_{kind}_exps.weight", 1, 4), sums[1])
    assert found.entry_of("blk.3.ffn_down_exps.weight") is None


def test_what_is_written_is_read(tmp_path, entries):
    path = tmp_path / "out.gguf"
    with open(path, "wb") as file:
        write_imatrix(
            file, [(name, *sums.shape) for name, (sums, _) in entries.items()],
            ((sums, counts, 1 + np.arange(len(sums))) for sums, counts in entries.values()),
            architecture="qwen35moe", datasets=["text"], chunk_count=3, chunk_size=64,
        )  # fmt: skip
    found = open_imatrix(path)
    assert (found.architecture, found.datasets, found.chunk_count, found.chunk_size) == ("qwen35moe", ("text",), 3, 64)
    for name, (sums, counts) in entries.items():
        assert np.array_equal(found._values(found.entries[name], 0, sums.size), sums.reshape(-1))
        assert np.array_equal(found.entries[name].counts, counts)
        assert found.entries[name].largest == len(sums)


# Bytes


@pytest.mark.parametrize(("slab", "jobs"), [(1 << 14, 2), (1 << 25, 1)])
def test_builds_hold_what_ggml_makes_of_each_expert(tmp_path, monkeypatch, moe, f32, imatrix, slab, jobs):
    """Every tensor, expert by expert with its own importance, whatever the slabs; V heads in GGUF order."""
    monkeypatch.setattr(convert_module, "slabs", lambda *limits: (jobs, slab))
    report = convert(open_source(moe), tmp_path / "out", ["gguf:Q2_K", "gguf:Q4_K_S"], imatrix=imatrix)
    differs = 0
    for build in report.builds:
        data = np.memmap(build.path, np.uint8, "r")
        for name, tensor in read_gguf_tensors(build.path).items():
            stored = data[tensor.offset : tensor.offset + tensor.nbytes]
            if tensor.dtype == "F32":
                assert np.array_equal(stored.view(np.float32), f32[name].reshape(-1)), name
                continue
            covered, columns = name in imatrix.entries, tensor.shape[-1]
            for matrix, rows in enumerate(f32[name].reshape(-1, *tensor.shape[-2:])):
                row = imatrix.importance(name, matrix, columns) if covered else None
                expected = ggml.quantize(rows, tensor.dtype, row)
                found = stored.reshape(-1, expected.size)[matrix].reshape(expected.shape)
                assert np.array_equal(found, expected), (name, matrix)
                if name == "blk.0.ssm_out.weight":
                    order = np.r_[0:128, 256:384, 128:256, 384:512]  # of Hugging Face: by key head
                    differs += not np.array_equal(found, ggml.quantize(rows, tensor.dtype, row[order]))
    assert differs == 2, "an importance in the order of Hugging Face would give other bytes"


def test_never_reached_experts_are_as_without_a_preference(tmp_path, moe, imatrix, f32):
    """No NaN, and the bytes of an importance of ones; verify finds the build sound."""
    path = convert(open_source(moe), tmp_path / "out", ["gguf:Q3_K_S"], imatrix=imatrix).builds[0].path
    name = "blk.1.ffn_up_exps.weight"
    tensor = read_gguf_tensors(path)[name]
    stored = np.memmap(path, np.uint8, "r")[tensor.offset : tensor.offset + tensor.nbytes].reshape(EXPERTS, -1)
    for expert in (2, 4):
        expected = ggml.quantize(f32[name][expert], "Q3_K", np.ones(256, np.float32))
        assert np.array_equal(stored[expert], expected.reshape(-1))
    assert verify(path, open_source(moe)).ok


def test_the_build_says_what_was_used(tmp_path, moe, imatrix):
    report = convert(open_source(moe), tmp_path / "out", ["gguf:IQ4_XS", "gguf:BF16"], imatrix=imatrix)
    keys, _ = read_gguf_header(report.builds[0].path)
    assert {key: keys[key] for key in keys if key.startswith("quantize.")} == {
        "quantize.imatrix.file": "im.gguf",
        "quantize.imatrix.dataset": "wiki.train.raw",
        "quantize.imatrix.entries_count": len(imatrix.entries),
        "quantize.imatrix.chunks_count": 7,
    }
    assert not any(key.startswith("quantize.") for key in read_gguf_header(report.builds[1].path)[0])
    coverage = {found.tensor: found for found in report.builds[0].coverage}
    partial = coverage["blk.1.ffn_down_exps.weight"]
    assert (partial.matrices, partial.covered, partial.least) == (EXPERTS, EXPERTS - 1, 0)
    assert len(coverage) == len(imatrix.entries) and not report.builds[1].coverage
    assert any("im.gguf covers" in note for note in report.builds[0].notes)


def test_resume_notices_another_importance(tmp_path, monkeypatch, moe, f32, entries):
    first, second = (
        open_imatrix(write_gguf(tmp_path / folder / "im.gguf", found))
        for folder, found in (("a", entries), ("b", sums_for(f32, seed=1)))
        if (tmp_path / folder).mkdir() is None
    )
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(convert_module.Journal, "record_checked", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(open_source(moe), out, ["gguf:Q2_K"], imatrix=first)
    for other in (second, None):
        with pytest.raises(PlanError, match="begun with other options"):
            convert(open_source(moe), out, ["gguf:Q2_K"], imatrix=other)
    resumed = convert(open_source(moe), out, ["gguf:Q2_K"], imatrix=first)
    whole = convert(open_source(moe), tmp_path / "again", ["gguf:Q2_K"], imatrix=first)
    assert resumed.builds[0].path.read_bytes() == whole.builds[0].path.read_bytes()


def test_types_that_use_importance_are_those_of_the_codecs():
    assert {c.name for c in CODECS if issubclass(c, BlockCodec) and c.important} == USES_IMATRIX & {
        c.name for c in CODECS
    }
    assert {c.name for c in CODECS if c.needs_importance} == UNMADE_WITHOUT_IMATRIX & {c.name for c in CODECS}


# Another model


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda e: {"blk.0.attn_q.weight": (np.ones((1, 8)), [1])}, "none for this model"),
        (lambda e: e | {"blk.0.attn_qkv.weight": (np.ones((1, 512)), [1])}, "made for another model"),
        (lambda e: e | {"blk.0.ffn_up_exps.weight": (np.ones((4, 256)), np.ones(4))}, "6 matrices of 256 columns"),
        (lambda e: e | {"blk.0.ffn_up_exps.weight": (np.ones((3, 512)), np.ones(3))}, "3 counts"),
    ],
)
def test_an_importance_of_another_model_is_refused(tmp_path, moe, entries, change, told):
    found = open_imatrix(write_gguf(tmp_path / "im.gguf", change(entries)))
    with pytest.raises(PlanError, match=told):
        plan_build(open_source(moe), "gguf:Q4_K_M", imatrix=found)


def test_another_architecture_is_refused(tmp_path, moe, entries):
    found = open_imatrix(write_gguf(tmp_path / "im.gguf", entries, general_architecture="gemma4"))
    with pytest.raises(PlanError, match="made for a 'gemma4', the model is qwen35moe"):
        plan_build(open_source(moe), "gguf:Q4_K_M", imatrix=found)


def test_what_others_know_besides_is_no_obstacle(tmp_path, moe, entries):
    """An embedding of another size, blocks beyond the last (MTP), and tensors without an entry."""
    more = {n: e for n, e in entries.items() if "attn" not in n}
    more |= {"token_embd.weight": (np.ones((1, 8)), [1]), "blk.9.attn_q.weight": (np.ones((1, 256)), [1])}
    plan = plan_build(open_source(moe), "gguf:Q4_K_M", imatrix=open_imatrix(write_gguf(tmp_path / "im.gguf", more)))
    assert {found.tensor for found in plan.coverage} == more.keys() - {"token_embd.weight", "blk.9.attn_q.weight"}


# Hostile files


def small(tmp_path):
    return write_gguf(tmp_path / "a.gguf", {"x": (np.ones((2, 4)), [1, 2])}), write_dat(
        tmp_path / "a.dat", {"x": np.ones(8), "yy": np.ones(3)}
    )


def test_every_truncation_is_told(tmp_path):
    for path in small(tmp_path):
        data = path.read_bytes()
        for length in range(len(data) - 1):
            path.write_bytes(data[:length])
            try:
                open_imatrix(path).close()  # a .dat without its last words is a whole one
            except CheckpointError as error:
                assert "\n" not in str(error)
            else:
                assert path.suffix == ".dat" and 0 <= length - (len(data) - 8 - len("C:\\texts\\wiki.txt")) < 8


def test_flipped_bytes_are_told_or_harmless(tmp_path):
    random = np.random.default_rng(0)
    for path in small(tmp_path):
        data = path.read_bytes()
        for _ in range(400):
            broken = bytearray(data)
            for place in random.integers(0, len(data), random.integers(1, 4)):
                broken[place] = random.integers(0, 256)
            path.write_bytes(broken)
            try:
                found = open_imatrix(path)
                for name, entry in found.entries.items():
                    assert np.isfinite(found.importance(name, 0, entry.size // entry.counts.size)).all()
                found.metadata()
            except OrnithError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("where", ["sums", "counts"])
def test_numbers_that_are_none_are_refused(tmp_path, bad, where):
    sums, counts = np.ones((2, 4)), np.ones(2)
    (sums if where == "sums" else counts).flat[1] = bad
    with pytest.raises(CheckpointError, match="expected finite sums" if where == "sums" else "not numbers from 0 on"):
        open_imatrix(write_gguf(tmp_path / "im.gguf", {"x": (sums, counts)}))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 64, b"\xff" * 64, struct.pack("<i", 1 << 30), struct.pack("<iii", 1, 1 << 30, 0),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 1 << 30), struct.pack("<ii", 1, 1) + b"\xff" * 40,
        (struct.pack("<i", 2) + 2 * (struct.pack("<i", 1) + b"x" + struct.pack("<iif", 1, 1, 1))),
    ],
)  # fmt: skip
def test_what_is_no_importance_matrix_is_told(tmp_path, data):
    path = tmp_path / "im.dat"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not an importance matrix"):
        open_imatrix(path)


def test_other_ggufs_are_told(tmp_path, moe):
    model = convert(open_source(moe), tmp_path / "out", ["gguf:Q8_0"]).builds[0].path
    with pytest.raises(CheckpointError, match="is a GGUF but no importance matrix"):
        open_imatrix(model)
    for bad in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="expected an importance matrix"):
            open_imatrix(bad)


@pytest.mark.parametrize("name", [name for name, kind in FILE_TYPES.items() if kind.base in {c.name for c in CODECS}])
def test_every_file_type_with_an_encoder_is_written_and_verified(tmp_path, moe, imatrix, name):
    report = convert(open_source(moe), tmp_path / "out", [f"gguf:{name}"], imatrix=imatrix)
    planned = plan_build(open_source(moe), f"gguf:{name}", imatrix=imatrix)
    found = read_gguf_tensors(report.builds[0].path)
    assert {tensor.name: tensor.dtype for tensor in planned.tensors} == {n: t.dtype for n, t in found.items()}
    result = verify(report.builds[0].path, open_source(moe))
    assert result.ok, result.problems[:3]
    assert result.build == f"gguf:{name}"
