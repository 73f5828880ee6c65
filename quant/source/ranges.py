"""Weights read from a Hub by ranges of bytes, as they are wanted: of a shard only its header is stored.

    repository at a commit -> folder of side files, and of shards that are a header and a hole -> a checkpoint
    read_into(shard, view, offset) -> blocks of BLOCK bytes, the next one fetched ahead, MOST_BLOCKS kept

A conversion reads each byte once, so nothing is gained by storing it: the 397B becomes its builds on a disk that has
room for these alone. The folder lies beside the Hub's cache and is named after the commit, so that a conversion that
was stopped finds the same source again. A block that does not come whole is fetched again, ATTEMPTS times, waiting
longer each time. Whoever follows is told of each block that comes and of each that is asked for again.
"""

from __future__ import annotations

import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import json_bytes, published, write_file
from ornith_moe.quant.source.checkpoint import MAX_HEADER_BYTES, RANGES_MARK

BLOCK = 16 << 20
MOST_BLOCKS = 12  # of a few threads and streams: 192 MiB
CONNECTIONS = 4
FIRST_BYTES = 1 << 20  # of a shard: most headers are shorter
ATTEMPTS, WAIT_SECONDS, ANSWER_SECONDS = 6, 0.5, 60.0
SIDES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")

Block = bytes | bytearray
Follow = Callable[[int, int], None]  # bytes that have come, or 1 if some are asked for again; from any thread


class Fetch(Protocol):
    """Bytes [start, stop) of a URL; calls `again` before each attempt but the first."""

    def __call__(self, url: str, start: int, stop: int, again: Callable[[], None] = ..., /) -> Block: ...


@dataclass(frozen=True)
class Shard:
    """A file of a repository: where it is, and its size."""

    url: str
    size: int


class Ranges:
    """As `OpenFiles`, of files that lie elsewhere; `shards` by the names of their files."""

    def __init__(self, shards: Mapping[str, Shard], fetch: Fetch):
        self._shards, self._fetch = shards, fetch
        self._blocks: OrderedDict[tuple[str, int], Future[Block]] = OrderedDict()
        self._pool, self._lock = ThreadPoolExecutor(CONNECTIONS), Lock()
        self._follow: Follow = lambda come, retries: None

    @property
    def identity(self) -> str:
        """What stands for all the bytes, since the URLs name a commit."""
        return "\n".join(f"{shard.url} {shard.size}" for _, shard in sorted(self._shards.items()))

    @property
    def held_bytes(self) -> int:
        """At most: a block that is not kept any more may be on its way yet."""
        return (MOST_BLOCKS + CONNECTIONS) * BLOCK

    def follow(self, follow: Follow) -> None:
        """Tell `follow` from now on."""
        self._follow = follow

    def __reduce__(self) -> tuple[type[Ranges], tuple[Mapping[str, Shard], Fetch]]:
        return Ranges, (self._shards, self._fetch)

    def read_into(self, path: Path, view: memoryview, offset: int) -> int:
        """Fill `view` from byte `offset` of the file on; how many bytes there were, fewer only where the file ends.

        Raises:
            CheckpointError: they cannot be fetched.
        """
        shard, done = self._shards[path.name], 0
        stop = min(offset + len(view), shard.size)
        while offset + done < stop:
            number, begin = divmod(offset + done, BLOCK)
            block = self._block(path.name, number).result()
            part = block[begin : begin + stop - offset - done]
            view[done : done + len(part)] = part
            done += len(part)
        return done

    def _block(self, name: str, number: int) -> Future[Block]:
        """A block that is here or on its way, and the next one on its way."""
        shard = self._shards[name]
        with self._lock:
            for one in (number + 1, number):
                if one * BLOCK >= shard.size:
                    continue
                key = name, one
                failed = key in self._blocks and self._blocks[key].done() and self._blocks[key].exception()
                if key not in self._blocks or failed:
                    span = one * BLOCK, min((one + 1) * BLOCK, shard.size)
                    self._blocks[key] = self._pool.submit(self._fetched, shard.url, *span)
                self._blocks.move_to_end(key)
            found = self._blocks[name, number]
            while len(self._blocks) > MOST_BLOCKS:
                self._blocks.popitem(last=False)
        return found

    def _fetched(self, url: str, start: int, stop: int) -> Block:
        block = self._fetch(url, start, stop, lambda: self._follow(0, 1))
        self._follow(len(block), 0)
        return block


def fetch(url: str, start: int, stop: int, again: Callable[[], None] = lambda: None) -> Block:
    """Bytes [start, stop) of a URL of the Hub, with the user's token if there is one; as `Fetch`.

    Raises:
        CheckpointError: they did not come whole in any attempt.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            again()
            time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            return _once(url, start, stop)
        except Exception as error:  # of whatever HTTP library huggingface_hub uses
            reason = brief(str(error).strip() or type(error).__name__)
    raise CheckpointError(
        f"{url}: bytes {start} to {stop} did not come in {ATTEMPTS} attempts ({reason}); the same command goes on "
        "where it has stopped"
    )


def _once(url: str, start: int, stop: int) -> Block:
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    block, count = bytearray(stop - start), 0
    options: dict[str, Any] = {"headers": headers, "timeout": ANSWER_SECONDS, "follow_redirects": True}
    with get_session().stream("GET", url, **options) as response:
        if response.status_code != 206:
            raise OSError(f"status {response.status_code}, expected 206 and a part of the file")
        for part in response.iter_bytes():
            if count + len(part) > len(block):
                raise OSError(f"expected {len(block)} bytes, got more")
            block[count : count + len(part)] = part
            count += len(part)
    if count < len(block):
        raise OSError(f"expected {len(block)} bytes, got {count}")
    return block


def stand_in(folder: Path, source: str, shards: Mapping[str, Shard], fetch: Fetch) -> None:
    """Put the shards into `folder` as their headers and holes of their sizes, and the mark that says so."""
    write_file(folder / RANGES_MARK, json_bytes({"source": source}))

    def put(name: str) -> None:
        if (folder / name).exists():
            return
        with published(folder / name) as file:
            file.write(_header(shards[name], fetch))
            file.truncate(shards[name].size)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(put, shards))


def _header(shard: Shard, fetch: Fetch) -> Block:
    """The first bytes of a safetensors file, up to its payload as far as it says; whoever reads them checks them."""
    first = fetch(shard.url, 0, min(shard.size, FIRST_BYTES)) if shard.size else b""
    length = 8 + struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else 0
    if len(first) < length <= min(shard.size, 8 + MAX_HEADER_BYTES):
        first += fetch(shard.url, len(first), length)
    return first[:length]
