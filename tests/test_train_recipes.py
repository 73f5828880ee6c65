"""`bench/train_recipes.py` on a smaller nano: FP8 learns like bf16, and so does a router that replays its choices.

Not covered: that the loss is within 1 % (the full bench shows it; here sixteen steps from scratch only bound it).
"""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "train_recipes", Path(__file__).resolve().parent.parent / "bench" / "train_recipes.py"
)
train_recipes = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_recipes)

REDUCED = replace(
    train_recipes.SETTINGS,
    steps=16,
    batch=2,
    length=32,
    learning_rate=1e-2,
    warmup_steps=2,
    vocab_size=512,
    hidden_size=64,
    experts=6,
    text_bytes=400_000,
    heldout_tokens=512,
)


@pytest.mark.slow
def test_fp8_learns_like_bf16_and_replay_reproduces_every_choice():
    result = train_recipes.compare(["fp8"], [0], True, REDUCED, progress=False)
    assert json.loads(json.dumps(result)) == result
    runs = {(run["recipe"], run["replay"]): run for run in result["runs"]}
    assert list(runs) == [("bf16", False), ("fp8", False), ("fp8", True)]
    for name, run in runs.items():
        assert run["loss_before"] == pytest.approx(math.log(512), rel=0.05)  # a fresh model knows nothing
        assert run["loss_after"] < 0.95 * run["loss_before"], name
        assert 0.95 < run["ratio_to_bf16"] < 1.05, name
        assert (run["ratio_to_bf16"] == 1) == (run["recipe"] == "bf16"), name  # a recipe that changes nothing ran not
    lost = runs["bf16", False]["least_sqnr_db"]
    assert set(lost) == {"fp8", "fp8_full", "fp8_channel"}
    assert all(18 < db < 60 for least in lost.values() for db in least.values()), lost  # a longer run has more
    replay = runs["fp8", True]
    assert replay["replayed_choices"] == 16 * 2 * 32 * 4 * 4  # steps, batch, length, layers, top_k
    assert replay["replayed_wrongly"] == 0
    assert 0 < replay["flipped_share"] < 0.2  # the rollout's recipe chose otherwise now and then: the record matters
    assert min(replay["routers_moved"]) > 0.01


def test_a_worse_loss_or_a_wrong_replay_is_no_success(monkeypatch):
    monkeypatch.setattr(train_recipes, "read_text", lambda settings: None)
    losses = {"bf16": 2.0, "fp8": 2.03}

    def train(recipe, seed, replayed, *_):
        return {"recipe": recipe, "replay": replayed, "seed": seed, "loss_after": losses[recipe], "replayed_wrongly": 1}

    monkeypatch.setattr(train_recipes, "train", lambda *a: train(*a) | {"replayed_wrongly": 0})
    assert not train_recipes.compare(["fp8"], [0], False)["ok"]
    losses["fp8"] = 2.01
    assert train_recipes.compare(["fp8"], [0], False)["ok"]
    monkeypatch.setattr(train_recipes, "train", train)
    assert not train_recipes.compare(["fp8"], [0], True)["ok"]
