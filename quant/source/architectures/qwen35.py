"""Qwen3.5 checkpoints, dense and MoE, of which Ornith-1.0 is made: weights, FP8 skip lists, places in a GGUF.

    layer = x + mixer(norm(x)), x + mlp(norm(x));   mixer = gated DeltaNet three times, then attention, and so on

Weights and shapes follow transformers' `modeling_qwen3_5*.py`; GGUF names and transforms follow llama.cpp's converter
for `qwen35` and `qwen35moe`, checked by running both (tests/quant/gguf/test_logits.py):

- every norm but DeltaNet's own is zero-centred in Hugging Face and plain in ggml: add 1;
- `A_log` becomes A = -exp(A_log);
- value heads lie by key head in Hugging Face and tiled in ggml, so rows (or, for out_proj, columns) are reordered;
- an MTP layer is appended after the last block, its own projections and norms under `nextn`.

Letters: E experts, H hidden, I expert intermediate; KD, VD summed widths of key and value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from gguf import GGUFValueType as Type
from gguf import Keys

from ornith_moe.quant.errors import CheckpointError, PlanError, brief
from ornith_moe.quant.source.architectures.architecture import Architecture, Cached, Key
from ornith_moe.quant.source.architectures.qwen35_vision import tower_keys, tower_places, tower_weights
from ornith_moe.quant.source.architectures.rope import SCALED, rope_of, scaling_keys
from ornith_moe.quant.source.architectures.weight import Cut, Packed, Place, Settings, Weight
from ornith_moe.quant.source.transforms import SAME, UNCHANGED, AddOne, HeadSwap, NegativeExp, Transform

MAX_EXPERTS = 1 << 16  # of all layers; the 397B has 30,720
MROPE_SECTIONS = (11, 11, 10)  # transformers' default: rotary pairs for time, height, width
_PLUS_ONE = Transform(AddOne())
_NORMS = ("norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")  # how names of norms end
MIXERS = ("linear_attention", "full_attention")

# Module names below a layer -> GGUF names below a block.
_GGUF_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_GGUF_MTP_NAMES = {
    "mtp.fc.weight": "nextn.eh_proj.weight",
    "mtp.pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "mtp.norm.weight": "nextn.shared_head_norm.weight",
}


class Qwen35(Architecture):
    """One Qwen3.5 config."""

    MODEL_TYPES = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
    TOP_LEVEL: ClassVar[Mapping[str, str | None]] = {**Architecture.TOP_LEVEL, "mtp": "", "visual": "model."}
    VISION_PREFIX = "model.visual."
    PARSERS: ClassVar[Mapping[str, str]] = {  # thoughts are tagged, tool calls are XML
        "vLLM": "--reasoning-parser qwen3 --enable-auto-tool-choice --tool-call-parser qwen3_xml",
        "SGLang": "--reasoning-parser qwen3 --tool-call-parser qwen3_coder",
    }
    HAS_MMPROJ = True
    FUSED: ClassVar[Mapping[str, str]] = {**Architecture.FUSED, "in_proj_qkv": "qkvz", "in_proj_z": "qkvz"}
    # Skip lists of the official builds. Channel: Ornith-1.0-*-FP8; MTP stays BF16 there and must be named (vllm#41994).
    CHANNEL_IGNORE = (
        *Architecture.CHANNEL_IGNORE,
        r"re:.*\.mlp\.gate$",
        r"re:.*shared_expert_gate$",
        r"re:.*linear_attn.*",
        r"re:model\.visual\..*",
    )
    CHANNEL_IGNORE_MTP = (r"re:^mtp\..*",)
    # Block: Qwen3.5-*-FP8. b and a have fewer rows than a block; vLLM fuses them into in_proj_ba at load.
    BLOCK_SKIP = (*Architecture.BLOCK_SKIP, "in_proj_a", "in_proj_b", "gate", "shared_expert_gate", "fc", "conv1d")
    GGUF_NAMES = _GGUF_NAMES
    MLX_OWN_DTYPE = ("A_log",)

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        text = self.text
        self.moe = "moe" in str(config.get("model_type"))
        self.gguf_architecture = "qwen35moe" if self.moe else "qwen35"
        interval = text.integer("full_attention_interval", 4, high=4096)
        regular = [MIXERS[(layer + 1) % interval == 0] for layer in range(self.layers)]
        if text.values.get("layer_types") is None:
            self.mixers = regular
        else:
            self.mixers = text.strings("layer_types", self.layers, MIXERS)
        self.follows_interval = self.mixers == regular
        self.head_dim = text.integer("head_dim", 256)
        self.key_heads = text.integer("linear_num_key_heads", 16)
        self.value_heads = text.integer("linear_num_value_heads", 32)
        self.key_head_dim = text.integer("linear_key_head_dim", 128)
        self.value_head_dim = text.integer("linear_value_head_dim", 128)
        self.conv_kernel = text.integer("linear_conv_kernel_dim", 4, high=1024)
        if self.value_heads % self.key_heads:
            raise CheckpointError(
                f"config.json: expected linear_num_value_heads to be a multiple of linear_num_key_heads "
                f"({self.key_heads}), got {self.value_heads}"
            )
        self.mtp_layers = text.integer("mtp_num_hidden_layers", 0, low=0, high=64)
        if self.moe:
            self.experts = text.integer("num_experts", high=1 << 14)
            if self.experts * (self.layers + self.mtp_layers) > MAX_EXPERTS:
                raise CheckpointError(
                    f"config.json: {self.layers} layers, and {self.mtp_layers} for MTP, of {self.experts} experts are "
                    f"more than the {MAX_EXPERTS} in all that this version plans"
                )
            self.intermediate = text.integer("moe_intermediate_size")
            self.shared_intermediate = text.integer("shared_expert_intermediate_size")
        else:
            self.experts, self.intermediate = 0, text.integer("intermediate_size")

    def layer_weights(self, prefix: str, layer: int) -> Iterator[Weight]:
        """Layers beyond the last are of multi-token prediction and have full attention."""
        mixer = self.mixers[layer] if layer < self.layers else "full_attention"
        hidden = self.hidden
        key, value = self.key_heads * self.key_head_dim, self.value_heads * self.value_head_dim

        def weight(name: str, shape: tuple[int, ...], role: str) -> Weight:
            return Weight(prefix + name, shape, role, layer)

        yield weight("input_layernorm.weight", (hidden,), "norm")
        yield weight("post_attention_layernorm.weight", (hidden,), "norm")
        if mixer == "linear_attention":
            yield weight("linear_attn.in_proj_qkv.weight", (2 * key + value, hidden), "linear_attention")
            yield weight("linear_attn.in_proj_z.weight", (value, hidden), "linear_attention")
            yield weight("linear_attn.in_proj_b.weight", (self.value_heads, hidden), "linear_attention")
            yield weight("linear_attn.in_proj_a.weight", (self.value_heads, hidden), "linear_attention")
            yield weight("linear_attn.conv1d.weight", (2 * key + value, 1, self.conv_kernel), "linear_attention")
            yield weight("linear_attn.A_log", (self.value_heads,), "linear_attention")
            yield weight("linear_attn.dt_bias", (self.value_heads,), "linear_attention")
            yield weight("linear_attn.norm.weight", (self.value_head_dim,), "norm")
            yield weight("linear_attn.out_proj.weight", (hidden, value), "linear_attention")
        else:  # q_proj holds [query | output gate] per head
            yield weight("self_attn.q_proj.weight", (2 * self.heads * self.head_dim, hidden), "attention")
            yield weight("self_attn.k_proj.weight", (self.kv_heads * self.head_dim, hidden), "attention")
            yield weight("self_attn.v_proj.weight", (self.kv_heads * self.head_dim, hidden), "attention")
            yield weight("self_attn.o_proj.weight", (hidden, self.heads * self.head_dim), "attention")
            yield weight("self_attn.q_norm.weight", (self.head_dim,), "norm")
            yield weight("self_attn.k_norm.weight", (self.head_dim,), "norm")
        if not self.moe:
            yield weight("mlp.gate_proj.weight", (self.intermediate, hidden), "mlp")
            yield weight("mlp.up_proj.weight", (self.intermediate, hidden), "mlp")
            yield weight("mlp.down_proj.weight", (hidden, self.intermediate), "mlp")
            return
        yield weight("mlp.gate.weight", (self.experts, hidden), "router")
        yield weight("mlp.shared_expert_gate.weight", (1, hidden), "router")
        yield weight("mlp.shared_expert.gate_proj.weight", (self.shared_intermediate, hidden), "shared_expert")
        yield weight("mlp.shared_expert.up_proj.weight", (self.shared_intermediate, hidden), "shared_expert")
        yield weight("mlp.shared_expert.down_proj.weight", (hidden, self.shared_intermediate), "shared_expert")
        inner, base = self.intermediate, f"{prefix}mlp.experts."
        gate_up = (f"{base}gate_up_proj", (self.experts, 2 * inner, hidden))
        down = (f"{base}down_proj", (self.experts, hidden, inner))
        for expert in range(self.experts):
            for name, shape, (packed, packed_shape), row in (
                ("gate_proj", (inner, hidden), gate_up, expert * 2 * inner),
                ("up_proj", (inner, hidden), gate_up, expert * 2 * inner + inner),
                ("down_proj", (hidden, inner), down, expert * hidden),
            ):
                yield Weight(
                    f"{base}{expert}.{name}.weight", shape, "expert", layer, expert, Packed(packed, packed_shape, row)
                )

    def mtp_weights(self) -> Iterator[Weight]:
        for name, shape in (
            ("fc.weight", (self.hidden, 2 * self.hidden)),
            ("pre_fc_norm_embedding.weight", (self.hidden,)),
            ("pre_fc_norm_hidden.weight", (self.hidden,)),
            ("norm.weight", (self.hidden,)),
        ):
            yield Weight(f"mtp.{name}", shape, "mtp", self.layers)
        for layer in range(self.mtp_layers):
            for weight in self.layer_weights(f"mtp.layers.{layer}.", self.layers + layer):
                yield replace(weight, role="mtp")

    def vision_weights(self, vision: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in tower_weights(vision):
            yield self.VISION_PREFIX + name, shape

    # Engines

    def cached(self, context: int) -> Cached:
        """DeltaNet keeps a matrix of [key, value] per value head, and the inputs that its convolution looks back on."""
        full = self.mixers.count("full_attention")
        keys, values = self.key_heads * self.key_head_dim, self.value_heads * self.value_head_dim
        state = values * self.key_head_dim + (self.conv_kernel - 1) * (2 * keys + values)
        return Cached(2 * full * self.kv_heads * self.head_dim * context, (self.layers - full) * state)

    @property
    def widest(self) -> int:
        """Gate, up and two outputs of each chosen expert (or of the MLP), or what DeltaNet's convolution makes."""
        chosen = self.text.integer("num_experts_per_tok", 8) if self.moe else 1
        inner = chosen * 2 * (self.intermediate + self.hidden) + self.hidden * self.moe
        keys, values = self.key_heads * self.key_head_dim, self.value_heads * self.value_head_dim
        return max(inner, 4 * (2 * keys + values))

    def cut(self, weight: Weight) -> Cut | None:
        keys, values = (self.key_heads, self.key_head_dim), (self.value_heads, self.value_head_dim)
        inner = ((self.shared_intermediate if ".shared_expert." in weight.name else self.intermediate, 1),)
        return {
            "q_proj": Cut(((self.heads, 2 * self.head_dim),)),
            "k_proj": Cut(((self.kv_heads, self.head_dim),), shared=True),
            "v_proj": Cut(((self.kv_heads, self.head_dim),), shared=True),
            "o_proj": Cut(((self.heads, self.head_dim),), by_columns=True),
            "in_proj_qkv": Cut((keys, keys, values)),
            "in_proj_z": Cut((values,)),
            "in_proj_b": Cut(((self.value_heads, 1),)),
            "in_proj_a": Cut(((self.value_heads, 1),)),
            "out_proj": Cut((values,), by_columns=True),
            "gate_proj": Cut(inner),
            "up_proj": Cut(inner),
            "down_proj": Cut(inner, by_columns=True),
        }.get(weight.leaf)

    # FP8 builds

    def block_skip_aliases(self, module: str) -> list[str]:
        if module.endswith("in_proj_b"):
            return [module.removesuffix("_b") + "_ba"]
        if self.is_vision(module):  # the official lists name the tower's own modules without `model.` too
            return [] if ".blocks." in module else [module.removeprefix("model.")]
        return super().block_skip_aliases(module)

    # GGUF

    def gguf_places(self, weight: Weight) -> tuple[Place, ...]:
        if weight.role == "vision":
            return ()
        if weight.role == "mtp" and self.mtp_layers != 1:
            raise PlanError(
                f"{weight.name}: llama.cpp reads one MTP layer and the config has {self.mtp_layers}; pass --mtp drop"
            )
        if weight.expert is not None:
            return (self.gguf_place(weight),)
        transform = _PLUS_ONE if weight.name.endswith(_NORMS) else UNCHANGED
        if weight.name in _GGUF_MTP_NAMES:
            name = f"blk.{weight.layer}.{_GGUF_MTP_NAMES[weight.name]}"
            return (Place(name, weight.shape, transform=transform),)
        place = self.gguf_place(weight, transform)
        return (self._gguf_linear_attention(weight, place) if ".linear_attn." in weight.name else place,)

    def _gguf_linear_attention(self, weight: Weight, place: Place) -> Place:
        """`place` with heads in ggml's order."""
        module = weight.module.removeprefix("linear_attn.")
        ratio = self.value_heads // self.key_heads
        keys = 2 * self.key_heads * self.key_head_dim
        start, size = {
            "in_proj_qkv.weight": (keys, self.value_head_dim),
            "conv1d.weight": (keys, self.value_head_dim),
            "in_proj_z.weight": (0, self.value_head_dim),
            "out_proj.weight": (0, self.value_head_dim),
        }.get(module, (0, 1))
        swap = HeadSwap(start, self.key_heads, ratio, size) if ratio > 1 and module != "norm.weight" else None
        shape = (weight.shape[0], weight.shape[2]) if module == "conv1d.weight" else weight.shape
        if module == "out_proj.weight":
            return Place(place.name, shape, transform=Transform(columns=swap))
        values = NegativeExp() if module == "A_log" else SAME
        return Place(place.name, shape, transform=Transform(values, rows=swap))

    def gguf_keys(self, mtp_layers: int) -> tuple[list[Key], list[Key]]:
        text = self.text
        rope = self.gguf_rope(rope_of(text), "default", "mrope", *SCALED)
        rotary_factor = rope.fraction("partial_rotary_factor", text.fraction("partial_rotary_factor", 0.25))
        theta = rope.number("rope_theta", text.values.get("rope_theta", 10_000_000))
        if self.key_head_dim != self.value_head_dim:
            raise PlanError(
                f"config.json: linear_key_head_dim {self.key_head_dim} and linear_value_head_dim {self.value_head_dim} "
                "differ; llama.cpp knows one state size for both"
            )
        recurrent = [mixer == "linear_attention" for mixer in self.mixers] + [False] * mtp_layers
        first: list[Key] = [
            (Keys.LLM.BLOCK_COUNT, self.layers + mtp_layers, Type.UINT32),
            *self.gguf_common_keys((self.kv_heads, Type.UINT32)),
            *scaling_keys(rope, self.context),
            (Keys.Rope.DIMENSION_SECTIONS, self._mrope_sections(rope), Type.ARRAY, Type.INT32),
            (Keys.Rope.FREQ_BASE, theta, Type.FLOAT32),
            (Keys.Attention.LAYERNORM_RMS_EPS, text.number("rms_norm_eps", 1e-6), Type.FLOAT32),
        ]
        if self.moe:
            used = text.integer("num_experts_per_tok", high=self.experts)
            first += [
                (Keys.LLM.EXPERT_COUNT, self.experts, Type.UINT32),
                (Keys.LLM.EXPERT_USED_COUNT, used, Type.UINT32),
            ]
        first += [
            (Keys.Attention.KEY_LENGTH, self.head_dim, Type.UINT32),
            (Keys.Attention.VALUE_LENGTH, self.head_dim, Type.UINT32),
        ]
        after: list[Key] = [
            (Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, self.intermediate, Type.UINT32),
            (Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, self.shared_intermediate, Type.UINT32),
        ] if self.moe else []  # fmt: skip
        if mtp_layers:
            after.append((Keys.LLM.NEXTN_PREDICT_LAYERS, mtp_layers, Type.UINT32))
        after += [
            (Keys.SSM.CONV_KERNEL, self.conv_kernel, Type.UINT32),
            (Keys.SSM.STATE_SIZE, self.key_head_dim, Type.UINT32),
            (Keys.SSM.GROUP_COUNT, self.key_heads, Type.UINT32),
            (Keys.SSM.TIME_STEP_RANK, self.value_heads, Type.UINT32),
            (Keys.SSM.INNER_SIZE, self.value_heads * self.value_head_dim, Type.UINT32),
            # Which blocks are recurrent, twice: the list is exact, the interval what readers before autumn 2026 know.
            ("{arch}.attention.recurrent_layers", recurrent, Type.ARRAY, Type.BOOL),
            (Keys.LLM.FULL_ATTENTION_INTERVAL, _interval(self.mixers), Type.UINT32),
            (Keys.Rope.DIMENSION_COUNT, int(self.head_dim * rotary_factor), Type.UINT32),
        ]
        return first, after

    def mmproj_places(self, weight: Weight) -> tuple[Place, ...]:
        return tower_places(weight.name.removeprefix(self.VISION_PREFIX), weight.shape)

    def mmproj_keys(self, vision: Settings, mean: Sequence[float], std: Sequence[float]) -> list[Key]:
        return tower_keys(vision, self.text, mean, std)

    def _mrope_sections(self, rope: Settings) -> list[int]:
        sections = rope.values.get("mrope_section") or list(MROPE_SECTIONS)
        pairs = range(self.head_dim // 2 + 1)
        whole = isinstance(sections, list) and len(sections) in (3, 4)
        if not whole or not all(type(n) is int and n in pairs for n in sections):
            raise CheckpointError(
                f"{rope.where}: expected mrope_section to be three integers from 0 to {pairs[-1]}, got "
                f"{brief(sections)}"
            )
        return [*sections, 0][:4]  # the fourth is for a position axis that text and images do not have

    # MLX

    def mlx_places(self, weight: Weight) -> tuple[Place, ...]:
        """As mlx-lm's `qwen3_5*.py` and mlx-vlm's tower name them; neither runs multi-token prediction here."""
        if weight.role == "mtp":
            return ()
        if not self.follows_interval:
            raise PlanError(
                "config.json: layer_types follows no full_attention_interval, which is all that mlx-lm reads; a GGUF "
                "has such layers"
            )
        convolution = len(weight.shape) > 2  # its channels last
        shape = (weight.shape[0], *weight.shape[2:], weight.shape[1]) if convolution else weight.shape
        if weight.role == "vision":
            return (Place(f"vision_tower.{weight.name.removeprefix(self.VISION_PREFIX)}", shape),)
        name = self.mlx_name(weight)
        if weight.expert is not None:
            name = name.replace(f".experts.{weight.expert}.", ".switch_mlp.")
            return (Place(name, (self.experts, *weight.shape), weight.expert * weight.shape[0]),)
        plain = ".linear_attn." in name or not name.endswith(_NORMS)
        return (Place(name, shape, transform=UNCHANGED if plain else _PLUS_ONE),)


def _interval(mixers: list[str]) -> int:
    """Every how many layers attention is full. Layers that follow no interval are described by the list alone."""
    full = [layer for layer, mixer in enumerate(mixers) if mixer == "full_attention"]
    return full[0] + 1 if full else len(mixers) + 1
