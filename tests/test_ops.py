"""The operators: what torch's own `opcheck` asks of them, compiled graphs, checkpointing, and what is not computed.

References: eager for compiled, the plain run for the checkpointed one, bit for bit; counts of casts, of launches and of
what a backend is asked for. Values are test_functional.py's, test_gpu.py's and test_routing.py's. Where there is a GPU,
`triton` runs there. Not covered: inductor on a GPU.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
from moe_cases import TRITON, choose, device_of
from numeric import assert_same_bits
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ornith_moe as om
from ornith_moe import fp8_weights, ops
from ornith_moe.backend.protocol import NAMES, load
from ornith_moe.quant.recipes import RECIPES

T, E, H, I, TOP_K = 21, 5, 40, 128, 2
BACKENDS = ("cpu", "reference", TRITON)
EVERY_CASE = [(backend, recipe) for backend in ("cpu", "reference") for recipe in RECIPES]
EVERY_CASE += [pytest.param("triton", recipe, marks=pytest.mark.device) for recipe in RECIPES]


@pytest.fixture
def casts(monkeypatch):
    """One element for each weight that was quantized."""
    made, real = [], fp8_weights._quantize
    monkeypatch.setattr(fp8_weights, "_quantize", lambda *arguments: made.append(1) or real(*arguments))
    fp8_weights.forget_quantized_weights()
    return made


class Experts(nn.Module):
    """Router and experts, as a trainer calls them."""

    def __init__(self, recipe="bf16", backend="cpu", inner=I):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * inner, H) / H**0.5)
        self.down_proj = nn.Parameter(torch.randn(E, H, inner) / inner**0.5)
        self.options = {"recipe": recipe, "backend": backend}

    def forward(self, x, replay=None):
        routing = om.route(self.gate(x), TOP_K, losses=True, replay=replay, backend=self.options["backend"])
        y = om.moe_mlp(x, routing.indices, routing.weights, self.gate_up_proj, self.down_proj, **self.options)
        return y, routing.load_balancing_loss + routing.z_loss


def results(call, module, x, **options):
    """y, the losses, dx and the gradient of every parameter."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y, losses = call(x, **options)
    (y.square().sum() + losses).backward()
    return {"y": y.detach(), "losses": losses.detach(), "dx": x.grad} | {
        name: parameter.grad.clone() for name, parameter in module.named_parameters()
    }


def assert_equal_results(got, expected):
    for name, tensor in expected.items():
        assert_same_bits(name, got[name], tensor)


def operands(backend, recipe, save=True, pairs=False, dtype=torch.float32):
    x, weights = torch.randn(T, H, dtype=dtype), torch.rand(T, TOP_K)
    sides = [torch.randn(E, 2 * I, H, dtype=dtype), torch.randn(E, H, I, dtype=dtype)]
    scales = [None, None]
    if pairs:
        make = om.quantize_fp8_channel if recipe == "fp8_channel" else om.quantize_fp8_block
        sides, scales = zip(*(make(w) for w in sides), strict=True)
    where = device_of(backend)
    tensors = [x, choose("uniform", T, E, TOP_K), weights, *sides, *scales]
    tensors = [None if t is None else t.to(where) for t in tensors]
    if save:
        for tensor in (tensors[0], tensors[2], *(() if pairs else tensors[3:5])):
            tensor.requires_grad_()
    return *tensors, recipe, "fp32", False, backend, save


class TestOpcheck:
    """Schema (nothing is mutated or aliased), autograd registration, fake sizes, AOT dispatch with a dynamic T."""

    @pytest.mark.parametrize(("backend", "recipe"), EVERY_CASE, ids=str)
    def test_moe_mlp(self, backend, recipe):
        # in the interpreter a call takes a second; the other tests of opcheck do not depend on how y is computed
        tests = ("test_schema", "test_faketensor") if backend == "triton" else all_tests()
        opcheck(torch.ops.ornith.moe_mlp.default, operands(backend, recipe), test_utils=tests)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("recipe", "pairs", "save"), [("bf16", True, True), ("fp8_channel", True, False)])
    def test_moe_mlp_of_pairs(self, recipe, pairs, save, dtype):
        tests = all_tests(but="test_schema")  # torch cannot multiply e4m3, as that test does to compare
        opcheck(torch.ops.ornith.moe_mlp.default, operands("cpu", recipe, save, pairs, dtype), test_utils=tests)

    @pytest.mark.parametrize("needs_grad", [(True, True, True, True), (False, True, False, True)], ids=str)
    @pytest.mark.parametrize(("backend", "recipe"), EVERY_CASE, ids=str)
    def test_moe_mlp_backward(self, backend, recipe, needs_grad):
        x, indices, weights, *sides, recipe, scale, invariant, backend, _ = operands(backend, recipe, save=False)
        given = (x, indices, weights, *sides)
        _, *saved = torch.ops.ornith.moe_mlp(*given, recipe, scale, invariant, backend, True)
        arguments = (torch.randn_like(x), *given, *saved, recipe, scale, invariant, backend, list(needs_grad))
        tests = ("test_schema", "test_faketensor") if backend == "triton" else all_tests()
        arguments += (torch.bfloat16, torch.float32)
        opcheck(torch.ops.ornith.moe_mlp_backward.default, arguments, test_utils=tests)

    @pytest.mark.parametrize("losses", [False, True])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_route(self, backend, losses):
        where = device_of(backend)
        logits = torch.randn(T, 6, device=where, requires_grad=True)
        replay = choose("uniform", T, 6, 2).to(where)
        opcheck(torch.ops.ornith.route.default, (logits, None, replay, 2, "softmax", True, None, None, losses, backend))
        opcheck(
            torch.ops.ornith.route.default,
            (logits.detach().bfloat16(), torch.rand(6, device=where), None, 2, "sigmoid", False, 3, 1, losses, backend),
        )

    @pytest.mark.parametrize("losses", [False, True])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_route_backward(self, backend, losses):
        logits = torch.randn(T, 6, device=device_of(backend))
        routing = om.route(logits, 2, backend=backend)
        sums = (logits.new_ones(6), logits.new_ones(())) if losses else (None, None)
        dweights = torch.randn_like(routing.weights)
        arguments = (logits, routing.indices, routing.weights, dweights, *sums, "softmax", True, backend)
        opcheck(torch.ops.ornith.route_backward.default, arguments)


def all_tests(but=None):
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return tuple(test for test in every if test != but)


class TestCompile:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_one_graph_each_way_for_every_batch(self, recipe):
        """fullgraph, forward and backward by inductor, T dynamic: two graphs, because T = 1 is one of its own."""
        module = Experts(recipe)
        compiled, frames = torch.compile(module, fullgraph=True, dynamic=True), torch._dynamo.utils.counters["stats"]
        before = frames["unique_graphs"]
        for tokens in (33, 64, 1, 7):
            x = torch.randn(tokens, H)
            got, expected = (results(call, module, x) for call in (compiled, module))
            for name, tensor in expected.items():  # inductor fuses the products of the loss and of the router
                torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6 * tensor.abs().max().item())
        assert frames["unique_graphs"] - before <= 2
        torch._dynamo.reset()

    def test_reference_and_replay(self):
        module = Experts("fp8", "reference")
        x, replay = torch.randn(T, H), choose("uniform", T, E, TOP_K)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got, expected = (results(call, module, x, replay=replay) for call in (compiled, module))
        assert_equal_results(got, expected)
        torch._dynamo.reset()

    def test_a_wrong_record_is_still_refused(self):
        compiled = torch.compile(Experts(), fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match=r"replay\[1\]: expected 2 different experts, got \[3, 3\]"):
            compiled(torch.randn(2, H), replay=torch.tensor([[0, 1], [3, 3]]))
        torch._dynamo.reset()

    def test_frozen_experts(self):
        """What is not wanted is not in the backward graph either."""
        module = Experts()
        module.gate_up_proj.requires_grad_(False)
        asked = []

        def look(graph, inputs):
            asked.extend(n.args[-3] for n in graph.graph.nodes if n.target is torch.ops.ornith.moe_mlp_backward.default)
            return graph.forward

        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        backend = aot_autograd(fw_compiler=lambda g, i: make_boxed_func(look(g, i)))
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        y, _ = compiled(torch.randn(T, H))
        y.sum().backward()
        assert asked == [[False, True, False, True]]
        torch._dynamo.reset()

    def test_an_fp8_gradient_is_refused_and_not_rounded(self):
        x, weights = torch.randn(T, H), torch.rand(T, TOP_K)
        pairs = [om.quantize_fp8_block(w) for w in (torch.randn(E, 2 * I, H), torch.randn(E, H, I))]
        pairs[0][0].requires_grad_().grad_dtype = torch.float32
        compiled = torch.compile(lambda *a: om.moe_mlp(*a, *pairs), fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match=r"gate_up_proj: .* outside of torch.compile"):
            compiled(x, choose("uniform", T, E, TOP_K), weights)
        torch._dynamo.reset()


class TestCheckpointing:
    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gives_the_same_bits(self, recipe, reentrant):
        module, x = Experts(recipe), torch.randn(T, H)
        got = results(lambda x: checkpoint(module, x, use_reentrant=reentrant), module, x)
        assert_equal_results(got, results(module, module, x))

    def test_recomputes_without_a_cast(self, casts):
        module, x = Experts("fp8"), torch.randn(T, H)
        results(lambda x: checkpoint(module, x, use_reentrant=False), module, x)
        assert len(casts) == 2


ON_TRITON = [("fp8", "eager"), ("fp8_channel", "eager"), ("fp8_full", "compiled")]  # what compiles knows no backend


class TestWeightsAreQuantizedOnce:
    @pytest.mark.parametrize(
        ("recipe", "how", "backend"),
        [
            *itertools.product(("fp8", "fp8_full", "fp8_channel"), ("eager", "compiled"), ("cpu",)),
            *(pytest.param(*one, "triton", marks=pytest.mark.device) for one in ON_TRITON),
        ],
    )
    def test_per_step_and_not_per_micro_batch(self, casts, recipe, how, backend):
        """Forward and backward of two micro-batches share one cast of each weight; the optimizer ends it."""
        where = device_of(backend)
        module = Experts(recipe, backend).to(where)
        call = torch.compile(module, fullgraph=True, backend="aot_eager") if how == "compiled" else module
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        for step in (1, 2):
            for _ in range(2):
                y, _ = call(torch.randn(4, H, device=where))
                y.sum().backward()
            if where == "cpu":  # on a GPU only the kernel knows: tests/kernels/test_fp8_cast.py
                assert len(casts) == 2 * step
            optimizer.step()
        torch._dynamo.reset()

    def test_inductor_hands_the_parameter_itself_through(self, casts):
        module = Experts("fp8")
        compiled = torch.compile(module, fullgraph=True)
        for _ in range(2):
            y, _ = compiled(torch.randn(4, H))
            y.sum().backward()
        assert len(casts) == 2
        torch._dynamo.reset()

    def test_a_pair_is_not_quantized_at_all(self, casts):
        arguments = operands("cpu", "fp8_full", save=False, pairs=True)
        torch.ops.ornith.moe_mlp(*arguments)
        assert not casts


class TestOnlyWhatIsNeeded:
    NAMES = ("x", "weights", "gate_up_proj", "down_proj")

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    @pytest.mark.parametrize("mask", range(1, 16))
    def test_every_subset(self, mask, backend, monkeypatch):
        """The backend is asked for that subset and no more, and gives the bits it gives when all are needed."""
        trained = [name for i, name in enumerate(self.NAMES) if mask >> i & 1]
        home, asked = load(backend), []
        real = home.moe_backward
        monkeypatch.setattr(home, "moe_backward", lambda *a, **k: asked.append((a, k)) or real(*a, **k))
        x, indices, weights, gate_up, down, *_ = operands(backend, "bf16", save=False)
        leaves = dict(zip(self.NAMES, (x, weights, gate_up, down), strict=True))
        everything = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
        dy = torch.randn(T, H)
        om.moe_mlp(indices=indices, backend=backend, **everything).backward(dy)
        for name in trained:
            leaves[name].requires_grad_()
        om.moe_mlp(indices=indices, backend=backend, **leaves).backward(dy)
        assert asked[1][1]["needs_grad"] == tuple(name in trained for name in self.NAMES)
        for name, leaf in leaves.items():
            if name in trained:
                assert_same_bits(name, leaf.grad, everything[name].grad)
            else:
                assert leaf.grad is None, name

    def test_matrix_products_of_the_cpu_backend(self):
        """LoRA on frozen experts: x and the router want gradients, and each active expert multiplies twice, not four
        times. In float64, which is torch.mm per expert whatever else the backend has."""
        counts = {}
        for trained in ((), ("x", "weights"), self.NAMES):
            x, indices, weights, gate_up, down, *_ = operands("cpu", "bf16", save=False, dtype=torch.float64)
            leaves = dict(zip(self.NAMES, (x, weights, gate_up, down), strict=True))
            for name in trained:
                leaves[name].requires_grad_()
            y = om.moe_mlp(indices=indices, **leaves)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                if trained:
                    y.sum().backward()
            counts[trained] = sum(event.name == "aten::mm" for event in profile.events())
        active = indices.unique().numel()
        assert counts == {(): 0, ("x", "weights"): 2 * active, self.NAMES: 4 * active}

    def test_nothing_is_saved_without_a_gradient(self):
        x, indices, weights, gate_up, down, *_ = operands("cpu", "bf16")
        with torch.no_grad():
            _, *saved = torch.ops.ornith.moe_mlp(
                x, indices, weights, gate_up, down, None, None, "bf16", "fp32", False, "cpu", False
            )
        assert not any(tensor.numel() for tensor in saved)

    @pytest.mark.parametrize("what", ["weights", "load_balancing_loss", "z_loss"])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_each_output_of_the_router_alone(self, what, backend):
        logits = torch.randn(9, 6, device=device_of(backend))
        gradients = []
        for dtype, one in ((torch.float32, backend), (torch.float64, "reference")):
            leaf = logits.detach().to(dtype, copy=True).requires_grad_()
            getattr(om.route(leaf, 2, losses=True, backend=one), what).square().sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], gradients[1].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_flop_counters_see_the_products(backend):
    """6 T top_k H I forward; backward, 2 for da', 4 each for dx and dgate_up, 2 for ddown."""
    unit = T * TOP_K * H * I
    for trained, expected in ((("x",), 6 + 6), (("down_proj",), 6 + 2), (TestOnlyWhatIsNeeded.NAMES, 6 + 12)):
        x, indices, weights, gate_up, down, *_ = operands(backend, "bf16", save=False)
        leaves = dict(zip(TestOnlyWhatIsNeeded.NAMES, (x, weights, gate_up, down), strict=True))
        for name in trained:
            leaves[name].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            om.moe_mlp(indices=indices, backend=backend, **leaves).sum().backward()
        assert counter.get_total_flops() == expected * unit, trained


def test_schemas_hold_tensors_and_plain_values():
    """No Python object can hide in a graph; what is public is listed."""
    plain = {"Tensor", "Optional[Tensor]", "int", "Optional[int]", "str", "bool", "List[bool]", "ScalarType"}
    for name in ops._OPERATORS:
        schema = getattr(torch.ops.ornith, name).default._schema
        assert {str(argument.type) for argument in schema.arguments} <= plain, name
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.ornith, name).default.tags


def test_the_bytes_of_the_documentation_are_those_that_are_saved():
    """docs/numerics.md, per token of the 35B: pre and what a backend keeps besides, without the E + 1 offsets."""
    text = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")
    for backend, recipe in itertools.product(NAMES, RECIPES.values()):
        sizes = load(backend).saved_sizes(8, 256, 512, recipe, torch.bfloat16)
        total = 2 * 2048 + sum(
            math.prod(size) * dtype.itemsize for name, (size, dtype) in sizes.items() if name != "offsets"
        )
        rows = [line for line in text.splitlines() if line.startswith(f"| `{backend}`") and f" {total:,} |" in line]
        assert any(f"`{recipe.name}`" in row or "every recipe" in row for row in rows), (backend, recipe.name, total)
