"""What a user writes about types: read as llama-quantize reads it, and told in one sentence where it is wrong.

Reference: llama-quantize's reading (tests/quant/test_gguf_types.py holds its decisions). Not covered: the few regular
expressions that ECMAScript and Python understand differently.
"""

import time

import pytest

from ornith_moe.quant import recipe as recipe_module
from ornith_moe.quant.builds import plan_build
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.recipe import parse_recipe
from ornith_moe.quant.source import open_source


def test_words_before_files_and_the_first_that_fits(tmp_path):
    file = tmp_path / "recipe.txt"
    file.write_text("# a comment = here\nffn_down=q4_K ATTN_V=Q5_0\n\n  blk\\.7\\.=bf16\n")
    recipe = parse_recipe(["ffn_down_exps=iq4_nl"], file=file)
    assert recipe.tensor_types == (
        ("ffn_down_exps", "IQ4_NL"),
        ("ffn_down", "Q4_K"),
        ("attn_v", "Q5_0"),
        (r"blk\.7\.", "BF16"),
    )
    assert recipe.type_of("blk.7.ffn_down_exps.weight", True) == "IQ4_NL"
    assert recipe.type_of("blk.7.ffn_down_shexp.weight", True) == "Q4_K"
    assert recipe.type_of("blk.7.attn_q.weight", True) == "BF16"
    assert recipe.type_of("blk.6.attn_q.weight", True) is None
    assert recipe.type_of("blk.6.ffn_down.weight", False) is None  # Q4_K is nothing for a file that is not quantized
    assert recipe.type_of("blk.7.ffn_down.weight", False) == "BF16"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("ffn_down", "expected REGEX=TYPE"),
        ("=q4_k", "expected REGEX=TYPE"),
        ("ffn_down=", "is no type"),
        ("ffn_down=q9_z", "'q9_z' is no type; expected one of F32"),
        ("ffn_down=q4_km", "'q4_km' is no type (did you mean Q4_K?)"),
        ("ffn_down=i32", "is no type"),
        ("(ffn=q4_k", "is no regular expression"),
        ("a{9999999999999999999999}=q4_k", None),
        ("[=q4_k", "is no regular expression"),
        ("x" * 600 + "=q4_k", "at most 512 characters"),
        ("(" * 500 + "=q4_k", "is no regular expression"),
    ],
)
def test_bad_words_are_one_sentence(word, told):
    try:
        parse_recipe([word]).type_of("blk.0.ffn_down.weight", True)
    except PlanError as error:
        assert str(error).startswith("--tensor-type: ") and "\n" not in str(error)
        assert told is None or told in str(error)
    else:
        assert told is None


@pytest.mark.parametrize("content", [b"\xff=q4_k", b"x" * ((4 << 20) + 1), None])
def test_bad_files_are_one_sentence(tmp_path, content):
    file = tmp_path / "recipe"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PlanError, match="expected a recipe"):
        parse_recipe(file=file)


@pytest.mark.parametrize("pattern", ["(([a-z_]+)+)+$", "(.*)*(.*)*(.*)*(.*)*(.*)*#", r"^(\w+\.?)*$", "(.+.+)+!"])
def test_patterns_that_would_never_end_are_stopped(monkeypatch, pattern):
    monkeypatch.setattr(recipe_module, "SEARCH_SECONDS", 0.2)
    recipe, began = parse_recipe([f"{pattern}=q4_k"]), time.monotonic()
    try:
        recipe.type_of("blk.0." + "ffn_down_exps" * 4 + "-weight", True)
    except PlanError as error:
        assert "without repeats inside repeats" in str(error)
    assert time.monotonic() - began < 20  # no measurement: without the limit it would take longer than any test


def test_compiling_is_bounded_too():
    for pattern in ("((a{0,1000}){0,1000}){0,1000}", "(?:a?){500}a{500}", "(a|b|c|d){0,65535}" * 10):
        recipe = parse_recipe([f"{pattern}=q4_k"])
        try:
            recipe.type_of("a" * 64, True)
        except PlanError as error:
            assert "takes more than" in str(error)


def test_plans_tell_what_a_recipe_does_not_reach():
    source = open_source("ornith-1.0-9b")
    recipe = parse_recipe(["fnn_down=q8_0", "norm=q4_k"], token_embedding_type="q8_0", output_tensor_type="bf16")
    plan = plan_build(source, "gguf:Q4_K_M", recipe=recipe)
    types = {tensor.name: tensor.dtype for tensor in plan.tensors}
    assert (types["token_embd.weight"], types["output.weight"], types["output_norm.weight"]) == ("Q8_0", "BF16", "F32")
    assert any("no tensor has a name that 'fnn_down' fits" in note for note in plan.notes)
    plan = plan_build(source, "gguf:BF16", recipe=recipe)
    assert any("left out as by llama-quantize" in note for note in plan.notes)
    assert {tensor.dtype for tensor in plan.tensors} == {"BF16", "F32", "Q8_0"}


def test_types_that_are_noise_without_importance_are_told():
    plan = plan_build(open_source("ornith-1.0-9b"), "gguf:Q4_K_M", recipe=parse_recipe(["ffn_up=iq2_xxs"]))
    assert len(plan.needs_imatrix) == 32 and any("give one with --imatrix" in note for note in plan.notes)
    assert not plan_build(open_source("ornith-1.0-9b"), "gguf:Q2_K").needs_imatrix
    assert plan_build(open_source("ornith-1.0-9b"), "gguf:Q2_K_S").needs_imatrix
