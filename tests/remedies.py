"""What the tests of remedies share: tiny checkpoints, and ways to provoke a message and to follow it."""

import json
import re

import fixtures
import pytest
import torch
from fuzz.inputs import CONFIG, TOKENIZER_CONFIG
from safetensors.torch import load_file, save_file

from ornith_moe.quant.conversion.convert import PARTIAL, convert
from ornith_moe.quant.errors import OrnithError
from ornith_moe.quant.source.hub import open_any
from ornith_moe.quant.source.weights import source_from_config
from ornith_moe.quant.verification.verify import verify

NORM = "model.norm.weight"


def follows(*parts):
    """The test follows the messages that hold these parts, {} where a value stands; test_remedies.py reads it."""
    return lambda test: test


def tiny(folder, dtype=torch.bfloat16, mtp=None, shards=1, **changes):
    """A checkpoint of one linear and one full layer; returns its folder."""
    config = CONFIG | changes
    weights = source_from_config(config, name="m", mtp=mtp).weights
    made = torch.Generator().manual_seed(0)
    tensors = {w.name: torch.randn(w.shape, generator=made).to(dtype) for w in weights}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(fixtures.qwen_tokenizer().to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    for index, file in enumerate(names):
        save_file({n: tensors[n] for n in list(tensors)[index::shards]}, folder / file)
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def edit(folder, change, file="model.safetensors"):
    """Change the tensors of a file; gives them as they were."""
    before = load_file(folder / file)
    tensors = dict(before)
    change(tensors)
    save_file(tensors, folder / file)
    return before


def say(folder, **changes):
    """Say something else in config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(words, call, *arguments, **options):
    with pytest.raises(OrnithError, match=re.escape(words)) as told:
        call(*arguments, **options)
    return str(told.value)


def made(folder, out, builds=("bf16",), mtp=None, **options):
    """Convert as the command would, and verify."""
    source = open_any(folder, mtp=mtp)
    report = convert(source, out, list(builds), jobs=1, **options)
    assert all(verify(build.path, source).ok for build in report.builds) and not (out / PARTIAL).exists()
    return report
