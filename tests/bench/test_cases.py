"""`bench/shapes.py`, `bench/cases.py` and `bench/peers.py`: routings, cuts, the truth, and who stands where.

The reference of the truth is `backend="reference"`, which shares no code with it. Not covered: peers on a GPU.
"""

import numpy as np
import pytest
import torch

import ornith_moe as om
from ornith_moe.bench.cases import OUTPUTS, make_case, outputs_of, true_outputs, worst
from ornith_moe.bench.peers import MOE_PEERS, Peer, Unable, grouped, moe_peers
from ornith_moe.bench.shapes import MODELS, Experts, experts_of, fitting, route
from ornith_moe.quant.errors import OrnithError

SMALL = Experts(hidden=64, inner=128, experts=8, top_k=3)


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one-hot"])
def test_routings_choose_different_experts_for_each_token(routing):
    indices = route(routing, 4000, SMALL)
    assert indices.shape == (4000, 3) and all(len(set(row)) == 3 for row in indices[:100].tolist())
    share = torch.bincount(indices.flatten(), minlength=8) / 4000
    expected = {"uniform": [3 / 8] * 8, "one-hot": [1] * 3 + [0] * 5}.get(routing)
    if expected:
        assert (share - torch.tensor(expected)).abs().max() < 0.05
    else:
        assert (share.diff() < 0.02).all() and share[0] > 4 * share[7]


def test_a_recorded_routing_repeats_its_rows(tmp_path):
    record = np.array([[[2, 1, 0]], [[-1, -1, -1]], [[5, 6, 7]]], np.int16)
    np.save(tmp_path / "record.npy", record)
    assert route(str(tmp_path / "record.npy"), 3, SMALL).tolist() == [[2, 1, 0], [5, 6, 7], [2, 1, 0]]
    for shape, what in ((SMALL._replace(top_k=2), "rows of 2 ids"), (SMALL._replace(experts=4), "below 4")):
        with pytest.raises(OrnithError, match=what):
            route(str(tmp_path / "record.npy"), 3, shape)
    with pytest.raises(OrnithError, match="uniform, zipf, one-hot or a record"):
        route(str(tmp_path / "other.npy"), 3, SMALL)


def test_models_are_cut_to_what_fits():
    assert experts_of("ornith-35b/8") == Experts(2048, 512, 32, 1)
    whole = MODELS["ornith-397b"].weight_count() * 2
    assert fitting("ornith-397b", whole, 2) == "ornith-397b"
    assert fitting("ornith-397b", whole - 1, 2) == "ornith-397b/2"
    assert fitting("ornith-397b/4", whole, 2) == "ornith-397b/4"
    for wrong in ("gpt-5", "nano/0", "nano/x", "nano/32"):
        with pytest.raises(OrnithError, match="model: "):
            experts_of(wrong)
    with pytest.raises(OrnithError, match="less than one expert"):
        fitting("nano", 1000, 2)


def test_the_truth_is_the_references():
    case = make_case(SMALL, 20, "zipf", torch.float32)
    truth = true_outputs(case, backward=True)
    outputs = outputs_of(lambda: om.moe_mlp(*case[:5], backend="reference"), case, True)
    errors = truth.errors(outputs)
    assert tuple(errors) == OUTPUTS and truth.experts == list(range(8)) and max(errors.values()) < 1e-5
    assert tuple(true_outputs(case, backward=False).errors(outputs[:1])) == ("y",)


@pytest.mark.parametrize("broken", range(5), ids=OUTPUTS)
def test_one_wrong_element_of_any_output_is_seen(broken):
    case = make_case(SMALL, 1, "uniform", torch.float32)
    truth = true_outputs(case, backward=True)
    outputs = [t.clone() for t in outputs_of(lambda: om.moe_mlp(*case[:5], backend="cpu"), case, True)]
    assert worst(truth.errors(outputs), 1e-5) < 1e-5
    largest = outputs[broken].view(-1)[outputs[broken].abs().argmax()]
    largest *= 2
    with pytest.raises(AssertionError, match=OUTPUTS[broken]):
        worst(truth.errors(outputs), 1e-2)
    largest *= float("nan")
    with pytest.raises(AssertionError, match=f"{OUTPUTS[broken]}.* nan"):
        worst(truth.errors(outputs), 1e-2)


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("routing", ["uniform", "one-hot"])
def test_grouped_products_give_the_truth(routing, alignment):
    case = make_case(SMALL, 20, routing, torch.float32)

    def product(rows, weight, ends):
        starts = [0, *ends.tolist()]
        assert not any(end % alignment for end in starts)
        made = [rows[a:b] @ w.T for a, b, w in zip(starts, starts[1:], weight, strict=False)]
        return torch.cat([*made, rows.new_full((len(rows) - starts[-1], weight.shape[1]), torch.nan)])

    y = grouped(case, product, alignment)
    assert worst(true_outputs(case, backward=False).errors([y]), 1e-5) < 1e-5


def test_peers_on_the_cpu_are_right():
    case = make_case(SMALL, 20, "uniform", torch.float32)
    truth, stood = true_outputs(case, backward=True), set()
    for peer in moe_peers("bf16"):
        try:
            peer.check(case, backward=False)
        except Unable as unable:
            assert unable.status == "skipped" and "cuda" in unable.why
            continue
        backward = peer.name != "batched_mm"
        assert worst(truth.errors(outputs_of(peer.forward(case), case, backward)), 1e-5) < 1e-5
        stood.add(peer.name)
    assert stood == {"grouped_mm", "eager", "batched_mm", "F.grouped_mm"}


def test_who_does_not_stand_says_why():
    case = make_case(SMALL, 4, "uniform", torch.float32)
    nowhere = Peer("theirs", "no_such_module", "no-such-package", ("cpu",), ("bf16",), lambda case: lambda: case.x)
    with pytest.raises(Unable, match="no-such-package is not installed; pip install no-such-package") as missing:
        nowhere.check(case, backward=False)
    assert missing.value.status == "missing"
    with pytest.raises(Unable, match="runs on cuda only"):
        MOE_PEERS["liger"].check(case, backward=False)
    with pytest.raises(Unable, match="out of proportion"):
        MOE_PEERS["batched_mm"].check(case, backward=True)
