"""The header of a GGUF as bytes: what quant/gguf/reader.py reads, written.

    "GGUF" | version 3 | tensors | keys | key ... | tensor info ... | padding to 32 bytes

Arrays are packed whole, numbers by numpy and strings in one join: a vocabulary with its merges has 750,000 items, which
the `gguf` package packs one by one, into the same bytes (tests/quant/gguf/test_header.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGUFValueType as Type

from ornith_moe.quant.gguf.reader import NUMBERS

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
VERSION = 3


class Entry(NamedTuple):
    """One key of a GGUF; the fields are the arguments of `gguf.GGUFWriter.add_key_value`."""

    key: str
    value: Any
    type: Type
    sub_type: Type | None = None  # of an array's items


def padded(length: int) -> int:
    """`length` up to the next multiple of the alignment."""
    return length + -length % ALIGNMENT


def gguf_header(entries: Sequence[Entry], tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The bytes before the payload of a GGUF whose tensors follow one another, each aligned.

    Args:
        entries: keys in file order, each once.
        tensors: (name, GGUF type, shape in Hugging Face order, bytes) in file order.
    """
    infos, offset = [], 0
    for name, dtype, shape, nbytes in tensors:
        kind = gguf.GGMLQuantizationType[dtype]
        infos.append(_strings([name]) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset))
        offset += padded(nbytes)
    keys = [_strings([entry.key]) + _value(entry) for entry in entries]
    header = b"GGUF" + struct.pack("<IQQ", VERSION, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    return header.ljust(padded(len(header)), b"\0")


def _value(entry: Entry) -> bytes:
    if entry.type != Type.ARRAY:
        return struct.pack("<I", entry.type) + _items([entry.value], entry.type)
    return struct.pack("<IIQ", Type.ARRAY, entry.sub_type, len(entry.value)) + _items(entry.value, entry.sub_type)


def _items(values: Sequence[Any], kind: Type) -> bytes:
    if kind == Type.STRING:
        return _strings(values)
    return np.array(values, NUMBERS[kind]).tobytes()


def _strings(texts: Sequence[str]) -> bytes:
    raws = [text.encode() for text in texts]
    prefixes = {length: struct.pack("<Q", length) for length in set(map(len, raws))}
    return b"".join([prefixes[len(raw)] + raw for raw in raws])
