"""`brief`: a value of a message in one short line. Reference: Python's own repr where it is short."""

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
