"""The documents point at what is there: every relative link, its heading included, and every file that they name.

Not covered: addresses on the web, and what the text says.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
ROOMS = "quant|kernels|ornith_moe|tests|docs|bench|demo"


def anchors(path: Path) -> set[str]:
    """Headings as GitHub links to them."""
    lines = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not heading or heading in anchors(found), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":  # tells of files that are gone
        return
    named = re.findall(rf"(?<![\w./-])((?:{ROOMS})/[\w./-]*\.(?:py|md|json))\b", text)
    assert not [name for name in named if not (ROOT / name).exists()]
