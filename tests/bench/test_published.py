"""bench/published.py and bench/parts.py: the documents say what bench/results says, in both formats of runs.

The reference is the documents themselves, and made-up runs whose ratios can be done in the head. Not covered: prose
around the marked parts.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ornith_moe.bench import published
from ornith_moe.bench.parts import PARTS, verdict
from ornith_moe.bench.rows import Row, Run, save
from ornith_moe.quant.errors import OrnithError

ROOT = Path(__file__).resolve().parents[2]  # the checkout, whatever was installed
LAYER = {
    "arch": "sm90",
    "device": "H100 SXM",
    "shape": "Qwen3.5 35B: T=64 E=256 top_k=8 H=2048 I=512",
    "recipe": "fp8",
    "modelled_forward_us": 266.4,
    "modelled_backward_us": 829.0,
    "share_of_bound": 0.79,
    "modelled_tflop_s": 9.0,
}
LAUNCHES = [
    {"arch": "sm90", "recipe": "fp8", "pass": "forward", "shape": LAYER["shape"], "kernel": kernel, "modelled_us": us}
    for kernel, us in (("route softmax", 5.0), ("plan scan", 2.0), ("fp8_cast tokens", 3.0), ("gate_up fp8", 1000.0),
                       ("down fp8", 200.0), ("combine", 50.0))
]  # fmt: skip


def layer_row(tokens, name, ms, **said):
    case = {"model": "ornith-35b", "tokens": tokens, "dtype": "bf16", "pass": "forward", "routing": "uniform"}
    said = {
        "peer": name != "ours",
        "case": case,
        "bytes": 10**6,
        "flops": 10**9,
        "limit_s": 0.001,
        "limit": "copy",
    } | said
    return Row("moe", f"35b bf16, T = {tokens}, forward", name, median_s=ms and ms / 1e3, **said)


MACHINE = {"cpu": "a|b", "cores": 2, "load_at_start": 0.25}
ROWS = [
    layer_row(1, "ours", 2.0),
    layer_row(1, "grouped_mm", 4.0),
    layer_row(1, "eager", 1.0),
    layer_row(64, "ours", 10.0),
    layer_row(64, "grouped_mm", 25.0),
    layer_row(64, "liger", None, status="missing", why="liger-kernel is not installed"),
]
RUN = Run("2026-11-29T01:02:03+00:00", "0123456789ab", MACHINE, {"copy": 30.0}, rows=ROWS)


@pytest.fixture
def results(tmp_path):
    save(RUN, tmp_path / "new.json")
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": LAUNCHES, "layers": [LAYER]}))
    return tmp_path


def part(name, files, results):
    text = published.rewritten(f"before\n<!-- figures: {name} {files} -->\nold\n<!-- end -->\nafter", results)
    return re.fullmatch(r"before\n<!-- figures: .* -->\n(.*)\n<!-- end -->\nafter", text, re.S).group(1)


def test_the_documents_say_what_the_results_say(capsys):
    assert published.main(["--check", "--root", str(ROOT)]) == 0, capsys.readouterr().out
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {match[1] for match in published.PART.findall(text)} >= {"codecs", "experts"}


def test_a_changed_digit_is_noticed_and_mended(tmp_path, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    here = ["--root", str(tmp_path)]
    digit = re.compile(r"\d(?=x \|)").search(text, published.PART.search(text).start())
    changed = text[: digit.start()] + str((int(digit[0]) + 1) % 10) + text[digit.end() :]
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    assert published.main([*here, "--check"]) == 1 and "README.md" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == changed
    assert published.main(here) == 0 and (tmp_path / "README.md").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("experts", ["| 35B layer (256 experts, top 8), BF16 forward | 0.50x | 2.5x |", "means 1.12x forward"]),
        ("peers", ["| moe | `grouped_mm` | 2 | 2 | 0 | 0 | 2.2x | 2.0x | 2.5x |",
                   "| moe | `eager` | 1 | 0 | 0 | 1 | 0.50x | 0.50x | 0.50x |", "| moe | `liger` | missing |"]),
        ("losses", ["| 35b bf16, T = 1, forward | ours | 2 | `eager` | 1 | 0.50x | lost | 50 % | 100 % | copy |"]),
        ("growth-tokens", ["| ornith-35b, bf16, forward | ours | 2 | 10 | 5x over 64x |"]),
        ("growth-experts", ["no two rows that differ in nothing but experts"]),
        ("sizes", ["| ornith-35b | 256 | 8 | 2048x512 | bf16 | 64 | 10 | 1 | 1.0 | 10 % |"]),
        ("machine", ["| 2026-11-29 | a\\|b, 2 cores | None | `012345678` | 0.25 | copy 30 |"]),
    ],
)  # fmt: skip
def test_parts_of_a_run(results, name, lines):
    said = part(name, "new.json", results)
    assert [line for line in lines if line not in said] == []
    assert "old" not in said


def test_even_is_where_percentiles_meet():
    ours = layer_row(1, "ours", 10.0, p20_s=0.009, p80_s=0.011)
    for ms, low, high, word in (
        (12.0, 0.0115, 0.0125, "won"),
        (12.0, 0.0105, 0.0125, "even"),
        (8.0, 0.007, 0.0085, "lost"),
    ):
        assert verdict(ours, layer_row(1, "eager", ms, p20_s=low, p80_s=high)) == word
        assert verdict(ours, layer_row(1, "eager", ms)) == {"even": "won"}.get(word, word)


def test_modelled_parts(results):
    row = "| H100 SXM | 35B | 64 | `fp8` | 266 | 79 % | 1,095 | 9 |"
    said = part("modelled", "kernels.json", results)
    assert row in said and said.startswith("| modelled")
    assert "| 64 | 10 | 1,000 | 200 | 50 | 1,260 |" in part("modelled-launches", "kernels.json", results)
    assert "modelled at 79 % of the bound at T = 64" in part("modelled-share", "kernels.json", results)


def test_of_several_runs_the_first_that_has_a_row_gives_it(results):
    save(replace(RUN, rows=[layer_row(1, "ours", 1.0), layer_row(1, "eager", 3.0)]), results / "newer.json")
    assert "| 3.0x | 2.5x |" in part("experts", "newer.json new.json", results)
    assert "| 0.50x | 2.5x |" in part("experts", "new.json newer.json", results)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- figures: nonsense new.json -->\n<!-- end -->", "expected one of"),
        ("<!-- figures: peers none.json -->\n<!-- end -->", "expected a result as JSON"),
        ("<!-- figures: peers kernels.json -->\n<!-- end -->", "not files for such a part"),
        ("<!-- figures: modelled new.json -->\n<!-- end -->", "not files for such a part"),
        ("<!-- figures: peers new.json -->\n", "to close"),
        ("<!-- figures: peers -->\n<!-- end -->", "to close"),
    ],
)
def test_a_part_that_cannot_be_written_is_an_error(results, text, problem):
    with pytest.raises(OrnithError, match=problem):
        published.rewritten(text, results)


def test_every_part_of_the_documents_is_known_and_of_known_files():
    found = [match for path in (ROOT / "docs").glob("*.md") for match in
             published.PART.findall(path.read_text(encoding="utf-8"))]  # fmt: skip
    assert {match[1] for match in found} <= PARTS.keys() and len(found) > 5


def test_commands_have_columns_of_what_they_used(tmp_path):
    case = {"whole": "command", "build": "mlx:4"}
    used = {"peak_rss_bytes": 2e9, "peak_own_bytes": 1e9, "read_bytes": 8.76e9, "write_bytes": 2.5e9}
    rows = [
        Row("convert", "g", "ours", False, case=case, median_s=10.0, rounds=3, note="note", used=used),
        Row("convert", "g", "cp -r", False, case=case, median_s=5.0, rounds=3, used=used | {"read_bytes": 0}),
        Row("convert", "g", "mlx", True, "missing", "pip install mlx", case),
    ]
    tool = Row("convert", "g", "tool", True, case=case, median_s=45.0, rounds=3, used=used | {"peak_rss_bytes": 6.7e9})
    save(replace(RUN, rows=[*rows, tool]), tmp_path / "run.json")
    *_, line = part("tools", "run.json", tmp_path).splitlines()
    assert line == "| mlx:4 | 10.0 s | 2 GB | `tool` | 4.5x | 6.7 GB |"
    save(replace(RUN, rows=rows), tmp_path / "run.json")
    header, _, ours, copied, missing = part("commands", "run.json", tmp_path).splitlines()
    assert "| peak RSS, GB | of it no mapped files | read from the disk | written |" in header
    assert ours == "| mlx:4 | ours | 10.0 (3) | 0.50x | 2.00 | 1.00 | 8.76 | 2.50 | note |"
    assert "| 0.00 | 2.50 |" in copied and missing == "| mlx:4 | `mlx` | missing |  |  |  |  |  | pip install mlx |"
    save(replace(RUN, rows=[replace(row, used={}) for row in rows]), tmp_path / "run.json")
    assert part("commands", "run.json", tmp_path).splitlines()[2] == "| mlx:4 | ours | 10.0 | 0.50x | note |"
