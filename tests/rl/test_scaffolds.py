"""Prompts, reading and memory, by hand and by properties.

Reference: the rules of the module's docstring, restated as short lists. Not covered: what a policy makes of prompts.
"""

import doctest
import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ornith_moe.rl import scaffolds
from ornith_moe.rl.scaffolds import ScaffoldMemory, Stages, read

TAGS = ("<answer>", "</answer>")


class TestPrompts:
    def test_hold_the_task_and_the_scaffold(self):
        stages = Stages()
        first, later = stages.propose_prompt("count {x}", None), stages.propose_prompt("count {x}", "use {task}")
        assert "count {x}" in first and "before" not in first
        assert "count {x}" in later and "use {task}" in later  # braces of the text are text
        assert "use {task}" in stages.solve_prompt("count {x}", "use {task}")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"propose_template": "plan"}, r"propose_template: expected the fields \{previous\}, \{task\}, got none"),
            ({"solve_template": "{task}"}, r"solve_template: expected the fields \{scaffold\}, \{task\}, got \{task\}"),
            ({"solve_template": "{task} {scaffold} {x}"}, "solve_template: expected"),
            ({"previous_template": "{task}"}, "previous_template: expected"),
            ({"solve_template": "{task.__class__} {scaffold}"}, "solve_template: expected"),
            ({"answer_tags": ("<a>", "")}, "answer_tags: expected two different tags, or two empty ones"),
            ({"answer_tags": ("```", "```")}, "answer_tags: expected two different tags"),
        ],
    )
    def test_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Stages(**changes)

    def test_are_frozen(self):
        with pytest.raises(AttributeError):
            Stages().solve_template = "{task} {scaffold}"


class TestReading:
    @pytest.mark.parametrize(
        ("completion", "text", "thoughts"),
        [
            ("<answer>4</answer>", "4", ""),
            ("well, <answer>\n 4 \n</answer> done", "4", ""),
            ("<think>a</think><answer>4</answer>", "4", "a"),
            ("a</think><answer>4</answer>", "4", "a"),  # the template wrote <think>
            ("<think>a <think>b</think> c</think><answer>4</answer>", "4", "a <think>b</think> c"),
            ("<think><answer>3</answer></think><answer>4</answer>", "4", "<answer>3</answer>"),
            ("<answer>a <answer>b</answer> c</answer>", "a <answer>b</answer> c", ""),
            ("<answer><scaffold></answer>", "<scaffold>", ""),  # tags of other names are text
        ],
    )
    def test_one_region(self, completion, text, thoughts):
        assert read(completion, TAGS) == (text, thoughts, None)

    @pytest.mark.parametrize(
        ("completion", "failure"),
        [
            ("", "<answer> 0 times, expected once"),
            ("4", "<answer> 0 times, expected once"),
            ("<answer>4", "<answer> without </answer>"),
            ("<answer>a<answer>b</answer>", "<answer> without </answer>"),
            ("4</answer>", "</answer> without <answer>"),
            ("</answer><answer>4</answer>", "</answer> without <answer>"),
            ("<answer> \n</answer>", "nothing between <answer> and </answer>"),
            ("<answer>3</answer><answer>4</answer>", "<answer> 2 times, expected once"),
            ("<think>hm", "<think> without </think>"),
            ("<think>a</think><think>b<answer>4</answer>", "<think> without </think>"),
            ("<answer>4</answer></think>", "<answer> 0 times, expected once"),  # it was a thought
        ],
    )
    def test_failures(self, completion, failure):
        assert read(completion, TAGS)[::2] == (None, failure)
        assert Stages().read_answer(completion) is None

    def test_without_tags_the_rest_is_read(self):
        stages = Stages(scaffold_tags=("", ""), answer_tags=("", ""))
        assert stages.read_scaffold(" reverse ") == stages.read_answer("<think>x</think>\nreverse") == "reverse"
        assert stages.read_scaffold("  ") is None and stages.read_answer("<think>x") is None
        assert read("a", ("", ""), ("", "")) == ("a", "", None)

    @settings(deadline=None)
    @given(st.lists(st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "a", " ", "\n"]), max_size=12))
    def test_any_completion_is_read_or_fails_with_a_reason(self, parts):
        reading = read("".join(parts), TAGS)
        assert (reading.text is None) == (reading.failure is not None)
        if reading.text is not None:
            assert reading.text == reading.text.strip() != "" and reading.text in "".join(parts)


class TestMemory:
    def test_by_hand(self):
        memory = ScaffoldMemory(capacity=2, max_age=3, blend=0.5)
        assert memory.in_use("sums") is None and memory.age("sums", 9) == 0 and memory.categories == ()
        memory.offer("sums", "a", 0.25, step=1)
        memory.offer("sums", "a", 0.75, step=1)  # the same step: a mean
        memory.offer("sums", "b", 0.75, step=1)
        memory.offer("sums", "c", 0.25, step=1)
        assert memory.kept("sums") == [("b", 0.75), ("a", 0.5)] and memory.in_use("sums") == "b"
        memory.offer("sums", "a", 1.5, step=2)  # blended: 0.5 * 0.5 + 0.5 * 1.5
        assert memory.kept("sums") == [("a", 1.0), ("b", 0.75)] and memory.age("sums", 5) == 3
        memory.offer("words", "d", 0.0, step=4)
        assert memory.kept("sums") == [("a", 1.0), ("b", 0.75)] and memory.categories == ("sums", "words")
        memory.offer("words", "d", 0.0, step=5)  # "b" was measured at 1: four steps ago
        assert memory.kept("sums") == [("a", 1.0)]
        memory.offer("words", "d", 0.0, step=6)
        assert memory.in_use("sums") is None and memory.categories == ("words",)

    def test_ties_go_to_the_latest_then_by_text(self):
        memory = ScaffoldMemory()
        memory.offer("", "old", 1.0, step=0)
        for text in ("z", "y"):
            memory.offer("", text, 1.0, step=1)
        assert [text for text, _ in memory.kept("")] == ["y", "z", "old"]

    def test_draws_from_what_is_kept_by_the_generator_alone(self):
        memory = ScaffoldMemory(capacity=3)
        for index in range(5):
            memory.offer("", f"s{index}", index / 4, step=0)
        drawn = [memory.in_use("", random.Random(seed)) for seed in range(60)]
        assert set(drawn) == {"s2", "s3", "s4"}
        assert drawn == [memory.in_use("", random.Random(seed)) for seed in range(60)]

    offers = st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from("xy"), st.sampled_from("abcde"), st.integers(0, 8)), max_size=30
    )

    @settings(deadline=None)
    @given(offers=offers, data=st.data())
    def test_order_within_a_step_is_free_and_a_restart_changes_nothing(self, offers, data):
        offers.sort(key=lambda offer: offer[0])
        cut = data.draw(st.integers(0, len(offers)))
        shuffled = sorted(data.draw(st.permutations(offers)), key=lambda offer: offer[0])
        one, other, again = (ScaffoldMemory(capacity=2, max_age=2) for _ in range(3))
        for index, (step, category, text, value) in enumerate(offers):
            if index == cut:
                again.load_state_dict(json.loads(json.dumps(one.state_dict())))
            for memory in (one,) if index < cut else (one, again):
                memory.offer(category, text, value / 8, step)
        for step, category, text, value in shuffled:
            other.offer(category, text, value / 8, step)
        assert one.state_dict() == other.state_dict()
        assert cut == len(offers) or one.state_dict() == again.state_dict()
        for category in "xy":
            assert one.kept(category) == other.kept(category) and len(one.kept(category)) <= 2

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda m: m.offer("", "a", float("nan"), 1), "value: expected a finite number, got nan; a struck"),
            (lambda m: (m.offer("", "a", 1, 5), m.offer("", "a", 1, 4)), "step: expected 5 or later, got 4; restore"),
            (lambda m: ScaffoldMemory(0), "capacity, max_age, blend: expected at least 1"),
            (lambda m: m.load_state_dict({}), "state: expected what state_dict gives"),
            (lambda m: m.load_state_dict({"step": 1, "kept": {"": [["a"]]}}), "state: expected what state_dict gives"),
            (
                lambda m: m.load_state_dict({"step": 1, "kept": {"": [["a", 2, 1, 1, None]]}}),
                "no step after the latest",
            ),
        ],
    )
    def test_refusals(self, call, message):
        memory = ScaffoldMemory()
        with pytest.raises(ValueError, match=message):
            call(memory)


def test_starts_without_torch():
    code = "import sys, ornith_moe.rl.scaffolds, ornith_moe.rl.monitor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_examples_run():
    assert doctest.testmod(scaffolds).failed == 0
