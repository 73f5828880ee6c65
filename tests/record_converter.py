"""Run llama.cpp's converter on the models of converter_models.py and record what it writes, as hashes.

    python tests/record_converter.py LLAMA_CPP > tests/quant/gguf/converter.json

LLAMA_CPP: the folder with convert_hf_to_gguf.py and gguf-py, for instance vendor/llama.cpp in the unpacked sdist of
llama-cpp-python 0.3.36, which the recorded file is from; nothing of it is built. transformers of requirements.txt is
what the converter imports. One thing in the converter is replaced: `get_vocab_base_pre`, which looks up the hash of a
sample's token ids and so knows published vocabularies only, says "qwen35", which the models' split pattern is.

A GGUF is recorded as `summary` gives it: per tensor "TYPE dims sha256", per key "TYPE value" or a hash.
"""

import contextlib
import hashlib
import json
import runpy
import sys
import tempfile
from pathlib import Path

import numpy as np

HASH = 16  # hexadecimal digits kept of a SHA-256
SHORT = 60  # characters of a value that is recorded as it is


def summary(path: Path) -> dict[str, dict[str, str]]:
    """{"keys": {key: type and value}, "tensors": {name: type, dimensions in GGUF order, hash of the bytes}}."""
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            value = field.contents()
            text = json.dumps(value if not isinstance(value, np.generic) else value.item(), ensure_ascii=False)
            kind = "/".join(kind.name for kind in field.types)
            keys[name] = f"{kind} {text if len(text) <= SHORT else _hash(text.encode())}"
    tensors = {
        tensor.name: f"{tensor.tensor_type.name} {'x'.join(map(str, tensor.shape))} {_hash(tensor.data.tobytes())}"
        for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name)
    }
    return {"keys": keys, "tensors": tensors}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:HASH]


def convert(converter: Path, checkpoint: Path, output: Path, kind: str, options: tuple[str, ...]) -> None:
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
    sys.argv = [str(converter), str(checkpoint), "--outtype", kind, "--outfile", str(output), *options]
    with contextlib.redirect_stdout(sys.stderr):
        runpy.run_path(str(converter), run_name="__main__")


def main(root: Path) -> None:
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    from converter_models import MMPROJ_TYPES, MODELS, make, types_of

    record = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in MODELS.items():
            checkpoint = make(name, Path(scratch))
            for ours, theirs in types_of(name).items():
                output = Path(scratch) / f"{name}-{ours}.gguf"
                more = ("--mmproj",) if ours in MMPROJ_TYPES else ()
                convert(root / "convert_hf_to_gguf.py", checkpoint, output, theirs, (*options, *more))
                record[f"{name} {ours}"] = summary(output)
    json.dump(record, sys.stdout, indent=0, ensure_ascii=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
