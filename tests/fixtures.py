"""Tiny random checkpoints, made on the spot with transformers' own classes and a seed.

    qwen35moe(folder)   Qwen3.5 MoE: hidden 256, 3 gated-DeltaNet layers + 1 full-attention layer, experts of width 256
    qwen35(folder)      the same with a dense MLP of width 512
    gemma4(folder)      Gemma 4 dense: 3 sliding layers + 1 full layer, shared key/value projection, tied embeddings

Each writes `config.json`, `generation_config.json`, safetensors (names as published checkpoints have them), a trained
toy tokenizer and a chat template, and returns the folder. Nothing is left at its initial value: norms, `A_log`,
`dt_bias`, the convolution and `layer_scalar` are random, so that a forgotten `+1`, a swapped head order or a skipped
scalar shows in the logits. The vocabulary has 520 rows and the tokenizer fewer tokens, so some rows belong to no token.

`experts_layout` is one of the three that exist in the wild: `each` (one tensor per expert and projection), `fused` (two
3-D tensors per layer) and `mixed` (main layers fused, MTP layer one by one). Random weights say whether two programs
compute the same thing; they say nothing about quality.
"""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB_ROWS = 520  # embedding rows; a multiple of 8 larger than the tokenizer, as real checkpoints pad
QWEN35_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
TEXT = """
A router reads each token once and names the experts that will work on it; the others rest. Every expert is a small
network of its own, with a gate, an upward and a downward projection, and what it returns is weighted and added up.
The weights of the chosen experts sum to one, so a token is never louder because more experts were willing to hear it.
def route(logits, top_k):
    probabilities = softmax(logits, dim=-1)
    weights, indices = probabilities.topk(top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), indices
for layer in range(4):
    hidden = hidden + attention(norm(hidden))
    hidden = hidden + experts(norm(hidden), *route(gate(hidden), top_k=4))
It's 3.14159 and not 22/7; they'll say 1, 2, 3, 10, 100, 1000 or 65536. We've seen it, I'm sure: isn't it what you'd do?
Żółć, naïve café, Größe, Ελληνικά, русский текст, हिन्दी, 日本語, 한국어, עברית; emoji too, said the ornith(opter).
The quantizer divides a row into blocks, finds the largest magnitude of each, and stores a scale beside small integers;
the reader multiplies them back. What was lost on the way is noise, and the noise is measured, never guessed at.
""".strip()


_MADE = tempfile.TemporaryDirectory(prefix="ornith-fixtures-")  # goes with the process


def _made_once(make):
    """A checkpoint takes a second to make and none to copy: made once in a process for the same options."""

    @functools.cache
    def made(options: tuple) -> Path:
        return make(Path(tempfile.mkdtemp(dir=_MADE.name)) / "model", **dict(options))

    @functools.wraps(make)
    def copied(folder, **options) -> Path:
        return Path(shutil.copytree(made(tuple(sorted(options.items()))), folder, dirs_exist_ok=True))

    return copied


@_made_once
def qwen35moe(
    folder,
    *,
    experts: int = 16,
    top_k: int = 4,
    experts_layout: str = "each",
    mtp: bool = False,
    vision: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    vocab_rows: int = VOCAB_ROWS,
    seed: int = 0,
) -> Path:
    """Write a Qwen3.5 MoE checkpoint; `vision` wraps it with a two-block vision tower, as the published ones are."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration
    from transformers import Qwen3_5MoeTextConfig as TextConfig

    ffn = {"num_experts": experts, "num_experts_per_tok": top_k}
    ffn |= {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    classes = (TextConfig, Qwen3_5MoeConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration)
    config, tensors = _qwen(classes, ffn, vision, mtp, vocab_rows, seed)
    tensors = _lay_out_experts(tensors, experts_layout)
    return _write(Path(folder), config, tensors, dtype, shards, qwen_tokenizer(), _QWEN_TOKENIZER_CONFIG, QWEN_TEMPLATE)


@_made_once
def qwen35(
    folder,
    *,
    mtp: bool = False,
    vision: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    vocab_rows: int = VOCAB_ROWS,
    seed: int = 0,
) -> Path:
    """Write a Qwen3.5 dense checkpoint."""
    from transformers import Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig

    classes = (Qwen3_5TextConfig, Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration)
    config, tensors = _qwen(classes, {"intermediate_size": 512}, vision, mtp, vocab_rows, seed)
    return _write(Path(folder), config, tensors, dtype, shards, qwen_tokenizer(), _QWEN_TOKENIZER_CONFIG, QWEN_TEMPLATE)


@_made_once
def gemma4(
    folder,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    vocab_rows: int = VOCAB_ROWS,
    seed: int = 0,
) -> Path:
    """Write a Gemma 4 dense checkpoint: window 16, sliding heads of 64, full heads of 128 that reuse keys as values."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=vocab_rows,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        head_dim=64,
        global_head_dim=128,
        attention_k_eq_v=True,
        sliding_window=16,
        final_logit_softcapping=30.0,
        hidden_size_per_layer_input=0,
        max_position_embeddings=1024,
    )
    model = _randomize(_build(Gemma4ForCausalLM, config, seed), seed)
    with torch.no_grad():  # tied embeddings would otherwise predict the current token with certainty
        model.model.embed_tokens.weight.mul_(0.5)
        model.model.norm.weight.sub_(1).mul_(4)
    tensors = dict(model.state_dict())
    tensors.pop("lm_head.weight", None)  # tied
    tensors = {name: t for name, t in tensors.items() if not name.endswith(("inv_freq", "embed_scale"))}
    return _write(Path(folder), config, tensors, dtype, shards, gemma_tokenizer(), _GEMMA_TOKENIZER_CONFIG, None)


def qwen_tokenizer(vocab_size: int = 506) -> Tokenizer:
    """Byte-level BPE with Qwen3.5's pre-tokenizer, special tokens, and `<think>`, `</think>` as plain added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN35_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    return tokenizer


def gemma_tokenizer(vocab_size: int = 240) -> Tokenizer:
    """SentencePiece-style BPE as Gemma 4 has it: spaces become U+2581, unknown characters become `<0xNN>` bytes."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), behavior="isolated")
    learner.train_from_iterator(TEXT.splitlines(), trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = [*GEMMA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "\n"]
    pieces += sorted(learned["vocab"], key=learned["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in GEMMA_SPECIAL])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return tokenizer


_QWEN_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
}
_GEMMA_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def _qwen(classes, ffn: dict, vision: bool, mtp: bool, vocab_rows: int, seed: int):
    text_config_class, wrapper_config_class, causal_class, conditional_class = classes
    text = {
        "vocab_size": vocab_rows,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 1024,
        "mtp_num_hidden_layers": 1,  # announced whether or not the tensors are there, as Ornith-1.0 does
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
        },
        **ffn,
    }
    if vision:
        tower = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 256}
        tower |= {"patch_size": 4, "num_position_embeddings": 64, "spatial_merge_size": 2}
        config = wrapper_config_class(text_config=text, vision_config=tower)
        model = _build(conditional_class, config, seed)
    else:
        config = text_config_class(**text)
        model = _build(causal_class, config, seed)
    tensors = dict(_randomize(model, seed).state_dict())
    tensors = {name: t for name, t in tensors.items() if not name.endswith("inv_freq")}
    if mtp:
        tensors |= _mtp_tensors(tensors, "model.language_model." if vision else "model.", seed)
    return config, tensors


def _build(model_class, config, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


@torch.no_grad()
def _randomize(model, seed: int):
    """Random values for what initialization leaves constant, and weights large enough for logits that differ."""
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(tensor, mean, std):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("layer_scalar"):
            normal(tensor, 0.8, 0.1)
        elif name.endswith("A_log"):
            normal(tensor, 0.5, 0.7)
        elif name.endswith("dt_bias"):
            normal(tensor, -2.0, 1.0)
        elif name.endswith("conv1d.weight"):
            normal(tensor, 0.0, 0.4)
        elif "norm" in name and tensor.dim() == 1:
            centre = tensor.mean().item()  # 0 for the zero-centred norms of Qwen3.5, 1 for plain ones
            normal(tensor, centre, 0.2)
        elif name.endswith("bias"):
            normal(tensor, 0.0, 0.1)
        elif "embed_tokens" in name or "lm_head" in name:
            normal(tensor, 0.0, 0.3)
        elif name.endswith("mlp.gate.weight") or name.endswith("shared_expert_gate.weight"):
            normal(tensor, 0.0, 0.1)
        elif tensor.is_floating_point() and tensor.dim() >= 2:
            normal(tensor, 0.0, 0.06)
    return model


def _mtp_tensors(tensors: dict, prefix: str, seed: int) -> dict:
    """One multi-token-prediction block: the shapes of the full-attention layer, other values, and the joint `fc`."""
    generator = torch.Generator().manual_seed(seed + 2)
    hidden = tensors[prefix + "norm.weight"].shape[0]
    shapes = {"fc.weight": (hidden, 2 * hidden)}
    shapes |= {f"{norm}.weight": (hidden,) for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    source = prefix + "layers.3."
    shapes |= {"layers.0." + n.removeprefix(source): t.shape for n, t in tensors.items() if n.startswith(source)}
    return {f"mtp.{name}": torch.randn(shape, generator=generator) * 0.06 for name, shape in shapes.items()}


def _lay_out_experts(tensors: dict, layout: str) -> dict:
    if layout not in ("each", "fused", "mixed"):
        raise ValueError(f"experts_layout is {layout!r}, expected 'each', 'fused' or 'mixed'")
    laid_out = {}
    for name, tensor in tensors.items():
        stem, _, projection = name.rpartition(".")
        keep = layout == "fused" or (layout == "mixed" and not name.startswith("mtp."))
        if keep or not stem.endswith("mlp.experts"):
            laid_out[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if projection == "gate_up_proj":
                gate, up = matrix.chunk(2)
                laid_out[f"{stem}.{expert}.gate_proj.weight"] = gate
                laid_out[f"{stem}.{expert}.up_proj.weight"] = up
            else:
                laid_out[f"{stem}.{expert}.down_proj.weight"] = matrix
    return laid_out


def _write(folder: Path, config, tensors, dtype, shards: int, tokenizer, tokenizer_config: dict, template) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [_ARCHITECTURES[config.model_type]]
    config.save_pretrained(folder)
    if config.model_type == "gemma4_text":
        _publish_gemma_config(folder / "config.json", config)
    special = tokenizer_config["eos_token"], tokenizer_config["pad_token"]
    generation = {"eos_token_id": [tokenizer.token_to_id(t) for t in special], "temperature": 0.6, "top_k": 20}
    _write_json(folder / "generation_config.json", generation | {"top_p": 0.95, "do_sample": True})
    tensors = {name: tensor.to(dtype).contiguous().clone() for name, tensor in tensors.items()}
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for shard in sorted(set(weight_map.values())):
            part = {name: tensors[name] for name in names if weight_map[name] == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


_ARCHITECTURES = {
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "gemma4_text": "Gemma4ForCausalLM",
}


def _publish_gemma_config(path: Path, config) -> None:
    """Spell the full layers' heads as Google does; transformers 5.23 writes `per_layer_config`, 5.7 does not."""
    full = config.layer_types.index("full_attention")
    content = json.loads(path.read_text(encoding="utf-8"))
    if "per_layer_config" not in content:
        return
    overrides = content.pop("per_layer_config")[str(full)]
    content["global_head_dim"] = overrides["head_dim"]
    content["num_global_key_value_heads"] = overrides["num_key_value_heads"]
    _write_json(path, content)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
