"""kernels/launch.py: a launch tells the truth about what it reads and writes.

The truth is memory itself: every tensor of a launch before and after it, in the interpreter or on a GPU.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from launches import MODULES, watch
from moe_cases import DEVICE, Layer

from ornith_moe.kernels import fp8_cast, gguf_encode, launch, routing
from ornith_moe.kernels.examine import catalog
from ornith_moe.kernels.examine.model import estimate
from ornith_moe.kernels.moe import moe_backward, moe_forward
from ornith_moe.kernels.plan import build_plan
from ornith_moe.quant.recipes import RECIPES, ROW

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def tensors(named):
    """Everything with memory among arguments by name: descriptors' and plans' tensors too."""
    for name, value in named.items():
        for each in value if isinstance(value, tuple) else (value,):
            tensor = getattr(each, "base", each)
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                yield name, tensor


def snapshot(named):
    return [(name, t, t.reshape(-1).view(torch.uint8).clone()) for name, t in tensors(named)]


def changed(before):
    return {name for name, t, bits in before if not torch.equal(t.reshape(-1).view(torch.uint8), bits)}


def test_every_kernel_writes_what_its_launch_declares_and_nothing_else(monkeypatch):
    seen = set()

    def check(started, start):
        read, written = snapshot(started.reads), snapshot(started.writes)
        start()
        in_place = started.reads.keys() & started.writes.keys()
        assert not changed(read) - in_place, f"{started.label} only reads {changed(read) - in_place}"
        untouched = {name for name, _ in tensors(started.writes)} - changed(written)
        assert not untouched, f"{started.label} leaves {untouched} as they were"
        seen.add(started.kernel)

    watch(monkeypatch, check)
    layer = Layer(20, 128, 128, 4, 2, dtype=torch.bfloat16)
    logits = torch.randn(20, 4, device=DEVICE)
    indices, weights, _, *sums = routing.route_forward(logits, 2, losses=True)
    for recipe in (RECIPES["fp8_full"], RECIPES["fp8_channel"]):
        operands = layer.operands(recipe.name)
        _, saved = moe_forward(layer.x, indices, weights, *operands, recipe=recipe, save=True)
        _, dweights, *_ = moe_backward(layer.dy, saved, *operands, recipe=recipe)
    routing.route_backward(logits, indices, weights, dweights, *sums)
    copy = [torch.empty_like(t) for t in fp8_cast.quantize_fp8_channel(layer.down)]
    fp8_cast.quantize_fp8_experts(layer.down, *copy, None, None, None, fp8_cast.new_digests(layer.down, ROW), block=ROW)
    for name in ("Q8_0", "Q5_K", "Q6_K"):
        gguf_encode.encode(torch.randn(2, 256, device=DEVICE), name)
    every = {value for module in MODULES for name, value in vars(module).items() if name.endswith("_kernel")}
    assert seen == every, f"not launched: {every - seen}"


def test_a_tensor_that_is_not_declared_stops_the_model():
    launches = catalog.record("sm90", catalog.Pass("35B", 64, "forward", RECIPES["bf16"]))
    combine = next(one for one in launches if one.label == "combine")
    undeclared = dataclasses.replace(combine, reads=combine.reads - {"weights_ptr"})
    nothing = dataclasses.replace(combine, reads=frozenset(), writes=frozenset(), arguments={"T": 64})
    for one, found in ((undeclared, "weights_ptr in neither"), (nothing, "no tensor at all")):
        with pytest.raises(ValueError, match=rf"launch 'combine': expected each tensor among reads or.*{found}"):
            estimate("sm90", [(one, None)], None)


def test_each_launch_is_timed_while_it_runs_and_no_other(monkeypatch):
    """By a clock that only kernels move."""
    now = [0.0]

    def start(seconds, **_):
        now[0] += seconds

    monkeypatch.setattr(launch, "perf_counter", lambda: now[0])
    monkeypatch.setattr(launch, "_event", launch._WallClock)
    kernel = {(1,): start, (0,): start}
    with launch.timing() as times:
        for label, seconds, grid in (("one", 2.0, 1), ("none", 8.0, 0), ("two", 0.5, 1)):
            launch.launch(label, kernel, (grid,), reads={}, writes={}, seconds=seconds)
            now[0] += 100
        assert times == []  # not before the device is done
    launch.launch("after", kernel, (1,), reads={}, writes={}, seconds=1.0)
    assert times == [launch.Time("one", 2.0), launch.Time("two", 0.5)]


def test_times_of_a_plan_are_those_of_its_launches():
    indices = torch.randint(0, 8, (40, 2), device=DEVICE)
    with launch.timing() as times:
        plan = build_plan(indices, 8, 16)
    assert [time.label for time in times] == ["plan count", "plan scan", "plan place"]
    assert all(time.seconds > 0 for time in times) and torch.equal(plan.offsets, build_plan(indices, 8, 16).offsets)
