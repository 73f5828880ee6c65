"""Which files of a folder are the model. Reference: what transformers loads from the same folder.

Folders are written by hand, their tensors have one row. Not covered: pickles.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source.checkpoint import open_checkpoint


@pytest.fixture
def folder(tmp_path):
    """{file name: value of its only tensor `x`}, and the index's files -> a folder with them."""

    def make(files, index=None):
        (tmp_path / "config.json").write_text("{}")
        for name, value in files.items():
            save_file({"x": torch.tensor([float(value)])}, tmp_path / name)
        if index is not None:
            text = index if isinstance(index, str) else json.dumps({"weight_map": index})
            (tmp_path / "model.safetensors.index.json").write_text(text)
        return tmp_path

    return make


def value(checkpoint):
    return checkpoint.read_rows(checkpoint.tensors["x"], 0, 1).view("<f4").item()


@pytest.mark.parametrize(
    ("index", "state"),
    [
        ({"x": "model-1.safetensors"}, "names other file model-1.safetensors"),
        ({"x": "gone-1.safetensors", "y": "gone-2.safetensors"}, "names 2 files, the first is gone-1.safetensors"),
        ({"x": "model.safetensors", "y": "gone.safetensors"}, "names file gone.safetensors"),
        ({}, "is no index"),
        ("{", "is no index"),
    ],
)
def test_a_folder_saved_twice_means_the_whole_file(folder, index, state):
    """As transformers: shards of an earlier save, and an index of them, do not count beside model.safetensors."""
    checkpoint = open_checkpoint(folder({"model-1.safetensors": 1, "model.safetensors": 2}, index))
    assert value(checkpoint) == 2
    assert len(checkpoint.notes) == 1 and "model.safetensors is read" in checkpoint.notes[0]
    assert state in checkpoint.notes[0]
    assert [entry.names for entry in checkpoint.left_out] == [("model-1.safetensors",)]


def test_an_index_of_the_whole_file_is_not_stale(folder):
    checkpoint = open_checkpoint(folder({"model.safetensors": 2}, {"x": "model.safetensors"}))
    assert (checkpoint.notes, checkpoint.left_out) == ((), ())


def test_what_lies_beside_the_model_is_told(folder):
    others = ("adapter_model", "consolidated", "optimizer", "mtp")
    made = folder({"model.safetensors": 2} | dict.fromkeys((f"{name}.safetensors" for name in others), 1))
    (made / "broken.safetensors").write_bytes(b"x")
    checkpoint = open_checkpoint(made)
    assert value(checkpoint) == 2 and list(checkpoint.others) == ["mtp.safetensors"]
    told = "; ".join(map(str, checkpoint.left_out))
    for word in ("adapter_model.safetensors: an adapter", "optimizer.safetensors: training state", "mtp.safetensors"):
        assert word in told
    assert "consolidated.safetensors: the publisher's own copy" in told and "no sound safetensors file" in told


def test_a_file_of_mtp_is_found_beside_many(folder):
    """An earlier save of twenty shards is told in one line, and does not hide what --mtp keep may want."""
    made = folder({"model.safetensors": 2, "x-mtp.safetensors": 1} | {f"a-{i}.safetensors": 1 for i in range(20)})
    checkpoint = open_checkpoint(made)
    assert "x-mtp.safetensors" in checkpoint.others and len(checkpoint.others) == 16
    (entry,) = checkpoint.left_out
    assert str(entry).startswith("left out: 21 files, the first is a-0.safetensors: ")


@pytest.mark.parametrize(
    ("files", "index", "word"),
    [
        ({"a.safetensors": 1, "b.safetensors": 1}, None, "2 safetensors files, the first a.safetensors"),
        ({"model-00001-of-00002.safetensors": 1}, None, "one of 2 shards"),
        ({"b-of-3.safetensors": 1}, {"x": "a-of-2.safetensors"}, "b-of-3.safetensors, not in the index"),
        ({"optimizer.safetensors": 1}, None, "no safetensors weights here but optimizer.safetensors, training state"),
    ],
)
def test_folders_without_a_model_are_refused(folder, files, index, word):
    with pytest.raises(CheckpointError, match=word):
        open_checkpoint(folder(files, index))


def test_the_only_file_is_the_model_whatever_its_name(folder):
    checkpoint = open_checkpoint(folder({"weights.safetensors": 3, "adapter_model.safetensors": 1}))
    assert value(checkpoint) == 3 and "weights.safetensors is taken for the model" in checkpoint.notes[0]


def test_an_index_and_its_shards_may_differ_in_what_a_model_can_spare(folder):
    """A tied head that was not saved, buffers, multi-token prediction: named and not there, or there and not named."""
    names = ("x", "lm_head.weight", "mtp.norm.weight", "model.position_ids")
    made = folder({"a-1.safetensors": 3, "b-2.safetensors": 1}, dict.fromkeys(names, "a-1.safetensors"))
    assert list(open_checkpoint(made).tensors) == ["x"]
    save_file({"x": torch.ones(1), "mtp.fc.weight": torch.ones(1)}, made / "a-1.safetensors")
    assert open_checkpoint(made).tensors.keys() == {"x", "mtp.fc.weight"}
    save_file({"mtp.fc.weight": torch.ones(1)}, made / "b-2.safetensors")
    folder({}, {"x": "a-1.safetensors", "mtp.norm.weight": "b-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"mtp.fc.weight, as a-1.safetensors does; keep one"):
        open_checkpoint(made)


def test_a_shard_of_dropped_mtp_may_be_missing(folder):
    made = folder({"a-1.safetensors": 3}, {"x": "a-1.safetensors", "model.mtp.norm.weight": "b-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"b-2.safetensors.*; --mtp drop leaves"):
        open_checkpoint(made)
    assert value(open_checkpoint(made, drop_mtp=True)) == 3


def test_a_repository_of_a_hub_cache_is_not_its_snapshot(tmp_path):
    (tmp_path / "snapshots" / "0123abc").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="give one of the folders in its snapshots"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_alone_says_so(folder, with_config):
    made = folder({"adapter_model.safetensors": 1})
    (made / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    if not with_config:
        (made / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is an adapter of 'org/base', not a model"):
        open_checkpoint(made)
