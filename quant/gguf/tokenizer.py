"""A Hugging Face tokenizer as GGUF keys: byte-level BPE (Qwen) and BPE that falls back to bytes (Gemma 4).

llama.cpp rebuilds a tokenizer from a list of tokens, a type for each, the merges in order and a *name* for the
pre-tokenizer, because the split pattern itself is compiled in. The name is derived from the pattern in tokenizer.json,
so it holds for any vocabulary; llama.cpp's converter looks up a hash of one sample's token ids instead, which fails for
every new vocabulary with a known pattern. Everything else is what the converter writes, in its order.

    token type     which                                                       what llama.cpp does with it
    NORMAL         the model's own vocabulary                                  reached by merging
    CONTROL        added tokens marked special, or that look it (`<|...|>`)    matched whole, not shown
    USER_DEFINED   other added tokens, such as `<think>`                       matched whole, shown
    BYTE           `<0xNN>` where the model falls back to bytes                stands for what no merge reaches
    UNUSED         `[PADn]`: embedding rows without a token                    never matched

Sources: llama.cpp `src/llama-vocab.cpp` for what the keys do, `SpecialVocab` in its gguf-py for the special tokens.
"""

from __future__ import annotations

import re
from typing import Any

from gguf import GGUFValueType as Type
from gguf import Keys, TokenType

from ornith_moe.quant.errors import BRIEF, CheckpointError, PlanError, brief
from ornith_moe.quant.gguf.header import Entry
from ornith_moe.quant.gguf.special_tokens import special_entries
from ornith_moe.quant.source.architectures.architecture import FallbackTokenizer
from ornith_moe.quant.source.chat_templates import DEFAULT
from ornith_moe.quant.source.tokenizer_files import TokenizerFiles

_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
_TAIL = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_BY_PATTERN = {  # split pattern in tokenizer.json -> llama.cpp's name for it
    _HEAD + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + _TAIL: "qwen35",
    _HEAD + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _TAIL: "qwen2",
    _HEAD + r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + _TAIL: "llama-bpe",
}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_LOOK_SPECIAL_AROUND = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_SCORE = -1000.0  # the loader wants scores and does not use them: merges have ranks


def tokenizer_entries(
    files: TokenizerFiles,
    config: dict[str, Any],
    rows: int,
    *,
    pre: str | None = None,
    fallback: FallbackTokenizer | None = None,
) -> list[Entry]:
    """The `tokenizer.*` keys of a GGUF.

    Args:
        files: `read_tokenizer(folder, rows)`.
        config: parsed config.json, asked for token ids that the tokenizer's own files leave open.
        rows: of the embedding; rows without a token get a `[PADn]`.
        pre: overrides the name of the pre-tokenizer.
        fallback: what the architecture says of a tokenizer that falls back to bytes.

    Raises:
        CheckpointError: a value that is damaged or at odds with another.
        PlanError: neither byte-level nor falling back to bytes, an unknown pre-tokenizer and no `pre`, no merges.
    """
    texts = [files.tokens.get(index, f"[PAD{index}]") for index in range(rows)]
    byte_level = any(step.get("type") == "ByteLevel" for step in files.steps("pre_tokenizer", "pretokenizers"))
    if byte_level:
        begin = [
            Entry(Keys.Tokenizer.MODEL, "gpt2", Type.STRING),
            Entry(Keys.Tokenizer.PRE, pre or _pre_name(files), Type.STRING),
        ]
        types, scores, always_bos = _byte_level_types(files, rows), [], False
        for index in files.added:
            if types[index] == TokenType.USER_DEFINED:
                texts[index] = texts[index].replace("▁", " ")
    elif files.model.get("byte_fallback") and fallback:
        begin = [Entry(Keys.Tokenizer.MODEL, fallback.model, Type.STRING)]
        begin += [Entry(Keys.Tokenizer.PRE, pre, Type.STRING)] if pre else []
        types, always_bos = _fallback_types(files, rows, fallback.shown), fallback.always_bos
        scores = [Entry(Keys.Tokenizer.SCORES, [_SCORE] * rows, Type.ARRAY, Type.FLOAT32)]
    else:
        expected = "byte-level or falls back to bytes" if fallback else "byte-level, as the architecture has"
        raise PlanError(f"{files.path}: expected a BPE that is {expected}, got one that is not")
    if len(set(texts)) != rows:
        raise CheckpointError(f"{files.path}: two ids have the same text; the file is damaged")
    return [
        *begin,
        Entry(Keys.Tokenizer.LIST, texts, Type.ARRAY, Type.STRING),
        *scores,
        Entry(Keys.Tokenizer.TOKEN_TYPE, types, Type.ARRAY, Type.INT32),
        Entry(Keys.Tokenizer.MERGES, _merges(files), Type.ARRAY, Type.STRING),
        *special_entries(files, config, rows, always_bos=always_bos),
        *_chat_templates(files.templates),
        *([] if byte_level else [Entry(Keys.Tokenizer.ADD_PREFIX, False, Type.BOOL)]),
    ]


def _looks_special(text: str) -> bool:
    around = any(text.startswith(left) and text.endswith(right) for left, right in _LOOK_SPECIAL_AROUND)
    return around or text in _LOOK_SPECIAL


def _byte_level_types(files: TokenizerFiles, rows: int) -> list[int]:
    types = [int(TokenType.NORMAL if index in files.tokens else TokenType.UNUSED) for index in range(rows)]
    for index, token in files.added.items():
        control = token.special or _looks_special(token.text)
        types[index] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    return types


def _fallback_types(files: TokenizerFiles, rows: int, shown: frozenset[str]) -> list[int]:
    base = len(files.model["vocab"])
    types = [int(TokenType.NORMAL if index in files.tokens else TokenType.UNUSED) for index in range(rows)]
    for index, token in files.added.items():
        if token.special or index >= base:
            types[index] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    for index, text in files.tokens.items():
        if text.startswith("<0x") and _BYTE.fullmatch(text):
            types[index] = int(TokenType.BYTE)
        elif text in shown:
            types[index] = int(TokenType.USER_DEFINED)
    return types


def _pre_name(files: TokenizerFiles) -> str:
    patterns = []
    for step in files.steps("pre_tokenizer", "pretokenizers"):
        if step.get("type") == "Split":
            pattern = step.get("pattern")
            patterns.append(pattern.get("Regex") if isinstance(pattern, dict) else pattern)
        elif step.get("type") == "ByteLevel" and not step.get("use_regex", True):
            continue
        else:
            patterns.append(step.get("type"))
    name = PRE_BY_PATTERN.get(patterns[0]) if len(patterns) == 1 and isinstance(patterns[0], str) else None
    if name is None:
        shown = " then ".join(str(pattern)[:BRIEF] for pattern in patterns) or "none"
        raise PlanError(
            f"{files.path}: llama.cpp's name for the pre-tokenizer {brief(shown)} is not known here; "
            "give the name of an equal one, for instance --tokenizer-pre qwen35"
        )
    return name


def _merges(files: TokenizerFiles) -> list[str]:
    """Merges as `left right`; a space inside a part is written as byte-level tokenizers write it."""
    merges = files.model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{files.path}: expected model.merges to be a list, got {type(merges).__name__}")
    if not merges:
        raise PlanError(f"{files.path}: model.merges is empty, and llama.cpp reads no BPE without merges")
    lines = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise CheckpointError(f"{files.path}: expected a merge of two tokens, got {brief(merge)}")
        left, right = parts
        lines.append(f"{left} {right}" if " " not in left + right else " ".join(p.replace(" ", "Ġ") for p in parts))
    return lines


def _chat_templates(templates: dict[str, str]) -> list[Entry]:
    """The default under its own key; each other one as `tokenizer.chat_template.NAME`, with a list of the names."""
    others = {_safe(name): text for name, text in templates.items() if name != DEFAULT and _safe(name)}
    key = Keys.Tokenizer.CHAT_TEMPLATE_N
    entries = [Entry(key.format(name=name), text, Type.STRING) for name, text in others.items()]
    if others:
        entries.append(Entry(Keys.Tokenizer.CHAT_TEMPLATES, sorted(others), Type.ARRAY, Type.STRING))
    if DEFAULT in templates:
        entries.append(Entry(Keys.Tokenizer.CHAT_TEMPLATE, templates[DEFAULT], Type.STRING))
    return entries


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", name)
