"""Which tensor of a model gets which GGUF type in a file type ("mixture").

The mixture rules are llama-quantize's, for the architectures we convert: they reproduce the five official
Ornith-1.0-35B files to the byte, and llama-quantize's own answer for every tensor of five models in every file type
below (tests/quant/gguf/test_mixtures.py). In the order in which they apply:

1. F32: vectors, norms, the router (`ffn_gate_inp`), the DeltaNet convolution, names that do not end in `.weight`.
2. What the user asks for (quant/gguf/tensor_types.py): the embedding, the head, then the first pattern that fits.
3. The output head, or the embedding where the two are tied: `FileType.head`, Q8_0 where columns do not divide.
4. MXFP4_MOE: expert stacks get MXFP4, everything else Q8_0.
5. `FileType.embedding`, then the first of `FileType.rules` whose kind and condition fit: values (`attn_v`, and
   `attn_qkv` of DeltaNet), `attn_output` and `ffn_down` need more bits than the rest. Values are counted in file order,
   and so is `ffn_down` of a dense model; a mixture of experts reads the layer from the name. Tensors that the user
   decided are not counted, but are members. Models of exactly eight experts get more bits in attention.
6. Everything else gets the type the file is named after.
7. A type whose block does not divide the columns gives way (`_FALLBACK`), and so does that: to F16.

Source: llama.cpp, src/llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import gguf

from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.gguf.tensor_types import EMBEDDING, HEAD, AskedTypes

# Encoded without importance, these are noise; llama-quantize refuses them too.
NEEDS_IMATRIX = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"}
UNMADE_WITHOUT_IMATRIX = {"IQ2_XXS", "IQ2_XS", "IQ1_S"}  # ggml encodes no tensor of these without, nor do our codecs


@dataclass(frozen=True, slots=True)
class Position:
    """What a rule may ask of a tensor: its number among `count` of its kind, its layer, and what is known besides."""

    index: int
    count: int
    layer: int  # of `layers`; in a dense model the index again
    layers: int
    gqa: int  # query heads per key head
    experts: int
    imatrix: bool


def always(position: Position) -> bool:
    return True


def more_bits(index: int, count: int) -> bool:
    """The first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def values_more_bits(position: Position) -> bool:
    return more_bits(position.index, position.count)


def layers_more_bits(position: Position) -> bool:
    return more_bits(position.layer, position.layers)


def first_eighth(position: Position) -> bool:
    return position.layer < position.layers // 8


def first_sixteenth(position: Position) -> bool:
    return position.layer < position.layers // 16


def counted_first_eighth(position: Position) -> bool:
    """Shared experts count too here, so it is fewer layers of a mixture of experts."""
    return position.index < position.layers // 8


def middle(position: Position) -> bool:
    return position.layers // 8 <= position.layer < 7 * position.layers // 8


def first_eighth_unless_imatrix(position: Position) -> bool:
    return first_eighth(position) and not position.imatrix


def first_eighth_with_imatrix(position: Position) -> bool:
    return first_eighth(position) and position.imatrix


def no_imatrix(position: Position) -> bool:
    return not position.imatrix


def first_two(position: Position) -> bool:
    return position.index < 2


def first_four(position: Position) -> bool:
    return position.index < 4


def few_key_heads(position: Position) -> bool:
    return position.gqa >= 4


def few_key_heads_or_experts(position: Position) -> bool:
    return position.gqa >= 4 or position.experts >= 4


def eight_experts(position: Position) -> bool:
    return position.experts == 8


def eight_experts_more_bits(position: Position) -> bool:
    return position.experts == 8 and layers_more_bits(position)


Rule = tuple[str, str, Callable[[Position], bool]]  # kind of tensor, type, condition


@dataclass(frozen=True)
class FileType:
    """A GGUF file type: the type most tensors get, and what the sensitive ones get instead."""

    name: str
    base: str
    rules: tuple[Rule, ...] = ()
    head: str = "Q6_K"  # output.weight, or the tied embedding
    embedding: str | None = None  # an untied embedding; None: as `base`
    needs_imatrix: frozenset[str] = frozenset(NEEDS_IMATRIX)  # types it must not encode without one

    @property
    def id(self) -> int:
        """llama.cpp's number for it, stored as general.file_type."""
        names = [f"MOSTLY_{self.name}", f"ALL_{self.name}"]
        return next(int(kind) for kind in gguf.LlamaFileType if kind.name in names)

    @property
    def quantized(self) -> bool:
        return block_shape(self.base)[0] > 1


def _mixture(name: str, base: str, *rules: Rule, low: bool = False, **more: Any) -> FileType:
    """A file type after what models of eight experts, which were Mixtral's, get first; `low`: also `attn_output`."""
    eight = (
        ("value", "Q8_0", eight_experts),
        ("attn_k", "Q8_0", eight_experts),
        ("attn_output", "Q5_K" if low else base, eight_experts),
    )
    return FileType(name, base, (*eight, *rules), **more)


def _two_bits(name: str, base: str, better: str, embedding: str, *rules: Rule) -> FileType:
    """IQ2: `better` is what sensitive tensors get."""
    return FileType(
        name,
        base,
        (
            ("value", "Q4_K", few_key_heads_or_experts),
            ("value", better, always),
            ("attn_k", "Q4_K", eight_experts),
            ("down", better, counted_first_eighth),
            ("attn_output", "Q5_K", eight_experts),
            *rules,
        ),
        head="Q5_K",
        embedding=embedding,
    )


_MORE = (("value", "Q6_K", values_more_bits), ("down", "Q6_K", layers_more_bits))
_IQ4 = (("value", "Q5_K", few_key_heads), ("down", "Q5_K", first_eighth_unless_imatrix))
_VALUE_Q4 = ("value", "Q4_K", few_key_heads)
FILE_TYPES = {
    kind.name: kind
    for kind in (
        FileType("F32", "F32"),
        FileType("F16", "F16"),
        FileType("BF16", "BF16"),
        _mixture("Q8_0", "Q8_0", head="Q8_0"),
        _mixture("Q6_K", "Q6_K"),
        _mixture("Q5_K_M", "Q5_K", *_MORE),
        _mixture("Q5_K_S", "Q5_K"),
        _mixture("Q4_K_M", "Q4_K", *_MORE, low=True),
        _mixture("Q4_K_S", "Q4_K", ("value", "Q5_K", first_four), ("down", "Q5_K", first_eighth), low=True),
        _mixture("Q3_K_L", "Q3_K", *((kind, "Q5_K", always) for kind in ("value", "down", "attn_output"))),
        _mixture(
            "Q3_K_M",
            "Q3_K",
            ("value", "Q5_K", first_two),
            ("value", "Q4_K", always),
            ("down", "Q5_K", first_sixteenth),
            ("down", "Q4_K", always),
            ("attn_output", "Q4_K", always),
            low=True,
        ),
        _mixture("Q3_K_S", "Q3_K", low=True),
        _mixture(
            "Q2_K",
            "Q2_K",
            _VALUE_Q4,
            ("value", "Q3_K", always),
            ("down", "Q3_K", always),
            ("attn_output", "Q3_K", always),
            low=True,
        ),
        _mixture(
            "Q2_K_S",
            "Q2_K",
            _VALUE_Q4,
            ("down", "Q4_K", first_eighth),
            needs_imatrix=frozenset({*NEEDS_IMATRIX, "Q2_K"}),
        ),
        _mixture("IQ4_XS", "IQ4_XS", *_IQ4, low=True),
        _mixture("IQ4_NL", "IQ4_NL", *_IQ4, low=True),
        _mixture(
            "IQ3_M",
            "IQ3_S",
            ("value", "Q4_K", always),
            ("down", "Q4_K", first_eighth),
            ("down", "Q4_K", eight_experts_more_bits),
            ("attn_output", "Q4_K", always),
            low=True,
        ),
        _mixture("IQ3_S", "IQ3_S", _VALUE_Q4, low=True),
        _mixture(
            "IQ3_XS",
            "IQ3_S",
            _VALUE_Q4,
            ("attn_k", "IQ3_XXS", always),
            ("attn_q", "IQ3_XXS", always),
            ("gate", "IQ3_XXS", middle),
            ("up", "IQ3_XXS", middle),
            low=True,
        ),
        _mixture(
            "IQ3_XXS",
            "IQ3_XXS",
            _VALUE_Q4,
            ("value", "IQ3_S", no_imatrix),
            ("attn_k", "IQ2_S", always),
            ("attn_q", "IQ2_S", always),
            ("down", "Q4_K", first_eighth_unless_imatrix),
            ("down", "Q3_K", no_imatrix),
            ("attn_output", "IQ3_S", always),
            low=True,
            head="Q5_K",
            embedding="IQ3_S",
        ),
        _two_bits("IQ2_M", "IQ2_S", "IQ3_S", "IQ3_S", ("attn_output", "IQ3_S", always)),
        _two_bits("IQ2_S", "IQ2_XS", "IQ3_S", "IQ3_S", ("attn_output", "IQ3_S", always)),
        _two_bits("IQ2_XS", "IQ2_XS", "Q2_K", "Q2_K"),
        _two_bits("IQ2_XXS", "IQ2_XXS", "Q2_K", "Q2_K"),
        _mixture("Q5_1", "Q5_1"),
        _mixture("Q5_0", "Q5_0", ("down", "Q5_1", first_eighth_with_imatrix)),
        _mixture("Q4_1", "Q4_1"),
        _mixture("Q4_0", "Q4_0", ("down", "Q4_1", first_eighth_with_imatrix)),
        _mixture("TQ2_0", "TQ2_0", embedding="Q4_K"),
        _mixture("TQ1_0", "TQ1_0", embedding="Q4_K"),
        FileType("MXFP4_MOE", "MXFP4", head="Q8_0"),
    )
}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FALLBACK |= dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0")
_FALLBACK |= dict.fromkeys(
    ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
)  # fmt: skip
_ALWAYS_F32 = re.compile(r"norm\.weight$|ffn_gate_inp|ssm_conv1d|(?<!\.weight)$")
_KINDS = {
    "value": re.compile(r"\.attn_(v|qkv|kv_b)\.weight$"),
    "attn_k": re.compile(r"\.attn_k\.weight$"),
    "attn_q": re.compile(r"\.attn_q\.weight$"),
    "attn_output": re.compile(r"\.attn_output\.weight$"),
    "up": re.compile(r"\.ffn_up"),
    "gate": re.compile(r"\.ffn_gate"),
    "down": re.compile(r"\.ffn_down"),
}


def tensor_types(
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    file_type: FileType,
    *,
    layers: int,
    experts: int,
    gqa: int = 1,
    imatrix: bool = False,
    asked: AskedTypes | None = None,
) -> tuple[dict[str, str], list[Fallback]]:
    """The type of each tensor of a GGUF, and one sentence for each that had to give way.

    Args:
        tensors: GGUF name and shape (Hugging Face order) of every tensor.
        layers: blocks of the model, MTP included.
        experts: routed experts per layer, 0 for a dense model.
        gqa: query heads per key head in the first block.
        imatrix: whether there is an importance matrix, which a few rules ask.
        asked: types the user asks for.
    Returns:
        ({name: type}, [fallback sentences]).
    """
    shapes = dict(tensors)
    tied = HEAD not in shapes
    ordered = sorted(shapes, key=lambda name: (_block(name), name))
    counts = Counter(filter(None, map(_kind, ordered)))
    seen: Counter[str] = Counter()

    def mixed(name: str, shape: tuple[int, ...]) -> str:
        """Rules 3 to 6."""
        if name == HEAD or (tied and name == EMBEDDING):
            if asked and asked.output_tensor_type:
                return asked.output_tensor_type
            return file_type.head if shape[-1] % block_shape(file_type.base)[0] == 0 else "Q8_0"
        if file_type.name == "MXFP4_MOE":
            return "MXFP4" if len(shape) == 3 and shape[0] > 1 else "Q8_0"
        if name == EMBEDDING:
            return file_type.embedding or file_type.base
        kind = _kind(name)
        if kind is None:
            return file_type.base
        index = seen[kind]
        seen[kind] += 1
        layer = _block(name) if experts > 1 else index
        position = Position(index, counts[kind], layer, layers, gqa, experts, imatrix)
        fitting = (wanted for of, wanted, condition in file_type.rules if of == kind and condition(position))
        return next(fitting, file_type.base)

    types, fallbacks = {}, []
    for name in ordered:
        shape = shapes[name]
        if len(shape) < 2 or _ALWAYS_F32.search(name):
            types[name] = "F32"
            continue
        wanted = asked and asked.type_of(name, file_type.quantized)
        if not wanted:
            wanted = mixed(name, shape) if file_type.quantized else file_type.base
        types[name] = fit(wanted, shape[-1])
        if types[name] != wanted:
            kind = f"{shape[-1]} columns are not whole {wanted} blocks, stored as {types[name]}"
            fallbacks.append(Fallback(name, kind))
    return types, fallbacks


def fit(kind: str, columns: int) -> str:
    """`kind`, or what gives way to it in rows of `columns` values that are not whole blocks."""
    for candidate in (kind, _FALLBACK.get(kind, kind), "F16"):
        if columns % block_shape(candidate)[0] == 0:
            return candidate
    raise AssertionError("F16 fits every row")


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), None)


def _block(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1
