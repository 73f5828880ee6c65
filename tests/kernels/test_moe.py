"""kernels/moe.py, forward and backward, against float64 (tests/moe_cases.py).

Without a GPU this is Triton's interpreter. Fresh memory is NaN, so a value that no program wrote, or that a mask should
have dropped, cannot pass. Not covered: speed, and what a GPU's matrix unit makes of its order of summation.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from launches import watch
from moe_cases import DEVICE, OUTPUTS, Layer, exact_products
from numeric import TOLERANCE, assert_close, assert_same_bits, cosine_difference, sqnr_db

from ornith_moe.kernels import fp8_cast
from ornith_moe.kernels.dswiglu import dswiglu
from ornith_moe.kernels.gate_up import gate_up
from ornith_moe.kernels.moe import moe_backward, moe_forward, pass_tiles, strip_width
from ornith_moe.kernels.plan import build_plan
from ornith_moe.kernels.tiles import Tile
from ornith_moe.quant import fp8
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import GROUP, RECIPES
from ornith_moe.routing import fold_shared

pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]

SHAPES = [  # T, H, I, E, top_k: nothing divides, one token, top_k = E, and the block size exactly
    (37, 100, 36, 5, 2),
    (1, 64, 32, 4, 1),
    (63, 160, 96, 3, 3),
    (70, 256, 128, 7, 2),
]


def run(layer, recipe="bf16", scale="fp32", operands=None, batch_invariant=False, needs_grad=(True,) * 4):
    operands = operands or layer.operands(recipe, scale)
    tiles = pass_tiles(layer.x, operands[0], layer.indices.numel(), batch_invariant)
    options = {"recipe": RECIPES[recipe], "tiles": tiles}
    y, saved = moe_forward(layer.x, layer.indices, layer.weights, *operands, save=True, **options)
    gradients = moe_backward(layer.dy, saved, *operands, needs_grad=needs_grad, **options)
    return dict(zip(OUTPUTS, (y, *gradients), strict=True))


@pytest.mark.parametrize("kind", ["uniform", "skewed", "one", "sentinels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_within_1e_5_of_float64(shape, kind):
    layer = Layer(*shape, kind=kind)
    expected = layer.expected()
    for name, value in run(layer).items():
        assert_close(name, value, expected[name], TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands(dtype):
    layer = Layer(70, 192, 96, 5, 2, dtype=dtype, kind="skewed")
    expected = layer.expected()
    for name, value in run(layer).items():
        assert_close(name, value, expected[name], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
@pytest.mark.parametrize("recipe", ["fp8", "fp8_full", "fp8_channel"])
def test_fp8_against_dequantized_and_unquantized_operands(recipe, scale):
    if recipe == "fp8_channel" and scale == "ue8m0":
        pytest.skip("scales per row are fp32 or BF16")
    layer = Layer(66, 256, 128, 5, 2, dtype=torch.bfloat16, kind="skewed")
    expected, unquantized = layer.expected(recipe, scale), layer.expected()
    for name, value in run(layer, recipe, scale).items():
        assert cosine_difference(value, expected[name]) < 1e-3, name
        # Four casts of 31.5 dB each make 23.9 dB of y, whatever the arithmetic: docs/numerics.md
        assert sqnr_db(value, unquantized[name]) > 23, name


@pytest.mark.parametrize(("recipe", "inner"), [("fp8", 128), ("fp8_full", 128), ("fp8_channel", 72)])
def test_fp8_sizes_that_fill_no_block(recipe, inner):
    layer = Layer(20, 200, inner, 3, 2, dtype=torch.bfloat16)
    expected = layer.expected(recipe)
    for name, value in run(layer, recipe).items():
        assert cosine_difference(value, expected[name]) < 1e-3, name


def test_fp8_blocks_that_hold_gate_and_up_are_refused():
    layer = Layer(5, 128, 72, 3, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"I = 72.*fp8_channel"):
        run(layer, "fp8")


def test_bf16_backward_of_fp8_is_exact_on_the_dequantized_operands():
    """Given the forward's own pre-activation, only BF16 rounding separates the two: no gradient is quantized."""
    layer = Layer(66, 256, 128, 5, 2, dtype=torch.bfloat16)
    expected = layer.expected("fp8")
    got = run(layer, "fp8")
    for name in ("dx", "dgate_up"):
        assert_close(name, got[name], expected[name], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_backward_computes_the_activation_of_the_forward_again(scale):
    """With routing weights of 1, wa is a' as the forward quantized it."""
    layer = Layer(20, 128, 128, 3, 2, dtype=torch.bfloat16)
    gate_up_proj, down_proj = layer.operands("fp8", scale)
    plan, options = build_plan(layer.indices, 3, 32), {"ue8m0": scale == "ue8m0"}
    xq, x_scale = fp8_cast.quantize_fp8_tokens(layer.x, scale=scale)
    a, a_scale, pre = gate_up(
        xq, x_scale, gate_up_proj, plan, Tile(), save=True, quantize=True, dtype=torch.bfloat16, **options
    )
    ones = torch.ones(40, device=DEVICE)
    _, wa, *_ = dswiglu(
        layer.dy, None, down_proj.transposed, pre, ones, plan, Tile(), save_wa=True, quantize=GROUP, **options
    )
    assert_same_bits("a'", wa, fp8.dequantize_fp8(a, a_scale, block=(1, 128), dtype=torch.bfloat16))


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "fp8_full", "fp8_channel"])
def test_two_runs_give_the_same_bits(recipe):
    """What a GPU might add in another order; the interpreter has one, so there it only shows that no state is kept."""
    size = (40, 256, 128, 4, 2) if DEVICE == "cuda" else (12, 128, 128, 3, 2)
    layer = Layer(*size, dtype=torch.bfloat16, kind="skewed")
    for (name, first), second in zip(run(layer, recipe).items(), run(layer, recipe).values(), strict=True):
        assert_same_bits(name, first, second)


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "fp8_full", "fp8_channel"])
def test_a_token_does_not_see_the_batch(recipe, monkeypatch):
    """Batch-invariant mode: rows of y, dx and dweights keep their bits when tokens leave, join or change places."""
    exact_products(monkeypatch)
    layer = Layer(60, 256, 128, 4, 2, dtype=torch.bfloat16)
    rows = {"batch_invariant": True, "needs_grad": (True, True, False, False)}
    whole = run(layer, recipe, **rows)
    for keep in (torch.arange(7, 60, 3), torch.randperm(60), torch.tensor([11])):
        part = Layer(1, 1, 1, 1, 1)
        vars(part).update(vars(layer))
        for name in ("x", "indices", "weights", "dy"):
            setattr(part, name, getattr(layer, name)[keep.to(DEVICE)])
        got = run(part, recipe, **rows)
        for name in ("y", "dx", "dweights"):
            assert_same_bits(name, got[name], whole[name][keep.to(DEVICE)])


@pytest.mark.parametrize("magnitude", [1e-5, 1e4])
def test_error_does_not_depend_on_magnitude(magnitude):
    """sonic-moe#63: a tolerance for outputs of order one passed corruption of outputs of 1e-5."""
    layer = Layer(30, 96, 64, 4, 2, magnitude=magnitude)
    expected = layer.expected()
    for name, value in run(layer).items():
        assert_close(name, value, expected[name], TOLERANCE[torch.float32])


def test_nan_and_inf_stay_with_their_token_and_expert():
    layer = Layer(24, 128, 128, 4, 2, dtype=torch.bfloat16)
    layer.indices[:, :] = torch.tensor([0, 1], device=DEVICE)
    layer.indices[5] = torch.tensor([2, 3], device=DEVICE)
    layer.x[5, 3] = float("nan")
    layer.weights[7, 1] = float("inf")
    for recipe in ("bf16", "fp8", "fp8_channel"):
        got = run(layer, recipe)
        bad = torch.zeros(24, dtype=torch.bool, device=DEVICE)
        bad[[5, 7]] = True
        assert (got["y"].isfinite().all(1) == ~bad).all(), recipe
        assert got["dgate_up"][2:].isnan().any() and got["ddown"][0].isfinite().all()


def test_an_inf_in_an_idle_expert_reaches_nobody():
    layer = Layer(20, 128, 128, 4, 1, dtype=torch.bfloat16)
    layer.indices %= 2
    layer.gate_up[2], layer.down[2] = float("inf"), float("nan")
    got = run(layer)
    for name, value in got.items():
        assert value.isfinite().all(), name
    assert not got["dgate_up"][2:].any() and not got["ddown"][2:].any()


def test_no_tokens():
    layer = Layer(0, 64, 32, 3, 2)
    got = run(layer)
    assert got["y"].shape == (0, 64) and got["dx"].shape == (0, 64) and got["dweights"].shape == (0, 2)
    assert not got["dgate_up"].any() and not got["ddown"].any()


def test_only_sentinels():
    layer = Layer(9, 64, 32, 3, 2)
    layer.indices[:] = 7
    for name, value in run(layer).items():
        assert not value.any(), name


def test_ranks_of_an_expert_parallel_group_add_up():
    """A rank counts ids from its first expert; those of other ranks lie outside [0, 2)."""
    layer = Layer(33, 96, 64, 6, 3)
    expected = layer.expected()["y"]
    total = torch.zeros_like(layer.x)
    for first in (0, 2, 4):
        operands = [Operand(w[first : first + 2]) for w in (layer.gate_up, layer.down)]
        total += moe_forward(layer.x, layer.indices - first, layer.weights, *operands)[0]
    assert_close("sum over ranks", total, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "needs_grad", [(True, False, False, False), (False, True, False, False), (False, False, False, True)]
)
def test_a_subset_of_gradients_has_the_bits_of_all(needs_grad):
    layer = Layer(30, 96, 64, 4, 2)
    operands = layer.operands()
    _, saved = moe_forward(layer.x, layer.indices, layer.weights, *operands, save=True)
    everything = moe_backward(layer.dy, saved, *operands)
    subset = moe_backward(layer.dy, saved, *operands, needs_grad=needs_grad)
    for name, needed, full, part in zip(OUTPUTS[1:], needs_grad, everything, subset, strict=True):
        assert (part is not None) == needed, name
        if needed:
            assert_same_bits(name, part, full)


def test_fp8_wgrad_where_experts_have_many_rows(monkeypatch):
    monkeypatch.setattr("ornith_moe.kernels.moe.FP8_WGRAD_ROWS", 1)
    layer = Layer(150, 128, 128, 2, 1, dtype=torch.bfloat16)
    got, bf16 = run(layer, "fp8_full"), layer.expected("fp8_full")
    for name in ("dgate_up", "ddown"):
        assert cosine_difference(got[name], bf16[name]) < 2e-3, name
    monkeypatch.setattr("ornith_moe.kernels.moe.FP8_WGRAD_ROWS", 10**9)
    assert (got["ddown"] != run(layer, "fp8_full")["ddown"]).any()  # it was the other path


def test_a_shared_expert_rides_as_one_more_group():
    layer = Layer(25, 96, 64, 4, 2)
    shared_gate_up, shared_down, gate = torch.randn(128, 96) / 10, torch.randn(96, 64) / 8, torch.rand(25)
    shared_gate_up, shared_down, gate = (t.to(DEVICE) for t in (shared_gate_up, shared_down, gate))
    indices, weights = fold_shared(layer.indices, layer.weights, 4, gate)
    stacked = [torch.cat((a, b[None])) for a, b in ((layer.gate_up, shared_gate_up), (layer.down, shared_down))]
    y, _ = moe_forward(layer.x, indices, weights, *map(Operand, stacked))
    up = layer.x.double() @ shared_gate_up.double().T
    alone = (torch.nn.functional.silu(up[:, :64]) * up[:, 64:]) @ shared_down.double().T * gate.double()[:, None]
    assert_close("y", y, layer.expected()["y"] + alone, TOLERANCE[torch.float32])


@pytest.mark.parametrize("hidden", [1, 128, 200, 2048, 4096])
def test_a_strip_holds_half_of_the_columns(hidden):
    assert strip_width(hidden) % 128 == 0 and strip_width(hidden) <= max(-(-hidden // 256) * 128, 128)


def test_saved_is_x_the_pre_activation_and_indices():
    layer = Layer(64, 256, 128, 4, 2, dtype=torch.bfloat16)
    for recipe, extra in (("bf16", 0), ("fp8", 0), ("fp8_full", 0), ("fp8_channel", 4)):
        options = {"save": True, "recipe": RECIPES[recipe]}
        _, saved = moe_forward(layer.x, layer.indices, layer.weights, *layer.operands(recipe), **options)
        big = sum(t.nbytes for t in (saved.x, saved.pre))
        assert big == 64 * (256 * 2 + 2 * 2 * 128 * 2)
        maps = sum(v.nbytes for v in vars(saved.plan).values() if isinstance(v, torch.Tensor))
        assert maps < 64 * 2 * 8 + 4 * (3 * 4 + 2 * (64 * 2 // 16 + 4) + 8)
        assert (saved.a_scale.nbytes if saved.a_scale is not None else 0) == 64 * 2 * extra
        assert {f.name for f in dataclasses.fields(saved)} == {"x", "pre", "weights", "plan", "a_scale"}


def test_nothing_of_routed_rows_times_hidden_is_allocated(monkeypatch):
    """The largest tensor any launch touches besides the weights and their gradients is pre."""
    layer = Layer(96, 512, 32, 4, 2, dtype=torch.bfloat16)
    started = watch(monkeypatch)
    run(layer)
    pointers = [value for one in started for value in (one.reads | one.writes).values()]
    sizes = [t.numel() for t in pointers if isinstance(t, torch.Tensor)]
    assert sizes
    rows = 96 * 2
    assert not [s for s in sizes if s >= rows * 512 and s not in (layer.gate_up.numel(), layer.down.numel())]


def test_weights_stay_where_they_are():
    """Strided and transposed experts give the bits of contiguous ones."""
    layer = Layer(30, 128, 64, 4, 2)
    contiguous = run(layer)
    transposed = layer.gate_up.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(4, 128, 130, device=DEVICE)[:, :, :64].copy_(layer.down)
    got = run(layer, operands=(Operand(transposed), Operand(wide)))
    for name in OUTPUTS:
        assert_same_bits(name, got[name], contiguous[name])


def test_quantized_weights_of_the_training_cast_are_those_of_the_file():
    layer = Layer(1, 256, 128, 2, 1, dtype=torch.bfloat16)
    w, _ = layer.operands("fp8")
    q, s = fp8.quantize_fp8_block(layer.gate_up)
    assert_same_bits("codes", w.value.view(torch.uint8), q.view(torch.uint8))
    assert_same_bits("scales", w.scale, s)
