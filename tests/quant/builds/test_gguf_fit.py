"""gguf:fit= and gguf:bpw=, from the name to a file that llama.cpp runs.

References: sizes of the files on disk; the named file type with the recipe; xllamacpp. Not covered: the choice itself
(tests/quant/fitting/).
"""

import json
from dataclasses import replace
from pathlib import Path

import fixtures
import numpy as np
import pytest
from command import ornith_moe

from ornith_moe.clients import LlamaCpp
from ornith_moe.quant.builds.build import find_build
from ornith_moe.quant.builds.stored import read_gguf_tensors
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.conversion.sensitivity import measure_sensitivity
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.gguf.imatrix import open_imatrix, write_imatrix
from ornith_moe.quant.gguf.tensor_types import parse_asked_types
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

pytest.importorskip("scipy", reason="scipy, the extra `fit`, is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(source, sensitivity, its file)"""
    base = tmp_path_factory.mktemp("fit")
    source = open_source(fixtures.qwen35moe(base / "moe", experts=4))
    report = measure_sensitivity(source, base / "s.json", types=("Q3_K", "Q4_K", "Q6_K", "Q8_0"))
    return source, report.sensitivity, report.path


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("GGUF:Fit=2.50 mb", "gguf:fit=2.5MB"),
        ("gguf:fit=16GiB", "gguf:fit=16GiB"),
        ("gguf:fit=1500000000", "gguf:fit=1500000000B"),
        ("gguf:bpw=4.50", "gguf:bpw=4.5"),
    ],
)
def test_names(written, name):
    assert find_build(written).name == name == find_build(name).name


@pytest.mark.parametrize(
    "name", ["gguf:fit=", "gguf:fit=0GB", "gguf:fit=-1GB", "gguf:bpw=4GB", "gguf:bpw=x", "gguf:fit=4QB"]
)
def test_bad_names_are_one_sentence(name):
    with pytest.raises(PlanError, match="expected a number as in gguf:"):
        find_build(name)


def test_the_files_have_the_size_and_the_recipe_makes_them_again(tmp_path, model):
    source, found, _ = model
    names = ["gguf:fit=4MB", "gguf:bpw=5.5"]
    report = convert(source, tmp_path / "out", names, sensitivity=found)
    weights = sum(int(np.prod(weight.shape)) for weight in source.weights)
    for build in report.builds:
        limit = 4_000_000 if build.build == names[0] else None
        assert build.path.stat().st_size <= (limit or build.path.stat().st_size)
        tensors = read_gguf_tensors(build.path)
        chosen = sum(tensors[name].nbytes for name in found.by_name)
        assert limit or 0.97 * 5.5 < 8 * chosen / weights <= 5.5
        assert not limit or build.path.stat().st_size > 0.97 * limit, "it uses what it may"
        for layer in (0, 1):
            assert (
                tensors[f"blk.{layer}.ffn_gate_exps.weight"].dtype == tensors[f"blk.{layer}.ffn_up_exps.weight"].dtype
            )
        assert verify(build.path, source).ok
        recipe = build.path.with_name(f"{build.path.name}.recipe")
        base = recipe.read_text().split("#base:")[1].split("=")[0]
        (again,) = convert(
            source, tmp_path / build.path.stem, [f"gguf:{base}"], asked=parse_asked_types(file=recipe)
        ).builds
        assert again.path.read_bytes() == build.path.read_bytes()
        assert np.isfinite(log_probs(build.path)).all()


def log_probs(path):
    with LlamaCpp(path, context=64) as client:
        return client.log_probs([1, 2, 3, 4], [3])


def test_the_commands(tmp_path, model):
    source, _, path = model
    to = ("--to", "gguf:bpw=5", "--sensitivity", path, "--keep", "attn_v=q8_0")
    told = json.loads(ornith_moe("plan", source.folder, *to, "--json").stdout)["builds"][0]
    names = [each["build"] for each in told["alternatives"]]
    assert "gguf:bpw=5" in names and "gguf:Q6_K" in names and "gguf:IQ4_XS" not in names, "which was not measured"
    kls = [each["predicted_kl"] for each in told["alternatives"] if each["build"].startswith("gguf:bpw")]
    assert kls == sorted(kls, reverse=True) and len(kls) > 3
    page = tmp_path / "curve.html"
    assert "predicted KL" in ornith_moe("plan", source.folder, *to, "--report", page).stdout
    assert all(each["build"] in page.read_text() for each in told["alternatives"])
    assert page.with_suffix(".png").stat().st_size > 10_000
    refused = ornith_moe("plan", source.folder, "--to", "gguf:Q8_0", "--report", page, code=1)
    assert "ask for one, as --to gguf:fit=16GB" in refused.stderr
    made = json.loads(ornith_moe("convert", source.folder, tmp_path / "out", *to, "--json").stdout)["builds"][0]
    assert made["tensor_bytes"] == told["tensor_bytes"]
    types = {name: tensor.dtype for name, tensor in read_gguf_tensors(Path(made["path"])).items()}
    assert {kind for name, kind in types.items() if "attn_v." in name} == {"Q8_0"}
    again = ornith_moe("convert", source.folder, tmp_path / "out", *to).stdout
    assert "nothing to do" in again


def test_the_keys_of_an_importance_matrix_count(tmp_path, model):
    source, path = model[0], tmp_path / "im.gguf"
    name = next(tensor.name for tensor in model[1].tensors if "ssm_out" in tensor.name)
    columns = model[1].by_name[name].shape[-1]
    with open(path, "wb") as file:
        ones = np.ones((1, columns), np.float32), np.ones(1, np.float32), np.ones(1, np.float32)
        kind = source.architecture.gguf_architecture
        write_imatrix(
            file,
            [(name, 1, columns)],
            iter([ones]),
            architecture=kind,
            datasets=["t" * 90],
            chunk_count=1,
            chunk_size=8,
        )
    imatrix = open_imatrix(path)
    found = replace(model[1], imatrix=imatrix.digest)
    for nbytes in (4_000_000, 4_000_032):
        (build,) = convert(
            source, tmp_path / str(nbytes), [f"gguf:fit={nbytes}"], imatrix=imatrix, sensitivity=found
        ).builds
        assert 0.97 * nbytes < build.path.stat().st_size <= nbytes
