"""NVFP4 of the weights of all MLPs by nvidia-modelopt, on a CPU: the example of its documentation, no more.

    python export_modelopt.py SOURCE OUTPUT

The recipe is ModelOpt's `NVFP4_MLP_WEIGHT_ONLY_CFG` in groups of 16, as published builds have it. The quantizers ask
for a forward; nothing of a weight's scale depends on it, so it is eight tokens.
"""

import copy
import sys

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

source, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
model.config.architectures = [type(model).__name__]  # transformers leaves it out of a text config; the export reads it
config = copy.deepcopy(mtq.NVFP4_MLP_WEIGHT_ONLY_CFG)
for entry in config["quant_cfg"]:
    if (entry.get("cfg") or {}).get("block_sizes"):
        entry["cfg"]["block_sizes"][-1] = 16
with torch.no_grad():
    mtq.quantize(model, config, lambda model: model(torch.arange(8)[None]))
    export_hf_checkpoint(model, export_dir=output)
