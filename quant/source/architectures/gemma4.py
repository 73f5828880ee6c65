"""Gemma 4 dense checkpoints (31B and smaller without per-layer embeddings): weights, FP8 skip lists, place in a GGUF.

    h = x + norm(attention(norm(x)));  y = (h + norm(mlp(norm(h)))) * layer_scalar

Five sliding-window layers alternate with one global layer. With `attention_k_eq_v` a global layer has no value
projection: values are its keys. Norms are plain, so nothing is added on the way to ggml. ggml reads one tensor that no
checkpoint holds, `rope_freqs`: a factor of 1 for the rotated pairs of a global head and 1e30, that is no rotation, for
the rest. Sources: transformers' `modeling_gemma4.py`; llama.cpp's loader for `gemma4`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from gguf import GGUFValueType as Type
from gguf import Keys

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.source.architectures.architecture import Architecture, Cached, FallbackTokenizer, Key
from ornith_moe.quant.source.architectures.gemma4_vision import TOWER, tower_keys, tower_places, tower_weights
from ornith_moe.quant.source.architectures.weight import Cut, Place, Settings, Weight

_SHOWN = frozenset(  # control tokens that a chat parser must see in the text
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
ATTENTIONS = ("sliding_attention", "full_attention")
# Keys whose unusual value changes the model; refused until somebody needs them.
_PLAIN = {
    "enable_moe_block": (False, None),
    "hidden_size_per_layer_input": (0, None),
    "num_kv_shared_layers": (0, None),
    "use_double_wide_mlp": (False, None),
}
_GGUF_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


class Gemma4(Architecture):
    """One dense Gemma 4 config."""

    MODEL_TYPES = ("gemma4", "gemma4_text")
    TOP_LEVEL: ClassVar[Mapping[str, str | None]] = {
        **Architecture.TOP_LEVEL,
        "vision_tower": "model.",
        "embed_vision": "model.",
    }
    VISION_PREFIX = TOWER
    HAS_MMPROJ = True
    TIED = True
    CHANNEL_IGNORE = (*Architecture.CHANNEL_IGNORE, r"re:.*vision_tower.*", r"re:.*embed_vision.*")
    GGUF_NAMES = _GGUF_NAMES
    BYTE_FALLBACK = FallbackTokenizer("gemma4", _SHOWN, always_bos=True)
    gguf_architecture = "gemma4"

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        text = self.text
        for key, plain in _PLAIN.items():
            if text.values.get(key) not in plain:
                raise CheckpointError(
                    f"config.json: {key} is {brief(text.values[key])}; only dense Gemma 4 with {brief(plain[0])} is "
                    "supported"
                )
        self.intermediate = text.integer("intermediate_size")
        self.attentions = text.strings("layer_types", self.layers, ATTENTIONS)
        self.head_dim = text.integer("head_dim")
        self.k_eq_v = bool(text.values.get("attention_k_eq_v"))
        everywhere = _full_attention(text, self.attentions)
        self.global_head_dim = everywhere.integer("head_dim")
        self.global_kv_heads = everywhere.integer("num_key_value_heads")
        rope = text.section("rope_parameters")
        full = rope.section("full_attention") if rope else None
        self.rotary_factor = full.fraction("partial_rotary_factor", 1.0) if full else 1.0

    def layer_weights(self, prefix: str, layer: int) -> Iterator[Weight]:
        everywhere = self.attentions[layer] == "full_attention"
        head_dim = self.global_head_dim if everywhere else self.head_dim
        queries = self.heads * head_dim
        keys = (self.global_kv_heads if everywhere else self.kv_heads) * head_dim

        def weight(name: str, shape: tuple[int, ...], role: str) -> Weight:
            return Weight(prefix + name, shape, role, layer)

        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield weight(f"{norm}_layernorm.weight", (self.hidden,), "norm")
        yield weight("layer_scalar", (1,), "norm")
        yield weight("self_attn.q_proj.weight", (queries, self.hidden), "attention")
        yield weight("self_attn.k_proj.weight", (keys, self.hidden), "attention")
        if not (everywhere and self.k_eq_v):
            yield weight("self_attn.v_proj.weight", (keys, self.hidden), "attention")
        yield weight("self_attn.o_proj.weight", (self.hidden, queries), "attention")
        yield weight("self_attn.q_norm.weight", (head_dim,), "norm")
        yield weight("self_attn.k_norm.weight", (head_dim,), "norm")
        yield weight("mlp.gate_proj.weight", (self.intermediate, self.hidden), "mlp")
        yield weight("mlp.up_proj.weight", (self.intermediate, self.hidden), "mlp")
        yield weight("mlp.down_proj.weight", (self.hidden, self.intermediate), "mlp")

    def vision_weights(self, vision: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
        return tower_weights(vision, self.hidden)

    # Engines

    def cached(self, context: int) -> Cached:
        """A sliding layer looks back on its window alone; values that are keys are kept all the same."""
        full = self.attentions.count("full_attention")
        window = min(context, self.text.integer("sliding_window", context))
        everywhere = full * self.global_kv_heads * self.global_head_dim * context
        return Cached(2 * (everywhere + (self.layers - full) * self.kv_heads * self.head_dim * window), 0)

    @property
    def widest(self) -> int:
        """Gate, up and two outputs of the MLP."""
        return 2 * (self.intermediate + self.hidden)

    def cut(self, weight: Weight) -> Cut | None:
        if weight.layer is None:
            return None
        everywhere = self.attentions[weight.layer] == "full_attention"
        size = self.global_head_dim if everywhere else self.head_dim
        shared = Cut(((self.global_kv_heads if everywhere else self.kv_heads, size),), shared=True)
        return {
            "q_proj": Cut(((self.heads, size),)),
            "k_proj": shared,
            "v_proj": shared,
            "o_proj": Cut(((self.heads, size),), by_columns=True),
            "gate_proj": Cut(((self.intermediate, 1),)),
            "up_proj": Cut(((self.intermediate, 1),)),
            "down_proj": Cut(((self.intermediate, 1),), by_columns=True),
        }.get(weight.leaf)

    # GGUF

    def gguf_constants(self) -> dict[str, list[float]]:
        pairs = self.global_head_dim // 2
        rotated = int(self.rotary_factor * pairs)
        return {"rope_freqs.weight": [1.0] * rotated + [1e30] * (pairs - rotated)}

    def gguf_keys(self, mtp_layers: int) -> tuple[list[Key], list[Key]]:
        text = self.text
        rope = text.section("rope_parameters") or Settings({}, f"{text.where}.rope_parameters")
        everywhere = self.gguf_rope(rope.section("full_attention"), "proportional")
        sliding = self.gguf_rope(rope.section("sliding_attention"), "default")
        is_sliding = [attention == "sliding_attention" for attention in self.attentions]
        kv_heads = [self.kv_heads if slides else self.global_kv_heads for slides in is_sliding]
        heads = (kv_heads, Type.ARRAY, Type.INT32) if set(kv_heads) != {self.kv_heads} else (self.kv_heads, Type.UINT32)
        first: list[Key] = [
            (Keys.LLM.BLOCK_COUNT, self.layers, Type.UINT32),
            *self.gguf_common_keys(heads),
            (Keys.Rope.FREQ_BASE, everywhere.number("rope_theta", 1e6), Type.FLOAT32),
            (Keys.Rope.FREQ_BASE_SWA, sliding.number("rope_theta", 1e4), Type.FLOAT32),
            (Keys.Attention.LAYERNORM_RMS_EPS, text.number("rms_norm_eps", 1e-6), Type.FLOAT32),
            (Keys.Attention.KEY_LENGTH, self.global_head_dim, Type.UINT32),
            (Keys.Attention.VALUE_LENGTH, self.global_head_dim, Type.UINT32),
        ]
        after: list[Key] = []
        if text.values.get("final_logit_softcapping") is not None:
            softcap = text.number("final_logit_softcapping", None)
            after.append((Keys.LLM.FINAL_LOGIT_SOFTCAPPING, softcap, Type.FLOAT32))
        after += [
            (Keys.Attention.SLIDING_WINDOW, text.integer("sliding_window"), Type.UINT32),
            (Keys.Attention.SHARED_KV_LAYERS, 0, Type.UINT32),
            (Keys.LLM.EMBD_LENGTH_PER_LAYER_INP, 0, Type.UINT32),
            (Keys.Attention.SLIDING_WINDOW_PATTERN, is_sliding, Type.ARRAY, Type.BOOL),
            (Keys.Attention.KEY_LENGTH_SWA, self.head_dim, Type.UINT32),
            (Keys.Attention.VALUE_LENGTH_SWA, self.head_dim, Type.UINT32),
            (Keys.Rope.DIMENSION_COUNT, self.global_head_dim, Type.UINT32),  # rope_freqs stops the pairs that rest
            (Keys.Rope.DIMENSION_COUNT_SWA, self.head_dim, Type.UINT32),
        ]
        return first, after

    def mmproj_places(self, weight: Weight) -> tuple[Place, ...]:
        return tower_places(weight.name, weight.shape)

    def mmproj_keys(self, vision: Settings, mean: Sequence[float], std: Sequence[float]) -> list[Key]:
        return tower_keys(vision, self.hidden, mean, std)

    # MLX

    def mlx_places(self, weight: Weight) -> tuple[Place, ...]:
        """As mlx-lm's `gemma4.py` and mlx-vlm's tower name them; norms are plain in all of them."""
        vision = weight.role == "vision"
        return (Place(weight.name.removeprefix("model.") if vision else self.mlx_name(weight), weight.shape),)


def _full_attention(text: Settings, attentions: list[str]) -> Settings:
    """head_dim and num_key_value_heads of the full-attention layers, however config.json spells them.

    Google writes `global_head_dim` and `num_global_key_value_heads`, the latter null or idle without
    `attention_k_eq_v`; transformers 5.23 saves `per_layer_config` instead: {layer, zero-padded: what differs there}.
    """
    per_layer = text.values.get("per_layer_config")
    if per_layer is None:
        kv_heads = text.values.get("num_global_key_value_heads") if text.values.get("attention_k_eq_v") else None
        own = {"head_dim": text.values.get("global_head_dim", 512)}
        own |= {"num_key_value_heads": kv_heads} if kv_heads is not None else {}
        return Settings(text.values | own, text.where)
    full = {layer for layer, attention in enumerate(attentions) if attention == "full_attention"}
    sound = isinstance(per_layer, dict) and all(key.isdecimal() and len(key) < 8 for key in per_layer)
    by_layer: dict[int, Any] = {int(layer): own for layer, own in per_layer.items()} if sound else {-1: None}
    own = next(iter(by_layer.values()), {})
    known = isinstance(own, dict) and own.keys() <= {"head_dim", "num_key_value_heads"}
    if not known or (own and by_layer.keys() != full) or any(other != own for other in by_layer.values()):
        raise CheckpointError(
            f"{text.where}: expected per_layer_config to give all full-attention layers, and only them, the same "
            f"head_dim and num_key_value_heads, got {brief(per_layer)}"
        )
    return Settings(text.values | own, f"{text.where}.per_layer_config")
