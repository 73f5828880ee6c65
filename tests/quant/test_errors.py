"""`brief`: a value of a message in one short line. Reference: Python's own repr where it is short.

That no message of quant/ prints a value in another way is held by a walk over its `raise` statements: no `!r`, and no
slice but of texts that the list below names.
"""

import ast
from pathlib import Path

import pytest

from ornith_moe.quant.errors import BRIEF, brief


@pytest.mark.parametrize("value", ["name", 7, -1.5, None, [1, 2], {"a": [True]}, "tab\there", "\ud800"])
def test_a_short_value_is_its_repr(value):
    assert brief(value) == repr(value)


def _nested(depth):
    value = 1
    for _ in range(depth):
        value = {"a": value}
    return value


LONG = {
    "just over": "x" * 121,
    "string": "x" * 10**7,
    "integer": 10**5000,
    "integer inside": [10**5000],
    "string inside": {"k": "v" * 10**6},
    "list": list(range(10**6)),
    "nested": _nested(900),
}


@pytest.mark.parametrize("kind", LONG)
def test_any_other_is_cut(kind):
    assert 10 <= len(brief(LONG[kind])) <= BRIEF


def test_both_ends_are_shown():
    cut = brief("start" + "-" * 500 + "end")
    assert cut.startswith("'start") and cut.endswith("end'")


QUANT = Path(__file__).parents[2] / "quant"
OTHERWISE = {  # values that are not from a file, or cut already
    "str(problem)[:100]": "what Python's json says",
    "str(error)[:120]": "what a compiler of patterns says",
    "reason[:200]": "what huggingface_hub says",
    "shape[-1:]": "one size",
}


def _is_slice(node):
    return isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice)


def _is_brief(node):
    """`brief(value)`, or `map(brief, values)`."""
    named = ("brief", "bare")
    return isinstance(node, ast.Call) and (
        getattr(node.func, "id", "") in named or any(getattr(argument, "id", "") in named for argument in node.args)
    )


def _printed_otherwise(tree):
    """Expressions in the f-strings of `raise` statements that are printed by `!r` or cut by hand."""
    for statement in (node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc):
        for value in (node for node in ast.walk(statement.exc) if isinstance(node, ast.FormattedValue)):
            cut = {node for node in ast.walk(value.value) if _is_slice(node)}
            cut -= {inner for node in ast.walk(value.value) if _is_brief(node) for inner in ast.walk(node)}
            if value.conversion == ord("r") or cut:
                yield ast.unparse(value.value), statement.lineno


def test_every_value_of_a_message_is_brief():
    assert list(_printed_otherwise(ast.parse("raise ValueError(f'{a!r} {b[:3]} {brief(c[:3])} {d}')"))) == [
        ("a", 1),
        ("b[:3]", 1),
    ]
    found = {
        f"{path.relative_to(QUANT)}:{line}: {what}": what
        for path in QUANT.rglob("*.py")
        for what, line in _printed_otherwise(ast.parse(path.read_text()))
    }
    assert [where for where, what in found.items() if what not in OTHERWISE] == []
