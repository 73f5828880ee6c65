"""verl's own FSDP2 engine with our experts, replayed routing and synced builds, on one and two gloo processes of a CPU.

`make test-verl` makes the environment: verl wants a transformers below 5.11 and no TRL. References: the records that
were given, verl's own PPO loss, and `convert` of the checkpoint that verl saves. Not covered: GPUs, Ray workers, a
rollout engine.
"""

import importlib
import importlib.util
import sys

import fixtures
import pytest
import torch
import verl_worker
from numeric import assert_close, assert_same_bits
from safetensors.torch import load_file, save_file
from verl_worker import EXPERTS, LAYERS, LENGTHS, PROMPT, TOP_K

from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.source.hub import open_any


def test_without_verl_one_sentence_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "verl" or name == "ornith_moe.rl.verl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(
        ImportError, match=r"^ornith_moe\.rl\.verl needs verl 0\.9\.1 .*; pip install 'ornith-moe\[verl\]'$"
    ):
        importlib.import_module("ornith_moe.rl.verl")


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def ranks(request, tmp_path_factory):
    """What happened on each rank, of one batch per rank, the same ones; the processes start once for all tests."""
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed; make test-verl makes an environment with it")
    folder = tmp_path_factory.mktemp("verl")
    source = fixtures.qwen35moe(folder / "tiny", experts=EXPERTS, top_k=TOP_K)
    torch.multiprocessing.spawn(verl_worker.run, (request.param, str(source), str(folder)), nprocs=request.param)
    found = [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(request.param)]
    return [{"folder": folder, **one} for one in found]


@pytest.fixture(scope="module")
def found(ranks):
    return ranks[0]


def test_the_registry_gives_our_engine_and_its_experts_are_ours(found):
    assert found["engine"] == "OrnithFSDPEngine"
    assert set(found["explain"].values()) == {"fused: plain SwiGLU, recipe bf16, cpu backend"}
    assert len(found["explain"]) == LAYERS
    assert set(found["explain, bf16"].values()) == {"fused: plain SwiGLU, recipe fp8, cpu backend"}


def expected_rows(records, rows):
    """[T, layers, top_k] of some sequences as `left_right_2_no_padding` and the padding behind them lay them out."""
    for row in rows:
        prompt, response = LENGTHS[row]
        longest = max(sum(LENGTHS[r]) for r in rows)
        yield records[row, PROMPT - prompt : PROMPT + response]
        yield records.new_zeros(longest - prompt - response, LAYERS, TOP_K)


def test_the_forward_pass_and_its_recomputation_use_the_recorded_experts(found):
    """Two micro-batches, and in each four layers forth and, by gradient checkpointing, back again."""
    calls = iter(found["visited"])
    assert len(found["visited"]) == 2 * 2 * LAYERS
    for rows in ((0, 1), (2, 3)):
        expected = torch.cat([*expected_rows(found["records"], rows)]).long()
        recorded = expected.any(-1)  # zeros are no record: there the router chooses
        forth = [next(calls) for _ in range(LAYERS)]
        back = [next(calls) for _ in range(LAYERS)][::-1]
        for layer, (ids, again) in enumerate(zip(forth, back, strict=True)):
            assert torch.equal(ids[recorded[:, layer]], expected[recorded[:, layer], layer])
            assert all(len(set(row)) == TOP_K for row in ids.tolist())
            assert torch.equal(again, ids)


def test_the_first_update_is_on_policy_and_the_second_is_not(found):
    """verl's own loss: old log-probabilities and the update replay the same experts, so each ratio is exactly 1."""
    first, second = found["metrics"]
    for name in ("actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower"):
        assert first[name].values == [0.0, 0.0]
    assert any(second["actor/ppo_kl"].values)
    assert first["grad_norm"] > 0
    assert first["replay/tokens"] == [sum(map(sum, LENGTHS[:2])) - 2, sum(map(sum, LENGTHS[2:])) - 2]
    assert all(0.5 < share < 1 for share in first["replay/flipped_share"])  # the records are random


def test_without_records_the_routers_choose(found):
    assert not found["free_metrics"]
    assert not any(name.startswith("replay") for metrics in found["metrics, bf16"] for name in metrics)
    assert (found["free"] - found["old"]).abs().max() > 0.1


def test_packed_sequences_replay_too(found):
    """One sequence a micro-batch, padded to 16 tokens; verl's masks of packed batches need flash-attn."""
    calls = iter(found["packed, visited"])
    for row, length in enumerate(map(sum, LENGTHS)):
        expected = torch.cat([*expected_rows(found["records"], (row,))]).long()
        for layer in range(LAYERS):
            ids = next(calls)
            assert len(ids) == 16
            assert torch.equal(ids[: length - 1], expected[: length - 1, layer])
    assert found["packed, metrics"]["replay/tokens"] == [length - 1 for length in map(sum, LENGTHS)]
    assert_close("log-probabilities", found["packed"], found["old"], 1e-4)


@pytest.mark.parametrize(("dtype", "build"), [("fp32", "fp8-channel"), ("bf16", "fp8-block")])
def test_what_is_synced_is_the_build_of_the_saved_checkpoint(ranks, dtype, build):
    """After updates, so that masters lie between BF16 numbers; verl saves the masters. In BF16 the experts train in FP8
    per block, and "FP8" is the build of those numbers."""
    folder = ranks[0]["folder"]
    saved = folder / dtype / "huggingface"
    if dtype == "bf16":
        tensors = load_file(saved / "model.safetensors")
        assert any((t != t.bfloat16()).any() for t in tensors.values())
        save_file({name: t.bfloat16() for name, t in tensors.items()}, saved / "model.safetensors")
    convert(open_any(str(saved)), folder / "builds", [build], jobs=1)
    (made,) = (folder / "builds").glob(f"*{build}*")
    expected = {}
    for shard in made.glob("*.safetensors"):
        expected |= load_file(shard)
    for rank in ranks:
        served = rank[f"served, {dtype}"]
        assert served.keys() == expected.keys()
        assert sum(t.dtype == torch.float8_e4m3fn for t in served.values()) > LAYERS * EXPERTS * 3
        for name, tensor in served.items():
            assert_same_bits(name, tensor, expected[name])


def test_without_the_key_verl_sends_its_own(found):
    """Per expert, in the dtype of the masters; of the same names but for the scales."""
    assert set(found["plain"].values()) == {torch.float32}
    scales = {name for name in found["served, fp32"] if name.endswith("_scale")}
    assert found["plain"].keys() == found["served, fp32"].keys() - scales


def test_the_key_is_not_saved(found):
    config = (found["folder"] / "fp32" / "huggingface" / "config.json").read_text()
    assert "served_build" not in config and "ornith" not in config
