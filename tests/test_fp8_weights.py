"""ornith_moe/fp8_weights.py: the copy is what quant/fp8.py makes of the weight now, and is made once per change.

Calls are counted inside quant/fp8.py, and every change is checked by comparing the copy with a fresh one, so a change
that nothing notices shows as a difference. FSDP2 is torch's own, on one process. The kernel that checks on a GPU:
tests/kernels/test_fp8_cast.py. Not covered: several GPUs, streams, CUDA graphs.
"""

import ctypes
import threading
import weakref

import pytest
import torch
from moe_cases import device_of
from numeric import assert_same_bits
from torch import nn

import ornith_moe as om
from ornith_moe import fp8_weights
from ornith_moe.fp8_weights import forget_quantized_weights, quantized_weights, unchanged
from ornith_moe.kernels.launch import recording
from ornith_moe.quant import fp8
from ornith_moe.quant.operand import Operand


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


def assert_current(weight, recipe="fp8"):
    make = {"fp8": "block", "fp8_full": "block_both", "fp8_channel": "channel"}[recipe]
    got, made = quantized_weights(weight, recipe), getattr(fp8, f"quantize_fp8_{make}")(weight)
    for name, a, b in zip(got._fields, got, made, strict=False):
        assert_same_bits(f"{recipe} {name}", a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("scale", ["fp32", "bf16", "ue8m0"])
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
    assert len(fp8_weights._copies) == 1  # another recipe replaces, it does not add


def test_a_step_of_micro_batches_quantizes_once(calls):
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for step in range(3):
        for _ in range(2):
            quantized = quantized_weights(weight, "fp8_full")
            (weight * fp8.dequantize_fp8(quantized.value, quantized.scale)).sum().backward()
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


def whole_storage(weight):
    return torch.empty(0, dtype=weight.dtype).set_(weight.untyped_storage())


def flat_shard(weight):
    """FSDP1, Megatron: what lies in one buffer with the weight."""
    whole_storage(weight)[-3:].neg_()


def swap_average(weight):
    """torch_ema: store, copy_to, restore; the average is used in between, and here as often as the weight."""
    for other in (0.5 * weight.data, weight.data.clone(), -weight.data):
        weight.data.copy_(other)
        assert_current(weight)
    weight.data.mul_(0.7)


def perturb(weight):
    """MeZO: z forth, twice back, and forth again, which is not quite the same."""
    for factor in (1, -2, 1):
        weight.data.add_(torch.ones_like(weight), alpha=factor * 1e-1)


def one_element(weight):
    weight.data[1, 139, 139] += 1


def one_bit(weight):
    ctypes.c_uint8.from_address(weight.data_ptr() + weight.nbytes - 2).value ^= 1


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
    ".data.copy_": lambda weight: weight.data.copy_(torch.randn_like(weight)),
    ".data.mul_": lambda weight: weight.data.mul_(2.5),
    ".data.clamp_": lambda weight: weight.data.clamp_(max=weight.max().item() - 0.5),
    "foreach on .data": lambda weight: torch._foreach_mul_([weight.data], 2.5),
    "set_": lambda weight: torch.no_grad()(weight.set_)(torch.randn_like(weight)),
    "swap_tensors": lambda weight: torch.utils.swap_tensors(weight, nn.Parameter(torch.randn_like(weight))),
    "vector": lambda weight: nn.utils.vector_to_parameters(torch.randn(weight.numel()).bfloat16(), [weight]),
    "numpy": lambda weight: weight.detach().view(torch.int16).numpy().__ixor__(1),
    "DLPack": lambda weight: torch.from_dlpack(weight.detach()).mul_(2.5),
    "storage": lambda weight: weight.untyped_storage().__setitem__(1, 0x41),
    "storage copy_": lambda weight: weight.untyped_storage().copy_(torch.randn_like(weight).untyped_storage()),
    "flat shard": flat_shard,
    "flat buffer": lambda weight: whole_storage(weight).mul_(2.5),
    "average": swap_average,
    "perturbation": perturb,
    "one element": one_element,
    "one bit": one_bit,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_quantized_again(change, calls):
    weight = parameter()
    first = quantized_weights(weight, "fp8")
    q, scale = (t.clone() for t in first[:2])
    assert quantized_weights(weight, "fp8") is first and len(calls) == 1
    alive = CHANGES[change](weight)  # noqa: F841
    done = len(calls)
    again = quantized_weights(weight, "fp8")
    assert len(calls) == done + 1
    if again.value.shape == q.shape:  # a bit of the last place may be lost in the code
        assert change == "one bit" or not (again.value.float().equal(q.float()) and again.scale.equal(scale))
    for recipe in ("fp8", "fp8_full", "fp8_channel"):
        assert_current(weight, recipe)


@pytest.mark.parametrize("recipe", ["fp8", "fp8_full", "fp8_channel"])
def test_every_recipe_sees_a_write_in_place(recipe):
    weight = parameter()
    for change in (one_element, lambda w: w.data.mul_(2), flat_shard):
        kept = quantized_weights(weight, recipe)
        change(weight)
        assert_current(weight, recipe)
        assert quantized_weights(weight, recipe) is kept  # refreshed where it lies


VIEWS = {
    "transposed": lambda t: t.transpose(1, 2),
    "rows of wider ones": lambda t: t[..., :130],
    "every other column": lambda t: t[..., ::2],
    "every other expert": lambda t: t[::2],
    "experts last": lambda t: t.permute(1, 2, 0),
    "one expert for all": lambda t: t[:1].expand(3, -1, -1),
    "in a buffer": lambda t: t[1:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_write_to_one_element_of_any_view(view, calls):
    base = torch.randn(3, 140, 140).bfloat16()
    weight = nn.Parameter(VIEWS[view](base))
    for at in ((0, 0, 0), (-1, -1, -1)):
        assert_current(weight)
        del calls[:]
        VIEWS[view](base)[at] += 1
        quantized_weights(weight, "fp8")
        assert len(calls) == 1
        assert_current(weight)


def test_the_experts_of_a_call_are_read_and_all_that_changed_written(monkeypatch):
    made, real = [], fp8.quantize_fp8_experts
    monkeypatch.setattr(fp8, "quantize_fp8_experts", lambda w, q, s, e, **k: made.append(e) or real(w, q, s, e, **k))
    read, digest = [], fp8_weights._digest
    monkeypatch.setattr(fp8_weights, "_digest", lambda matrix: read.append(matrix.data_ptr()) or digest(matrix))
    weight = nn.Parameter(torch.randn(5, 130, 140))
    places = [matrix.data_ptr() for matrix in weight]

    def use(*experts):
        """(read, written)"""
        del made[:], read[:]
        mask = torch.zeros(5, dtype=torch.bool)
        mask[list(experts)] = True
        got = quantized_weights(weight, "fp8", experts=mask)
        q, scale = fp8.quantize_fp8_block(weight)
        for e in experts:
            assert_same_bits("q", got.value[e].view(torch.uint8), q[e].view(torch.uint8))
            assert_same_bits("scale", got.scale[e], scale[e])
        return [places.index(place) for place in read], list(made)

    assert use(3, 1) == ([1, 3, 0, 2, 4], [[0, 1, 2, 3, 4]])
    assert use(3, 1) == ([1, 3], []) and use(4) == ([4], []) and use() == ([], [])
    weight.data[1:3] *= 2
    assert use(3) == ([3], []) and use(0, 2) == ([0, 2, 1, 3, 4], [[1, 2]])
    assert use(0, 1, 2, 3, 4) == ([0, 1, 2, 3, 4], [])


def test_unchanged_reads_each_expert_once(monkeypatch):
    read, digest = [], fp8_weights._digest
    monkeypatch.setattr(fp8_weights, "_digest", lambda matrix: read.append(1) or digest(matrix))
    weight = parameter()
    quantized_weights(weight, "fp8")
    with unchanged():
        weight.data.mul_(2)  # before the first use inside
        assert_current(weight)
        del read[:]
        with unchanged():
            assert_current(weight)
        assert_current(weight)
        assert not read
        with torch.no_grad():
            weight.mul_(2)  # against the promise, and seen by its version
        assert_current(weight)
        weight.data.mul_(2)
        other = threading.Thread(target=assert_current, args=(weight,))  # promised nothing
        other.start()
        other.join()
        assert_current(weight)
    weight.data.mul_(2)
    assert_current(weight)


@pytest.mark.parametrize(
    ("backend", "recipe", "how"),
    [("cpu", recipe, "eager") for recipe in ("fp8", "fp8_full", "fp8_channel")]
    + [("cpu", "fp8", "compiled"), ("reference", "fp8_channel", "eager")]
    + [pytest.param("triton", "fp8_full", "eager", marks=pytest.mark.device)],
)
def test_a_product_is_that_of_a_fresh_module(backend, recipe, how):
    """Forward and dx after unseen writes, one of them between the two."""
    where = device_of(backend)
    ids, mix = torch.tensor([[0, 2], [2, -1]], device=where), torch.rand(2, 2, device=where)
    weights = [nn.Parameter(torch.randn(3, *size, device=where) / 11) for size in ((256, 128), (128, 128))]
    dy = torch.randn(2, 128, device=where)

    def mlp(x, w13, w2):
        return om.moe_mlp(x, ids, mix, w13, w2, recipe=recipe, backend=backend)

    def fresh(x):
        return mlp(x, *(w.detach().clone() for w in weights))

    def passes(call, between=lambda: None):
        x = torch.linspace(-1, 1, 256, device=where).view(2, 128).requires_grad_()
        y = call(x)
        between()
        (dx,) = torch.autograd.grad(y, x, dy)
        return y.detach(), dx

    call = torch.compile(mlp, fullgraph=True, backend="aot_eager") if how == "compiled" else mlp
    with torch.no_grad():
        call(torch.randn(2, 128, device=where), *weights)
    weights[0].data[2, 255, 127] += 1
    weights[1].data.mul_(2)
    got, expected = passes(lambda x: call(x, *weights)), passes(fresh)
    for name, a, b in zip(("y", "dx"), got, expected, strict=True):
        assert_same_bits(name, a, b)
    _, dx = passes(lambda x: call(x, *weights), between=lambda: weights[1].data.mul_(2))
    assert_same_bits("dx of the new weight", dx, 2 * expected[1])  # autograd cannot see that write either
    torch._dynamo.reset()


def test_a_weight_that_a_compiled_graph_computes():
    """Its memory is a buffer of the graph, written each time at no version."""
    weight, down = nn.Parameter(torch.randn(2, 256, 128) / 11), nn.Parameter(torch.randn(2, 128, 128) / 11)
    x, ids, mix = torch.randn(3, 128), torch.tensor([[0], [1], [1]]), torch.ones(3, 1)

    def call(factor):
        return om.moe_mlp(x, ids, mix, weight, down * factor, recipe="fp8", backend="cpu")

    compiled = torch.compile(call, fullgraph=True)
    for factor in (1.0, 2.0):
        factor = torch.tensor(factor)
        assert_same_bits("y", compiled(factor).detach(), call(factor).detach())
    torch._dynamo.reset()


def test_the_transposed_copy_of_a_stored_weight_is_never_old():
    q, scale = fp8.quantize_fp8_block(torch.randn(2, 256, 128))
    for write in (lambda: q.view(torch.uint8)[1, 255, 127].bitwise_xor_(1), lambda: scale.data.mul_(2)):
        Operand(q, scale).with_transposed()
        write()
        got = Operand(q, scale).with_transposed()
        assert torch.equal(got.value_t.view(torch.uint8), q.view(torch.uint8).mT) and torch.equal(got.scale_t, scale.mT)
        assert got.value is q and got.scale is scale


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 128, 64))

    def forward(self, x):
        assert_current(self.weight)
        self.entries = len(fp8_weights._copies)
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
        assert [layer.entries for layer in model] == [1, 1, 1]  # not the whole model
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("what", ["parameter", "storage", "cache", "storage replaced, then quantized"])
def test_the_copy_is_freed_at_once_with(what):
    weight = parameter()
    copy = weakref.ref(quantized_weights(weight, "fp8").value)
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
    copy = weakref.ref(quantized_weights(weight, "fp8").value)
    alive, real = [], fp8_weights._allocate
    monkeypatch.setattr(fp8_weights, "_allocate", lambda *a: alive.append(copy() is not None) or real(*a))
    quantized_weights(weight, "fp8_full")
    assert alive == [False]


def test_nothing_is_kept_for_what_does_not_come_again(calls):
    weight = parameter()
    for _ in range(2):
        quantized_weights(weight * 2, "fp8")
    assert len(calls) == 2 and not fp8_weights._copies
    with torch.inference_mode():
        quantized_weights(weight * 2, "fp8")
    assert not fp8_weights._copies


def test_a_weight_made_in_inference_mode_is_kept_too(calls):
    with torch.inference_mode():
        weight = parameter()
        for _ in range(2):
            quantized_weights(weight, "fp8")
        assert len(calls) == 1
        weight.mul_(2)
        assert_current(weight)


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
    assert [one.label for one in launches] == labels and not fp8_weights._copies


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"recipe: .*fp8_channel.*'bf16'"):
        quantized_weights(parameter(), "bf16")
    with pytest.raises(ValueError, match=r"scale: .*'fp16'"):
        quantized_weights(parameter(), "fp8", "fp16")
    with pytest.raises(TypeError, match=r"weight: .*float64"):
        quantized_weights(nn.Parameter(torch.randn(2, 3, 4, dtype=torch.float64)), "fp8")
    assert not fp8_weights._copies
