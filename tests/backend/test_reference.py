"""The reference itself, against formulas written out token by token.

FP8 operands are quantized here by hand, value by value, from docs/numerics.md; gradients are the products of the
dequantized operands. Not covered: `ornith_moe.quant.fp8`, whose tests compare it bit for bit with other definitions.
"""

import pytest
import torch
from moe_cases import choose
from numeric import assert_close

from ornith_moe.backend.reference import moe_mlp_reference

E, H, I = 7, 40, 24


def test_bf16_is_the_formula():
    x, weights = torch.randn(5, H).double(), torch.rand(5, 3).double()
    gate_up, down = torch.randn(E, 2 * I, H).double() / 6, torch.randn(E, H, I).double() / 5
    indices = choose("sentinels", 7, E, 3)[2:]  # rows with ids 7, -1 and 16 among them
    expected = torch.zeros_like(x)
    for t in range(5):
        for k in range(3):
            e = indices[t, k].item()
            if 0 <= e < E:
                gate, up = gate_up[e, :I] @ x[t], gate_up[e, I:] @ x[t]
                expected[t] += weights[t, k] * (down[e] @ (gate * torch.sigmoid(gate) * up))
    assert_close("y", moe_mlp_reference(x, indices, weights, gate_up, down), expected, 1e-14)


def by_hand(values, columns, rows=1, scale_dtype=torch.float32):
    """Each block of `rows` by `columns`: s = amax / 448 rounded, q = e4m3(v / s), q * s in fp32; given in float64."""
    out = torch.empty(values.shape, dtype=torch.float64)
    for i in range(0, values.shape[0], rows):
        for j in range(0, values.shape[1], columns):
            block = values[i : i + rows, j : j + columns].float()
            s = (block.abs().max() / torch.tensor(448.0)).to(scale_dtype).float()
            out[i : i + rows, j : j + columns] = ((block / s).to(torch.float8_e4m3fn).float() * s).double()
    return out


@pytest.mark.parametrize("recipe", ["fp8", "fp8_full", "fp8_channel"])
def test_fp8_forward_and_every_gradient_by_hand(recipe):
    """One token and two experts in BF16: outer products, no sums over tokens."""
    hidden, inner = 200, 128
    x, dy = torch.randn(1, hidden).bfloat16(), torch.randn(1, hidden).bfloat16()
    weights = torch.tensor([[0.75, 0.25]])
    gate_up = torch.randn(2, 2 * inner, hidden) / hidden**0.5
    down = torch.randn(2, hidden, inner) / inner**0.5
    leaves = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
    y = moe_mlp_reference(leaves[0], torch.tensor([[1, 0]]), *leaves[1:], recipe=recipe, dtype=torch.float64)
    y.backward(dy.double())

    if recipe == "fp8_channel":
        rows_of = lambda w: by_hand(w.bfloat16(), w.shape[1], scale_dtype=torch.bfloat16)  # noqa: E731
        cast = lambda v: by_hand(v, v.shape[1])  # noqa: E731
    else:
        rows_of = lambda w: by_hand(w.bfloat16(), 128, 128)  # noqa: E731
        cast = lambda v: by_hand(v, 128)  # noqa: E731
    cast_gradient = cast if recipe == "fp8_full" else lambda v: v.double()

    expected = [torch.zeros(1, hidden).double() for _ in range(2)]
    xs, dys = cast(x), cast_gradient(dy)
    for k, e in enumerate((1, 0)):
        w13, w2, weight = rows_of(gate_up[e]), rows_of(down[e]), weights[0, k].double()
        gate, up = (xs @ w13.T).chunk(2, -1)
        sigmoid = gate.sigmoid()
        a = cast((gate * sigmoid * up).bfloat16())
        expected[0] += weight * (a @ w2.T)
        da = dys @ w2
        assert_close("dweights", leaves[1].grad[0, k], (da * a).sum(), 1e-6)
        assert_close("ddown", leaves[3].grad[e], dy.double().T @ (weight * a), 1e-6)
        dgate = weight * da * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        dpre = torch.cat((dgate, weight * da * gate * sigmoid), -1)
        assert_close("dgate_up", leaves[2].grad[e], dpre.T @ xs, 1e-6)
        expected[1] += (cast(dpre.bfloat16()) if recipe == "fp8_full" else dpre) @ w13
    assert_close("y", y, expected[0], 1e-6)
    assert_close("dx", leaves[0].grad, expected[1].bfloat16(), 1e-6)


def test_precision_follows_the_operands_or_the_request():
    x, weights = torch.randn(3, H), torch.rand(3, 2)
    operands = (x, torch.tensor([[0, 1]] * 3), weights, torch.randn(2, 2 * I, H), torch.randn(2, H, I))
    assert moe_mlp_reference(*operands).dtype == torch.float32
    doubles = [t.double() if t.is_floating_point() else t for t in operands]
    assert_close("y", moe_mlp_reference(*operands, dtype=torch.float64), moe_mlp_reference(*doubles), 1e-15)
