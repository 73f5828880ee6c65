"""A build and a storage of another package: registered here, known to every command, without a line in the package.

This file is the worked example of CONTRIBUTING.md, "Adding a build". The storage is what the house has none of: its
scale belongs to all that is fused (gate and up, q k v, the experts of a layer), so no slab alone knows it.

Reference: the definition, written a second time over whole tensors with torch. Not covered: a reader of such a folder.
"""

import json
import re
import shutil

import fixtures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ornith_moe.quant.conversion.convert as convert_module
from ornith_moe import cli
from ornith_moe.quant.builds.build import BUILDS, find_build, register
from ornith_moe.quant.builds.folder import SafetensorsBuild
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.plain import Keep
from ornith_moe.quant.builds.storages.storage import Part, Storage
from ornith_moe.quant.conversion.convert import PARTIAL, convert
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.inspect import inspect
from ornith_moe.quant.verification.verify import verify


class Int8(Storage):
    """w = q * scale in int8, scale = amax / 127 in fp32 for all weights of a fused group."""

    name = "I8 per fused group"
    floor_db = 20.0
    needs = True

    def __init__(self, largest: float = 0.0):
        self.scale = np.float32(largest / 127 or 1)

    def parts(self, shape, dtype):
        return Part("", "I8", shape, shape[1]), Part("_scale", "F32", (1,), 4, rows=None)

    def measure(self, slab):
        return float(np.abs(slab.float32).max(initial=0))

    def merge(self, first, second):
        return max(first, second)

    def given(self, found):
        return Int8(found)

    def encode(self, slab):
        return np.rint(slab.float32 / self.scale).astype(np.int8).view(np.uint8), self.scale.reshape(1, 1).view(
            np.uint8
        )

    def decode(self, parts, columns, dtype):
        return parts[0].view(np.int8) * parts[1].view(np.float32)

    @classmethod
    def of(cls, name, found):
        return cls() if found[name].dtype == "I8" else None

    def problems(self, name, found):
        scale = found.get(f"{name}_scale")
        if scale is None or (scale.dtype, scale.shape) != ("F32", (1,)):
            yield f"{found[name].path.name}: tensor {name} is int8 and needs a scale [1] in F32"
        elif not (scale.read(0, 4).view(np.float32) > 0).all():
            yield f"{scale.path.name}: the scale of {name} is not positive"
        if any((codes == 0x80).any() for _, codes in found[name].slabs(1)):
            yield f"{found[name].path.name}: tensor {name} holds -128, which no encoder writes"


class Toy(SafetensorsBuild):
    """Linear layers of the language model in `Int8`, everything else as it is."""

    name, quant_method, storages = "toy", "toy-int8", (Int8,)

    def decide(self, source, options):
        plan, ignored = BuildPlan(self), []
        group = source.architecture.fused_group
        kept = {group(source.weights[index]) for index in options.kept}
        for index, weight in enumerate(source.weights):
            quantize = weight.is_linear and weight.role != "vision" and group(weight) not in kept
            ignored += [] if quantize else [weight.owner]
            plan.add(source, index, Int8() if quantize else Keep())
        plan.config = {"quant_method": self.quant_method, "ignore": ignored}
        return plan


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(Toy())
    yield
    del BUILDS["toy"]


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=3, mtp=True, vision=True)


@pytest.fixture(scope="module")
def made(moe, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return convert(open_source(moe), out, ["toy", "fp8-channel"]).builds[0].path


def group(name):
    """All experts of a layer, gate and up of a dense layer, q k v, in_proj_qkv and in_proj_z: by names alone."""
    name = re.sub(r"experts\.\d+\.\w+_proj", "experts", name)
    name = re.sub(r"\.(gate|up)_proj\.", ".gate_up.", re.sub(r"\.[qkv]_proj\.", ".qkv.", name))
    return re.sub(r"in_proj_(qkv|z)\.", "in_proj.", name)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_scale_is_that_of_all_that_is_fused(moe, made):
    source, stored = load_file(moe / "model.safetensors"), load_file(made / "model.safetensors")
    quantized = {name for name in source if f"{name}_scale" in stored}
    largest: dict[str, float] = {}
    for name in quantized:
        largest[group(name)] = max(largest.get(group(name), 0), source[name].float().abs().max().item())
    for name, tensor in source.items():
        if name in quantized:
            scale = torch.tensor(largest[group(name)] / 127, dtype=torch.float32)
            assert stored[f"{name}_scale"].equal(scale.view(1)), name
            assert stored[name].equal((tensor.float() / scale).round().to(torch.int8)), name
        else:
            assert stored[name].equal(tensor), name
    assert len(largest) < len(quantized) / 2 and any(".experts." in name for name in quantized)


@pytest.mark.parametrize(("jobs", "slab", "together"), [(3, 1 << 14, 0), (2, 1 << 14, 1 << 20), (1, 1 << 25, 1 << 30)])
def test_bytes_do_not_depend_on_the_cut_or_on_a_stop(moe, made, tmp_path, monkeypatch, jobs, slab, together):
    """Groups that fit in memory are read once, others are measured before."""
    monkeypatch.setattr(convert_module, "slabs", lambda *limits: (jobs, slab))
    monkeypatch.setattr(convert_module, "group_bytes", lambda *limits: together)
    record, calls = convert_module.Journal.record, []

    def stop(self, *unit):
        calls.append(unit)
        if len(calls) == 20:
            raise KeyboardInterrupt
        record(self, *unit)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module.Journal, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(open_source(moe), tmp_path / "out", ["toy"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PARTIAL]
    phases = []
    report = convert(open_source(moe), tmp_path / "out", ["toy"], progress=lambda *told: phases.append(told))
    assert report.resumed_units >= 19 and contents(tmp_path / "out" / "toy") == contents(made)
    measured = [told for told in phases if told[0] == "measure"]
    assert bool(measured) == (together < 1 << 30) and all(done == total for _, done, total in measured[-1:])
    assert convert(open_source(moe), tmp_path / "out", ["toy"]).builds[0].was_finished


def test_it_is_verified_inspected_and_recognized(moe, made, tmp_path):
    source = open_source(moe)
    result = verify(made, source)
    assert result.ok and result.build == "toy" and not result.notes, (result.problems, result.notes)
    assert 30 < result.roles["expert"]["sqnr_db"] < 50 and result.roles["router"]["sqnr_db"] is not None
    assert result.roles["norm"]["exact"] and result.roles["vision"]["exact"]
    assert inspect(made)["dtypes"].keys() == {"I8", "BF16", "F32"}
    assert inspect(made)["metadata"]["quant_method"] == "toy-int8"
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / MANIFEST).unlink()
    assert verify(folder, source).build == "toy"


@pytest.mark.parametrize(
    ("ending", "change", "word"),
    [
        ("k_proj.weight_scale", lambda t: t * 0, "not positive"),
        ("k_proj.weight_scale", lambda t: t * 1.5, "SQNR"),
        ("k_proj.weight_scale", lambda t: t.double(), "needs a scale [1] in F32"),
        ("k_proj.weight", lambda t: t.index_fill(0, torch.tensor([3]), -128), "holds -128"),
        ("k_proj.weight", lambda t: t.flip(0), "below the floor of 20.0 dB"),
    ],
)
def test_damage_is_found_by_what_the_storage_says(moe, made, tmp_path, ending, change, word):
    folder = shutil.copytree(made, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors")
    (folder / MANIFEST).unlink()
    assert any(word in problem for problem in verify(folder, open_source(moe)).problems)


def test_a_nan_may_stay(moe, tmp_path):
    """With leave, what is fused with it stays unquantized, and a verification reads that from the build's config."""
    folder = shutil.copytree(moe, tmp_path / "moe")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("layers.3.self_attn.k_proj.weight"))
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    (build,) = convert(open_source(folder), tmp_path / "out", ["toy"], non_finite="keep-bf16").builds
    result = verify(build.path, open_source(folder))
    assert result.ok and any("3 weights" in note and "unquantized" in note for note in result.notes), result.notes


def test_every_command_knows_it(moe, tmp_path, capsys):
    def run(*arguments):
        cli.app([*map(str, arguments), "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    (planned,) = run("plan", moe, "--to", "TOY")["builds"]
    (made,) = run("convert", moe, tmp_path, "--to", "Toy", "--device", "cpu")["builds"]
    assert (made["build"], made["tensors"], made["tensor_bytes"], made["files"]) == tuple(
        planned[key] for key in ("build", "tensors", "tensor_bytes", "files")
    )
    assert run("verify", made["path"], "--against", moe)["ok"]
    assert run("inspect", made["path"])["tensors"] == made["tensors"]
    assert "toy" in run("doctor")["builds"]["written"]


def test_names_are_found_and_taken_once():
    assert find_build(" TOY ").name == "toy"
    with pytest.raises(PlanError, match=r"'toys' is unknown \(did you mean toy\?\)"):
        find_build("toys")
    with pytest.raises(ValueError, match="'toy' is registered already"):
        register(Toy())
