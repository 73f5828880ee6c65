"""hf:// sources: what is asked of huggingface_hub, and what becomes of its answers.

Reference: a folder in the Hub cache's own layout; the library's functions are replaced, since tests have no network.
Not covered: the network.
"""

import json
import shutil

import fixtures
import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.hub import INDEX, WANTED, open_any
from ornith_moe.quant.source import open_source


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository org/moe with MTP tensors in two shards; calls are recorded."""
    snapshot = tmp_path / "models--org--moe" / "snapshots" / "0123abc"
    fixtures.qwen35moe(snapshot, experts=2, mtp=True, shards=2)
    calls = []

    def snapshot_download(repository, *, revision, allow_patterns):
        calls.append((repository, revision, tuple(allow_patterns)))
        return str(snapshot)

    def hf_hub_download(repository, name, *, revision):
        calls.append((repository, revision, name))
        if not (snapshot / name).exists():
            raise _missing(name)
        return str(snapshot / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return snapshot, calls


def _missing(name):
    error = EntryNotFoundError.__new__(EntryNotFoundError)
    Exception.__init__(error, f"404: no {name} here\nRequest ID: 1")
    return error


def test_weights_are_fetched_without_code(hub):
    snapshot, calls = hub
    source = open_any("hf://org/moe@v1")
    assert calls == [("org/moe", "v1", WANTED)]
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pkl")) for pattern in WANTED)
    assert source.name == "moe", "not the commit the cache names the folder after"
    assert source.weights == open_source(snapshot).weights


def test_a_plan_needs_config_and_index_only(hub):
    snapshot, calls = hub
    source = open_any("hf://org/moe", config_only=True)
    assert [call[2] for call in calls] == ["config.json", "model.safetensors.index.json"]
    assert source.has_mtp and source.name == "moe"
    assert [w.shape for w in source.weights] == [w.shape for w in open_source(snapshot).weights]


def test_a_plan_tells_what_the_names_of_an_index_tell(hub):
    """Quantized by its scales, stale without; a head that is tied and there all the same."""
    snapshot, _ = hub
    config, index = (json.loads((snapshot / name).read_text()) for name in ("config.json", INDEX))
    config |= {"quantization_config": {"quant_method": "fp8"}, "tie_word_embeddings": True}
    (snapshot / "config.json").write_text(json.dumps(config))
    notes = open_any("hf://org/moe", config_only=True, name="mine").notes
    assert "stale quantization_config" in notes[0] and "it counts if its values are not the embedding's" in notes[1]
    index["weight_map"]["a.weight_scale_inv"] = "model-00001-of-00002.safetensors"
    (snapshot / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="already quantized"):
        open_any("hf://org/moe", config_only=True)


def test_without_an_index_mtp_is_left_open(hub):
    snapshot, _ = hub
    (snapshot / "model.safetensors.index.json").unlink()
    assert not open_any("hf://org/moe", config_only=True).has_mtp
    assert open_any("hf://org/moe", config_only=True, mtp="keep").has_mtp


def test_what_the_hub_lacks_is_one_sentence(hub):
    snapshot, _ = hub
    (snapshot / "config.json").unlink()
    with pytest.raises(CheckpointError, match="could not be fetched from the Hub") as caught:
        open_any("hf://org/moe", config_only=True)
    assert "\n" not in str(caught.value)
    shutil.rmtree(snapshot)
    with pytest.raises(CheckpointError):
        open_any("hf://org/moe")


@pytest.mark.parametrize("name", ["hf://", "hf://org", "hf://org/../x/y", "hf://a/b/c", "hf://org/name@a b"])
def test_odd_names_never_reach_the_hub(hub, name):
    with pytest.raises(CheckpointError, match="expected hf://org/name"):
        open_any(name)
    assert hub[1] == []
