"""kernels/examine/compile.py: what is read out of machine code, on listings written by hand; failing compilers.

The rules on occupancy are those of the vendors' manuals, worked by hand. That the reports of our kernels are as they
should be is tests/kernels/examine/test_catalog.py.
"""

import dataclasses
import inspect

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import machine_code
from triton import language

from ornith_moe.kernels import combine, mainloop, plan
from ornith_moe.kernels.examine import catalog
from ornith_moe.kernels.examine.compile import (
    Report,
    _Workers,
    compile_launches,
    compile_requests,
    hot_loop,
    parse_amdgcn,
    parse_sass,
    specialize,
    unbroken_k,
)
from ornith_moe.kernels.launch import recording
from ornith_moe.quant.recipes import RECIPES

SASS = """
.L_x_0:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   IADD R1, R1, 0x1 ;
.L_x_2:
        /*0020*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR32], RZ ;
        /*0030*/                   IADD R2, R2, 0x1 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   FFMA R3, R24, R4, R3 ;
        /*0060*/              @!P0 BRA `(.L_x_2) ;
        /*0070*/                   STG.E [R4], R3 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3) ;
"""
AMD = """
	s_mov_b32 s0, 0
.LBB0_1:
\tv_add_u32 v0, v0, v1
.LBB0_2:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\tds_read_b128 v[0:3], v4
\ts_cbranch_scc1 .LBB0_2
\ts_branch .LBB0_1
"""


def launches(arch, tokens=64):
    with recording(arch) as started:
        indices = torch.empty(tokens, 2, dtype=torch.int32, device="meta")
        routing = plan.build_plan(indices, 8, 64)
        rows = torch.empty(tokens * 2, 256, dtype=torch.bfloat16, device="meta")
        combine.combine(rows, routing, None, torch.empty(tokens, 256, dtype=torch.bfloat16, device="meta"))
    return started


def test_the_hot_loop_is_the_innermost_with_matrix_instructions():
    code = list(parse_sass(SASS.splitlines()))
    assert len(code) == 11 and code[6].target == ".L_x_2" and not code[9].falls_through
    loop = hot_loop(code, "QGMMA", r"WARPGROUP\.DEPBAR")
    assert (loop.instructions, loop.matrix) == (5, 1)
    assert loop.exposed == 3  # the wait itself, FFMA and BRA; IADD runs behind the product


def test_amd_assembly():
    code = list(parse_amdgcn(AMD.splitlines()))
    loop = hot_loop(code, "v_mfma", "v_mfma")
    assert (loop.instructions, loop.matrix, loop.exposed) == (3, 1, 0)


def test_code_without_a_matrix_loop_has_none():
    assert hot_loop(list(parse_sass(SASS.splitlines())), "HGMMA", "x") is None


DOT = "tt.dot {} : tensor<64x128xf8E4M3FN, #a> * tensor<128x32xf8E4M3FN, #b> -> tensor<64x32xf32, #mma> loc(#loc1)"
WGMMA = "ttng.warp_group_dot {} : !ttg.memdesc<64x128xf8E4M3FN, #a> * !ttg.memdesc<128x32xf8E4M3FN, #b> -> tensor<>"
MMA = "ttng.tc_gen5_mma {} {{is_async}} : !ttg.memdesc<64x128xf8E4M3FN, #a>, !ttg.memdesc<128x32xf8E4M3FN, #b>"
SCALED = "tt.dot_scaled {} lhs = e4m3 rhs = e4m3 : tensor<64x128xf8E4M3FN, #a>, tensor<64x4xi8> * tensor<128x32> -> t"


@pytest.mark.parametrize(
    ("products", "k"),
    [
        ([], 0),
        ([f"%x = {DOT.format('%a, %b, %cst')}"], 128),
        ([f"%x = {DOT.format('%a, %b, %acc')}"], None),  # what `acc += dot(a, b)` is folded into
        ([f"%x = {DOT.format('%a, %b, %acc, inputPrecision = ieee')}"], None),
        ([f"%x = {DOT.format('%a, %b, %cst')}", f"%y = {DOT.format('%c, %d, %x')}"], 256),  # split along K
        ([f"%x = {DOT.format('%a, %b, %cst')}", f"%y = {DOT.format('%c, %d, %cst')}"], 128),
        ([f"%x = {DOT.format('%a, %b, %cst')}", "%x = math.fma %x, %s, %t", f"%y = {DOT.format('%c, %d, %x')}"], None),
        ([f"%x = {WGMMA.format('%a, %b, %cst {isAsync = true, maxNumImpreciseAcc = 1073741824 : i32}')}"], 128),
        ([f"%x = {WGMMA.format('%a, %b, %acc, %false {isAsync = true}')}"], 128),
        ([f"%x = {WGMMA.format('%a, %b, %acc, %going {isAsync = true}')}"], None),
        ([MMA.format("%a, %b, %acc[%token], %false, %true, %bar[%true]")], 128),
        ([MMA.format("%a, %b, %acc[], %true, %true, %bar[%true]")], None),
        ([f"%x = {SCALED.format('%a scale %s, %b scale %t, %cst')}"], 128),
        ([f"%x = {SCALED.format('%a scale %s, %b scale %t, %acc')}"], None),
        (["%r:2 = scf.for %k = %c0 to %n step %c1 iter_args(%cst = %z) {", f"%x = {DOT.format('%a, %b, %cst')}"], None),
    ],
)
def test_how_much_of_k_the_matrix_unit_sums(products, k):
    """Lines as Triton 3.9 prints them."""
    constants = [
        "%cst = arith.constant dense<0.000000e+00> : tensor<64x32xf32, #mma>",
        "%acc = arith.constant dense<1.000000e+00> : tensor<64x32xf32, #mma>",
        "%false = arith.constant false",
        "%true = arith.constant true",
    ]
    assert unbroken_k("\n".join(f"    {line}" for line in constants + products)) == k


def report(arch, **fields):
    defaults = dict(
        warps=8, registers=64, spills=0, shared_bytes=0, matrix_instructions={}, unbroken_k=0, tma=False,
        tensor_columns=0, instructions=0, loop=None, asm="",
    )  # fmt: skip
    return Report(arch, **(defaults | fields))


@pytest.mark.parametrize(
    ("fields", "programs"),
    [
        ({"registers": 255}, 1),  # 2 warps a scheduler * 32 lanes * 256 = all of its 16384
        ({"registers": 128}, 2),
        ({"registers": 129}, 1),  # allocated in eights: 136
        ({"registers": 32}, 8),  # 64 warps
        ({"warps": 4, "registers": 16}, 16),
        ({"warps": 1, "registers": 16}, 16),  # a program of one warp sits on one scheduler, which has 16 places
        ({"shared_bytes": 100 << 10}, 2),
        ({"shared_bytes": 114 << 10}, 1),  # 1 KiB of each is the system's
        ({"shared_bytes": 228 << 10}, 0),
    ],
)
def test_programs_that_fit_on_an_sm(fields, programs):
    assert report("sm90", **fields).programs == programs


def test_tensor_memory_and_lds_limit_too():
    assert report("sm100", tensor_columns=256).programs == 2
    assert report("gfx942", shared_bytes=33 << 10).programs == 1
    assert report("gfx950", shared_bytes=33 << 10).programs == 4


def test_launches_that_specialize_alike_are_one_request():
    first, again = (specialize("sm90", launches("sm90")[-1]) for _ in range(2))
    other = specialize("sm90", launches("sm90", tokens=63)[-1])  # 63 is not divisible by 16
    assert first.key == again.key != other.key


@pytest.mark.parametrize("arch", ["sm90", "gfx942"])
def test_a_kernel_that_does_not_compile_is_named(arch):
    broken = launches(arch)[-1]
    broken = dataclasses.replace(broken, arguments=broken.arguments | {"BLOCK_W": 24})
    with pytest.raises(RuntimeError, match=rf"combine\.combine_kernel for {arch} .*does not compile"):
        compile_launches([(arch, broken)])


@pytest.mark.parametrize("arch", ["sm90", "gfx950"])
def test_what_is_remembered_is_what_the_compilers_say(arch):
    """machine_code.json, by which other tests look at kernels that have not changed."""
    recorded = catalog.record(arch, catalog.Pass("35B", 64, "forward", RECIPES["fp8"]))
    request = specialize(arch, next(launch for launch in recorded if launch.label == "down fp8"))
    if machine_code.key(request) not in machine_code.remembered():
        pytest.skip("not the recorded kernel, Triton or Python; of a kernel, tests/record_machine_code.py records it")
    (report,) = compile_requests([request])
    row = machine_code.row_of(request, report)
    assert row == machine_code.remembered()[machine_code.key(request)]


def test_another_source_is_another_kernel(monkeypatch):
    """Of the kernel, of what it calls through other files, and of the constants that those read."""
    request = specialize("sm90", catalog.record("sm90", catalog.Pass("35B", 64, "forward", RECIPES["fp8"]))[-2])
    assert request.kernel == "project_kernel"
    keys, source = {machine_code.key(request)}, inspect.getsource
    for name in ("project_kernel", "multiply", "narrow", "bits_of"):
        with monkeypatch.context() as patch:
            patch.setattr(inspect, "getsource", lambda f, name=name: source(f) + " " * (f.__name__ == name))
            machine_code.sources.cache_clear()
            keys.add(machine_code.key(request))
    with monkeypatch.context() as patch:
        patch.setattr(mainloop, "_FP8_BLOCK", language.constexpr(64))
        machine_code.sources.cache_clear()
        keys.add(machine_code.key(request))
    machine_code.sources.cache_clear()
    assert len(keys) == 6 and machine_code.key(request) in keys


def test_compilers_stay_for_the_next_call():
    pairs = [("sm90", launches("sm90")[-1])]
    first = compile_launches(pairs, workers=1)
    waiting = {process.pid for process in _Workers.waiting}
    assert compile_launches(pairs, workers=1) == first
    assert waiting and {process.pid for process in _Workers.waiting} == waiting
