"""kernels/fp8_cast.py against quant/fp8.py: the same bytes and the same scales, for every BF16 value.

Without a GPU the kernels run in Triton's interpreter, which shows the arithmetic as written, and are compiled for four
GPUs as the launchers start them, which shows IEEE division, kept denormals, wide stores and no spills. What a real GPU
then computes is covered only by running this file on one (the tests are the same there). Not covered: speed.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from machine_code import FORMS, compiled

from ornith_moe.kernels import fp8_cast
from ornith_moe.kernels.launch import recording
from ornith_moe.quant import fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CARRIER = {4: torch.int32, 2: torch.int16, 1: torch.uint8}

# Inf / Inf inside the interpreter's numpy, which is the NaN we want
pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]


def assert_same_bits(got, expected):
    for name, a, b in zip(("q", "scale", "q_t", "scale_t")[: len(expected)], got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous(), name
        a, b = (t.cpu().contiguous().view(CARRIER[t.element_size()]) for t in (a, b))
        at = (a != b).nonzero()
        assert not len(at), f"{name}: {len(at)} differ, first at {at[0].tolist()}: {a[*at[0]]} != {b[*at[0]]}"


def assert_same_values(got, expected):
    """As above, except that a NaN may have any sign and payload."""
    assert got.dtype == expected.dtype and torch.equal(got.isnan(), expected.isnan())
    assert_same_bits([torch.where(got.isnan(), 0, got)], [torch.where(expected.isnan(), 0, expected)])


def every_bf16_value():
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
def test_every_bf16_value_as_its_own_amax(kind):
    """One large tile with a scale per row; the launcher's tile size would make this 2048 programs."""
    x = every_bf16_value()[:, None]
    dtype, carrier, shift = fp8.SCALES[kind]
    q = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)
    s = torch.empty(x.shape, dtype=carrier, device=DEVICE)
    rows = 1024 if DEVICE == "cuda" else 65536
    args = (x.to(DEVICE), q, s, None, None, 65536, 1, 65536, 1, 1)
    fp8_cast.quantize_tile_kernel[(65536 // rows,)](*args, rows, 1, True, shift, False)
    expected = fp8.quantize_fp8_block(x, block=(1, 1), scale=kind)
    assert_same_bits((q.view(torch.float8_e4m3fn), s.view(dtype)), expected)


@pytest.mark.parametrize("amax", [448.0, 448.0 * 2**-126, 2.0**-130, 3e38])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "ue8m0"])
def test_every_bf16_value_below_an_amax(kind, amax):
    """At 448 the scale is 1 and the codes show the cast alone, at the others tiny and huge scales."""
    x = every_bf16_value()
    x = torch.where(x.float().abs() <= amax, x, amax).view(256, 256).to(DEVICE)
    assert_same_bits(
        fp8_cast.quantize_fp8_block_both(x, block=(256, 256), scale=kind),
        fp8.quantize_fp8_block_both(x, block=(256, 256), scale=kind),
    )
    if kind != "bf16":
        assert_same_bits(
            fp8_cast.quantize_fp8_tokens(x, group=256, scale=kind), fp8.quantize_fp8_tokens(x, group=256, scale=kind)
        )


@pytest.mark.parametrize("group", [256, None])
@pytest.mark.parametrize(
    "dtype,kind",
    [(torch.bfloat16, "fp32"), (torch.bfloat16, "ue8m0"), (torch.float32, "ue8m0"), (torch.float16, "fp32")],
)
def test_round_trip_of_every_bf16_value(dtype, kind, group):
    """Rows of 256 values of one sign and two exponents; the largest overflow their dtype, as torch has it."""
    x = every_bf16_value().view(256, 256).to(dtype).to(DEVICE)
    got = fp8_cast.roundtrip_fp8_tokens(x, group=group, scale=kind)
    assert_same_values(got, fp8.roundtrip_fp8_tokens(x, group=group, scale=kind))
    mixed = x.T.contiguous()  # columns: all signs and exponents, so all are tiny beside the largest, Inf or NaN
    mixed = torch.where(mixed.isfinite() & (mixed.abs() <= 448), mixed, 448)
    got = fp8_cast.roundtrip_fp8_tokens(mixed, group=group, scale=kind)
    assert_same_values(got, fp8.roundtrip_fp8_tokens(mixed, group=group, scale=kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (129, 257), (2, 130, 140)], ids=str)
def test_every_recipe_on_odd_shapes(shape, dtype):
    x = (torch.randn(shape) * torch.logspace(-6, 3, shape[-1])).to(dtype).to(DEVICE)
    x[..., :3] = 0
    x.view(-1)[-1] = -float("nan")
    for kind in fp8.SCALES:
        assert_same_bits(fp8_cast.quantize_fp8_block(x, scale=kind), fp8.quantize_fp8_block(x, scale=kind))
    assert_same_bits(fp8_cast.quantize_fp8_block_both(x), fp8.quantize_fp8_block_both(x))
    assert_same_bits(fp8_cast.quantize_fp8_channel(x, scale="bf16"), fp8.quantize_fp8_channel(x, scale="bf16"))
    for group, kind in [(128, "fp32"), (128, "ue8m0"), (32, "fp32"), (None, "fp32")]:
        expected = fp8.quantize_fp8_tokens(x, group=group, scale=kind)
        assert_same_bits(fp8_cast.quantize_fp8_tokens(x, group=group, scale=kind), expected)
    for group in (128, None):
        expected = fp8.roundtrip_fp8_tokens(x, group=group)
        assert_same_values(fp8_cast.roundtrip_fp8_tokens(x, group=group), expected)


@pytest.mark.parametrize("block", [(1, 8), (8, 1), (4, 16)], ids=str)
def test_both_of_a_block_that_is_not_square(block):
    w = torch.randn(2, 9, 20).bfloat16().to(DEVICE)
    expected = fp8.quantize_fp8_block_both(w, block=block)
    assert_same_bits(fp8_cast.quantize_fp8_block_both(w, block=block), expected)


def test_strided_operands_are_read_in_place():
    """The gate half of fused experts, a transposed weight, and tokens likewise."""
    w = torch.randn(3, 64, 96).bfloat16().to(DEVICE)
    for view in (w[:, :20], w.transpose(1, 2), w[1:, :, ::2]):
        assert_same_bits(fp8_cast.quantize_fp8_block(view), fp8.quantize_fp8_block(view))
        assert_same_bits(fp8_cast.quantize_fp8_block_both(view), fp8.quantize_fp8_block_both(view))
        assert_same_bits(fp8_cast.quantize_fp8_channel(view), fp8.quantize_fp8_channel(view))

    for view in (w[0, :, 8:40], w[1].T, w[:, 0, ::3]):
        assert_same_bits(fp8_cast.quantize_fp8_tokens(view), fp8.quantize_fp8_tokens(view))
        assert_same_values(fp8_cast.roundtrip_fp8_tokens(view), fp8.roundtrip_fp8_tokens(view))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 4)], ids=str)
def test_empty_input(shape):
    x = torch.empty(shape, device=DEVICE)
    for name in ("quantize_fp8_block", "quantize_fp8_block_both", "quantize_fp8_channel", "quantize_fp8_tokens"):
        assert_same_bits(getattr(fp8_cast, name)(x), getattr(fp8, name)(x))
    assert fp8_cast.roundtrip_fp8_tokens(x).shape == x.shape


def test_one_token_without_a_batch():
    x = torch.randn(300, device=DEVICE)
    assert_same_bits(fp8_cast.quantize_fp8_tokens(x), fp8.quantize_fp8_tokens(x))
    assert_same_values(fp8_cast.roundtrip_fp8_tokens(x), fp8.roundtrip_fp8_tokens(x))


def test_errors_name_the_argument():
    w = torch.randn(4, 4, device=DEVICE)
    with pytest.raises(TypeError, match=r"w: .*float64"):
        fp8_cast.quantize_fp8_block(w.double())
    with pytest.raises(ValueError, match=r"w: .*\[4\]"):
        fp8_cast.quantize_fp8_channel(w[0])
    with pytest.raises(ValueError, match=r"scale: .*'ue8m0'"):
        fp8_cast.quantize_fp8_channel(w, scale="ue8m0")
    with pytest.raises(ValueError, match=r"powers of two, got 96"):
        fp8_cast.quantize_fp8_tokens(w, group=96)
    with pytest.raises(ValueError, match=r"x: .*strides.*contiguous"):
        fp8_cast.quantize_fp8_tokens(torch.randn(4, 6, 8, device=DEVICE).transpose(0, 1))


KEPT = [
    ((128, 128), fp8_cast.quantize_fp8_block),
    ((128, 128), fp8_cast.quantize_fp8_block_both),
    ((1, None), fp8_cast.quantize_fp8_channel),
]


@pytest.mark.parametrize(("block", "make"), KEPT, ids=["block", "both", "row"])
def test_a_kept_copy_is_written_where_its_weight_changed(block, make):
    """Every tile of the active experts at first; then those of one element; last, of all experts."""

    def refresh():
        for t in copy:
            t.view(torch.uint8).fill_(0x55)  # what is not written stays so
        fp8_cast.quantize_fp8_experts(w, *(*copy, None, None)[:4], active, digests, block=block)
        return [t.view(torch.uint8).clone() for t in copy]

    w = torch.randn(2, 130 if block[1] else 12, 140, device=DEVICE).bfloat16()
    active = torch.tensor([False, True], device=DEVICE)
    copy, digests = make(w), fp8_cast.new_digests(w, block)
    for got, truth in zip(refresh(), make(w), strict=True):
        assert torch.equal(got[1], truth[1].view(torch.uint8)) and (got[0] == 0x55).all()
    w[:, -1, -1] += 1
    first = 128 if block[1] else 8  # row and, for blocks, column of the only tile that changed
    changed = (slice(first, None), slice(first if block[1] else 0, None))
    codes, truth = refresh()[0], make(w)[0].view(torch.uint8)
    assert torch.equal(codes[1][changed], truth[1][changed])
    codes[1][changed] = 0x55
    assert (codes == 0x55).all()
    active, w = None, 2 * w
    for got, truth in zip(refresh(), make(w), strict=True):
        assert torch.equal(got, truth.view(torch.uint8))


def test_a_digest_sees_every_bit_and_every_order():
    """One expert per change of the same tile: each bit that BF16 keeps, in all corners; rows and columns swapped."""
    tile = torch.randn(16, 32, device=DEVICE)
    changed = [tile, -tile, 2 * tile, tile.flip(0), tile.flip(1), tile.roll(1, 1), tile[[1, 0, *range(2, 16)]]]
    for bit in range(16, 32):
        changed.append(tile.clone())
        changed[-1].view(torch.int32)[(0, 15)[bit % 2], (0, 31)[bit // 2 % 2]] ^= 1 << bit if bit < 31 else -(1 << 31)
    w = torch.stack(changed)
    digests = fp8_cast.new_digests(w, (16, 32))
    copy = [t.to(DEVICE) for t in fp8.quantize_fp8_block(w.cpu(), block=(16, 32))]
    fp8_cast.quantize_fp8_experts(w, *copy, None, None, None, digests, block=(16, 32))
    assert len(set(digests.tolist())) == len(changed)


def launches(arch):
    """What the launchers start, by label, for a layer of the 35B shape and an fp32 master weight."""
    x = torch.empty(4096, 2048, dtype=torch.bfloat16, device="meta")
    w = torch.empty(256, 1024, 2048, dtype=torch.bfloat16, device="meta")
    with recording(arch) as started:
        fp8_cast.quantize_fp8_tokens(x)
        fp8_cast.quantize_fp8_tokens(x, scale="ue8m0")
        fp8_cast.quantize_fp8_block(w.float(), scale="ue8m0")
        fp8_cast.quantize_fp8_block_both(w)
        fp8_cast.quantize_fp8_channel(w)
        for block, make in KEPT:
            copy, digests = (*make(w), None, None)[:4], fp8_cast.new_digests(w, block)
            fp8_cast.quantize_fp8_experts(w, *copy, w[:, 0, 0] == 0, digests, block=block)
        fp8_cast.roundtrip_fp8_tokens(x)
        fp8_cast.roundtrip_fp8_tokens(x, group=None)
    return started


@pytest.mark.parametrize("target", FORMS)
def test_compiles_for_every_target(target):
    for each in compiled(target, launches):
        one, seen, name = each.launch, each.seen, each.launch.label
        assert each.report.spills == 0, name
        copies = 1 + (one.arguments.get("q_t_ptr") is not None)
        elements = one.arguments["BLOCK_N"] * one.arguments["BLOCK_K"] // (32 * one.options["num_warps"])
        if target.startswith("sm"):
            assert seen["divisions"] and not seen["inexact"], name
            stores = seen["stores of 16 bytes"]
            bytes_out = elements * copies * one.arguments["q_ptr"].element_size()
            assert stores * 16 == bytes_out, f"{name}: {stores} stores of 16 bytes for {bytes_out} bytes per thread"
            if "block" in name:  # one division per element and one for the scale: the copy costs none
                assert seen["divisions"] == elements + 1, name
        else:
            assert seen["divisions"] and seen["denormals"], f"{name}: division or denormals are not IEEE"
            assert seen["stores of 16 bytes"], f"{name}: codes are not stored 16 bytes at a time"
