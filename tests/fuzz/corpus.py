"""Minimised hostile inputs that once ended badly, or nearly: what it is, the files it changes, and the arguments.

`files` are {path in the folder: content}; a str or bytes is written, a pair of bytes and a size makes a sparse file, a
`Path` becomes a link to it. `M` is the folder of a sound checkpoint that they are laid over, `W` the folder above it.
The last item is a part of the message, or "" where the case may succeed.
"""

import json
import struct
from pathlib import Path

from fuzz.inputs import CONFIG

_CONFIG = json.dumps(CONFIG)
_MANY = CONFIG | {"num_hidden_layers": 2, "num_experts": 1024, "mtp_num_hidden_layers": 64}
_GEMMA = {
    "model_type": "gemma4_text",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "vocab_size": 520,
    "intermediate_size": 64,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_CONVERT = ["convert", "M", "W/out", "--jobs", "1", "--to"]


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _one(**entry) -> bytes:
    return _header(json.dumps({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} | entry}).encode())


_GGUF_COUNT = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 1 << 60)

_DAT = struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 5, 4) + struct.pack("<4f", 1, 1, 1, 1)
_PLAN_DAT = ["plan", "M", "--to", "gguf:Q4_K_M", "--imatrix", "W/i.dat"]

_COMPARE = ["compare", "M", "M", "--windows", "1", "--text", "W/t", "--state", "W/s"]
_IMATRIX = ["imatrix", "M", "--text", "W/t", "--output", "W/i.gguf", "--ctx", "8"]
_TEXT = "The quick brown fox jumps over the lazy dog. " * 9

CORPUS = {
    "more experts of a token than there are": (
        {"M/config.json": json.dumps(CONFIG | {"num_experts_per_tok": 3}), "t": _TEXT},
        _COMPARE,
        "transformers cannot run it",
    ),
    "the same, measured": (
        {"M/config.json": json.dumps(CONFIG | {"num_experts_per_tok": 3}), "t": _TEXT},
        _IMATRIX,
        "transformers cannot run it",
    ),
    "a text of a byte": ({"t": "a"}, _IMATRIX, "give more text"),
    "side files in all": (
        {f"M/LICENSE.{number}": (b"x", 60 << 20) for number in range(5)},
        [*_CONVERT, "bf16"],
        "one of the side files",
    ),
    "side file of a terabyte": ({"M/LICENSE": (b"x", 1 << 40)}, [*_CONVERT, "bf16"], ""),
    "sparse tokenizer": ({"M/tokenizer.json": (b"{}", 1 << 40)}, [*_CONVERT, "gguf:BF16"], "limit"),
    "sparse imatrix": ({"i.dat": (_DAT, 1 << 30)}, _PLAN_DAT, "sums of 16"),
    "imatrix of a terabyte": ({"i.dat": (_DAT, 1 << 40)}, _PLAN_DAT, "limit"),
    "three million tensors": (
        {"x.gguf": (b"GGUF" + struct.pack("<IQQ", 3, 3_000_000, 0), 99_000_000)},
        ["inspect", "W/x.gguf"],
        "bytes of memory",
    ),
    "link out, in a GGUF": (
        {"M/chat_template.jinja": Path("/etc/hostname")},
        [*_CONVERT, "gguf:BF16"],
        "leaves the folder",
    ),
    "tokenizer outside": ({"M/tokenizer_config.json": Path("../other")}, [*_CONVERT, "gguf:BF16"], "leaves the folder"),
    "device": ({"M/generation_config.json": Path("/dev/zero")}, [*_CONVERT, "gguf:BF16"], "leaves the folder"),
    "loop of links": ({"M/config.json": Path("config.json")}, ["plan", "M", "--to", "bf16"], "leads nowhere"),
    "OUT is a loop": ({"out": Path("out")}, [*_CONVERT, "bf16"], "leads nowhere"),
    "OUT leads elsewhere": ({"out/.ornith-partial": Path("..")}, [*_CONVERT, "bf16"], "W/out/.ornith-partial"),
    "UTF-16 config": ({"M/config.json": _CONFIG.encode("utf-16")}, ["plan", "M", "--to", "bf16"], "UTF-8"),
    "UTF-16 header": ({"M/model.safetensors": _header("{}".encode("utf-16"))}, ["inspect", "M"], "UTF-8"),
    "half a pair": (
        {"M/config.json": _CONFIG.replace("{", '{"\\ud800":1,', 1)},
        ["plan", "M", "--to", "bf16"],
        "UTF-8",
    ),
    "name not UTF-8": ({"M/LICENSE\udcff": b"x"}, [*_CONVERT, "bf16"], "not UTF-8"),
    "400 levels": ({"M/config.json": '{"dtype":' * 400 + "1" + "}" * 400}, ["inspect", "M", "--json"], "nested deeper"),
    "4,300 digits": (
        {"x.safetensors": _one(data_offsets=[10**4299, 10**4299])},
        ["inspect", "W/x.safetensors"],
        "digits",
    ),
    "digits as a key": (
        {"c.json": json.dumps(_GEMMA | {"per_layer_config": {"9" * 5000: {"head_dim": 64}}})},
        ["plan", "W/c.json", "--to", "bf16"],
        "per_layer_config",
    ),
    "MTP times experts": ({"c.json": json.dumps(_MANY)}, ["plan", "W/c.json", "--to", "bf16"], "64 for MTP"),
    "ten million lists": (
        {"c.json": b"[" + b"[]," * 10**7 + b"[]]"},
        ["plan", "W/c.json", "--to", "bf16"],
        "bytes of memory",
    ),
    "GGUF of 2^60 strings": ({"x.gguf": _GGUF_COUNT}, ["inspect", "W/x.gguf"], "are announced"),
    "repeats written out": (
        {},
        ["plan", "qwen3.5-9b", "--to", "gguf:Q4_K_M", "--tensor-type", "(?:(?:a{999}){999}){999}=q6_k"],
        "memory",
    ),
    "journal of infinity": (
        {"out/.ornith-partial/journal": '{"identity":"x","slab_bytes":1e999}\n'},
        [*_CONVERT, "bf16"],
        "",
    ),
    "message of a long name": ({}, ["inspect", "x" * 5000], "..."),
    "weights called a license": (
        {"M/LICENSE.safetensors": _one(), "M/LICENSE.pt": b"\x80\x04."},
        [*_CONVERT, "bf16"],
        "",
    ),
}
