"""A checkpoint's tokenizer as its files describe it together, read once: tokens by id, and which of them are added.

    tokenizer.json                      the vocabulary, merges and added tokens
    tokenizer_config.json               added_tokens_decoder: {id: token}; named special tokens; extra_special_tokens
    added_tokens.json, special_tokens_map.json    the same as older tools wrote it, read where there is no decoder

Ids are given as the tokenizers library gives them on loading: a token that the vocabulary has keeps its id, any other
gets the one after the last, whatever number its file asks for. So a file with gaps is renumbered, by transformers and
here; a note tells it. An id that two texts claim is refused.

Sources: transformers' `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`; `AddedVocabulary`
in the tokenizers library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ornith_moe.quant.errors import CheckpointError, PlanError, brief
from ornith_moe.quant.files import read_json
from ornith_moe.quant.source.chat_templates import chat_templates

MAX_TOKENIZER_BYTES = 1 << 27  # Gemma 4's, the largest of the family, has about 33 MB
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # named in tokenizer_config.json as `bos_token` and so on


@dataclass(frozen=True)
class Added:
    """A token matched whole, besides what merges reach. `asked` is the id its file asks for."""

    text: str
    special: bool
    asked: int


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a folder say. `content` is tokenizer.json, `config` tokenizer_config.json."""

    path: Path  # of tokenizer.json, for messages
    content: dict[str, Any]
    config: dict[str, Any]
    tokens: dict[int, str]
    added: dict[int, Added]
    templates: dict[str, str]
    notes: tuple[str, ...]

    @property
    def model(self) -> dict[str, Any]:
        return self.content["model"]

    def steps(self, part: str, inner: str) -> list[dict[str, Any]]:
        """The steps of a part of tokenizer.json, such as its pre-tokenizer; the outermost sequence is opened."""
        outer = self.content.get(part)
        if not isinstance(outer, dict):
            return []
        steps = outer.get(inner) if outer.get("type") == "Sequence" else [outer]
        return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def read_tokenizer(folder: Path, rows: int) -> TokenizerFiles:
    """Everything about the tokenizer in `folder`, whose embedding has `rows` rows.

    Raises:
        CheckpointError: a file missing, damaged or at odds with itself or another.
        PlanError: no BPE, or a token beyond the embedding.
    """
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        raise _no_tokenizer(folder)
    content = read_json(path, what="the tokenizer of the checkpoint", limit=MAX_TOKENIZER_BYTES)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else type(model).__name__
        raise PlanError(f"{path}: expected a BPE model with a vocab, got {brief(kind)}; others are not converted")
    config = read_optional(folder, "tokenizer_config.json")
    own = _listed(content.get("added_tokens"), f"{path}: added_tokens")
    others, named, notes = _other_tokens(folder, config, {token.text for token in own})
    vocabulary = _vocabulary(model["vocab"], path)
    _check_rows(vocabulary | {token.asked: token.text for token in (*own, *others)}, rows, path)
    numbering = _Numbering(vocabulary, len(vocabulary))
    moved = numbering.add([*own, *others], path)
    _check_rows(numbering.tokens, rows, path)
    homeless = numbering.add_named(named, rows)
    templates, told = chat_templates(folder, config)
    return TokenizerFiles(
        path, content, config, numbering.tokens, numbering.added, templates, (*notes, *moved, *homeless, *told)
    )


def read_optional(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder / name`, {} where there is no such file."""
    path = folder / name
    return read_json(path, limit=MAX_TOKENIZER_BYTES) if os.path.lexists(path) else {}


def _no_tokenizer(folder: Path) -> CheckpointError:
    parts = [name for name in ("vocab.json", "merges.txt", "tokenizer.model") if (folder / name).exists()]
    if not parts:
        return CheckpointError(f"{folder}: has no tokenizer.json; fetch it from where the model was published")
    return CheckpointError(
        f"{folder}: has {' and '.join(parts)} but no tokenizer.json, which alone says how text is split; make it with "
        f'python -c "from transformers import AutoTokenizer as A; d = {str(folder)!r}; '
        'A.from_pretrained(d).save_pretrained(d)"'
    )


def _vocabulary(vocabulary: dict[str, Any], path: Path) -> dict[int, str]:
    tokens: dict[int, str] = {}
    for text, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 1 << 32:
            raise CheckpointError(f"{path}: token {brief(text)} has id {brief(index)}; expected an integer from 0")
        if tokens.setdefault(index, text) != text:
            raise CheckpointError(f"{path}: id {index} is both {brief(tokens[index])} and {brief(text)}")
    return tokens


def _check_rows(tokens: dict[int, str], rows: int, path: Path) -> None:
    if (last := max(tokens, default=0)) >= rows:
        raise PlanError(
            f"{path}: token {brief(tokens[last])} has id {last}, but vocab_size in config.json is {rows}; "
            "the tokenizer belongs to another model or the embedding must be resized"
        )


def _listed(tokens: Any, where: str) -> list[Added]:
    """Added tokens of a list of objects with id, content and special."""
    sound = isinstance(tokens or [], list) and all(
        isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str)
        for token in tokens or []
    )
    if not sound:
        raise CheckpointError(f"{where}: expected a list of objects with id and content, got {brief(tokens)}")
    return [Added(token["content"], bool(token.get("special")), token["id"]) for token in tokens or []]


def _other_tokens(folder: Path, config: dict[str, Any], own: set[str]) -> tuple[list[Added], list[str], list[str]]:
    """(tokens in addition to `own`, or with other flags; texts that are named special; notes)."""
    old, where = read_optional(folder, "added_tokens.json"), f"{folder / 'added_tokens.json'}"
    for text, index in old.items():
        if type(index) is not int:
            raise CheckpointError(f"{where}: token {brief(text)} has id {brief(index)}; expected an integer from 0")
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        named = list(_special_texts(config | read_optional(folder, "special_tokens_map.json")))
        others = [Added(text, text in named, index) for text, index in old.items() if text not in own]
        return sorted(others, key=lambda token: token.asked), named, []
    where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    sound = isinstance(decoder, dict) and all(key.isdecimal() and len(key) < 12 for key in decoder)
    if not sound or not all(isinstance(token, dict) for token in decoder.values()):
        raise CheckpointError(f"{where}: expected an object of tokens by id, got {brief(decoder)}")
    others = _listed([token | {"id": int(key)} for key, token in decoder.items()], where)
    ignored = sorted(old.keys() - own - {token.text for token in others})
    notes = [
        f"added_tokens.json names {len(ignored)} tokens, the first {brief(text)}, which transformers does not read "
        "beside added_tokens_decoder: they are left out"
        for text in ignored[:1]
    ]
    return sorted(others, key=lambda token: token.asked), list(_special_texts(config)), notes


def _special_texts(settings: dict[str, Any]) -> Iterator[str]:
    """Texts that tokenizer_config.json calls special, in the order in which transformers adds them."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    further = [key for key in settings if key.endswith("_token") and key.removesuffix("_token") not in SPECIAL]
    values = [settings.get(f"{kind}_token") for kind in SPECIAL] + [settings[key] for key in further]
    for value in [*values, *(extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else [])]:
        text = token_text(value)
        if text:
            yield text


def token_text(value: Any) -> str | None:
    """The text of a token written as a string or as an object with `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


class _Numbering:
    """Ids of tokens as `AddedVocabulary` gives them: the vocabulary's own, or one after the last that was added."""

    def __init__(self, tokens: dict[int, str], base: int):
        self.tokens, self.base, self.last = tokens, base, -1
        self.ids = {text: index for index, text in tokens.items()}
        self.added: dict[int, Added] = {}

    def id_of(self, text: str) -> int:
        return self.ids.get(text, max(self.last + 1, self.base))

    def put(self, token: Added, index: int) -> None:
        self.tokens[index], self.ids[token.text], self.added[index] = token.text, index, token
        self.last = max(self.last, index)

    def add(self, asked: list[Added], path: Path) -> list[str]:
        """Put tokens that ask for ids; notes. Raises CheckpointError where an id would have two texts."""
        moved = []
        for token in asked:
            if (text := self.tokens.get(token.asked, token.text)) != token.text:
                raise CheckpointError(
                    f"{path}: id {token.asked} is both {brief(text)} and {brief(token.text)}, an added token; correct "
                    "added_tokens here, added_tokens_decoder in tokenizer_config.json or added_tokens.json"
                )
            index = self.id_of(token.text)
            if self.tokens.get(index, token.text) != token.text:  # a vocabulary with gaps: its own ids go on beyond
                index = token.asked
            if index != token.asked:
                moved.append(f"{brief(token.text)} asks for id {token.asked} and has {index}")
            self.put(token, index)
        more = f", and {len(moved) - 1} more" if len(moved) > 1 else ""
        return [f"added tokens get the ids that transformers gives them: {text}{more}" for text in moved[:1]]

    def add_named(self, named: list[str], rows: int) -> list[str]:
        """Mark what is named special; what only its name gives is put last, as long as there are rows for it."""
        homeless = []
        for text in dict.fromkeys(named):
            index = self.id_of(text)
            if self.tokens.get(index, text) != text or index >= rows:
                homeless.append(text)
            else:
                self.put(Added(text, True, index), index)
        return [f"{brief(text)} is named a special token, and the model has none such" for text in homeless[:1]]
