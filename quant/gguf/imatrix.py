"""Importance matrices: how much each input column of a weight matters, read from and written to llama.cpp's files.

    importance[e, k] = sum over the tokens t that matrix e saw of x[t, k]^2, divided by how many tokens that were

One entry per tensor of a GGUF, by its GGUF name and in the order of its GGUF columns, so that what llama-imatrix made
fits our builds and what we make (ornith_moe/imatrix.py) fits llama-quantize. A stack of experts has one row and one
count for each expert. Two formats are read:

    GGUF   tensors NAME.in_sum2 [E, K] and NAME.counts [E, 1], F32; keys imatrix.datasets, .chunk_count, .chunk_size;
           ours also NAME.in_max [E, 1], the largest |x| that each matrix saw, which llama.cpp's reader passes over
    .dat   the older one: entries i32 | per entry: length i32, name, calls i32, values i32, f32 ... | chunks i32 |
           length i32, dataset; sums are stored as mean * calls, one number of calls for all experts

A matrix that no token reached, or whose row is zero, counts every column as 1, as in llama-quantize: its weights are
encoded as if all columns mattered alike, never divided by nothing. An entry is refused if its size is not that of its
tensor, a file if it has no entry for the model at all; what is missing or unknown otherwise is reported.

A file is hostile input: every length is held against the bytes that are left, numbers must be finite and not negative,
and values stay on disk until a row is asked for, so an importance matrix of 1 GB (397B) costs no memory.

Source: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp. Letters: E matrices, K columns.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import xxhash
from gguf import GGUFValueType as Type

from ornith_moe.quant.budget import budget, budgeted
from ornith_moe.quant.errors import CheckpointError, ConversionError, PlanError, brief
from ornith_moe.quant.files import open_file
from ornith_moe.quant.gguf import header as gguf_header
from ornith_moe.quant.gguf.reader import read_gguf_header
from ornith_moe.quant.gguf.tensor_types import EMBEDDING

SUMS, COUNTS, LARGEST = ".in_sum2", ".counts", ".in_max"
MAX_NAME_BYTES = 1 << 10
MAX_BYTES, MAX_VALUES = 2 << 30, 1 << 24  # of a file, that of the 397B has 1 GB; of an entry, the largest has 2^21
MAX_OTHER_BYTES = 16 << 20  # names and padding
MAX_TABLE_BYTES = 256 << 20
ENTRY_MEMORY = 600  # of an entry, beside its counts
READ_BYTES = 4 << 20
LONGEST_TEXT = 127  # bytes of a text that llama-quantize copies into a GGUF
# ggml's encoders of all others take no importance, or none that changes a byte.
USES_IMATRIX = {
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M",
}  # fmt: skip
_FUSED = re.compile(r"\.ffn_(gate|up)_exps\.weight$")  # share their input, and one tensor in some GGUFs


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file says of one tensor: `size` fp32 sums at `offset`, and counts [E], or [1] for all of them.

    `largest`: the largest magnitude that any of its matrices saw; None where the file does not say.
    """

    name: str
    offset: int
    size: int
    counts: np.ndarray
    largest: float | None = None


@dataclass(frozen=True, slots=True)
class Coverage:
    """How well one tensor is covered: `covered` of its `matrices` were reached, by `least` to `most` tokens."""

    tensor: str
    type: str
    matrices: int
    covered: int
    least: int
    most: int


class Imatrix:
    """An importance matrix whose values lie in an open file; made by `open_imatrix`."""

    def __init__(
        self, file: BinaryIO, name: str, entries: Mapping[str, Entry], keys: Mapping[str, Any], *, legacy: bool
    ):
        self._file, self._legacy, self.name = file, legacy, name
        self.entries = dict(entries)
        self.datasets = tuple(keys.get("imatrix.datasets", ()))
        chunks = (keys.get(f"imatrix.chunk_{what}", 0) for what in ("count", "size"))
        self.chunk_count, self.chunk_size = (number if 0 <= number < 1 << 31 else 0 for number in chunks)
        self.architecture = keys.get("general.architecture")
        self.digest = self._check()

    def _check(self) -> str:
        """Digest of the file, once every number in it is known to be sound."""
        size, owned = os.fstat(self._file.fileno()).st_size, sum(4 * entry.size for entry in self.entries.values())
        if size > 3 * owned + MAX_OTHER_BYTES:  # some programs write `in_sum` and more of the same size beside ours
            raise CheckpointError(f"{self.name}: has {size} bytes and sums of {owned}; not a whole importance matrix")
        for entry in self.entries.values():
            if entry.size > MAX_VALUES:
                raise CheckpointError(
                    f"{self.name}: entry {brief(entry.name)} has {entry.size} sums, expected at most {MAX_VALUES}"
                )
            if not _sound(entry.counts):
                raise CheckpointError(
                    f"{self.name}: entry {brief(entry.name)} has counts that are not numbers from 0 on"
                )
            if entry.largest is not None and not 0 <= entry.largest < np.inf:
                raise CheckpointError(
                    f"{self.name}: entry {brief(entry.name)} has a largest magnitude of {entry.largest}, expected a "
                    "number from 0 on"
                )
            for start in range(0, entry.size, READ_BYTES // 4):
                values = self._values(entry, start, min(READ_BYTES // 4, entry.size - start))
                if not _sound(values):
                    bad = start + int(np.argmin(np.isfinite(values) & (values >= 0)))
                    raise CheckpointError(
                        f"{self.name}: entry {brief(entry.name)}, value {bad} is {values[bad - start]}; expected "
                        "finite sums of squares, so make the importance matrix again"
                    )
        digest = xxhash.xxh3_128()
        self._file.seek(0)
        while block := self._file.read(READ_BYTES):
            digest.update(block)
        return digest.hexdigest()

    def _values(self, entry: Entry, start: int, count: int) -> np.ndarray:
        data = os.pread(self._file.fileno(), 4 * count, entry.offset + 4 * start)
        if len(data) != 4 * count:
            raise ConversionError(f"{self.name}: was cut short while it was used; begin again with the whole file")
        return np.frombuffer(data, "<f4")

    def entry_of(self, tensor: str) -> Entry | None:
        """The entry of a GGUF tensor; gate and up of experts may share that of their fusion, as they share inputs."""
        return self.entries.get(tensor) or self.entries.get(_FUSED.sub(".ffn_gate_up_exps.weight", tensor))

    def importance(self, tensor: str, matrix: int, columns: int) -> np.ndarray:
        """Mean square of each input column of matrix `matrix` of `tensor`: float32 [K], ones if it was never reached.

        Thread-safe; reads K values from disk.
        """
        entry = self.entry_of(tensor)
        assert entry is not None, tensor  # asked only of those that have one
        values = self._values(entry, matrix * columns, columns)
        count = np.rint(entry.counts[matrix if entry.counts.size > 1 else 0])
        if count > 0:
            values = values / count
        elif not self._legacy:  # a .dat without calls holds means already
            return np.ones(columns, np.float32)
        return values if values.any() else np.ones(columns, np.float32)

    def match(self, tensors: Mapping[str, tuple[tuple[int, ...], str]], architecture: str) -> list[Coverage]:
        """Hold the entries against the tensors of a model.

        Args:
            tensors: {GGUF name: (shape in Hugging Face order, GGUF type)} of those that importance can serve.
            architecture: of the model, as GGUF names it.
        Returns:
            Coverage of each tensor that has an entry; the others are encoded without importance.
        Raises:
            PlanError: of another architecture, another number of experts or columns, or without an entry in common.
        """
        if self.architecture not in (None, architecture, "imatrix"):
            raise PlanError(f"{self.name}: was made for a {brief(self.architecture)}, the model is {architecture}")
        found = []
        for name, (shape, kind) in tensors.items():
            entry = self.entry_of(name)
            if entry is None:
                continue
            matrices, columns = (shape[0] if len(shape) == 3 else 1), shape[-1]
            if entry.size != matrices * columns or entry.counts.size not in (1, matrices):
                if name == EMBEDDING:  # files of other programs hold something of their own under this name
                    continue
                raise PlanError(
                    f"{self.name}: entry {brief(name)} has {entry.size} values and {entry.counts.size} counts, the "
                    f"tensor {matrices} matrices of {columns} columns; it was made for another model"
                )
            counts = np.broadcast_to(np.rint(entry.counts), matrices)
            found.append(Coverage(name, kind, matrices, int((counts > 0).sum()), int(counts.min()), int(counts.max())))
        if tensors and not found:
            raise PlanError(
                f"{self.name}: has {len(self.entries)} entries, the first {brief(min(self.entries))}, and none for "
                f"this model, whose first tensor is {brief(min(tensors))}"
            )
        return found

    def metadata(self) -> dict[str, str | int]:
        """What llama-quantize writes about an importance matrix into a GGUF, file names without their folders."""
        keys: dict[str, str | int] = {"quantize.imatrix.file": _text(self.name)}
        if self.datasets:
            keys["quantize.imatrix.dataset"] = _text(re.split(r"[/\\]", self.datasets[0])[-1])
        keys["quantize.imatrix.entries_count"] = len(self.entries)
        if self.chunk_count > 0:
            keys["quantize.imatrix.chunks_count"] = self.chunk_count
        return keys

    def close(self) -> None:
        self._file.close()


@budgeted
def open_imatrix(path: str | Path) -> Imatrix:
    """The importance matrix in `path`, GGUF or .dat, checked from end to end.

    Raises:
        CheckpointError: no file, neither format, damaged or hostile, or a number that is not finite.
    Example:
        >>> imatrix = open_imatrix("imatrix.gguf")  # doctest: +SKIP
        >>> imatrix.importance("blk.0.ffn_down_exps.weight", 17, 512)  # doctest: +SKIP
    """
    path = Path(path)
    file = open_file(path, what="an importance matrix, a .gguf or .dat file", limit=MAX_BYTES, named=True)
    try:
        legacy = file.read(4) != b"GGUF"
        entries, keys = _read_legacy(file, path.name) if legacy else _read_gguf(file, path)
        return Imatrix(file, path.name, entries, keys, legacy=legacy)
    except BaseException:
        file.close()
        raise


def _read_gguf(file: BinaryIO, path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    keys, tensors = read_gguf_header(path)
    if keys.get("general.type", "imatrix") != "imatrix":
        raise CheckpointError(f"{path.name}: is a GGUF but no importance matrix; expected general.type imatrix")
    tables = budget().part(MAX_TABLE_BYTES)
    by_name = {tensor.name: tensor for tensor in tensors}
    entries = {}
    for tensor in tensors:
        if not tensor.name.endswith(SUMS):
            continue
        name = tensor.name.removesuffix(SUMS)
        counts = by_name.get(name + COUNTS)
        if counts is None or (tensor.dtype, counts.dtype) != ("F32", "F32"):
            raise CheckpointError(f"{path.name}: entry {brief(name)} lacks counts, or is not F32; make it again")
        size, many = tensor.nbytes // 4, counts.nbytes // 4
        tables.take(ENTRY_MEMORY + counts.nbytes, f"{path.name}: counts of entry {brief(name)}")
        if not many or size % many:
            raise CheckpointError(f"{path.name}: entry {brief(name)} has {size} sums for {many} counts; make it again")
        file.seek(counts.offset)
        found = np.frombuffer(file.read(counts.nbytes), "<f4")
        largest = by_name.get(name + LARGEST)
        if largest is None or (largest.dtype, largest.nbytes) != ("F32", counts.nbytes):
            entries[name] = Entry(name, tensor.offset, size, found)
            continue
        file.seek(largest.offset)
        most = float(np.frombuffer(file.read(largest.nbytes), "<f4").max())
        entries[name] = Entry(name, tensor.offset, size, found, most)
    if not entries:
        raise CheckpointError(f"{path.name}: is a GGUF but no importance matrix: no tensor ends in {SUMS}")
    kinds = {"imatrix.datasets": list, "imatrix.chunk_count": int, "imatrix.chunk_size": int}
    kinds["general.architecture"] = str
    return entries, {key: value for key, value in keys.items() if key in kinds and type(value) is kinds[key]}


def _read_legacy(file: BinaryIO, name: str) -> tuple[dict[str, Entry], dict[str, Any]]:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{name}: not an importance matrix: {what} (near byte {file.tell()})")

    def integer(least: int, most: int, what: str) -> int:
        data = file.read(4)
        (value,) = struct.unpack("<i", data) if len(data) == 4 else (-1,)
        if not least <= value <= most:
            raise damaged(f"expected {least} to {most} {what}, got {value if len(data) == 4 else 'the end'}")
        return value

    def left(item: int) -> int:
        return (size - file.tell()) // item

    entries, tables = {}, budget().part(MAX_TABLE_BYTES)
    for _ in range(integer(1, max(size // 17, 1), "entries")):
        try:
            entry = file.read(integer(1, min(MAX_NAME_BYTES, max(left(1) - 4, 1)), "bytes of a name")).decode()
        except UnicodeDecodeError:
            raise damaged("a name is not UTF-8") from None
        tables.take(ENTRY_MEMORY + MAX_NAME_BYTES, f"{name}: its entries")
        calls = integer(-(1 << 31), (1 << 31) - 1, "calls")
        count = integer(1, max(left(4) - 1, 1), "values")
        if entry in entries or count > left(4):
            raise damaged(f"entry {brief(entry)} is there twice or cut short")
        entries[entry] = Entry(entry, file.tell(), count, np.array([max(calls, 0)], "<f4"))
        file.seek(4 * count, os.SEEK_CUR)
    keys: dict[str, Any] = {}
    if left(4):
        keys["imatrix.chunk_count"] = max(integer(-(1 << 31), (1 << 31) - 1, "chunks"), 0)
    if left(4):
        dataset = file.read(integer(0, min(MAX_NAME_BYTES << 6, max(left(1) - 4, 0)), "bytes of a dataset's name"))
        keys["imatrix.datasets"] = [dataset.decode(errors="replace")] if dataset else []
    return entries, keys


def write_imatrix(
    file: BinaryIO,
    entries: Iterable[tuple[str, int, int]],
    values: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    architecture: str,
    datasets: list[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Write an importance matrix as llama-imatrix does, and the largest magnitudes.

    Args:
        file: open to be written, left open.
        entries: (GGUF name, E, K) of every tensor, in file order.
        values: sums of squares float32 [E, K], counts and largest magnitudes float32 [E] of each, asked for one by one.
        architecture: general.architecture, which llama-imatrix leaves out; `match` holds it against the model.
        datasets: names of the texts. chunk_count, chunk_size: how many chunks of how many tokens.
    """
    entries = list(entries)
    tensors = [
        (name + suffix, "F32", (matrices, width), 4 * matrices * width)
        for name, matrices, columns in entries
        for suffix, width in ((SUMS, columns), (COUNTS, 1), (LARGEST, 1))
    ]
    keys = [
        gguf_header.Entry(gguf.Keys.General.ARCHITECTURE, architecture, Type.STRING),
        gguf_header.Entry(gguf.Keys.General.TYPE, "imatrix", Type.STRING),
        gguf_header.Entry("imatrix.datasets", datasets, Type.ARRAY, Type.STRING),
        gguf_header.Entry("imatrix.chunk_count", chunk_count, Type.UINT32),
        gguf_header.Entry("imatrix.chunk_size", chunk_size, Type.UINT32),
    ]
    file.write(gguf_header.gguf_header(keys, tensors))
    for of_tensor in values:
        for array in of_tensor:
            payload = np.ascontiguousarray(array, "<f4").tobytes()
            file.write(payload.ljust(gguf_header.padded(len(payload)), b"\0"))


def _sound(values: np.ndarray) -> bool:
    return bool((np.isfinite(values) & (values >= 0)).all())


def _text(text: str) -> str:
    return text.encode(errors="replace")[:LONGEST_TEXT].decode(errors="ignore")
