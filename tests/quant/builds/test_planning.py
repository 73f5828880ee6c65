"""Plans against builds that exist: tensors, bytes and skip lists of the official repositories.

Reference: index totals, file sizes and quantization configs of the official Ornith-1.0 and Qwen3.5 repositories
(docs/formats.md says which figure comes from where). Rows marked as computed have no published figure and only guard
against change. Not covered: builds of architectures nobody published.
"""

import functools
import json
import math
import re
from importlib import resources
from types import SimpleNamespace

import pytest

from ornith_moe.quant.builds.build import find_build
from ornith_moe.quant.builds.fp8_channel import compressed_tensors_config
from ornith_moe.quant.builds.layout import shard_tensors
from ornith_moe.quant.builds.plan import plan_json
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.codecs.sizes import block_shape, row_bytes
from ornith_moe.quant.errors import CheckpointError, PlanError
from ornith_moe.quant.fallbacks import by_kind
from ornith_moe.quant.gguf.imatrix import Coverage
from ornith_moe.quant.gguf.mixtures import FILE_TYPES, tensor_types
from ornith_moe.quant.source.preset import preset_names
from ornith_moe.quant.source.weights import open_source, source_from_config

PUBLISHED = [  # tensors and payload bytes; a GGUF's payload is its file less the header
    ("ornith-1.0-35b", "fp8-channel", 62_546, 37_667_035_872),
    ("ornith-1.0-397b", "fp8-channel", 185_811, 405_108_696_032),
    ("ornith-1.0-35b", "gguf:BF16", 733, 69_365_647_872),
    ("ornith-1.0-35b", "gguf:Q8_0", 733, 36_892_150_272),
    ("ornith-1.0-35b", "gguf:Q6_K", 733, 28_503_163_392),
    ("ornith-1.0-35b", "gguf:Q5_K_M", 733, 24_718_141_952),
    ("ornith-1.0-35b", "gguf:Q4_K_M", 733, 21_155_768_832),
    ("qwen3.5-9b", "gguf:mmproj", 334, 921_684_928),
    ("qwen3.5-397b-a17b", "gguf:mmproj", 334, 921_684_928),
    ("qwen3.5-35b-a3b", "gguf:mmproj", 334, 902_802_368),
]
COMPUTED = [  # tensors of the first are published, its bytes are not
    ("qwen3.5-35b-a3b", "fp8-block", 64_196, 37_454_789_472),
    ("ornith-1.0-35b", "bf16", 31_666, 70_214_363_872),
    ("ornith-1.0-397b", "bf16", 93_411, 793_604_721_632),
    ("ornith-1.0-9b", "bf16", 760, 18_819_627_488),
    ("ornith-1.0-397b", "gguf:BF16", 1_098, 792_950_303_744),
    ("gemma-4-31b", "gguf:BF16", 833, 61_397_354_736),
    ("ornith-1.5-397b", "bf16", 94_964, 806_795_857_888),  # published as 806.8 GB
    ("ornith-1.5-397b", "fp8-channel", 187_364, 418_299_832_288),  # published as 418.4 GB with tokenizer and headers
    ("qwen3.6-27b", "bf16", 1_199, 55_562_855_904),
    ("qwen3.6-27b", "gguf:mmproj", 334, 931_126_208),
]
# Bytes of the official files of Ornith-1.5: what they have beyond our payload is their header.
ORNITH_15 = {
    ("ornith-1.5-9b", "gguf:Q8_0"): 9_786_060_384,
    ("ornith-1.5-9b", "gguf:Q6_K"): 7_558_901_696,
    ("ornith-1.5-9b", "gguf:Q5_K_M"): 6_642_544_576,
    ("ornith-1.5-9b", "gguf:Q4_K_M"): 5_780_090_816,
    ("ornith-1.5-35b-a3b", "gguf:BF16"): 71_066_994_240,
    ("ornith-1.5-35b-a3b", "gguf:Q8_0"): 37_802_149_280,
    ("ornith-1.5-35b-a3b", "gguf:Q6_K"): 29_208_731_392,
    ("ornith-1.5-35b-a3b", "gguf:Q5_K_M"): 25_347_532_544,
    ("ornith-1.5-35b-a3b", "gguf:Q4_K_M"): 21_713_463_040,
    ("ornith-1.5-397b", "gguf:Q4_K_M"): 244_309_803_808,
    ("ornith-1.5-9b", "gguf:mmproj"): 921_704_672,
    ("ornith-1.5-35b-a3b", "gguf:mmproj"): 902_822_240,
}
HEADERS = {  # least and most of the files of a size; vocabulary and merges are 10.9 MB of it
    "ornith-1.5-9b": (10_968_672, 10_969_024),
    "ornith-1.5-35b-a3b": (10_990_496, 10_990_848),
    "ornith-1.5-397b": (11_013_920, 11_013_920),
}
MMPROJ_HEADERS = (19_744, 19_872)
# File sizes as people report them, to three digits: payload plus a header of about 11 MB.
OFFICIAL_9B_GB = {"BF16": 17.9, "Q8_0": 9.53, "Q6_K": 7.36, "Q5_K_M": 6.47, "Q4_K_M": 5.63}
LINEAR_ATTENTION_KEPT = ("A_log", "conv1d", "dt_bias", "in_proj_ba", "in_proj_b", "in_proj_a", "norm")


@functools.cache
def preset(name):
    return open_source(name)


@functools.cache
def planned(name, build):
    """The plan of a preset: seconds for 185,000 tensors, and read by several tests."""
    return plan_build(preset(name), build)


@pytest.mark.parametrize(("name", "build", "tensors", "size"), PUBLISHED + COMPUTED)
def test_tensors_and_bytes(name, build, tensors, size):
    plan = planned(name, build)
    assert (len(plan.tensors), plan.tensor_bytes) == (tensors, size)
    assert len({tensor.name for tensor in plan.tensors}) == tensors
    assert plan.fallbacks == []


@pytest.mark.parametrize(("file_type", "gigabytes"), OFFICIAL_9B_GB.items())
def test_sizes_of_the_official_9b_files(file_type, gigabytes):
    plan = planned("ornith-1.0-9b", f"gguf:{file_type}")
    assert (plan.tensor_bytes + 11e6) / 1e9 == pytest.approx(gigabytes, rel=0.0015)


@pytest.mark.parametrize(("name", "build"), ORNITH_15)
def test_official_files_of_ornith_15_are_our_payload_and_a_header(name, build):
    low, high = MMPROJ_HEADERS if build == "gguf:mmproj" else HEADERS[name]
    header = ORNITH_15[name, build] - planned(name, build).tensor_bytes
    assert low <= header <= high and header % 32 == 0


def test_a_qwen_of_27_billion_has_the_size_of_the_published_q8():
    plan = plan_build(open_source("qwen3.6-27b", mtp="drop"), "gguf:Q8_0")
    assert (plan.tensor_bytes + 11e6) / 1e9 == pytest.approx(28.6, abs=0.05)
    assert sum(math.prod(tensor.shape) for tensor in plan.tensors) / 1e9 == pytest.approx(26.9, abs=0.05)


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("ornith-1.5", "did you mean ornith-1.5-35b-a3b or ornith-1.5-397b or ornith-1.5-9b"),
        ("Ornith-1.5-35B", "did you mean ornith-1.5-35b-a3b?"),
        ("qwen3.6", "did you mean qwen3.6-27b or qwen3.6-35b-a3b?"),
        ("qwen3.6-28b", "did you mean qwen3.6-27b"),
    ],
)
def test_an_unknown_preset_names_the_nearest(asked, nearest):
    with pytest.raises(CheckpointError, match=re.escape(nearest)):
        open_source(asked)


def test_ignore_list_is_the_official_ornith_one():
    config = planned("ornith-1.0-35b", "fp8-channel").config
    assert config["ignore"] == [
        "lm_head",
        "re:.*embed_tokens.*",
        "re:.*\\.mlp\\.gate$",
        "re:.*shared_expert_gate$",
        "re:.*linear_attn.*",
        "re:model\\.visual\\..*",
    ]
    assert config == compressed_tensors_config(config["ignore"])


def test_skip_list_covers_the_official_qwen_one():
    """Every module of the official list is in ours, and ours skips nothing that is quantized."""
    plan = planned("qwen3.5-35b-a3b", "fp8-block")
    skipped = set(plan.config["modules_to_not_convert"])
    layer = "model.language_model.layers.{}."
    official = {"lm_head", "model.embed_tokens", "visual", "model.visual", "mtp.fc", "mtp.norm"}
    official |= {"mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"}
    for index in range(40):
        names = ["input_layernorm", "post_attention_layernorm", "mlp.gate", "mlp.shared_expert_gate"]
        names += (
            ["self_attn.q_norm", "self_attn.k_norm"]
            if index % 4 == 3
            else [
                f"linear_attn.{n}"
                for n in ("A_log", "conv1d", "dt_bias", "in_proj_ba", "in_proj_b", "in_proj_a", "norm")
            ]
        )
        official |= {layer.format(index) + name for name in names}
    official |= {f"mtp.layers.0.{n}" for n in ("input_layernorm", "mlp.gate", "self_attn.q_norm")}
    for prefix in ("model.visual.", "visual."):
        official |= {prefix + n for n in ("patch_embed.proj", "pos_embed", "merger.linear_fc1", "merger.norm")}
    official |= {f"model.visual.blocks.26.{n}" for n in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")}
    assert official <= skipped
    quantized = {tensor.name.removesuffix(".weight") for tensor in plan.tensors if tensor.dtype == "F8_E4M3"}
    assert not quantized & skipped
    assert len(quantized) == 31_745


def test_mtp_of_a_config_alone():
    """A config announces MTP and cannot say whether it exists: known presets do, others ask."""
    path = resources.files("ornith_moe.quant.source").joinpath("presets/qwen3.5-35b-a3b.json")
    config = json.loads(path.read_bytes())
    known = source_from_config(config, name="qwen3.5-35b-a3b")
    unknown = source_from_config(config, name="mine")
    assert known.has_mtp and not unknown.has_mtp and "--mtp keep" in unknown.notes[0]
    assert source_from_config(config, name="mine", mtp="keep").weights == known.weights
    assert len(plan_build(known, "gguf:BF16").tensors) == 753


def test_channel_build_keeps_and_names_mtp():
    """vllm#41994: an ignore list that omits BF16 MTP experts crashes the loader."""
    plan = planned("qwen3.5-35b-a3b", "fp8-channel")
    assert plan.config["ignore"][-1] == r"re:^mtp\..*"
    assert all(tensor.dtype == "BF16" for tensor in plan.tensors if tensor.name.startswith("mtp."))


@pytest.mark.parametrize(
    ("name", "build", "ranks"),
    [
        ("ornith-1.0-35b", "fp8-block", 4),  # vLLM: width 512 over 8 ranks is half a block
        ("ornith-1.0-397b", "fp8-block", 8),
        ("ornith-1.0-35b", "fp8-channel", 16),
        ("ornith-1.0-35b", "gguf:Q8_0", None),
    ],
)
def test_max_tensor_parallel(name, build, ranks):
    assert planned(name, build).max_tensor_parallel == ranks


def small(**changes):
    config = json.loads(resources.files("ornith_moe.quant.source").joinpath("presets/ornith-1.0-9b.json").read_bytes())
    config["text_config"] |= {"num_hidden_layers": 4, "layer_types": None} | changes
    config.pop("vision_config")
    return source_from_config(config, name="small")


def test_partial_blocks_keep_their_fused_group():
    """A matrix that is not whole blocks stays BF16 with all it is fused with, is listed, and can be loaded."""
    plan = plan_build(small(intermediate_size=12288 + 64), "fp8-block")
    dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
    for layer in range(4):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = f"model.language_model.layers.{layer}.mlp.{name}"
            assert dtypes[f"{weight}.weight"] == "BF16" and weight in plan.config["modules_to_not_convert"]
    assert len(plan.fallbacks) == 12 and "12352x4096" in plan.fallbacks[0]
    # qkv has 2 * 16 * 18 + 4096 rows, which is no whole number of blocks; z has 4096 and must stay BF16 with it
    odd = plan_build(small(linear_key_head_dim=18), "fp8-block")
    dtypes = {tensor.name.split("layers.0.")[-1]: tensor.dtype for tensor in odd.tensors}
    assert dtypes["linear_attn.in_proj_z.weight"] == dtypes["linear_attn.in_proj_qkv.weight"] == "BF16"
    assert dtypes["linear_attn.out_proj.weight"] == "F8_E4M3"


def test_gguf_types_that_do_not_divide_give_way():
    shapes = [("blk.0.ffn_up.weight", (8, 512)), ("blk.0.ffn_gate.weight", (8, 288)), ("blk.0.ffn_up2.weight", (8, 48))]
    types, fallbacks = tensor_types(shapes, FILE_TYPES["Q4_K_M"], layers=1, experts=0)
    assert types == {
        "blk.0.ffn_up.weight": "Q4_K",
        "blk.0.ffn_gate.weight": "Q5_0",
        "blk.0.ffn_up2.weight": "F16",
    }
    assert len(fallbacks) == 2


def test_block_shapes():
    assert block_shape("Q4_K") == (256, 144) and row_bytes("Q8_0", 64) == 68
    with pytest.raises(ValueError, match="blocks of 32"):
        row_bytes("Q8_0", 33)
    with pytest.raises(ValueError, match="Q9_Z"):
        block_shape("Q9_Z")


def test_shards_hold_what_fits():
    plan = planned("ornith-1.0-35b", "fp8-channel")
    shards = shard_tensors(plan.tensors, 5_000_000_000)
    assert [i for shard in shards for i in shard] == list(range(len(plan.tensors)))
    sizes = [sum(plan.tensors[i].nbytes for i in shard) for shard in shards]
    assert max(sizes) <= 5_000_000_000 and len(shards) == 8
    assert len(shard_tensors(plan.tensors[:3], 1)) == 3


@pytest.mark.parametrize(
    ("build", "near"),
    [("fp8", "fp8-channel or fp8-block"), ("gguf:", None), ("gguf:Q4_K", "gguf:Q4_K_"), ("gguf:IQ9", None), ("", None),
     ("q4_k_m", "gguf:Q4_K_M"), ("fp8-blok", "fp8-block"), ("gguf:q4km", "gguf:Q4_K_M"), ("x" * 10_000, None)],
)  # fmt: skip
def test_unknown_builds_are_refused(build, near):
    with pytest.raises(PlanError, match="expected one of fp8-channel") as told:
        find_build(build)
    assert len(str(told.value)) < 1000 and (near is None or f"did you mean {near}" in str(told.value))


@pytest.mark.parametrize(
    ("name", "build"),
    [("gguf:q4_k_m", "gguf:Q4_K_M"), ("GGUF:Q4_K_M", "gguf:Q4_K_M"), ("fp8_block", "fp8-block"), ("BF16", "bf16"),
     ("gguf:q4-k-m", "gguf:Q4_K_M"), ("FP8-Channel", "fp8-channel")],
)  # fmt: skip
def test_names_are_forgiving(name, build):
    assert plan_build(small(), name).name == build


@pytest.mark.parametrize(
    ("build", "changes", "words"),
    [
        ("fp8-block", {"intermediate_size": 320, "hidden_size": 320}, ("bits per weight; fp8-channel", "100%")),
        ("gguf:Q4_K_M", {"intermediate_size": 320, "hidden_size": 320}, ("gguf:Q4_0, gguf:Q5_0 and gguf:Q8_0",)),
        ("gguf:Q4_K_M", {"intermediate_size": 440, "hidden_size": 328}, ("no quantized type of a GGUF fits",)),
    ],
)
def test_a_build_that_is_hardly_one_says_so_first(build, changes, words):
    """No row is whole blocks: nearly everything is stored in more bits than the name of the build says."""
    source = small(**changes, head_dim=40, linear_value_head_dim=40)
    plan = plan_build(source, build)
    assert plan.warning.startswith(f"{build}: is hardly one: ") and all(word in plan.warning for word in words)
    bits = 8 * plan.tensor_bytes / sum(math.prod(weight.shape) for weight in source.weights)
    assert f"{bits:.2f} bits per weight" in plan.warning == plan_json(plan, 1)["notes"][0]
    assert len(by_kind(plan.fallbacks)) < 12 < len(plan.fallbacks)
    assert not plan_build(small(), build).warning


def test_mtp_without_importance_gets_bits_that_need_none(tmp_path):
    """Importance is measured without MTP: its tensors become Q4_K, and nothing is left to ask for."""
    source = open_source("qwen3.5-9b")
    names = [f"blk.{layer}.{kind}" for layer in range(32) for kind in
             ("ffn_up", "ffn_gate", "ffn_down", "attn_q", "attn_k", "attn_output", "attn_gate", "ssm_out")]  # fmt: skip
    shapes = {place.name: place.shape for w in source.weights for place in source.architecture.gguf_places(w)}
    shapes = {name: shapes[name] for name in map("{}.weight".format, names) if name in shapes}
    covered = [Coverage(name, "IQ2_XXS", 1, 1, 9, 9) for name in shapes]
    imatrix = SimpleNamespace(name="im", match=lambda *_: covered, metadata=dict, importance=dict)
    plan = plan_build(source, "gguf:IQ2_XXS", imatrix=imatrix)
    types = {tensor.name: tensor.dtype for tensor in plan.tensors}
    assert types["blk.32.ffn_up.weight"] == types["blk.32.nextn.eh_proj.weight"] == "Q4_K"
    assert types["blk.3.ffn_up.weight"] == "IQ2_XXS"
    assert any("of the MTP layer" in note and "Q4_K" in note for note in plan.notes)
    assert not any(name.startswith("blk.32.") for name in plan.needs_imatrix)


@pytest.mark.parametrize("name", [name for name in preset_names() if "397b" not in name])
def test_every_preset_can_be_planned(name):
    for build in ("fp8-channel", "fp8-block", "gguf:Q4_K_M"):
        assert 0.2 < planned(name, build).tensor_bytes / planned(name, "bf16").tensor_bytes < 0.75
