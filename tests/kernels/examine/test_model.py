"""kernels/examine/model.py: its arithmetic by hand, and the whole against timings that others have published.

The published timings are those of vLLM 0.24 and SGLang 0.5.14 (Triton experts, balanced routing, one H100 SXM), as
ai-dynamo/aiconfigurator records them in moe_perf for H, I, E, top_k = 2048, 512, 256, 8 and 4096, 1024, 512, 10. Those
engines run the same two products with an activation kernel and a sum between and after; ours are compiled with the tile
that vLLM's table names and the rest is added as bytes. Not covered: what the model leaves out, see docs/performance.md.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from ornith_moe.kernels.examine import catalog
from ornith_moe.kernels.examine.compile import Loop, Report, compile_launches
from ornith_moe.kernels.examine.model import DEVICES, Cache, _shared_reads, bound_us, estimate, routing_counts, total
from ornith_moe.kernels.tiles import PRODUCTS, Tile, Tiles
from ornith_moe.quant.recipes import RECIPES

FEW = Tiles(32, dict.fromkeys(PRODUCTS, Tile(num_stages=3, swap=True)))
MANY = Tiles(128, dict.fromkeys(PRODUCTS, Tile(num_stages=4, pair=True)))  # vLLM's 128 x 256 x 64, 8 warps, 4 stages
MANY_FP8 = Tiles(64, dict.fromkeys(PRODUCTS, Tile(num_stages=2)))
PUBLISHED = [  # model, tokens, recipe, tiles, us of vLLM and SGLang
    ("35B", 64, "bf16", FEW, (557.2, 549.0)),
    ("35B", 512, "bf16", FEW, (596.9, 699.2)),
    ("35B", 8192, "bf16", MANY, (1221.5, 2055.1)),
    ("35B", 16384, "bf16", MANY, (2029.9, 3933.2)),
    ("397B", 8192, "bf16", MANY, (6683.0, 11541.1)),
    ("35B", 64, "fp8", FEW, (312.6, 301.5)),
    ("35B", 2048, "fp8", MANY_FP8, (469.9, 421.8)),
    ("35B", 8192, "fp8", MANY_FP8, (1253.4, 1073.2)),
    ("35B", 16384, "fp8", MANY_FP8, (2398.2, 1999.1)),
]
# How far below the best of the two the model may lie; it must not lie above by more than 10 %. BF16: measured -18 % to
# +6 %. FP8: -19 % to +1 %, because it sees no latency of the promotion of partial sums.
OPTIMISM = 0.25


def balanced(shape, tokens):
    each, rest = divmod(tokens * shape.top_k, shape.experts)
    return np.array([each + (e < rest) for e in range(shape.experts)])


@pytest.mark.slow
def test_published_timings():
    runs = []
    for model, tokens, recipe, tiles, published in PUBLISHED:
        launches = catalog.record("sm90", catalog.Pass(model, tokens, "forward", RECIPES[recipe]), tiles)
        runs.append((model, tokens, recipe, published, launches))
    reports = iter(compile_launches([("sm90", launch) for *_, launches in runs for launch in launches]))
    bandwidth = DEVICES["sm90"].hbm * DEVICES["sm90"].hbm_share
    for model, tokens, recipe, published, launches in runs:
        s = catalog.SHAPES[model]
        pairs = [(launch, next(reports)) for launch in launches]
        estimates = estimate("sm90", pairs, balanced(s, tokens))
        is_gemm = [launch.label.startswith(("gate_up", "down")) for launch in launches]
        gemms = total([e for e, gemm in zip(estimates, is_gemm, strict=True) if gemm])
        rows, size = tokens * s.top_k, 1 if recipe == "fp8" else 2
        moved = rows * s.inner * (4 + size) + (rows + tokens) * s.hidden * 2  # activation, sum
        moved += tokens * s.hidden * 3 * (recipe == "fp8")  # cast of x
        modelled = gemms.us + 1e6 * moved / bandwidth + 10  # and five launches of 2 us
        ratio = modelled / min(published)
        assert 1 - OPTIMISM < ratio < 1.1, f"{model} {recipe} T={tokens}: {modelled:.0f} us against {published}"


@pytest.mark.parametrize(
    ("model", "tokens", "fp8", "us"),
    [("35B", 1, True, 8), ("35B", 64, True, 211), ("35B", 8192, True, 481), ("35B", 32768, True, 1202),
     ("35B", 32768, False, 1668), ("397B", 8192, True, 2514), ("397B", 64, True, 1384)],
)  # fmt: skip
def test_bound_is_that_of_the_facts(model, tokens, fp8, us):
    """The table of least times, computed apart from this code."""
    assert bound_us(DEVICES["sm90"], catalog.SHAPES[model], tokens, fp8=fp8) == pytest.approx(us, rel=0.01, abs=0.5)


def test_routing_counts_are_a_routing():
    shape = catalog.SHAPES["35B"]
    for kind in ("uniform", "skewed"):
        counts = routing_counts(shape, 5000, kind)
        assert counts.sum() == 5000 * 8 and counts.max() <= 5000 and (counts == routing_counts(shape, 5000, kind)).all()
    assert routing_counts(shape, 5000, "skewed").max() > 2 * routing_counts(shape, 5000).max()


def test_cache_reads_what_it_holds_and_writes_what_it_evicts():
    cache = Cache(100)
    assert cache.write("a", 60) == 0 and cache.read("a", 60) == 0  # stays
    assert cache.read("b", 60) == 60 + 60  # b comes, a goes to memory
    assert cache.read("c", 101) == 101 and cache.write("d", 101) == 101  # larger than all of it
    assert cache.read("b", 60) == 0


def test_total_adds_up_and_keeps_the_larger_bound():
    launches = catalog.record("sm90", catalog.Pass("35B", 0, "weights", RECIPES["fp8_channel"]))[
        ::2
    ]  # without those of a check
    reports = compile_launches([("sm90", launch) for launch in launches])
    first, second = estimate("sm90", zip(launches, reports, strict=True), np.zeros(256, int))
    both = total([first, second])
    assert both.us == first.us + second.us and both.launches == 2 and both.bound == "memory"
    weights = 256 * 3 * 2048 * 512
    assert weights * 3 <= both.bytes <= weights * 3 + 2 * 256 * (2 * 512 + 2048)  # BF16 in, e4m3 out; scales stay in L2
    assert both.us > 1e6 * both.bytes / DEVICES["sm90"].hbm


def test_meta_tensors_allocate_nothing():
    launches = catalog.record("sm90", catalog.Pass("397B", 8192, "forward", RECIPES["fp8_full"]))
    tensors = [getattr(v, "base", v) for launch in launches for v in launch.arguments.values()]
    assert all(t.is_meta for t in tensors if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    ("operands", "matrix", "read"),
    [
        ("m64n64k32.f32.e4m3.e4m3 {%r1,%r2}, %rd46, %rd40, 0, 1, 1;", 8, 2 * 8 * (64 + 64) * 32),
        ("m64n256k32.f32.e4m3.e4m3 {%r1,%r2}, %rd46, %rd40, 0, 1, 1;", 4, 2 * 4 * (64 + 256) * 32),
        ("m64n64k32.f32.e4m3.e4m3 {%r1,%r2}, {%r3,%r4}, %rd40, 0, 1, 1;", 8, 2 * 8 * 64 * 32),  # a in registers
    ],
)
def test_products_read_shared_memory(operands, matrix, read):
    """Two warpgroups; a product reads its 64 rows of a and its columns of b."""
    asm = "ld.shared.b32 %r1, [%r2];\n" + f"wgmma.mma_async.sync.aligned.{operands}\n" * matrix
    report = Report("sm90", 8, 128, 0, 0, {}, 0, True, 0, 100, Loop(50, matrix, 10), asm)
    assert _shared_reads(report, 1) == read
    assert _shared_reads(report, 2) == 2 * read
