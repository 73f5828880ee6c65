"""quant/files.py: the one door to files. Not covered here: what readers make of a file, which their own tests hold."""

import ast
import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.quant import files
from ornith_moe.quant.budget import Budget, budgeted, one_budget
from ornith_moe.quant.errors import CheckpointError, ConversionError, PlanError

ROOT = Path(__file__).resolve().parents[2]
OPENERS = {
    "open", "fdopen", "read_text", "read_bytes", "write_text", "write_bytes", "fromfile", "tofile", "memmap", "loadtxt",
    "mkstemp", "mkdtemp", "TemporaryFile", "NamedTemporaryFile", "TemporaryDirectory", "copyfile", "copy2", "copytree",
    "safe_open", "load_file", "save_file", "GGUFReader", "GGUFWriter", "from_file", "from_pretrained",
}  # fmt: skip
OURS = {"read_text", "read_bytes"}  # of files.py, as plain names or of the module `files`
ALLOWED = {  # (file, call): why it need not go through files.py
    ("quant/conversion/convert.py", "Path.read_text"): "/proc/self/status",
    ("quant/source/preset.py", "file.read_bytes"): "a preset of the package",
    ("quant/conversion/journal.py", "os.fdopen"): "a descriptor of files.py",
    ("quant/gguf/metadata.py", "gguf.GGUFWriter"): "without a path it opens nothing",
    ("ornith_moe/command/terminal.py", "os.open"): "/dev/null",
    ("quant/conversion/sensitivity.py", "os.fdopen"): "a descriptor of files.py",
    ("quant/fitting/choose.py", "os.open"): "/dev/null",
    ("ornith_moe/layerwise.py", "np.memmap"): "of an open file",
    (
        "ornith_moe/layerwise.py",
        "AutoConfig.from_pretrained",
    ): "a foreign client; links of the folder are checked",
    ("ornith_moe/streamed.py", "tempfile.TemporaryDirectory"): "of the system's, for activations",
    ("ornith_moe/effects.py", "tempfile.TemporaryDirectory"): "likewise",
    ("ornith_moe/streamed_state.py", "os.fdopen"): "a descriptor of files.py",
    ("ornith_moe/streamed_state.py", "np.memmap"): "of an open file",
    ("ornith_moe/streamed_state.py", "path.open"): "activations that it has made",
    ("ornith_moe/clients.py", "AutoModelForCausalLM.from_pretrained"): "a foreign client, likewise",
}


def _calls_that_open(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in OPENERS:
            owner = ast.unparse(node.func.value).split("(")[0].split(".")[-1]
            if (owner, node.func.attr) not in {("files", name) for name in OURS}:
                yield f"{owner}.{node.func.attr}"
        elif isinstance(node.func, ast.Name) and node.func.id in OPENERS - OURS:
            yield node.func.id


def test_nothing_else_opens_files():
    """Only host-side code of ornith_moe/ and quant/: kernels/ and cpu/ read their own package and compile to memory."""
    sources = [*ROOT.glob("quant/**/*.py"), *ROOT.glob("ornith_moe/*.py"), *ROOT.glob("ornith_moe/command/*.py")]
    assert len(sources) > 40
    found = {(str(path.relative_to(ROOT)), call) for path in sources for call in _calls_that_open(path)}
    assert {entry for entry in found if entry[0] != "quant/files.py"} == ALLOWED.keys()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "outside").write_text("private")
    (tmp_path / "m").mkdir()
    return tmp_path / "m"


def _pipe(path):
    os.mkfifo(path)


def _socket(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.close()


REFUSED = {
    "nothing": (lambda path: None, "No such file"),
    "link out": (lambda path: path.symlink_to("../outside"), "leaves the folder"),
    "link to a link out": (lambda path: (path.with_name("b").symlink_to("../outside"), path.symlink_to("b")), "leaves"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "leaves the folder"),
    "loop of links": (lambda path: path.symlink_to(path.name), "leads nowhere"),
    "folder": (lambda path: path.mkdir(), "a folder"),
    "pipe": (_pipe, "a pipe"),
    "socket": (_socket, "No such device"),
    "too large": (lambda path: path.write_bytes(b"x" * 101), "of 101 bytes (limit 100)"),
    "sparse": (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "(limit 100)"),
    "UTF-16": (lambda path: path.write_bytes("{}".encode("utf-16")), "UTF-8"),
    "half a surrogate pair": (lambda path: path.write_bytes(b"a\xed\xa0\x80"), "UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_of_the_folder_is_refused(folder, case):
    make, expected = REFUSED[case]
    make(folder / "f")
    with pytest.raises(PlanError, match=r"f: expected a text|f is a link") as caught:
        files.read_text(folder / "f", limit=100, error=PlanError)
    assert expected in str(caught.value)


def test_links_that_are_fine(folder, tmp_path):
    (folder / "a").write_text("naïve")
    (folder / "b").symlink_to("a")
    assert files.read_text(folder / "b", limit=100) == "naïve"
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert files.read_text(linked / "b", limit=100) == "naïve"  # the user named the folder by a link
    (folder / "c").symlink_to("../outside")
    assert files.read_text(folder / "c", limit=100, named=True) == "private"  # the user named this very file
    snapshot, blobs = tmp_path / "models--o--n/snapshots/1234/sub", tmp_path / "models--o--n/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "abcd").write_text("blob")
    (snapshot / "d").symlink_to("../../../blobs/abcd")
    assert files.read_text(snapshot / "d", limit=100) == "blob"


def test_a_file_replaced_between_check_and_opening_is_refused(folder, monkeypatch):
    """The second look is at what was opened: another file has the name by then."""
    (folder / "a").write_text("sound")
    look, swapped = files._target, []

    def swap(path, error):
        target = look(path, error)
        if not swapped:
            swapped.append((folder / "new").write_text("other"))
        else:
            os.replace(folder / "new", folder / "a")
        return target

    monkeypatch.setattr(files, "_target", swap)
    with pytest.raises(CheckpointError, match="was replaced while it was opened"):
        files.open_file(folder / "a")


JSON = {
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "UTF-16 without a mark": ('{"a": 1}'.encode("utf-16-le"), "JSON"),
    "UTF-32": ('{"a": 1}'.encode("utf-32"), "UTF-8"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "UTF-8"),
    "half of one as a key": (b'{"\\uDFFF": 1}', "UTF-8"),
    "duplicate key": (b'{"a": 1, "a": 2}', "appears twice"),
    "101 digits": (b'{"a": [1' + b"0" * 100 + b"]}", "an integer of 101 digits"),
    "5,000 digits": (b'{"a": -' + b"9" * 5000 + b"}", "an integer of 5001 digits"),
    "65 levels": (b'{"a":' * 65 + b"1" + b"}" * 65, "deeper than 64"),
    "lists of lists": (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64"),
    "100,000 levels": (b"[" * 100_000, "JSON"),
    "ten million empty lists": (b"[" + b"[]," * 10_000_000 + b"[]]", "bytes of memory"),
}


@pytest.mark.parametrize("case", JSON)
def test_json_that_two_programs_would_read_differently_is_refused(case):
    raw, expected = JSON[case]
    with pytest.raises(CheckpointError, match=r"^f\.json: ") as caught:
        files.parse_json(raw, "f.json")
    assert expected in str(caught.value) and len(str(caught.value)) < 300


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(_VALUES, st.booleans())
def test_json_as_writers_write_it_is_read(value, escaped):
    assert files.parse_json(json.dumps(value, ensure_ascii=escaped).encode(), "f.json") == value


@settings(deadline=None)
@given(st.binary() | st.text().map(str.encode) | st.from_regex(rb'[{}\[\]:,"\\ud8019.eE -]{,60}', fullmatch=True))
def test_bytes_are_json_or_refused_in_words(raw):
    try:
        json.dumps(files.parse_json(raw, "f.json"), ensure_ascii=False).encode()
    except CheckpointError as error:
        assert str(error).startswith("f.json: ") and len(str(error)) < 300


def test_json_that_is_fine():
    raw = f'{{"a": "\\ud83d\\ude00ü", "b": {10**99}, "c": {"[" * 63}1{"]" * 63}}}'
    value = files.parse_json(raw.encode(), "f.json")
    assert value["a"] == "😀ü" and value["b"] == 10**99 and files.parse_json(b"1", "f.json") == 1


def test_budget_counts_what_several_readers_take():
    with one_budget(Budget(memory_bytes=5_000)):
        for _ in range(2):
            files.parse_json(b"[" + b"1," * 20 + b"1]", "f.json")
        with pytest.raises(CheckpointError, match=r"f\.json: would take 1814 bytes of memory, and 1372 are left"):
            files.parse_json(b"[" + b"1," * 20 + b"1]", "f.json")


def test_a_part_of_a_budget_is_paid_from_the_whole():
    whole = Budget(memory_bytes=100)
    part = whole.part(60)
    part.take(50, "a")
    with pytest.raises(PlanError, match="b: would take 20 bytes of memory, and 10 are left for all of its kind"):
        part.take(20, "b", PlanError)
    whole.take(45, "c")
    with pytest.raises(CheckpointError, match="d: would take 10 bytes of memory, and 5 are left for all that is read"):
        part.take(10, "d")
    assert (whole.memory_bytes, part.memory_bytes) == (5, 10)


def test_files_that_are_each_within_their_limit_count_together(folder):
    for number in range(8):
        (folder / f"{number}.txt").write_bytes(b"x" * 1_000)

    @budgeted
    def read_all():
        return [files.read_text(folder / f"{number}.txt", limit=2_000) for number in range(8)]

    with one_budget(Budget(memory_bytes=5_500)), pytest.raises(CheckpointError, match=r"5\.txt: would take 1000"):
        read_all()  # the inner door does not begin anew
    assert len(read_all()) == 8


class TestWriting:
    def test_no_link_is_followed(self, folder, tmp_path):
        (folder / "link").symlink_to("../outside")
        os.link(tmp_path / "outside", folder / "second name")
        (folder / "loop").symlink_to("loop")
        _pipe(folder / "pipe")
        for name in ("link", "second name", "loop", "pipe"):
            with pytest.raises(ConversionError, match="file of ours"):
                files.open_output(folder / name)
            files.write_file(folder / name, b"mine")  # replaces the name, not what it leads to
            assert (folder / name).read_bytes() == b"mine" and not (folder / name).is_symlink()
        (tmp_path / "elsewhere").mkdir()
        (folder / "f").symlink_to("../elsewhere")
        with pytest.raises(ConversionError, match="expected a folder of ours"):
            files.own_folder(folder / "f")
        files.own_folder(folder / "g"), files.own_folder(folder / "g")
        assert (tmp_path / "outside").read_text() == "private"

    def test_published_files_have_a_name_that_none_can_prepare(self, folder):
        names = []
        for number in range(2):
            with files.published(folder / f"{number}.gguf") as file:
                names += [path.name for path in folder.iterdir() if path.name.startswith(".")]
                file.write(b"12")
            assert (folder / f"{number}.gguf").read_bytes() == b"12"
        assert len(set(names)) == 2 and all(len(name) >= 40 for name in names)
        (folder / "3").symlink_to("nowhere")
        with pytest.raises(ConversionError, match="exists already"), files.published(folder / "3") as file:
            file.write(b"12")
        with pytest.raises(KeyError), files.published(folder / "4"):
            raise KeyError
        assert sorted(path.name for path in folder.iterdir()) == ["0.gguf", "1.gguf", "3"]
