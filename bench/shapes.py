"""The shapes that every bench measures: no bench holds a dimension of its own.

    model x tokens x routing        experts of one layer, how many rows they get, and how unevenly

T tokens, E experts, H hidden, I expert intermediate.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from ornith_moe.quant.errors import OrnithError, brief


class Experts(NamedTuple):
    """Routed experts of one layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int

    def cut(self, ranks: int) -> "Experts":
        """What one of `ranks` expert-parallel ranks computes: its experts, and its share of each token's, at least one.

        Where `ranks` divides top_k an expert gets as many rows as in the whole layer, and the FLOP per byte of weights
        are those of the layer.
        """
        return self._replace(experts=self.experts // ranks, top_k=max(1, self.top_k // ranks))

    def weight_count(self) -> int:
        """Elements of gate_up_proj and down_proj."""
        return 3 * self.experts * self.hidden * self.inner


MODELS = {  # from each model's config.json: hidden_size, moe_intermediate_size, experts, experts per token
    "nano": Experts(256, 256, 16, 4),  # demo/nano.py; 6 MB in BF16, so its weights stay in cache
    "ornith-35b": Experts(2048, 512, 256, 8),  # Ornith-1.0-35B, Qwen3.5-35B-A3B
    "ornith-397b": Experts(4096, 1024, 512, 10),  # 12.9 GB in BF16
    "qwen3-30b-a3b": Experts(2048, 768, 128, 8),
    "qwen3-next-80b": Experts(2048, 512, 512, 10),
    "mixtral-8x7b": Experts(4096, 14336, 8, 2),
    "gpt-oss-20b": Experts(2880, 2880, 32, 4),  # sizes only: its activation is another, and it has biases
    "gpt-oss-120b": Experts(2880, 2880, 128, 4),
}
ROUTINGS = ("uniform", "zipf", "one-hot")  # or the path of a record, .npy
TOKENS = (1, 16, 128, 1024, 4096)  # one decode step, a small batch, a large one, chunks of prefill or training
TOKENS_GPU = (1, 64, 1024, 8192, 32768)


def experts_of(model: str) -> Experts:
    """Sizes of a name of MODELS, or of one of its ranks: "ornith-35b/8"."""
    name, _, ranks = model.partition("/")
    if name not in MODELS or not re.fullmatch(r"[1-9]\d{0,3}|", ranks):
        raise OrnithError(f"model: expected one of {', '.join(MODELS)}, or one cut by /2, /4, ...; got {brief(model)}")
    whole = MODELS[name]
    if int(ranks or 1) > whole.experts:
        raise OrnithError(f"model: {name} has {whole.experts} experts, which {ranks} ranks cannot share; ask for fewer")
    return whole.cut(int(ranks or 1))


def fitting(model: str, free_bytes: int, bytes_per_weight: int) -> str:
    """`model`, or the largest of its cuts by a power of two whose weights take `free_bytes` at most."""
    name, _, ranks = model.partition("/")
    ways = int(ranks or 1)
    while experts_of(f"{name}/{ways}").weight_count() * bytes_per_weight > free_bytes:
        if 2 * ways > MODELS[name].experts:
            raise OrnithError(f"model {name}: {free_bytes >> 20} MiB are free, less than one expert takes; free some")
        ways *= 2
    return name if ways == 1 else f"{name}/{ways}"


def route(routing: str, tokens: int, shape: Experts, device: str = "cpu") -> torch.Tensor:
    """Expert ids [T, top_k] int64, different within a token; drawn on the CPU, so equal on every device.

    "uniform": every expert alike. "zipf": the n-th most wanted expert as often as 1 / n, without replacement (Gumbel
    top-k, Kool et al. 2019). "one-hot": every token the same top_k experts. A path: rows of a routing record, the first
    layer of a .npy [tokens, layers, top_k] or [tokens, top_k], repeated as often as needed.
    """
    if routing == "one-hot":
        indices = torch.arange(shape.top_k).expand(tokens, -1).contiguous()
    elif routing in ROUTINGS:
        scores = -torch.log(-torch.log(torch.rand(tokens, shape.experts).clamp(1e-20, 1 - 1e-7)))
        if routing == "zipf":
            scores -= torch.arange(1, shape.experts + 1).log()
        indices = scores.topk(shape.top_k).indices
    else:
        indices = _recorded(Path(routing), tokens, shape)
    return indices.to(device)


def _recorded(path: Path, tokens: int, shape: Experts) -> torch.Tensor:
    import numpy as np

    from ornith_moe.routing_records import decode

    try:
        rows = np.load(path, allow_pickle=False)
        record = decode(rows[:, None] if rows.ndim == 2 else rows)[:, 0]
    except (OSError, TypeError, ValueError) as error:
        names = ", ".join(ROUTINGS)
        raise OrnithError(f"routing: expected {names} or a record in .npy, got {brief(str(path))} ({error})") from None
    record = record[(record >= 0).all(1)].long()
    if not len(record) or record.shape[1] != shape.top_k or int(record.max()) >= shape.experts:
        raise OrnithError(
            f"routing {path}: expected rows of {shape.top_k} ids below {shape.experts}, got {list(record.shape)} with "
            f"ids up to {int(record.max()) if len(record) else 'none'}; name the model that it was recorded with"
        )
    return record.repeat(-(-tokens // len(record)), 1)[:tokens]


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
