"""Weights read from a Hub by ranges: a server on this machine speaks its protocol, badly where it is told to.

Reference: the builds of the same folder on the disk, byte for byte. Not covered: the Hub itself and its redirects.
"""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fixtures
import pytest
from rich.console import Console

from ornith_moe.command import terminal
from ornith_moe.quant.conversion.convert import PARTIAL, convert
from ornith_moe.quant.errors import CheckpointError, PlanError
from ornith_moe.quant.opening import open_any
from ornith_moe.quant.source import ranges
from ornith_moe.quant.source.checkpoint import open_checkpoint
from ornith_moe.quant.source.mtp_from import with_mtp_from
from ornith_moe.quant.source.ranges import Ranges, Shard
from ornith_moe.quant.source.weights import source_from_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUILDS = ("fp8-channel", "gguf:Q8_0")


class Hub(BaseHTTPRequestHandler):
    """Repository org/moe of `folder`; every third range of a shard is answered with one of `faults`."""

    protocol_version = "HTTP/1.1"
    folder: Path
    requests: list[tuple[str, str]]
    faults = ("dropped", "short", "long", "whole", "busy")

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that has enough hangs up
            super().handle()

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/moe"):
            names = sorted(file.name for file in self.folder.iterdir())
            if "/tree/" in path:
                answer = [self.entry(name) for name in names]
            else:
                siblings = [{"rfilename": name, "size": self.entry(name)["size"]} for name in names]
                answer = {"id": "org/moe", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            return self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        file = self.folder / Path(path).name
        if "/resolve/" not in path or not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content, wanted = file.read_bytes(), self.headers.get("Range")
        headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not wanted:
            return self.answer(200, content, headers)
        start, stop = map(int, wanted.removeprefix("bytes=").split("-"))
        headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
        self.requests.append((file.name, wanted))
        count = len(self.requests)
        fault = self.faults[count // 3 % len(self.faults)] if count % 3 == 0 else ""
        part = content[start : stop + 1]
        if fault == "busy":
            self.answer(503, b"", {})
        elif fault == "whole":
            self.answer(200, content, headers)
        else:
            part = {"short": part[: len(part) // 2], "long": part + b"!"}.get(fault, part)
            self.answer(206, part, headers, cut=fault == "dropped")

    def entry(self, name):
        size = (self.folder / name).stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": f"{size:040x}"}

    def answer(self, status, content, headers, cut=False):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 3] if cut else content)
        self.close_connection = cut


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return fixtures.qwen35moe(tmp_path_factory.mktemp("src") / "moe", experts=3, top_k=2, mtp=True, shards=2)


@pytest.fixture
def hub(moe):
    handler = type("OfOneTest", (Hub,), {"folder": moe, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_hub_that_drops_connections_gives_the_same_builds(moe, hub, tmp_path):
    """Without a stored source, of which the MTP comes from there too; blocks small, so that there are many of them."""
    endpoint, handler = hub
    code = (
        "import sys, ornith_moe.quant.source.ranges as r; r.BLOCK = 1 << 20; r.WAIT_SECONDS = 0.01;"
        "from ornith_moe.cli import main; sys.argv[0] = 'ornith-moe'; main()"
    )
    options = [word for build in BUILDS for word in ("--to", build)]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "convert",
            "hf://org/moe",
            tmp_path / "out",
            *options,
            "--mtp-from",
            "hf://org/moe",
            "--device",
            "cpu",
            "--json",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "no terminal, no bars"
    convert(open_any(moe, mtp_from=moe), tmp_path / "local", BUILDS)
    mine, local = contents(tmp_path / "out"), contents(tmp_path / "local")
    assert mine.keys() == local.keys() and not (tmp_path / "out" / PARTIAL).exists()
    differing = {name for name in mine if mine[name] != local[name]}
    assert all("manifest" in name for name in differing), differing
    weights = sum(path.stat().st_size for path in moe.glob("*.safetensors"))
    stored = [path for path in (tmp_path / "home").rglob("*.safetensors") if path.is_file()]
    assert len(stored) == 2 and sum(path.stat().st_blocks * 512 for path in stored) < weights / 10
    assert len(handler.requests) > 3 * weights >> 21, "too few for the faults to count"
    with pytest.raises(CheckpointError, match=r"headers of a repository .* give its name, hf://org/name"):
        open_checkpoint(stored[0].parent)


def by_ranges(folder, endpoint):
    """The checkpoint of a folder, whose weights come from a server."""
    checkpoint = open_checkpoint(folder)
    shards = {
        path.name: Shard(f"{endpoint}/org/moe/resolve/main/{path.name}", path.stat().st_size)
        for path in checkpoint.files
    }
    return replace(checkpoint, opened=Ranges(shards, ranges.fetch))


@pytest.mark.parametrize("base_too", [False, True])
def test_what_comes_of_a_donor_is_told_like_what_comes_of_the_source(moe, hub, tmp_path, monkeypatch, base_too):
    endpoint, handler = hub
    monkeypatch.setattr(handler, "faults", ("",))
    monkeypatch.setattr(ranges, "BLOCK", 1 << 20)
    base = source_from_checkpoint(by_ranges(moe, endpoint) if base_too else open_checkpoint(moe), mtp="drop")
    source = with_mtp_from(base, by_ranges(moe, endpoint))
    told = []
    report = convert(source, tmp_path / "out", ["bf16"], progress=lambda *one: told.append(one))
    come = [one[1:] for one in told if one[0] == "fetch"]
    mtp = sum(2 * math.prod(weight.shape) for weight in source.donor.weights)
    total = report.bytes_read if base_too else mtp
    assert 0 < mtp < report.bytes_read / 2 and {of_all for _, of_all in come} == {total}
    assert come == sorted(come) and come[0][0] < total == come[-1][0], "from the first block to the last"
    assert len(come) == len(handler.requests), "of each block that was asked for"


def test_blocks_count_as_memory(moe, hub, tmp_path):
    """What a conversion needs at least, of a folder, of one that comes by ranges, and with a donor that does too."""
    endpoint, _ = hub
    local, remote = open_checkpoint(moe), by_ranges(moe, endpoint)
    sources = [source_from_checkpoint(checkpoint, mtp="drop") for checkpoint in (local, remote)]
    least = []
    for source in (*sources, with_mtp_from(sources[1], remote)):
        with pytest.raises(PlanError, match="1 jobs need at least") as told:
            convert(source, tmp_path, ["bf16"], max_memory=1, jobs=1)
        least.append(float(re.search(r"least ([\d.]+) GiB", str(told.value))[1]))
    held = 16 * ranges.BLOCK / 2**30
    assert least[1] - least[0] == pytest.approx(held, abs=0.01)
    assert least[2] - least[0] == pytest.approx(2 * held, abs=0.01)


def test_a_conversion_tells_what_comes_and_what_is_asked_for_again(moe, hub, tmp_path, monkeypatch):
    """And a bar of its own is drawn of it on a terminal, nothing elsewhere."""
    endpoint, handler = hub
    monkeypatch.setattr(ranges, "BLOCK", 1 << 20)
    monkeypatch.setattr(ranges, "WAIT_SECONDS", 0.01)
    source = source_from_checkpoint(by_ranges(moe, endpoint))
    told = []
    report = convert(source, tmp_path / "out", ["gguf:Q8_0"], progress=lambda *one: told.append(one))
    come = [one[1:] for one in told if one[0] == "fetch"]
    retries = [one[1] for one in told if one[0] == "retry"]
    assert {total for _, total in come} == {report.bytes_read} and max(come)[0] == report.bytes_read
    spans = [[int(place) for place in span.removeprefix("bytes=").split("-")] for _, span in handler.requests]
    fetched = sum(stop + 1 - start for start, stop in dict.fromkeys(map(tuple, spans)))
    assert fetched < 1.2 * report.bytes_read, "to know the source again, nothing of it is read"
    assert max(retries) == sum(1 for count in range(1, len(handler.requests) + 1) if count % 3 == 0) > 1
    text = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=text, force_terminal=True, width=160))
    with terminal.progress_bar() as progress:
        for one in told:
            progress(*one)
    drawn = re.sub(r"\x1b\[[?\d;]*\w", "", text.getvalue()).splitlines()[-3:]
    assert re.search(rf"fetch, {max(retries)} again .* 100 %", "\n".join(drawn)), drawn
    text = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=text, width=100))
    with terminal.progress_bar() as progress:
        progress("fetch", 1, 2)
        progress("retry", 1, 0)
    assert not text.getvalue()


def test_blocks_are_fetched_ahead_and_few_are_kept(monkeypatch):
    monkeypatch.setattr(ranges, "BLOCK", 100)
    monkeypatch.setattr(ranges, "MOST_BLOCKS", 4)
    content, fetched = bytes(range(250)) * 8, []

    def fetch(url, start, stop, again):
        fetched.append(start)
        return content[start:stop]

    files = Ranges({"a": Shard("url", len(content))}, fetch)
    for start in range(0, 2000, 30):
        view = memoryview(bytearray(50))
        count = files.read_into(Path("a"), view, start)
        assert count == min(50, 2000 - start) and view[:count] == content[start : start + 50]
        assert len(files._blocks) <= 4
    assert sorted(fetched) == list(range(0, 2000, 100)), "each once"


def test_a_block_that_never_comes_is_one_sentence_and_can_come_later(monkeypatch):
    monkeypatch.setattr(ranges, "WAIT_SECONDS", 0.001)
    answers = [OSError("no route")] * ranges.ATTEMPTS

    def once(url, start, stop):
        if answers:
            raise answers.pop()
        return bytes(stop - start)

    monkeypatch.setattr(ranges, "_once", once)
    files = Ranges({"a": Shard("http://x/a", 500)}, ranges.fetch)
    with pytest.raises(CheckpointError, match=r"http://x/a: bytes 0 to 500 did not come in 6 attempts \('no route'\)"):
        files.read_into(Path("a"), memoryview(bytearray(50)), 0)
    assert files.read_into(Path("a"), memoryview(bytearray(50)), 460) == 40
