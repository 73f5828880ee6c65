"""Types of a model's tensors.

Reference: every combination of types, one by one, by the definition of the loss written a second time. Not covered:
that the loss is the KL of a model, which is measured on trained weights (quant/fitting/loss.py says how).
"""

import itertools

import pytest

from ornith_moe.quant.fitting.fit import Problem
from ornith_moe.quant.fitting.loss import Loss
from ornith_moe.quant.fitting.recipe import recipe
from ornith_moe.quant.fitting.sensitivity import Sensitivity, TensorErrors
from ornith_moe.quant.gguf.header import padded
from ornith_moe.quant.gguf.tensor_types import parse_asked_types

pytest.importorskip("scipy", reason="scipy, the extra `fit`, is not installed")
ERRORS = {"Q2_K": 0.08, "IQ3_S": 0.02, "Q4_K": 0.005, "Q8_0": 0.00003}
SHAPES = {
    "token_embd.weight": (300, 256),
    "blk.0.ffn_gate_exps.weight": (4, 64, 256),
    "blk.0.ffn_up_exps.weight": (4, 64, 256),
    "blk.0.ffn_down_exps.weight": (4, 256, 64),  # rows of 64: K-quants give way
    "blk.0.attn_output.weight": (256, 256),
}
WEIGHTS = {"token_embd": 0.019, "attn_output": 0.0022, "gate": 0.0028, "up": 0.0027, "down": 0.0093}
FALLBACK = {"Q2_K": "Q4_0", "IQ3_S": "IQ4_NL", "Q4_K": "Q5_0", "Q8_0": "Q8_0"}


def sensitivity(tied):
    tensors = []
    for name, shape in (SHAPES | ({} if tied else {"output.weight": (300, 256)})).items():
        errors = ERRORS
        if "down" in name:
            errors = {"Q4_0": 0.007, "IQ4_NL": 0.006, "Q5_0": 0.002, "Q8_0": 0.00003}
        tensors.append(TensorErrors(name, shape, "blk" in name, 2.0, {k: 2 * e for k, e in errors.items()}))
    return Sensitivity("m", "", "", tuple(ERRORS), tuple(tensors))


def definition(types, tied):
    x = {name: dict(ERRORS, Q4_0=0.007, IQ4_NL=0.006, Q5_0=0.002)[kind] for name, kind in types.items()}
    noise = sum(
        next(w for k, w in WEIGHTS.items() if k in name) * e for name, e in x.items() if name != "output.weight"
    )
    return 0.18 * x["token_embd.weight" if tied else "output.weight"] + noise**0.75


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("imatrix", [False, True])
def test_no_other_types_lose_less(tied, imatrix):
    found = sensitivity(tied)
    problem = Problem(Loss(found, layers=1), {}, imatrix)
    assert ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight") in problem.groups
    least, sizes = problem.least(), []
    for limit in (least, int(1.15 * least), int(1.5 * least), 10 * least):
        best = None
        for kinds in itertools.product(ERRORS, repeat=len(problem.groups)):
            types = {}
            for names, kind in zip(problem.groups, kinds, strict=True):
                types |= {name: FALLBACK[kind] if "down" in name else kind for name in names}
            nbytes = sum(padded(found.by_name[name].nbytes(kind)) for name, kind in types.items())
            if nbytes <= limit:
                best = min(best or 1e9, definition(types, tied))
        chosen = problem.within(limit)
        assert chosen.kl == pytest.approx(best, rel=1e-5) and chosen.nbytes <= limit
        assert chosen.kl == pytest.approx(definition(chosen.types, tied)) == problem.loss.kl(chosen.types)
        assert chosen.bound <= best * 1.00001 and chosen.gap < 1e-4
        sizes.append(chosen.nbytes)
    assert sizes == sorted(sizes) and problem.within(least - 1) is None


def test_types_that_are_noise_without_importance_need_it():
    found = sensitivity(False)
    errors = {"IQ3_XXS": 0.0, "Q8_0": 0.1, "IQ4_NL": 0.0}
    tensors = tuple(TensorErrors(t.name, t.shape, t.important, 1.0, errors) for t in found.tensors)
    noisy = Sensitivity("m", "", "", ("IQ3_XXS", "Q8_0"), tensors)
    for imatrix in (False, True):
        types = Problem(Loss(noisy, 1), {}, imatrix).within(1 << 40).types
        assert (types["blk.0.attn_output.weight"] == "IQ3_XXS") == imatrix
        assert types["token_embd.weight"] == "Q8_0", "no importance is measured of it"


def test_what_is_asked_stays():
    asked = {"blk.0.ffn_up_exps.weight": "Q2_K", "output.weight": "BF16"}
    chosen = Problem(Loss(sensitivity(False), 1), asked, False).within(1 << 40)
    assert chosen.types | asked == chosen.types and chosen.types["blk.0.ffn_gate_exps.weight"] == "Q8_0"


def test_a_recipe_is_read_by_both(tmp_path):
    """llama-quantize takes words with one equals sign, and knows no comments."""
    types = {"blk.0.attn_v.weight": "Q4_K", "blk.10.attn_v.weight": "Q8_0"}
    file = tmp_path / "r"
    file.write_text(recipe(types, {"made by": "--to gguf:fit=16GB (x)\n=q2_k", "KL": 0.5}))
    asked = parse_asked_types(file=file)
    assert {name: asked.type_of(name, True) for name in types} == types
    assert asked.type_of("blk.1.attn_v.weight", True) is None and len(asked.tensor_types) == 2
    for line in file.read_text().splitlines():
        pattern, kind = line.split("=")
        assert " " not in line and kind in ("f32", "q4_k", "q8_0")
        assert pattern.startswith("#") == (kind == "f32")
