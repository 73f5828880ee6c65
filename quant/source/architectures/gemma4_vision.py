"""The vision tower of Gemma 4: its weights, their places in llama.cpp's mmproj file, and the keys beside them.

    patches [P, P, 3] -> linear + positions of x and of y -> blocks -> mean over 3 x 3 patches
    -> (x - std_bias) * std_scale -> projection into the text

    block: x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))

llama.cpp's `clip` knows this tower as `gemma4v`, and computes the linear layer over patches as a convolution, so its
columns change their order: channels first. No value changes. What the converter writes no key for must be as
published: 3 x 3 patches, a rotary base of 100, gelu; other towers are refused. Checked against llama.cpp's own
converter, every tensor and every key (tests/quant/gguf/test_converter.py).

Letters: P pixels along the edge of a patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from gguf import GGUFValueType as Type
from gguf import Keys, VisionProjectorType

from ornith_moe.quant.errors import CheckpointError, PlanError, brief
from ornith_moe.quant.source.architectures.architecture import Key
from ornith_moe.quant.source.architectures.weight import Place, Settings
from ornith_moe.quant.source.transforms import Transform, Transposed

TOWER = "model.vision_tower."
CHANNELS = 3
IMAGE_SIZE = 224  # what the converter says and `clip` does not use: images keep their shape
PATCHES = "patch_embedder.input_proj.weight"
ELSEWHERE = "is known to llama.cpp's tower; leave the builds of gguf:mmproj out"
_GGUF_NAMES = {
    f"{TOWER}std_bias": "v.std_bias",
    f"{TOWER}std_scale": "v.std_scale",
    f"{TOWER}patch_embedder.position_embedding_table": "v.position_embd.weight",
    f"{TOWER}{PATCHES}": "v.patch_embd.weight",
    "model.embed_vision.embedding_projection.weight": "mm.input_projection.weight",
}
_GGUF_BLOCK_NAMES = {
    "self_attn.q_proj.linear": "attn_q",
    "self_attn.k_proj.linear": "attn_k",
    "self_attn.v_proj.linear": "attn_v",
    "self_attn.o_proj.linear": "attn_out",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj.linear": "ffn_gate",
    "mlp.up_proj.linear": "ffn_up",
    "mlp.down_proj.linear": "ffn_down",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ffn_post_norm",
}
_PUBLISHED = {"pooling_kernel_size": 3, "hidden_activation": "gelu_pytorch_tanh"}
ROPE_THETA = 100.0


def tower_weights(vision: Settings, text_hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of all its weights; `vision` is the section of the config."""
    if vision.values.get("use_clipped_linears"):
        raise CheckpointError("config.json: vision_config.use_clipped_linears is true; only false is supported")
    hidden, inner = vision.integer("hidden_size"), vision.integer("intermediate_size")
    head_dim = vision.integer("head_dim")
    queries = vision.integer("num_attention_heads") * head_dim
    keys = vision.integer("num_key_value_heads") * head_dim
    matrices = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    if vision.values.get("standardize"):
        yield f"{TOWER}std_bias", (hidden,)
        yield f"{TOWER}std_scale", (hidden,)
    positions = vision.integer("position_embedding_size")
    yield f"{TOWER}patch_embedder.position_embedding_table", (2, positions, hidden)
    yield f"{TOWER}{PATCHES}", (hidden, CHANNELS * vision.integer("patch_size") ** 2)
    for block in range(vision.integer("num_hidden_layers", high=4096)):
        base = f"{TOWER}encoder.layers.{block}."
        for name, shape in matrices.items():
            yield f"{base}{name}.linear.weight", shape
        yield f"{base}self_attn.q_norm.weight", (head_dim,)
        yield f"{base}self_attn.k_norm.weight", (head_dim,)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{base}{norm}_layernorm.weight", (hidden,)
    yield "model.embed_vision.embedding_projection.weight", (text_hidden, hidden)


def tower_places(name: str, shape: tuple[int, ...]) -> tuple[Place, ...]:
    """Where the weight `name` goes in an mmproj; patches [rows, P * P * 3] become [rows, 3, P, P]."""
    if name == f"{TOWER}{PATCHES}":
        rows, columns = shape
        edge = math.isqrt(columns // CHANNELS)
        order = Transform(columns=Transposed(CHANNELS))
        return (Place(_GGUF_NAMES[name], (rows, CHANNELS, edge, edge), transform=order),)
    block = re.fullmatch(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.(.+)\.weight", name)
    return (Place(f"v.blk.{block[1]}.{_GGUF_BLOCK_NAMES[block[2]]}.weight" if block else _GGUF_NAMES[name], shape),)


def tower_keys(vision: Settings, text_hidden: int, mean: Sequence[float], std: Sequence[float]) -> list[Key]:
    """Keys of the mmproj, in the order of llama.cpp's converter; arguments and errors as in qwen35_vision.py."""
    for key, published in _PUBLISHED.items():
        if vision.values.get(key, published) != published:
            found = brief(vision.values[key])
            raise PlanError(f"{vision.where}: {key} is {found}, and {brief(published)} alone {ELSEWHERE}")
    rope = vision.section("rope_parameters")
    if rope and rope.number("rope_theta", ROPE_THETA) != ROPE_THETA:
        found = brief(rope.values["rope_theta"])
        raise PlanError(f"{rope.where}: rope_theta is {found}, and {ROPE_THETA:g} alone {ELSEWHERE}")
    return [
        (Keys.Clip.HAS_VISION_ENCODER, True, Type.BOOL),
        (Keys.ClipVision.PROJECTION_DIM, text_hidden, Type.UINT32),
        (Keys.ClipVision.IMAGE_SIZE, IMAGE_SIZE, Type.UINT32),
        (Keys.ClipVision.PATCH_SIZE, vision.integer("patch_size"), Type.UINT32),
        (Keys.ClipVision.EMBEDDING_LENGTH, vision.integer("hidden_size"), Type.UINT32),
        (Keys.ClipVision.FEED_FORWARD_LENGTH, vision.integer("intermediate_size"), Type.UINT32),
        (Keys.ClipVision.BLOCK_COUNT, vision.integer("num_hidden_layers", high=4096), Type.UINT32),
        (Keys.ClipVision.Attention.HEAD_COUNT, vision.integer("num_attention_heads"), Type.UINT32),
        (Keys.ClipVision.IMAGE_MEAN, list(mean), Type.ARRAY, Type.FLOAT32),
        (Keys.ClipVision.IMAGE_STD, list(std), Type.ARRAY, Type.FLOAT32),
        (Keys.ClipVision.PROJECTOR_TYPE, VisionProjectorType.GEMMA4V, Type.STRING),
        (Keys.ClipVision.Attention.LAYERNORM_EPS, vision.number("layer_norm_eps", 1e-6), Type.FLOAT32),
    ]
