"""Rewrites a MoE checkpoint into the other layouts that exist in the wild, every value moved bit for bit.

    python demo/layouts.py SRC OUT --experts fused --shards 3 --mtp per-expert --prefix model.language_model.

Source: a Hugging Face folder of Qwen3.5-MoE as `save_pretrained` writes it, with experts one by one. Layouts:

    per-expert   mlp.experts.N.{gate,up,down}_proj.weight          as Ornith's BF16 and every FP8 checkpoint store them
    fused        mlp.experts.gate_up_proj [E, 2I, H], down_proj    as Qwen's BF16 checkpoints store them
    mixed        even layers fused, odd layers one by one

besides sharding with an index, the prefix of the multimodal class, and MTP tensors (one full-attention layer with its
own experts, random but seeded: nothing here runs them), fused or one by one, as both occur among the Qwen releases.

For small checkpoints: all tensors are held in memory.
"""

import argparse
import json
import math
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_LAYER = re.compile(r"layers\.(\d+)\.")


def rewrite(
    src: str | Path,
    out: str | Path,
    *,
    experts: str = "per-expert",
    shards: int = 1,
    mtp: str | None = None,
    prefix: str = "model.",
    seed: int = 0,
) -> Path:
    """Write the checkpoint `src` to the new folder `out` in another layout.

    Args:
        src: folder with config.json and one or more safetensors files, experts one by one.
        experts: "per-expert", "fused" or "mixed".
        shards: number of safetensors files, filled in order to about equal size; more than one come with an index.
        mtp: None for no MTP tensors, or the layout of their experts, "fused" or "per-expert".
        prefix: replaces "model." in front of the text model's names; "model.language_model." is the multimodal class's.
        seed: of the MTP values.

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` exists. ValueError: an unknown layout, or more shards than tensors.
    """
    src, out = Path(src), Path(out)
    if experts not in ("per-expert", "fused", "mixed"):
        raise ValueError(f"experts: expected 'per-expert', 'fused' or 'mixed', got {experts!r}")
    if mtp not in (None, "fused", "per-expert"):
        raise ValueError(f"mtp: expected None, 'fused' or 'per-expert', got {mtp!r}")
    tensors = {}
    for file in sorted(src.glob("*.safetensors")):
        tensors.update(load_file(file))
    if not tensors:
        raise ValueError(f"{src}: expected a folder with safetensors files")
    if mtp is not None:
        tensors.update(_mtp_tensors(json.loads((src / "config.json").read_text()), seed))

    def fused(name):
        if name.startswith("mtp."):
            return mtp == "fused"
        return experts == "fused" or (experts == "mixed" and int(_LAYER.search(name)[1]) % 2 == 0)

    tensors = _fuse_experts(tensors, fused)
    tensors = {re.sub(r"^model\.", lambda _: prefix, name): tensor for name, tensor in tensors.items()}
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"shards: expected 1 to {len(tensors)} (the number of tensors), got {shards}")
    out.mkdir(parents=True)
    for file in src.iterdir():
        if not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, out)
    _write(out, tensors, shards)
    return out


def _fuse_experts(tensors, fused):
    """Stack the experts of every module for which `fused(name)` holds; other tensors pass."""
    result, modules = {}, {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match and fused(name):
            module, expert, role = match.groups()
            modules.setdefault(module, {})[role, int(expert)] = tensor
        else:
            result[name] = tensor
    for module, parts in modules.items():
        count = len(parts) // 3
        gate, up, down = (torch.stack([parts[role, i] for i in range(count)]) for role in ("gate", "up", "down"))
        result[f"{module}.gate_up_proj"] = torch.cat((gate, up), dim=1)  # [E, 2I, H]
        result[f"{module}.down_proj"] = down  # [E, H, I]
    return dict(sorted(result.items()))


def _mtp_tensors(config, seed):
    """The MTP block of one full-attention MoE layer, experts one by one, BF16."""
    config = config.get("text_config", config)
    hidden, inner, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    shared = config["shared_expert_intermediate_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "fc.weight": (hidden, 2 * hidden),
        "norm.weight": (hidden,),
        "pre_fc_norm_embedding.weight": (hidden,),
        "pre_fc_norm_hidden.weight": (hidden,),
        "layers.0.input_layernorm.weight": (hidden,),
        "layers.0.post_attention_layernorm.weight": (hidden,),
        "layers.0.self_attn.q_proj.weight": (2 * queries, hidden),  # each head: query rows, then gate rows
        "layers.0.self_attn.k_proj.weight": (keys, hidden),
        "layers.0.self_attn.v_proj.weight": (keys, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, queries),
        "layers.0.self_attn.q_norm.weight": (head,),
        "layers.0.self_attn.k_norm.weight": (head,),
        "layers.0.mlp.gate.weight": (config["num_experts"], hidden),
        "layers.0.mlp.shared_expert_gate.weight": (1, hidden),
        "layers.0.mlp.shared_expert.gate_proj.weight": (shared, hidden),
        "layers.0.mlp.shared_expert.up_proj.weight": (shared, hidden),
        "layers.0.mlp.shared_expert.down_proj.weight": (hidden, shared),
    }
    for expert in range(config["num_experts"]):
        shapes[f"layers.0.mlp.experts.{expert}.gate_proj.weight"] = (inner, hidden)
        shapes[f"layers.0.mlp.experts.{expert}.up_proj.weight"] = (inner, hidden)
        shapes[f"layers.0.mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
    random = torch.Generator().manual_seed(seed)
    return {f"mtp.{n}": torch.randn(s, generator=random).mul_(0.02).bfloat16() for n, s in shapes.items()}


def _write(out, tensors, shards):
    """One file, or `shards` files of about equal bytes with model.safetensors.index.json."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return
    share = math.ceil(sum(sizes.values()) / shards)
    parts, used = [{}], 0
    for position, (name, tensor) in enumerate(tensors.items()):
        left = len(tensors) - position
        full = used >= share or left <= shards - len(parts)  # leave at least one tensor for each later file
        if parts[-1] and full and len(parts) < shards:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += sizes[name]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrite a MoE checkpoint into another layout, bit for bit.")
    parser.add_argument("src", type=Path, metavar="SRC", help="checkpoint folder, experts one by one")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--experts", choices=("per-expert", "fused", "mixed"), default="per-expert")
    parser.add_argument("--shards", type=int, default=1, help="number of safetensors files (default %(default)s)")
    parser.add_argument("--mtp", choices=("fused", "per-expert"), help="add MTP tensors in this layout")
    parser.add_argument("--prefix", default="model.", help="in front of the text model's names (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the MTP values (default %(default)s)")
    options = vars(parser.parse_args(argv))
    try:
        rewrite(options.pop("src"), options.pop("out"), **options)
    except (OSError, ValueError) as error:
        print(f"layouts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
