"""llama.cpp's convert_hf_to_gguf.py as it is, for a checkpoint whose vocabulary was never published.

    python convert_hf_to_gguf.py LLAMA_CPP SOURCE --outtype q8_0 --outfile FILE        what follows LLAMA_CPP is its own

The converter finds out how a text is split by a hash of what the tokenizer makes of a sample, and so knows published
vocabularies only. Here it is told: "qwen35", whose split pattern the benchmark's tokenizer has.
"""

import runpy
import sys
from pathlib import Path

root = Path(sys.argv[1]).resolve()
sys.path[:0] = [str(root), str(root / "gguf-py")]

from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
sys.argv = [str(root / "convert_hf_to_gguf.py"), *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
