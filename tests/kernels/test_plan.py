"""kernels/plan.py against `plan_reference` in torch, the invariants of a plan, and the example of docs/notation.md.

Everything is integers and compared exactly. Without a GPU the kernels run in Triton's interpreter and are compiled for
four GPUs. Not covered: speed; more slots than int32 can number.
"""

from dataclasses import fields
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton", reason="triton is not installed")

from machine_code import FORMS, compiled

from ornith_moe.kernels.launch import recording
from ornith_moe.kernels.plan import build_plan, max_tiles, plan_reference

pytestmark = pytest.mark.device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_equals_reference(indices, experts, block_m):
    plan = build_plan(indices, experts, block_m)
    expected = plan_reference(indices, experts, block_m)
    for name in (field.name for field in fields(plan)):
        a, b = getattr(plan, name), getattr(expected, name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == torch.int32 and a.tolist() == b.tolist(), name
        else:
            assert a == b, name
    return plan


def assert_invariants(plan, indices, experts):
    """What a plan means, without a sort: the maps invert each other, rows and tiles are in order."""
    flat = indices.flatten().tolist()
    local = [slot for slot, e in enumerate(flat) if 0 <= e < experts]
    offsets, counts = plan.offsets.tolist(), plan.counts.tolist()
    assert offsets[0] == 0 and offsets[-1] == len(local)
    assert [b - a for a, b in pairwise(offsets)] == counts
    assert counts == [flat.count(e) for e in range(experts)]

    slot_to_row, row_to_slot = plan.slot_to_row.tolist(), plan.row_to_slot.tolist()
    rows = row_to_slot[: len(local)]
    assert sorted(rows) == local and set(row_to_slot[len(local) :]) <= {-1}
    assert [slot_to_row[slot] for slot in rows] == [*range(len(local))]
    assert all(slot_to_row[slot] == -1 for slot in set(range(len(flat))) - set(local))
    for e in range(experts):
        mine = rows[offsets[e] : offsets[e + 1]]
        assert mine == sorted(mine) and {flat[slot] for slot in mine} <= {e}

    (used,) = plan.num_tiles.tolist()
    tiles = list(zip(plan.tile_to_expert.tolist(), plan.tile_to_row.tolist(), strict=True))
    assert used <= len(tiles) == max_tiles(len(flat), experts, plan.block_m) and set(tiles[used:]) <= {(-1, -1)}
    covered = [r for e, row in tiles[:used] for r in range(row, min(row + plan.block_m, offsets[e + 1]))]
    assert covered == [*range(len(local))]
    assert len(local) <= used * plan.block_m <= len(local) + sum(c > 0 for c in counts) * (plan.block_m - 1)


def test_example_of_the_notation():
    indices = torch.tensor([[1, 3], [0, 3], [2, 3]], device=DEVICE)
    for build in (build_plan, plan_reference):
        plan = build(indices, 4, 2)
        assert plan.counts.tolist() == [1, 1, 1, 3]
        assert plan.offsets.tolist() == [0, 1, 2, 3, 6]
        assert plan.row_to_slot.tolist() == [2, 0, 4, 1, 3, 5]
        assert plan.slot_to_row.tolist() == [1, 3, 0, 4, 2, 5]
        assert plan.tile_to_expert.tolist() == [0, 1, 2, 3, 3, -1, -1]
        assert plan.tile_to_row.tolist() == [0, 1, 2, 3, 5, -1, -1]
        assert plan.num_tiles.tolist() == [5] and plan.block_m == 2 and plan.top_k == 2

        plan = build(indices - 2, 2, 2)  # the second of two ranks
        assert plan.counts.tolist() == [1, 3]
        assert plan.row_to_slot.tolist() == [4, 1, 3, 5, -1, -1]
        assert plan.slot_to_row.tolist() == [-1, 1, -1, 2, 0, 3]
        assert plan.tile_to_row.tolist() == [0, 1, 3, -1, -1]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_indices(data):
    experts = data.draw(st.integers(1, 9))
    block_m, top_k = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    row = st.lists(st.integers(-2, experts + 1), min_size=top_k, max_size=top_k)
    indices = torch.tensor(data.draw(st.lists(row, max_size=30)), dtype=torch.int64, device=DEVICE).view(-1, top_k)
    plan = assert_equals_reference(indices, experts, block_m)
    assert_invariants(plan, indices, experts)


@pytest.mark.parametrize(
    ("T", "top_k", "experts", "block_m"),
    [(0, 2, 4, 16), (1, 1, 1, 16), (63, 10, 512, 64), (260, 10, 60, 24), (700, 4, 3, 128), (5, 2, 512, 16)],
    ids=str,
)
def test_chunks_and_steps(T, top_k, experts, block_m):
    """Up to eleven chunks of slots, ids of other ranks on both sides, two runs."""
    indices = torch.randint(-9, experts + 11, (T, top_k), device=DEVICE).int()
    plan = assert_equals_reference(indices, experts, block_m)
    assert_invariants(plan, indices, experts)
    again = build_plan(indices, experts, block_m)
    assert all(torch.equal(a, b) for a, b in zip(vars(plan).values(), vars(again).values(), strict=True) if a is not b)


def test_one_expert_takes_all_and_none_do():
    indices = torch.full((300, 2), 5, device=DEVICE)
    plan = assert_equals_reference(indices, 7, 32)
    assert plan.num_tiles.item() == 19 and set(plan.tile_to_expert[:19].tolist()) == {5}
    plan = assert_equals_reference(indices, 5, 32)
    assert plan.num_tiles.item() == 0 and set(plan.row_to_slot.tolist()) == {-1}
    assert_equals_reference(torch.full((4, 3), -1, device=DEVICE), 2, 16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_and_stride(dtype):
    indices = torch.randint(0, 60, (30, 8), device=DEVICE).to(dtype)
    assert_equals_reference(indices[:, ::2], 40, 8)
    assert_equals_reference(indices.T, 40, 8)


@pytest.mark.parametrize(("experts", "rows", "waste"), [(512, 20, 2.2), (60, 100, 0.33), (16, 250, 0.14)], ids=str)
def test_padding_of_full_tiles_of_64(experts, rows, waste):
    """Rows that tiles compute beyond those that exist, for choices at random; docs/notation.md has the table."""
    indices = torch.rand(experts * rows // 10, experts, device=DEVICE).topk(10, dim=1).indices
    plan = build_plan(indices, experts, 64)
    assert 0 < plan.num_tiles.item() * 64 / indices.numel() - 1 < waste * 1.1


def test_refuses_wrong_input():
    with pytest.raises(TypeError, match=r"indices: expected integers, got torch\.float32"):
        build_plan(torch.zeros(2, 2, device=DEVICE), 4, 16)
    with pytest.raises(ValueError, match=r"indices: expected \[T, top_k\].*\[4\]"):
        build_plan(torch.zeros(4, dtype=torch.int32, device=DEVICE), 4, 16)
    with pytest.raises(ValueError, match="experts and block_m: expected at least 1, got 4 and 0"):
        build_plan(torch.zeros(2, 2, dtype=torch.int32, device=DEVICE), 4, 0)


@pytest.mark.gpu
def test_a_captured_plan_serves_every_routing():
    indices = torch.zeros(700, 8, dtype=torch.int32, device=DEVICE)
    build_plan(indices, 60, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = build_plan(indices, 60, 64)
    for _ in range(2):
        indices.random_(-1, 61)
        graph.replay()
        assert_invariants(plan, indices, 60)


def launches(arch):
    """What `build_plan` starts for the layers of the 35B and the 397B."""
    with recording(arch) as started:
        for experts, top_k in ((256, 8), (512, 10)):
            build_plan(torch.empty(32768, top_k, dtype=torch.int32, device="meta"), experts, 64)
    return started


@pytest.mark.parametrize("target", FORMS)
def test_compiles_for_every_target(target):
    every = compiled(target, launches)
    assert len(every) == 6
    for one in every:
        name = f"{one.launch.label}, E = {one.launch.arguments['E']}"
        assert one.report.spills == 0, f"{name}: {one.report.spills}"
        assert not one.seen["global atomics"], name
