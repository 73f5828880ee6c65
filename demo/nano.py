"""Trains `ornith-nano`, a genuine Qwen3.5-MoE checkpoint small enough to make on any machine, and saves it in BF16.

    python demo/nano.py OUT

Model: transformers' own Qwen3_5MoeForCausalLM with 17 M parameters: hidden 256, three gated-DeltaNet layers and one
full-attention layer, 16 experts of width 256 with top-4 routing and a gated shared expert. The dimensions keep every
trait of the family that a converter can get wrong: two value heads per key head, gated attention queries, partial
rotary embedding with three sections, untied embeddings, MTP announced in the config and absent from the weights.

Text: the running interpreter's standard library, whole files, one in sixteen held out. Tokenizer: byte-level BPE of
4096 tokens with the pre-tokenizer of Qwen3.5 and its chat markers.

Training: next-token prediction in float32 from scratch, AdamW, the experts computed by our backend
(experts_implementation="ornith"), with a small load-balancing loss. The number of steps is fixed, not the time, and
every choice comes from the seed, so the same machine makes the same bytes. Perplexity is measured on held-out files
before and after, the latter with the BF16 weights that are saved.

The result appears under its name only when it is complete. A folder that holds the same nano already (same settings,
text, library versions and recipe) is reused.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Read when torch loads its OpenMP. By default waiting threads spin for long, and beside one other busy process a step
# then took 20 s; without spinning it took 0.8 s, with a short spin 0.4 s (4 x 128 tokens, 2 cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
)

import ornith_moe as om
import ornith_moe.hf  # registers experts_implementation="ornith"

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

# how Qwen3.5 (and llama.cpp's `qwen35`) cuts text before BPE: contractions, words with an optional leading sign, single
# digits, runs of signs, line breaks, blanks
PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Settings:
    """What determines the bytes of a nano, besides text and library versions. Lengths in tokens, text in bytes."""

    steps: int = 200
    seed: int = 0
    batch: int = 8
    length: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    aux_coef: float = 0.01
    vocab_size: int = 4096
    hidden_size: int = 256
    experts: int = 16
    expert_size: int = 256
    layers: int = 4
    text_bytes: int = 1 << 30  # an upper limit; the whole library is about 10 MB
    heldout_tokens: int = 8192


def make_nano(
    out: str | Path,
    *,
    steps: int = Settings.steps,
    seed: int = 0,
    progress: bool | None = None,
    settings: Settings = Settings(),
) -> dict:
    """Train a nano and save it as a Hugging Face checkpoint folder, or reuse the one that is already there.

    Args:
        out: folder to make. May hold a nano (reused if equal, replaced if not); any other content is refused.
        steps: optimizer steps. seed: of initial weights and batches.
        progress: show a bar on stderr; None shows it on a terminal only.
        settings: everything else; tests make smaller models.

    Returns:
        What nano.json in the folder holds: settings, fingerprint, steps, seed, seconds, tokens_per_second, loss (last),
        ppl_before and ppl_after on held-out text, expert_share (of the least and the most used expert, per layer).

    Raises:
        FileExistsError: `out` holds something else.
    """
    out = Path(out)
    settings = replace(settings, steps=steps, seed=seed)
    texts = _read_library(settings.text_bytes)
    fingerprint = _fingerprint(settings, texts)
    record = _existing_record(out)
    if record.get("fingerprint") == fingerprint:
        return record

    started = time.monotonic()
    training_texts = [text for name, text in texts if not _is_heldout(name)]
    tokenizer = train_tokenizer(training_texts, settings.vocab_size)
    stream = _encode(tokenizer, training_texts)
    heldout = torch.tensor(heldout_tokens(tokenizer, settings.heldout_tokens))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(_config(settings, tokenizer), experts_implementation="ornith")
        ppl_before = perplexity(model, heldout, settings.length)
        loss, tokens_per_second = _train(model, stream, settings, progress)
    model.to(torch.bfloat16).float()  # measure the weights that are saved
    record = {
        "fingerprint": fingerprint,
        **asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": settings.steps * settings.batch * settings.length,
        "loss": loss,
        "ppl_before": ppl_before,
        "ppl_after": perplexity(model, heldout, settings.length),
        "expert_share": _expert_share(model, heldout, settings.length),
        "tokens_per_second": tokens_per_second,
        "seconds": time.monotonic() - started,
    }
    _save(out, model.to(torch.bfloat16), tokenizer, record)
    return record


def heldout_tokens(folder_or_tokenizer, count: int) -> list[int]:
    """The first `count` tokens of held-out text, at most 512 from one file so that many kinds of text take part.

    Args:
        folder_or_tokenizer: a checkpoint folder, or its tokenizer.
        count: how many tokens.

    Raises:
        ValueError: the library has fewer.
    """
    tokenizer = folder_or_tokenizer
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    ids: list[int] = []
    for name, text in _read_library():
        if _is_heldout(name):
            ids += _encode(tokenizer, [text[:8192]])[:512].tolist()
            if len(ids) >= count:
                return ids[:count]
    raise ValueError(f"count: the held-out files give {len(ids)} tokens, {count} were asked for")


@torch.no_grad()
def perplexity(model, ids: torch.Tensor, length: int) -> float:
    """exp(mean next-token loss) over consecutive windows of `length` tokens; a remainder is dropped."""
    model.eval()
    windows = ids[: len(ids) // length * length].view(-1, length)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(8)]
    return math.exp(sum(losses) / len(windows))


def _read_library(limit_bytes: int = 1 << 30) -> list[tuple[str, str]]:
    """(name, text) of the standard library's sources, shuffled by the hash of their names, up to a size."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = sorted(name.as_posix() for name in names if not skipped & set(name.parts))
    texts, size = [], 0
    for name in sorted(names, key=_name_hash):
        try:
            text = (root / name).read_text("utf-8")
        except UnicodeDecodeError:
            continue
        size += len(text)
        if size > limit_bytes:
            break
        texts.append((name, text))
    return texts


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _is_heldout(name: str) -> bool:
    return _name_hash(name) % 16 == 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<think>", "</think>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _encode(tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of ids, each followed by <|endoftext|>."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return torch.cat([torch.tensor([*encoding.ids, end], dtype=torch.int32) for encoding in encoded]).long()


def _config(settings: Settings, tokenizer) -> Qwen3_5MoeTextConfig:
    return Qwen3_5MoeTextConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(settings.layers)],
        full_attention_interval=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attn_output_gate=True,
        partial_rotary_factor=0.25,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],  # pairs: 64 * 0.25 / 2 = 8
        },
        max_position_embeddings=2048,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        mamba_ssm_dtype="float32",
        num_experts=settings.experts,
        num_experts_per_tok=4,
        moe_intermediate_size=settings.expert_size,
        shared_expert_intermediate_size=settings.expert_size,
        mlp_only_layers=[],
        mtp_num_hidden_layers=1,  # announced and absent, as in the published checkpoints
        mtp_use_dedicated_embeddings=False,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )


def _train(model: Qwen3_5MoeForCausalLM, stream: torch.Tensor, settings: Settings, progress) -> tuple[float, float]:
    """Train in place; (loss of the last steps, tokens per second)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)

    def rate(step):  # linear up, then linear down to a tenth
        warm = (step + 1) / settings.warmup_steps
        return min(warm, 1 - 0.9 * step / settings.steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches = torch.Generator().manual_seed(settings.seed)
    offsets = torch.arange(settings.length)
    model.router_aux_loss_coef = settings.aux_coef  # more than the config's: few steps must spread the experts
    model.train()
    started, smooth = time.monotonic(), None
    with _progress_bar(progress) as bar:
        task = bar.add_task("training ornith-nano", total=settings.steps, loss=math.nan, rate=0.0)
        for step in range(settings.steps):
            first = torch.randint(len(stream) - settings.length, (settings.batch, 1), generator=batches)
            ids = stream[first + offsets]
            output = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            loss = (output.loss - settings.aux_coef * output.aux_loss).item()
            smooth = loss if smooth is None else 0.9 * smooth + 0.1 * loss
            speed = (step + 1) * ids.numel() / (time.monotonic() - started)
            bar.update(task, advance=1, loss=smooth, rate=speed)
    return smooth, speed


def _progress_bar(progress: bool | None) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f}  {task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal if progress is None else progress),
    )


@torch.no_grad()
def _expert_share(model, ids: torch.Tensor, length: int) -> list[list[float]]:
    """Per layer, the share of slots of the least and of the most used expert; 1 / experts is perfect balance."""
    windows = ids[: len(ids) // length * length].view(-1, length)
    shares = []
    for logits in model(input_ids=windows[:16], output_router_logits=True).router_logits:
        counts = om.route(logits, model.config.num_experts_per_tok).counts
        shares.append([counts.min().item() / counts.sum().item(), counts.max().item() / counts.sum().item()])
    return shares


def _fingerprint(settings: Settings, texts: list[tuple[str, str]]) -> str:
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    digest.update(f"{sys.version} {torch.__version__} {transformers.__version__} {tokenizers.__version__}".encode())
    digest.update(Path(__file__).read_bytes())
    for name, text in texts:
        digest.update(f"{name} {len(text)} ".encode() + text.encode())
    return digest.hexdigest()


def _existing_record(out: Path) -> dict:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    try:
        return json.loads((out / "nano.json").read_text())
    except (OSError, ValueError):
        raise FileExistsError(
            f"{out}: expected no such folder or an ornith-nano (nano.json), found other files; choose another name"
        ) from None


def _save(out: Path, model, tokenizer, record: dict):
    """Write beside `out`, then rename, so that a folder of that name is always complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        end, turn_end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>"))
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[turn_end, end], pad_token_id=end
        )
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "nano.json").write_text(json.dumps(record, indent=2) + "\n")
        temporary.chmod(0o755)  # temporary folders and safetensors files are private by default
        for file in temporary.iterdir():
            file.chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def quiet():
    """Silence transformers' bars, and its warnings that torch replaces kernels of packages not installed here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train ornith-nano on the standard library and save it in BF16.")
    parser.add_argument("out", type=Path, metavar="OUT", help="checkpoint folder to make or to reuse")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    quiet()
    try:
        record = make_nano(arguments.out, steps=arguments.steps, seed=arguments.seed)
    except OSError as error:
        print(f"nano: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(record, indent=2))
    else:
        print(
            f"{arguments.out}: {record['parameters'] / 1e6:.1f} M parameters, {record['steps']} steps in "
            f"{record['seconds']:.0f} s, held-out perplexity {record['ppl_before']:.0f} -> {record['ppl_after']:.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
