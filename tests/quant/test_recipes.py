"""The rows of the table of recipes, and that a row is all a recipe is: one that the package does not have is computed.

The reference of the new recipe is `moe_mlp_reference`, which differentiates through the casts; how each cast rounds is
test_fp8.py's. Not covered: the Triton kernels, which have no cast of whole rows of a gradient.
"""

import pytest
import torch
from numeric import assert_close

import ornith_moe as om
from ornith_moe.backend.reference import moe_mlp_reference
from ornith_moe.quant.recipes import RECIPES, ROW, Recipe, recipe_of


def test_the_table_of_the_docstring():
    import ornith_moe.quant.recipes as recipes

    words = {None: "as it is", (128, 128): "128 x 128", (1, 128): "1 x 128"}
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe_of(name) is recipe
        line = next(line for line in recipes.__doc__.splitlines() if line.startswith(f"| {name} |"))
        weights, activations, gradient = (cell.strip() for cell in line.split("|")[2:5])
        assert weights == {None: "as they are", ROW: "a row"}.get(recipe.weights, "128 x 128")
        assert activations == {None: "as they are", ROW: "a token"}.get(recipe.activations, "1 x 128")
        assert gradient == words[recipe.input_gradient]


@pytest.mark.parametrize(("name", "inner", "taken"), [
    ("bf16", 24, True), ("fp8", 24, False), ("fp8", 256, True), ("fp8_full", 129, False), ("fp8_channel", 24, True),
])  # fmt: skip
def test_blocks_hold_no_rows_of_gate_and_of_up(name, inner, taken):
    assert recipe_of(name).takes(inner) == taken
    if taken:
        recipe_of(name).check(inner)
    else:
        with pytest.raises(ValueError, match=f"recipe: '{name}' needs .* multiples of 128, .*, got I = {inner}; use"):
            recipe_of(name).check(inner)


def test_an_unknown_name_is_told_those_there_are():
    with pytest.raises(ValueError, match="recipe: expected one of bf16, fp8, fp8_full, fp8_channel, got 'fp4'"):
        recipe_of("fp4")


def test_a_row_is_a_recipe(monkeypatch):
    """fp8_channel with FP8 gradients of the inputs, as CONTRIBUTING adds it."""
    monkeypatch.setitem(RECIPES, "toy", Recipe("toy", weights=ROW, activations=ROW, input_gradient=ROW))
    x, dy = torch.randn(23, 40), torch.randn(23, 40)
    indices, weights = torch.rand(23, 5).topk(2).indices, torch.rand(23, 2)
    gate_up, down = torch.randn(5, 48, 40) / 40**0.5, torch.randn(5, 40, 24) / 24**0.5

    def run(function, recipe):
        leaves = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
        y = function(leaves[0], indices, *leaves[1:], recipe=recipe)
        y.backward(dy)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    expected, plain = run(moe_mlp_reference, "toy"), run(moe_mlp_reference, "fp8_channel")
    assert not torch.equal(expected[1], plain[1])  # dx is that of a cast gradient
    for backend in ("cpu", "reference"):
        got = run(lambda *a, backend=backend, **k: om.moe_mlp(*a, backend=backend, **k), "toy")
        for label, value, truth in zip(("y", "dx", "dweights", "dgate_up", "ddown"), got, expected, strict=True):
            assert_close(label, value, truth, 1e-3)
