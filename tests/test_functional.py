"""`moe_mlp` on the cpu backend against the loop in `ornith_moe.reference`, run in float64.

The reference itself is compared with a formula written out token by token. Not covered: speed, and the accuracy of bf16
GEMMs on machines whose torch accumulates in bf16.
"""

import pytest
import torch
import torch.nn.functional as F
from numeric import TOLERANCE, assert_close, assert_same_bits

import ornith_moe as om
from ornith_moe.reference import moe_mlp_reference

T, E, H, I, TOP_K = 63, 7, 40, 24, 3
NAMES = ("x", "weights", "gate_up_proj", "down_proj")


def choose(kind, tokens, experts, top_k):
    """indices [tokens, top_k] of a routing of this kind."""
    if kind == "one-takes-all":  # every token's first slot
        others = torch.rand(tokens, experts - 1).argsort(-1)[:, : top_k - 1] + 1
        return torch.cat((torch.zeros(tokens, 1, dtype=torch.long), others), -1)
    preference = torch.rand(tokens, experts)
    if kind == "skewed":
        preference += torch.linspace(2, 0, experts)
    if kind == "empty":  # the first, the last and a middle expert get nothing
        preference[:, [0, experts // 2, experts - 1]] = -1
    indices = preference.topk(top_k).indices
    if kind == "sentinels":
        indices[::4, 0] = experts
        indices[5, 1], indices[6] = -1, experts + 9
    return indices


def operands(tokens=T, experts=E, hidden=H, inner=I, top_k=TOP_K, dtype=torch.float32):
    x = torch.randn(tokens, hidden)
    weights = torch.rand(tokens, top_k)
    gate_up_proj = torch.randn(experts, 2 * inner, hidden) / hidden**0.5
    down_proj = torch.randn(experts, hidden, inner) / inner**0.5
    return [x.to(dtype), weights, gate_up_proj.to(dtype), down_proj.to(dtype)]


def run(function, tensors, indices, dy, **options):
    """[y, gradients of x, weights, gate_up_proj, down_proj]."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    x, weights, gate_up_proj, down_proj = leaves
    y = function(x, indices, weights, gate_up_proj, down_proj, **options)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def check(tensors, indices, tolerance):
    dy = torch.randn(tensors[0].shape)
    truth = run(moe_mlp_reference, [t.double() for t in tensors], indices, dy.to(tensors[0].dtype))
    mine = run(om.moe_mlp, tensors, indices, dy, backend="cpu")
    for label, a, b in zip(("y", *("d" + n for n in NAMES)), mine, truth, strict=True):
        assert_close(label, a, b, tolerance)
    assert [a.dtype for a in mine[1:]] == [t.dtype for t in tensors]


def test_reference_is_the_formula():
    x, weights, gate_up, down = (t.double() for t in operands(tokens=5))
    indices = choose("sentinels", 7, E, TOP_K)[2:]  # rows with ids 7, -1 and 16 among them
    expected = torch.zeros_like(x)
    for t in range(5):
        for k in range(TOP_K):
            e = indices[t, k].item()
            if 0 <= e < E:
                gate, up = gate_up[e, :I] @ x[t], gate_up[e, I:] @ x[t]
                expected[t] += weights[t, k] * (down[e] @ (gate * torch.sigmoid(gate) * up))
    assert_close("y", moe_mlp_reference(x, indices, weights, gate_up, down), expected, 1e-14)


@pytest.mark.parametrize("kind", ["uniform", "skewed", "empty", "one-takes-all", "sentinels"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_all_outputs_match_float64(kind, dtype):
    check(operands(dtype=dtype), choose(kind, T, E, TOP_K), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 7, 3), (100, 7, 1), (63, 5, 5), (9, 1, 1), (3, 100, 2)], ids=str
)
def test_odd_sizes(tokens, experts, top_k):
    indices = torch.rand(tokens, experts).topk(top_k).indices.int()
    check(operands(tokens, experts, hidden=33, inner=17, top_k=top_k), indices, TOLERANCE[torch.float32])


def test_same_expert_twice_in_a_row_adds_twice():
    check(operands(), torch.randint(0, 2, (T, TOP_K)), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", ["no-tokens", "only-sentinels"])
def test_no_rows_at_all(case, backend):
    tokens = 0 if case == "no-tokens" else 4
    indices = torch.full((tokens, TOP_K), E)
    y, *gradients = run(om.moe_mlp, operands(tokens), indices, torch.ones(tokens, H), backend=backend)
    assert y.shape == (tokens, H) and not y.any()
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert gradient is not None and not gradient.any(), name


def test_sentinels_never_touch_the_numbers():
    """A sentinel slot may carry any weight, and NaN tokens must not leak through a zero weight."""
    x, weights, gate_up, down = operands()
    indices = choose("uniform", T, E, TOP_K)
    x[7] = torch.nan
    indices[7] = E
    weights[7] = torch.inf
    y, dx, dweights, dgate_up, ddown = run(om.moe_mlp, [x, weights, gate_up, down], indices, torch.ones(T, H))
    assert not y[7].any() and not dx[7].any() and not dweights[7].any()
    for tensor in (y, dx, dweights, dgate_up, ddown):
        assert tensor.isfinite().all()


def test_repeats_bit_for_bit():
    tensors, indices, dy = operands(tokens=257), choose("skewed", 257, E, TOP_K), torch.randn(257, H)
    first, second = (run(om.moe_mlp, tensors, indices, dy) for _ in range(2))
    for label, a, b in zip(("y", *NAMES), first, second, strict=True):
        assert_same_bits(label, a, b)


def test_inference_equals_training_bit_for_bit():
    tensors, indices = operands(), choose("skewed", T, E, TOP_K)
    x, weights, gate_up, down = tensors
    with torch.no_grad():
        y = om.moe_mlp(x, indices, weights, gate_up, down)
    assert_same_bits("y", y, run(om.moe_mlp, tensors, indices, torch.ones(T, H))[0])


@pytest.mark.parametrize("trained", [(n,) for n in NAMES] + [("x", "weights"), ("gate_up_proj", "down_proj")], ids=str)
def test_frozen_operands_get_no_gradient_and_change_none(trained):
    tensors, indices, dy = operands(), choose("uniform", T, E, TOP_K), torch.randn(T, H)
    everything = dict(zip(NAMES, run(om.moe_mlp, tensors, indices, dy)[1:], strict=True))
    leaves = {n: t.clone().requires_grad_(n in trained) for n, t in zip(NAMES, tensors, strict=True)}
    om.moe_mlp(indices=indices, **leaves).backward(dy)
    for name, leaf in leaves.items():
        if name in trained:
            assert_same_bits(name, leaf.grad, everything[name])
        else:
            assert leaf.grad is None, name


def saved_elements(trained):
    """Elements kept for backward that are neither a parameter nor an argument."""
    leaves = {n: t.requires_grad_(n in trained) for n, t in zip(NAMES, operands(), strict=True)}
    given = {t.data_ptr() for t in leaves.values()}
    kept, arguments = [], []

    def pack(tensor):
        (arguments if tensor.data_ptr() in given else kept).append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        om.moe_mlp(indices=choose("uniform", T, E, TOP_K), **leaves)
    names = {name for name, leaf in leaves.items() for t in arguments if t.data_ptr() == leaf.data_ptr()}
    return sorted(t.numel() for t in kept), names


def test_memory_kept_for_backward():
    """Besides arguments: the offsets [E + 1], the slot order [R] and the pre-activation
    [R, 2I]; no [R, H], no x if gate_up is frozen."""
    rows = T * TOP_K
    assert saved_elements(NAMES) == ([E + 1, rows, rows * 2 * I], set(NAMES))
    assert saved_elements(("x", "weights", "down_proj")) == ([E + 1, rows, rows * 2 * I], set(NAMES) - {"x"})


def test_token_does_not_depend_on_slot_order_of_others():
    """A permutation of the tokens permutes the output: nothing is mixed up between slots."""
    x, weights, gate_up, down = operands()
    indices, order = choose("skewed", T, E, TOP_K), torch.randperm(T)
    y = om.moe_mlp(x, indices, weights, gate_up, down)
    permuted = om.moe_mlp(x[order], indices[order], weights[order], gate_up, down)
    assert_close("y", permuted, y[order], 1e-6)


def test_strided_operands():
    """Nothing is assumed contiguous: transposed parameters and an expanded dy give the same result."""
    tensors, indices = operands(), choose("uniform", T, E, TOP_K)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    dy = torch.ones(1, H).expand(T, H)
    for label, a, b in zip(
        ("y", *NAMES), run(om.moe_mlp, strided, indices, dy), run(om.moe_mlp, tensors, indices, dy), strict=True
    ):
        assert_close(label, a, b, 1e-6)


def test_autocast_does_not_change_the_dtypes():
    tensors, indices = operands(), choose("uniform", T, E, TOP_K)
    x, weights, gate_up, down = tensors
    plain = om.moe_mlp(x, indices, weights, gate_up, down)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits("y", om.moe_mlp(x, indices, weights, gate_up, down), plain)


def test_refuses_a_second_derivative():
    """The backward is not differentiable; autograd says so instead of returning a wrong second derivative."""
    x, weights, gate_up, down = operands()
    x.requires_grad_()
    y = om.moe_mlp(x, choose("uniform", T, E, TOP_K), weights, gate_up, down)
    dy = torch.ones_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_backends_say_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    listed = om.backends()
    assert list(listed) == ["triton", "cpu", "reference"]
    assert listed["cpu"].available and listed["reference"].available
    assert not listed["triton"].available and "no CUDA or ROCm device" in listed["triton"].reason
    with pytest.raises(ValueError, match=r"backend: 'triton' is unavailable .*no CUDA or ROCm device"):
        om.moe_mlp(
            **dict(zip(NAMES, operands(), strict=True)), indices=choose("uniform", T, E, TOP_K), backend="triton"
        )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert om.backends()["triton"].available and "interpreter" in om.backends()["triton"].reason


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"backend": "cuda"}, ValueError, "backend: expected one of triton, cpu, reference, got 'cuda'"),
        ({"recipe": "fp8"}, ValueError, "recipe: 'fp8' runs on the triton backend only, not on"),
        ({"recipe": "int3"}, ValueError, "recipe: expected one of bf16, .*, got 'int3'"),
        ({"activation": "gelu"}, ValueError, "activation: expected 'silu'"),
        ({"x": torch.ones(2, 3, 4)}, ValueError, r"x: expected shape \[T, H\], got \[2, 3, 4\]"),
        ({"x": [1.0]}, TypeError, r"x: expected a tensor \[T, H\], got list"),
        ({"x": torch.ones(T, H + 1)}, ValueError, "gate_up_proj: expected .* H = 41"),
        ({"indices": torch.ones(T, TOP_K)}, TypeError, "indices: expected an integer tensor, got torch.float32"),
        ({"indices": torch.ones(T, 2, dtype=torch.int64)}, ValueError, "indices and weights: expected the same shape"),
        ({"weights": torch.ones(T, TOP_K, dtype=torch.int64)}, TypeError, "weights: expected a .* floating-point"),
        ({"down_proj": torch.ones(E, H, I + 1)}, ValueError, r"down_proj: expected \[E, H, I\] = \[7, 40, 24\]"),
        ({"down_proj": torch.ones(E, H, I).bfloat16()}, TypeError, "down_proj: expected the dtype of x"),
        ({"gate_up_proj": torch.ones(E, 2 * I, H).to(torch.float8_e4m3fn)}, TypeError, "16-, 32- or 64-bit"),
        ({"gate_up_proj": torch.ones(E, 2 * I, H, device="meta")}, ValueError, "gate_up_proj: expected the device"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
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
