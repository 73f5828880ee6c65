"""GGUF types: what a row costs, and which tensor of a model gets which type in a file type ("mixture").

The mixture rules are llama-quantize's, for the architectures we convert; they reproduce the five official
Ornith-1.0-35B files to the byte (tests/quant/test_builds.py). In the order in which they apply:

1. F32: vectors, norms, the router (`ffn_gate_inp`), the DeltaNet convolution, names that do not end in `.weight`.
2. The output head, or the embedding where the two are tied: `FileType.head`, Q6_K in nearly all.
3. MXFP4_MOE: expert stacks get MXFP4, everything else Q8_0.
4. The first of `FileType.rules` whose tensors and condition fit: values (`attn_v`, and `attn_qkv` of DeltaNet),
   `attn_output` and `ffn_down` need more bits than the rest. Values are counted in file order; so is `ffn_down` of a
   dense model, while a mixture of experts reads the layer from the name.
5. Models of exactly eight experts get more bits in attention (`EIGHT_EXPERTS`), whatever rule 4 says.
6. Everything else gets the type the file is named after.
7. A type whose block does not divide the columns gives way (`_FALLBACK`), and so does that: to F16.

Source: llama.cpp, src/llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import gguf


def block_shape(type_name: str) -> tuple[int, int]:
    """Values and bytes of one block of `type_name`, for example (32, 34) for Q8_0."""
    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    except KeyError:
        known = ", ".join(kind.name for kind in gguf.GGMLQuantizationType)
        raise ValueError(f"type_name: expected a GGUF type out of {known}; got {type_name!r}") from None


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of a row of `columns` values; ValueError if they do not fill whole blocks."""
    block, size = block_shape(type_name)
    if columns % block:
        raise ValueError(f"columns: {type_name} stores blocks of {block} values, got {columns}")
    return columns // block * size


@dataclass(frozen=True, slots=True)
class Place:
    """What a rule may ask of a tensor: its number among `count` of its kind, and what is known of model and data."""

    index: int
    count: int
    gqa: int  # query heads per key head
    imatrix: bool


def always(place: Place) -> bool:
    return True


def more_bits(place: Place) -> bool:
    """The first and last eighth, and every third between."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


def first_eighth(place: Place) -> bool:
    return place.index < place.count // 8


def first_sixteenth(place: Place) -> bool:
    return place.index < place.count // 16


def first_eighth_unless_imatrix(place: Place) -> bool:
    return first_eighth(place) and not place.imatrix


def first_eighth_with_imatrix(place: Place) -> bool:
    return first_eighth(place) and place.imatrix


def first_two(place: Place) -> bool:
    return place.index < 2


def first_four(place: Place) -> bool:
    return place.index < 4


def few_key_heads(place: Place) -> bool:
    return place.gqa >= 4


Rule = tuple[str, str, Callable[[Place], bool]]  # kind of tensor, type, condition


@dataclass(frozen=True)
class FileType:
    """A GGUF file type: the type most tensors get, and what the sensitive ones get instead."""

    name: str
    base: str
    head: str = "Q6_K"  # output.weight, or the tied embedding
    rules: tuple[Rule, ...] = ()

    @property
    def id(self) -> int:
        """llama.cpp's number for it, stored as general.file_type."""
        names = [f"MOSTLY_{self.name}", f"ALL_{self.name}"]
        return next(int(kind) for kind in gguf.LlamaFileType if kind.name in names)

    @property
    def quantized(self) -> bool:
        return block_shape(self.base)[0] > 1


_MORE = (("value", "Q6_K", more_bits), ("down", "Q6_K", more_bits))
_IQ4 = (("value", "Q5_K", few_key_heads), ("down", "Q5_K", first_eighth_unless_imatrix))
FILE_TYPES = {
    kind.name: kind
    for kind in (
        FileType("F32", "F32", "F32"),
        FileType("F16", "F16", "F16"),
        FileType("BF16", "BF16", "BF16"),
        FileType("Q8_0", "Q8_0", "Q8_0"),
        FileType("Q6_K", "Q6_K"),
        FileType("Q5_K_M", "Q5_K", rules=_MORE),
        FileType("Q5_K_S", "Q5_K"),
        FileType("Q4_K_M", "Q4_K", rules=_MORE),
        FileType("Q4_K_S", "Q4_K", rules=(("value", "Q5_K", first_four), ("down", "Q5_K", first_eighth))),
        FileType("Q3_K_L", "Q3_K", rules=tuple((kind, "Q5_K", always) for kind in ("value", "down", "attn_output"))),
        FileType(
            "Q3_K_M",
            "Q3_K",
            rules=(
                ("value", "Q5_K", first_two),
                ("value", "Q4_K", always),
                ("down", "Q5_K", first_sixteenth),
                ("down", "Q4_K", always),
                ("attn_output", "Q4_K", always),
            ),
        ),
        FileType("Q3_K_S", "Q3_K"),
        FileType(
            "Q2_K",
            "Q2_K",
            rules=(
                ("value", "Q4_K", few_key_heads),
                ("value", "Q3_K", always),
                ("down", "Q3_K", always),
                ("attn_output", "Q3_K", always),
            ),
        ),
        FileType("IQ4_XS", "IQ4_XS", rules=_IQ4),
        FileType("IQ4_NL", "IQ4_NL", rules=_IQ4),
        FileType("Q5_0", "Q5_0", rules=(("down", "Q5_1", first_eighth_with_imatrix),)),
        FileType("Q4_0", "Q4_0", rules=(("down", "Q4_1", first_eighth_with_imatrix),)),
        FileType("MXFP4_MOE", "MXFP4", "Q8_0"),
    )
}
# (kind, type, file types): quantized files of models with exactly eight experts, made for Mixtral.
_LOW_BITS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_XS", "IQ4_NL")
EIGHT_EXPERTS = (("value", "Q8_0", FILE_TYPES), ("attn_k", "Q8_0", FILE_TYPES), ("attn_output", "Q5_K", _LOW_BITS))
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL"}
_ALWAYS_F32 = re.compile(r"_norm\.weight$|norm\.weight$|ffn_gate_inp|ssm_conv1d|(?<!\.weight)$")
_KINDS = {
    "value": re.compile(r"\.attn_(v|qkv|kv_b)\.weight$"),
    "attn_k": re.compile(r"\.attn_k\.weight$"),
    "attn_output": re.compile(r"\.attn_output\.weight$"),
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
) -> tuple[dict[str, str], list[str]]:
    """The type of each tensor of a GGUF, and one sentence for each that had to give way.

    Args:
        tensors: GGUF name and shape (Hugging Face order) of every tensor.
        layers: blocks of the model, MTP included.
        experts: routed experts per layer, 0 for a dense model.
        gqa: query heads per key head in the first block.
        imatrix: whether the tensors are encoded with an importance matrix, which a few rules ask.
    Returns:
        ({name: type}, [fallback sentences]).
    """
    shapes = dict(tensors)
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    ordered = sorted(shapes, key=lambda name: (_block(name), name))
    members = {kind: [name for name in ordered if pattern.search(name)] for kind, pattern in _KINDS.items()}

    types, fallbacks = {}, []
    for name in ordered:
        shape = shapes[name]
        if len(shape) < 2 or _ALWAYS_F32.search(name):
            types[name] = "F32"
            continue
        kind = next((kind for kind, names in members.items() if name in names), None)
        if name == head:
            wanted = file_type.head
        elif file_type.name == "MXFP4_MOE":
            wanted = "MXFP4" if len(shape) == 3 else "Q8_0"
        else:
            by_name = kind == "down" and experts > 1
            index = _block(name) if by_name else members[kind].index(name) if kind else 0
            count = layers if kind == "down" else len(members[kind]) if kind else 0
            wanted = _by_rules(file_type, kind, Place(index, count, gqa, imatrix), experts)
        types[name] = _fit(wanted, shape[-1])
        if types[name] != wanted:
            fallbacks.append(f"{name}: {shape[-1]} columns are not whole {wanted} blocks, stored as {types[name]}")
    return types, fallbacks


def _by_rules(file_type: FileType, kind: str | None, place: Place, experts: int) -> str:
    if experts == 8 and file_type.quantized:
        for special, wanted, file_types in EIGHT_EXPERTS:
            if kind == special and file_type.name in file_types:
                return wanted
    for special, wanted, condition in file_type.rules:
        if kind == special and condition(place) and not (experts == 8 and kind == "attn_output"):
            return wanted
    return file_type.base


def _fit(kind: str, columns: int) -> str:
    for candidate in (kind, _FALLBACK.get(kind, kind), "F16"):
        if columns % block_shape(candidate)[0] == 0:
            return candidate
    raise AssertionError("F16 fits every row")


def _block(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1
