"""The routed-experts MLP on the CPU, all threads, against transformers' implementations on the same weights.

Forward without autograd; forward + backward with the gradients of x, weights, gate_up_proj and down_proj. Routing is
uniform and random, every token with `top_k` different experts. FP8 experts at one token, against what torch offers:
cast each active expert, scale it, torch.mm.

Peers: `grouped_mm` always, `eager` where its backward is not absurd (it adds a zero gradient of all experts for each
active one), `batched_mm` where the weights it gathers per token are not. Ours is never left out.
A step frees what it made, as a training step does. One longer than LONG_S is timed three times, after a warm one.

FLOP: 6 T top_k H I forward, three times that with backward. Bytes: the active experts' weights once, with backward
twice, and then the dense gradient of all experts. The note is the peak of the process's resident memory during one step
over its size before, with all memory that ours keeps for reuse given back first (Linux).

Every row is checked first, output and all gradients, against `backend="reference"` in FP32, one expert at a time, so
that the truth for 256 experts needs the memory of one.
"""

import gc
import time
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

import ornith_moe as om
from ornith_moe.backend.cpu import BACKEND
from ornith_moe.backend.cpu.memory import release
from ornith_moe.bench.numeric import TOLERANCE, assert_close
from ornith_moe.bench.shapes import TOKENS, experts_of
from ornith_moe.fp8_weights import unchanged
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import recipe_of

EXPERTS = {"nano": experts_of("nano"), "35b/8": experts_of("ornith-35b/8"), "35b": experts_of("ornith-35b")}
SLOW_EXPERTS = ("35b",)
LONG_S = 0.3
# Added after three BF16 rows of grouped_mm and eager missed our 1e-2 on dweights at T = 1 (1.2e-2 and 1.5e-2). The
# likely cause is that they round y before they weight it; it was not traced. Ours is held to the table as it stands.
PEERS_ALLOWANCE = 3
LARGEST_GATHER_BYTES = 256 << 20  # batched_mm copies an expert per routed row
LARGEST_EAGER_BYTES = 64 << 20  # eager's backward fills a gradient of all experts per active expert
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

pytestmark = pytest.mark.benchmark(max_time=0.3)


class Case(NamedTuple):
    x: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    dy: torch.Tensor

    @property
    def leaves(self):
        return self.x, self.weights, self.gate_up_proj, self.down_proj


def normal(dtype, *size, std=1.0):
    return torch.randn(*size, dtype=dtype).mul_(std)


@lru_cache(maxsize=1)  # up to 3 GB
def make_experts(shape, dtype):
    hidden, inner, experts, _ = EXPERTS[shape]
    gate_up_proj = normal(dtype, experts, 2 * inner, hidden, std=hidden**-0.5)
    return gate_up_proj.requires_grad_(), normal(dtype, experts, hidden, inner, std=inner**-0.5).requires_grad_()


@lru_cache(maxsize=1)  # the rows of a group follow one another and share one case
def make_case(shape, dtype, tokens):
    hidden, _, experts, top_k = EXPERTS[shape]
    x, dy = (normal(dtype, tokens, hidden) for _ in range(2))
    indices = torch.rand(tokens, experts).topk(top_k).indices
    weights = torch.rand(tokens, top_k).add_(0.1).to(dtype)
    return Case(x.requires_grad_(), indices, weights.requires_grad_(), *make_experts(shape, dtype), dy)


def forward_of(implementation, case):
    """A function of no arguments that computes y."""
    if implementation == "ours":
        return lambda: om.moe_mlp(*case[:5], backend="cpu")
    experts, hidden, inner = case.down_proj.shape
    config = Qwen3_5MoeTextConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=inner)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3_5MoeExperts(config)
    del module.gate_up_proj, module.down_proj
    module.gate_up_proj, module.down_proj = case.gate_up_proj, case.down_proj  # the very same tensors
    return lambda: module(case.x, case.indices, case.weights)


def check(case, y, gradients, allowance):
    tolerance = TOLERANCE[case.x.dtype] * allowance
    total_y, total_dx, total_dweights = (torch.zeros(t.shape) for t in (case.x, case.x, case.weights))
    for e in range(case.down_proj.shape[0]):
        w13, w2 = case.gate_up_proj[e : e + 1], case.down_proj[e : e + 1]
        leaves = [t.detach().float().requires_grad_() for t in (case.x, case.weights, w13, w2)]
        only_e = torch.where(case.indices == e, 0, -1)
        y_e = om.moe_mlp(leaves[0], only_e, *leaves[1:], backend="reference")
        total_y += y_e.detach()
        if gradients:
            dx, dweights, dw13, dw2 = torch.autograd.grad(y_e, leaves, case.dy.float())
            total_dx += dx
            total_dweights += dweights
            assert_close(f"dgate_up[{e}]", gradients[2][e], dw13[0], tolerance)
            assert_close(f"ddown[{e}]", gradients[3][e], dw2[0], tolerance)
    assert_close("y", y, total_y, tolerance)
    if gradients:
        assert_close("dx", gradients[0], total_dx, tolerance)
        assert_close("dweights", gradients[1], total_dweights, tolerance)


def peak_memory(step):
    """How far the resident memory rises above what it is, in one step: "+... MiB"."""
    release()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
        before = resident("VmRSS")
    except OSError:
        before = None
    step()
    return "" if before is None else f"+{max(resident('VmHWM') - before, 0) >> 10} MiB"


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))  # KiB


def absurd(implementation, case, backward):
    weight_bytes = case.gate_up_proj.nbytes + case.down_proj.nbytes
    if implementation == "batched_mm":
        return backward or case.indices.numel() * weight_bytes // len(case.down_proj) > LARGEST_GATHER_BYTES
    return implementation == "eager" and backward and weight_bytes > LARGEST_EAGER_BYTES


@pytest.mark.parametrize("implementation", ["ours", "grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=pytest.mark.slow if s in SLOW_EXPERTS else ()) for s in EXPERTS]
)
def test_moe_mlp(measure, shape, dtype, tokens, backward, implementation):
    hidden, inner, _, top_k = EXPERTS[shape]
    flops = 6 * tokens * top_k * hidden * inner * (3 if backward else 1)
    case = make_case(shape, DTYPES[dtype], tokens)
    if absurd(implementation, case, backward):
        pytest.skip(f"{implementation}: out of proportion here, see the module")
    forward = forward_of(implementation, case)

    def step():
        with torch.set_grad_enabled(backward):
            y = forward()
            return y.detach(), torch.autograd.grad(y, case.leaves, case.dy) if backward else None

    peer = implementation != "ours"
    check(case, *step(), allowance=PEERS_ALLOWANCE if peer else 1)
    note = peak_memory(step)  # from here on memory is as steps leave it to one another
    began = time.perf_counter()
    step()
    rounds = 3 if time.perf_counter() - began > LONG_S else None
    weight_bytes = sum(t[0].nbytes for t in (case.gate_up_proj, case.down_proj)) * case.indices.unique().numel()
    nbytes = weight_bytes * (2 if backward else 1) + 2 * case.x.nbytes
    if backward:
        nbytes += case.gate_up_proj.nbytes + case.down_proj.nbytes
    group = f"moe_mlp {shape} {dtype}, T = {tokens}, {'forward + backward' if backward else 'forward'}"
    info = measure(
        group, implementation, lambda: step() and None, peer=peer, nbytes=nbytes, flops=flops, dtype=DTYPES[dtype],
        rounds=rounds,
    )  # fmt: skip
    info["note"] = note


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["compared at every call", "unchanged"])
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_fp8_masters(measure, tokens, implementation):
    """What it costs to compare BF16 masters with the digests of their FP8 copies; bytes are those of the masters."""
    hidden, inner, experts, top_k = EXPERTS["35b"]
    x, indices = normal(torch.bfloat16, tokens, hidden), torch.rand(tokens, experts).topk(top_k).indices
    weights, masters = torch.rand(tokens, top_k), [w.detach() for w in make_experts("35b", torch.bfloat16)]

    def step():
        return om.moe_mlp(x, indices, weights, *masters, recipe="fp8", backend="cpu")

    assert torch.equal(step(), om.moe_mlp(x, indices, weights, *map(om.quantize_fp8_block, masters), recipe="fp8"))
    promise = unchanged() if implementation == "unchanged" else nullcontext()
    nbytes = sum(w[0].nbytes for w in masters) * indices.unique().numel()
    flops, group = 6 * tokens * top_k * hidden * inner, f"moe_mlp 35b, BF16 masters in FP8, T = {tokens}, forward"
    with promise:
        step()
        peer = implementation != "unchanged"
        measure(group, implementation, step, peer=peer, nbytes=nbytes, flops=flops, dtype=torch.bfloat16)


@pytest.mark.parametrize("implementation", ["ours", "cast + mm"])
@pytest.mark.parametrize("recipe", ["block", "channel"])
def test_fp8_decode(measure, recipe, implementation):
    """One token, FP8 weights as a checkpoint holds them, BF16 activations, weight-only."""
    hidden, inner, experts, top_k = EXPERTS["35b/8"]._replace(top_k=8)
    x = normal(torch.bfloat16, 1, hidden)
    indices, weights = torch.rand(1, experts).topk(top_k).indices, torch.rand(1, top_k).add_(0.1)
    quantize = om.quantize_fp8_block if recipe == "block" else om.quantize_fp8_channel
    sides = [
        Operand(*quantize(normal(torch.bfloat16, experts, n, k, std=k**-0.5)))
        for n, k in ((2 * inner, hidden), (hidden, inner))
    ]

    def expert(side, e):
        q, scale = side.value[e].to(torch.bfloat16), side.scale[e].to(torch.bfloat16)
        if recipe == "channel":
            return q * scale
        blocks = q.view(scale.shape[0], 128, scale.shape[1], 128) * scale[:, None, :, None]
        return blocks.view(q.shape)

    def cast_and_mm():
        y = torch.zeros(1, hidden)
        for k, e in enumerate(indices[0].tolist()):
            gate, up = torch.mm(x, expert(sides[0], e).T).chunk(2, -1)
            y += weights[0, k] * torch.mm(torch.nn.functional.silu(gate) * up, expert(sides[1], e).T)
        return y.bfloat16()

    def step():
        if implementation != "ours":
            return cast_and_mm()
        return BACKEND.moe_forward(x, indices, weights, *sides, recipe=recipe_of("bf16"))[0]

    wide = [side.dequantized(torch.float32) for side in sides]
    expected = om.moe_mlp(x.float(), indices, weights, *wide, backend="reference")
    peer = implementation != "ours"
    assert_close("y", step(), expected, TOLERANCE[torch.bfloat16] * (PEERS_ALLOWANCE if peer else 1))
    nbytes = top_k * sum(side.value[0].nbytes + side.scale[0].nbytes for side in sides)
    group = f"FP8 {recipe} experts, 35b sizes, T = 1, forward"
    measure(group, implementation, step, peer=peer, nbytes=nbytes, flops=6 * top_k * hidden * inner)
