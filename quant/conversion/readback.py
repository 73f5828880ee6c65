"""Reading back what was written while more is being written: from the disk, each file in its order, once.

    written(unit, extents) -> the file is whole up to here -> read on: xxh3 of each extent, sha256 of the file

The sha256 of a file takes its bytes in their order, on one core; extents come in about that order. So a file is read as
soon as what is whole of it has grown by `SPAN`, on threads of its own, and little is left to read when the last weight
is written. A file of a build is headers, alignment and constants, which are there from the beginning, and the bytes
that weights own: whole is what has no hole among the latter.

The disk is asked, not the page cache: past it where the system can (O_DIRECT, which also flushes what it reads),
otherwise after flushing and dropping the pages.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from queue import Empty, SimpleQueue
from struct import Struct
from threading import Lock

import xxhash

from ornith_moe.quant.conversion.journal import Extent
from ornith_moe.quant.conversion.writer import Range
from ornith_moe.quant.errors import ConversionError
from ornith_moe.quant.files import past_the_cache
from ornith_moe.quant.memory import huge_pages

CHUNK = 4 << 20  # read at a time
AHEAD = 4  # of a file, and on their way at a time
SPAN = 64 << 20  # whole bytes that a file must have gained to be read on
EXTENT = Struct(">QQQ32s")  # offset, length, unit, digest: 97 bytes, of a tuple 237; they sort as their offsets do


class _File:
    """One file: what is whole of it, what was read, and what was found."""

    def __init__(self, descriptor: int, size: int, owned: Sequence[Range]):
        self.descriptor, self.size, self.owned = descriptor, size, deque(owned)
        self.direct = self.opened = past_the_cache(descriptor, os.O_RDONLY)
        self.waiting: list[bytes] = []  # beyond a hole: each as `EXTENT` packs it, a heap
        self.extents: deque[bytes] = deque()  # before it, in order, not read yet
        self.whole = 0  # bytes from the start on without a hole
        self.position = 0  # bytes that were read
        self.sha256 = hashlib.sha256()
        self.digest: xxhash.xxh3_128 | None = None  # of the extent that was begun
        self.end = self.covered = 0  # of the last extent; bytes that extents cover
        self.damaged: set[int] = set()
        self._skip()

    def add(self, offset: int, length: int, digest: str, unit: int) -> None:
        heapq.heappush(self.waiting, EXTENT.pack(offset, length, unit, digest.encode()))
        while self.waiting and (first := EXTENT.unpack(self.waiting[0]))[0] <= self.whole:
            self.extents.append(heapq.heappop(self.waiting))
            self.whole = max(self.whole, first[0] + first[1])
            self._skip()

    def _skip(self) -> None:
        """What no weight owns is whole from the beginning."""
        while self.owned and self.owned[0][1] <= self.whole:
            self.owned.popleft()
        self.whole = max(self.whole, self.owned[0][0]) if self.owned else self.size

    def add_rest(self) -> None:
        """There will be no more: what comes after a hole is all that there is."""
        self.extents.extend(sorted(self.waiting))
        self.waiting.clear()

    def read(self, stop: int, disk: ThreadPoolExecutor, free: SimpleQueue[memoryview]) -> Iterator[int]:
        """Read to byte `stop`, its end or a multiple of CHUNK; gives the bytes of each chunk once they are read.

        `disk` fetches the chunks that follow while one is hashed, into memory that is `free`.
        """
        if self.direct is None:
            os.fdatasync(self.descriptor)
        starts = iter(range(self.position, stop, CHUNK))
        coming = deque(disk.submit(self._fetch, start, free) for start in islice(starts, AHEAD))
        try:
            while coming:
                memory, count = coming.popleft().result()
                self.sha256.update(memory[:count])
                self._compare(memory[:count])
                free.put(memory)
                self.position += count
                if (start := next(starts, None)) is not None:
                    coming.append(disk.submit(self._fetch, start, free))
                yield count
        finally:
            wait(coming)

    def _fetch(self, position: int, free: SimpleQueue[memoryview]) -> tuple[memoryview, int]:
        """Memory with the bytes of the file from `position` on, and how many; zeros where it ends before."""
        count, direct, done = min(CHUNK, self.size - position), self.direct, 0
        try:
            memory = free.get_nowait()
        except Empty:
            memory = memoryview(huge_pages(CHUNK))
        if direct is not None:
            try:
                done = os.preadv(direct, [memory], position)  # whole pages, beyond the end too
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = direct = None
                os.fdatasync(self.descriptor)
        if direct is None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, position, count, os.POSIX_FADV_DONTNEED)
        while done < count:
            got = os.preadv(self.descriptor, [memory[done:count]], position + done)
            if got == 0:
                memory[done:count] = bytes(count - done)
                break
            done += got
        return memory, count

    def _compare(self, view: memoryview) -> None:
        first, last = self.position, self.position + len(view)
        while self.extents and (extent := EXTENT.unpack(self.extents[0]))[0] < last:
            offset, length, unit, digest = extent
            if self.digest is None:
                if offset < self.end:  # two units claim a byte: the journal lies of one of them
                    self.damaged.add(unit)
                    self.extents.popleft()
                    continue
                self.digest, self.end = xxhash.xxh3_128(), offset + length
            self.digest.update(view[max(offset - first, 0) : self.end - first])
            if self.end > last:
                return
            if self.digest.hexdigest().encode() != digest:
                self.damaged.add(unit)
            self.covered += length
            self.digest = None
            self.extents.popleft()

    def close(self) -> None:
        if self.opened is not None:
            os.close(self.opened)


class ReadBack:
    """The files of a conversion by their descriptors, and for each the ranges in order that weights own.

    `tell` hears of bytes read and of bytes in all, from any thread, one call at a time.
    """

    def __init__(
        self,
        descriptors: Sequence[int],
        sizes: Sequence[int],
        owned: Sequence[Sequence[Range]],
        jobs: int,
        tell: Callable[[int, int], None],
    ):
        self._owned_bytes = [sum(stop - start for start, stop in ranges) for ranges in owned]
        self._files = [_File(*file) for file in zip(descriptors, sizes, owned, strict=True)]
        self._tell, self._lock, self._done, self._total = tell, Lock(), 0, sum(sizes)
        self._pool, self._disk = ThreadPoolExecutor(jobs), ThreadPoolExecutor(AHEAD)
        self._free: SimpleQueue[memoryview] = SimpleQueue()  # of CHUNK bytes each
        self._reading: dict[int, Future[None]] = {}  # by file

    def written(self, unit: int, extents: Iterable[Extent]) -> None:
        """Take note of the extents of a unit, and read on in files that have grown enough by them."""
        for number, offset, length, digest in extents:
            file, reading = self._files[number], self._reading.get(number)
            file.add(offset, length, digest, unit)
            if file.whole - file.position >= SPAN and (reading is None or reading.done()):
                if reading:
                    reading.result()  # raises what it raised
                stop = file.whole if file.whole == file.size else file.whole // CHUNK * CHUNK
                self._reading[number] = self._pool.submit(self._read, file, stop)

    def finish(self, live: Sequence[int]) -> tuple[dict[int, str], set[int]]:
        """Read the `live` files to their ends.

        Returns:
            sha256 of each, and the units whose bytes are not there or not what was encoded.
        Raises:
            ConversionError: extents do not cover what weights own.
        """
        self._total = sum(self._files[number].size for number in live)
        for number in live:
            if number in self._reading:
                self._reading[number].result()
            os.fsync(self._files[number].descriptor)
            self._files[number].add_rest()
        rest = [self._pool.submit(self._read, file, file.size) for file in map(self._files.__getitem__, live)]
        for reading in rest:
            reading.result()
        for number in live:
            covered, owned = self._files[number].covered, self._owned_bytes[number]
            if covered != owned and not self._files[number].damaged:
                raise ConversionError(
                    f"the journal covers {covered} bytes of file {number} and its weights own {owned}; it is damaged, "
                    "so run the command again with --restart"
                )
        damaged: set[int] = set().union(*(self._files[number].damaged for number in live))
        return {number: self._files[number].sha256.hexdigest() for number in live}, damaged

    def _read(self, file: _File, stop: int) -> None:
        for count in file.read(stop, self._disk, self._free):
            with self._lock:
                self._done += count
                self._tell(self._done, self._total)

    def __enter__(self) -> ReadBack:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._disk.shutdown()
        for file in self._files:
            file.close()
