"""Which backend and recipe runs where, and the sentences that say why not. GPUs other than this machine's are described
by a fake of what torch says about them. Not covered: whether a backend computes what it claims (test_functional.py)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ornith_moe as om
from ornith_moe.backend import choice as backend
from ornith_moe.backend.cpu import probe
from ornith_moe.command.doctor import as_lines, examine

FP8 = ("fp8", "fp8_full", "fp8_channel")


@pytest.fixture(autouse=True)
def nothing_remembered():
    backend._backends.cache_clear()
    yield
    backend._backends.cache_clear()


def gpu(monkeypatch, capability=None, arch=None):
    class Properties:
        gcnArchName = f"{arch}:sramecc+"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    monkeypatch.setattr(torch.version, "hip", "7.0" if arch else None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_backends_say_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    listed = om.backends()
    assert list(listed) == ["triton", "cpu", "reference"]
    for name in ("cpu", "reference"):
        assert listed[name].available and listed[name].recipes == ("bf16", *FP8)
    assert not listed["triton"].available and "no CUDA or ROCm device" in listed["triton"].reason
    assert listed["triton"].recipes == ()
    operands = torch.ones(1, 4), torch.zeros(1, 1).long(), torch.ones(1, 1), torch.ones(1, 4, 4), torch.ones(1, 4, 2)
    with pytest.raises(ValueError, match=r"backend: 'triton' is unavailable .*no CUDA or ROCm device"):
        om.moe_mlp(*operands, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert om.backends()["triton"].available and "interpreter" in om.backends()["triton"].reason


@pytest.mark.parametrize(
    ("capability", "arch", "why"),
    [
        ((8, 0), None, "FP8 needs compute capability 8.9 or more, this GPU has 8.0"),
        ((8, 9), None, None),
        ((9, 0), None, None),
        ((10, 0), None, None),
        (None, "gfx90a", "FP8 needs gfx942 or gfx950, this GPU is gfx90a"),
        (None, "gfx950", None),
    ],
    ids=str,
)
def test_which_gpu_computes_fp8(monkeypatch, capability, arch, why):
    gpu(monkeypatch, capability, arch)
    triton = om.backends()["triton"]
    assert triton.available and triton.refused == (dict.fromkeys(FP8, why) if why else {})
    device = torch.device("cuda")
    assert backend.choose_backend(None, device) == "triton"
    if why:
        with pytest.raises(ValueError, match=rf"recipe: 'triton' does not compute 'fp8' here: {why}; use 'bf16'"):
            backend.choose_backend(None, device, "fp8")
    else:
        assert backend.choose_backend(None, device, "fp8") == "triton"


def test_tensors_on_the_wrong_side(monkeypatch):
    gpu(monkeypatch, (9, 0))
    with pytest.raises(ValueError, match="'triton' takes tensors on the GPU, got tensors on the CPU"):
        backend.choose_backend("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="'cpu' takes tensors in main memory, got tensors on cuda:0"):
        backend.choose_backend("cpu", torch.device("cuda:0"))


def test_the_listing_cannot_be_changed_by_its_reader():
    om.backends().clear()
    assert list(om.backends()) == ["triton", "cpu", "reference"]


def test_only_doctor_measures_the_machine(monkeypatch):
    """Asking for a backend, in a config too, compiled and timed kernels: 47 s on a cold cache."""
    timed = []
    monkeypatch.setattr(probe, "bf16_rates", lambda: timed.append(1) or probe.Rates(1.0, 2.0, 3.0))
    assert om.backends()["cpu"].reason == "tensors in main memory; the default there"
    om.MoE(om.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, backend="cpu"))
    assert not timed
    found = examine()
    assert timed and "dot 1, widened 2, torch.mm 3" in found["measured just now"]["cpu"]


def test_a_config_names_a_backend_that_exists():
    with pytest.raises(ValueError, match="backend: expected one of triton, cpu, reference or None, got 'cuda'"):
        om.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, backend="cuda")


def test_doctor_fits_100_columns(monkeypatch):
    monkeypatch.setattr(probe, "bf16_rates", lambda: probe.Rates(1.0, 2.0, 3.0))
    lines = as_lines(examine())
    assert max(map(len, lines)) <= 100 and "builds" in lines
    text = " ".join(line.strip() for line in lines)
    assert all(name in text for name in ("fp8-block, ", "gguf:Q4_K_M, ", "gguf:MXFP4_MOE"))
    assert max(map(len, as_lines(examine(), 60))) <= 60


def test_doctor_lists_every_recipe_of_every_backend(monkeypatch):
    monkeypatch.setattr(probe, "bf16_rates", lambda: probe.Rates(1.0, 2.0, 3.0))
    gpu(monkeypatch, (8, 0))
    told = examine()["MoE recipes"]
    assert list(told) == ["bf16", *FP8]
    assert told["bf16"] == "triton (default on the GPU), cpu (default in main memory), reference"
    assert told["fp8"] == (
        "cpu (default in main memory), reference; "
        "not triton: FP8 needs compute capability 8.9 or more, this GPU has 8.0"
    )


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "fp8_full", "fp8_channel"])
@pytest.mark.parametrize("backend", [None, "cpu", "reference", "triton"])
def test_meta_tensors_need_no_device(backend, recipe):
    """Shapes, dtypes and products of a step, as `accelerate estimate-memory` and planners ask for them."""
    tokens, experts, hidden, inner, top_k = 5, 4, 40, 128, 2
    with torch.device("meta"):
        x, logits = torch.randn(tokens, hidden, dtype=torch.bfloat16), torch.randn(tokens, experts)
        sides = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    leaves = [x, logits, *(w.to(x.dtype) for w in sides)]
    for leaf in leaves:
        leaf.requires_grad_()
    om.moe_mlp  # noqa: B018  a counter knows the formulas that were there when it was made
    with FlopCounterMode(display=False) as counter:
        routing = om.route(leaves[1], top_k, losses=True, backend=backend)
        y = om.moe_mlp(x, routing.indices, routing.weights, *leaves[2:], recipe=recipe, backend=backend)
        (y.sum() + routing.load_balancing_loss).backward()
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")
    assert all(leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype for leaf in leaves)
    assert counter.get_total_flops() == 18 * tokens * top_k * hidden * inner
