"""Run llama.cpp's converter on our nvfp4 build of the model of modelopt_models.py and record what it writes, as hashes.

    python tests/record_nvfp4_gguf.py LLAMA_CPP > tests/quant/builds/nvfp4_gguf.json

LLAMA_CPP: as in record_converter.py, but of a version that repacks NVFP4; the recorded file is from v0.5.0, the bundle
in the npm package node-llama-cpp 3.22.1.
"""

import json
import sys
import tempfile
from pathlib import Path

NAME = "Ornith-Tiny"
WIDTHS = {"hidden_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}


def main(root: Path) -> None:
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    from modelopt_models import make
    from record_converter import convert as theirs
    from record_converter import summary

    from ornith_moe.quant.conversion.convert import convert
    from ornith_moe.quant.source.weights import open_source

    with tempfile.TemporaryDirectory() as scratch:
        source = make(Path(scratch) / "source" / NAME, "mixed", **WIDTHS)
        (build,) = convert(open_source(source), Path(scratch) / "out", ["nvfp4"]).builds
        named = build.path.rename(build.path.with_name(NAME))  # the model is named after its folder
        output = Path(scratch) / "theirs.gguf"
        theirs(root / "convert_hf_to_gguf.py", named, output, "bf16", ())
        json.dump(summary(output), sys.stdout, indent=0, ensure_ascii=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
