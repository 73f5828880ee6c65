"""examples/self_scaffold.py: its tasks, what it promises, and one short pass through every part of it.

Whether RL learns is what `make rl` shows, with its seeds in bench/results; here nothing depends on luck.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import self_scaffold as example
import word_tasks


def test_only_the_operation_of_its_category_solves_a_task():
    for category, operation in word_tasks.CATEGORIES.items():
        row = word_tasks.task(category, "bda")
        rewards = word_tasks.verifier(
            completions=[""] * 6,
            answer=[row["answer"]] * 6,
            answers=[word_tasks.obeys(name, row["query"]) for name in word_tasks.OPERATIONS],
        )
        assert rewards == [float(name == operation) for name in word_tasks.OPERATIONS]
    assert word_tasks.verifier(completions=["", ""], answer=["a", "a"], answers=[None, " a "]) == [0.0, 1.0]


def test_held_out_queries_are_never_trained_on():
    held = set(word_tasks.HELD_OUT)
    assert len(held) > 30 and held.isdisjoint(word_tasks.TRAINED)
    shown = {prompt.split(": ")[1].replace(" ", "") for prompt, _, _ in word_tasks.demonstrations(2000, 0, 0.1)}
    assert shown.isdisjoint(held) and len(shown) > 100


def test_demonstrations_obey_their_scaffold_whether_or_not_it_is_right():
    rows = list(word_tasks.demonstrations(2000, 0, 0.1))
    right = 0
    for prompt, scaffold, solution in rows:
        category, query = prompt.split(": ")
        assert solution == word_tasks.obeys(scaffold, query.replace(" ", ""))
        right += scaffold == word_tasks.CATEGORIES[category]
    assert right / len(rows) == pytest.approx(0.1 + 0.9 / 6, abs=0.03)


def _run(reward, right=0.9, obeys=0.95, flips=0.0, seed=0):
    figures = {"reward": reward, "right": right, "obeys": obeys, "cpu_seconds": 1.0, "step": 10}
    return {"seed": seed, "curve": [figures], "first_update": {"replay/flipped_share": flips}}


@pytest.mark.parametrize(
    ("ours", "theirs", "served", "said"),
    [
        (_run(0.8), _run(0.2), 0.8, None),
        (_run(0.55), _run(0.2), 0.55, "reward 0.55, expected at least 0.6"),
        (_run(0.8, right=0.7), _run(0.2), 0.8, "right 0.70"),
        (_run(0.8, obeys=0.8), _run(0.2), 0.8, "obeys 0.80"),
        (_run(0.65), _run(0.4), 0.65, "is not 0.3 above solution_only"),
        (_run(0.8, flips=0.01), _run(0.2), 0.8, "a first update clips or flips"),
        (_run(0.8), _run(0.2), 0.4, "Q8_0: reward 0.400 in llama.cpp"),
    ],
)
def test_what_a_run_did_not_show_is_said(ours, theirs, served, said):
    clients = [
        {"what": name, "client": "llama.cpp", "reward": reward} for name, reward in (("bf16", 0.8), ("Q8_0", served))
    ]
    clients[0]["reward"] = ours["curve"][-1]["reward"]
    result = {"arms": {"two_level": [ours], "solution_only": [theirs]}, "served": clients, "served_tasks": 120}
    found = example.failures(result)
    assert (not found) if said is None else any(said in sentence for sentence in found), found


def test_one_pass_through_every_part(tmp_path):
    words = example.make_policy(tmp_path / "warm-0", 0)
    run = example.train_arm("two_level", tmp_path / "warm-0", tmp_path / "arm", words, 0, updates=2)
    assert [row["step"] for row in run["curve"]] == [0, 1, 2]
    assert run["first_update"] == {"replay/flipped_share": 0.0, "clip_ratio/region_mean": 0.0}
    served = example.serve(tmp_path / "arm", tmp_path / "served", words, 2)
    assert [row["client"] for row in served] == ["transformers", "transformers", "llama.cpp"]
    result = {"arms": {"two_level": [run]}, "settings": {}, "served": served}
    example.draw(result, tmp_path / "rl.png")
    example.print_table(result)
    assert (tmp_path / "rl.png").read_bytes().startswith(b"\x89PNG")


def test_an_executor_that_never_obeys_stops_the_example(tmp_path, monkeypatch):
    words = example.make_policy(tmp_path, 0)
    monkeypatch.setattr(example, "WARM_ROUND", 1)
    monkeypatch.setattr(example, "WARM_ROUNDS", 1)
    with pytest.raises(SystemExit, match="obeys"):
        example.warm_start(tmp_path, words, 0)


def test_evaluation_tells_a_right_scaffold_from_one_that_is_obeyed():
    """A sampler that always proposes `reverse` and obeys it: right in a sixth of the categories, obeying in all."""

    def sample(prompts):
        if prompts[0].endswith("plan:"):
            return ["reverse"] * len(prompts)
        return [" ".join(reversed(prompt.split("\n")[0].split(": ")[1].split())) for prompt in prompts]

    figures = example.evaluate(sample, 600)
    assert figures["obeys"] == 1.0
    assert figures["right"] == pytest.approx(1 / 6, abs=0.05)
    assert figures["right"] <= figures["reward"] < figures["right"] + 0.15  # some queries read the same both ways
