"""The shapes that every bench measures: no bench holds a dimension of its own.

T tokens, E experts, H hidden, I expert intermediate.
"""

from typing import NamedTuple


class Experts(NamedTuple):
    """Routed experts of one layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int


EXPERTS = {
    "nano": Experts(256, 256, 16, 4),  # demo/nano.py; 6 MB in BF16, so its weights stay in cache
    # What one of eight expert-parallel ranks computes: E and top_k over 8 leave each expert as many rows as it gets in
    # the whole layer, and the FLOP per weight byte are those of the layer.
    "35b/8": Experts(2048, 512, 32, 1),
    "35b": Experts(2048, 512, 256, 8),  # Ornith-1.0-35B, Qwen3.5-35B-A3B
    # The 397B has 512 experts of this size, 12.9 GB in BF16. 32 of them fit, with its 10 per token.
    "397b/16": Experts(4096, 1024, 32, 10),
}
SLOW_EXPERTS = ("35b", "397b/16")
TOKENS = (1, 16, 128, 1024, 4096)  # one decode step, a small batch, a large one, chunks of prefill or training

MATRICES = {  # rows, columns
    "1024x2048": (1024, 2048),  # gate_up of one 35B expert
    "4096x4096": (4096, 4096),  # larger than most caches
}
SEARCHED = {"256x2048": (256, 2048), **MATRICES}  # for encoders that are bound by arithmetic

# Two layers with the expert and attention sizes of the 35B, but few experts and a small vocabulary: 240 MB in BF16.
CHECKPOINT = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1024,
    "mtp_num_hidden_layers": 0,
}
