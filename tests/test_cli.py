"""The command: exit codes, one sentence per failure, JSON and nothing else, and the figures users rely on.

Reference: the functions behind it. Run in a process of its own, as a user runs it. Not covered: the look of tables.
"""

import json
import os
import subprocess
import sys

import fixtures
import pytest

PLAN_KEYS = {"build", "tensors", "tensor_bytes", "files", "fallbacks", "max_tensor_parallel"}


def ornith_moe(*arguments, code=0, **options):
    done = subprocess.run(
        [sys.executable, "-m", "ornith_moe", *map(str, arguments)], capture_output=True, text=True, **options
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    if code in (1, 3):
        assert done.stderr.startswith("ornith-moe: ") and done.stderr.count("\n") == 1, done.stderr
    return done


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=4, mtp=True)


@pytest.fixture(scope="module")
def converted(moe, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "builds"
    done = ornith_moe("convert", moe, out, "--to", "fp8-channel", "--to", "gguf:Q8_0", "--json")
    assert done.stderr == ""  # quiet when not a terminal
    return json.loads(done.stdout)


def test_plan_of_a_config(tmp_path):
    from importlib import resources

    config = tmp_path / "ornith-1.0-35b.json"
    config.write_bytes(resources.files("ornith_moe.quant").joinpath("presets/ornith-1.0-35b.json").read_bytes())
    found = json.loads(ornith_moe("plan", config, "--to", "fp8-channel", "--to", "gguf:Q4_K_M", "--json").stdout)
    channel, q4 = found["builds"]
    assert channel.keys() >= PLAN_KEYS
    assert (channel["tensors"], channel["tensor_bytes"]) == (62_546, 37_667_035_872)
    assert (q4["tensors"], q4["tensor_bytes"], q4["max_tensor_parallel"]) == (733, 21_155_768_832, None)


def test_plan_for_people():
    text = ornith_moe("plan", "qwen3.5-35b-a3b", "--to", "fp8-block", env=os.environ | {"COLUMNS": "160"}).stdout
    assert "64,196" in text and "37,454,789,472" in text


def test_plan_imports_no_torch(moe):
    code = (
        "import sys; sys.argv = ['ornith-moe', 'plan', sys.argv[1], '--to', 'fp8-channel', '--json'];"
        "from ornith_moe.cli import app; app(standalone_mode=False);"
        "assert not {'torch', 'numba', 'transformers', 'triton'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, moe], check=True, capture_output=True)


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


def test_compare_runs_both(moe, converted, tmp_path):
    text = tmp_path / "text"
    text.write_text("A router reads each token once and names the experts that will work on it. " * 8)
    for build in converted["builds"]:
        done = ornith_moe("compare", moe, build["path"], "--text", text, "--windows", 1, "--json")
        found = json.loads(done.stdout)
        assert found["positions"] == 16 and 0 < found["kl_mean"] < found["kl_max"] and 0 <= found["top1"] <= 1
        assert done.stderr == ""
    gguf = converted["builds"][1]["path"]
    assert "expected A or B to be" in ornith_moe("compare", gguf, gguf, code=1).stderr
    (tmp_path / "binary").write_bytes(b"\xff")
    assert "UTF-8" in ornith_moe("compare", moe, gguf, "--text", tmp_path / "binary", code=1).stderr


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
        (["convert", "{src}", "{out}", "--to", "gguf:Q4_K_M"], "can plan but not encode"),
        (["convert", "{src}", "{out}", "--to", "bf16", "--resume"], "no unfinished conversion"),
        (["convert", "{src}", "{src}", "--to", "bf16"], "is the source itself"),
        (["convert", "{src}", "{src}/config.json", "--to", "bf16"], "found a file"),
        (["convert", "{src}", "/proc/nothing", "--to", "bf16"], "/proc/nothing"),
        (["convert", "{src}", "{out}", "--to", "bf16", "--max-memory", "10MB"], "max_memory"),
        (["convert", "ornith-1.0-9b", "{out}", "--to", "bf16"], "config without weights"),
        (["plan", "{src}", "--to", "bf16", "--mtp", "keep"], None),
        (["plan", "gemma-4-31b", "--to", "bf16", "--mtp", "keep"], "announces no MTP"),
        (["plan", "hf://nobody", "--to", "bf16"], "expected hf://org/name"),
        (["verify", "{out}"], "no build here"),
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
     ["convert", "a", "b", "--to", "bf16", "--jobs", "0"], ["plan", "ornith-1.0-9b", "--to", "bf16", "--mtp", "maybe"]],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments):
    ornith_moe(*arguments, code=2)


def test_a_closed_pipe_is_no_failure():
    command = f"{sys.executable} -m ornith_moe plan qwen3.5-35b-a3b --to fp8-block --json | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.stdout.startswith("{")


def test_doctor_tells_backends_and_reasons():
    found = json.loads(ornith_moe("doctor", "--json").stdout)
    assert found["MoE backends"].keys() == {"triton", "cpu", "reference"}
    assert all(": " in reason for reason in found["MoE backends"].values())
