"""The largest tensor-parallel size against vLLM's own rule, written down a second time from its source.

Reference: `create_weights` and `weight_loader` of vLLM's linear layers in FP8 blocks, layer by layer as its model files
build them: quantization/utils/fp8_utils.py (`validate_fp8_block_shape`), layers/linear.py (`QKVParallelLinear`,
`adjust_block_scale_shard`), quantization/fp8.py (`Fp8MoEMethod`), models/qwen3_next.py, mamba/gdn/
qwen_gdn_linear_attn.py, models/gemma4.py. A layer whose parts are not whole blocks is let through there by
`allow_fp8_block_shape_mismatch` and then fails while it loads, so here every part must be whole. Not covered: vLLM run.
"""

import json
from importlib import resources

import pytest

from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.source.weights import open_source, source_from_config

BLOCK = 128


def divides(n, ranks):
    return n % ranks == 0


def kv_heads(total, ranks):
    """Heads of keys and values that a rank holds; 0 where vLLM asserts."""
    if total >= ranks:
        return total // ranks if divides(total, ranks) else 0
    return 1 if divides(ranks, total) else 0


def layers_of(text, attention, ranks):
    """{name: (rows per rank of each part, columns per rank)} of one layer, None where it cannot be cut."""
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    linear = attention == "linear_attention"
    found = {}
    if linear:
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        whole = divides(text["linear_num_key_heads"], ranks) and divides(text["linear_num_value_heads"], ranks)
        found["qkvz"] = ([n // ranks for n in (keys, keys, values, values)], hidden) if whole else None
        found["out_proj"] = ([hidden], values // ranks) if whole else None
    else:
        everywhere = attention == "full_attention" and "global_head_dim" in text
        size = text["global_head_dim"] if everywhere else text["head_dim"]
        total = text.get("num_global_key_value_heads") if everywhere else None
        kv = kv_heads(total or text["num_key_value_heads"], ranks)
        gate = 1 if "global_head_dim" in text else 2  # Qwen's q_proj holds an output gate too
        whole = divides(heads, ranks) and kv
        found["qkv"] = ([gate * heads // ranks * size, kv * size, kv * size], hidden) if whole else None
        found["o_proj"] = ([hidden], heads * size // ranks) if whole else None
    dense = not text.get("num_experts")
    for name in ("intermediate_size",) if dense else ("moe_intermediate_size", "shared_expert_intermediate_size"):
        inner = text[name]
        found[f"{name} gate_up"] = ([inner // ranks] * 2, hidden) if divides(inner, ranks) else None
        found[f"{name} down"] = ([hidden], inner // ranks) if divides(inner, ranks) else None
    return found


def loads(text, ranks):
    if ranks > (text.get("num_experts") or ranks):
        return False
    for attention in set(text["layer_types"]):
        one, cut = layers_of(text, attention, 1), layers_of(text, attention, ranks)
        for name, (parts, columns) in one.items():
            if cut[name] is None:
                return False
            quantized = all(n % BLOCK == 0 for n in (*parts, columns))  # what is not whole is kept in BF16
            if quantized and any(n % BLOCK for n in (*cut[name][0], cut[name][1])):
                return False
    return True


def largest(text):
    return max(ranks for ranks in (2**n for n in range(10)) if loads(text, ranks))


def config(**changes):
    preset = "ornith-1.0-35b" if "num_experts" in changes else "ornith-1.0-9b"
    found = json.loads(resources.files("ornith_moe.quant.source").joinpath(f"presets/{preset}.json").read_bytes())
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    found["text_config"] |= layers | changes
    found.pop("vision_config")
    return found


ROWS = [  # heads, KV heads, size, intermediate, key heads, value heads, size of both
    ((8, 2, 64, 1024, 8, 16, 128), 1),  # a rank of two gets 64 rows of K: half a block
    ((8, 4, 64, 1024, 8, 16, 128), 2),
    ((8, 2, 128, 1024, 8, 16, 128), 8),  # keys and values of a head are whole, and repeated
    ((16, 2, 256, 2048, 16, 32, 128), 16),
    ((16, 2, 256, 2048, 16, 32, 64), 8),  # keys of DeltaNet: 16 heads of 64 over 16 are half a block
    ((16, 2, 256, 1536, 16, 32, 128), 4),
    ((16, 2, 256, 1000, 16, 32, 128), 8),  # an MLP in BF16 only has to divide
    ((6, 3, 128, 768, 6, 12, 128), 1),  # three heads of keys cannot be cut in two, nor repeated evenly
    ((12, 6, 128, 1536, 4, 8, 128), 2),
    ((8, 1, 64, 1024, 8, 8, 128), 4),  # 64 rows of K stay BF16; o_proj has 512 columns
    ((4, 2, 256, 1024, 1, 4, 128), 1),
]


@pytest.mark.parametrize(("row", "ranks"), ROWS)
def test_dense_models(row, ranks):
    heads, kv, size, inner, keys, values, width = row
    found = config(
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=size, intermediate_size=inner, hidden_size=512,
        linear_num_key_heads=keys, linear_num_value_heads=values, linear_key_head_dim=width,
        linear_value_head_dim=width,
    )  # fmt: skip
    plan = plan_build(source_from_config(found, name="small"), "fp8-block")
    assert plan.max_tensor_parallel == largest(found["text_config"]) == ranks


@pytest.mark.parametrize(
    ("inner", "shared", "experts", "ranks"),
    [(512, 512, 8, 4), (512, 256, 8, 2), (256, 512, 8, 2), (1024, 1024, 4, 4), (2048, 2048, 64, 16), (320, 512, 8, 4)],
)
def test_mixtures(inner, shared, experts, ranks):
    changes = {"moe_intermediate_size": inner, "shared_expert_intermediate_size": shared, "num_experts": experts}
    found = config(**changes, hidden_size=512)
    plan = plan_build(source_from_config(found, name="small"), "fp8-block")
    assert plan.max_tensor_parallel == largest(found["text_config"]) == ranks


@pytest.mark.parametrize("name", ["ornith-1.0-9b", "ornith-1.0-35b", "gemma-4-31b"])
def test_presets(name):
    source = open_source(name)
    assert plan_build(source, "fp8-block").max_tensor_parallel == largest(source.config["text_config"])


def test_parts_that_are_not_whole_blocks_stay_with_their_group():
    """in_proj_qkv of one key head of 64 and one value head of 128 has 256 rows, but engines take 64 + 64 + 128."""
    changes = {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 64}
    source = source_from_config(config(**changes, linear_value_head_dim=128), name="small")
    dtypes = {tensor.name: tensor.dtype for tensor in plan_build(source, "fp8-block").tensors}
    assert {dtypes[name] for name in dtypes if "in_proj_qkv.weight" in name or "in_proj_z.weight" in name} == {"BF16"}
