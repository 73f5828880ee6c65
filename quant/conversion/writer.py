"""Encoded bytes on their way into the files of a conversion: collected to whole chunks that go past the page cache.

    write(unit, pieces) -> chunks of CHUNK bytes fill up -> whole ones leave, O_DIRECT, DEPTH at a time -> done(unit)

Copying into the page cache costs more than encoding FP8: half of all CPU time of such a conversion, and the pages of
the source with it. Direct writing takes whole pages in aligned memory, while pieces begin and end anywhere, so they are
put together first. Pieces come in about the order of a file, in a few streams (gate, up, down, scales), so few chunks
are open; one that stays open for long, or is not whole at the end, goes through the page cache after all. A disk that
is asked for one write after another is idle in between: four at a time were written at twice the rate. A unit is done
when all of its bytes have left: only then may a journal claim it.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import numpy as np

from ornith_moe.quant.files import past_the_cache
from ornith_moe.quant.memory import huge_pages

CHUNK = 4 << 20  # written at a time; a power of two, and whole pages
DEPTH = 4  # chunks on their way at a time
MOST_OPEN_CHUNKS = 24  # of all files: gate, up, down and their scales of a few builds
Range = tuple[int, int]  # first byte, and the one after the last


@dataclass(frozen=True)
class Piece:
    """Bytes for a file: the name of its build, its number, where they go, how many, and their digest."""

    build: str
    file: int
    offset: int
    length: int
    digest: str
    payload: memoryview


@dataclass
class _Chunk:
    """Bytes of a file from `start` on, as far as they have come."""

    start: int
    missing: int  # bytes that weights own and that have not come
    memory: np.ndarray  # of bytes
    ranges: list[Range] = field(default_factory=list)  # that have come, in the file
    units: list[int] = field(default_factory=list)  # each once for each of its ranges


class Writer:
    """The files of a conversion by their descriptors; `owned` are the ranges of each, in order, that weights own.

    `done` hears of each unit whose bytes have left, at the latest when the writer is left. Used by one thread.
    """

    def __init__(
        self,
        descriptors: Sequence[int],
        sizes: Sequence[int],
        owned: Sequence[Sequence[Range]],
        done: Callable[[int], None],
    ):
        self._descriptors, self._sizes, self._done = descriptors, sizes, done
        self._owned = [_by_chunk(ranges) for ranges in owned]  # of each file: {start of a chunk: owned bytes in it}
        self._direct = [past_the_cache(descriptor, os.O_WRONLY) for descriptor in descriptors]
        self._opened = [descriptor for descriptor in self._direct if descriptor is not None]
        self._open: dict[tuple[int, int], _Chunk] = {}  # by file and start; the oldest first
        self._through: set[tuple[int, int]] = set()  # chunks of which a part went through the page cache
        self._waiting: dict[int, int] = {}  # unit -> its ranges in open chunks
        self._free: list[np.ndarray] = []
        self._pool = ThreadPoolExecutor(DEPTH)
        self._leaving: deque[tuple[tuple[int, int], _Chunk, Future[None]]] = deque()

    def write(self, unit: int, pieces: Iterable[Piece]) -> None:
        """Take the pieces of a unit."""
        self._waiting[unit] = 1  # so that it is not done before the last piece
        for piece in pieces:
            if self._direct[piece.file] is None:
                write_all(self._descriptors[piece.file], piece.payload, piece.offset)
            else:
                self._collect(unit, piece)
        self._left([unit])
        while self._leaving and self._leaving[0][2].done():
            self._arrive()

    def _flush(self) -> None:
        while self._leaving:
            self._arrive()
        while self._open:
            self._write_through(next(iter(self._open)))

    def _collect(self, unit: int, piece: Piece) -> None:
        view, position = piece.payload, piece.offset
        while view:
            start = position // CHUNK * CHUNK
            part = view[: start + CHUNK - position]
            key = piece.file, start
            if key in self._through:
                write_all(self._descriptors[piece.file], part, position)
            else:
                chunk = self._open.get(key) or self._begin(key)
                inside = slice(position - start, position - start + len(part))
                chunk.memory[inside] = np.frombuffer(part, np.uint8)  # numpy lets other threads work meanwhile
                chunk.ranges.append((position, position + len(part)))
                chunk.units.append(unit)
                chunk.missing -= len(part)
                self._waiting[unit] += 1
                if chunk.missing == 0:
                    self._write_whole(key)
            view, position = view[len(part) :], position + len(part)

    def _begin(self, key: tuple[int, int]) -> _Chunk:
        if len(self._open) >= MOST_OPEN_CHUNKS:
            self._write_through(next(iter(self._open)))
        file, start = key
        owned = self._owned[file][start]
        memory = self._free.pop() if self._free else np.frombuffer(huge_pages(CHUNK), np.uint8)
        if owned < CHUNK:  # header, alignment or constants are in it, and lie there already
            found = os.preadv(self._descriptors[file], [memory.data], start)
            memory[found:] = 0
        chunk = self._open[key] = _Chunk(start, owned, memory)
        return chunk

    def _write_whole(self, key: tuple[int, int]) -> None:
        file, start = key
        direct = self._direct[file]
        if direct is None or start + CHUNK > self._sizes[file]:
            return self._write_through(key)
        if len(self._leaving) >= DEPTH:
            self._arrive()
        chunk = self._open.pop(key)
        leaving = self._pool.submit(write_all, direct, chunk.memory.data, chunk.start)
        self._leaving.append((key, chunk, leaving))

    def _arrive(self) -> None:
        """Wait for the chunk that left first."""
        key, chunk, leaving = self._leaving.popleft()
        try:
            leaving.result()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct[key[0]] = None
            self._open[key] = chunk
            return self._write_through(key)
        self._free.append(chunk.memory)
        self._left(chunk.units)

    def _write_through(self, key: tuple[int, int]) -> None:
        """What has come of a chunk, through the page cache; and what will come."""
        file, start = key
        chunk = self._open[key]
        for first, stop in chunk.ranges:
            write_all(self._descriptors[file], chunk.memory[first - start : stop - start].data, first)
        self._through.add(key)
        del self._open[key]
        self._free.append(chunk.memory)
        self._left(chunk.units)

    def _left(self, units: Iterable[int]) -> None:
        for unit in units:
            self._waiting[unit] -= 1
            if not self._waiting[unit]:
                del self._waiting[unit]
                self._done(unit)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with suppress(OSError) if kind else nullcontext():  # who stops keeps what is encoded; a full disk does not
                self._flush()
        finally:
            self._pool.shutdown()
            for direct in self._opened:
                os.close(direct)


def write_all(descriptor: int, view: memoryview, offset: int) -> None:
    """All of `view`, from byte `offset` of the file on."""
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _by_chunk(ranges: Sequence[Range]) -> dict[int, int]:
    """{start of a chunk: how many bytes of `ranges` are in it}"""
    counts: dict[int, int] = {}
    for first, stop in ranges:
        for start in range(first // CHUNK * CHUNK, stop, CHUNK):
            counts[start] = counts.get(start, 0) + min(stop, start + CHUNK) - max(first, start)
    return counts
