"""What the front matter of README.md says of whose a model is: author, licence, base models, data sets, tags.

    ---
    license: mit
    base_model: Qwen/Qwen3.5-9B
    ---

The README is anybody's text, so that only flat strings of the keys below are taken, and what is no YAML, or too large,
is told and costs nothing but these keys. The model's own names are not taken from it: they come from the folder or
from --name, as file names do. Source: the Hub's model cards, and the keys that llama.cpp's converter takes of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import read_text

README = "README.md"
MAX_README_BYTES, MAX_FRONT_BYTES = 4 << 20, 32 << 10
MAX_ITEMS, MAX_CHARACTERS = 64, 4096  # of a list, of a string
TEXTS = (
    "author", "organization", "description", "url", "doi", "uuid", "repo_url", "license", "license_name",
    "license_link", "pipeline_tag", "model_author", "model_organization", "model_description", "model_url",
    "model_doi", "model_uuid", "model_repo_url", "model_creator",
)  # fmt: skip
LISTS = ("base_model", "base_models", "datasets", "dataset", "tags", "languages", "language")  # or one string


class Card(NamedTuple):
    """`values`: what is taken, {key: string or list of strings}; `notes`: what a user should know."""

    values: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_card(folder: Path) -> Card:
    """The front matter of the README in `folder`; an empty card where there is none."""
    if not os.path.lexists(folder / README):
        return Card({})
    try:
        front = _front(read_text(folder / README, what="a model card", limit=MAX_README_BYTES))
        found = yaml.safe_load(front) or {}
    except (CheckpointError, yaml.YAMLError, ValueError, RecursionError) as problem:
        first = str(problem).split("\n")[0]
        return Card({}, (f"{README}: its front matter is not read, so no licence or base model is written: {first}",))
    if not isinstance(found, dict):
        return Card({}, (f"{README}: its front matter is not read: expected keys and values, got {brief(found)}",))
    texts = {key: found[key] for key in TEXTS if _is_text(found.get(key))}
    return Card(texts | {key: found[key] for key in LISTS if _is_text(found.get(key)) or _is_list(found.get(key))})


def _front(text: str) -> str:
    """The YAML between two lines of three dashes; "" where there is none."""
    lines = text[:MAX_FRONT_BYTES].splitlines()
    if not lines or lines[0] != "---":
        return ""
    if "---" not in lines[1:]:
        raise CheckpointError(f"no end of it within {MAX_FRONT_BYTES} bytes")
    front = "\n".join(lines[1 : lines.index("---", 1)]) + "\n"
    return front.replace("- no\n", '- "no"\n').replace("\t", "  ")  # Norwegian is no boolean


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_CHARACTERS and "\0" not in value


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_ITEMS and all(map(_is_text, value))
