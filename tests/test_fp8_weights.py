"""ornith_moe/fp8_weights.py: the copy is that of quant/fp8.py, is made once, and never outlives what it was made from.

Calls are counted inside quant/fp8.py, and every change is checked by comparing the copy with a fresh one, so a change
that nothing notices shows as a difference. FSDP2 is torch's own, on one process. Not covered: several GPUs, streams,
CUDA graphs.
"""

import threading
import weakref

import pytest
import torch
from numeric import assert_same_bits
from torch import nn

from ornith_moe import fp8_weights
from ornith_moe.fp8_weights import forget_quantized_weights, quantized_weights
from ornith_moe.kernels.launch import recording
from ornith_moe.quant import fp8


@pytest.fixture(autouse=True)
def empty_cache():
    forget_quantized_weights()
    yield
    forget_quantized_weights()


@pytest.fixture
def calls(monkeypatch):
    """One element for each weight that was quantized."""
    made, real = [], fp8._quantize
    monkeypatch.setattr(fp8, "_quantize", lambda *arguments: made.append(1) or real(*arguments))
    return made


def parameter(rows=140):
    return nn.Parameter(torch.randn(2, rows, 140).bfloat16())


def assert_current(weight):
    q, scale = fp8.quantize_fp8_block(weight)
    got = quantized_weights(weight, "fp8")
    assert_same_bits("q", got.q.view(torch.uint8), q.view(torch.uint8))
    assert_same_bits("scale", got.scale, scale)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_each_recipe_is_the_definition(scale):
    weight = parameter(rows=130)
    expected = {
        "fp8": fp8.quantize_fp8_block(weight, scale=scale),
        "fp8_full": fp8.quantize_fp8_block_both(weight, scale=scale),
        "fp8_channel": fp8.quantize_fp8_channel(weight, scale="bf16"),
    }
    for recipe, tensors in expected.items():
        got = quantized_weights(weight, recipe, scale)
        assert [t is None for t in got] == [False] * len(tensors) + [True] * (4 - len(tensors))
        for name, a, b in zip(got._fields, got, tensors, strict=False):
            assert a.dtype == b.dtype and a.is_contiguous() and not a.requires_grad
            assert_same_bits(name, a.view(torch.uint8), b.view(torch.uint8))
    assert len(fp8_weights._entries) == 1  # another recipe replaces, it does not add


def test_a_step_of_micro_batches_quantizes_once(calls):
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for step in range(3):
        for _ in range(2):
            quantized = quantized_weights(weight, "fp8_full")
            (weight * fp8.dequantize_fp8(quantized.q, quantized.scale)).sum().backward()
        assert len(calls) == step + 1
        optimizer.step()


def set_data(weight):
    weight.data = torch.randn_like(weight)


def set_data_at_the_same_address(weight):
    """What an allocator does that hands out freed memory again, while an emptied storage lives on."""
    array = weight.detach().float().numpy()
    weight.data = first = torch.from_numpy(array)
    assert_current(weight)
    array *= 2.5
    weight.data = torch.from_numpy(array)
    assert weight.data_ptr() == first.data_ptr()
    return first


def set_data_elsewhere_in_a_buffer(weight):
    buffer = torch.randn(2, *weight.shape).bfloat16()
    weight.data = buffer[0]
    assert_current(weight)
    weight.data = buffer[1]


def step(make):
    def change(weight):
        optimizer = make([weight])
        weight.grad = torch.randn_like(weight)
        optimizer.step()

    return change


def step_a_master_copy(weight):
    """Megatron and DeepSpeed: the version of the weight does not change."""
    master = nn.Parameter(weight.detach().float())
    master.grad = torch.randn_like(master)
    torch.optim.SGD([master], lr=1.0).step()
    weight.data.copy_(master.data)


def inference_update(weight):
    with torch.inference_mode():
        weight.mul_(2.5)


CHANGES = {
    "copy_": lambda weight: torch.no_grad()(weight.copy_)(torch.randn_like(weight)),
    "load_state_dict": lambda weight: nn.ParameterDict({"w": weight}).load_state_dict({"w": torch.randn_like(weight)}),
    "inference mode": inference_update,
    ".data": set_data,
    ".data at the same address": set_data_at_the_same_address,
    ".data in the same buffer": set_data_elsewhere_in_a_buffer,
    ".data sliced": lambda weight: setattr(weight, "data", weight.data[:1]),
    ".data transposed": lambda weight: setattr(weight, "data", weight.data.transpose(1, 2)),
    "SGD": step(lambda p: torch.optim.SGD(p, lr=1.0)),
    "AdamW foreach": step(lambda p: torch.optim.AdamW(p, lr=1.0, foreach=True)),
    "AdamW fused": step(lambda p: torch.optim.AdamW(p, lr=1.0, fused=True)),
    "master copy": step_a_master_copy,
    "unseen, then told": lambda weight: (weight.data.mul_(2.5), forget_quantized_weights()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_quantized_again(change):
    weight = parameter()
    before = quantized_weights(weight, "fp8")
    assert quantized_weights(weight, "fp8") is before
    alive = CHANGES[change](weight)  # noqa: F841
    assert quantized_weights(weight, "fp8") is not before
    assert_current(weight)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 128, 64))

    def forward(self, x):
        assert_current(self.weight)
        self.entries = len(fp8_weights._entries)
        return x @ self.weight[0].T @ self.weight[0]


@pytest.mark.parametrize("fused", [False, True])
def test_fsdp2_on_one_process(fused):
    """It gathers the shards into the same parameter with the version held, and empties its storage after each use."""
    distributed = pytest.importorskip("torch.distributed", reason="this build of torch has no torch.distributed")
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(Expert(), Expert(), Expert())
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        for _ in range(2):
            for _ in range(2):
                model(torch.randn(3, 64)).square().sum().backward()
            optimizer.step()
            assert not fp8_weights._entries
        assert [layer.entries for layer in model] == [1, 1, 1]  # not the whole model
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("what", ["parameter", "storage", "cache", "storage replaced, then quantized"])
def test_the_copy_is_freed_at_once_with(what):
    weight = parameter()
    copy = weakref.ref(quantized_weights(weight, "fp8").q)
    assert copy() is not None
    if what == "parameter":
        del weight
    elif what == "cache":
        forget_quantized_weights()
    else:
        set_data(weight)
    assert copy() is None  # without a garbage collection
    if what == "storage replaced, then quantized":
        assert_current(weight)


def test_the_old_copy_is_freed_before_the_new_one_is_made(monkeypatch):
    weight = parameter()
    copy = weakref.ref(quantized_weights(weight, "fp8").q)
    with torch.no_grad():
        weight.mul_(2)
    alive = []
    real = fp8.quantize_fp8_block
    monkeypatch.setattr(fp8, "quantize_fp8_block", lambda w, **k: alive.append(copy() is not None) or real(w, **k))
    quantized_weights(weight, "fp8")
    assert alive == [False]


def test_nothing_is_kept_for_what_does_not_come_again(calls):
    weight = parameter()
    for _ in range(2):
        quantized_weights(weight * 2, "fp8")
    with torch.inference_mode():
        made_inside = weight * 2
        for _ in range(2):
            quantized_weights(made_inside, "fp8")
    assert len(calls) == 4 and not fp8_weights._entries


def test_an_alias_is_the_same_weight(calls):
    """Non-reentrant checkpointing gives a backward `weight.detach()`, another one each time."""
    weight = parameter()
    first = quantized_weights(weight, "fp8")
    for _ in range(2):
        assert quantized_weights(weight.detach(), "fp8") is first
    assert len(calls) == 1
    with torch.no_grad():
        weight.detach().mul_(2)
    assert_current(weight)


def test_parameters_in_one_flat_buffer_are_told_apart(calls):
    buffer = torch.randn(3, 2, 140, 140)
    weights = [nn.Parameter(part) for part in buffer]
    for _ in range(2):
        for weight in weights:
            quantized_weights(weight, "fp8")
    assert len(calls) == 3
    for weight in weights:
        assert_current(weight)


def test_a_copy_made_in_inference_mode_serves_training():
    weight = parameter()
    with torch.inference_mode():
        made_inside = quantized_weights(weight, "fp8_full")
    assert quantized_weights(weight, "fp8_full") is made_inside
    assert not any(t.is_inference() for t in made_inside)


def test_threads_quantize_once(calls):
    weight = parameter()
    barrier, got = threading.Barrier(8), []

    def work():
        barrier.wait()
        got.append(quantized_weights(weight, "fp8"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(got) == 8 and all(one is got[0] for one in got)


def test_a_device_uses_the_kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    weight = nn.Parameter(torch.empty(4, 256, 384, dtype=torch.bfloat16, device="meta"))
    with recording("sm90") as launches:
        for recipe in ("fp8", "fp8_full", "fp8_channel", "fp8_channel"):
            quantized_weights(weight, recipe)
    labels = ["fp8_cast block", "fp8_cast block both", "fp8_cast row", "fp8_cast row"]
    assert [one.label for one in launches] == labels and not fp8_weights._entries


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"recipe: .*fp8_channel.*'bf16'"):
        quantized_weights(parameter(), "bf16")
    with pytest.raises(ValueError, match=r"scale: .*'fp16'"):
        quantized_weights(parameter(), "fp8", "fp16")
    with pytest.raises(TypeError, match=r"w: .*float64"):
        quantized_weights(nn.Parameter(torch.randn(2, 3, 4, dtype=torch.float64)), "fp8")
    assert not fp8_weights._entries
