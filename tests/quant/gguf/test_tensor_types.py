"""What a user writes about types: read as llama-quantize reads it, and told in one sentence where it is wrong.

Reference: llama-quantize's reading (tests/quant/gguf/test_mixtures.py holds its decisions). Not covered: the few
regular expressions that ECMAScript and Python understand differently.
"""

import time
import tracemalloc

import pytest

from ornith_moe.quant.budget import Budget, one_budget
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.gguf.tensor_types import parse_asked_types
from ornith_moe.quant.patterns import Patterns
from ornith_moe.quant.source.weights import open_source


def test_words_before_files_and_the_first_that_fits(tmp_path):
    file = tmp_path / "recipe.txt"
    file.write_text("# a comment = here\nffn_down=q4_K ATTN_V=Q5_0\n\n  blk\\.7\\.=bf16\n")
    asked = parse_asked_types(["ffn_down_exps=iq4_nl"], file=file)
    assert asked.tensor_types == (
        ("ffn_down_exps", "IQ4_NL"),
        ("ffn_down", "Q4_K"),
        ("attn_v", "Q5_0"),
        (r"blk\.7\.", "BF16"),
    )
    assert asked.type_of("blk.7.ffn_down_exps.weight", True) == "IQ4_NL"
    assert asked.type_of("blk.7.ffn_down_shexp.weight", True) == "Q4_K"
    assert asked.type_of("blk.7.attn_q.weight", True) == "BF16"
    assert asked.type_of("blk.6.attn_q.weight", True) is None
    assert asked.type_of("blk.6.ffn_down.weight", False) is None  # Q4_K is nothing for a file that is not quantized
    assert asked.type_of("blk.7.ffn_down.weight", False) == "BF16"


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
        parse_asked_types([word]).type_of("blk.0.ffn_down.weight", True)
    except PlanError as error:
        assert str(error).startswith(("--tensor-type: ", "tensor type ")) and "\n" not in str(error)
        assert told is None or told in str(error)
    else:
        assert told is None


@pytest.mark.parametrize("content", [b"\xff=q4_k", b"x" * ((4 << 20) + 1), None])
def test_bad_files_are_one_sentence(tmp_path, content):
    file = tmp_path / "recipe"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PlanError, match="expected a recipe"):
        parse_asked_types(file=file)


SLOW = ("(([a-z_]+)+)+$", "(.*)*(.*)*(.*)*(.*)*(.*)*#", r"^(\w+\.?)*$", "(.+.+)+!", "(?:.+?)" * 6 + "[^\\w.]$")
HUGE = ("((a{0,1000}){0,1000}){0,1000}", "(?:(?:){100000}){100000}x", "(a|b){0,65535}" * 10, "(?:(?:a{999}){999}){999}")


def test_one_budget_for_all_patterns_and_names():
    """Each of a hundred names gets its own search; all searches together stop after the time that one command has."""
    budget, began, slow_for = Budget(seconds=0.2), time.process_time(), "ffn_down_exps" * 4 + "-weight"
    with one_budget(budget):
        with pytest.raises(PlanError, match=r"5 patterns take more than 0\.2 s in all"):
            patterns = Patterns(SLOW)
            for number in range(100):
                patterns.first(f"blk.{number}.{slow_for}")
        assert budget.seconds <= 0 and time.process_time() - began < 5
        with pytest.raises(PlanError, match="patterns take more than"):  # what one build has spent, the next lacks
            patterns.unused([slow_for])
        with pytest.raises(PlanError, match="patterns take more than"):  # and another list of patterns too
            Patterns([SLOW[0], "b"]).first(slow_for)
    assert Patterns(["a"]).first("a") == 0


@pytest.mark.parametrize("pattern", HUGE)
def test_compiling_is_paid_from_the_budget(pattern):
    tracemalloc.start()
    with pytest.raises(PlanError, match="bytes of memory, and"):
        parse_asked_types([f"{pattern}=q4_k"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_long_recipe_of_plain_patterns_is_quick():
    """The longest published recipe has a line for each tensor; twenty times that takes a second."""
    patterns = Patterns(rf"^blk\.{layer}\.ffn_(gate|up|down)_exps\.weight$" for layer in range(1_000))
    names = [f"blk.{layer}.ffn_{kind}_exps.weight" for layer in range(60) for kind in ("gate", "up", "down")]
    assert [patterns.first(name) for name in names] == [layer for layer in range(60) for _ in range(3)]
    assert len(patterns.unused(names)) == 940
    fixed = Patterns(["(?:(?:a{100}){10}){10}", "[[:digit:]]+x", "(?<=ffn_)up(?!_)"])
    assert [fixed.first(name) for name in ("ffn_up.a", "7x", "ffn_up_exps")] == [2, 1, None]


def test_plans_tell_what_a_recipe_does_not_reach():
    source = open_source("ornith-1.0-9b")
    asked = parse_asked_types(["fnn_down=q8_0", "norm=q4_k"], token_embedding_type="q8_0", output_tensor_type="bf16")
    plan = plan_build(source, "gguf:Q4_K_M", asked=asked)
    types = {tensor.name: tensor.dtype for tensor in plan.tensors}
    assert (types["token_embd.weight"], types["output.weight"], types["output_norm.weight"]) == ("Q8_0", "BF16", "F32")
    assert any("no tensor has a name that 'fnn_down' fits" in note for note in plan.notes)
    plan = plan_build(source, "gguf:BF16", asked=asked)
    assert any("left out as by llama-quantize" in note for note in plan.notes)
    assert {tensor.dtype for tensor in plan.tensors} == {"BF16", "F32", "Q8_0"}


def test_types_that_are_noise_without_importance_are_told():
    plan = plan_build(open_source("ornith-1.0-9b"), "gguf:Q4_K_M", asked=parse_asked_types(["ffn_up=iq2_xxs"]))
    assert len(plan.needs_imatrix) == 32 and any("give one with --imatrix" in note for note in plan.notes)
    assert not plan_build(open_source("ornith-1.0-9b"), "gguf:Q2_K").needs_imatrix
    assert plan_build(open_source("ornith-1.0-9b"), "gguf:Q2_K_S").needs_imatrix
