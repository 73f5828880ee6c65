"""ornith_moe/gpu_encoders.py: a conversion with the GPU's encoders writes the files that one on the CPU writes.

Reference: the conversion on the CPU, whose bytes tests/quant compare with ggml and torch. Without a GPU the kernels run
in Triton's interpreter. Not covered: a real GPU that fails; its error is raised by hand.
"""

import json
import shutil

import fixtures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton", reason="triton is not installed")

from ornith_moe import gpu_encoders as module
from ornith_moe.command.doctor import examine
from ornith_moe.gpu_encoders import choose_device, gpu_encoders
from ornith_moe.kernels import gguf_encode
from ornith_moe.quant.builds.storages.fp8 import FP8Block, FP8Channel
from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import ConversionError, PlanError
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.weights import open_source

# Infinities and NaNs inside the interpreter's numpy, where a GPU has them too
pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUILDS = ["fp8-channel", "fp8-block", "gguf:Q8_0", "gguf:Q4_K_M"]
NAMES = {"Q8_0", "Q4_K", "Q5_K", "Q6_K", FP8Block.name, FP8Channel.name}


def contents(folder):
    """{relative name: bytes} of every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def counted(encoders):
    """The encoders, and how often each was called."""
    calls = dict.fromkeys(encoders, 0)

    def count(name):
        def encoder(storage, slab):
            calls[name] += 1
            return encoders[name](storage, slab)

        return encoder

    return {name: count(name) for name in encoders}, calls


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The first layer of a tiny Qwen3.5 with its embeddings: what the interpreter encodes in seconds."""
    folder = fixtures.qwen35(tmp_path_factory.mktemp("source") / "model")
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1], "intermediate_size": 256}
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name or ".layers.0." in name}
    for name in ("gate", "up", "down"):
        name = f"model.layers.0.mlp.{name}_proj.weight"
        kept[name] = kept[name][:256, :256].contiguous()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def slab(rows, dtype="F32"):
    return Slab(np.ascontiguousarray(rows).view(np.uint8), dtype)


def test_a_conversion_writes_the_same_files(tmp_path, checkpoint):
    """Q4_K_M has Q4_K and Q6_K; two threads hand over slabs at once; norms and embeddings stay with the CPU."""
    source = open_source(checkpoint)
    convert(source, tmp_path / "on cpu", BUILDS)
    encoders, calls = counted(gpu_encoders(DEVICE))
    convert(source, tmp_path / "on gpu", BUILDS, encoders=encoders, jobs=2)
    expected, got = contents(tmp_path / "on cpu"), contents(tmp_path / "on gpu")
    assert expected.keys() == got.keys()
    for name in expected:
        assert got[name] == expected[name], name
    assert calls.keys() == NAMES
    assert {name for name, count in calls.items() if count} == NAMES - {"Q5_K"}


@pytest.mark.parametrize("name", ["Q5_K", "Q8_0"])
def test_importance_of_a_storage_is_used(name):
    rows = np.random.default_rng(0).standard_normal((3, 512), np.float32)
    storage, encode = Gguf(name), gpu_encoders(DEVICE)[name]
    plain = storage.encode(slab(rows))[0]
    assert np.array_equal(encode(storage, slab(rows))[0], plain)
    importance = np.exp(4 * np.random.default_rng(1).standard_normal(512)).astype(np.float32)
    storage.importance = lambda: importance
    encoded = encode(storage, slab(rows))[0]
    assert np.array_equal(encoded, gguf_encode.quantize_on_cpu(rows, name, imatrix=importance))
    assert (encoded != plain).any() == (name == "Q5_K")


def test_a_scale_beyond_fp16_stops_the_conversion_with_its_place(tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][130, 7] = 1e30  # finite in BF16
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    errors, place = [], r"mlp\.up_proj\.weight.* row 130, column 7: 1e\+30 is beyond"
    for encoders in (None, gpu_encoders(DEVICE)):
        out = tmp_path / str(len(errors))
        with pytest.raises(ConversionError, match=place) as caught:
            convert(open_source(folder), out, ["gguf:Q8_0"], encoders=encoders, jobs=1)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_failing_gpu_is_one_sentence(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(gguf_encode, "encode", fail)
    sentence = r"^the GPU failed \(CUDA out .* 2 GiB\.\); run it again with --device cpu, it goes on$"
    with pytest.raises(ConversionError, match=sentence):
        gpu_encoders(DEVICE)["Q8_0"](Gguf("Q8_0"), slab(np.ones((1, 32), np.float32)))


def test_the_device_is_chosen_or_refused_with_a_reason(monkeypatch):
    assert choose_device("cpu") == ("cpu", "as asked")
    monkeypatch.setattr(module, "_has_driver", lambda: False)
    assert choose_device() == ("cpu", "no CUDA or ROCm driver is installed")
    monkeypatch.setattr(module, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    where, why = choose_device()
    assert where == "cpu" and why
    assert examine()["builds"]["encoded by"] == f"the CPU: {why}"
    with pytest.raises(PlanError, match=r"^device: expected a CUDA or ROCm device, but .*; pass --device cpu$"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    assert choose_device() == choose_device("cuda") == ("cuda", "GPU")
    assert examine()["builds"]["encoded by"].startswith("GPU for FP8, Q8_0, Q4_K")


def test_the_command_says_where_it_encoded(tmp_path, checkpoint, capsys, monkeypatch):
    """In this process, with Triton's interpreter as the GPU."""
    from ornith_moe import cli

    encoders, calls = counted(gpu_encoders(DEVICE))
    monkeypatch.setattr(module, "gpu_encoders", lambda where: encoders)
    monkeypatch.setattr(module, "choose_device", lambda request: ("cpu" if request == "cpu" else "cuda", ""))
    for number, (device, where) in enumerate([("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")]):
        before = sum(calls.values())
        arguments = ["convert", str(checkpoint), str(tmp_path / str(number)), "--to", "gguf:Q8_0", "--json"]
        cli.app([*arguments, "--device", device], standalone_mode=False)
        assert json.loads(capsys.readouterr().out)["device"] == where
        assert (sum(calls.values()) > before) == (where == "cuda")
