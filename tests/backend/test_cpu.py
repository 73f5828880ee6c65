"""ornith_moe/cpu against the loop of experts in float64 (ornith_moe/backend/reference.py).

FP8: the reference gets the weights that `dequantize_fp8` gives, and activations through `quantize_fp8_tokens`. Kernels
run here as they are compiled for this processor; the other ways to multiply BF16 are run too where it can.
Not covered: speed, the vector widths of other processors, AMX, what the system does with pages under pressure.
`om.moe_mlp` on this backend is in test_functional.py.
"""

import itertools
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numeric import TOLERANCE, assert_close, assert_same_bits, cosine_difference

from ornith_moe.backend.cpu import BACKEND, describe, loop, machine, memory, native, probe
from ornith_moe.backend.cpu.register_tiles import BF16_DOT, BF16_WIDE, HAS_BF16_DOT, VECTOR_BYTES
from ornith_moe.backend.cpu.routed import group_by_expert
from ornith_moe.backend.protocol import Saved
from ornith_moe.backend.reference import moe_mlp_reference
from ornith_moe.quant import fp8
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import recipe_of

OUTPUTS = ("y", "dx", "dweights", "dgate_up", "ddown")
SHAPES = [  # T, E, H, I, top_k: nothing divides, one token, whole vectors, odd, many rows
    (63, 7, 40, 24, 3),
    (1, 4, 64, 32, 2),
    (100, 5, 256, 128, 2),
    (33, 4, 33, 17, 4),
    (1200, 2, 130, 70, 1),
]


class Layer:
    def __init__(self, tokens, experts, hidden, inner, top_k, dtype=torch.float32):
        self.x, self.dy = (torch.randn(tokens, hidden).to(dtype) for _ in range(2))
        self.gate_up = (torch.randn(experts, 2 * inner, hidden) / hidden**0.5).to(dtype)
        self.down = (torch.randn(experts, hidden, inner) / inner**0.5).to(dtype)
        self.indices = torch.rand(tokens, experts).topk(top_k).indices
        self.weights = torch.rand(tokens, top_k)

    def plain(self):
        return Operand(self.gate_up), Operand(self.down)

    def quantized(self, recipe, scale="fp32"):
        if scale == "bf16":
            return [Operand(*fp8.quantize_fp8_block(w, scale=scale)) for w in (self.gate_up, self.down)]
        return [Operand.quantized(w, recipe_of(recipe), scale) for w in (self.gate_up, self.down)]

    def forward(self, experts=None, recipe="bf16", save=False):
        operands = (self.x, self.indices, self.weights, *(experts or self.plain()))
        return BACKEND.moe_forward(*operands, recipe=recipe_of(recipe), save=save)

    def backward(self, saved, experts=None, recipe="bf16", with_x=True, **options):
        operands = (self.x if with_x else None, self.indices, self.weights, saved, *(experts or self.plain()))
        return BACKEND.moe_backward(self.dy, *operands, recipe=recipe_of(recipe), **options)

    def run(self, experts=None, recipe="bf16", **options):
        experts = experts or self.plain()
        y, saved = self.forward(experts, recipe, save=True)
        return dict(zip(OUTPUTS, (y, *self.backward(saved, experts, recipe, **options)), strict=True))

    def expected(self, experts=None, group="none", scale="fp32"):
        """In float64; `group` None or 128: activations pass through FP8, and the gradient straight through the cast."""
        value = [w.dequantized(self.x.dtype) for w in experts or self.plain()]
        leaves = [t.double().requires_grad_() for t in (self.x, self.weights, *value)]
        if group == "none":
            y = moe_mlp_reference(leaves[0], self.indices, *leaves[1:])
        else:

            def cast(rows):
                q = fp8.roundtrip_fp8_tokens(rows.detach().to(self.x.dtype), group=group, scale=scale)
                return rows + (q.double() - rows).detach()

            x, weights, gate_up, down = leaves
            y, rows = 0 * x, cast(x)
            for e in range(gate_up.shape[0]):
                token, slot = (self.indices == e).nonzero(as_tuple=True)
                gate, up = (rows[token] @ gate_up[e].T).chunk(2, -1)
                y = y.index_add(0, token, cast(F.silu(gate) * up) @ down[e].T * weights[token, slot, None])
        return dict(zip(OUTPUTS, (y.detach(), *torch.autograd.grad(y, leaves, self.dy.double())), strict=True))


@pytest.fixture(params=["dot", "wide"])
def bf16_kind(request, monkeypatch):
    kind = {"dot": BF16_DOT, "wide": BF16_WIDE}[request.param]
    if request.param == "dot" and not HAS_BF16_DOT:
        pytest.skip("this processor has no BF16 dot product")
    monkeypatch.setattr("ornith_moe.backend.cpu.bf16_kind", lambda: kind)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape):
    layer = Layer(*shape)
    expected = layer.expected()
    for name, value in layer.run().items():
        assert_close(name, value, expected[name], 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16(shape, bf16_kind):
    layer = Layer(*shape, dtype=torch.bfloat16)
    expected = layer.expected()
    for name, value in layer.run().items():
        assert_close(name, value, expected[name], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float16, 2e-3)], ids=str)
def test_other_dtypes_go_through_torch(dtype, tolerance):
    layer = Layer(63, 7, 40, 24, 3, dtype=dtype)
    layer.weights = layer.weights.to(torch.float64)
    expected = layer.expected()
    for name, value in layer.run().items():
        assert_close(name, value, expected[name], max(tolerance, 1e-7) if name == "dweights" else tolerance)


def test_the_loop_gives_what_the_kernels_give(monkeypatch):
    """Where torch.mm is much faster (AMX) experts with many rows go through it; forced here."""
    layer = Layer(400, 3, 64, 40, 2, dtype=torch.bfloat16)
    expected, seen = layer.expected(), []
    monkeypatch.setattr("ornith_moe.backend.cpu.torch_wins", lambda: True)
    monkeypatch.setattr(loop, "gate_up", lambda *a, f=loop.gate_up: seen.append(1) or f(*a))
    for name, value in layer.run().items():
        assert_close(name, value, expected[name], TOLERANCE[torch.bfloat16])
    assert seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", ["fp32", "bf16", "ue8m0", "channel", "whole"])
def test_fp8_weights_with_plain_activations(scale, dtype):
    layer = Layer(50, 4, 200, 72, 2, dtype=dtype)
    recipe = "fp8_channel" if scale == "channel" else "fp8"
    experts = layer.quantized(recipe, "fp32" if scale == "whole" else scale)
    if scale == "whole":  # one scale per matrix, such that weights have their usual size
        experts = [Operand(w.value, torch.full((4, 1, 1), 2.0**-10)) for w in experts]
        plain, values = Layer.__new__(Layer), [2.0**-10 * w.value.to(dtype) for w in experts]
        vars(plain).update(vars(layer), gate_up=values[0], down=values[1])
        expected = plain.expected()
    else:
        expected = layer.expected(experts)
    for name, value in layer.run(experts).items():
        assert_close(name, value, expected[name], 1e-6 if dtype == torch.float32 else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("recipe", "scale"), [("fp8", "fp32"), ("fp8", "ue8m0"), ("fp8_full", "fp32"), ("fp8_channel", "fp32")]
)
def test_fp8_recipes(recipe, scale, dtype):
    layer = Layer(66, 5, 256, 128, 2, dtype=dtype)
    experts = layer.quantized(recipe, scale)
    expected = layer.expected(experts, group=None if recipe == "fp8_channel" else 128, scale=scale)
    for name, value in layer.run(experts, recipe).items():
        assert cosine_difference(value, expected[name]) < 1e-3, name


def test_every_code_decodes_as_torch_does():
    """One expert whose down is the identity: y shows what gate_up was decoded to, for all 256 codes but NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[codes.float().isfinite()]
    hidden = torch.zeros(1, 2 * len(finite), 1).to(torch.float8_e4m3fn)
    hidden[0, len(finite) :, 0] = finite
    hidden[0, : len(finite), 0] = 1.0
    up = Operand(hidden, torch.full((1, 2 * len(finite), 1), 0.5))
    x, indices = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    operands = (x, indices, torch.ones(1, 1), up, Operand(torch.eye(len(finite))[None]))
    _, saved = BACKEND.moe_forward(*operands, recipe=recipe_of("bf16"), save=True)
    assert_same_bits("pre", saved.pre[0, len(finite) :], finite.float() * 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_threads_nor_the_batch_change_a_bit(dtype):
    layer = Layer(300, 4, 128, 96, 2, dtype=dtype)
    whole, before = layer.run(), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for name, value in layer.run().items():
                assert_same_bits(name, value, whole[name])
    finally:
        torch.set_num_threads(before)
    for keep in (torch.arange(7, 300, 3), torch.tensor([11])):
        part = Layer.__new__(Layer)
        vars(part).update(vars(layer))
        for name in ("x", "dy", "indices", "weights"):
            setattr(part, name, getattr(layer, name)[keep])
        got = part.run()
        for name in ("y", "dx", "dweights"):
            assert_same_bits(name, got[name], whole[name][keep])


@pytest.mark.parametrize("save", [False, True])
def test_bf16_of_many_rows_is_summed_in_panels(save, bf16_kind, monkeypatch):
    """300 rows an expert, so four panels and a rest, and 320 columns, so a whole strip and a part of one."""
    layer = Layer(600, 2, 192, 320, 1, dtype=torch.bfloat16)
    layer.indices = torch.arange(600).view(-1, 1) % 2
    expected, before = layer.expected()["y"], torch.get_num_threads()

    def forward():
        return layer.forward(save=save)

    y, saved = forward()
    assert_close("y", y, expected, TOLERANCE[torch.bfloat16])
    if save:
        gate_up = torch.cat([layer.x[e::2].double() @ layer.gate_up[e].double().T for e in range(2)])
        assert_close("pre", saved.pre, gate_up, TOLERANCE[torch.bfloat16])
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert_same_bits("y", forward()[0], y)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(native, "_MANY_ROWS", 1000)
    other = forward()[0]
    assert_close("y", other, expected, TOLERANCE[torch.bfloat16])
    assert (other != y).any(), "both orders gave the same bits: were there two?"


def test_many_threads_at_once():
    layer = Layer(200, 4, 128, 96, 2)
    whole, results = layer.run(), []
    callers = [threading.Thread(target=lambda: results.append(layer.run())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    for result, name in itertools.product(results, OUTPUTS):
        assert_same_bits(name, result[name], whole[name])


@pytest.mark.parametrize("needs_grad", list(itertools.product((True, False), repeat=4))[:-1], ids=str)
def test_a_subset_of_gradients_has_the_bits_of_all(needs_grad):
    layer = Layer(40, 5, 64, 40, 2)
    whole = layer.run()
    _, saved = layer.forward(save=True)
    part = layer.backward(saved, with_x=needs_grad[2], needs_grad=needs_grad)
    for name, needed, value in zip(OUTPUTS[1:], needs_grad, part, strict=True):
        assert (value is not None) == needed, name
        if needed:
            assert_same_bits(name, value, whole[name])


def test_only_ddown_needs_no_product_with_the_weights(monkeypatch):
    """down is never read: it may as well be NaN."""
    layer = Layer(40, 5, 64, 40, 2)
    whole = layer.run()["ddown"]
    _, saved = layer.forward(save=True)
    nothing = Operand(torch.full_like(layer.down, torch.nan))
    got = layer.backward(saved, [nothing] * 2, with_x=False, needs_grad=(False, False, False, True))
    assert_same_bits("ddown", got[3], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_another_dtype(dtype):
    layer = Layer(30, 3, 64, 40, 2, dtype=dtype)
    expected = layer.expected()
    got = layer.run(grad_dtypes=(torch.bfloat16, torch.float32))
    assert got["dgate_up"].dtype == torch.bfloat16 and got["ddown"].dtype == torch.float32
    for name in ("dgate_up", "ddown"):
        assert_close(name, got[name], expected[name], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["no-tokens", "only-sentinels", "far-ids", "one-takes-all"])
def test_unusual_routings(kind, dtype):
    layer = Layer(0 if kind == "no-tokens" else 70, 5, 64, 40, 2, dtype=dtype)
    layer.indices[:] = {"no-tokens": 0, "only-sentinels": 5, "far-ids": 2**40 + 1, "one-takes-all": 3}[kind]
    got = layer.run()
    assert got["y"].shape == layer.x.shape and got["dgate_up"].shape == layer.gate_up.shape
    expected = layer.expected() if kind == "one-takes-all" else None
    for name, value in got.items():
        if expected is None:
            assert not value.any(), name
        else:
            assert_close(name, value, expected[name], 1e-6 if dtype != torch.bfloat16 else TOLERANCE[dtype])


def test_nan_stays_with_its_token_and_idle_experts_may_hold_anything():
    layer = Layer(24, 4, 64, 40, 2, dtype=torch.bfloat16)
    layer.indices[:] = torch.tensor([0, 1])
    layer.x[5, 3] = torch.nan
    layer.gate_up[2], layer.down[3] = torch.inf, torch.nan
    got = layer.run()
    for name in ("y", "dx", "dweights"):
        bad = ~got[name].isfinite().all(1)
        assert bad[5] and bad.sum() == 1, name
    assert not got["dgate_up"][2:].any() and not got["ddown"][2:].any()


def test_the_sort_of_the_docstring():
    rows = group_by_expert(torch.tensor([[1, 3], [0, 3], [2, 9]]), 4)
    assert rows.offsets.tolist() == [0, 1, 2, 3, 5]
    assert rows.row_to_slot.tolist() == [2, 0, 4, 1, 3, -1]
    assert rows.active.tolist() == [0, 1, 2, 3] and rows.used == 5


def test_saved_has_the_sizes_that_shapes_give():
    layer = Layer(9, 4, 64, 40, 2)
    layer.indices[::2] = -1
    _, saved = layer.forward(save=True)
    sizes = BACKEND.saved_sizes(18, 4, 40, recipe_of("bf16"), torch.float32)
    assert sizes == {name: (tuple(t.shape), t.dtype) for name, t in saved._asdict().items() if t is not None}
    assert sizes["pre"] == ((18, 80), torch.float32) and saved.a_scale is None
    assert layer.forward()[1] == Saved()


def test_kernels_write_within_their_scratch(monkeypatch):
    """Behind the end of each layout, and before its start, bytes stay as they were."""
    lent = []

    def scratch(nbytes):
        memory = np.full(nbytes + 8192, 0xA5, np.uint8)
        start = 4096 + -memory.ctypes.data % 64
        lent.append((memory, start, start + nbytes))
        return memory.ctypes.data + start

    monkeypatch.setattr(machine, "_scratch", scratch)
    for shape, dtype in itertools.product([*SHAPES, (600, 2, 192, 320, 1)], (torch.float32, torch.bfloat16)):
        layer = Layer(*shape, dtype=dtype)
        layer.run()
        layer.run(layer.quantized("fp8_channel"))
    assert len(lent) >= 5 * 2 * 2 * 6
    for lent_bytes, start, end in lent:
        assert (lent_bytes[:start] == 0xA5).all() and (lent_bytes[end:] == 0xA5).all()


@pytest.mark.parametrize("step", ["gate_up", "down", "activation_gradient", "weight_gradient", "input_gradient"])
def test_a_wrong_total_of_scratch_is_caught(step, monkeypatch):
    """By the kernel, before it writes."""

    def short(kernel, tasks, work_ns, scratch_bytes, arguments):
        machine.run(kernel, tasks, work_ns, scratch_bytes - 8 * (kernel.__name__ == step), arguments)

    monkeypatch.setattr(native, "run", short)
    with pytest.raises(AssertionError):
        Layer(9, 4, 64, 40, 2).run()


def test_memory_of_idle_experts_is_never_touched():
    """A gradient of 1 GiB of which one expert is written: resident memory grows by a few pages (Linux)."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    memory.release()
    before = resident()
    gradient = memory.weight_gradient((256, 1024, 1024), torch.float32, [17])
    assert not gradient._is_view()  # what leaves an operator is changed in place
    gradient[17] = 1
    assert resident() - before < 32 << 20
    assert gradient[17].all() and not gradient[200].any()


def test_memory_is_used_again_and_clean():
    memory.release()
    shape = (8, 512, 512)
    first = memory.weight_gradient(shape, torch.float32, list(range(8)))
    first.fill_(7)
    place = first.data_ptr()
    del first
    second = memory.weight_gradient(shape, torch.float32, [1, 2, 6])
    assert second.data_ptr() == place
    assert not second[[0, 3, 4, 5, 7]].any()
    memory.release()


@pytest.mark.parametrize(
    ("recipe", "inner", "quantized", "says"),
    [
        ("int8", 128, True, "recipe: expected one of"),
        ("fp8", 128, False, "gate_up: recipe 'fp8' expects e4m3fn values with scales"),
        ("fp8_full", 72, True, r"I = 72.*fp8_channel"),
    ],
)
def test_refuses_in_one_sentence(recipe, inner, quantized, says):
    layer = Layer(5, 3, 128, inner, 2)
    experts = layer.quantized("fp8") if quantized else layer.plain()
    with pytest.raises(ValueError, match=says):
        layer.forward(experts, recipe)


def test_describe_names_the_way_that_is_used():
    text = describe()
    assert ("dot product" in text) == (probe.bf16_kind() == BF16_DOT) and f"{VECTOR_BYTES} bytes" in text
