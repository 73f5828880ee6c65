"""PEFT's adapters on the experts' fused parameters (`target_parameters`), under "ornith_fp8".

PEFT merges through `weight.data`, which no version shows. After each step of an adapter's life the output of the sparse
block is that of the same numbers in a block that was never called before, bit for bit. Not covered: other adapters.
"""

import copy

import hf_models
import pytest
import torch
from numeric import assert_same_bits

import ornith_moe.hf  # noqa: F401  registers "ornith_fp8"
from ornith_moe.fp8_weights import forget_quantized_weights

peft = pytest.importorskip("peft", reason="peft is not installed")

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapter():
    options = {"r": 2, "lora_alpha": 32, "target_modules": [], "lora_dropout": 0.0, "init_lora_weights": False}
    return peft.LoraConfig(target_parameters=TARGETS, **options)


def sparse_block(model):
    return next(module for module in model.modules() if type(module).__name__.endswith("SparseMoeBlock"))


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_the_life_of_two_adapters(how):
    made = hf_models.model("qwen3_moe", "ornith_fp8", hidden_size=128, moe_intermediate_size=128, num_hidden_layers=1)
    model = peft.get_peft_model(made, adapter())
    seen, x = {}, torch.randn(1, 9, 128)

    @torch.no_grad()
    def check(label, unlike=None):
        block = sparse_block(model)
        if how == "compiled":  # one compiler for all, whose graphs are guarded; a copy would be compiled anew
            got = torch.compile(block, backend="aot_eager")(x)
            forget_quantized_weights()
            expected = torch.compile(block, backend="aot_eager")(x)
        else:
            got, expected = block(x), copy.deepcopy(block)(x)
        assert_same_bits(label, got, expected)
        assert unlike is None or not torch.allclose(got, seen[unlike], atol=1e-3), f"{label} is {unlike}"
        seen[label] = got

    with model.disable_adapter():
        check("base")
    check("first", unlike="base")
    model.merge_adapter()
    check("first merged", unlike="base")
    model.unmerge_adapter()
    model.add_adapter("second", adapter())
    model.set_adapter("second")
    model.merge_adapter()
    check("second merged", unlike="first merged")
    model.unmerge_adapter()
    check("second", unlike="first")
    model.set_adapter("default")
    model = model.merge_and_unload()
    check("unloaded", unlike="second")
    weights = [p for name, p in model.named_parameters() if "experts" in name]
    averages = [p.data.lerp(p.data.flip(0), 0.1) for p in weights]
    assert len(weights) == 2
    for p in weights:
        p.data.add_(0.01)
    check("p.data.add_", unlike="unloaded")
    for p, average in zip(weights, averages, strict=True):
        p.data.copy_(average)
    check("average", unlike="p.data.add_")
    torch._dynamo.reset()
