"""GGUF types: what a row costs, and which tensor of a model gets which type in a file type ("mixture").

The mixture rules are llama-quantize's, as far as the file types below need them; they reproduce the five official
Ornith-1.0-35B files to the byte (tests/quant/test_builds.py). In the order in which they apply:

1. F32: vectors, norms, the router (`ffn_gate_inp`), the DeltaNet convolution, names that do not end in `.weight`.
2. The output head, or the embedding where the two are tied: Q6_K in a K mixture, Q8_0 in Q8_0.
3. In Q4_K_M and Q5_K_M, values (`attn_v`, and `attn_qkv` of DeltaNet) and `ffn_down` get Q6_K on the layers that need
   more bits: the first and last eighth, and every third between. Value tensors are counted in file order; the layer of
   an expert's `ffn_down` is read from its name.
4. Everything else gets the type the file is named after.
5. A type whose block does not divide the columns gives way: Q4_K to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0, then to F16.

Source: llama.cpp, src/llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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


@dataclass(frozen=True)
class FileType:
    """A GGUF file type: the type most tensors get, and what the sensitive ones get instead."""

    name: str
    base: str
    head: str  # output.weight, or the tied embedding
    more: str  # values and down projections on layers that need more bits

    @property
    def id(self) -> int:
        """llama.cpp's number for it, stored as general.file_type."""
        names = [f"MOSTLY_{self.name}", f"ALL_{self.name}"]
        return next(int(kind) for kind in gguf.LlamaFileType if kind.name in names)


FILE_TYPES = {
    kind.name: kind
    for kind in (
        FileType("F32", "F32", "F32", "F32"),
        FileType("F16", "F16", "F16", "F16"),
        FileType("BF16", "BF16", "BF16", "BF16"),
        FileType("Q8_0", "Q8_0", "Q8_0", "Q8_0"),
        FileType("Q6_K", "Q6_K", "Q6_K", "Q6_K"),
        FileType("Q5_K_M", "Q5_K", "Q6_K", "Q6_K"),
        FileType("Q4_K_M", "Q4_K", "Q6_K", "Q6_K"),
    )
}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_ALWAYS_F32 = re.compile(r"_norm\.weight$|norm\.weight$|ffn_gate_inp|ssm_conv1d|(?<!\.weight)$")
_VALUES = re.compile(r"\.attn_(v|qkv|kv_b)\.weight$")


def tensor_types(
    tensors: Iterable[tuple[str, tuple[int, ...]]], file_type: FileType, *, layers: int, experts: int
) -> tuple[dict[str, str], list[str]]:
    """The type of each tensor of a GGUF, and one sentence for each that had to give way.

    Args:
        tensors: GGUF name and shape (Hugging Face order) of every tensor.
        layers: blocks of the model, MTP included.
        experts: routed experts per layer, 0 for a dense model.
    Returns:
        ({name: type}, [fallback sentences]).
    """
    shapes = dict(tensors)
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    ordered = sorted(shapes, key=lambda name: (_block(name), name))
    values = [name for name in ordered if _VALUES.search(name)]
    downs = [name for name in ordered if ".ffn_down" in name]

    types, fallbacks = {}, []
    for name in ordered:
        shape = shapes[name]
        if len(shape) < 2 or _ALWAYS_F32.search(name):
            types[name] = "F32"
            continue
        kind = file_type.base
        if name == head:
            kind = file_type.head
        elif name in values and _needs_more_bits(values.index(name), len(values)):
            kind = file_type.more
        elif ".ffn_down" in name:
            index, count = (_block(name), layers) if experts > 1 else (downs.index(name), len(downs))
            if _needs_more_bits(index, count):
                kind = file_type.more
        types[name] = _fit(kind, shape[-1])
        if types[name] != kind:
            fallbacks.append(f"{name}: {shape[-1]} columns are not whole {kind} blocks, stored as {types[name]}")
    return types, fallbacks


def _needs_more_bits(index: int, count: int) -> bool:
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _fit(kind: str, columns: int) -> str:
    for candidate in (kind, _FALLBACK.get(kind, kind), "F16"):
        if columns % block_shape(candidate)[0] == 0:
            return candidate
    raise AssertionError("F16 fits every row")


def _block(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1
