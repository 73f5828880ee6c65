"""Our GGUF files against those of llama.cpp's own converter: every tensor and every key, as hashes.

converter.json was recorded by tests/record_converter.py, which says how. The models (tests/converter_models.py): an MoE
with MTP, 12 experts, 12 layers and 2 key to 8 value heads; a dense one from F32 weights, with rows that are no whole
blocks; a Gemma 4; a dense one with a vision tower and 2 key to 6 value heads; the tower of a Gemma 4. Tensors are
written in another order. The weights are such that torch's exponential rounds every decay of a head correctly, which it
does for 99 values in 100 (quant/source/transforms.py).
"""

import json
from pathlib import Path

import pytest
from converter_models import MODELS, make, types_of
from record_converter import summary

from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.source.weights import open_source

RECORD = json.loads(Path(__file__).with_name("converter.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_is_the_one_that_llama_cpps_converter_writes(name, tmp_path):
    folder = make(name, tmp_path)
    report = convert(open_source(folder), tmp_path / "out", [f"gguf:{kind}" for kind in types_of(name)])
    for build in report.builds:
        expected, found = RECORD[f"{name} {build.build.removeprefix('gguf:')}"], summary(build.path)
        assert found["tensors"] == expected["tensors"]
        assert list(found["keys"].items()) == list(expected["keys"].items())
