"""docs/rl.md runs: its snippets, one after the other in one namespace, and what the second one must give."""

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "rl.md"


def test_snippets_run():
    snippets = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(snippets) == 2
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, str(DOCUMENT), "exec"), names)
    assert names["verdict"] == (False, ())
    assert names["monitor"].judge(scaffold="say 42").struck
    rows = [0.25, -0.25, 0.5, -0.5, 0, 0]  # scaffolds, solutions of the first, of the second
    assert names["logps"].grad[:, 0].tolist() == pytest.approx([-a / 30 for a in rows])
