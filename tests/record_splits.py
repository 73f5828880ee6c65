"""Run llama-gguf-split on GGUFs of ours and record what it writes, as hashes.

    python tests/record_splits.py LLAMA_GGUF_SPLIT > tests/quant/gguf/splits.json

LLAMA_GGUF_SPLIT: the program, built from llama.cpp; the recorded file is from that of v0.5.0 (de3ff81). Its input is
what `convert` writes of models of converter_models.py, whose bytes are the same on any machine. None is an MoE: a
tensor [1, K], which a converter writes with two dimensions, has one in what the program writes: the same to a reader.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CUTS = {  # model, build -> options of llama-gguf-split
    ("tiny-dense", "gguf:F32"): ("--split-max-size", "1M"),
    ("tiny-dense", "gguf:Q8_0"): ("--split-max-tensors", "17"),
    ("Gemma-4-300K-it", "gguf:BF16"): ("--split-max-tensors", "1"),  # a tensor that no weight gives has a file too
}


def digests(files: list[Path]) -> dict[str, str]:
    """{name: hash of the bytes}, in the order of the parts."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(files)}


def main(program: str) -> None:
    from converter_models import make

    from ornith_moe.quant.conversion.convert import convert
    from ornith_moe.quant.source.weights import open_source

    record = {}
    with tempfile.TemporaryDirectory() as scratch:
        for (name, build), options in CUTS.items():
            folder = Path(scratch) / str(len(record))
            folder.mkdir()
            whole = convert(open_source(make(name, folder)), folder, [build]).builds[0].path
            parts = folder / "parts"
            parts.mkdir()
            subprocess.run([program, *options, str(whole), str(parts / whole.stem)], check=True, stdout=sys.stderr)
            record[f"{name} {build}"] = digests(list(parts.iterdir()))
    json.dump(record, sys.stdout, indent=0)


if __name__ == "__main__":
    main(sys.argv[1])
