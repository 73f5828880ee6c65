"""What a block and a row of a GGUF type take."""

from __future__ import annotations

import gguf

from ornith_moe.quant.errors import brief


def block_shape(type_name: str) -> tuple[int, int]:
    """Values and bytes of one block of `type_name`, for example (32, 34) for Q8_0."""
    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    except KeyError:
        known = ", ".join(kind.name for kind in gguf.GGMLQuantizationType)
        raise ValueError(f"type_name: expected a GGUF type out of {known}; got {brief(type_name)}") from None


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of a row of `columns` values; ValueError if they do not fill whole blocks."""
    block, size = block_shape(type_name)
    if columns % block:
        raise ValueError(f"columns: {type_name} stores blocks of {block} values, got {columns}")
    return columns // block * size
