"""quant/gguf/tokenizer.py in llama.cpp: the ids it splits text into, against the tokenizers library on tokenizer.json.

llama.cpp runs in process (xllamacpp) and is asked through its server's /tokenize. Not covered: text that Unicode
normalization changes, because llama.cpp does not apply a tokenizer's NFC; and the keys as such, which
test_gguf_metadata.py reads.
"""

import json
import urllib.request

import fixtures
import pytest
import tokenizers

from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.source.weights import open_source

TEXTS = [
    fixtures.TEXT,
    "Żółć isn't 12345 experts\n\n  def route(x):<think>hm</think> a\t b  \r\n c",
    "<|im_start|>user\nhi<|im_end|>\n<|turn>model\n<turn|>",
    "हिन्दी 日本語 🦙🦙 !!!!?? 'RE \u200d\n\n\n x  y   z",
    "▁ [PAD515] <0x41> Ġ",
    "",
]


@pytest.fixture(scope="module", params=[fixtures.qwen35, fixtures.gemma4], ids=["qwen35", "gemma4"])
def served(request, tmp_path_factory):
    """(folder, function from text to llama.cpp's ids)."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp's Python binding")
    folder = request.param(tmp_path_factory.mktemp("checkpoint"))
    out = tmp_path_factory.mktemp("builds")
    convert(open_source(folder), out, ["gguf:F32"])
    settings = xllamacpp.CommonParams()
    settings.model.path = str(next(out.glob("*.gguf")))
    settings.n_ctx, settings.n_parallel, settings.verbosity, settings.warmup = 64, 1, -1, False
    server = xllamacpp.Server(settings)

    def tokenize(text):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]

    return folder, tokenize


@pytest.mark.parametrize("text", TEXTS, ids=["prose", "code", "markers", "scripts", "lookalikes", "empty"])
def test_llama_cpp_splits_text_as_the_checkpoint_does(served, text):
    folder, tokenize = served
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenize(text) == tokenizer.encode(text).ids
