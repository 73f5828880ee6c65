"""Opening a checkpoint: what a sound one gives, and that every damaged or hostile one ends in one sentence.

Reference: the safetensors library reads the same rows. Not covered: file systems that lie about sizes.
"""

import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ornith_moe.quant.source.checkpoint import CheckpointError, open_checkpoint, read_header, read_json


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three tensors in two shards."""
    path = tmp_path / "model"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    first = {"a": torch.randn(7, 5, generator=generator).bfloat16(), "b": torch.randn(3, generator=generator)}
    second = {"c": torch.randn(2, 3, 4, generator=generator).half()}
    save_file(first, path / "model-00001-of-00002.safetensors")
    save_file(second, path / "model-00002-of-00002.safetensors")
    (path / "config.json").write_text('{"model_type": "test"}')
    names = dict.fromkeys(first, "model-00001-of-00002.safetensors") | dict.fromkeys(
        second, "model-00002-of-00002.safetensors"
    )
    write_index(path, names)
    return path


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def raw_file(path, header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_rows_equal_the_library(folder):
    checkpoint = open_checkpoint(folder)
    for path in folder.glob("*.safetensors"):
        for name, truth in load_file(path).items():
            rows = truth.reshape(-1, truth.shape[-1]) if truth.ndim > 1 else truth.reshape(-1, 1)
            expected = rows.contiguous().view(torch.uint8).numpy()
            info = checkpoint.tensors[name]
            assert np.array_equal(checkpoint.read_rows(info, 0, len(rows)), expected)
            assert np.array_equal(checkpoint.read_rows(info, 1, len(rows) - 1), expected[1:])
            assert checkpoint.read_rows(info, len(rows), 0).shape[0] == 0


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_change_is_noticed(folder):
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.changed()
    shard = folder / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    assert checkpoint.changed()


def break_folder(folder, how):  # long: a table, one kind of damage after another
    """Damage the checkpoint; returns words the message must hold."""
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    match how:
        case "no config":
            (folder / "config.json").unlink()
            return ["config.json"]
        case "config is not JSON":
            (folder / "config.json").write_text("{")
            return ["config.json", "not JSON"]
        case "config is a list":
            (folder / "config.json").write_text("[]")
            return ["config.json", "list"]
        case "deeply nested config":
            (folder / "config.json").write_text('{"a":' * 100_000)
            return ["config.json"]
        case "already quantized":
            (folder / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
            save_file({"c": torch.ones(4).to(torch.float8_e4m3fn)}, second)
            return ["already quantized", "mxfp4", "only FP8 is read"]
        case "quantized text config":
            (folder / "config.json").write_text('{"text_config": {"quantization_config": {"quant_method": "awq"}}}')
            save_file({"c": torch.ones(4, dtype=torch.int32)}, second)
            return ["already quantized", "awq"]
        case "scales":
            (folder / "config.json").write_text('{"compression_config": {"quant_method": "x"}}')
            save_file({"c": torch.ones(4), "c.weight_scale": torch.ones(1)}, second)
            write_index(folder, names | {"c.weight_scale": second.name})
            return ["c.weight_scale", "already quantized", "BF16 original"]
        case "missing shard":
            second.unlink()
            return [second.name, "missing"]
        case "truncated shard":
            os.truncate(first, first.stat().st_size - 3)
            return [first.name, "truncated"]
        case "trailing bytes":
            with open(first, "ab") as file:
                file.write(b"x")
            return [first.name, "no tensor owns"]
        case "cut inside the header":
            os.truncate(first, 20)
            return [first.name, "not a whole safetensors file"]
        case "empty shard":
            os.truncate(first, 0)
            return [first.name]
        case "git lfs pointer":
            first.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
            return [first.name, "git lfs pull"]
        case "index leaves the folder":
            (folder.parent / "x.safetensors").write_bytes(second.read_bytes())
            write_index(folder, names | {"c": "../x.safetensors"})
            return ["../x.safetensors", "not a plain"]
        case "index names an absolute path":
            write_index(folder, names | {"c": str(second)})
            return ["not a plain"]
        case "index names another kind of file":
            write_index(folder, names | {"c": "weights.bin"})
            return ["weights.bin"]
        case "config is a loop of links":
            (folder / "config.json").unlink()
            (folder / "config.json").symlink_to("config.json")
            return ["config.json"]
        case "link leaves the folder":
            outside = folder.parent / "x.safetensors"
            second.rename(outside)
            second.symlink_to(outside)
            return [second.name, "link that leaves"]
        case "index of another model":
            write_index(folder, names | {"d": second.name})
            return [second.name, "d"]
        case "shard holds more than the index":
            write_index(folder, {k: v for k, v in names.items() if k != "b"})
            return [first.name, "b"]
        case "empty index":
            write_index(folder, {})
            return ["weight_map is empty"]
        case "index without weight_map":
            index.write_text("{}")
            return ["weight_map"]
        case "index maps to a number":
            write_index(folder, names | {"c": 3})
            return ["weight_map"]
        case "two files, no index":
            index.unlink()
            return ["2 safetensors files"]
        case "only a pickle":
            index.unlink(), first.unlink(), second.unlink()
            (folder / "pytorch_model.bin").write_bytes(b"x")
            return ["*.bin", "not read"]


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantization_that_no_tensor_bears_out_is_stale(folder, key):
    """A merged QLoRA: the section of the training run stays in config.json, all tensors are BF16."""
    section = {key: {"quant_method": "bitsandbytes"}}
    config = {"model_type": "test", "text_config": {"a": 1, **section}, **section}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "test", "text_config": {"a": 1}}
    assert checkpoint.notes == (
        f"config.json has a stale {key} (quant_method 'bitsandbytes'): no tensor is quantized, so it is left out",
    )


@pytest.mark.parametrize(
    "how",
    [
        "no config", "config is not JSON", "config is a list", "deeply nested config", "already quantized",
        "quantized text config", "scales", "missing shard", "truncated shard", "trailing bytes",
        "cut inside the header", "empty shard", "git lfs pointer", "index leaves the folder",
        "index names an absolute path", "index names another kind of file", "link leaves the folder",
        "config is a loop of links",
        "index of another model", "shard holds more than the index", "empty index", "index without weight_map",
        "index maps to a number", "two files, no index", "only a pickle",
    ],
)  # fmt: skip
def test_damaged_or_hostile_folders_are_refused(folder, how):
    words = break_folder(folder, how)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    for word in words:
        assert word in message, message


def test_links_of_a_hub_cache_are_followed(tmp_path):
    """models--x/snapshots/<commit>/model.safetensors -> ../../blobs/<hash>."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "1")
    (blobs / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    assert list(open_checkpoint(snapshot).tensors) == ["a"]


@pytest.mark.parametrize(
    ("header", "payload", "word"),
    [
        ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(4, 12))}, 12, "overlap"),
        ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(9, 17))}, 17, "hole"),
        ({"a": entry(offsets=(4, 12))}, 12, "hole"),
        ({"a": entry(offsets=(0, 7))}, 7, "8 bytes"),
        ({"a": entry(dtype="F4")}, 8, "known dtype"),
        ({"a": entry(dtype=[])}, 8, "known dtype"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 8, "not JSON"),
        ({"a": entry(shape=(-2,))}, 8, "shape"),
        ({"a": entry(shape=(1 << 60,) * 4)}, 8, "shape"),
        ({"a": entry(shape=(2.0,))}, 8, "shape"),
        ({"a": entry(offsets=(8, 0))}, 8, "bytes"),
        ({"a": entry(offsets=(0,))}, 8, "data_offsets"),
        ({"a": 1}, 0, "JSON object"),
        (b'{"a": {}, "a": {}}', 0, "twice"),
        (b"[]", 0, "JSON object"),
        (b"{]", 0, "not JSON"),
        (b"\xff\xfe", 0, "not JSON"),
    ],
)
def test_lying_headers_are_refused(tmp_path, header, payload, word):
    path = raw_file(tmp_path / "x.safetensors", header, bytes(payload))
    with pytest.raises(CheckpointError, match=word):
        read_header(path)


@pytest.mark.parametrize("length", [(1 << 63) - 1, 100_000_001, 9])
def test_header_length_is_bounded(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(path)


def test_json_is_bounded(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}" + " " * 100)
    with pytest.raises(CheckpointError, match="limit 50"):
        read_json(path, limit=50)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_crash_the_header_reader(tmp_path_factory, data, framed):
    """Any file is either a safetensors file or a CheckpointError; nothing else comes out."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data if framed else data)
    try:
        read_header(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
