"""The command: exit codes, one sentence per failure, JSON and nothing else, and the figures users rely on.

Reference: the functions behind it. Run in a process of its own; where a start of Python, the environment or a signal
matters, as a user runs it (command.py). Not covered: the look of tables.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import fixtures
import gguf
import numpy as np
import pytest
from command import fresh, ornith_moe

from ornith_moe.command.terminal import shown
from ornith_moe.quant.conversion.publish import MANIFEST

PLAN_KEYS = {"build", "tensors", "tensor_bytes", "files", "fallbacks", "max_tensor_parallel"}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=4, mtp=True)


@pytest.fixture(scope="module")
def converted(moe, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "builds"
    done = fresh("convert", moe, out, "--to", "fp8-channel", "--to", "gguf:Q8_0", "--json")
    assert done.stderr == ""  # quiet when not a terminal
    return json.loads(done.stdout)


def test_plan_of_a_config(tmp_path):
    from importlib import resources

    config = tmp_path / "ornith-1.0-35b.json"
    config.write_bytes(resources.files("ornith_moe.quant.source").joinpath("presets/ornith-1.0-35b.json").read_bytes())
    found = json.loads(ornith_moe("plan", config, "--to", "fp8-channel", "--to", "gguf:Q4_K_M", "--json").stdout)
    channel, q4 = found["builds"]
    assert channel.keys() >= PLAN_KEYS
    assert (channel["tensors"], channel["tensor_bytes"]) == (62_546, 37_667_035_872)
    assert (q4["tensors"], q4["tensor_bytes"], q4["max_tensor_parallel"]) == (733, 21_155_768_832, None)
    assert q4["serving"]["context"] == 262_144 and q4["serving"]["kv_bytes"] == 5 << 30
    assert q4["serving"]["total_gib"] == round(q4["serving"]["total_bytes"] / 2**30, 2)


def test_plan_for_people():
    typed = ("plan", "qwen3.5-35b-a3b", "--to", "fp8-block", "--context", "1024")
    text = fresh(*typed, env=os.environ | {"COLUMNS": "160"}).stdout
    assert "64,196" in text and "37,454,789,472" in text
    assert "34.96" in text and "one sequence of 1,024 tokens: 0.02 GiB of keys and values" in text


def test_plan_imports_no_torch(moe):
    code = (
        "import sys; sys.argv = ['ornith-moe', 'plan', sys.argv[1], '--to', 'fp8-channel', '--json'];"
        "from ornith_moe.cli import app; app(standalone_mode=False);"
        "assert not {'torch', 'numba', 'transformers', 'triton'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, moe], check=True, capture_output=True)


def test_convert_imports_no_torch(moe, tmp_path):
    """Its import takes longer than a small conversion, torch._dynamo's longer still: no decorator brings it."""
    code = (
        "import sys; sys.argv = ['ornith-moe', 'convert', *sys.argv[1:], '--to', 'gguf:Q4_K_M', '--to', 'fp8-block'];"
        "from ornith_moe import cli, gpu_encoders; gpu_encoders._has_driver = lambda: False;"
        "cli.app(standalone_mode=False);"
        "assert not {'torch', 'transformers', 'triton'} & sys.modules.keys();"
        "import ornith_moe.layer; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, moe, tmp_path / "out"], check=True, capture_output=True)


def test_convert_verify_inspect(moe, converted):
    assert converted.keys() >= {"builds", "bytes_read", "peak_rss_bytes"}
    for build in converted["builds"]:
        assert build.keys() >= {"build", "path", "tensors", "tensor_bytes", "seconds"}
        planned = json.loads(ornith_moe("plan", moe, "--to", build["build"], "--json").stdout)["builds"][0]
        assert (planned["tensors"], planned["tensor_bytes"]) == (build["tensors"], build["tensor_bytes"])
        result = json.loads(ornith_moe("verify", build["path"], "--against", moe, "--json").stdout)
        assert result["ok"] and result["problems"] == [] and result["tensors"] == build["tensors"]
        assert result["roles"]["expert"]["sqnr_db"] > 31
        found = json.loads(ornith_moe("inspect", build["path"], "--json").stdout)
        assert (found["tensors"], found["tensor_bytes"]) == (build["tensors"], build["tensor_bytes"])
        assert "ok" in ornith_moe("verify", build["path"]).stdout


def test_convert_tells_what_it_made_of_its_source(moe, tmp_path):
    """In words and in JSON; and the name is the user's."""
    folder = tmp_path / "src"
    shutil.copytree(moe, folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    (folder / "chat_template.jinja").unlink()
    words = ("--to", "gguf:F32", "--mtp", "drop", "--name", "mine")
    text = ornith_moe("convert", folder, tmp_path / "a", *words, "--to", "gguf:BF16").stdout
    assert text.count("no chat template is here") == 1  # which is said of each GGUF
    notes = json.loads(ornith_moe("convert", folder, tmp_path / "b", *words, "--json").stdout)["notes"]
    assert (tmp_path / "b" / "mine-F32.gguf").exists() and text.startswith("mine: ")
    assert len(notes) == 2 and all(f"- {note}\n" in text for note in notes)
    assert "model.safetensors is read" in notes[0] and "multi-token prediction, dropped as asked" in notes[1]
    assert notes[1] in ornith_moe("verify", tmp_path / "a" / "mine-F32.gguf", "--against", folder).stdout
    ornith_moe("plan", folder, "--to", "bf16", "--name", "a/b", code=1)


@pytest.fixture
def router_text(tmp_path):
    path = tmp_path / "text"
    path.write_text("A router reads each token once and names the experts that will work on it. " * 8)
    return path


def test_compare_streams_all_builds(moe, converted, router_text, tmp_path):
    paths = [build["path"] for build in converted["builds"]]
    state = tmp_path / "state"
    words = ("compare", moe, *paths, "--text", router_text, "--windows", 1, "--state", state)
    done = ornith_moe(*words, "--json")
    found = json.loads(done.stdout)
    tokens = found["window_tokens"]
    assert done.stderr == "" and found["positions"] == tokens - 1 - tokens // 8 and not state.exists()
    assert [(build["build"], build["kind"]) for build in found["builds"]] == [
        (build["path"], build["build"]) for build in converted["builds"]
    ]
    for build in found["builds"]:
        assert 0 < build["kl_mean"] < build["kl_p99"] < build["kl_max"] and 0 <= build["top1"] <= 1
        assert len(build["layers"]) == 4 and build["kl_mean_se"] is None
    table = ornith_moe("compare", moe, moe, "--text", router_text, "--windows", 1, "--state", state).stdout
    assert " 0.000000 " in table and "100.0 %" in table and "0.0000, layer 0" in table
    (tmp_path / "binary").write_bytes(b"\xff")
    assert "UTF-8" in ornith_moe("compare", moe, paths[0], "--text", tmp_path / "binary", code=1).stderr


def test_an_interrupted_compare_goes_on(moe, converted, router_text, tmp_path):
    """As the sentence says; and without --resume it begins anew."""
    state = tmp_path / "state"
    words = ["compare", moe, converted["builds"][0]["path"], "--text", router_text, "--windows", 1, "--state", state]
    assert "leave --resume out" in ornith_moe(*words, "--resume", code=1).stderr
    stopping = (
        "import os, signal; from ornith_moe import layerwise; run = layerwise.Layerwise.advance\n"
        "def stop(self, number, *a, **k):\n"
        "    if number == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return run(self, number, *a, **k)\n"
        "layerwise.Layerwise.advance = stop\n"
        "import sys; from ornith_moe.cli import main; sys.argv = ['ornith-moe', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", stopping, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (130, "ornith-moe: stopped; the same command with --resume goes on\n")
    other = [*words[:2], converted["builds"][1]["path"], *words[3:]]
    said = ornith_moe(*other, "--resume", code=1).stderr
    assert "what was begun here had other builds; leave --resume out to begin anew" in said
    found = json.loads(ornith_moe(*words, "--resume", "--json").stdout)
    again = json.loads(ornith_moe(*words, "--json").stdout)
    assert found["builds"] == again["builds"] and not state.exists()


def test_compare_runs_both_in_their_clients(moe, converted, router_text):
    gguf = converted["builds"][1]["path"]
    for build in converted["builds"]:
        done = ornith_moe("compare", moe, build["path"], "--client", "--text", router_text, "--windows", 1, "--json")
        found = json.loads(done.stdout)
        assert found["positions"] == 16 and 0 < found["kl_mean"] < found["kl_max"] and 0 <= found["top1"] <= 1
        assert done.stderr == ""
    assert "expected SRC or BUILD to be" in ornith_moe("compare", gguf, gguf, "--client", code=1).stderr
    assert "leave --client out for more" in ornith_moe("compare", moe, gguf, gguf, "--client", code=1).stderr


def test_damage_is_exit_code_3(converted, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(open(converted["builds"][1]["path"], "rb").read()[:-5000])
    done = ornith_moe("verify", path, "--json", code=3)
    assert json.loads(done.stdout)["ok"] is False


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["convert", "{src}/nothing", "{out}", "--to", "bf16"], "expected a checkpoint folder"),
        (["convert", "{src}", "{out}", "--to", "fp8"], "expected one of fp8-channel"),
        (["convert", "{src}", "{src}", "--to", "bf16"], "is the source itself"),
        (["convert", "{src}", "{src}/config.json", "--to", "bf16"], "expected a folder for the builds"),
        (["convert", "{src}", "/proc/nothing", "--to", "bf16"], "/proc/nothing"),
        (["convert", "{src}", "{out}", "--to", "bf16", "--max-memory", "10MB"], "max_memory"),
        (["convert", "ornith-1.0-9b", "{out}", "--to", "bf16"], "config without weights"),
        (["plan", "{src}", "--to", "bf16", "--mtp", "keep"], None),
        (["plan", "gemma-4-31b", "--to", "bf16", "--mtp", "keep"], "announces no MTP"),
        (["plan", "hf://nobody", "--to", "bf16"], "expected hf://org/name"),
        (["verify", "{out}"], "no build here"),
        (["plan", "{src}", "--to", "gguf:Q4_K_M", "--tensor-type", "(x=q8_0"], "is no regular expression"),
        (["plan", "{src}", "--to", "gguf:Q4_K_M", "--tensor-type", "x=q99"], "is no type; expected one of"),
        (["plan", "{src}", "--to", "gguf:Q4_K_M", "--recipe", "{out}"], "expected a recipe"),
        (["plan", "{src}", "--to", "gguf:Q4_K_M", "--imatrix", "{src}/config.json"], "not an importance matrix"),
        (["convert", "{src}", "{out}", "--to", "gguf:Q4_K_M", "--tensor-type", "up=nvfp4x"], "is no type"),
        (["convert", "{src}", "{out}", "--to", "gguf:IQ2_XXS"], "noise without an importance matrix"),
        (["imatrix", "{src}", "--text", "{out}", "--output", "{out}.gguf"], "expected a text file in UTF-8"),
        (["inspect", "{out}"], "expected a folder"),
    ],
)
def test_failures_are_one_sentence(moe, tmp_path, arguments, word):
    words = [argument.format(src=moe, out=tmp_path / "out") for argument in arguments]
    done = ornith_moe(*words, code=1 if word else 0)
    assert word is None or word in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["plan"], ["plan", "ornith-1.0-9b"], ["nothing"], ["convert", "a", "b", "--to", "bf16", "--max-memory", "much"],
     ["convert", "a", "b", "--to", "bf16", "--jobs", "0"], ["plan", "ornith-1.0-9b", "--to", "bf16", "--mtp", "maybe"],
     ["convert", "a", "b", "--to", "bf16", "--non-finite", "zero"], ["imatrix", "a"]],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments):
    ornith_moe(*arguments, code=2)


@pytest.mark.parametrize("typed", [["plan", "a", "--mtp", "k" * 5000], ["k" * 5000], ["plan", "--" + "k" * 5000]])
def test_wrong_usage_is_said_in_short(typed):
    done = ornith_moe(*typed, code=2)
    assert "kkk" in done.stderr and "..." in done.stderr and len(done.stderr) < 2000


@pytest.mark.parametrize("size", ["9" * 400, "9" * 30 + "GiB", "1." + "0" * 400])
def test_endless_sizes_are_wrong_usage(size):
    ornith_moe("convert", "a", "b", "--to", "bf16", "--max-memory", size, code=2)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_has_gone_is_no_failure(converted, options):
    command = [sys.executable, "-m", "ornith_moe", "inspect", converted["builds"][1]["path"], *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 0)


SLOW_CONVERSION = """
import time
import ornith_moe.quant.conversion.encode as module
from ornith_moe.cli import main
read, units = module.read_unit, []
def slow(*arguments):
    units.append(None)
    if len(units) == 20:
        print("ready", flush=True)
    time.sleep(0.05 if len(units) >= 20 else 0)
    return read(*arguments)
module.read_unit = slow
main()
"""
SLOW_PLAN = """
import time
import ornith_moe.quant.source.hub as module
from ornith_moe.cli import main
module.open_any = lambda *arguments, **options: (print("ready", flush=True), time.sleep(60))
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("code", "command", "sentence"),
    [
        (SLOW_CONVERSION, ["convert", "{src}", "{out}", "--to", "bf16"], "stopped; the same command goes on"),
        (SLOW_PLAN, ["convert", "{src}", "{out}", "--to", "bf16"], "stopped"),
        (SLOW_PLAN, ["plan", "{src}", "--to", "bf16"], "stopped"),
    ],
)
def test_a_signal_is_one_sentence(moe, tmp_path, number, code, command, sentence):
    words = [word.format(src=moe, out=tmp_path / "out") for word in command]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests run in the background
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, number)
        errors = process.communicate(timeout=60)[1]
    assert (errors, process.returncode) == (f"ornith-moe: {sentence}\n", 130)
    if "same command" in sentence:
        assert json.loads(ornith_moe(*words, "--json").stdout)["resumed_units"] > 0
        again = ornith_moe(*words, "--resume")  # an option that goes without saying
        assert again.stdout.endswith(f"nothing to do, finished before: bf16 in {tmp_path}/out/bf16\n")


def hostile_gguf(path, **keys):
    """A GGUF of one tensor, with names and values that a terminal would obey."""
    writer = gguf.GGUFWriter(path, "test")
    for key, value in {"general.name\x1b]0;title\x07": "\x1b[2Jname\nok: forged", **keys}.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("a\x1b[31m\nok: forged", np.ones(4, np.int64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_names_from_files_cannot_forge_lines(tmp_path, command):
    folder = tmp_path / "x\x1b[2J\n"
    folder.mkdir()
    text = ornith_moe(command, hostile_gguf(folder / "forged\nok: forged.gguf")).stdout
    assert "\x1b" not in text and "\\x1b[" in text and "\\nok: forged.gguf" in text
    assert not any(line.startswith("ok: forged") for line in text.splitlines())


def test_errors_cannot_forge_lines(tmp_path):
    errors = ornith_moe("inspect", tmp_path / "\x1b[2J\n\u202enone", code=1).stderr
    assert errors.endswith("\\x1b[2J\\n\\u202enone: expected a folder, a .safetensors or a .gguf file\n")


def test_shown_keeps_what_is_printable():
    assert shown("naïve café, 日本語 [x]") == "naïve café, 日本語 [x]"
    assert shown("a\r\tb\x9b\ud800") == r"a\r\tb\x9b\ud800"


def test_names_are_no_markup(moe, tmp_path):
    path = hostile_gguf(tmp_path / "[red]a[-red][bold] :smile:.gguf")
    assert path.name in ornith_moe("inspect", path).stdout
    folder = tmp_path / "[/bold] :smile:"
    folder.parent.mkdir()
    folder.symlink_to(moe)
    out = tmp_path / "[/red]"
    assert str(out) in ornith_moe("convert", folder, out, "--to", "bf16").stdout
    assert f"compared with {folder}" in ornith_moe("verify", out / "bf16", "--against", folder).stdout
    config = tmp_path / "[red] :smile:.json"
    config.write_bytes((moe / "config.json").read_bytes())
    assert ornith_moe("plan", config, "--to", "bf16").stdout.startswith("[red] :smile:\n")


def test_json_is_strict(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    path = hostile_gguf(tmp_path / "x.gguf", nan=float("nan"), infinities=[float("-inf"), 1.0])
    metadata = json.loads(ornith_moe("inspect", path, "--json").stdout, parse_constant=refuse)["metadata"]
    assert metadata["nan"] == "nan" and metadata["infinities"] == ["-inf", 1.0]


def test_tables_are_whole_where_there_is_no_terminal():
    text = fresh("plan", "ornith-1.0-35b", "--to", "gguf:Q4_K_M", env=os.environ | {"COLUMNS": "40"}).stdout
    row = next(line for line in text.splitlines() if "Q4_K_M" in line)
    assert "21,155,768,832" in row and row.count(" GB") == 3 and "…" not in text


def test_verify_names_the_build_once(converted, tmp_path):
    path = tmp_path / "z.gguf"
    path.write_bytes(b"GGUF")
    assert ornith_moe("verify", path, code=3).stderr.startswith(f"ornith-moe: {path}: not a whole GGUF")
    assert "z.gguf: z.gguf" not in ornith_moe("verify", path, code=3).stderr
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert ornith_moe("verify", tmp_path, code=3).stderr.startswith(f"ornith-moe: {tmp_path}: model.safetensors: ")
    assert "found something that is neither" in ornith_moe("verify", "/dev/zero", code=1).stderr


def test_builds_without_mtp_need_no_manifest(moe, tmp_path):
    ornith_moe("convert", moe, tmp_path, "--to", "fp8-channel", "--to", "gguf:Q8_0", "--mtp", "drop")
    for path, manifest in [
        (tmp_path / "fp8-channel", tmp_path / "fp8-channel" / MANIFEST),
        (tmp_path / "moe-Q8_0.gguf", tmp_path / "moe-Q8_0.gguf.manifest.json"),
    ]:
        manifest.unlink()
        assert "roles compared" in ornith_moe("verify", path, "--against", moe).stdout
    path.write_bytes(path.read_bytes()[:-5000])
    ornith_moe("verify", path, "--against", moe, code=3)


@pytest.mark.parametrize("kind", ["empty", "fifo", "device", "huge", "folder"])
def test_compare_refuses_what_is_no_text(moe, converted, tmp_path, kind):
    path = tmp_path / "text"
    if kind == "empty":
        path.write_text("")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path = tmp_path if kind == "folder" else "/dev/zero"
    errors = ornith_moe("compare", moe, converted["builds"][1]["path"], "--text", path, code=1, timeout=60).stderr
    assert str(path) in errors and ("at least 2 tokens" if kind == "empty" else "expected a text file") in errors


def test_doctor_tells_backends_and_reasons():
    found = json.loads(ornith_moe("doctor", "--json").stdout)
    assert found["MoE backends"].keys() == {"triton", "cpu", "reference"}
    assert all(": " in reason for reason in found["MoE backends"].values())
