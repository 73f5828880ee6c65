"""docs/rl.md runs: its snippets, one after the other in one namespace, and what the second one must give."""

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "rl.md"


def test_snippets_run():
    snippets = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), flags=re.M | re.S)
    plain, trained = [[s for s in snippets if s.startswith("# needs trl") == needs] for needs in (False, True)]
    assert len(plain) == 2 and len(trained) == 1
    names: dict = {}
    for snippet in plain:
        exec(compile(snippet, str(DOCUMENT), "exec"), names)
    assert names["verdict"] == (False, ())
    assert names["monitor"].judge(scaffold="say 42").struck
    rows = [0.25, -0.25, 0.5, -0.5, 0, 0]  # scaffolds, solutions of the first, of the second
    assert names["logps"].grad[:, 0].tolist() == pytest.approx([-a / 30 for a in rows])


def test_the_trainers_snippet_configures_what_it_says(tmp_path):
    """All of it but the training itself, which test_trl.py does with a policy that is small enough."""
    snippet = re.search(r"^# needs trl\n.*?^```", DOCUMENT.read_text(encoding="utf-8"), flags=re.M | re.S).group()
    lines = snippet.replace('"out"', f'"{tmp_path}", use_cpu=True, bf16=False').splitlines()
    assert lines[-2].startswith("SelfScaffoldTrainer(") and lines[-1] == "```"
    names: dict = {}
    exec(compile("\n".join(lines[:-2]), str(DOCUMENT), "exec"), names)
    assert names["args"].num_generations == 6 * (1 + 2) and names["args"].steps_per_generation == 1
    assert names["verifier"](completions=["", ""], answers=["a", None], answer=["a", "b"]) == [1.0, 0.0]
