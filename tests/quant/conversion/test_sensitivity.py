"""The error of every tensor in every type.

Reference: the definition over whole tensors of the F32 GGUF, ggml's C encoding and the `gguf` package decoding.
Not covered: whether the figures tell how much a model loses, which docs/quality.md and bench say of trained weights.
"""

import json

import fixtures
import ggml
import gguf
import numpy as np
import pytest
import torch
from command import ornith_moe
from remedies import tiny

from ornith_moe.quant.builds.stored import read_gguf_tensors
from ornith_moe.quant.conversion import sensitivity as module
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.sensitivity import measure_sensitivity
from ornith_moe.quant.errors import CheckpointError, ConversionError, OrnithError, PlanError
from ornith_moe.quant.fitting.sensitivity import read_sensitivity
from ornith_moe.quant.gguf.imatrix import open_imatrix, write_imatrix
from ornith_moe.quant.source.weights import open_source

TYPES = ("IQ3_XXS", "Q2_K", "Q4_K", "Q8_0")
NAMES = ("blk.0.ffn_down_exps.weight", "blk.0.ssm_out.weight", "blk.0.attn_qkv.weight")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=4)


@pytest.fixture(scope="module")
def tensors(model, tmp_path_factory):
    """{name: float32} of the F32 GGUF."""
    path = convert(open_source(model), tmp_path_factory.mktemp("f32"), ["gguf:F32"]).builds[0].path
    return {name: t.read(0, t.nbytes).view(np.float32).reshape(t.shape) for name, t in read_gguf_tensors(path).items()}


@pytest.fixture(scope="module")
def imatrix(tensors, tmp_path_factory):
    """Skewed, of three tensors; expert 2 was never reached, expert 1 three times as often as the others."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("im") / "im.gguf"
    entries = []
    for name in NAMES:
        experts = tensors[name].shape[0] if tensors[name].ndim == 3 else 1
        counts = np.array([50, 150, 0, 50], np.float32)[:experts]
        means = np.exp(2 * random.standard_normal((experts, tensors[name].shape[-1]))).astype(np.float32)
        entries.append((name, means * counts[:, None], counts))
    with open(path, "wb") as file:
        heads = [(name, len(counts), sums.shape[-1]) for name, sums, counts in entries]
        values = iter([(sums, counts, np.ones_like(counts)) for _, sums, counts in entries])
        write_imatrix(file, heads, values, architecture="qwen35moe", datasets=["t"], chunk_count=1, chunk_size=8)
    return open_imatrix(path)


def expected(values, kind, name, imatrix):
    """(energy, error): by ggml and the gguf package."""
    energy = error = 0.0
    entry = imatrix.entry_of(name) if imatrix else None
    for matrix, rows in enumerate(values.reshape(-1, *values.shape[-2:])):
        h = imatrix.importance(name, matrix, values.shape[-1]) if entry else None
        codes = ggml.quantize(rows, kind, h)
        back = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[kind])
        weight = 1.0 if h is None else h.astype(np.float64) * entry.counts[matrix] / entry.counts.mean()
        energy += (weight * rows.astype(np.float64) ** 2).sum()
        error += (weight * (rows - back).astype(np.float64) ** 2).sum()
    return energy, error


def test_errors_are_those_of_the_definition(tmp_path, model, tensors, imatrix):
    report = measure_sensitivity(open_source(model), tmp_path / "s.json", imatrix=imatrix, types=TYPES)
    found = report.sensitivity
    assert found == read_sensitivity(tmp_path / "s.json") and found.types == TYPES
    assert {tensor.name for tensor in found.tensors if tensor.important} == set(NAMES)
    for name in (*NAMES, "blk.0.ffn_up_exps.weight", "output.weight"):
        tensor = found.by_name[name]
        assert set(tensor.errors) == set(TYPES if tensor.important else TYPES[1:]), "noise without importance"
        for kind, error in tensor.errors.items():
            energy, reference = expected(tensors[name], kind, name, imatrix if tensor.important else None)
            assert (tensor.energy, error) == pytest.approx((energy, reference), rel=1e-6), (name, kind)


def test_what_gives_way_stands_for_the_type(tmp_path):
    """Rows of 64: K-quants become types with blocks of 32, each measured once."""
    found = measure_sensitivity(open_source(tiny(tmp_path / "m")), tmp_path / "s.json").sensitivity
    assert set(found.by_name["output.weight"].errors) == {"Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0"}


def test_stopped_it_goes_on_and_gives_the_same_file(tmp_path, monkeypatch):
    source, types = open_source(tiny(tmp_path / "m")), ("Q4_0", "Q8_0")
    whole = measure_sensitivity(source, tmp_path / "whole.json", types=types, jobs=2)
    once, done = module._Measurement._unit, []

    def unit(self, unit):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(unit)
        return once(self, unit)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Measurement, "_unit", unit)
        measure_sensitivity(source, tmp_path / "s.json", types=types, jobs=1)
    journal = tmp_path / "s.json.partial"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:-1], b'[4, [["x"]]]\n', b"[5, [[1.0"]))
    with pytest.raises(ConversionError, match="another source, importance or types; drop it and run the command again"):
        measure_sensitivity(source, tmp_path / "s.json", types=("Q8_0",))
    again = measure_sensitivity(source, tmp_path / "s.json", types=types)
    assert 0 < again.resumed_units < 5 and again.bytes_read < whole.bytes_read and not journal.exists()
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert measure_sensitivity(source, tmp_path / "s.json", types=types).bytes_read == 0, "it is there"


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("tensors"),
        lambda v: v.update(format=2),
        lambda v: v.update(types=[["Q8_0"]]),
        lambda v: v.update(tensors=[]),
        lambda v: v["tensors"]["output.weight"].update(shape=[1 << 40, 64]),
        lambda v: v["tensors"]["output.weight"].update(shape=[64, 63]),
        lambda v: v["tensors"]["output.weight"].update(energy=-1),
        lambda v: v["tensors"]["output.weight"].update(errors={"Q9": 1}),
        lambda v: v["tensors"]["output.weight"].update(energy=1e-300),
        lambda v: v["tensors"]["output.weight"].update(errors={"Q8_0": True}),
    ],
)
def test_hostile_files_are_one_sentence(tmp_path, change):
    entry = {"shape": [64, 64], "important": False, "energy": 1.0, "errors": {"Q8_0": 0.5}}
    value = {"format": 1, "source": "m", "sample": "", "imatrix": None, "types": ["Q8_0"]}
    value["tensors"] = {"output.weight": entry}
    path = tmp_path / "s.json"
    path.write_text(json.dumps(value))
    assert read_sensitivity(path).by_name["output.weight"].relative("Q8_0") == 0.5
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises((CheckpointError, PlanError)) as told:
        read_sensitivity(path)
    assert "\n" not in str(told.value)


def test_the_command(tmp_path):
    m = tiny(tmp_path / "m", torch.float32)
    to = ("--output", tmp_path / "s.json", "--types", "q4_0,q8_0")
    told = json.loads(ornith_moe("sensitivity", m, *to, "--json").stdout)
    assert told["types"] == ["Q4_0", "Q8_0"] and told["tensors"] == len(read_sensitivity(told["path"]).tensors)
    assert "ffn_down_exps" in ornith_moe("sensitivity", m, *to).stdout
    ornith_moe("sensitivity", m, "--types", "q4_9", "--output", tmp_path / "t.json", code=1)
    with pytest.raises(OrnithError, match="is a config without weights"):
        from ornith_moe.quant.opening import open_any

        measure_sensitivity(open_any(str(m / "config.json"), config_only=True), tmp_path / "t.json")
