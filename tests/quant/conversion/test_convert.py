"""Conversion as a stream: same bytes however it is cut, nothing under a final name before it is whole.

Reference: the quantizers applied to whole tensors, and an undisturbed conversion. Crashes are real: a process killed
with SIGKILL, a disk that is full, bytes lost after the journal had them. Not covered: power loss of a real disk.
"""

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import fixtures
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ornith_moe.quant.conversion.convert as convert_module
from ornith_moe.quant.conversion import writer
from ornith_moe.quant.conversion.convert import PARTIAL, convert
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.errors import BuildsFailed, CheckpointError, ConversionError, PlanError
from ornith_moe.quant.fp8 import dequantize_fp8, quantize_fp8_block, quantize_fp8_channel
from ornith_moe.quant.gguf.tensor_types import parse_asked_types
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

BUILDS = ["fp8-channel", "fp8-block", "bf16", "gguf:Q8_0"]


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=6, mtp=True, vision=True)


@pytest.fixture(scope="module")
def done(moe, tmp_path_factory):
    """An undisturbed conversion: folder and report."""
    out = tmp_path_factory.mktemp("done")
    return out, convert(open_source(moe), out, BUILDS)


def contents(folder):
    """{relative name: bytes} of every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def whole(folder):
    """All weights of the source with experts one by one."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items()}


def test_stored_weights_are_the_quantizers_own(moe, done):
    """One quantizer: the file holds what om.quantize_fp8_* gives for the whole tensor."""
    source = whole(moe)
    channel, block = (load_file(done[0] / name / "model.safetensors") for name in ("fp8-channel", "fp8-block"))
    quantized = 0
    for name, tensor in source.items():
        if f"{name}_scale" in channel:
            q, scale = quantize_fp8_channel(tensor)
            assert torch.equal(channel[name].view(torch.uint8), q.view(torch.uint8)), name
            assert torch.equal(channel[f"{name}_scale"], scale)
            quantized += 1
        else:
            assert torch.equal(channel[name], tensor), name
        if f"{name}_scale_inv" in block:
            q, scale = quantize_fp8_block(tensor, scale="bf16")
            assert torch.equal(block[name].view(torch.uint8), q.view(torch.uint8)), name
            assert torch.equal(block[f"{name}_scale_inv"], scale)
            back = dequantize_fp8(q, scale, block=(128, 128), dtype=torch.float32)
            assert 10 * torch.log10(tensor.float().square().sum() / (back - tensor).square().sum()) > 31
        else:
            assert torch.equal(block[name], tensor), name
    assert quantized == 4 * (6 * 3 + 3) + 4


def test_every_layout_of_the_source_gives_the_same_builds(tmp_path, done):
    """Experts fused, mixed or one by one, in one file or three: bytes of the builds are equal."""
    for number, options in enumerate(({"experts_layout": "fused"}, {"experts_layout": "mixed", "shards": 3})):
        folder = fixtures.qwen35moe(tmp_path / str(number) / "moe", experts=6, mtp=True, vision=True, **options)
        convert(open_source(folder), tmp_path / f"out{number}", BUILDS)
        assert contents(tmp_path / f"out{number}") == contents(done[0])


@pytest.mark.parametrize(("jobs", "slab"), [(1, 1 << 14), (3, 100_000), (2, 1 << 25)])
def test_bytes_do_not_depend_on_slabs_or_jobs(tmp_path, monkeypatch, moe, done, jobs, slab):
    monkeypatch.setattr(convert_module, "slabs", lambda *limits: (jobs, slab))
    report = convert(open_source(moe), tmp_path / "out", BUILDS, jobs=jobs)
    assert contents(tmp_path / "out") == contents(done[0])
    assert report.bytes_read == done[1].bytes_read


def test_source_is_read_once(moe, done):
    assert done[1].bytes_read == sum(info.nbytes for info in open_source(moe).checkpoint.tensors.values())


def test_report_and_manifest_tell_the_same(done):
    for build in done[1].builds:
        path = build.path / MANIFEST if build.path.is_dir() else Path(f"{build.path}.manifest.json")
        manifest = json.loads(path.read_bytes())
        assert (manifest["build"], manifest["tensors"], manifest["tensor_bytes"]) == (
            build.build, build.tensors, build.tensor_bytes,
        )  # fmt: skip
    assert not (done[0] / PARTIAL).exists()


def test_nothing_of_this_machine_is_in_a_build(moe, done):
    """Equal sources give equal bytes everywhere: no path, no date."""
    for name, payload in contents(done[0]).items():
        for word in (str(done[0]), str(moe), time.strftime("%Y-%m-%d")):
            assert word.encode() not in payload, (name, word)


def test_shards_and_index(tmp_path, moe):
    report = convert(open_source(moe), tmp_path / "out", ["fp8-block"], max_shard_bytes=5_000_000)
    folder = report.builds[0].path
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    assert report.builds[0].files == len(set(index["weight_map"].values())) > 1
    found = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == report.builds[0].tensor_bytes


def test_a_head_that_is_not_tied_is_in_every_build(tmp_path):
    """config.json ties it, its values are others: a weight of its own in builds, and the config says so."""
    folder = fixtures.gemma4(tmp_path / "src")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    report = convert(open_source(folder), tmp_path / "out", ["bf16", "fp8-channel", "fp8-block", "gguf:BF16"])
    *folders, file = (build.path for build in report.builds)
    for path in folders:
        assert load_file(path / "model.safetensors")["lm_head.weight"].equal(head)
        said = json.loads((path / "config.json").read_text())
        assert said["tie_word_embeddings"] is False
        section = said.get("quantization_config", {"quant_method": "bf16", "ignore": ["lm_head"]})
        assert section["quant_method"] != "bitsandbytes", "stale: its tensors are BF16"
        assert "lm_head" in section.get("ignore", section.get("modules_to_not_convert"))
    stored = {t.name: t.data for t in gguf.GGUFReader(file).tensors}["output.weight"]
    assert stored.tobytes() == head.view(torch.uint8).numpy().tobytes()


def test_dropped_mtp_is_not_announced(tmp_path, moe):
    convert(open_source(moe, mtp="drop"), tmp_path / "out", ["bf16"])
    config = json.loads((tmp_path / "out/bf16/config.json").read_bytes())
    assert config["text_config"]["mtp_num_hidden_layers"] == 0
    assert not any(name.startswith("mtp.") for name in load_file(tmp_path / "out/bf16/model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_source_dtypes(tmp_path, dtype):
    """F32 and F16 sources: FP8 of the BF16-rounded weight, BF16 by rounding to nearest."""
    folder = fixtures.qwen35(tmp_path / "src", dtype=dtype)
    convert(open_source(folder), tmp_path / "out", ["fp8-channel", "bf16", "gguf:F16"])
    source = whole(folder)
    channel, bf16 = (load_file(tmp_path / "out" / n / "model.safetensors") for n in ("fp8-channel", "bf16"))
    for name, tensor in source.items():
        assert torch.equal(bf16[name], tensor.bfloat16()), name
        if f"{name}_scale" in channel:
            q, _ = quantize_fp8_channel(tensor.bfloat16())
            assert torch.equal(channel[name].view(torch.uint8), q.view(torch.uint8)), name
    assert json.loads((tmp_path / "out/bf16/config.json").read_bytes())["dtype"] == "bfloat16"


# Crashes


def start(moe, out, *options):
    """The command as a process of its own, with small slabs so that it can be interrupted."""
    code = (
        "import sys; import ornith_moe.quant.conversion.convert as c; c.slabs = lambda *limits: (2, 1 << 14);"
        "import os, time, ornith_moe.quant.conversion.writer as w; write = w.Writer.write; w.CHUNK = 1 << 14;"
        "w.Writer.write = lambda *a: (time.sleep(0.004), write(*a));"  # the fixture is small and the disk is fast
        "from ornith_moe.cli import main; sys.argv[0] = 'ornith-moe'; main()"
    )
    builds = [word for build in BUILDS for word in ("--to", build)]
    return subprocess.Popen(
        [sys.executable, "-c", code, "convert", str(moe), str(out), *builds, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def killed_once(moe, tmp_path_factory):
    """A conversion killed with SIGKILL after at least forty units."""
    out = tmp_path_factory.mktemp("killed") / "out"
    process = start(moe, out)
    journal = out / PARTIAL / "journal"
    while lines(journal) < 40 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it finished before it could be killed"
    return out


@pytest.fixture
def killed(killed_once, tmp_path):
    return Path(shutil.copytree(killed_once, tmp_path / "out"))


def test_a_killed_conversion_shows_nothing_and_resumes(killed, moe, done):
    assert [path.name for path in killed.iterdir()] == [PARTIAL]
    with open(killed / PARTIAL / "journal", "ab") as journal:
        journal.write(b"[999999,[[0,1")  # a line torn by the crash
    report = convert(open_source(moe), killed, BUILDS)
    assert report.resumed_units >= 40 - 1
    assert report.bytes_read < done[1].bytes_read
    assert contents(killed) == contents(done[0])


def test_bytes_lost_after_the_journal_are_mended(killed, moe, done):
    """A power cut may lose written pages and keep the journal: every byte is read back before the rename."""
    for path in (killed / PARTIAL).rglob("*"):
        if path.suffix in (".safetensors", ".gguf"):
            with open(path, "r+b") as file:
                file.seek(path.stat().st_size // 8)
                file.write(bytes(200_000))
    convert(open_source(moe), killed, BUILDS)
    assert contents(killed) == contents(done[0])


def test_a_disk_that_loses_bytes_is_an_error(tmp_path, monkeypatch, moe):
    write = writer.write_all
    monkeypatch.setattr(writer, "write_all", lambda d, view, o: write(d, memoryview(mmap.mmap(-1, len(view))), o))
    with pytest.raises(ConversionError, match="does not give back"):
        convert(open_source(moe), tmp_path / "out", ["bf16"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PARTIAL]


def test_an_unfinished_conversion_is_not_mixed_and_both_ways_out_work(killed, moe, done):
    for builds, options, what in (
        (["bf16"], {}, "for other builds"),
        ([*BUILDS, "gguf:F32"], {}, "for other builds"),
        (BUILDS, {"max_shard_bytes": 5_000_000}, "with other options"),
    ):
        with pytest.raises(PlanError, match=rf"{what}.*run its own command again .* or add --restart"):
            convert(open_source(moe), killed, builds, **options)
    (killed / "mine").write_text("not ours")
    report = convert(open_source(moe), killed, ["bf16"], restart=True)
    assert report.resumed_units == 0 and (killed / "mine").read_text() == "not ours"
    assert contents(killed / "bf16") == contents(done[0] / "bf16") and not (killed / PARTIAL).exists()


def test_the_same_command_says_that_it_is_finished(moe, done, tmp_path):
    """Only if the builds are of this source and these options, by what their manifests say of them."""
    report = convert(open_source(moe), done[0], BUILDS)
    assert [(b.build, b.path, b.tensor_bytes) for b in report.builds] == [
        (b.build, b.path, b.tensor_bytes) for b in done[1].builds
    ]
    assert all(build.was_finished for build in report.builds) and report.bytes_read == 0
    more = convert(open_source(moe), Path(shutil.copytree(done[0], tmp_path / "out")), [*BUILDS, "gguf:F32"])
    assert [build.was_finished for build in more.builds] == [True] * len(BUILDS) + [False]
    with pytest.raises(PlanError, match=r"fp8-channel: exists already.*leave fp8-channel out"):
        convert(open_source(moe), done[0], ["fp8-channel"], max_shard_bytes=5_000_000)
    folder = Path(shutil.copytree(moe, tmp_path / "moe", copy_function=shutil.copy2))
    tensors = load_file(folder / "model.safetensors")
    next(tensors[name] for name in tensors if name.endswith("layers.3.mlp.experts.5.down_proj.weight"))[-1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match="exists already"):
        convert(open_source(folder), done[0], BUILDS)
    os.truncate(tmp_path / "out" / "moe-F32.gguf", 1000)
    with pytest.raises(PlanError, match="exists already"):
        convert(open_source(moe), tmp_path / "out", [*BUILDS, "gguf:F32"])


@pytest.mark.parametrize("survived", range(6))
def test_killed_between_the_final_names(tmp_path, monkeypatch, moe, done, survived):
    """Builds get their names one after the other; a run that dies among them is finished by the same command."""
    moved, remove = [], shutil.rmtree

    def rename(source, target):
        if len(moved) == survived:
            raise KeyboardInterrupt
        moved.append(target)
        os.replace(source, target)

    def rmtree(folder, *options, **more):
        if Path(folder).name == PARTIAL:
            raise KeyboardInterrupt
        remove(folder, *options, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            convert(open_source(moe), tmp_path / "out", BUILDS)
    report = convert(open_source(moe), tmp_path / "out", BUILDS)
    assert report.bytes_read == 0
    assert contents(tmp_path / "out") == contents(done[0])


def test_a_changed_tokenizer_is_another_conversion(killed, moe, tmp_path):
    folder = Path(shutil.copytree(moe, tmp_path / "moe", copy_function=shutil.copy2))
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "chat_template.jinja").write_text("other")
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(PlanError, match=r"other side files.*--restart"):
        convert(open_source(folder), killed, BUILDS)


def test_two_conversions_do_not_share_a_folder(tmp_path, moe):
    out = tmp_path / "out"
    process = start(moe, out)
    try:
        while lines(out / PARTIAL / "journal") < 2 and process.poll() is None:
            time.sleep(0.005)
        with pytest.raises(ConversionError, match="another conversion is writing here"):
            convert(open_source(moe), out, BUILDS)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["moe-Q8_0.gguf", "moe-Q8_0.gguf.manifest.json", "bf16"])
@pytest.mark.parametrize("link", [False, True])
def test_nothing_that_exists_is_replaced(tmp_path, monkeypatch, moe, name, link):
    """A file, or a link that leads nowhere, under a final name: refused before work, and if it appears during it."""
    out = tmp_path / "out"
    out.mkdir()

    def occupy():
        (out / name).symlink_to("nowhere") if link else (out / name).write_text("mine")

    occupy()
    with pytest.raises(PlanError, match=f"{name}: exists already"):
        convert(open_source(moe), out, BUILDS)
    (out / name).unlink()
    record = convert_module.Journal.record_checked
    monkeypatch.setattr(convert_module.Journal, "record_checked", lambda self: (record(self), occupy()))
    with pytest.raises(ConversionError, match=f"{name}: exists already; move it away and run the same command"):
        convert(open_source(moe), out, BUILDS)
    assert os.readlink(out / name) == "nowhere" if link else (out / name).read_text() == "mine"
    (out / name).unlink()
    convert(open_source(moe), out, BUILDS)
    assert not (out / PARTIAL).exists() and (out / "bf16").is_dir()


def test_a_staged_build_that_was_taken_away_is_told(tmp_path, monkeypatch, moe):
    record = convert_module.Journal.record_checked

    def lose(self):
        record(self)
        shutil.rmtree(tmp_path / "out" / PARTIAL / "bf16")

    monkeypatch.setattr(convert_module.Journal, "record_checked", lose)
    with pytest.raises(ConversionError, match="bf16: is neither there nor in"):
        convert(open_source(moe), tmp_path / "out", BUILDS)


@pytest.mark.parametrize(
    "line",
    [b"[1]", b'[99999,[[0,1,2,"x"]]]', b"{}", b"5", b'[1,[[9,0,1,"x"]]]', b'[1,[[0,0,1,"x"]]]', b"[1,[]]", b"\xff"],
)
def test_a_damaged_journal_is_mended_or_told(killed, moe, done, line):
    journal = killed / PARTIAL / "journal"
    journal.write_bytes(journal.read_bytes() + line + b"\n")
    try:
        convert(open_source(moe), killed, BUILDS)
        assert contents(killed) == contents(done[0])
    except ConversionError as error:
        assert "journal" in str(error)


@pytest.mark.parametrize("left", [None, b"", b'{"source": "x", "bui', b"journal of another version\n"])
def test_a_kill_around_the_journal_needs_no_hand(tmp_path, moe, done, left):
    """Between mkdir and the first whole line of the journal, nothing is begun."""
    (tmp_path / PARTIAL).mkdir()
    if left is not None:
        (tmp_path / PARTIAL / "journal").write_bytes(left)
    assert convert(open_source(moe), tmp_path, ["bf16"]).resumed_units == 0
    assert contents(tmp_path) == {f"bf16/{name}": data for name, data in contents(done[0] / "bf16").items()}


@pytest.mark.parametrize("left", ["nothing", "journal"])
def test_a_kill_at_the_very_end_needs_no_hand(tmp_path, moe, monkeypatch, left):
    """After the names are given: the journal may be there or gone, its folder is left."""
    rmtree = shutil.rmtree

    def die(folder, **options):
        if Path(folder).name != PARTIAL:
            return rmtree(folder, **options)
        if left == "nothing":
            (folder / "journal").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            convert(open_source(moe), tmp_path, ["gguf:F32"])
    assert (tmp_path / PARTIAL).is_dir()
    report = convert(open_source(moe), tmp_path, ["gguf:F32"])
    assert report.builds[0].was_finished and report.bytes_read == 0
    assert not (tmp_path / PARTIAL).exists()


def test_jobs_are_those_that_memory_allows(moe):
    """The default fits every machine; what is asked for is kept or refused."""
    source = open_source(moe)
    jobs, _ = convert_module.slabs(source, 4, 2 << 30, None)
    assert jobs >= 1 and convert_module.slabs(source, 4, 800 << 20, None)[0] <= jobs
    assert convert_module.slabs(source, 4, 2 << 30, 3)[0] == 3
    assert convert_module.slabs(open_source("gemma-4-31b"), 4, 2 << 30, None)[0] <= os.cpu_count()
    with pytest.raises(PlanError, match="500 jobs need at least"):
        convert_module.slabs(source, 4, 2 << 30, 500)
    with pytest.raises(ValueError, match="jobs"):
        convert_module.slabs(source, 4, 2 << 30, 0)


def test_a_link_that_leaves_the_source_is_told_before_work(tmp_path, moe):
    folder = Path(shutil.copytree(moe, tmp_path / "moe"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CheckpointError, match="link that leaves"):
        convert(open_source(folder), tmp_path / "out", ["bf16"])
    assert not (tmp_path / "out").exists()


def test_full_disk_is_told_before_the_first_byte(tmp_path, monkeypatch, moe):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ConversionError, match=r"take \d+ bytes and 1000000 are free; free \d+ more"):
        convert(open_source(moe), tmp_path / "out", BUILDS)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root; the full disk is also tested without one")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_that_fills_up_on_the_way(small_disk, monkeypatch, moe):
    usage = shutil.disk_usage(small_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))  # somebody else took the space
    with pytest.raises(ConversionError, match="the disk is full; free space and run the same command again"):
        convert(open_source(moe), small_disk / "out", BUILDS)
    assert [path.name for path in (small_disk / "out").iterdir()] == [PARTIAL]


def test_source_changed_on_the_way(tmp_path, monkeypatch):
    folder = fixtures.qwen35(tmp_path / "src")
    source = open_source(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(ConversionError, match="changed while it was converted"):
        convert(source, tmp_path / "out", ["bf16"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PARTIAL]
    source = open_source(folder)
    (folder / "config.json").write_text("{}")
    assert source.checkpoint.changed(), "config.json is part of the source"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("builds", [["fp8-block"], ["gguf:Q4_K_M"], ["fp8-channel", "gguf:Q8_0"], ["bf16", "mlx:4"]])
def test_non_finite_weights_are_found(tmp_path, builds, value):
    """In all builds, by the encoder that meets it or before; with its place in the weight and what to do."""
    folder = fixtures.qwen35moe(tmp_path / "src", experts=3, top_k=2, experts_layout="fused")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.experts.gate_up_proj"))
    tensors[name][2, 256 + 7, 19] = value  # expert 2, row 7 of up
    save_file(tensors, folder / "model.safetensors")
    where = rf"layers\.1\.mlp\.experts\.2\.up_proj\.weight: row 7, column 19 is {value!s}; .*--non-finite keep-bf16"
    with pytest.raises(BuildsFailed, match=where) as told:
        convert(open_source(folder), tmp_path / "out", builds)
    assert list(told.value.report.failed) == builds and not any((tmp_path / "out").glob("[!.]*"))


def test_a_build_that_cannot_hold_a_weight_costs_the_others_nothing(tmp_path, monkeypatch):
    """It is reported with an option that makes it, alone, in the same folder; killed or not on the way."""
    folder, out = fixtures.qwen35(tmp_path / "src"), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("layers.2.mlp.up_proj.weight", "layers.0.linear_attn.out_proj.weight")):
            tensors[name][3, 4] = 1e6
    save_file(tensors, folder / "model.safetensors")
    builds = ["gguf:F16", "gguf:Q8_0", "bf16"]
    with monkeypatch.context() as patch:  # killed when all is written and checked
        patch.setattr(convert_module.Journal, "record_checked", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(open_source(folder), out, builds)
    with pytest.raises(BuildsFailed, match=r"row 3, column 4: .* beyond fp16.* 2 of its tensors") as told:
        convert(open_source(folder), out, builds)
    report = told.value.report
    assert [build.build for build in report.builds] == builds[1:] and list(report.failed) == ["gguf:F16"]
    assert all(verify(build.path, open_source(folder)).ok for build in report.builds)
    assert {path.name for path in out.iterdir()} == {"bf16", "src-Q8_0.gguf", "src-Q8_0.gguf.manifest.json"}
    build, pattern = re.search(r"--to (\S+) --tensor-type '(.+)'", str(told.value)).groups()
    report = convert(open_source(folder), out, [build], asked=parse_asked_types([pattern]))
    assert verify(report.builds[0].path, open_source(folder)).ok
    again = convert(open_source(folder), out, ["gguf:Q8_0", "bf16"])
    assert all(build.was_finished for build in again.builds)


def test_leave_to_keep_a_nan_is_taken_in_the_same_folder(tmp_path):
    folder, out = fixtures.qwen35(tmp_path / "src", vision=True), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in tensors if name.startswith("model.visual.blocks"))][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BuildsFailed, match=r"is nan.*--non-finite keep-bf16") as told:
        convert(open_source(folder), out, ["fp8-channel", "gguf:Q8_0"])
    assert [build.build for build in told.value.report.builds] == ["gguf:Q8_0"]  # it has no vision tower
    report = convert(open_source(folder), out, ["fp8-channel", "gguf:Q8_0"], non_finite="keep-bf16")
    assert [build.was_finished for build in report.builds] == [False, True]


def test_a_build_that_cannot_be_planned_costs_the_others_nothing(tmp_path, moe):
    with pytest.raises(BuildsFailed, match=r"noise without an importance matrix.*--imatrix") as told:
        convert(open_source(moe), tmp_path, ["gguf:IQ2_XXS", "gguf:F32"])
    assert [build.build for build in told.value.report.builds] == ["gguf:F32"]
    with pytest.raises(PlanError, match="noise without an importance matrix"):
        convert(open_source(moe), tmp_path, ["gguf:IQ2_XXS"])


def test_values_beyond_a_float_are_told(tmp_path):
    """F32 holds more than BF16, and what is stored of A_log is its exponential."""
    folder = fixtures.qwen35(tmp_path / "src", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    next(tensors[name] for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))[2, 3] = 3.4e38
    next(tensors[name] for name in tensors if name.endswith("layers.1.linear_attn.A_log"))[1] = 99
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BuildsFailed) as told:
        convert(open_source(folder), tmp_path / "out", ["gguf:BF16", "bf16", "gguf:F32"])
    failed = told.value.report.failed
    assert "up_proj.weight, from row 0: row 2, column 3: 3.4e+38 is beyond BF16" in failed["bf16"]
    assert "A_log" in failed["gguf:F32"] and "is beyond F32; mend the checkpoint" in failed["gguf:F32"]


def test_what_cannot_be_made_is_told_before_work(tmp_path, moe):
    for builds, word in (([], "at least one"), (["bf16"] * 2, "once")):
        with pytest.raises(PlanError, match=word):
            convert(open_source(moe), tmp_path / "out", builds)
    with pytest.raises(PlanError, match="config without weights"):
        convert(open_source("ornith-1.0-9b"), tmp_path / "out", ["bf16"])
    with pytest.raises(PlanError, match="is the source itself"):
        convert(open_source(moe), moe, ["bf16"])
    with pytest.raises(PlanError, match="max_memory"):
        convert(open_source(moe), tmp_path / "out", ["bf16"], max_memory=1 << 20)
    assert not (tmp_path / "out").exists()


def of_large_layers(folder, layers, experts=256):
    """A checkpoint whose layers are 101 MB each, two thirds of them one fused tensor."""
    fixtures.qwen35moe(folder, experts=2, experts_layout="fused")
    config = json.loads((folder / "config.json").read_bytes())
    config.get("text_config", config).update(
        {"num_experts": experts, "num_hidden_layers": layers, "layer_types": ["linear_attention"] * layers}
    )
    tensors = load_file(folder / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    for name, tensor in first.items():
        if ".experts." in name or name.endswith("mlp.gate.weight"):
            tensor = tensor[:1].repeat(experts, *[1] * (tensor.ndim - 1))
        kept |= {name.replace(".layers.0.", f".layers.{layer}."): tensor.clone() for layer in range(layers)}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder, sum(tensor.nbytes for tensor in kept.values())


@pytest.mark.slow
def test_memory_grows_neither_with_the_tensor_nor_with_the_layers(tmp_path):
    """Four builds in one pass; measured: 268 and 284 MiB, libraries included. A fused tensor and its fp32 are 192."""
    peaks = []
    for layers in (1, 2):
        folder, size = of_large_layers(tmp_path / f"src{layers}", layers)
        builds = ["fp8-channel", "nvfp4", "gguf:Q4_K_M", "mlx:4"]
        command = [sys.executable, "-m", "ornith_moe", "convert", str(folder), str(tmp_path / f"out{layers}"), "--json"]
        command += ["--max-memory", "900MiB", *[word for build in builds for word in ("--to", build)]]
        report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert np.isclose(report["bytes_read"], size, rtol=0.001), "each byte once"
        peaks.append(report["peak_rss_bytes"] / 2**20)
    assert max(peaks) < 400 and peaks[1] - peaks[0] < 48, peaks


def test_making_machine_code_is_told(moe, tmp_path, monkeypatch):
    """Whether code is on the disk depends on the machine, so the compiler is one that always works."""
    from ornith_moe.quant.simd import compiled

    @contextlib.contextmanager
    def compiling(tell):
        tell("encode")
        yield

    monkeypatch.setattr(compiled, "compiling", compiling)
    phases = []
    convert(open_source(moe), tmp_path, ["gguf:Q8_0"], progress=lambda *told: phases.append(told))
    assert phases[0] == ("compile", 0, 0)
    assert {phase for phase, _, _ in phases} == {"compile", "convert", "check"}


def test_the_check_tells_how_far_it_is_within_a_file(moe, tmp_path):
    """A GGUF is one file of up to hundreds of gigabytes: a call at its end would be minutes of silence."""
    told = []
    report = convert(
        open_source(moe),
        tmp_path,
        ["gguf:Q8_0", "fp8-channel"],
        jobs=2,
        progress=lambda phase, done, total: told.append((done, total)) if phase == "check" else None,
    )
    size = sum(
        file.stat().st_size for b in report.builds for file in [b.path, *b.path.glob("*.safetensors")] if file.is_file()
    )
    assert all(done - before <= 4 << 20 for (before, _), (done, _) in pairwise([(0, 0), *told]))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (size, size) and {total for _, total in told} == {size}
