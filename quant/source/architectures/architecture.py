"""What an architecture is: all that is asked of a family of checkpoints, in one class, in one file.

    class Mine(Architecture):
        MODEL_TYPES = ("mine",)

A subclass is known from then on by its model types, and nothing else in the package names one. Every module of this
folder is imported with it, so an architecture is a file here; a program may define one of its own. An object is the
model of one config: it says which weights a checkpoint has, how engines cut and fuse them, what FP8 builds leave alone,
and what a GGUF calls them. tests/quant/source/test_toy_architecture.py is the smallest whole one.

Letters: E experts, H hidden, I expert intermediate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from gguf import GGUFValueType as Type
from gguf import Keys

from ornith_moe.quant.errors import CheckpointError, PlanError, brief
from ornith_moe.quant.names import did_you_mean
from ornith_moe.quant.source.architectures.weight import Cut, Place, Settings, Weight, text_settings
from ornith_moe.quant.source.transforms import UNCHANGED, Transform

Key = tuple[Any, ...]  # of a GGUF: name with {arch} in it, value, type, and for an array the type of its items
MAX_CONTEXT = 1 << 31
FAMILIES: list[type[Architecture]] = []
_TOP_GGUF_NAMES = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}


class Cached(NamedTuple):
    """Numbers that a model keeps for one sequence while it answers."""

    keys_and_values: int
    state: int


@dataclass(frozen=True, slots=True)
class FallbackTokenizer:
    """What llama.cpp makes of a BPE that falls back to bytes."""

    model: str  # its name for the kind of tokenizer
    shown: frozenset[str] = frozenset()  # control tokens that a chat parser must see in the text
    always_bos: bool = False  # whatever the files of the tokenizer say


class Architecture(ABC):
    """The model of one parsed config.json; subclasses say what their family is by the constants and methods below.

    Raises:
        CheckpointError: a value that no model of the family has.
    """

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ()  # `model_type` in config.json; () of a class that others build on

    # Names. A checkpoint's text model begins with one of two prefixes, the second inside a multimodal wrapper.
    TEXT_PREFIX: ClassVar[str] = "model."
    WRAPPED_PREFIX: ClassVar[str] = "model.language_model."
    # First segment below those -> what stands before it; None: the prefix of the text model.
    TOP_LEVEL: ClassVar[Mapping[str, str | None]] = MappingProxyType(
        {"layers": None, "embed_tokens": None, "norm": None, "lm_head": ""}
    )
    VISION_PREFIX: ClassVar[str] = ""  # of the tower's tensors; "": there is none
    MTP_PREFIX: ClassVar[str] = "mtp."  # of multi-token prediction
    MTP_LAYERS_KEY: ClassVar[str] = "mtp_num_hidden_layers"  # in the text config
    MTP_KEYS: ClassVar[tuple[str, ...]] = (  # of the text config: what MTP computes with and its shapes do not show
        "model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok",
        "rms_norm_eps", "hidden_act", "attn_output_gate", "mtp_use_dedicated_embeddings", "rope_theta",
        "partial_rotary_factor", "mrope_section",
    )  # fmt: skip
    TIED: ClassVar[bool] = False  # head and embedding, where the config does not say

    # Engines and FP8 builds. Skip lists are those of published builds of the family.
    FUSED: ClassVar[Mapping[str, str]] = MappingProxyType(  # linear layers concatenated at load -> name of their group
        {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    )
    CHANNEL_IGNORE: ClassVar[tuple[str, ...]] = ("lm_head", r"re:.*embed_tokens.*")
    CHANNEL_IGNORE_MTP: ClassVar[tuple[str, ...]] = ()  # besides, where the checkpoint has MTP
    BLOCK_SKIP: ClassVar[tuple[str, ...]] = ("lm_head", "embed_tokens")  # last segments of modules

    PARSERS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {}
    )  # engine -> options that its chats need (builds/card.py)

    # GGUF
    GGUF_NAMES: ClassVar[Mapping[str, str]] = MappingProxyType({})  # module below a layer -> name below a block
    MLX_OWN_DTYPE: ClassVar[tuple[str, ...]] = ()  # last segments of weights that mlx-lm leaves in their own dtype
    GGUF_MTP: ClassVar[str] = ".nextn."  # in the names of a GGUF's MTP tensors
    HAS_MMPROJ: ClassVar[bool] = False  # `mmproj_places` and `mmproj_keys` are there
    BYTE_FALLBACK: ClassVar[FallbackTokenizer | None] = None  # byte-level tokenizers need no word of the architecture
    gguf_architecture: str  # llama.cpp's name of it

    experts = 0  # routed, per layer
    mtp_layers = 0  # as the config announces, whether or not a checkpoint has them

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if cls.MODEL_TYPES:
            FAMILIES.append(cls)

    def __init__(self, config: dict[str, Any]):
        self.text = text = text_settings(config)
        self.prefix = self.WRAPPED_PREFIX if "text_config" in config else self.TEXT_PREFIX
        self.hidden = text.integer("hidden_size")
        self.layers = text.integer("num_hidden_layers", high=4096)
        self.vocabulary = text.integer("vocab_size")
        self.heads = text.integer("num_attention_heads")
        self.kv_heads = text.integer("num_key_value_heads")
        self.context = text.integer("max_position_embeddings", 0, low=0, high=MAX_CONTEXT)  # 0: it does not say
        self.tied = bool(config.get("tie_word_embeddings", text.values.get("tie_word_embeddings", self.TIED)))
        self.vision = Settings(config, "config.json").section("vision_config")

    # Weights

    def weights(self, prefix: str, *, vision: bool, mtp: bool) -> Iterator[Weight]:
        """Every weight of the checkpoint in reading order; text names start with `prefix`."""
        yield Weight(f"{prefix}embed_tokens.weight", (self.vocabulary, self.hidden), "embedding")
        for layer in range(self.layers):
            yield from self.layer_weights(f"{prefix}layers.{layer}.", layer)
        yield Weight(f"{prefix}norm.weight", (self.hidden,), "norm")
        if not self.tied:
            yield Weight("lm_head.weight", (self.vocabulary, self.hidden), "head")
        if vision and self.vision:
            for name, shape in self.vision_weights(self.vision):
                yield Weight(name, shape, "vision")
        if mtp:
            yield from self.mtp_weights()

    @abstractmethod
    def layer_weights(self, prefix: str, layer: int) -> Iterator[Weight]:
        """Weights of text layer `layer`, whose names start with `prefix`."""

    def vision_weights(self, vision: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the vision tower that the section `vision` of the config describes."""
        yield from ()

    def mtp_weights(self) -> Iterator[Weight]:
        """Weights of multi-token prediction, in layers that count on after the last text layer."""
        yield from ()

    def prefix_of(self, names: Iterable[str]) -> str:
        """The prefix of the text model in a checkpoint with tensors of these names."""
        return self.WRAPPED_PREFIX if any(name.startswith(self.WRAPPED_PREFIX) for name in names) else self.TEXT_PREFIX

    def is_mtp(self, name: str) -> bool:
        """Whether a canonical name is of multi-token prediction."""
        return name.startswith(self.MTP_PREFIX)

    def is_vision(self, name: str) -> bool:
        """Whether a canonical name is of the vision tower."""
        return self.VISION_PREFIX != "" and name.startswith(self.VISION_PREFIX)

    # Engines and FP8 builds

    def cached(self, context: int) -> Cached | None:
        """What is kept of a sequence of `context` tokens, multi-token prediction apart; None: not known."""
        return None

    @property
    def widest(self) -> int:
        """Values that llama.cpp holds of one token in the layer that needs the most; 0: not known."""
        return 0

    @abstractmethod
    def cut(self, weight: Weight) -> Cut | None:
        """How an engine cuts `weight` over ranks; None if every rank has all of it. Vision is not considered."""

    def fused_group(self, weight: Weight) -> str:
        """The fused group of a linear layer: all experts of a layer, or its own name when it is fused with nothing."""
        parent, _, leaf = weight.owner.rpartition(".")
        return parent.rpartition(".")[0] if weight.expert is not None else f"{parent}.{self.FUSED.get(leaf, leaf)}"

    def scale_group(self, weight: Weight) -> str:
        """The weights that share a scale of all: gate and up of an expert or an MLP, which engines multiply as one."""
        parent, _, leaf = weight.owner.rpartition(".")
        return f"{parent}.{self.FUSED[leaf]}" if leaf in ("gate_proj", "up_proj") else weight.owner

    def block_skip_aliases(self, module: str) -> list[str]:
        """Other names under which an engine may ask for a module that stays BF16."""
        return ["model.embed_tokens"] if module.endswith("language_model.embed_tokens") else []

    # GGUF

    def gguf_places(self, weight: Weight) -> tuple[Place, ...]:
        """Where `weight` goes in a text GGUF; nowhere for the vision tower, which belongs in an mmproj file.

        Raises:
            PlanError: llama.cpp has no place for it.
        """
        return () if weight.role == "vision" else (self.gguf_place(weight),)

    def gguf_place(self, weight: Weight, transform: Transform = UNCHANGED) -> Place:
        """The place that `GGUF_NAMES` gives a weight, in the stack of its kind if it is an expert's."""
        if weight.layer is None:
            return Place(_TOP_GGUF_NAMES[weight.role], weight.shape, transform=transform)
        if weight.expert is not None:
            kind = weight.name.rsplit(".", 2)[1].removesuffix("_proj")
            name, shape = f"blk.{weight.layer}.ffn_{kind}_exps.weight", (self.experts, *weight.shape)
            return Place(name, shape, weight.expert * weight.shape[0], transform)
        name = f"blk.{weight.layer}.{self.GGUF_NAMES[weight.module]}"
        return Place(name, weight.shape, transform=transform)

    def gguf_constants(self) -> dict[str, list[float]]:
        """Tensors a GGUF needs that no checkpoint holds: {name: values}, stored as F32."""
        return {}

    @abstractmethod
    def gguf_keys(self, mtp_layers: int) -> tuple[list[Key], list[Key]]:
        """Hyperparameters: the keys before and after `general.file_type`, where llama.cpp's converter writes it.

        Args:
            mtp_layers: blocks that the file holds, not as the config announces.
        Raises:
            CheckpointError: a value missing or damaged. PlanError: one that llama.cpp cannot express.
        """

    # The vision tower in a GGUF of its own, where the family says so (`HAS_MMPROJ`)

    def mmproj_places(self, weight: Weight) -> tuple[Place, ...]:
        """Where a weight of the vision tower goes in an mmproj.

        Raises:
            PlanError: llama.cpp has no place for it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no mmproj")

    def mmproj_keys(self, vision: Settings, mean: Sequence[float], std: Sequence[float]) -> list[Key]:
        """Hyperparameters of the tower that the section `vision` of the config describes.

        Args:
            mean, std: of the pixels of each channel.
        Raises:
            CheckpointError: a value missing or damaged. PlanError: one that llama.cpp cannot express.
        """
        raise NotImplementedError(f"{type(self).__name__} has no mmproj")

    def gguf_common_keys(self, kv_heads: Key) -> list[Key]:
        """Sizes that every family has; `kv_heads`: their number and its type."""
        text = self.text
        inner = text.values.get("intermediate_size") and text.integer("intermediate_size")  # idle in an MoE, if there
        return [
            (Keys.LLM.CONTEXT_LENGTH, text.integer("max_position_embeddings", high=MAX_CONTEXT), Type.UINT32),
            (Keys.LLM.EMBEDDING_LENGTH, self.hidden, Type.UINT32),
            *([(Keys.LLM.FEED_FORWARD_LENGTH, inner, Type.UINT32)] if inner else []),
            (Keys.Attention.HEAD_COUNT, self.heads, Type.UINT32),
            (Keys.Attention.HEAD_COUNT_KV, *kv_heads),
        ]

    def gguf_rope(self, rope: Settings | None, *kinds: str) -> Settings:
        """A section of rotary parameters, of one of the kinds that are written to a GGUF; the first goes unsaid."""
        rope = rope or Settings({}, f"{self.text.where}.rope_parameters")
        kind = rope.values.get("rope_type", rope.values.get("type", kinds[0]))  # older configs say `type`
        if kind not in kinds:
            raise PlanError(
                f"{rope.where}: rope_type {brief(kind)} is not written to a GGUF, only {', '.join(kinds)}; convert "
                "with the original rope_parameters and give llama.cpp the scaling when it runs"
            )
        return rope

    # MLX

    def mlx_name(self, weight: Weight) -> str:
        """The name of a weight of the text in mlx-lm and mlx-vlm."""
        inner = weight.name.removeprefix(self.WRAPPED_PREFIX).removeprefix(self.TEXT_PREFIX)
        return f"language_model.{inner}" if weight.role == "head" else f"language_model.model.{inner}"

    def mlx_places(self, weight: Weight) -> tuple[Place, ...]:
        """Where `weight` goes in a folder that mlx-lm and mlx-vlm load.

        Raises:
            PlanError: they have no place for it.
        """
        kind = brief(self.text.values.get("model_type"))
        raise PlanError(f"config.json: model_type {kind} has no names for MLX in this version; ask for another build")


def architecture(config: dict[str, Any]) -> Architecture:
    """The model of `config`, a parsed config.json.

    Raises:
        CheckpointError: an unknown model_type, or a value that no model of that architecture has.
    """
    model_type = config.get("model_type")
    for family in reversed(FAMILIES):  # the last that was defined
        if model_type in family.MODEL_TYPES:
            return family(config)
    known = [name for family in FAMILIES for name in family.MODEL_TYPES]
    raise CheckpointError(
        f"config.json: model_type {brief(model_type)} is not one we convert{did_you_mean(str(model_type), known)}; "
        f"expected one of {', '.join(known)}"
    )


def top_level() -> dict[str, str | None]:
    """`TOP_LEVEL` of all families: wrappers are taken off a name before its config is asked."""
    return {segment: before for family in FAMILIES for segment, before in family.TOP_LEVEL.items()}


def mtp_segments() -> set[str]:
    """First segments of the names of multi-token prediction, in any family."""
    return {family.MTP_PREFIX.rstrip(".") for family in FAMILIES}


def holds_mtp(names: Iterable[str]) -> bool:
    """Whether tensors of a build, safetensors or GGUF, are of multi-token prediction in any family."""
    marks = {(family.MTP_PREFIX, family.GGUF_MTP) for family in FAMILIES}
    return any(name.startswith(prefix) or mark in name for name in names for prefix, mark in marks)
