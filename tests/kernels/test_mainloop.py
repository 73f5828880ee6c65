"""What a tile, a layout or an address width must not change: the bits of kernels/mainloop.py and grouped_wgrad.py.

One reference run with a plain tile, then every option of the tile tables on the same operands. The reference
run itself is compared with float64 in tests/kernels/test_moe.py. In the interpreter equal bits show one arithmetic and
an equal order over K; that a GPU's matrix unit keeps its order for every tile is what the `gpu` run of this file shows.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from launches import watch
from moe_cases import DEVICE, OUTPUTS, Layer, exact_products
from numeric import assert_same_bits

from ornith_moe.kernels import arithmetic, grouped_wgrad, launch, mainloop, moe
from ornith_moe.kernels.tiles import PRODUCTS, Tile, Tiles, tiles_for
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import RECIPES

pytestmark = pytest.mark.device
PLAIN = Tile(block_n=128, num_warps=4, num_stages=2)
VARIANTS = {  # by hidden and inner size: several columns of tiles, and steps of K, of gate_up and dswiglu; of pairs
    (256, 256): {
        "swap": (32, {"swap": True}),
        "16 rows, swap": (16, {"swap": True}),
        "128 rows": (128, {"num_warps": 8}),
        "halves of 64 rows": (64, {"block_m": 32}),
        "late": (32, {"late": True}),
    },
    (512, 128): {
        "pair": (32, {"pair": True}),
        "pair, late, swap": (64, {"pair": True, "late": True, "swap": True}),
    },
}


def run(layer, recipe, block_m=32, tile=PLAIN, sums=True):
    """y, the gradients, and the rows whose products the gradients of the weights are; not these without `sums`."""
    options = {"recipe": RECIPES[recipe], "tiles": Tiles(block_m, dict.fromkeys(PRODUCTS, tile))}
    operands = layer.operands(recipe)
    y, saved = moe.moe_forward(layer.x, layer.indices, layer.weights, *operands, save=True, **options)
    found, wgrad = {}, moe.wgrad

    def watched(product, g, x, *arguments, **more):
        found.update({f"g of {product}": g, f"x of {product}": x})
        if sums:
            wgrad(product, g, x, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "wgrad", watched)
        every = dict(zip(OUTPUTS, (y, *moe.moe_backward(layer.dy, saved, *operands, **options)), strict=True))
    return found | (every if sums else {name: every[name] for name in OUTPUTS[:3]})


@pytest.mark.parametrize("recipe", ["bf16", "fp8_full", "fp8_channel"])
def test_a_tile_changes_no_bit(recipe, monkeypatch):
    """The tile of wgrad depends on `num_warps` alone: where it is the plain one's, its operands are compared."""
    exact_products(monkeypatch)
    for (hidden, inner), variants in VARIANTS.items():
        layer = Layer(24, hidden, inner, 3, 2, dtype=torch.bfloat16, kind="skewed")
        expected = run(layer, recipe)
        for variant, (block_m, options) in variants.items():
            sums = DEVICE == "cuda" or "num_warps" in options
            got = run(layer, recipe, block_m, dataclasses.replace(PLAIN, **options), sums)
            assert len(got) == (9 if sums else 7)
            for name in got:
                assert_same_bits(f"{name}, {variant}", got[name], expected[name])


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_descriptors_and_pointers_load_the_same(recipe, monkeypatch):
    layer = Layer(20, 256, 128, 3, 2, dtype=torch.bfloat16)
    sides = []
    side = mainloop._contiguous_side
    monkeypatch.setattr(mainloop, "_contiguous_side", lambda *a: sides.append(side(*a)) or sides[-1])
    expected = run(layer, recipe)
    assert set(sides) == {"k", "n"}  # forward reads rows of the weights, dgrad their columns
    monkeypatch.setattr(mainloop, "_contiguous_side", lambda *_: None)
    got = run(layer, recipe)
    for name in OUTPUTS:
        assert_same_bits(name, got[name], expected[name])


def test_64_bit_row_offsets(monkeypatch):
    """Operands of 2^31 elements and more take the wide path; here it is forced on small ones."""
    layer = Layer(20, 128, 128, 3, 2, dtype=torch.bfloat16)
    expected = run(layer, "bf16")
    seen = []

    def widen(started, start):
        values = started.values
        if "CUT" in values:
            seen.append(values["CUT"].wide)
            values["CUT"] = dataclasses.replace(values["CUT"], wide=True)
        elif "WIDE" in values:
            seen.append(values["WIDE"])
            values["WIDE"] = True
        start()

    watch(monkeypatch, widen)
    got = run(layer, "bf16")
    assert len(seen) == 6 and not any(seen)
    for name in OUTPUTS:
        assert_same_bits(name, got[name], expected[name])


def test_an_operand_of_2_to_the_31_is_wide():
    """Liger#1248: a row offset that overflows 32 bits. Recorded on meta tensors: nothing is allocated."""
    with launch.recording("sm90") as launches:
        x = torch.empty(1 << 20, 2048, dtype=torch.bfloat16, device="meta")
        gate_up = torch.empty(4, 512, 2048, dtype=torch.bfloat16, device="meta")
        down = torch.empty(4, 2048, 256, dtype=torch.bfloat16, device="meta")
        indices = torch.empty(1 << 20, 2, dtype=torch.int32, device="meta")
        weights = torch.empty(1 << 20, 2, device="meta")
        moe.moe_forward(x, indices, weights, Operand(gate_up), Operand(down))
    wide = {entry.label.split()[0]: entry.arguments["CUT"].wide for entry in launches if "CUT" in entry.arguments}
    assert wide == {"gate_up": True, "down": False}  # x has 2^31 elements, a' [2^21, 256] has 2^29


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_the_interpreter_multiplies_bf16_through_our_dot_only():
    """tl.dot on BF16 is garbage there; `arithmetic.dot` is what kernels use, and no kernel calls tl.dot."""
    import inspect

    import triton
    import triton.language as tl

    @triton.jit
    def both(a_ptr, b_ptr, raw_ptr, ours_ptr):
        offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
        tl.store(raw_ptr + offs, tl.dot(a, b))
        tl.store(ours_ptr + offs, arithmetic.dot(a, b))

    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    raw, ours = torch.empty(16, 16), torch.empty(16, 16)
    both[(1,)](a, b, raw, ours)
    expected = a.double() @ b.double()
    assert (ours.double() - expected).norm() < 1e-6 * expected.norm()
    assert not (raw.double() - expected).norm() < expected.norm()  # when this fails, the widening can go
    for module in (mainloop, grouped_wgrad):
        assert "tl.dot(" not in inspect.getsource(module)


def test_the_tables_answer_every_question():
    for arch in ("sm90", "sm100", "gfx942", "gfx950", "sm89", "sm80", "interpreter"):
        for operands in ("bf16", "fp8", "fp32"):
            for rows in (0.01, 1, 20, 250, 10**6):
                tiles = tiles_for(arch, operands, rows)
                assert tiles.block_m in (16, 32, 64, 128, 256)
                for product in PRODUCTS:
                    assert tiles[product].block_n in (64, 128, 256), (arch, operands, rows, product)
