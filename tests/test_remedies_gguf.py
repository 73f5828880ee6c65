"""Remedies of messages about vision towers and their mmproj, and about GGUFs in several files."""

import json

import pytest
import torch
from fuzz.inputs import CONFIG
from remedies import edit, follows, made, refused, tiny

from ornith_moe.quant.gguf.splits import Split
from ornith_moe.quant.verification.inspect import inspect
from ornith_moe.quant.verification.verify import verify

TOWER = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3, "num_position_embeddings": 16,
}  # fmt: skip
PIXELS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def with_tower(folder, dtype=torch.bfloat16, **changes):
    tower = TOWER | changes
    tiny(folder, dtype, model_type="qwen3_5_moe", text_config=CONFIG, vision_config=tower)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@follows("leave {} out")
def test_a_text_model_is_left_without(tmp_path, out):
    m = tiny(tmp_path / "m")
    refused("has no vision tower, of which gguf:mmproj is made; leave gguf:mmproj out", made, m, out, ["gguf:mmproj"])
    made(m, out, ["gguf:BF16"])


@follows("leave the builds of gguf:mmproj out")
def test_a_tower_that_llama_cpp_does_not_know_is_left_out(tmp_path, out):
    m = with_tower(tmp_path / "m", temporal_patch_size=1)
    refused("temporal_patch_size is 1, and 2 alone is known", made, m, out, ["gguf:BF16", "gguf:mmproj"])
    made(m, out, ["gguf:BF16"])


@follows("copy the file from where the model was published")
def test_the_preprocessor_is_copied(tmp_path, out):
    m = with_tower(tmp_path / "m")
    (m / "preprocessor_config.json").rename(tmp_path / "published.json")
    refused("copy the file from where the model was published", made, m, out, ["gguf:mmproj"])
    (tmp_path / "published.json").rename(m / "preprocessor_config.json")
    made(m, out, ["gguf:mmproj"])


@follows("make gguf:mmproj or gguf:mmproj-F32 of it")
@pytest.mark.parametrize("instead", ["gguf:mmproj", "gguf:mmproj-F32"])
def test_another_type_is_made(tmp_path, out, instead):
    m = with_tower(tmp_path / "m")
    edit(m, lambda tensors: tensors["model.visual.blocks.0.attn.qkv.weight"].fill_(1e6))
    refused("make gguf:mmproj or gguf:mmproj-F32 of it", made, m, out, ["gguf:mmproj-F16"])
    made(m, out, [instead])


@follows("leave --split-max-size or --split-max-tensors out")
def test_one_limit_is_left_out(tmp_path, out):
    refused("leave --split-max-size or --split-max-tensors out", Split, 1 << 20, 9)
    made(tiny(tmp_path / "m"), out, ["gguf:BF16"], split=Split(1 << 20))


@follows("rename it to {}")
def test_a_part_is_renamed(tmp_path, out):
    first = made(tiny(tmp_path / "m"), out, ["gguf:BF16"], split=Split(max_tensors=30)).builds[0].path
    second = first.with_name(first.name.replace("-00001-", "-00002-"))
    second.rename(out / "mine.gguf")
    told = refused("which its name must say; rename it to mine-00002-of-00002.gguf", inspect, out / "mine.gguf")
    first.rename(out / "mine-00001-of-00002.gguf")
    (out / "mine.gguf").rename(out / told.rpartition(" ")[2])
    assert inspect(out / "mine-00002-of-00002.gguf")["kind"] == "GGUF in 2 files"


@follows("is missing{}, of the {} files of this GGUF; fetch it again", "by its keys; fetch it again")
def test_a_part_is_fetched(tmp_path, out):
    m = tiny(tmp_path / "m")
    first = made(m, out, ["gguf:BF16"], split=Split(max_tensors=30)).builds[0].path
    second = first.with_name(first.name.replace("-00001-", "-00002-"))
    second.rename(tmp_path / "published")
    assert "of the 2 files of this GGUF; fetch it again" in verify(first).problems[0]
    second.write_bytes(first.read_bytes())
    assert "by its keys; fetch it again" in verify(first).problems[0]
    (tmp_path / "published").rename(second)
    assert verify(first).ok
