"""quant/source/tokenizer_files.py and chat_templates.py: tokens and templates, in whichever file they are.

Reference: the ids and flags of transformers' AutoTokenizer on the same folder. What becomes of them in a GGUF, against
llama.cpp's converter, is test_gguf_converter.py. Not covered: vocabularies of real size.
"""

import json
import shlex

import pytest
from converter_models import make, qwen_tokenizer, token_entry

from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError, OrnithError, PlanError
from ornith_moe.quant.gguf.tokenizer import tokenizer_entries
from ornith_moe.quant.source.tokenizer_files import read_tokenizer
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

ROWS = 300
FIRST = 271  # the first id that no token has


def token(text, special=True, **flags):
    return {key: value for key, value in (token_entry(0, text, special) | flags).items() if key != "id"}


@pytest.fixture
def folder(tmp_path):
    content, settings = qwen_tokenizer()
    assert content["added_tokens"][-1]["id"] == FIRST - 1
    write(tmp_path, "tokenizer.json", content)
    write(tmp_path, "tokenizer_config.json", settings)
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def change(folder, name, **values):
    path = folder / name
    write(folder, name, (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | values)


def decoder(**tokens):
    return {"added_tokens_decoder": {index.removeprefix("id"): value for index, value in tokens.items()}}


def types(folder):
    """{token beyond tokenizer.json's: its type in a GGUF}."""
    files = read_tokenizer(folder, ROWS)
    found = {entry.key: entry.value for entry in tokenizer_entries(files, {}, ROWS)}
    names = {3: "control", 4: "shown", 5: "unused"}
    kinds = zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True)
    return {text: names[kind] for text, kind in list(kinds)[FIRST:] if names[kind] != "unused"}


CASES = {
    "decoder": (
        {
            "tokenizer_config.json": decoder(
                id271=token("<tool>"), id272=token("  wide ", special=False, normalized=True)
            )
        },
        {"<tool>": "control", "  wide ": "shown"},
    ),
    "decoder out of order": (
        {"tokenizer_config.json": decoder(id272=token("<b>", special=False), id271=token("<a>"))},
        {"<a>": "control", "<b>": "shown"},
    ),
    "decoder with a gap": ({"tokenizer_config.json": decoder(id280=token("<tool>"))}, {"<tool>": "control"}),
    "added_tokens.json": (
        {"added_tokens.json": {"<|tool|>": 271, "<plain>": 272}},
        {"<|tool|>": "control", "<plain>": "shown"},
    ),
    "special_tokens_map.json": (
        {"special_tokens_map.json": {"additional_special_tokens": ["<x>", "<y>"]}},
        {"<x>": "control", "<y>": "control"},
    ),
    "both, the map says special": (
        {"added_tokens.json": {"<x>": 271}, "special_tokens_map.json": {"mask_token": "<x>"}},
        {"<x>": "control"},
    ),
    "named only": (
        {
            "tokenizer_config.json": {
                "unk_token": token("<unk>", __type="AddedToken"),
                "extra_special_tokens": {"image_token": "<img>"},
            }
        },
        {"<unk>": "control", "<img>": "control"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_of_every_file_have_the_ids_that_transformers_gives_them(folder, case):
    from transformers import AutoTokenizer

    for name, values in CASES[case][0].items():
        change(folder, name, **values)
    files = read_tokenizer(folder, ROWS)
    known = AutoTokenizer.from_pretrained(folder).added_tokens_decoder
    assert {index: token.text for index, token in files.added.items()} == {i: t.content for i, t in known.items()}
    assert types(folder) == CASES[case][1]
    assert ("asks for id 280 and has 271" in " ".join(files.notes)) == ("gap" in case)


def test_the_decoder_decides_whether_a_token_is_special(folder):
    change(folder, "tokenizer_config.json", **decoder(id268=token("<think>", special=True)))
    assert read_tokenizer(folder, ROWS).added[268].special


@pytest.mark.parametrize(
    ("name", "values", "error", "words"),
    [
        (
            "tokenizer_config.json",
            decoder(id268=token("<tool>")),
            CheckpointError,
            "id 268 is both '<think>' and '<tool>'",
        ),
        ("tokenizer_config.json", decoder(id5=token("<tool>")), CheckpointError, "id 5 is both"),
        ("added_tokens.json", {"<tool>": 268}, CheckpointError, "268 is both '<think>' and '<tool>'"),
        ("tokenizer_config.json", decoder(id300=token("<tool>")), PlanError, "'<tool>' has id 300"),
        ("added_tokens.json", {"<tool>": 299, "<far>": 400}, PlanError, "'<far>' has id 400"),
        ("added_tokens.json", {"<tool>": "271"}, CheckpointError, "has id '271'"),
        ("tokenizer_config.json", decoder(idx=token("<tool>")), CheckpointError, "tokens by id"),
        ("tokenizer_config.json", decoder(id271="<tool>"), CheckpointError, "tokens by id"),
        ("tokenizer_config.json", decoder(id271={"special": True}), CheckpointError, "id and content"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, CheckpointError, "tokens by id"),
        ("tokenizer.json", {"added_tokens": 3}, CheckpointError, "added_tokens"),
    ],
)
def test_files_at_odds_are_one_sentence(folder, name, values, error, words):
    change(folder, name, **values)
    with pytest.raises(error) as caught:
        read_tokenizer(folder, ROWS)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_has_no_row_is_told_where_only_a_name_asks_for_it(folder):
    change(folder, "tokenizer_config.json", unk_token="<unk>")
    files = read_tokenizer(folder, FIRST)
    assert "'<unk>' is named a special token" in " ".join(files.notes) and FIRST not in files.tokens


def test_tokens_that_transformers_does_not_read_are_told(folder):
    change(folder, "tokenizer_config.json", **decoder(id271=token("<tool>")))
    change(folder, "added_tokens.json", **{"<tool>": 271, "<lost>": 272})
    files = read_tokenizer(folder, ROWS)
    assert "names 1 tokens, the first '<lost>'" in " ".join(files.notes) and 272 not in files.tokens


def test_merges_are_wanted(folder):
    content, _ = qwen_tokenizer()
    content["model"]["merges"] = []
    write(folder, "tokenizer.json", content)
    with pytest.raises(PlanError, match="merges is empty"):
        tokenizer_entries(read_tokenizer(folder, ROWS), {}, ROWS)


def test_how_to_get_tokenizer_json_is_told_and_works(folder):
    """The remedy of a folder with vocab.json and merges.txt, followed as it is printed."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write(folder, "vocab.json", content["model"]["vocab"])
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    write(folder, "added_tokens.json", {token["content"]: token["id"] for token in content["added_tokens"]})
    change(folder, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt but no") as caught:
        read_tokenizer(folder, ROWS)
    python, option, code = shlex.split(str(caught.value).split("make it with ")[1])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    files = read_tokenizer(folder, ROWS)
    assert files.tokens[268] == "<think>" and files.model["merges"] == content["model"]["merges"]


TEMPLATES = {
    "chat_template.jinja": ({"chat_template.jinja": "J"}, {}, {"default": "J"}),
    "chat_template.json": ({"chat_template.json": '{"chat_template": "O"}'}, {}, {"default": "O"}),
    "named in chat_template.json": ({"chat_template.json": '{"chat_template": {"default": "O", "rag": "R"}}'}, {},
                                    {"default": "O", "rag": "R"}),
    "a string": ({}, {"chat_template": "S"}, {"default": "S"}),
    "a list": ({}, {"chat_template": [{"name": "default", "template": "D"}, {"name": "a b", "template": "T"}]},
               {"default": "D", "a b": "T"}),
    "a list without a default": ({}, {"chat_template": [{"name": "rag", "template": "R"}]}, {"rag": "R"}),
    "a folder": ({"chat_template.jinja": "J", "additional_chat_templates/rag.jinja": "R"}, {},
                 {"default": "J", "rag": "R"}),
    "two that agree": ({"chat_template.jinja": "J"}, {"chat_template": "J"}, {"default": "J"}),
    "two that differ": ({"chat_template.jinja": "J"}, {"chat_template": "S"}, {"default": "J"}),
    "config before the old file": ({"chat_template.json": '{"chat_template": "O"}'}, {"chat_template": "S"},
                                   {"default": "S"}),
    "none": ({}, {}, {}),
    "none that is one": ({}, {"chat_template": 3}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_are_found_wherever_they_are(folder, case):
    files, settings, expected = TEMPLATES[case]
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    change(folder, "tokenizer_config.json", **settings)
    found = read_tokenizer(folder, ROWS)
    assert found.templates == expected
    notes = " ".join(found.notes)
    assert ("no chat template" in notes) == (not expected)
    assert ("hold other chat templates" in notes) == (case in ("two that differ", "config before the old file"))
    keys = {entry.key: entry.value for entry in tokenizer_entries(found, {}, ROWS) if "chat_template" in entry.key}
    others = {name.replace(" ", "_"): text for name, text in expected.items() if name != "default"}
    wanted = {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    wanted |= {"tokenizer.chat_templates": sorted(others)} if others else {}
    assert keys == wanted | ({"tokenizer.chat_template": expected["default"]} if "default" in expected else {})


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "added_tokens.json",
                                  "special_tokens_map.json", "additional_chat_templates/x.jinja"])  # fmt: skip
def test_a_file_of_the_tokenizer_that_lies_elsewhere_is_not_published(folder, tmp_path_factory, name):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("{}")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(OrnithError, match="link"):
        read_tokenizer(folder, ROWS)


def test_a_folder_of_templates_that_lies_elsewhere_is_not_published(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "x.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a link"):
        read_tokenizer(folder, ROWS)


def test_named_templates_go_along_with_a_folder_of_safetensors(tmp_path):
    """And verify knows them, and finds one that was changed."""
    folder, template = make("Gemma-4-300K-it", tmp_path), "additional_chat_templates/rag.jinja"
    (folder / template).parent.mkdir()
    (folder / template).write_text("{{ documents }}")
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    build = convert(open_source(folder), tmp_path / "out", ["bf16"]).builds[0].path
    assert (build / template).read_text() == "{{ documents }}" and (build / "chat_template.json").exists()
    assert verify(build).ok
    (build / template).write_text("{{ document }}s")
    assert any(template in problem for problem in verify(build).problems)
