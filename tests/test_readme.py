"""README.md says only what is true: its Python runs, its tree exists and is complete, its commands and options exist.

The reference is the checkout. Not covered: figures in tables, and what the shell commands do (see test_cli).
"""

import re
import subprocess
from pathlib import Path

import pytest
from command import python
from typer.testing import CliRunner

from ornith_moe.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(language, body) for language, body in re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)]
SNIPPETS = [body for language, body in BLOCKS if language == "python"]
TREES = [body for language, body in BLOCKS if language == "text" and re.search(r"^\W*kernels/", body, re.M)]
CODE = "\n".join([body for language, body in BLOCKS if language != "python"] + re.findall(r"`([^`\n]+)`", README))
COMMANDS = sorted(set(re.findall(r"^(?:\$ )?ornith-moe +([a-z]+)((?:[^\n]*\\\n)*[^\n]*)", CODE, re.M)))


def test_it_has_what_the_other_tests_read():
    assert SNIPPETS and len(TREES) == 1
    assert {"convert"} <= {name for name, _ in COMMANDS}
    assert {"demo", "test"} <= set(re.findall(r"^(?:\$ )?make ([\w-]+)", CODE, re.M))


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.splitlines()[0])
def test_snippet_runs(code, tmp_path):
    python(code, tmp_path)


def tree_paths(tree):
    """Paths of a tree drawing: the first word of each line, below the nearest line above that is indented less."""
    parents = []
    for line in tree.splitlines():
        found = re.match(r"[\s│├└─]*", line).end()
        if line[found:]:
            parents = [(indent, path) for indent, path in parents if indent < found]
            path = (parents[-1][1] if parents else Path()) / line[found:].split()[0]
            parents.append((found, path))
            yield path


def test_the_tree_is_there_and_complete():
    paths = set(tree_paths(TREES[0]))
    assert not [str(path) for path in paths if not (ROOT / path).exists()]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:  # an unpacked archive has no list of its own files
        top = {Path(line).parts[0] for line in listed.stdout.splitlines() if line[0] != "."}
        missing = {name for name in top if not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", TREES[0])}
        assert not missing


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"^(?:\$ )?make ([\w-]+)", CODE, re.M)) <= targets


@pytest.mark.parametrize("name", sorted({name for name, _ in COMMANDS}))
def test_command_and_its_options_exist(name):
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    for _, arguments in (command for command in COMMANDS if command[0] == name):
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", arguments):
            assert option in done.stdout, option
