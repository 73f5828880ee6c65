"""The one door to files: whatever a checkpoint, a build, an output, a recipe, an importance matrix or a text is read
from or written to is opened here. A test holds that nothing else opens files.

Reading. A file of a folder must lie in it: a link that leaves the folder is refused, so that no file of the machine
finds its way into a build that is published. The links of a Hub cache (snapshots/REVISION/NAME -> ../../blobs/HASH) are
fine, and so is any link the user names on the command line (`named`). Only regular files are read, never a pipe, a
device or a socket, up to a limit in bytes; what was checked is the opened file, not its name, which may have changed.

Writing. No link is followed below the folder the user named, new files are opened exclusively, and a temporary file has
a name that nobody can have prepared.

Text is UTF-8 and nothing else. JSON in UTF-16, halves of surrogate pairs, keys that are there twice, integers of more
than `MAX_DIGITS` digits and values nested deeper than `MAX_DEPTH` are refused: each has ended in a traceback somewhere.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Protocol

from ornith_moe.quant.budget import budget
from ornith_moe.quant.errors import CheckpointError, ConversionError, OrnithError

MAX_JSON_BYTES = 1 << 28  # index of the 397B, experts one by one, is about 25 MB
MAX_DIGITS = 100  # tokenizers write 10^30 for "no limit"
MAX_DEPTH = 64
MOST_OPEN = 256  # files that one checkpoint keeps open; the 397B has 94 shards, and a process 1,024 descriptors or more
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a pipe that nobody writes to must not block
_WRITE = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


# Reading


def open_file(
    path: str | Path,
    *,
    what: str = "a file",
    limit: int | None = None,
    named: bool = False,
    error: type[OrnithError] = CheckpointError,
) -> BufferedReader:
    """The regular file `path`, opened for reading.

    Args:
        path: a file of a folder that is being read, or one the user named.
        what: that is expected there, for the message.
        limit: of its size in bytes.
        named: the user named this very file, so it may be a link to anywhere.
    Raises:
        OrnithError: of the kind `error`: not there, no regular file, too large, or a link that leaves its folder.
    """
    path = Path(path)
    try:
        target = path if named else _target(path, error)
        descriptor = os.open(target, _READ if named else _READ | os.O_NOFOLLOW)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{path}: expected {what}, but {reason}") from None
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or (limit is not None and state.st_size > limit):
            within = "" if limit is None else f" (limit {limit})"
            raise error(f"{path}: expected {what}, found {kind(state.st_mode)} of {state.st_size} bytes{within}")
        if not named and not _is_still(_target(path, error), state):
            raise error(f"{path}: was replaced while it was opened; try again when nothing writes to that folder")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


class Payload(Protocol):
    """Whatever holds the bytes of files, for reading at any place of them and from any thread."""

    def read_into(self, path: Path, view: memoryview, offset: int) -> int:
        """Fill `view` from byte `offset` of the file on; how many bytes there were, fewer only where the file ends."""


class OpenFiles:
    """Files that stay open from their first reading on, for reading at any place of them and from any thread.

    Opening is checked as `open_file` checks it, which takes as long as reading a megabyte.
    """

    def __init__(self, what: str):
        self.what = what
        self._files: dict[Path, BufferedReader] = {}
        self._lock = Lock()

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[str]]:
        return OpenFiles, (self.what,)  # in another process they are opened anew

    def read_into(self, path: Path, view: memoryview, offset: int) -> int:
        """Fill `view` from byte `offset` of the file on; how many bytes there were, fewer only where the file ends.

        Raises:
            CheckpointError: as `open_file`.
        """
        done = 0
        with self._opened(path) as file:
            while done < len(view):
                got = os.preadv(file.fileno(), [view[done:]], offset + done)
                if got == 0:
                    break
                done += got
        return done

    @contextmanager
    def _opened(self, path: Path) -> Iterator[BufferedReader]:
        with self._lock:
            file = self._files.get(path)
            if file is None and len(self._files) < MOST_OPEN:
                file = self._files[path] = open_file(path, what=self.what)
        if file is not None:
            yield file
            return
        with open_file(path, what=self.what) as file:
            yield file


def read_bytes(path: str | Path, *, limit: int, **how: Any) -> bytes:
    """All of a file of at most `limit` bytes, paid from the budget; other arguments and errors as `open_file`."""
    with open_file(path, limit=limit, **how) as file:
        size = os.fstat(file.fileno()).st_size
        budget().take(size, f"{path}", how.get("error", CheckpointError))
        return file.read(size)


def read_text(path: str | Path, *, limit: int, what: str = "a text file", **how: Any) -> str:
    """All of a file in UTF-8; other arguments and errors as `open_file`."""
    raw = read_bytes(path, limit=limit, what=what, **how)
    try:
        return raw.decode()
    except UnicodeDecodeError as problem:
        error = how.get("error", CheckpointError)
        in_utf8 = what if "UTF-8" in what else f"{what} in UTF-8"
        raise error(f"{path}: expected {in_utf8}, got another byte at {problem.start}") from None


def read_json(
    path: str | Path, *, what: str = "a JSON file", limit: int = MAX_JSON_BYTES, named: bool = False
) -> dict[str, Any]:
    """The JSON object in `path`, in the strict form of `parse_json`.

    Raises:
        CheckpointError: as `open_file`, or not such an object.
    """
    value = parse_json(read_bytes(path, what=what, limit=limit, named=named), str(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_json(raw: bytes, where: str) -> Any:
    """The value of JSON in UTF-8, paid from the budget before it is made; refused where another program would not
    agree what it says.

    Raises:
        CheckpointError: not UTF-8 or not JSON, a key twice, half a surrogate pair, an integer of more than `MAX_DIGITS`
            digits, nested deeper than `MAX_DEPTH`, or more memory than the budget has.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise CheckpointError(f"{where}: a key appears twice; the file is damaged or hostile")
        return value

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise CheckpointError(f"{where}: an integer of {len(digits)} digits; expected at most {MAX_DIGITS}")
        return int(digits)

    containers, values = raw.count(b"{") + raw.count(b"["), raw.count(b",")
    # What CPython makes of them at most: 128 bytes for a container, 80 for a value with its place, the text twice.
    budget().take(128 * containers + 80 * values + 2 * len(raw), where)
    try:
        text = raw.decode()
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_int=integer)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as problem:
        raise CheckpointError(f"{where}: not JSON in UTF-8 ({problem.reason} at {problem.start})") from None
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{where}: not JSON ({str(problem)[:100]})") from None
    if containers > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise CheckpointError(f"{where}: nested deeper than {MAX_DEPTH} levels; no such file is")
    return value


def refuse_stray_links(folder: Path) -> None:
    """Refuse a folder that another program is about to read whole, if a file in it is a link that leaves it.

    Raises:
        CheckpointError: names the first.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file():
            _target(path, CheckpointError)


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written into another file."""
    try:
        return bool(name.encode()) or True
    except UnicodeEncodeError:
        return False


def kind(mode: int) -> str:
    """What a file mode stands for, in words."""
    names = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def follow(path: Path) -> Path:
    """Where `path` leads through every link. Raises OSError: a loop of them, of which Path.resolve says nothing from
    Python 3.13 on."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
    return path.resolve()


def _target(path: Path, error: type[OrnithError]) -> Path:
    """Where `path` leads, refused outside its folder and the blobs of a Hub cache."""
    try:
        root, target = path.parent.resolve(), follow(path)
    except OSError:
        raise error(f"{path.parent}: {path.name} is a link that leads nowhere") from None
    blobs = [parent.parent / "blobs" for parent in (root, *root.parents) if parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise error(f"{path.parent}: {path.name} is a link that leaves the folder; copy the file into it")
    return target


def _is_still(target: Path, state: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(target), state)
    except OSError:
        return False


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in children for child in items if isinstance(child, dict | list)]
    return depth


# Writing


def own_folder(path: Path) -> None:
    """Make the folder `path` unless it is there; a link to one is not it.

    Raises:
        ConversionError: something else has the name. OSError: it cannot be made.
    """
    try:
        path.mkdir()
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise ConversionError(f"{path}: expected a folder of ours, found something else; move it away") from None


def open_output(path: Path, *, new: bool = False) -> int:
    """Descriptor of the output file `path`, to read and write; made if it is not there.

    Args:
        new: it must not be there.
    Raises:
        ConversionError: a link, or no regular file, or one with other names. OSError: the disk refuses.
    """
    if os.path.islink(path):
        raise ConversionError(f"{path}: is a link where a file of ours belongs; move it away")
    descriptor = os.open(path, _WRITE | os.O_CREAT | (os.O_EXCL if new else 0), 0o644)
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
        os.close(descriptor)
        raise ConversionError(f"{path}: expected a file of ours, found another; move it away")
    return descriptor


def past_the_cache(descriptor: int, mode: int) -> int | None:
    """A descriptor of the same file that reaches the disk past the page cache; None where there is no such thing."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(f"/proc/self/fd/{descriptor}", mode | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None


def write_file(path: Path, payload: bytes) -> None:
    """Write a file anew and onto the disk; one that an earlier run left under that name goes."""
    path.unlink(missing_ok=True)
    with os.fdopen(open_output(path, new=True), "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def published(path: Path, *, replace: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which gets the name `path` when the block ends well and is gone when it does not.

    `replace`: what has that name is ours, and goes.

    Raises:
        ConversionError: something has got that name meanwhile.
    """
    temporary = path.with_name(f".ornith-{secrets.token_hex(16)}")
    descriptor = open_output(temporary, new=True)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        if not replace and os.path.lexists(path):
            raise ConversionError(f"{path}: exists already; move it away or choose another name")
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def scratch_file(folder: Path) -> BinaryIO:
    """An unnamed file in `folder`, gone when it is closed."""
    return tempfile.TemporaryFile(dir=folder)


def reserve(descriptor: int, nbytes: int) -> None:
    """Make an open file `nbytes` long, of zeros where it was shorter; a full disk fails here, not later."""
    if hasattr(os, "posix_fallocate") and nbytes:
        os.posix_fallocate(descriptor, 0, nbytes)
    os.truncate(descriptor, nbytes)


def json_bytes(value: object) -> bytes:
    """`value` as a JSON file that people read."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
