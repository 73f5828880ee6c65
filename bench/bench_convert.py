"""A whole conversion, four builds in one pass, against copying as many bytes with shutil.copyfile.

Source: two layers of random BF16 weights in the sizes of the 35B (shapes.CHECKPOINT), in the page cache. The rate of a
row is its bytes over its median: source bytes for the conversion, bytes copied for the copies. The limit of the
conversion is the time to copy its finished builds file by file with an fsync each, on the same disk in the same run:
what the same output costs with nothing to compute. The conversion also reads everything back and hashes it twice.

The note says where the time goes: `convert` reads, encodes and writes, `check` flushes, reads back and hashes. All
builds are verified against the source before anything is timed.
"""

import filecmp
import os
import shutil
import statistics
import time

import pytest
from fixtures import qwen_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from ornith_moe.bench.limits import best_seconds
from ornith_moe.bench.shapes import CHECKPOINT, experts_of
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

BUILDS = ("fp8-channel", "fp8-block", "gguf:BF16", "gguf:Q8_0")
PRESET, EXPERTS_SHAPE = "ornith-1.0-35b", "ornith-35b"
ROUNDS = 3
GROUP = f"convert {PRESET} sizes, {CHECKPOINT['num_hidden_layers']} layers, to {' + '.join(BUILDS)}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "source"
    text = open_source(PRESET).config["text_config"]
    assert (text["hidden_size"], text["moe_intermediate_size"]) == experts_of(EXPERTS_SHAPE)[:2]
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**text | CHECKPOINT)).bfloat16()
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=qwen_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return open_source(folder)


@pytest.fixture(scope="module")
def builds(checkpoint):
    """Folder of the finished and verified builds; also warms the page cache and compiles what numba compiles."""
    out = checkpoint.folder.parent / "builds"
    for report in convert(checkpoint, out, BUILDS).builds:
        verification = verify(report.path, checkpoint)
        assert verification.ok, verification.problems
        assert verification.tensors == report.tensors
    return out


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def total_bytes(folder):
    return sum(path.stat().st_size for path in files(folder))


def copy(folder, target):
    """Copy every file of `folder`, each flushed to the disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for number, path in enumerate(files(folder)):
        shutil.copyfile(path, target / str(number))
        with open(target / str(number), "rb") as copied:
            os.fsync(copied.fileno())


@pytest.fixture(scope="module")
def copy_s(builds):
    return best_seconds(lambda: copy(builds, builds.parent / "limit"), ROUNDS)


@pytest.mark.parametrize("what", ["source", "builds"])
def test_copyfile(measure, checkpoint, builds, copy_s, what):
    folder, target = {"source": checkpoint.folder, "builds": builds}[what], builds.parent / "copy"
    copy(folder, target)
    assert all(filecmp.cmp(path, target / str(i), shallow=False) for i, path in enumerate(files(folder)))
    limit_s = copy_s * total_bytes(folder) / total_bytes(builds)
    name, call = f"shutil.copyfile of the {what}", lambda: copy(folder, target)
    measure(GROUP, name, call, peer=False, nbytes=total_bytes(folder), limit_s=limit_s, rounds=ROUNDS)


def test_convert(measure, checkpoint, builds, copy_s):
    out, phases = builds.parent / "again", []

    def fresh():
        shutil.rmtree(out, ignore_errors=True)

    def run():
        ends = {}
        began = time.perf_counter()
        convert(checkpoint, out, BUILDS, progress=lambda phase, *_: ends.update({phase: time.perf_counter()}))
        seconds = time.perf_counter() - began
        phases.append(((ends["convert"] - began) / seconds, (ends["check"] - ends["convert"]) / seconds))

    nbytes, name = total_bytes(checkpoint.folder), "ornith-moe convert"
    row = measure(GROUP, name, run, peer=False, nbytes=nbytes, limit_s=copy_s, rounds=ROUNDS, setup=fresh)
    assert total_bytes(out) == total_bytes(builds)
    writing, checking = (statistics.median(shares) for shares in zip(*phases, strict=True))
    written = total_bytes(out) / nbytes
    row["note"] = f"convert {writing:.0%}, check {checking:.0%}; writes {written:.2f} bytes per byte of source"
