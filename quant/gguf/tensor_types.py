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

Patterns are compiled and searched within one budget for all of them (quant/patterns.py).

Source: llama.cpp, tools/quantize/quantize.cpp and src/llama-quant.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gguf

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.files import read_text
from ornith_moe.quant.names import did_you_mean
from ornith_moe.quant.patterns import Patterns

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
MAX_RECIPE_BYTES, MAX_PATTERNS = 4 << 20, 20_000
_NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}  # integers, and what activations become
_TYPES = {kind.name.lower(): kind.name for kind in gguf.GGMLQuantizationType if kind.name not in _NO_WEIGHTS}


@dataclass(frozen=True)
class AskedTypes:
    """Types asked for; `tensor_types` are (pattern, type)."""

    tensor_types: tuple[tuple[str, str], ...] = ()
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None

    def type_of(self, name: str, quantized: bool) -> str | None:
        """The type asked for tensor `name`, None if none is; quantized ones count only in a quantized file type.

        Raises:
            PlanError: the patterns take too long.
        """
        if name == EMBEDDING and self.token_embedding_type:
            return self.token_embedding_type
        if name == HEAD and self.output_tensor_type:
            return self.output_tensor_type
        patterns, kinds = self._plain if not quantized else self._all
        index = patterns.first(name)
        return None if index is None else kinds[index]

    def unused(self, names: Iterable[str]) -> list[str]:
        """Patterns that fit none of `names`."""
        return self._all[0].unused(names)

    @cached_property
    def _all(self) -> tuple[Patterns, list[str]]:
        return Patterns(pattern for pattern, _ in self.tensor_types), [kind for _, kind in self.tensor_types]

    @cached_property
    def _plain(self) -> tuple[Patterns, list[str]]:
        """Patterns that ask for a type without blocks."""
        plain = [(pattern, kind) for pattern, kind in self.tensor_types if block_shape(kind)[0] == 1]
        return Patterns(pattern for pattern, _ in plain), [kind for _, kind in plain]


@budgeted
def parse_asked_types(
    words: Iterable[str] = (),
    *,
    file: Path | None = None,
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
) -> AskedTypes:
    """What options ask as they are written: `words` are REGEX=TYPE and go before those of `file`.

    Raises:
        PlanError: a word that is not REGEX=TYPE, an unknown type, a pattern that is no regular expression or too long.
    """
    asked = [_tensor_type(word, "--tensor-type") for word in words]
    if file is not None:
        asked += [_tensor_type(word, file.name) for word in _words(file)]
    if len(asked) > MAX_PATTERNS:
        raise PlanError(f"recipe: expected at most {MAX_PATTERNS} tensor types, got {len(asked)}")
    types = AskedTypes(
        tuple(asked),
        token_embedding_type and parse_type(token_embedding_type, "--token-embedding-type"),
        output_tensor_type and parse_type(output_tensor_type, "--output-tensor-type"),
    )
    if asked:
        _ = types._all  # compiled here: a broken pattern is told before a checkpoint is opened
    return types


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
    pattern, separator, kind = word.rpartition("=")
    if not separator or not pattern:
        raise PlanError(f"{where}: expected REGEX=TYPE, for example ffn_down_exps=q6_k, got {brief(word, 80)}")
    return pattern.lower(), parse_type(kind, where)


def _words(file: Path) -> list[str]:
    lines = read_text(file, what="a recipe", limit=MAX_RECIPE_BYTES, named=True, error=PlanError).splitlines()
    return [word for line in lines if not line.lstrip().startswith("#") for word in line.split()]
