"""bench/figures.py and bench/report.py on a run made by hand: nothing is left out, nothing comes from outside.

The reference is the run itself. Not covered: how a figure looks, which only a person can tell.
"""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from ornith_moe.bench.figures import figures, panels
from ornith_moe.bench.report import main, scores, write
from ornith_moe.bench.rows import STATUSES, Row, Run, rated, save

HOSTILE = "<script>alert('$x$')</script>&\"x"
UNITS = re.compile(
    r"\bms\b|GFLOP/s|FLOP per byte|time / (ours|this time)|tokens T|experts E|cores|bits per weight|nats per token"
    r"|no unit"
)


def rows():
    found = []
    for tokens in (1, 64):
        for experts in (8, 32):
            case = {"model": f"e{experts}", "tokens": tokens, "experts": experts, "threads": 2, "pass": "forward"}
            group, timed = f"experts E = {experts}, T = {tokens}", {"bytes": 1 << 20, "flops": 1 << 30, "rounds": 5}
            seconds = tokens * experts * 1e-5
            found += [
                Row("moe", group, "ours", False, case=case, median_s=seconds, p20_s=seconds, p80_s=1.1 * seconds,
                    limit_s=seconds / 4, limit="matrix", error=2e-3, peak_bytes=5 << 20, **timed),
                Row("moe", group, "grouped_mm", True, case=case, median_s=0.8 * seconds if tokens == 1 else 3 * seconds,
                    error=0.0, **timed),
                Row("moe", group, "loop", True, "red", f"dx is off by 0.3 at T = {tokens}", case) if experts == 8 else
                Row("moe", group, "loop", True, case=case, median_s=9 * seconds, error=3e-3, **timed),
                Row("moe", group, "absent", True, "missing", "absent is not installed", case),
            ]  # fmt: skip
    found.append(Row("codecs", "Q8_0", "ours", False, "skipped", "out of proportion here"))
    found.append(Row("codecs", f"group {HOSTILE}", HOSTILE, True, median_s=1.0, note=HOSTILE))
    return rated(found)


BUILDS = [
    {"build": "fp8-block", "bits_per_weight": 9.0, "kl": 5e-4},
    {"build": "gguf:Q8_0", "bits_per_weight": 8.5, "kl": 2e-4},
]
RUN = Run(
    "2026-11-29T01:02:03+00:00",
    "0123456+",
    machine={"cpu": HOSTILE, "cores": 2, "load_at_start": 3.0},
    limits={"copy, 2 threads, GB/s": 30.0, "torch.mm float32, 2 threads, GFLOP/s": 170.0},
    control={"median_s": 0.01, "spread": 0.3},
    settings={"builds": BUILDS},
    rows=rows(),
)
LAYER = {"device": "H100 SXM", "shape": "35B: T=64", "recipe": "fp8", "modelled_forward_us": 266.0,
         "modelled_backward_us": 829.0, "share_of_bound": 0.79}  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    return {each.name: each for each in figures(RUN)}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    written = write(RUN, folder / "run.html", [LAYER])
    assert sorted(written) == sorted(folder.iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    return written[0].read_text(encoding="utf-8")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text.append(data)


def words(figure):
    from matplotlib.text import Text

    return " ".join(text.get_text() for text in figure.findobj(Text))


def test_every_figure_is_drawn_and_its_axes_tell_their_unit(drawn):
    expected = {"peers-moe", "peers-codecs", "roofline", "scaling-tokens", "scaling-experts", "error", "builds"}
    assert {name for name, each in drawn.items() if each.figure} == expected
    for each in drawn.values():
        if each.figure is None:
            assert each.why, each.name
            continue
        shown = [axes for axes in each.figure.axes if axes.get_visible()]
        assert shown and each.figure.get_suptitle() == each.question and each.question.endswith("?")
        assert all(UNITS.search(axes.get_xlabel()) for axes in shown if axes.xaxis.get_tick_params()["labelbottom"])
        # the bars of peers-* have names along y, other axes share the label of the first in their line
        assert each.name.startswith("peers") or UNITS.search(shown[0].get_ylabel()), each.name


def test_no_row_is_dropped_from_a_figure_in_silence(drawn):
    said = words(drawn["peers-moe"].figure)
    assert {"ours", "grouped_mm", "loop (red in 2 of 4)", "absent (missing)"} <= {
        text.get_text() for legend in drawn["peers-moe"].figure.legends for text in legend.get_texts()
    }
    assert (
        drawn["peers-codecs"].question.startswith("codecs: where")
        and said.count("loop: red") == 2
        and "ours: skipped" in words(drawn["peers-codecs"].figure)
    )
    assert "loop: red" in words(drawn["scaling-tokens"].figure)
    assert any(patch.get_hatch() for axes in drawn["peers-moe"].figure.axes for patch in axes.patches)


def test_many_groups_take_several_figures():
    many = [Row("codecs", f"group {i}", "ours", False, "skipped", "no time") for i in range(40)]
    names = [each.name for each in figures(replace(RUN, rows=many)) if each.figure]
    assert names == ["peers-codecs-1", "peers-codecs-2", "builds"]
    assert figures(replace(RUN, rows=many))[1].question == "codecs: how long does each task take? (2 of 2)"


def test_panels_differ_in_nothing_but_their_axis():
    found = panels(RUN, "tokens")
    assert len(found) == 2 and all(len({row.case["experts"] for row in mine}) == 1 for mine in found.values())
    assert panels(RUN, "cores") == {}


def test_a_row_without_threads_had_all_of_them():
    case = {"model": "nano", "routing": "uniform"}
    one = Row("moe", "one thread", "ours", False, case=case | {"threads": 1}, median_s=2.0)
    every = Row("moe", "all threads", "ours", False, case=case, median_s=1.0)
    other = replace(every, case={"model": "other"})
    found = panels(replace(RUN, rows=[one, every, other]), "cores")
    assert {name: [row.case["threads"] for row in mine] for name, mine in found.items()} == {"nano": [1, 2]}


def test_along_e_the_size_of_the_experts_is_named():
    cuts = [Row("moe", m, "ours", False, case={"model": m, "pass": "forward"}, median_s=1.0) for m in
            ("ornith-35b/32", "ornith-35b/8", "nano")]  # fmt: skip
    found = panels(replace(RUN, rows=cuts), "experts")
    assert list(found) == ["experts of 2048x512, forward"] and len(*found.values()) == 2


def test_the_page_stands_alone(page):
    parsed = Page(page)
    assert "script" not in parsed.tags and "link" not in parsed.tags and parsed.tags.count("img") == 7
    assert all(value.startswith("data:image/png;base64,") for value in parsed.loaded)
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[\w+/=]+", "", page))


def test_the_page_holds_every_row_and_escapes_what_files_say(page):
    told = "".join(Page(page).text)
    for status in STATUSES:
        assert f"{sum(row.status == status for row in RUN.rows)}rows {status}" in told.replace("\n", "")
    for row in RUN.rows:
        assert row.group in told and row.name in told and row.why in told
    assert page.count('<tr class="') == len(RUN.rows) + len({row.group for row in RUN.rows})
    assert HOSTILE in told and "<script" not in page
    assert told.index("Modelled, not measured: GPU") < told.index("H100 SXM")


def test_warnings_and_scores(page):
    assert scores(RUN.rows) == [("moe", 2, 0, 2, "1.55x")]  # T = 1 is lost to grouped_mm, T = 64 won
    told = "".join(Page(page).text)
    assert "load 3.00 on 2 cores" in told and "30% of their median" in told and "Where a peer is faster" in told
    assert "moe, absent, missing throughout: absent is not installed" in told


def test_a_run_without_rows_is_a_page(tmp_path):
    (path,) = write(Run("2026-11-29", ""), tmp_path / "empty.html")
    assert "This run has no rows." in path.read_text(encoding="utf-8")


def test_the_command_reads_a_saved_run(tmp_path, capsys):
    save(replace(RUN, rows=RUN.rows[-2:-1], settings={}), tmp_path / "run.json")
    assert main([str(tmp_path / "run.json"), str(tmp_path / "run.html")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ("run.html", "run-peers-codecs.png")]
    with pytest.raises(SystemExit, match=r"report: .*expected the JSON of a run"):
        main([str(tmp_path / "none.json"), str(tmp_path / "run.html")])
