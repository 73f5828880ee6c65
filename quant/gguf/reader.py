"""Keys and tensors of a GGUF, read with every count held against the bytes that are left.

    "GGUF" | version u32 | tensors u64 | keys u64 | key ... | tensor info ... | padding | payload
    key          name, type u32, value: a number, a string, or an array (item type u32, count u64, items)
    tensor info  name, dimensions u32, sizes u64 each (fastest first), type u32, offset u64 into the payload

A file is hostile input: a header of 50 bytes may announce 2^60 items. A count is refused when that many of the smallest
such items cannot follow, a header beyond `MAX_HEADER_BYTES` as a whole, and tensors that repeat a name, leave their
alignment, are not whole blocks, overlap or end beyond the file. Arrays of numbers are one numpy view, and the payload
is not touched. Little-endian files of versions 2 and 3; arrays of arrays, which no program reads, are refused.

Source: the GGUF specification, docs/gguf.md in ggml; type numbers and block sizes of the `gguf` package.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from ornith_moe.quant.budget import budget
from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import open_file

MAX_HEADER_BYTES = 100_000_000  # a vocabulary of 250,000 tokens with its merges takes 11 MB
MAX_NAME_BYTES = (1 << 16) - 1  # the specification's limit for keys
KEY_BYTES, TENSOR_BYTES, STRING_BYTES = 13, 32, 8  # the least that one of each takes
KEY_MEMORY, TENSOR_MEMORY, STRING_MEMORY = 400, 800, 72  # the most that one of each holds beyond its bytes
STRING, ARRAY = 8, 9
NUMBERS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF: `shape` in Hugging Face order, `offset` from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_gguf_header(path: Path, *, named: bool = True) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Keys and tensors of the file `path`, in file order; `named`: the user named it.

    Returns:
        ({key: number, string, numpy array [n] or list of strings}, tensors).
    Raises:
        CheckpointError: not a GGUF, damaged or hostile.
    Example:
        keys, tensors = read_gguf_header(Path("model-Q8_0.gguf"))
        keys["general.architecture"], sum(tensor.nbytes for tensor in tensors)
    """
    with open_file(path, what="a GGUF", named=named) as file:
        reader = _Reader(file, path.name)
        if reader.take(4) != b"GGUF":
            raise reader.damaged("it does not begin with GGUF")
        version, tensor_count, key_count = reader.unpack("<IQQ")
        if version not in (2, 3):
            raise reader.damaged(f"version {version}, expected 2 or 3 in little-endian order")
        keys: dict[str, Any] = {}
        for _ in range(reader.count(key_count, KEY_BYTES, KEY_MEMORY)):
            name = reader.string(MAX_NAME_BYTES)
            if name in keys:
                raise reader.damaged(f"key {brief(name)} is there twice")
            keys[name] = reader.value()
        tensors = [reader.tensor() for _ in range(reader.count(tensor_count, TENSOR_BYTES, TENSOR_MEMORY))]
        return keys, _placed(reader, tensors, keys.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))


def _placed(reader: _Reader, tensors: list[GgufTensor], alignment: Any) -> list[GgufTensor]:
    """`tensors` with offsets from the start of the file, once they lie in it side by side."""
    if type(alignment) is not int or alignment not in (1 << shift for shift in range(17)):
        raise reader.damaged(f"alignment {brief(alignment)}, expected a power of two up to 65536")
    start = -(-reader.position // alignment) * alignment
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise reader.damaged("a tensor is there twice")
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset % alignment:
            raise reader.damaged(f"tensor {brief(tensor.name)} is not aligned to {alignment} bytes")
        if tensor.offset < end:
            raise reader.damaged(f"tensor {brief(tensor.name)} overlaps another")
        end = tensor.offset + tensor.nbytes
        if start + end > reader.size:
            raise reader.damaged(f"truncated, tensor {brief(tensor.name)} ends beyond its {reader.size} bytes")
    return [GgufTensor(t.name, t.dtype, t.shape, start + t.offset, t.nbytes) for t in tensors]


class _Reader:
    """A cursor over a header that never asks for more bytes than the file and the limit leave."""

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name, self.position = file, name, 0
        self.size = os.fstat(file.fileno()).st_size

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: not a whole GGUF: {what} (near byte {self.position}); fetch it again")

    def count(self, count: int, least_bytes: int, memory: int = 0) -> int:
        """`count`, refused where so many items of at least `least_bytes` cannot follow or fit into memory."""
        left = min(self.size, MAX_HEADER_BYTES) - self.position
        if count * least_bytes > left:
            raise self.damaged(
                f"{count} times {least_bytes} bytes are announced and {left} are left "
                f"(file of {self.size}, limit of a header {MAX_HEADER_BYTES})"
            )
        budget().take(count * memory, f"{self.name}: {count} items of its header")
        return count

    def take(self, length: int) -> bytes:
        data = self.file.read(self.count(1, length) * length)
        if len(data) != length:
            raise self.damaged("the file was cut short while it was read")
        self.position += length
        return data

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self, limit: int = MAX_HEADER_BYTES) -> str:
        (length,) = self.unpack("<Q")
        if length > limit:
            raise self.damaged(f"a string of {length} bytes, expected at most {limit}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("a string is not UTF-8") from None

    def value(self) -> Any:
        (kind,) = self.unpack("<I")
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.numbers(kind, 1)[0].item()
        item, count = self.unpack("<IQ")
        if item == STRING:
            return [self.string() for _ in range(self.count(count, STRING_BYTES, STRING_MEMORY))]
        return self.numbers(item, count)

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in NUMBERS:
            raise self.damaged(f"a value of type {kind}, expected a number or a string")
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(self.count(count, dtype.itemsize) * dtype.itemsize), dtype)

    def tensor(self) -> GgufTensor:
        """The next tensor info; its offset counts from the payload."""
        name = self.string(MAX_NAME_BYTES)
        (dimensions,) = self.unpack("<I")
        if not 1 <= dimensions <= 4:
            raise self.damaged(f"tensor {brief(name)} has {dimensions} dimensions, expected 1 to 4")
        shape = self.unpack(f"<{dimensions}Q")[::-1]
        number, offset = self.unpack("<IQ")
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise self.damaged(f"tensor {brief(name)} is of type {number}, which is unknown") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self.damaged(f"tensor {brief(name)} has rows of {shape[-1]} values, not whole {kind.name} blocks")
        return GgufTensor(name, kind.name, shape, offset, math.prod(shape) // block * block_bytes)
