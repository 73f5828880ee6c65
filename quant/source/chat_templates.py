"""The chat templates of a checkpoint, wherever its tools have put them.

    chat_template.jinja and additional_chat_templates/NAME.jinja     transformers since 4.51
    tokenizer_config.json: chat_template                             a string, {name: template}, or a list of named ones
    chat_template.json: chat_template                                processors of transformers 4.45 to 4.50

The first that is there counts, as in transformers, which overrides what tokenizer_config.json says by the files; that
two of them differ is told in a note. llama.cpp's converter prefers tokenizer_config.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.files import read_json, read_text

DEFAULT = "default"
FOLDER = "additional_chat_templates"
MAX_TEMPLATE_BYTES = 1 << 22
MAX_TEMPLATES = 64


def chat_templates(folder: Path, tokenizer_config: dict[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """({name: template}, notes); the one without a name is "default".

    Raises:
        CheckpointError: a file that is too large, no UTF-8, no JSON, or a link that leaves the folder.
    """
    files = {path.stem: path for path in named_templates(folder)}
    if os.path.lexists(path := folder / "chat_template.jinja"):
        files = {DEFAULT: path} | files
    texts = {name: read_text(path, what="a chat template", limit=MAX_TEMPLATE_BYTES) for name, path in files.items()}
    old = folder / "chat_template.json"
    beside = read_json(old, limit=MAX_TEMPLATE_BYTES) if os.path.lexists(old) else {}
    found = {
        "chat_template.jinja": texts,
        "tokenizer_config.json": _parsed(tokenizer_config.get("chat_template")),
        old.name: _parsed(beside.get("chat_template")),
    }
    notes = [
        f"{where}: chat_template is no template, it is left out" for where, named in found.items() if named is None
    ]
    given = {where: named for where, named in found.items() if named}
    if not given:
        return {}, (*notes, "no chat template is here: programs will have to guess how a chat is written")
    used = next(iter(given))
    notes += [
        f"{where} and {used} hold other chat templates: {used} is used, as by transformers"
        for where, named in given.items()
        if named != given[used]
    ]
    return given[used], tuple(notes)


def named_templates(folder: Path) -> list[Path]:
    """The files of `additional_chat_templates`.

    Raises:
        CheckpointError: too many, or that folder is a link.
    """
    inner = folder / FOLDER
    if inner.is_symlink():
        raise CheckpointError(f"{inner}: is a link; copy the folder into its place")
    paths = sorted(inner.glob("*.jinja"))
    if len(paths) > MAX_TEMPLATES:
        raise CheckpointError(f"{inner}: holds {len(paths)} templates, expected at most {MAX_TEMPLATES}")
    return paths


def _parsed(value: Any) -> dict[str, str] | None:
    """Templates by name, {} where there is none, None where the value is of another kind."""
    if value is None or isinstance(value, str):
        return {DEFAULT: value} if value else {}
    if isinstance(value, list):
        items: list[Any] = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
        return dict(items) if len(items) == len(value) and _are_texts(items) else None
    return value if isinstance(value, dict) and _are_texts(value.items()) else None


def _are_texts(items: Any) -> bool:
    return all(isinstance(text, str) for item in items for text in item)
