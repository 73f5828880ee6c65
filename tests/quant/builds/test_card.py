"""Model cards of builds: what the Hub reads of them, and what people do.

Reference: the files themselves (sha256), YAML as the Hub parses it, and the JSON of our own commands. Not covered: the
commands of engines, which no test starts.
"""

import hashlib
import json

import fixtures
import pytest
import yaml

from ornith_moe import cli
from ornith_moe.quant.builds.build import BUILDS
from ornith_moe.quant.builds.card import ENGINES, model_card
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source.weights import open_source


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=3, top_k=2)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\nauthor: me\n---\n# Mine\n")
    report = convert(open_source(folder), tmp_path_factory.mktemp("out"), ["fp8-channel", "gguf:Q8_0"])
    return folder, [build.path for build in report.builds]


def front_of(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_what_the_hub_reads(made):
    source, (folder, file) = made
    front = front_of(model_card(folder, base_model="org/moe", source=source))
    assert front["license"] == "apache-2.0" and front["language"] == ["en", "de"] and "author" not in front
    assert (front["base_model"], front["base_model_relation"], front["library_name"]) == (
        "org/moe",
        "quantized",
        "vllm",
    )
    front = front_of(model_card(file, licence="mit"))
    assert front["license"] == "mit" and front["library_name"] == "gguf" and {"gguf", "Q8_0"} <= set(front["tags"])


def test_what_people_read(made, tmp_path, capsys):
    _, (folder, file) = made
    compared = {"client_b": "llama.cpp", "positions": 256, "kl_mean": 0.00231, "top1": 0.945, "perplexity_a": 124.05}
    said = {
        "verified": {"build": "gguf:Q8_0", "ok": True, "tensors": 76, "roles": {"norm": {}}},
        "compared": compared | {"perplexity_b": 124.9},
    }
    figures = {"kl_mean": 0.01, "top1": 0.9, "perplexity": 125.0}
    said["streamed"] = {"positions": 1784, "perplexity": 124.5} | {
        "builds": [{"kind": "bf16"}, {"kind": "gguf:Q8_0"} | figures]
    }
    for name, found in said.items():
        (tmp_path / name).write_text(json.dumps(found))
    options = ["--verify", str(tmp_path / "verified"), "--compare", str(tmp_path / "compared"), "--json"]
    options += ["--compare", str(tmp_path / "streamed")]
    output = tmp_path / "README.md"
    cli.app(["card", str(file), *options, "--output", str(output)], standalone_mode=False)
    text = json.loads(capsys.readouterr().out)["card"]
    assert output.read_text() == text and f"| `{hashlib.sha256(file.read_bytes()).hexdigest()}` |" in text
    assert "It passes `ornith-moe verify`: 76 tensors against the source." in text
    assert "| llama.cpp | 256 | 0.00231 | 94.5% | 124.90 | 124.05 |" in text
    assert "| its weights in fp32 | 1,784 | 0.01000 | 90.0% | 125.00 | 124.50 |" in text
    assert f"llama-server -m {file.name} --jinja" in text and "Multi-token prediction is not in it." in text
    assert "vllm serve fp8-channel --reasoning-parser qwen3" in model_card(folder)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"verified": [{}]}, "expected the JSON of verify with build str, got None"),
        ({"compared": [{"client_b": 3}]}, "expected the JSON of compare with client_b str, got 3"),
        (
            {"compared": [{"positions": 9, "perplexity": 2.0, "builds": [{"kind": "bf16"}]}]},
            "--compare: has no build fp8-channel, of which the card is; give its own",
        ),
        (
            {"compared": [{"positions": 9, "perplexity": 2.0, "builds": [3]}]},
            "expected the JSON of compare with kind str, got None",
        ),
        (
            {"verified": [{"build": "bf16", "ok": True, "tensors": 1, "roles": {}}]},
            "is of build 'bf16', the card is of",
        ),
    ],
)
def test_figures_of_something_else_are_one_sentence(made, given, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        model_card(made[1][0], **given)


def test_a_verification_without_its_source_says_so(made):
    said = {"build": "fp8-channel", "ok": True, "tensors": 9, "roles": {}}
    assert "9 tensors, without the source." in model_card(made[1][0], verified=[said])


def test_every_build_names_engines_that_are_known(made, tmp_path):
    assert all(set(build.engines) <= ENGINES.keys() and build.engines for build in BUILDS.values())
    with pytest.raises(CheckpointError, match="is no build with a manifest of ours"):
        model_card(made[0])
