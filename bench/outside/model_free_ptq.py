"""llm-compressor's `model_free_ptq`, on a CPU, with what the official FP8 builds of this family leave out.

python model_free_ptq.py SOURCE OUTPUT SCHEME        SCHEME: FP8_DYNAMIC (channels), FP8_BLOCK, NVFP4A16, ...
"""

import sys

from llmcompressor import model_free_ptq

source, output, scheme = sys.argv[1:]
IGNORE = ("lm_head", "re:.*embed_tokens$", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*linear_attn.*")
model_free_ptq(source, output, scheme=scheme, ignore=IGNORE, device="cpu")
