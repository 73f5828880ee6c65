"""hf:// sources: what is asked of huggingface_hub, and what becomes of its answers.

Reference: a folder in the Hub cache's own layout; the library's functions are replaced, since tests have no network,
but for a Hub that is not reached, which a loopback socket plays. Not covered: the network.
"""

import json
import shutil
import socket
import time

import fixtures
import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import EntryNotFoundError

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source import hub as module
from ornith_moe.quant.source.hub import INDEX, WANTED, open_any
from ornith_moe.quant.source.weights import open_source


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("hub") / "moe", experts=2, mtp=True, shards=2)


@pytest.fixture
def hub(sharded, tmp_path, monkeypatch):
    """A repository org/moe with MTP tensors in two shards; calls are recorded."""
    snapshot = tmp_path / "models--org--moe" / "snapshots" / "0123abc"
    shutil.copytree(sharded, snapshot)
    calls = []

    def snapshot_download(repository, *, revision, allow_patterns, local_files_only):
        assert not local_files_only
        calls.append((repository, revision, tuple(allow_patterns)))
        return str(snapshot)

    def hf_hub_download(repository, name, *, revision, local_files_only):
        assert not local_files_only
        calls.append((repository, revision, name))
        if not (snapshot / name).exists():
            raise _missing(name)
        return str(snapshot / name)

    monkeypatch.setattr(module, "_unreachable", lambda repository: "")
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


def test_an_adapter_is_stored_whole(hub, tmp_path):
    snapshot, calls = hub
    assert module.folder_of("hf://org/moe@v1") == snapshot and calls == [("org/moe", "v1", WANTED)]
    assert module.folder_of(tmp_path) == tmp_path


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
    notes = open_any("hf://org/moe", config_only=True).notes
    assert "quantized checkpoint (quant_method 'fp8'), whose builds are planned as of a BF16 one" in notes[1]
    config["quantization_config"] = {"quant_method": "awq"}
    (snapshot / "config.json").write_text(json.dumps(config))
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


@pytest.fixture(params=["silent", "closed"])
def no_hub(request, tmp_path, monkeypatch):
    """A Hub that takes connections and never answers, or a port where nothing listens; an empty cache."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen(8)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(module, "ANSWER_SECONDS", 0.5)
        yield tmp_path / "hub"


@pytest.mark.parametrize("config_only", [True, False])
def test_a_hub_that_is_not_reached_is_one_sentence_at_once(no_hub, config_only):
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="hf://org/moe: expected the Hub to answer or a copy") as error:
        open_any("hf://org/moe", config_only=config_only)
    assert time.monotonic() - began < 5 and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_cached_copy_serves_without_the_hub(no_hub):
    repository = no_hub / "models--org--moe"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    folder = fixtures.qwen35moe(repository / "snapshots" / "0123abc", experts=2)  # one file, no index
    for config_only in (True, False):
        found = open_any("hf://org/moe", config_only=config_only)
        assert found.name == "moe"
        assert [w.shape for w in found.weights] == [w.shape for w in open_source(folder).weights]
