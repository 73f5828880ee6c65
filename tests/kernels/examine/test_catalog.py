"""kernels/examine/catalog.py: each kernel of a training step at the 35B shape, compiled for five GPUs (sm89: FP8 ones).

What is asserted is what the compilers wrote: no register spilled, the matrix unit that the operands ask for, FP8 sums
that leave it every 128 of K, TMA where there is one, shared memory that fits. `ornith-moe kernels` shows the same rows
for more shapes. Not covered: what a GPU makes of it.
"""

import json
import os
import re
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import machine_code
from launches import watch
from moe_cases import Layer

from ornith_moe import cli
from ornith_moe.kernels import moe
from ornith_moe.kernels.examine import catalog
from ornith_moe.kernels.examine.compile import PROCESSORS, compile_launches
from ornith_moe.kernels.tiles import PRODUCTS, Tile, Tiles
from ornith_moe.quant.recipes import RECIPES

WAYS = ("forward", "backward")
PASSES = [catalog.Pass("35B", 8192, way, recipe) for recipe in RECIPES.values() for way in WAYS]
PASSES += [catalog.Pass("35B", 64, way, RECIPES[name]) for name in ("bf16", "fp8") for way in WAYS]
FP8_WGRAD = catalog.Pass("35B", moe.FP8_WGRAD_ROWS * 256 // 8, "backward", RECIPES["fp8_full"])
ON_SM89 = [catalog.Pass("35B", 8192, way, RECIPES["fp8_full"]) for way in WAYS]
ON_SM89.append(catalog.Pass("35B", 8192, "forward", RECIPES["fp8_channel"]))
SPILLS_DX = version("triton").startswith("3.7.")  # that of torch 2.13 for CUDA: 21 for blocks and 5 for channels
GEMMS = ("gate_up", "down", "dswiglu", "ddown", "dgate_up", "dx")
FP8_UNIT = {  # the CDNA3 unit multiplies another FP8, so Triton widens e4m3fn there
    "sm89": r"mma\.sync.*e4m3\.e4m3",
    "sm90": r"wgmma\.mma_async.*e4m3\.e4m3",
    "sm100": r"tcgen05\.mma.*f8f6f4",
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_f16",
    "gfx950": r"v_mfma_(scale_)?f32_\d+x\d+x\d+_(f8f6f4|fp8_fp8)",
}
BF16_UNIT = {
    "sm89": r"mma\.sync.*bf16\.bf16",
    "sm90": r"wgmma\.mma_async.*bf16\.bf16",
    "sm100": r"tcgen05\.mma.*f16",
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_bf16",
    "gfx950": r"v_mfma_f32_\d+x\d+x\d+_bf16",
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", PROCESSORS)
def test_every_kernel_of_a_step(arch, monkeypatch):
    monkeypatch.setattr(catalog, "compile_requests", machine_code.compile_requests)
    seen = set()
    passes = [*(ON_SM89 if arch == "sm89" else PASSES), FP8_WGRAD]
    for (_, which), launches in catalog.compiled([(arch, which) for which in passes]).items():
        for launch, report in launches:
            name = f"{launch.label}, {which.name}, T={which.tokens}"
            casts = arch == "sm100" and which == FP8_WGRAD and launch.label in ("ddown fp8", "dgate_up fp8")
            allowed = 24 if SPILLS_DX and arch == "sm100" and launch.label == "dx fp8 weights" else 16 if casts else 0
            assert report.spills <= allowed, f"{name}: {report.spills} spills"  # of 3,000 instructions
            assert report.programs >= 1, f"{name}: {report.shared_bytes} bytes of shared memory"
            product, _, operands = launch.label.partition(" ")
            if product not in GEMMS:
                assert not report.matrix_instructions, name
                continue
            seen.add((product, operands))
            unit = FP8_UNIT if operands == "fp8" else BF16_UNIT
            names = list(report.matrix_instructions)
            assert names and all(re.match(unit[arch], i) for i in names), f"{name}: {names}"
            assert report.loop and report.loop.matrix, f"{name}: no loop holds its matrix instructions"
            if operands == "fp8":  # Triton folds `acc += dot(a, b)` into the accumulator; 14 bits on sm89 and sm90
                assert report.unbroken_k and report.unbroken_k <= 128, f"{name}: K = {report.unbroken_k} in one sum"
            weights_by_tma = arch in ("sm90", "sm100") and product not in ("ddown", "dgate_up")
            assert report.tma == weights_by_tma, name
    assert {product for product, _ in seen} == set(GEMMS)
    of_dx = {operands for product, operands in seen if product == "dx"}
    assert of_dx == ({"fp8"} if arch == "sm89" else {"bf16", "fp8", "fp8 weights"})
    assert {product for product, operands in seen if operands == "fp8"} == set(GEMMS)


def test_a_tile_that_spills_is_seen():
    """What the test above looks for exists: the tile that the table avoids."""
    tiles = Tiles(128, dict.fromkeys(PRODUCTS, Tile(num_warps=8, num_stages=2, pair=True)))
    launches = catalog.record("sm90", catalog.Pass("35B", 8192, "forward", RECIPES["fp8"]), tiles)
    down = next(launch for launch in launches if launch.label == "down fp8")
    assert compile_launches([("sm90", down)])[0].spills > 0


def test_rows_and_layers_as_json(monkeypatch):
    """One pass of each direction; a row has the pinned keys, a layer adds its rows up."""
    pair = [catalog.Pass("35B", 64, way, RECIPES["bf16"]) for way in WAYS]
    monkeypatch.setattr(catalog, "passes", lambda: pair)
    done = []
    rows, layers = catalog.catalog(["gfx950"], lambda phase, n, of: done.append((phase, n, of)))
    assert done[-1][0] == "kernels" and done[-1][1] == done[-1][2]
    as_json = [catalog.row_json(row) for row in rows]
    pinned = {
        "kernel", "shape", "arch", "registers", "spills", "shared_bytes", "matrix_instructions", "tma", "occupancy",
        "hot_loop_instructions", "modelled_us", "bound", "bytes", "share_of_limit",
    }  # fmt: skip
    assert all(pinned <= row.keys() for row in as_json) and json.dumps(as_json)
    (layer,) = layers
    forward = sum(row["modelled_us"] for row in as_json if row["pass"] == "forward")
    assert catalog.layer_json(layer)["modelled_forward_us"] == pytest.approx(forward)
    assert layer.flops == 18 * 64 * 8 * 2048 * 512
    assert all(0 <= row["share_of_limit"] <= 1 for row in as_json)


@pytest.mark.parametrize(("option", "workers"), [((), os.cpu_count()), (("--workers", "5"), 5)])
def test_the_command_compiles_on_all_cores_or_as_many_as_asked(monkeypatch, capsys, option, workers):
    asked = []
    monkeypatch.setattr(catalog, "compile_requests", lambda every, *, workers, progress: asked.append(workers) or every)
    monkeypatch.setattr(catalog, "passes", lambda: [])
    cli.app(["kernels", "--arch", "sm90", *option, "--json"], standalone_mode=False)
    assert asked == [workers] and json.loads(capsys.readouterr().out) == {"rows": [], "layers": []}


def test_what_is_recorded_is_what_a_call_starts(monkeypatch):
    """Labels of a recorded pass are those of a real one, in the interpreter, on a layer of that kind."""
    layer = Layer(40, 256, 128, 4, 2, dtype=torch.bfloat16)
    operands = layer.operands("fp8")
    with monkeypatch.context() as patch:
        started = watch(patch)
        options = {"recipe": RECIPES["fp8"]}
        _, saved = moe.moe_forward(layer.x, layer.indices, layer.weights, *operands, save=True, **options)
        moe.moe_backward(layer.dy, saved, *operands, **options)
    started = [one.label for one in started if not one.label.startswith("plan")]
    recorded = [
        one.label
        for way in WAYS
        for one in catalog.record("sm90", catalog.Pass("35B", 64, way, RECIPES["fp8"]))
        if not one.label.startswith(("plan", "route"))
    ]
    assert started == recorded
    assert len(started) == 14  # cast, gate_up, 2 x (down, combine); dswiglu, ddown, cast, dgate_up, 2 x (dx, combine)
