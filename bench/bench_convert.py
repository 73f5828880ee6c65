"""A whole conversion, four builds in one pass, beside copying as many bytes with shutil.copyfile.

Source: layers of random BF16 weights in the sizes of the 35B (shapes.CHECKPOINT), in the page cache. The rate of a row
is the bytes of the source over its median. The limit is the time to copy the finished builds file by file with an fsync
each, on the same disk in the same run: what the same output costs with nothing to compute. The conversion also reads
everything back and hashes it twice.

The note says where the time goes: `convert` reads, encodes and writes, `check` flushes, reads back and hashes. All
builds are verified against the source before anything is timed.

`convert_hf_to_gguf.py` of llama.cpp is the peer of a single GGUF build; real_tools.py says where it is looked for.
"""

import atexit
import filecmp
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from ornith_moe.bench import whole_commands
from ornith_moe.bench.command import digests
from ornith_moe.bench.limits import best_seconds
from ornith_moe.bench.process_tree import run
from ornith_moe.bench.real_tools import find_llama_cpp, to_gguf
from ornith_moe.bench.shapes import CHECKPOINT, experts_of
from ornith_moe.bench.tasks import Settings, Side, Task, Work
from ornith_moe.bench.timing import Times
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.gguf.tokenizer import PRE_BY_PATTERN
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

BUILDS = ("fp8-channel", "fp8-block", "gguf:BF16", "gguf:Q8_0")
PRESET, EXPERTS_SHAPE = "ornith-1.0-35b", "ornith-35b"
SMALL = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "full_attention_interval": 1, "num_experts": 4}
CONVERTER = "convert_hf_to_gguf.py"


def tasks(settings: Settings) -> list[Task]:
    """Four builds in one pass, one GGUF, whole commands; none for a GPU, whose encoders are in the suite of codecs."""
    if settings.device == "cuda":
        return []
    changes = CHECKPOINT | (SMALL if settings.quick else {})
    layers = changes["num_hidden_layers"]
    sizes = f"{PRESET} sizes, {layers} layer{'s' * (layers != 1)} of {changes['num_experts']} experts"
    together = {"ours": False, "copyfile of the builds": False}
    single = {"ours": False, CONVERTER: True}
    case = {"model": EXPERTS_SHAPE, "layers": layers, "experts": changes["num_experts"]}
    return [
        Task("convert", f"convert {sizes}, to {' + '.join(BUILDS)}", case | {"build": "all"}, together,
             partial(_prepare_all, settings.quick)),
        Task("convert", f"convert {sizes}, to gguf:Q8_0", case | {"build": "gguf:Q8_0"}, single,
             partial(_prepare_one, settings.quick)),
        *whole_commands.tasks(settings, scratch, put_tokenizer),
    ]  # fmt: skip


@cache
def scratch() -> Path:
    """A folder that goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="ornith-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def checkpoint(quick: bool) -> Any:
    """A source of random weights with a tokenizer that was trained on a sentence."""
    import torch
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    folder = scratch() / "source"
    text = open_source(PRESET).config["text_config"]
    assert (text["hidden_size"], text["moe_intermediate_size"]) == experts_of(EXPERTS_SHAPE)[:2]
    torch.manual_seed(0)
    changes = CHECKPOINT | (SMALL if quick else {})
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**text | changes)).bfloat16()
    model.save_pretrained(folder)
    put_tokenizer(folder)
    return open_source(folder)


def put_tokenizer(folder: Path) -> None:
    """A tokenizer that was trained on a sentence."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pattern = next(pattern for pattern, name in PRE_BY_PATTERN.items() if name == "qwen35")
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["A router reads each token once and names the experts that work on it."], trainer)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def copy(folder: Path, target: Path) -> None:
    """Copy every file of `folder`, each flushed to the disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for number, path in enumerate(files(folder)):
        shutil.copyfile(path, target / str(number))
        with open(target / str(number), "rb") as copied:
            os.fsync(copied.fileno())


def _verified(out: Path, source: Any, builds: tuple[str, ...]) -> None:
    """Convert to `out` and verify; also warms the page cache and compiles what numba compiles."""
    shutil.rmtree(out, ignore_errors=True)
    for report in convert(source, out, builds).builds:
        found = verify(report.path, source)
        assert found.ok, str(found.problems[:1])
        assert found.tensors == report.tensors


def _conversion(
    source: Any, out: Path, builds: tuple[str, ...], expected: int, phases: list[tuple[float, float]]
) -> Side:
    """Into `out`, whose bytes are those that were `expected` of a verified one."""

    def call() -> None:
        ends: dict[str, float] = {}
        began = time.perf_counter()
        convert(source, out, builds, progress=lambda phase, *_: ends.update({phase: time.perf_counter()}))
        seconds = time.perf_counter() - began
        phases.append(((ends["convert"] - began) / seconds, (ends["check"] - ends["convert"]) / seconds))

    def check(_: None) -> float:
        assert total_bytes(out) == expected, f"{total_bytes(out)} bytes written, {expected} were verified"
        return 0.0

    return Side(call, check, setup=lambda: shutil.rmtree(out, ignore_errors=True))


def _prepare_all(quick: bool) -> Work:
    source, builds, again = checkpoint(quick), scratch() / "builds", scratch() / "again"
    _verified(builds, source, BUILDS)
    limit_s = best_seconds(lambda: copy(builds, scratch() / "limit"), 3)
    phases: list[tuple[float, float]] = []
    written = total_bytes(builds) / total_bytes(source.folder)

    def copied() -> Side:
        def check(_: None) -> float:
            pairs = ((path, target / str(i)) for i, path in enumerate(files(builds)))
            assert all(filecmp.cmp(*pair, shallow=False) for pair in pairs), "a copied file differs"
            return 0.0

        target = scratch() / "copy"
        return Side(partial(copy, builds, target), check)

    def note(name: str, times: Times) -> str:
        if name != "ours":
            return (
                f"{total_bytes(source.folder if 'source' in name else builds) / times.median_s / 1e9:.2f} GB/s copied"
            )
        writing, checking = (statistics.median(shares) for shares in zip(*phases, strict=True))
        return f"convert {writing:.0%}, check {checking:.0%}; writes {written:.2f} bytes per byte of source"

    sides = {
        "ours": lambda: _conversion(source, again, BUILDS, total_bytes(builds), phases),
        "copyfile of the builds": copied,
    }
    return Work(sides, total_bytes(source.folder), limit=(limit_s, "copy"), note=note)


def _prepare_one(quick: bool) -> Work:
    source, out = checkpoint(quick), scratch() / "one"
    _verified(out, source, ("gguf:Q8_0",))
    expected = total_bytes(out)
    sides: dict[str, Callable[[], Side]] = {
        "ours": lambda: _conversion(source, out, ("gguf:Q8_0",), expected, []),
        CONVERTER: partial(_converter, source.folder, scratch() / "theirs.gguf"),
    }
    size = total_bytes(source.folder)
    return Work(
        sides, size + size * 17 // 32, note=lambda name, times: f"{size / times.median_s / 1e6:.0f} MB/s of source"
    )


def _converter(folder: Path, out: Path) -> Side:
    step = to_gguf(find_llama_cpp(), folder, "q8_0", out)

    def call() -> None:
        ended = run(step.command)
        assert ended.code == 0, " ".join(ended.errors.split())[-200:]

    def check(_: None) -> float:
        ours = next(path for path in files(scratch() / "one") if path.suffix == ".gguf")
        assert digests(out) == digests(ours), "its tensors are not those of ours"
        return 0.0

    return Side(call, check, setup=lambda: out.unlink(missing_ok=True))


def test_convert(measure: Callable[[Task, str], None], task: Task, name: str) -> None:
    measure(task, name)
