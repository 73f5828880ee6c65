"""Remedies of messages about builds: tokenizer and types of a GGUF, importance, the folder of builds, what is left."""

import errno
import json
import os
import re
import resource
import shutil

import fixtures
import numpy as np
import pytest
from fuzz.inputs import CONFIG, TOKENIZER_CONFIG
from gguf import GGUFValueType
from remedies import follows, made, refused, say, tiny

import ornith_moe.quant.conversion.pipeline as pipeline
from ornith_moe.imatrix import make_imatrix
from ornith_moe.quant import files
from ornith_moe.quant.budget import Budget, one_budget
from ornith_moe.quant.builds.build import AskedNvfp4
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.conversion.convert import PARTIAL, convert
from ornith_moe.quant.conversion.journal import Journal
from ornith_moe.quant.gguf.header import Entry, gguf_header, padded
from ornith_moe.quant.gguf.imatrix import open_imatrix
from ornith_moe.quant.gguf.tensor_types import parse_asked_types
from ornith_moe.quant.patterns import Patterns
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify


@pytest.fixture
def m(tmp_path):
    return tiny(tmp_path / "m")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@follows("has no tokenizer.json; fetch it from where the model was published")
def test_the_tokenizer_is_fetched(m, out):
    (m / "tokenizer.json").rename(m.parent / "t.json")
    refused("fetch it from where the model was published", made, m, out, ["gguf:BF16"])
    (m.parent / "t.json").rename(m / "tokenizer.json")
    made(m, out, ["gguf:BF16"])


@follows("an added token; correct added_tokens here")
def test_added_tokens_are_corrected(m, out):
    path = m / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(json.dumps(TOKENIZER_CONFIG | {"added_tokens_decoder": {"5": {"content": "<x>"}}}))
    refused("correct added_tokens here, added_tokens_decoder in", made, m, out, ["gguf:BF16"])
    path.write_text(before)
    made(m, out, ["gguf:BF16"])


@follows("give the name of an equal one, for instance --tokenizer-pre qwen35")
def test_the_name_of_a_pre_tokenizer_is_given(m, out):
    path = m / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    path.write_text(json.dumps(content))
    refused("--tokenizer-pre qwen35", made, m, out, ["gguf:BF16"])
    made(m, out, ["gguf:BF16"], tokenizer_pre="qwen35")


@follows("convert with the original rope_parameters and give llama.cpp the scaling when it runs")
def test_the_original_rope_is_converted(m, out):
    rope = CONFIG["rope_parameters"]
    say(m, rope_parameters=rope | {"rope_type": "dynamic", "factor": 4.0})
    refused("convert with the original rope_parameters", made, m, out, ["gguf:BF16"])
    say(m, rope_parameters=rope)
    made(m, out, ["gguf:BF16"])


@follows("make a build that is no GGUF")
def test_a_rotation_that_llama_cpp_does_not_know_is_for_other_builds(m, out):
    yarn = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}
    say(m, rope_parameters=CONFIG["rope_parameters"] | yarn)
    refused("beta_fast is 16.0, llama.cpp takes 32.0 alone", made, m, out, ["gguf:BF16"])
    made(m, out, ["fp8-channel"])


@follows("write them without repeats inside repeats, or fewer of them")
def test_patterns_are_written_without_repeats_inside_repeats():
    with one_budget(Budget(seconds=0.05)):
        refused("write them without repeats inside repeats", Patterns([r"(?:.+?)" * 6 + r"[^\w.]$"]).first, "a" * 60)
    with one_budget(Budget(seconds=0.05)):
        assert Patterns([r".+[^\w.]$"]).first("a" * 60) is None


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows of 256, whole blocks of every type."""
    return fixtures.qwen35(tmp_path_factory.mktemp("wide") / "m")


@follows("give one with --imatrix", "give them another type with {}")
def test_importance_is_measured_and_given(wide, tmp_path, out):
    (tmp_path / "text").write_text(fixtures.TEXT)
    low, more = parse_asked_types(["ffn_up=iq2_xxs"]), {}
    refused("give one with --imatrix", made, wide, out, ["gguf:Q8_0"], asked=low)
    importance = make_imatrix(open_source(wide, mtp="drop"), tmp_path / "text", tmp_path / "i.gguf", chunks=1, ctx=8)
    more["imatrix"] = open_imatrix(importance.path)
    made(wide, out, ["gguf:Q8_0"], asked=low, **more)
    for option, name in (("token_embedding_type", "token_embd"), ("output_tensor_type", "output")):
        for given in ({}, more):
            low = parse_asked_types([f"^{name}.weight$=iq2_xxs"])
            told = refused("give them another type with", made, wide, out, ["gguf:Q8_0"], asked=low, **given)
            asked = re.search(rf"--{option.replace('_', '-')} (\w+)", told)[1]
            low = parse_asked_types([f"^{name}.weight$=iq2_xxs"], **{option: asked})
            assert not plan_build(open_source(wide), "gguf:Q8_0", asked=low, **given).needs_imatrix
    other = open_imatrix(importance.path)
    other.entries.pop("blk.0.ffn_up.weight"), other.entries.pop("blk.1.ffn_down.weight")
    low = ["ffn_(up|down)=iq2_xxs"]
    told = refused(
        "give them another type with", made, wide, out, ["gguf:Q8_0"], imatrix=other, asked=parse_asked_types(low)
    )
    asked = re.search(r"--tensor-type '(.+)' before any other", told)[1]
    made(wide, out.with_name("other"), ["gguf:Q8_0"], imatrix=other, asked=parse_asked_types([asked, *low]))


@follows("or is not F32; make it again", "sums for {} counts; make it again", "so make the importance matrix again")
def test_importance_is_made_again(tmp_path):
    path, name = tmp_path / "i.gguf", "blk.0.attn_q.weight"

    def write(value=1.0, columns=64, tensors=None):
        tensors = tensors or [
            (name + ".in_sum2", "F32", (1, columns), 4 * columns),
            (name + ".counts", "F32", (1, 1), 4),
        ]
        payload = b"".join(np.full(padded(n) // 4, value, "<f4").tobytes() for *_, n in tensors)
        path.write_bytes(gguf_header([Entry("general.type", "imatrix", GGUFValueType.STRING)], tensors) + payload)

    write(tensors=[(name + ".in_sum2", "F32", (1, 64), 256)])
    refused("make it again", open_imatrix, path)
    write(tensors=[(name + ".in_sum2", "F32", (1, 64), 256), (name + ".counts", "F32", (3, 1), 12)])
    refused("make it again", open_imatrix, path)
    write(-1.0)
    refused("numbers from 0 on", open_imatrix, path)
    write()
    assert open_imatrix(path).entries


# Builds and their folder


@follows("choose another folder for the builds")
def test_another_folder_is_chosen(m, out):
    refused("is the source itself; choose another folder", made, m, m)
    out.symlink_to("out")
    refused("leads nowhere; choose another folder", made, m, out)
    made(m, out.with_name("other"))


@follows("expected the folder of an unfinished conversion or nothing; move it away")
def test_what_has_the_name_of_the_partial_folder_is_moved_away(m, out):
    out.mkdir()
    (out / PARTIAL).write_text("mine")
    refused("move it away", made, m, out)
    (out / PARTIAL).rename(out / "mine")
    made(m, out)


@follows("leave {} out, move the file away or choose another folder")
def test_what_has_the_name_of_a_build_is_moved_away(m, out):
    out.mkdir()
    (out / "bf16").write_text("mine")
    refused("leave bf16 out, move the file away or choose another folder", made, m, out, ["bf16", "fp8-block"])
    made(m, out, ["fp8-block"])
    made(m, out.with_name("other"), ["bf16", "fp8-block"])
    (out / "bf16").rename(out / "mine")
    made(m, out, ["bf16", "fp8-block"])


@follows(
    "is a link where a file of ours belongs; move it away",
    "expected a file of ours, found another; move it away",
    "expected a folder of ours, found something else; move it away",
    "move it away or choose another name",
)
def test_what_has_the_name_of_a_file_of_ours_is_moved_away(tmp_path):
    path, other = tmp_path / "f", tmp_path / "other"
    other.write_text("mine")

    def publish(place):
        with files.published(place) as file:
            file.write(b"x")

    def write(place):
        os.close(files.open_output(place))

    ways = {
        write: (path.symlink_to, os.link),
        files.own_folder: (path.symlink_to, os.link),
        publish: (path.symlink_to,),
    }
    for call, occupants in ways.items():
        for occupy in occupants:
            occupy(other) if occupy == path.symlink_to else occupy(other, path)
            refused("move it away", call, path)
            path.rename(tmp_path / "away")
            call(path)
            path.rmdir() if path.is_dir() else path.unlink()
            assert other.read_text() == "mine"
    path.touch()
    refused("or choose another name", publish, path)
    publish(tmp_path / "g")


@follows("another conversion is writing here; wait for it or choose another OUT")
def test_another_conversion_is_waited_for(m, out):
    (out / PARTIAL).mkdir(parents=True)
    with Journal(out / PARTIAL):
        refused("wait for it or choose another OUT", made, m, out)
        made(m, out.with_name("other"))
    made(m, out)


@follows("the disk is full; free space and run the same command again")
def test_space_is_freed(m, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pass, "run", lambda self: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
        refused("free space and run the same command again", made, m, out)
    made(m, out)


@follows("free {} more or leave out a build")
def test_a_build_is_left_out(m, out, monkeypatch):
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(m)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=600_000))
        refused("or leave out a build", made, m, out, ["fp8-block", "gguf:F32"])
        made(m, out, ["fp8-block"])
    made(m, out, ["fp8-block", "gguf:F32"])


@follows("or pass a larger --max-shard-size")
def test_a_larger_shard_is_passed(m, out, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(pipeline.resource, "getrlimit", lambda _: (pipeline.SPARE_DESCRIPTORS + 5,) * 2)
    refused("pass a larger --max-shard-size", made, m, out, max_shard_bytes=10_000)
    made(m, out, max_shard_bytes=1 << 30, restart=True)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) or limits


@follows("run the command again with --restart")
@pytest.mark.parametrize("how", ["changed", "lost", "journal"])
def test_begin_anew(m, out, monkeypatch, how):
    record = Journal.record_checked
    if how == "changed":
        source = open_source(m)
        os.utime(m / "model.safetensors", ns=(1, 1))
        refused("again with --restart", convert, source, out, ["bf16"])
    elif how == "lost":
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "record_checked", lambda self: (record(self), shutil.rmtree(out / PARTIAL / "bf16")))
            refused("again with --restart", made, m, out)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.ReadBack, "finish", lambda *files: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                made(m, out)
        path = out / PARTIAL / "journal"
        lines = path.read_bytes().splitlines(keepends=True)
        unit, extents, lost = json.loads(lines[-1])
        path.write_bytes(b"".join(lines[:-1]) + json.dumps([unit, extents[:-1], lost]).encode() + b"\n")
        refused("so run the command again with --restart", made, m, out)
    made(m, out, restart=True)


@follows("got {}; move the build away and convert ")
def test_a_cut_build_is_converted_again(m, out):
    path = made(m, out).builds[0].path
    (path / "tokenizer.json").write_text("{}")
    (problem, *_) = verify(path).problems
    assert "move the build away and convert again" in problem
    path.rename(out / "mine")
    made(m, out)


@follows(
    "would compute the head with activations of four bits, which no recipe does; leave the option out",
    "the head of this model is its embedding; leave the option out",
    "{} are for {}; leave them out, or ask for one",
    "its format is of NVFP4 alone; ask for nvfp4, or leave --nvfp4-rest out",
)
def test_options_of_nvfp4_go_with_builds_of_it(tmp_path):
    head, out = AskedNvfp4(head=True), tmp_path / "out"
    plain, tied = tiny(tmp_path / "plain"), tiny(tmp_path / "tied", tie_word_embeddings=True)
    refused("four bits, which no recipe does; leave the option out", made, plain, out, ["nvfp4-w4a4"], nvfp4=head)
    made(plain, out, ["nvfp4-w4a4"])
    refused("head of this model is its embedding; leave the option out", made, tied, out, ["nvfp4"], nvfp4=head)
    made(tied, out, ["nvfp4"])
    refused("are for nvfp4, nvfp4-w4a4, nvfp4-ct; leave them out, or ask", made, plain, tmp_path / "2", nvfp4=head)
    assert not (tmp_path / "2").exists()
    made(plain, tmp_path / "2", ["nvfp4"], nvfp4=head)
    rest = AskedNvfp4(rest="fp8")
    refused("ask for nvfp4, or leave --nvfp4-rest out", made, plain, tmp_path / "3", ["nvfp4-ct"], nvfp4=rest)
    made(plain, tmp_path / "3", ["nvfp4"], nvfp4=rest)
    made(plain, tmp_path / "3", ["nvfp4-ct"])


@follows("make it with ornith-moe imatrix, or leave --imatrix out for scales of 1.0")
def test_input_scales_come_from_an_importance_matrix_that_tells_them(tmp_path):
    """Both ways out; what llama-imatrix writes tells no largest activations."""
    m, out, path = tiny(tmp_path / "m"), tmp_path / "out", tmp_path / "im.gguf"
    (tmp_path / "text").write_text(fixtures.TEXT)
    make_imatrix(open_source(m, mtp="drop"), tmp_path / "text", path, chunks=2, ctx=16)
    theirs = tmp_path / "theirs.gguf"
    theirs.write_bytes(path.read_bytes().replace(b".in_max", b".in_sum"))
    words = "make it with ornith-moe imatrix, or leave --imatrix out for scales of 1.0"
    refused(words, made, m, out, ["nvfp4-w4a4"], imatrix=open_imatrix(theirs))
    made(m, out, ["nvfp4-w4a4"], imatrix=open_imatrix(path))
    made(m, tmp_path / "2", ["nvfp4-w4a4"])
