"""bench/curve.py on alternatives made by hand. Not covered: how a figure looks, which only a person can tell."""

import re

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from ornith_moe.bench.curve import draw, write
from ornith_moe.quant.builds.build import Alternative

CURVE = [
    Alternative("gguf:fit=7GB", 7 * 10**9, 0.09),
    Alternative("gguf:Q2_K", 8 * 10**9, 0.1),
    Alternative("gguf:fit=10GB", 10**10, 0.03),
]


def test_the_page_stands_alone_and_has_every_build(tmp_path):
    page, picture = write(tmp_path / "curve.html", "<b>$x", [CURVE], {"gguf:fit=10GB"})
    text = page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG") and "<b>$x" not in text and "&lt;b&gt;$x" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text
    assert [each.build for each in CURVE] == re.findall(r"<td>(gguf:[^<]*)</td>", text)
    assert re.findall(r"<tr class=asked><td>([^<]*)", text) == ["gguf:fit=10GB"] and "0.03000" in text


def test_fits_are_a_line_and_named_builds_points_with_units():
    (axes,) = draw("t", [CURVE], {"gguf:fit=10GB"}).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("size of the files, GB", "predicted KL, nats per token")
    line, asked, named = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([7, 10], [0.09, 0.03]) and line.get_linestyle() == "-"
    assert list(asked.get_xdata()) == [10] and list(named.get_xdata()) == [8] and named.get_linestyle() == "None"
    assert [text.get_text() for text in axes.texts] == ["Q2_K"]
