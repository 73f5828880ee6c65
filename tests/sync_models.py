"""Policies of the tests of weight sync: fp32 masters, and the builds that `convert` makes of their checkpoints."""

import copy
import functools
import json
import tempfile
from pathlib import Path

import fixtures
import torch
import transformers
from safetensors.torch import load_file

from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.source.weights import open_source

MODELS = {  # name: (class, checkpoint)
    "moe": (transformers.AutoModelForCausalLM, "moe"),
    "vision": (transformers.AutoModelForImageTextToText, "vision"),
    "text of vision": (transformers.Qwen3_5MoeForCausalLM, "vision"),
    "dense": (transformers.AutoModelForCausalLM, "dense"),
    "gemma": (transformers.AutoModelForCausalLM, "gemma"),
}
BUILDS = ("fp8-channel", "fp8-block", "bf16")
SHARD_BYTES = 2 << 20
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 16, "num_hidden_layers": 2}
_MADE = tempfile.TemporaryDirectory(prefix="ornith-sync-")  # goes with the process


@functools.cache
def masters(name):
    """A model in fp32, moved off the BF16 numbers that its checkpoint holds; made once, and not to be changed."""
    kind, source = MODELS[name]
    folder = Path(_MADE.name) / f"source-{source}"
    if not folder.exists():
        make = {"dense": fixtures.qwen35, "gemma": fixtures.gemma4}.get(source, fixtures.qwen35moe)
        options = {"experts": 4, "top_k": 2} if make is fixtures.qwen35moe else {}
        make(folder, **options | ({"vision": True} if source == "vision" else {}))
    model = kind.from_pretrained(folder, dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.rand(parameter.shape, generator=random) / 256)
    return model


@functools.cache
def converted(name, dtype=torch.bfloat16):
    """{build: its folder} of the checkpoint of `masters(name)`, saved in `dtype`."""
    folder = Path(_MADE.name) / f"{name}-{dtype}"
    copy.deepcopy(masters(name)).to(dtype).save_pretrained(folder)
    report = convert(open_source(folder), folder / "builds", BUILDS, max_shard_bytes=SHARD_BYTES)
    return {build.build: build.path for build in report.builds}


def stored(path):
    """{name: tensor} of a build, whose index names the same."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    return tensors


def assert_same_bytes(pairs, expected):
    """Names, dtypes, shapes and bytes of (name, tensor) pairs, each name once."""
    pairs = list(pairs)
    found = dict(pairs)
    assert len(found) == len(pairs) and found.keys() == expected.keys()
    for name, truth in expected.items():
        assert (found[name].dtype, found[name].shape) == (truth.dtype, truth.shape), name
        assert found[name].is_contiguous()
        assert torch.equal(found[name].view(torch.uint8), truth.view(torch.uint8)), name
