"""A weight as products read it: what its views and copies hold. The reference is `quant.fp8` and torch's own views."""

import pytest
import torch

from ornith_moe.quant import fp8
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import RECIPES, recipe_of


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_weight_is_stored_as_the_recipe_says(recipe):
    w = torch.randn(2, 150, 200)
    found = Operand.quantized(w, recipe, "ue8m0")
    expected = {
        "bf16": (w, None),
        "fp8": fp8.quantize_fp8_block(w, scale="ue8m0"),
        "fp8_full": fp8.quantize_fp8_block(w, scale="ue8m0"),
        "fp8_channel": fp8.quantize_fp8_channel(w),
    }[recipe.name]
    for part, truth in zip(found[:2], expected, strict=True):
        assert part is truth or torch.equal(part.view(torch.uint8), truth.view(torch.uint8))
    assert found.is_ue8m0 == recipe.name.endswith(("fp8", "full"))
    assert found.scale_of_activations == ("ue8m0" if found.is_ue8m0 else "fp32")
    assert found.per_row == recipe.name.endswith("channel")
    assert found.dequantized(torch.float32).sub(w).norm() < 0.04 * w.norm()


@pytest.mark.parametrize("name", ("fp8", "fp8_channel"))
def test_the_transposed_pair_holds_the_same_numbers(name):
    plain = Operand.quantized(torch.randn(2, 150, 200), recipe_of(name))
    both = plain.with_transposed()
    assert both.value is plain.value and both.scale is plain.scale and both.with_transposed() is both
    for found in (plain.transposed, both.transposed):
        assert found.per_row == plain.per_row
        assert torch.equal(found.value.view(torch.uint8), plain.value.mT.view(torch.uint8))
        assert torch.equal(found.scale, plain.scale.mT)
    assert plain.transposed.value.data_ptr() == plain.value.data_ptr()
    assert both.transposed.value.is_contiguous() and both.transposed.scale.is_contiguous()
    assert both.transposed.transposed.value is both.value


def test_a_plain_weight_has_no_copy():
    w = torch.randn(2, 3, 4)
    assert Operand(w).with_transposed() == (w, None, None, None) and torch.equal(Operand(w).transposed.value, w.mT)
    assert Operand(w).dequantized(torch.bfloat16) is w and not Operand(w).per_row
