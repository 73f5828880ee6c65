"""Weight sync of sharded policies, on two gloo processes: transformers' own plans, and fully_shard by hand.

Reference: `convert`'s files of the same model saved by one process. Not covered: GPUs, FSDP1, more than two processes.
"""

import hf_models
import processes
import pytest
import sync_worker
import torch
from sync_models import BUILDS, WIDE, assert_same_bytes, converted, masters, stored
from transformers import AutoModelForCausalLM

from ornith_moe.sync import Served, named_tensors, served_weights

ODD = WIDE | {"num_experts": 7}
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sync")


@pytest.fixture(scope="module")
def results(folder):
    """Of both ranks, for every case of sync_worker; the two processes start once."""
    for name in ("moe", "gemma"):
        masters(name).save_pretrained(folder / name)
    for name, changes in (("wide", WIDE), ("odd", ODD)):
        torch.manual_seed(1)
        hf_models.model(implementation="eager", **changes).save_pretrained(folder / name)
    processes.run(sync_worker.run, folder)
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


def pairs(sent):
    return list(named_tensors(Served(*one) for one in sent))


@pytest.mark.parametrize("name", sync_worker.LAYOUTS)
def test_every_weight_on_both_ranks(results, name):
    for result in results:
        for build in BUILDS:
            assert_same_bytes(pairs(result[name][build]), stored(converted("moe")[build]))
        assert_same_bytes(pairs(result[name]["in pieces"]), stored(converted("moe")["fp8-block"]))


@pytest.mark.parametrize("name", sync_worker.LAYOUTS)
def test_experts_from_the_ranks_that_hold_them(results, name):
    ranks = [dict(pairs(result[name]["own experts"])) for result in results]
    experts = [{part for part in rank if ".experts." in part} for rank in ranks]
    assert all(experts) and not experts[0] & experts[1]
    assert {part for part in ranks[0] if part not in experts[0]} == ranks[1].keys() - experts[1]
    assert_same_bytes((ranks[0] | ranks[1]).items(), stored(converted("moe")["fp8-block"]))


@pytest.mark.parametrize("name", sync_worker.LAYOUTS)
def test_only_one_rank_is_given_tensors(results, name):
    assert_same_bytes(pairs(results[0][name]["to rank 0"]), stored(converted("moe")["fp8-block"]))
    assert results[1][name]["to rank 0"] == []


def test_experts_that_make_no_equal_blocks_or_pieces(results, folder):
    plain = {name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("odd", "wide")}
    expected = {name: dict(named_tensors(served_weights(model, "fp8-block"))) for name, model in plain.items()}
    for result in results:
        assert_same_bytes(pairs(result["odd"]["whole"]), expected["odd"])
        assert_same_bytes(pairs(result["odd"]["by threes"]), expected["wide"])
    ranks = [dict(pairs(result["odd"]["own experts"])) for result in results]
    assert_same_bytes((ranks[0] | ranks[1]).items(), expected["odd"])
    own = [sum("layers.0.mlp.experts" in name and "scale" not in name for name in rank) for rank in ranks]
    assert own == [3 * 4, 3 * 3]


def test_experts_that_are_cut_or_lie_in_turns(results):
    for result in results:
        assert_same_bytes(pairs(result["cut"]["tp"]), stored(converted("moe")["fp8-block"]))
        assert "which cuts them; shard them by Shard(0), or gather" in result["cut"]["own experts"]
        assert result["cut"]["in turns"]


def test_pieces_save_memory(results):
    for result in results:
        pieces, whole = (result["peak"][torch.bfloat16, size] for size in (sync_worker.PIECE_BYTES, 1 << 30))
        assert whole > 2 * pieces


def test_a_tied_embedding_in_shards(results):
    for result in results:
        assert_same_bytes(pairs(result["by hand"]), stored(converted("gemma")["fp8-channel"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_most_a_layer_of_extra_memory(results, dtype):
    """By torch's own account, with the buffers of the collective, of which gloo needs as much again as it fills."""
    layer = (
        sum(p.numel() for p in hf_models.model(implementation="eager", **WIDE).model.layers[0].parameters())
        * dtype.itemsize
    )
    for result in results:
        assert 0 < result["peak"][dtype, sync_worker.PIECE_BYTES] < layer / 2


@pytest.mark.parametrize("name", sync_worker.LAYOUTS)
def test_a_nan_stops_both_ranks(results, name):
    for result in results:
        assert "down_proj.weight: the value at" in result[name]["refused"]
