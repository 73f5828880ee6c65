"""quant/source/model_card.py: what is taken of a README, and what anybody may write into one.

What becomes of it in a GGUF is held against llama.cpp's converter in tests/quant/gguf/test_converter.py.
"""

import os

import fixtures
import pytest
from gguf import GGUFReader

from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.source.model_card import MAX_FRONT_BYTES, read_card
from ornith_moe.quant.source.weights import open_source


def card_of(folder, text):
    (folder / "README.md").write_bytes(text.encode() if isinstance(text, str) else text)
    return read_card(folder)


@pytest.mark.parametrize(
    ("front", "values"),
    [
        ("license: mit", {"license": "mit"}),
        ("base_model: [a/b, c/d]\ntags: x", {"base_model": ["a/b", "c/d"], "tags": "x"}),
        ("name: mine\nmodel_name: mine\nversion: v2\nauthor: me", {"author": "me"}),
        ("license: 1.0\ntags: [1, a]\nlanguage: {en: 1}\nauthor: null", {}),
        ("tags: []\nauthor: ''", {}),
        (f"author: {'x' * 4097}\ntags: [{'x, ' * 64}x]", {}),
        ("tags: &a [x]\nlanguage: *a", {"tags": ["x"], "language": ["x"]}),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\ntags: *c", {}),
        ("language:\n- no\n- en", {"language": ["no", "en"]}),
        ("", {}),
    ],
)
def test_flat_texts_of_known_keys_are_taken(tmp_path, front, values):
    card = card_of(tmp_path, f"---\n{front}\n---\n# A README\n---\nlicense: other\n---\n")
    assert card.values == values and not card.notes


@pytest.mark.parametrize("text", ["", "# A README\n", "---", " ---\nlicense: mit\n---\n"])
def test_a_readme_needs_no_front_matter(tmp_path, text):
    card = card_of(tmp_path, text)
    assert card.values == {} and len(card.notes) == (text == "---")
    os.unlink(tmp_path / "README.md")
    assert read_card(tmp_path) == ({}, ())


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: [mit\n---\n", "---\n- mit\n---\n", "---\nmit\n---\n", "---\nlicense: mit\n",
        "---\na: 2024-99-99\n---\n", "---\na: !!python/object/apply:os.system [ls]\n---\n",
        "---\n" + "? " * 1500 + "\n---\n", "---\n{}: {}\n---\n", "---\na: " + "x" * MAX_FRONT_BYTES + "\n---\n",
        b"---\nlicense: \xff\n---\n", "---\na: \0\n---\n", "---\nlicense: *nothing\n---\n",
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_note(tmp_path, text):
    card = card_of(tmp_path, text)
    (note,) = card.notes
    assert card.values == {} and "README.md: its front matter is not read" in note and "\n" not in note


def test_it_stands_in_every_gguf_and_a_damaged_one_costs_no_build(tmp_path):
    folder = fixtures.qwen35(tmp_path / "model")
    card_of(folder, "---\nlicense: mit\nbase_model: Qwen/Qwen3.5-9B\n---\n")
    path = convert(open_source(folder), tmp_path / "out", ["gguf:BF16"]).builds[0].path
    fields = GGUFReader(path).fields
    assert fields["general.license"].contents() == "mit"
    assert fields["general.base_model.0.repo_url"].contents() == "https://huggingface.co/Qwen/Qwen3.5-9B"
    card_of(folder, "---\nlicense: [mit\n---\n")
    (build,) = convert(open_source(folder), tmp_path / "other", ["gguf:BF16"]).builds
    assert "general.license" not in GGUFReader(build.path).fields
    assert any("no licence or base model is written" in note for note in build.notes)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")
    assert "README.md" in read_card(folder).notes[0]
