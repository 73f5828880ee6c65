"""Every remedy that a message names works when it is followed, in the same folder, in one step.

A walk over quant/ and the command line collects the messages that tell what to do; one that no test follows fails here.
The tests that say so by `@follows`, in the files beside this one, provoke a message on a tiny checkpoint, do what it
says and assert success. What is not followed is listed with the reason.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # a part of a message, {} where a value stands -> the test that follows it
    "--report draws builds that are fitted to a size; ask for one":
        "tests/quant/builds/test_gguf_fit.py::test_the_commands",
    "the same command goes on": "tests/test_cli.py::test_a_signal_is_one_sentence",
    "with --resume goes on": "tests/test_cli.py::test_an_interrupted_compare_goes_on",
    "leave --client out for more": "tests/test_cli.py::test_compare_streams_all_builds",
    "--compare: has no build {}, of which the card is; give its own":
        "tests/quant/builds/test_card.py::test_figures_of_something_else_are_one_sentence",
    "run its own command again to finish it, or add --restart":
        "tests/quant/conversion/test_convert.py::test_an_unfinished_conversion_is_not_mixed_and_both_ways_out_work",
    "exists already; move it away and run the same command again":
        "tests/quant/conversion/test_convert.py::test_nothing_that_exists_is_replaced",
    "keep its tensor unquantized with --non-finite keep-bf16":
        "tests/quant/conversion/test_convert.py::test_leave_to_keep_a_nan_is_taken_in_the_same_folder",
    "make it alone, with --to {} --tensor-type":
        "tests/quant/conversion/test_convert.py::test_a_build_that_cannot_hold_a_weight_costs_the_others_nothing",
    "A.from_pretrained(d).save_pretrained(d)":
        "tests/quant/source/test_tokenizer_files.py::test_how_to_get_tokenizer_json_is_told_and_works",
    "whose weights are read from the Hub; give its name, hf://":
        "tests/quant/source/test_ranges.py::test_a_hub_that_drops_connections_gives_the_same_builds",
    "--verify: is of build {}, the card is of {}; give its own":
        "tests/quant/builds/test_card.py::test_figures_of_something_else_are_one_sentence",
    "--mtp keep takes the {}* tensors of":
        "tests/quant/source/test_weights.py::test_mtp_in_a_file_that_the_index_leaves_out",
}  # fmt: skip
NOT_FOLLOWED = {  # -> why
    "--reasoning-parser qwen3": "an option of an engine, in a model card",
    "--model {path}": "a command of an engine, in a model card",
    "--model-path {path}": "a command of an engine, in a model card",
    "llama-server -m": "a command of an engine, in a model card",
    "pip install": "of the user's machine; test_extras_are_those_of_the_package",
    "check the disk": "a broken one",
    "check the network and HF_ENDPOINT": "tests/quant/source/test_hub.py has a hub of its own",
    "raise 'ulimit -n'": "its other way is followed",
    "was replaced while it was opened": "a race",
    "was cut short while it was used": "a race",
    "the file was cut short while it was read": "a race",
    "mtp: expected keep or drop": "an argument",
    "pass float32 [{}]": "an argument",
    "name any other block as": "an argument",
    "convert it first": "an argument",
    "add one": "an argument",
    "is registered already; choose another name": "an argument",
    "use recipe='fp8_channel'": "tests/test_functional.py, an argument",
    "run 'git lfs pull'": "a program of the user; that the file itself is taken is followed as `fetch it again`",
}
VERBS = (
    "fetch|save|move|keep|rename|say|copy|convert|run|make|merge|load|choose|free|raise|pass|give|leave|wait|try|mend|"
    "correct|add|write|use|install|check|drop|begin|name"
)
REMEDY = re.compile(
    rf"(?<![\w-])--[a-z-]+ [\w{{]|pip install|[;:,(] (?:so |or )?(?:{VERBS})\b|\b(?:so|or) (?:{VERBS})\b|"
    r"same command|leaves (?:it|them|multi)|takes it from"
)


def followed():
    """{part of a message: the test that follows it}."""
    found = dict(ELSEWHERE)
    for path in (ROOT / "tests").glob("test_remedies_*.py"):
        for test in (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)):
            calls = [mark for mark in test.decorator_list if isinstance(mark, ast.Call)]
            parts = [part.value for call in calls if ast.unparse(call.func) == "follows" for part in call.args]
            found |= dict.fromkeys(parts, f"tests/{path.name}::{test.name}")
    return found


def remedies():
    """{message, with {} for its values: where it stands} of all strings of the code that tell what to do."""
    found = {}
    paths = [*(ROOT / "quant").rglob("*.py"), ROOT / "ornith_moe/cli.py", *(ROOT / "ornith_moe/command").glob("*.py")]
    for path in sorted(paths):
        tree, other = ast.parse(path.read_text()), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
                other.add(node.value)
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("typer."):  # help
                other |= set(ast.walk(node))
            if isinstance(node, ast.JoinedStr):
                other |= set(node.values)
        for node in ast.walk(tree):
            if node not in other and REMEDY.search(text := _text(node)):
                found[text] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def _text(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_every_remedy_is_followed():
    known = [*followed(), *NOT_FOLLOWED]
    found = remedies()
    assert len(found) > 60
    assert {text: where for text, where in found.items() if not any(part in text for part in known)} == {}
    assert [part for part in known if not any(part in text for text in found)] == [], "no message says so any more"


def test_the_tests_that_follow_exist():
    for test in set(followed().values()):
        path, _, name = test.rpartition("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text(), test


def test_extras_are_those_of_the_package():
    setup = (ROOT / "setup.py").read_text()
    for path in [*(ROOT / "quant").rglob("*.py"), ROOT / "ornith_moe/cli.py"]:
        for extra in re.findall(r"ornith-moe\[(\w+)\]", path.read_text()):
            assert f'"{extra}": [' in setup, (path, extra)
