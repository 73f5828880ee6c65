"""What a user asks of the types of a GGUF beyond its file type: llama-quantize's options, read the same way.

    --tensor-type REGEX=TYPE      the first pattern found anywhere in a tensor's name decides
    --token-embedding-type TYPE   token_embd.weight
    --output-tensor-type TYPE     output.weight; without one, the tied embedding unless a pattern names it
    --recipe FILE                 more of the first, one a line or with spaces between, as llama-quantize's
                                  --tensor-type-file; lines that begin with # are comments

Published mixes ("dynamic" quants) are such lists: one pattern for each tensor that differs from the mixture. As in
llama-quantize, patterns become lower case, the order of patterns decides, and vectors, norms and routers stay F32
whatever is asked. File types that are not quantized (F16, BF16, F32) hear patterns only where they ask for such a type,
as BF16 for a tensor that F16 cannot hold; llama-quantize ignores those too. Unlike there, an unknown type, a broken
pattern and a pattern that fits no tensor are told.

A pattern may be hostile, or merely unlucky: `(a+)+$` takes minutes on a name of thirty letters. Patterns have at most
MAX_PATTERN characters, names 64, and one search at most SEARCH_SECONDS, which the `regex` package keeps.

Source: llama.cpp, tools/quantize/quantize.cpp and src/llama-quant.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gguf

from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.files import read_text
from ornith_moe.quant.gguf_types import EMBEDDING, HEAD, block_shape
from ornith_moe.quant.names import did_you_mean

MAX_RECIPE_BYTES, MAX_PATTERNS, MAX_PATTERN = 4 << 20, 20_000, 512
SEARCH_SECONDS = 1.0
_NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}  # integers, and what activations become
_TYPES = {kind.name.lower(): kind.name for kind in gguf.GGMLQuantizationType if kind.name not in _NO_WEIGHTS}


@dataclass(frozen=True)
class Recipe:
    """Types asked for; `tensor_types` are (pattern, type)."""

    tensor_types: tuple[tuple[str, str], ...] = ()
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None

    def type_of(self, name: str, quantized: bool) -> str | None:
        """The type asked for tensor `name`, None if none is; quantized ones count only in a quantized file type.

        Raises:
            PlanError: a pattern that takes too long.
        """
        if name == EMBEDDING and self.token_embedding_type:
            return self.token_embedding_type
        if name == HEAD and self.output_tensor_type:
            return self.output_tensor_type
        allowed = (pair for pair in self._patterns if quantized or block_shape(pair[1])[0] == 1)
        return next((kind for pattern, kind in allowed if self._found(pattern, name)), None)

    def unused(self, names: Iterable[str]) -> list[str]:
        """Patterns that fit none of `names`."""
        names = list(names)
        return [pattern.pattern for pattern, _ in self._patterns if not any(self._found(pattern, n) for n in names)]

    @cached_property
    def _patterns(self) -> list:
        import regex  # `re` cannot be told to stop

        return [(regex.compile(pattern), kind) for pattern, kind in self.tensor_types]

    @staticmethod
    def _found(pattern, name: str) -> bool:
        try:
            return pattern.search(name, timeout=SEARCH_SECONDS) is not None
        except TimeoutError:
            raise PlanError(
                f"tensor type {pattern.pattern[:80]!r}: takes more than {SEARCH_SECONDS:g} s on {name}; "
                "write it without repeats inside repeats"
            ) from None


def parse_recipe(
    words: Iterable[str] = (),
    *,
    file: Path | None = None,
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
) -> Recipe:
    """A recipe from options as written: `words` are REGEX=TYPE and go before those of `file`.

    Raises:
        PlanError: a word that is not REGEX=TYPE, an unknown type, a pattern that is no regular expression or too long.
    """
    asked = [_tensor_type(word, "--tensor-type") for word in words]
    if file is not None:
        asked += [_tensor_type(word, file.name) for word in _words(file)]
    if len(asked) > MAX_PATTERNS:
        raise PlanError(f"recipe: expected at most {MAX_PATTERNS} tensor types, got {len(asked)}")
    return Recipe(
        tuple(asked),
        token_embedding_type and parse_type(token_embedding_type, "--token-embedding-type"),
        output_tensor_type and parse_type(output_tensor_type, "--output-tensor-type"),
    )


def parse_type(name: str, where: str) -> str:
    """The GGUF type of `name` in any case, for example Q4_K of "q4_k"."""
    try:
        return _TYPES[name.strip().lower().replace("-", "_")]
    except KeyError:
        near = did_you_mean(name, _TYPES.values())
        raise PlanError(
            f"{where}: {brief(name)} is no type{near}; expected one of {', '.join(_TYPES.values())}"
        ) from None


def _tensor_type(word: str, where: str) -> tuple[str, str]:
    import regex

    pattern, separator, kind = word.rpartition("=")
    if not separator or not pattern:
        raise PlanError(f"{where}: expected REGEX=TYPE, for example ffn_down_exps=q6_k, got {word[:80]!r}")
    if len(pattern) > MAX_PATTERN:
        raise PlanError(f"{where}: expected a pattern of at most {MAX_PATTERN} characters, got {len(pattern)}")
    pattern = pattern.lower()
    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise PlanError(f"{where}: {pattern[:80]!r} is no regular expression: {error}") from None
    return pattern, parse_type(kind, where)


def _words(file: Path) -> list[str]:
    lines = read_text(file, what="a recipe", limit=MAX_RECIPE_BYTES, named=True, error=PlanError).splitlines()
    return [word for line in lines if not line.lstrip().startswith("#") for word in line.split()]
