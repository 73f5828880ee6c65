"""Which token begins, ends, separates or pads, and which of them are put around a prompt, as GGUF keys.

llama.cpp's converter reads them from tokenizer_config.json by name, from the templates of tokenizer.json's
post-processor and from config.json by id; so does this file (`SpecialVocab` in gguf-py/gguf/vocab.py is the source).
Where none of them says, tokens that tokenizer.json lacks, generation_config.json and lists of ids are asked too.
"""

from __future__ import annotations

from typing import Any

from gguf import GGUFValueType as Type
from gguf import Keys

from ornith_moe.quant.gguf.header import Entry
from ornith_moe.quant.source.tokenizer_files import SPECIAL, TokenizerFiles, read_optional, token_text

_ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
    "eot": Keys.Tokenizer.EOT_ID,
}
_ADD_KEYS = {"bos": Keys.Tokenizer.ADD_BOS, "eos": Keys.Tokenizer.ADD_EOS, "sep": Keys.Tokenizer.ADD_SEP}


def special_entries(files: TokenizerFiles, config: dict[str, Any], rows: int, *, always_bos: bool) -> list[Entry]:
    """Ids, then what is added. `always_bos`: Gemma 4, which llama.cpp begins with BOS whatever the files say."""
    texts = {kind: token_text(files.config.get(f"{kind}_token")) for kind in SPECIAL}
    texts["bos"] = texts["bos"] or texts["cls"]
    texts["eos"] = texts["eos"] or texts["sep"]
    put = _put_around(files, texts)
    for kind in texts:
        wanted = files.config.get(f"add_{kind}_token")
        if isinstance(wanted, bool):
            put.setdefault(kind, wanted)
    if always_bos:
        put["bos"] = True
    ids = _ids(files, config, rows, texts)
    return [
        *(Entry(_ID_KEYS[kind], index, Type.UINT32) for kind, index in ids.items() if kind in _ID_KEYS),
        # The loader refuses true without an id.
        *(Entry(_ADD_KEYS[kind], put[kind] and kind in ids, Type.BOOL) for kind in put if kind in _ADD_KEYS),
    ]


def _ids(files: TokenizerFiles, config: dict[str, Any], rows: int, texts: dict[str, str | None]) -> dict[str, int]:
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    generation = read_optional(files.path.parent, "generation_config.json")
    own = {token["content"] for token in files.content.get("added_tokens") or []}
    every = {token.text: index for index, token in files.added.items()}
    ids: dict[str, int] = {}

    def take(kind: str, found: Any) -> None:
        if kind not in ids and type(found) is int and 0 <= found < rows:
            ids[kind] = found

    for kind, text in texts.items():
        take(kind, every.get(text) if text is not None and text in own else None)
    for kind in SPECIAL:
        key = f"{kind}_token_id"
        take(kind, inner.get(key) if config.get(key) is None else config[key])
    for kind, text in texts.items():
        take(kind, None if text is None else every.get(text))
    for kind in SPECIAL:
        for where in (generation, inner, config):
            found = where.get(f"{kind}_token_id")
            take(kind, found[0] if isinstance(found, list) and found else found)
    return ids


def _put_around(files: TokenizerFiles, texts: dict[str, str | None]) -> dict[str, bool]:
    """{kind: whether the post-processor puts it around a prompt}; `texts` gains what its templates name."""
    put: dict[str, bool] = {}
    for step in files.steps("post_processor", "processors"):
        if step.get("type") == "ByteLevel":
            put.setdefault("bos", False)
            put.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing":
            single, pair = _pieces(step.get("single")), _pieces(step.get("pair"))
            first = single[0][1] if len(single) > 1 and single[0][0] == "SpecialToken" else None
            last = single[-1][1] if len(single) > 1 and single[-1][0] == "SpecialToken" else None
            if first:
                texts["bos"] = texts["bos"] or first
                texts["cls"] = texts["cls"] or first
                put["bos"] = first in (texts["bos"], texts["cls"])
            if last:
                if last != texts["eos"] and texts["eos"]:
                    texts["eot"] = texts["eos"]
                texts["eos"] = last
                put["eos"] = True
            _between(pair, first, last, texts, put)
    return put


def _between(
    pair: list[tuple[str, str]], first: str | None, last: str | None, texts: dict[str, str | None], put: dict[str, bool]
) -> None:
    """Whether two sequences are separated: `A [sep] [eos] B`, once what is around them is taken off."""
    pair = pair[1:] if first and pair[:1] == [("SpecialToken", first)] else pair
    ends_so = last and pair[-1:] == [("SpecialToken", last)]
    pair = pair[:-1] if ends_so else pair
    if len(pair) > 2 and pair[0] == ("Sequence", "A") and pair[-1] == ("Sequence", "B"):
        separators = [text for kind, text in pair[1:-1] if kind == "SpecialToken"]
        known = [text in (texts["sep"], texts["eos"]) for text in separators]
        put["sep"] = bool(known and known[0] and not last) or (len(separators) == 2 and known[1])


def _pieces(template: Any) -> list[tuple[str, str]]:
    """[(SpecialToken or Sequence, its id)] of a template; [] where it is damaged."""
    pieces = []
    for piece in template if isinstance(template, list) else []:
        kind, value = next(iter(piece.items()), (None, None)) if isinstance(piece, dict) else (None, None)
        identity = value.get("id") if isinstance(value, dict) else None
        if kind not in ("SpecialToken", "Sequence") or not isinstance(identity, str):
            return []
        pieces.append((kind, identity))
    return pieces
