"""A Hugging Face tokenizer as GGUF keys: byte-level BPE (Qwen) and BPE that falls back to bytes (Gemma 4).

llama.cpp rebuilds a tokenizer from a list of tokens, a type for each, the merges in order and a *name* for the
pre-tokenizer, because the split pattern itself is compiled in. The name is derived from the pattern in tokenizer.json,
so it holds for any vocabulary; llama.cpp's converter looks up a hash of one sample's token ids instead, which fails for
every new vocabulary with a known pattern.

    token type     which                                                       what llama.cpp does with it
    NORMAL         the model's own vocabulary                                  reached by merging
    CONTROL        added tokens marked special, or that look it (`<|...|>`)    matched whole, not shown
    USER_DEFINED   other added tokens, such as `<think>`                       matched whole, shown
    BYTE           `<0xNN>` where the model falls back to bytes                stands for what no merge reaches
    UNUSED         `[PADn]`: embedding rows without a token                    never matched

Sources: llama.cpp `src/llama-vocab.cpp` for what the keys do; transformers' tokenizer classes for the two patterns.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gguf import GGUFValueType as Type
from gguf import Keys, TokenType

from ornith_moe.quant.errors import CheckpointError, PlanError
from ornith_moe.quant.files import read_json, read_text

MAX_TOKENIZER_BYTES = 1 << 27  # Gemma 4's, the largest of the family, has about 33 MB
MAX_TEMPLATE_BYTES = 1 << 22
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
_TAIL = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_BY_PATTERN = {  # split pattern in tokenizer.json -> llama.cpp's name for it
    _HEAD + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + _TAIL: "qwen35",
    _HEAD + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _TAIL: "qwen2",
    _HEAD + r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + _TAIL: "llama-bpe",
}
_GEMMA_SHOWN = frozenset(  # control tokens that a chat parser must see in the text
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
_TURN_ENDS = ("<|im_end|>", "<turn|>", "<end_of_turn>")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<unused\d+>|<pad>|<mask>", re.DOTALL)
_GEMMA_SCORE = -1000.0  # the loader wants scores and does not use them: merges have ranks


def tokenizer_entries(folder: Path, config: dict[str, Any], rows: int, *, pre: str | None = None) -> list[tuple]:
    """The `tokenizer.*` keys of a GGUF as (key, value, type[, item type]).

    Args:
        folder: holds tokenizer.json; tokenizer_config.json, generation_config.json and chat_template.jinja are read
            where present.
        config: parsed config.json, asked for token ids that the tokenizer's own files leave open.
        rows: of the embedding; rows without a token get a `[PADn]`.
        pre: overrides the name of the pre-tokenizer.

    Raises:
        CheckpointError: a file missing, damaged or at odds with itself.
        PlanError: no BPE, an unknown pre-tokenizer and no `pre`, or more tokens than `rows`.
    """
    path = folder / "tokenizer.json"
    tokenizer = read_json(path, what="the tokenizer of the checkpoint", limit=MAX_TOKENIZER_BYTES)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else type(model).__name__
        raise PlanError(f"{path}: expected a BPE model with a vocab, got {kind!r}; other tokenizers are not converted")
    vocabulary, added = model["vocab"], _added_tokens(tokenizer, path)
    tokens = _tokens_by_id(vocabulary, added, rows, path)
    ids = {text: index for index, text in tokens.items()}
    byte_level = any(part.get("type") == "ByteLevel" for part in _pre_tokenizers(tokenizer))
    texts = [tokens.get(index, f"[PAD{index}]") for index in range(rows)]
    if byte_level:
        types = [_byte_level_type(index, tokens, added) for index in range(rows)]
        entries = [
            (Keys.Tokenizer.MODEL, "gpt2", Type.STRING),
            (Keys.Tokenizer.PRE, pre or _pre_name(tokenizer, path), Type.STRING),
        ]
    elif model.get("byte_fallback"):
        types = [_fallback_type(index, tokens, added) for index in range(rows)]
        entries = [
            (Keys.Tokenizer.MODEL, "gemma4", Type.STRING),
            (Keys.Tokenizer.PRE, pre or "gemma4", Type.STRING),
            (Keys.Tokenizer.SCORES, [_GEMMA_SCORE] * rows, Type.ARRAY, Type.FLOAT32),
            (Keys.Tokenizer.ADD_PREFIX, False, Type.BOOL),
        ]
    else:
        raise PlanError(f"{path}: expected a BPE that is byte-level or falls back to bytes, got one that is neither")
    if len(set(texts)) != rows:
        raise CheckpointError(f"{path}: two ids have the same text; the file is damaged")
    return [
        *entries,
        (Keys.Tokenizer.LIST, texts, Type.ARRAY, Type.STRING),
        (Keys.Tokenizer.TOKEN_TYPE, [int(kind) for kind in types], Type.ARRAY, Type.INT32),
        (Keys.Tokenizer.MERGES, _merges(model, path), Type.ARRAY, Type.STRING),
        *_special(folder, config, tokenizer, ids, rows, bos_by_default=not byte_level),
        *_chat_template(folder),
    ]


def _added_tokens(tokenizer: dict, path: Path) -> dict[int, dict]:
    added = tokenizer.get("added_tokens") or []
    sound = isinstance(added, list) and all(
        isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str)
        for token in added
    )
    if not sound:
        raise CheckpointError(f"{path}: expected added_tokens to be a list of objects with id and content")
    return {token["id"]: token for token in added}


def _tokens_by_id(vocabulary: dict, added: dict[int, dict], rows: int, path: Path) -> dict[int, str]:
    tokens: dict[int, str] = {}
    for text, index in [*vocabulary.items(), *((token["content"], index) for index, token in added.items())]:
        if type(index) is not int or index < 0:
            raise CheckpointError(f"{path}: token {text[:40]!r} has id {str(index)[:40]}; expected an integer from 0")
        if tokens.setdefault(index, text) != text:
            raise CheckpointError(f"{path}: id {index} is both {tokens[index][:40]!r} and {text[:40]!r}")
    last = max(tokens, default=0)
    if last >= rows:
        raise PlanError(
            f"{path}: token {tokens[last][:40]!r} has id {last}, but vocab_size in config.json is {rows}; "
            "the tokenizer belongs to another model or the embedding must be resized"
        )
    return tokens


def _byte_level_type(index: int, tokens: dict[int, str], added: dict[int, dict]) -> TokenType:
    if index not in tokens:
        return TokenType.UNUSED
    if index not in added:
        return TokenType.NORMAL
    special = added[index].get("special") or _LOOKS_SPECIAL.fullmatch(tokens[index])
    return TokenType.CONTROL if special else TokenType.USER_DEFINED


def _fallback_type(index: int, tokens: dict[int, str], added: dict[int, dict]) -> TokenType:
    if index not in tokens:
        return TokenType.UNUSED
    if _BYTE.fullmatch(tokens[index]):
        return TokenType.BYTE
    if tokens[index] in _GEMMA_SHOWN:
        return TokenType.USER_DEFINED
    return TokenType.CONTROL if added.get(index, {}).get("special") else TokenType.NORMAL


def _pre_tokenizers(tokenizer: dict) -> list[dict]:
    """The pre-tokenizer's steps, outermost sequence opened."""
    outer = tokenizer.get("pre_tokenizer")
    if not isinstance(outer, dict):
        return []
    steps = outer.get("pretokenizers") if outer.get("type") == "Sequence" else [outer]
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _pre_name(tokenizer: dict, path: Path) -> str:
    patterns = []
    for step in _pre_tokenizers(tokenizer):
        if step.get("type") == "Split":
            pattern = step.get("pattern")
            patterns.append(pattern.get("Regex") if isinstance(pattern, dict) else pattern)
        elif step.get("type") == "ByteLevel" and not step.get("use_regex", True):
            continue
        else:
            patterns.append(step.get("type"))
    name = PRE_BY_PATTERN.get(patterns[0]) if len(patterns) == 1 and isinstance(patterns[0], str) else None
    if name is None:
        shown = " then ".join(str(pattern)[:200] for pattern in patterns) or "none"
        raise PlanError(
            f"{path}: llama.cpp's name for the pre-tokenizer {shown} is not known here; "
            "give the name of an equal one, for instance --tokenizer-pre qwen35"
        )
    return name


def _merges(model: dict, path: Path) -> list[str]:
    """Merges as `left right`; a space inside a part is written as byte-level tokenizers write it."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: expected model.merges to be a list, got {type(merges).__name__}")
    lines = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
            raise CheckpointError(f"{path}: expected a merge of two tokens, got {str(merge)[:80]!r}")
        lines.append(" ".join(part.replace(" ", "Ġ") for part in parts))
    return lines


def _special(
    folder: Path, config: dict[str, Any], tokenizer: dict, ids: dict[str, int], rows: int, *, bos_by_default: bool
) -> list[tuple]:
    """Ids of begin, end, turn end, unknown and padding, and whether begin and end are put around a prompt."""
    own = _optional(folder / "tokenizer_config.json")
    others = (_optional(folder / "generation_config.json"), config.get("text_config", {}), config)

    def find(kind: str) -> int | None:
        token = own.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            return ids[text]
        for other in others:
            found = other.get(f"{kind}_token_id") if isinstance(other, dict) else None
            found = found[0] if isinstance(found, list) and found else found
            if type(found) is int and 0 <= found < rows:
                return found
        return None

    found = {kind: find(kind) for kind in ("bos", "eos", "unk", "pad")}
    turn_end = next((ids[text] for text in _TURN_ENDS if text in ids), None)
    keys = (
        (Keys.Tokenizer.BOS_ID, found["bos"]),
        (Keys.Tokenizer.EOS_ID, found["eos"]),
        (Keys.Tokenizer.EOT_ID, turn_end),
        (Keys.Tokenizer.UNK_ID, found["unk"]),
        (Keys.Tokenizer.PAD_ID, found["pad"]),
    )
    entries = [(key, index, Type.UINT32) for key, index in keys if index is not None]
    first, last = _template_ends(tokenizer)
    for kind, key, put in (
        ("bos", Keys.Tokenizer.ADD_BOS, first or bos_by_default),
        ("eos", Keys.Tokenizer.ADD_EOS, last),
    ):
        wanted = own.get(f"add_{kind}_token")
        wanted = wanted if isinstance(wanted, bool) else put
        entries.append((key, wanted and found[kind] is not None, Type.BOOL))  # the loader refuses true without an id
    return entries


def _template_ends(tokenizer: dict) -> tuple[bool, bool]:
    """Whether the post-processor's template for one sequence starts and ends with a special token."""
    outer = tokenizer.get("post_processor")
    outer = outer if isinstance(outer, dict) else {}
    steps = outer.get("processors") if outer.get("type") == "Sequence" else [outer]
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(single, list) and single and all(isinstance(piece, dict) for piece in single):
            return "SpecialToken" in single[0], "SpecialToken" in single[-1]
    return False, False


def _chat_template(folder: Path) -> list[tuple]:
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        text = read_text(path, what="a chat template", limit=MAX_TEMPLATE_BYTES)
        return [(Keys.Tokenizer.CHAT_TEMPLATE, text, Type.STRING)]
    template = _optional(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # named templates; llama.cpp's users pick the default one
        named = [item.get("template") for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0] if named else None
    return [(Keys.Tokenizer.CHAT_TEMPLATE, template, Type.STRING)] if isinstance(template, str) else []


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, limit=MAX_TOKENIZER_BYTES) if os.path.lexists(path) else {}
