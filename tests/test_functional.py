"""`moe_mlp` on the backends, recipe by recipe, against the reference in float64 (tests/backend/test_reference.py).

triton runs in the interpreter where there is no GPU. Its own tests are in test_gpu.py and tests/kernels, those of the
operator in test_ops.py. Not covered: speed, and the accuracy of bf16 GEMMs where torch accumulates in bf16.
"""

import pytest
import torch
import torch.nn.functional as F
from moe_cases import TRITON, choose, device_of
from numeric import TOLERANCE, assert_close, assert_same_bits, cosine_difference, sqnr_db

import ornith_moe as om
from ornith_moe.backend.reference import moe_mlp_reference

T, E, H, I, TOP_K = 63, 7, 40, 24, 3
NAMES = ("x", "weights", "gate_up_proj", "down_proj")
OUTPUTS = ("y", *("d" + name for name in NAMES))
BACKENDS = ("cpu", "reference")
FP8 = ("fp8", "fp8_full", "fp8_channel")


def operands(tokens=T, experts=E, hidden=H, inner=I, top_k=TOP_K, dtype=torch.float32, master=None):
    x = torch.randn(tokens, hidden)
    weights = torch.rand(tokens, top_k)
    gate_up_proj = torch.randn(experts, 2 * inner, hidden) / hidden**0.5
    down_proj = torch.randn(experts, hidden, inner) / inner**0.5
    return [x.to(dtype), weights, gate_up_proj.to(master or dtype), down_proj.to(master or dtype)]


def run(function, tensors, indices, dy, **options):
    """[y, gradients of x, weights, gate_up_proj, down_proj]."""
    where = device_of(options.get("backend"))
    leaves = [t.to(where, copy=True).requires_grad_() for t in tensors]
    x, weights, gate_up_proj, down_proj = leaves
    y = function(x, indices.to(where), weights, gate_up_proj, down_proj, **options)
    y.backward(dy.to(y))
    return [y.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


def check(tensors, indices, tolerance, backend="cpu"):
    dy = torch.randn(tensors[0].shape)
    truth = run(moe_mlp_reference, [t.double() for t in tensors], indices, dy.to(tensors[0].dtype))
    mine = run(om.moe_mlp, tensors, indices, dy, backend=backend)
    for label, a, b in zip(OUTPUTS, mine, truth, strict=True):
        assert_close(label, a, b, tolerance)
    assert [a.dtype for a in mine[1:]] == [t.dtype for t in tensors]


@pytest.mark.parametrize("kind", ["uniform", "skewed", "empty", "one-takes-all", "sentinels"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_outputs_match_float64(kind, dtype, backend):
    check(operands(dtype=dtype), choose(kind, T, E, TOP_K), TOLERANCE[dtype], backend)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 7, 3), (100, 7, 1), (63, 5, 5), (9, 1, 1), (3, 100, 2)], ids=str
)
def test_odd_sizes(tokens, experts, top_k):
    indices = torch.rand(tokens, experts).topk(top_k).indices.int()
    check(operands(tokens, experts, hidden=33, inner=17, top_k=top_k), indices, TOLERANCE[torch.float32])


def test_same_expert_twice_in_a_row_adds_twice():
    check(operands(), torch.randint(0, 2, (T, TOP_K)), TOLERANCE[torch.float32])


class TestFP8:
    """x 200 wide: the last group and the last block are partial. Gradients are those of the dequantized operands."""

    def case(self, recipe, dtype=torch.bfloat16, master=torch.float32, kind="skewed"):
        tensors = operands(hidden=200, inner=72 if recipe == "fp8_channel" else 128, dtype=dtype, master=master)
        return tensors, choose(kind, T, E, TOP_K), torch.randn(T, 200).to(dtype)

    @pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])
    @pytest.mark.parametrize("recipe", FP8)
    def test_trains_masters(self, recipe, backend, record_property):
        tensors, indices, dy = self.case(recipe)
        truth = run(moe_mlp_reference, tensors, indices, dy, recipe=recipe, dtype=torch.float64)
        unquantized = run(moe_mlp_reference, [t.double() for t in tensors], indices, dy)
        mine = run(om.moe_mlp, tensors, indices, dy, recipe=recipe, backend=backend)
        assert [a.dtype for a in mine[1:]] == [t.dtype for t in tensors]
        for label, a, b, exact in zip(OUTPUTS, mine, truth, unquantized, strict=True):
            record_property(f"{label} cosine difference", cosine_difference(a, b))
            record_property(f"{label} sqnr_db", sqnr_db(a, exact))
            assert cosine_difference(a, b) < 1e-3, label
            assert 20 < sqnr_db(a, exact) < 40, label  # quantized, and no worse than that

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("recipe", FP8)
    def test_of_float32_operands_is_exact_but_for_ties(self, recipe, backend):
        """Nothing is rounded but by the recipe; a float32 sum may still decide a near-tie of a cast otherwise."""
        tensors, indices, dy = self.case(recipe, dtype=torch.float32)
        truth = run(moe_mlp_reference, tensors, indices, dy, recipe=recipe, dtype=torch.float64)
        mine = run(om.moe_mlp, tensors, indices, dy, recipe=recipe, backend=backend)
        for label, a, b in zip(OUTPUTS, mine, truth, strict=True):
            assert cosine_difference(a, b) < 1e-6, label

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_powers_of_two(self, backend):
        """UE8M0 scales reach weights and activations: with one of them in fp32 the difference is above 1e-5."""
        tensors, indices, dy = self.case("fp8", dtype=torch.float32)
        truth = run(moe_mlp_reference, tensors, indices, dy, recipe="fp8", scale="ue8m0", dtype=torch.float64)
        mine = run(om.moe_mlp, tensors, indices, dy, recipe="fp8", scale="ue8m0", backend=backend)
        for label, a, b in zip(OUTPUTS, mine, truth, strict=True):
            assert cosine_difference(a, b) < 1e-6, label

    @pytest.mark.parametrize("kind", ["empty", "one-takes-all", "sentinels"])
    @pytest.mark.parametrize("recipe", FP8)
    def test_adversarial_routing(self, recipe, kind):
        tensors, indices, dy = self.case(recipe, kind=kind)
        truth = run(moe_mlp_reference, tensors, indices, dy, recipe=recipe, dtype=torch.float64)
        for label, a, b in zip(OUTPUTS, run(om.moe_mlp, tensors, indices, dy, recipe=recipe), truth, strict=True):
            assert cosine_difference(a, b) < 1e-3, label

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_no_tokens(self, backend):
        nothing = operands(0, inner=128), torch.zeros(0, 3, dtype=torch.int32), torch.ones(0, H)
        y, *gradients = run(om.moe_mlp, *nothing, recipe="fp8_full", backend=backend)
        assert y.shape == (0, H) and not any(gradient.any() for gradient in gradients)

    @pytest.mark.parametrize("magnitude", [1e-5, 1e4])
    def test_any_magnitude(self, magnitude):
        """Outputs of 1e-10: an absolute tolerance would pass anything (sonic-moe#63)."""
        (x, *rest), indices, dy = self.case("fp8")
        tensors = [x * magnitude, *rest]
        truth = run(moe_mlp_reference, tensors, indices, dy, recipe="fp8", dtype=torch.float64)
        for label, a, b in zip(OUTPUTS, run(om.moe_mlp, tensors, indices, dy, recipe="fp8"), truth, strict=True):
            assert cosine_difference(a, b) < 1e-3, label


def quantized(tensors, storage):
    make = {
        "fp32": om.quantize_fp8_block,
        "bf16": lambda w: om.quantize_fp8_block(w, scale="bf16"),
        "ue8m0": lambda w: om.quantize_fp8_block(w, scale="ue8m0"),
        "channel": om.quantize_fp8_channel,
    }[storage]
    return [make(w) for w in tensors[2:]]


class TestPairs:
    """(q, scale) as weights. The reference gets the dequantized weights as its operands, in float64."""

    @pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])
    @pytest.mark.parametrize("storage", ["fp32", "bf16", "ue8m0", "channel"])
    def test_weight_only(self, storage, backend):
        """bf16: activations are not quantized, so the only rounding is to the dtype of x."""
        where = device_of(backend)
        tensors = operands(inner=36, dtype=torch.bfloat16)
        x, weights, *_ = tensors
        pairs, indices, dy = quantized(tensors, storage), choose("uniform", T, E, TOP_K), torch.randn(T, H).bfloat16()
        stars = [om.dequantize_fp8(*pair, dtype=torch.float64) for pair in pairs]
        truth = run(moe_mlp_reference, [x.double(), weights.double(), *stars], indices, dy)
        x, weights, pairs = x.to(where), weights.to(where), [(q.to(where), scale.to(where)) for q, scale in pairs]
        for q, _ in pairs:
            q.requires_grad_().grad_dtype = torch.float32
        x.requires_grad_(), weights.requires_grad_()
        y = om.moe_mlp(x, indices.to(where), weights, *pairs, backend=backend)
        y.backward(dy.to(where))
        mine = [t.cpu() for t in (y, x.grad, weights.grad, pairs[0][0].grad, pairs[1][0].grad)]
        assert [g.dtype for g in mine[2:]] == [torch.float32] * 3
        for label, a, b in zip(OUTPUTS, mine, truth, strict=True):
            assert_close(label, a, b, TOLERANCE[torch.bfloat16])

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        ("recipe", "storage"),
        [("fp8", "fp32"), ("fp8", "bf16"), ("fp8_full", "bf16"), ("fp8_full", "ue8m0"), ("fp8_channel", "channel")],
    )
    def test_equal_their_master(self, recipe, storage, backend):
        """What a recipe makes of a master is its pair: the same bits, and the same gradients."""
        tensors = operands(inner=128, dtype=torch.bfloat16)
        x, weights, *_ = tensors
        indices, dy = choose("uniform", T, E, TOP_K), torch.randn(T, H)
        scale = "fp32" if storage == "channel" else storage  # rows have BF16 scales whatever is asked
        options = {"recipe": recipe, "backend": backend}
        expected = run(om.moe_mlp, tensors, indices, dy, scale=scale, **options)
        pairs = quantized(tensors, storage)
        for q, _ in pairs:
            q.requires_grad_().grad_dtype = torch.bfloat16
        x.requires_grad_(), weights.requires_grad_()
        y = om.moe_mlp(x, indices, weights, *pairs, **options)
        y.backward(dy.to(y.dtype))
        for label, a, b in zip(
            OUTPUTS, (y.detach(), x.grad, weights.grad, pairs[0][0].grad, pairs[1][0].grad), expected, strict=True
        ):
            assert_same_bits(label, a, b)

    def test_that_are_frozen_get_no_gradient(self):
        tensors = operands()
        x = tensors[0].requires_grad_()
        pairs = quantized(tensors, "fp32")
        om.moe_mlp(x, choose("uniform", T, E, TOP_K), tensors[1], *pairs).sum().backward()
        assert x.grad.any() and pairs[0][0].grad is None

    @pytest.mark.parametrize(
        ("change", "error", "says"),
        [
            ({"recipe": "fp8_channel"}, ValueError, r"gate_up_proj: expected its scale in shape \[7, 48, 1\] for re"),
            ({"down_proj": (torch.ones(E, H, I).to(torch.float8_e4m3fn), torch.ones(E, H, 2))}, ValueError,
             r"down_proj: expected its scale in shape \[7, 1, 1\] or \[7, 40, 1\] for recipe 'bf16' and q"),
            ({"down_proj": (torch.ones(E, H, I), torch.ones(E, H, 1))}, TypeError, "down_proj: expected q of a pair"),
            ({"down_proj": (torch.ones(E, H, I),)}, TypeError, r"down_proj: expected a tensor or a pair \(q, scale\)"),
            ({"down_proj": (torch.ones(E, H, I).to(torch.float8_e4m3fn), torch.ones(E, H, 1).half())}, TypeError,
             "down_proj: expected its scale in float32, bfloat16 or float8_e8m0fnu, got torch.float16"),
            ({"down_proj": torch.ones(E, H, I).to(torch.float8_e4m3fn)}, TypeError, r"down_proj: .* or a pair \("),
            ({"recipe": "fp8_channel", "gate_up_proj": (torch.ones(E, 2 * I, H).to(torch.float8_e4m3fn),
                                                        torch.ones(E, 2 * I, 1).to(torch.float8_e8m0fnu))}, TypeError,
             "gate_up_proj: expected its scale of rows in float32 or bfloat16, got torch.float8_e8m0fnu"),
        ],
        ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
    )  # fmt: skip
    def test_refusals(self, change, error, says):
        x, weights, *_ = tensors = operands()
        gate_up_proj, down_proj = quantized(tensors, "fp32")
        arguments = {"x": x, "weights": weights, "gate_up_proj": gate_up_proj, "down_proj": down_proj}
        with pytest.raises(error, match=says):
            om.moe_mlp(indices=choose("uniform", T, E, TOP_K), **arguments | change)

    def test_a_gradient_that_would_be_rounded_to_fp8_is_refused(self):
        x, weights, *_ = tensors = operands()
        pairs = quantized(tensors, "fp32")
        pairs[1][0].requires_grad_()
        with pytest.raises(ValueError, match=r"down_proj: .* set down_proj.grad_dtype = torch.float32"):
            om.moe_mlp(x, choose("uniform", T, E, TOP_K), weights, *pairs)


def test_a_bf16_parameter_can_have_an_fp32_gradient():
    """`grad_dtype`: what torch.mm gives in fp32 is not rounded to BF16 first."""
    x, weights, gate_up, down = operands(dtype=torch.bfloat16)
    down.requires_grad_().grad_dtype = torch.float32
    om.moe_mlp(x, choose("uniform", T, E, TOP_K), weights, gate_up, down).sum().backward()
    assert down.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["no-tokens", "only-sentinels"])
def test_no_rows_at_all(case, backend):
    tokens = 0 if case == "no-tokens" else 4
    indices = torch.full((tokens, TOP_K), E)
    y, *gradients = run(om.moe_mlp, operands(tokens), indices, torch.ones(tokens, H), backend=backend)
    assert y.shape == (tokens, H) and not y.any()
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert gradient is not None and not gradient.any(), name


@pytest.mark.parametrize("recipe", ["bf16", "fp8_channel"])
def test_sentinels_never_touch_the_numbers(recipe):
    """A sentinel slot may carry any weight, and NaN tokens must not leak through a zero weight."""
    x, weights, gate_up, down = operands()
    indices = choose("uniform", T, E, TOP_K)
    x[7] = torch.nan
    indices[7] = E
    weights[7] = torch.inf
    tensors = [x, weights, gate_up, down]
    y, dx, dweights, dgate_up, ddown = run(om.moe_mlp, tensors, indices, torch.ones(T, H), recipe=recipe)
    assert not y[7].any() and not dx[7].any() and not dweights[7].any()
    for tensor in (y, dx, dweights, dgate_up, ddown):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("hidden", [H, 128], ids=["padded", "whole"])  # of the rows that sums of the cpu backend have
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_y_is_no_view_and_can_be_changed_in_place(backend, dtype, hidden):
    """As model code does: `y += shared`, `y[mask] = 0`, through a view, in a hook; whatever the strides of x."""

    def change(y):
        y.mul_(2)
        y[0] = 0
        y.view(-1)[-3:].add_(1)
        return y

    tensors, indices, dy = operands(hidden=hidden, dtype=dtype), choose("uniform", T, E, TOP_K), torch.randn(T, hidden)
    tensors[0] = tensors[0].T.contiguous().T
    here = run(lambda *o: change(om.moe_mlp(*o, backend=backend)), tensors, indices, dy)
    apart = run(lambda *o: change(om.moe_mlp(*o, backend=backend).clone()), tensors, indices, dy)
    for label, a, b in zip(OUTPUTS, here, apart, strict=True):
        assert_same_bits(label, a, b)
    assert here[0].stride() == (hidden, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_torchs_defaults_change_nothing(recipe, backend):
    """`set_default_dtype` and `set_default_device` are for tensors made by the caller."""
    tensors, indices, dy = operands(inner=128), choose("uniform", T, E, TOP_K), torch.randn(T, H)
    expected = run(om.moe_mlp, tensors, indices, dy, recipe=recipe, backend=backend)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                got = run(om.moe_mlp, tensors, indices, dy, recipe=recipe, backend=backend)
        finally:
            torch.set_default_dtype(torch.float32)
        for label, a, b in zip(OUTPUTS, got, expected, strict=True):
            assert_same_bits(label, a, b)


@pytest.mark.parametrize("recipe", ["bf16", "fp8_channel"])
def test_repeats_bit_for_bit(recipe):
    tensors, indices, dy = operands(tokens=257), choose("skewed", 257, E, TOP_K), torch.randn(257, H)
    first, second = (run(om.moe_mlp, tensors, indices, dy, recipe=recipe) for _ in range(2))
    for label, a, b in zip(OUTPUTS, first, second, strict=True):
        assert_same_bits(label, a, b)


@pytest.mark.parametrize("recipe", ["bf16", "fp8_channel"])
def test_inference_equals_training_bit_for_bit(recipe):
    tensors, indices = operands(), choose("skewed", T, E, TOP_K)
    x, weights, gate_up, down = tensors
    with torch.no_grad():
        y = om.moe_mlp(x, indices, weights, gate_up, down, recipe=recipe)
    assert_same_bits("y", y, run(om.moe_mlp, tensors, indices, torch.ones(T, H), recipe=recipe)[0])
    with torch.inference_mode():
        assert_same_bits("y", om.moe_mlp(x, indices, weights, gate_up, down, recipe=recipe), y)


def saved_elements(trained):
    """Elements kept for backward that are no argument; and the arguments that are."""
    leaves = {n: t.requires_grad_(n in trained) for n, t in zip(NAMES, operands(), strict=True)}
    leaves["indices"] = choose("uniform", T, E, TOP_K)
    given = {t.data_ptr(): name for name, t in leaves.items()}
    kept, arguments = [], set()

    def pack(tensor):
        if tensor.data_ptr() in given:
            arguments.add(given[tensor.data_ptr()])
        elif tensor.numel():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        om.moe_mlp(**leaves)
    return sorted(kept), arguments


def test_memory_kept_for_backward():
    """Besides arguments: offsets, slot order [R], pre-activation [R, 2I]; no [R, H], no x if gate_up is frozen."""
    rows, given = T * TOP_K, {*NAMES, "indices"}
    assert saved_elements(NAMES) == ([E + 1, rows, rows * 2 * I], given)
    assert saved_elements(("x", "weights", "down_proj")) == ([E + 1, rows, rows * 2 * I], given - {"x"})


def test_token_does_not_depend_on_slot_order_of_others():
    """A permutation of the tokens permutes the output: nothing is mixed up between slots."""
    x, weights, gate_up, down = operands()
    indices, order = choose("skewed", T, E, TOP_K), torch.randperm(T)
    y = om.moe_mlp(x, indices, weights, gate_up, down)
    permuted = om.moe_mlp(x[order], indices[order], weights[order], gate_up, down)
    assert_close("y", permuted, y[order], 1e-6)


@pytest.mark.parametrize("recipe", ["bf16", "fp8_channel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands(backend, recipe):
    """Nothing is assumed contiguous: transposed parameters and an expanded dy give the same result."""
    tensors, indices = operands(), choose("uniform", T, E, TOP_K)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    dy, options = torch.ones(1, H).expand(T, H), {"backend": backend, "recipe": recipe}
    mine, expected = (run(om.moe_mlp, given, indices, dy, **options) for given in (strided, tensors))
    for label, a, b in zip(OUTPUTS, mine, expected, strict=True):
        assert_close(label, a, b, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_change_the_dtypes(backend):
    tensors, indices, dy = operands(), choose("uniform", T, E, TOP_K), torch.randn(T, H)
    plain = run(om.moe_mlp, tensors, indices, dy, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(om.moe_mlp, tensors, indices, dy, backend=backend)
    for label, a, b in zip(OUTPUTS, mine, plain, strict=True):
        assert_same_bits(label, a, b)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"backend": "cuda"}, ValueError, "backend: expected one of triton, cpu, reference, got 'cuda'"),
        ({"recipe": "fp8"}, ValueError, "recipe: 'fp8' needs an expert intermediate size in .* 128, .*I = 24"),
        ({"recipe": "int3"}, ValueError, "recipe: expected one of bf16, .*, got 'int3'"),
        ({"scale": "fp16"}, ValueError, "scale: expected 'fp32', 'bf16' or 'ue8m0', got 'fp16'"),
        ({"batch_invariant": True}, ValueError, "batch_invariant: the cpu backend cannot promise it"),
        ({"activation": "gelu"}, ValueError, "activation: expected 'silu'"),
        ({"x": torch.ones(2, 3, 4)}, ValueError, r"x: expected shape \[T, H\], got \[2, 3, 4\]"),
        ({"x": [1.0]}, TypeError, r"x: expected a tensor \[T, H\], got list"),
        ({"x": torch.ones(T, H + 1)}, ValueError, "gate_up_proj: expected .* H = 41"),
        ({"x": torch.ones(T, H).double(), "recipe": "fp8_channel"}, TypeError, "x: recipe 'fp8_channel' takes 16-"),
        ({"indices": torch.ones(T, TOP_K)}, TypeError, "indices: expected an integer tensor, got torch.float32"),
        ({"indices": torch.ones(T, 2, dtype=torch.int64)}, ValueError, "indices and weights: expected the same shape"),
        ({"weights": torch.ones(T, TOP_K, dtype=torch.int64)}, TypeError, "weights: expected a .* floating-point"),
        ({"down_proj": torch.ones(E, H, I + 1)}, ValueError, r"down_proj: expected \[E, H, I\] = \[7, 40, 24\]"),
        ({"down_proj": torch.ones(E, H, I).bfloat16()}, TypeError, "down_proj: expected the dtype of x"),
        ({"down_proj": torch.ones(E, H, I).double(), "recipe": "fp8_channel"}, TypeError, "down_proj: expected a 16-"),
        ({"gate_up_proj": torch.ones(E, 2 * I, H).to(torch.float8_e4m3fn)}, TypeError, "16-, 32- or 64-bit"),
        ({"gate_up_proj": torch.ones(E, 2 * I, H, device="meta")}, ValueError, "gate_up_proj: expected the device"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)  # fmt: skip
def test_refuses_in_one_sentence(change, error, says):
    arguments = dict(zip(NAMES, operands(), strict=True)) | {"indices": choose("uniform", T, E, TOP_K)} | change
    with pytest.raises(error, match=says):
        om.moe_mlp(**arguments)


def test_silu_is_torch_silu():
    """One expert, identity-like weights: y is silu(x) * x."""
    x = torch.linspace(-30, 30, 101).unsqueeze(1)
    ones = torch.ones(101, 1)
    y = om.moe_mlp(x, torch.zeros(101, 1, dtype=torch.int64), ones, torch.ones(1, 2, 1), torch.ones(1, 1, 1))
    assert_close("y", y, F.silu(x.double()) * x.double(), 1e-6)
