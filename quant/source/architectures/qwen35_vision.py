"""The vision tower of Qwen3.5 and 3.6: its weights, their places in llama.cpp's mmproj file, and the keys beside them.

    patches [3, T, P, P] -> linear (a Conv3d) + position -> blocks: x + attention(norm(x)), x + mlp(norm(x)) -> merger

An mmproj is read by llama.cpp's `clip`, which knows this tower as `qwen3vl_merger`. No value changes on the way; the
convolution over two frames becomes two tensors, one a frame. Checked against llama.cpp's own converter, every tensor
and every key (tests/quant/gguf/test_converter.py).

Letters: T frames of a patch, P pixels along its edge.
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
from ornith_moe.quant.source.transforms import Every, Transform

FRAMES = 2  # that llama.cpp's tower sees at a time
ELSEWHERE = "is known to llama.cpp's tower; leave the builds of gguf:mmproj out"
_CONVOLUTION = "patch_embed.proj.weight"
_GGUF_NAMES = {
    "patch_embed.proj": "v.patch_embd",
    "pos_embed": "v.position_embd",
    "merger.norm": "v.post_ln",
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
}
_GGUF_BLOCK_NAMES = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}


def tower_weights(vision: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name below the tower, shape) of all its weights; `vision` is the section of the config."""
    hidden, inner = vision.integer("hidden_size"), vision.integer("intermediate_size")
    patch, temporal = vision.integer("patch_size"), vision.integer("temporal_patch_size")
    merged = hidden * vision.integer("spatial_merge_size") ** 2
    matrices = {
        "attn.qkv": (3 * hidden, hidden),
        "attn.proj": (hidden, hidden),
        "mlp.linear_fc1": (inner, hidden),
        "mlp.linear_fc2": (hidden, inner),
    }
    yield _CONVOLUTION, (hidden, vision.integer("in_channels"), temporal, patch, patch)
    yield "patch_embed.proj.bias", (hidden,)
    yield "pos_embed.weight", (vision.integer("num_position_embeddings"), hidden)
    for block in range(vision.integer("depth", high=4096)):
        for name in ("norm1", "norm2"):
            yield f"blocks.{block}.{name}.weight", (hidden,)
            yield f"blocks.{block}.{name}.bias", (hidden,)
        for name, shape in matrices.items():
            yield f"blocks.{block}.{name}.weight", shape
            yield f"blocks.{block}.{name}.bias", shape[:1]
    yield "merger.norm.weight", (hidden,)
    yield "merger.norm.bias", (hidden,)
    for name, out in (("linear_fc1", merged), ("linear_fc2", vision.integer("out_hidden_size"))):
        yield f"merger.{name}.weight", (out, merged)
        yield f"merger.{name}.bias", (out,)


def tower_places(name: str, shape: tuple[int, ...]) -> tuple[Place, ...]:
    """Where the weight `name` below the tower goes in an mmproj: the convolution in two tensors, all others in one.

    Raises:
        PlanError: the convolution sees another number of frames than llama.cpp.
    """
    module, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    owner = f"v.blk.{block[1]}.{_GGUF_BLOCK_NAMES[block[2]]}" if block else _GGUF_NAMES[module]
    if name != _CONVOLUTION:
        return (Place(f"{owner}.{kind}", shape),)
    out, channels, frames, rows, columns = shape
    if frames != FRAMES:
        raise PlanError(f"config.json.vision_config: temporal_patch_size is {frames}, and {FRAMES} alone {ELSEWHERE}")
    return tuple(
        Place(
            f"{owner}.weight{suffix}",
            (out, channels, rows, columns),
            transform=Transform(rows=Every(frame * rows, rows, frames * rows)),
        )
        for frame, suffix in enumerate(("", ".1"))
    )


def tower_keys(vision: Settings, text: Settings, mean: Sequence[float], std: Sequence[float]) -> list[Key]:
    """Keys of the mmproj, in the order of llama.cpp's converter.

    Args:
        mean, std: what the pixels of each channel are normalized with.
    Raises:
        CheckpointError: a value missing or damaged. PlanError: one that llama.cpp cannot express.
    """
    activation = vision.values.get("hidden_act", "gelu_pytorch_tanh")
    if not (isinstance(activation, str) and activation.startswith("gelu")):
        raise PlanError(f"{vision.where}: hidden_act {brief(activation)} is not gelu, which alone {ELSEWHERE}")
    if vision.values.get("deepstack_visual_indexes"):
        raise PlanError(f"{vision.where}: deepstack_visual_indexes name blocks, and only a tower without {ELSEWHERE}")
    depth = vision.integer("depth", high=4096)
    return [
        (Keys.Clip.HAS_VISION_ENCODER, True, Type.BOOL),
        (Keys.ClipVision.PROJECTION_DIM, text.integer("hidden_size"), Type.UINT32),
        (Keys.ClipVision.IMAGE_SIZE, _image_size(vision), Type.UINT32),
        (Keys.ClipVision.PATCH_SIZE, vision.integer("patch_size"), Type.UINT32),
        (Keys.ClipVision.EMBEDDING_LENGTH, vision.integer("hidden_size"), Type.UINT32),
        (Keys.ClipVision.FEED_FORWARD_LENGTH, vision.integer("intermediate_size"), Type.UINT32),
        (Keys.ClipVision.BLOCK_COUNT, depth, Type.UINT32),
        (Keys.ClipVision.Attention.HEAD_COUNT, vision.integer("num_heads"), Type.UINT32),
        (Keys.ClipVision.IMAGE_MEAN, list(mean), Type.ARRAY, Type.FLOAT32),
        (Keys.ClipVision.IMAGE_STD, list(std), Type.ARRAY, Type.FLOAT32),
        (Keys.Clip.PROJECTOR_TYPE, VisionProjectorType.QWEN3VL, Type.STRING),
        (Keys.ClipVision.USE_GELU, True, Type.BOOL),
        (Keys.ClipVision.SPATIAL_MERGE_SIZE, vision.integer("spatial_merge_size"), Type.UINT32),
        (Keys.ClipVision.Attention.LAYERNORM_EPS, text.number("rms_norm_eps", 1e-6), Type.FLOAT32),
        (Keys.ClipVision.IS_DEEPSTACK_LAYERS, [False] * depth, Type.ARRAY, Type.BOOL),
    ]


def _image_size(vision: Settings) -> int:
    """Pixels along the edge of the square that the table of positions covers."""
    positions = vision.integer("num_position_embeddings")
    side = math.isqrt(positions)
    if side**2 != positions:
        raise CheckpointError(f"{vision.where}: expected num_position_embeddings to be a square, got {positions}")
    return vision.integer("image_size", side * vision.integer("patch_size"))
