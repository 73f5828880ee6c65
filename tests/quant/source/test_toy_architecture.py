"""An architecture and a source of one's own, as CONTRIBUTING tells to write them: nothing in the package is touched.

    Toy      hidden 256, per layer a latent attention whose `kv_b` holds keys and values of each head one after another,
             and an MLP; in a GGUF keys and values are two tensors
    Arrays   its weights in memory, and its side files in a folder

Reference: the arrays themselves, split as the format says; the `gguf` package reads the GGUF. Not covered: that an
engine serves the toy, which none knows.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from converter_models import QWEN_ROWS, qwen_tokenizer
from gguf import GGUFValueType, Keys
from safetensors import safe_open
from safetensors.numpy import save_file

from ornith_moe.quant.conversion import prepare
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.source.architectures import Architecture, architecture
from ornith_moe.quant.source.architectures.architecture import Key
from ornith_moe.quant.source.architectures.weight import Cut, Place, Weight
from ornith_moe.quant.source.slab import Slab
from ornith_moe.quant.source.source import Source
from ornith_moe.quant.source.transforms import AddOne, Every, Transform
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import verify

CONFIG = {
    "model_type": "toy", "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": QWEN_ROWS, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 4, "key_dim": 32, "value_dim": 64, "max_position_embeddings": 64,
    "mtp_num_hidden_layers": 0,
}  # fmt: skip
BUILDS = ("bf16", "fp8-channel", "fp8-block", "gguf:Q8_0", "gguf:Q4_K_M")


class Toy(Architecture):
    """One toy config."""

    MODEL_TYPES = ("toy",)
    GGUF_NAMES = {  # noqa: RUF012
        "input_layernorm.weight": "attn_norm.weight",
        "mlp.up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
    }
    gguf_architecture = "toy"

    def __init__(self, config: dict):
        super().__init__(config)
        self.inner = self.text.integer("intermediate_size")
        self.keys, self.values = self.text.integer("key_dim"), self.text.integer("value_dim")

    def layer_weights(self, prefix: str, layer: int) -> Iterator[Weight]:
        heads = self.heads * (self.keys + self.values)
        yield Weight(f"{prefix}input_layernorm.weight", (self.hidden,), "norm", layer)
        yield Weight(f"{prefix}self_attn.kv_b_proj.weight", (heads, self.hidden), "attention", layer)
        yield Weight(f"{prefix}mlp.up_proj.weight", (self.inner, self.hidden), "mlp", layer)
        yield Weight(f"{prefix}mlp.down_proj.weight", (self.hidden, self.inner), "mlp", layer)

    def cut(self, weight: Weight) -> Cut | None:
        return {
            "kv_b_proj": Cut(((self.heads, self.keys + self.values),)),
            "up_proj": Cut(((self.inner, 1),)),
            "down_proj": Cut(((self.inner, 1),), by_columns=True),
        }.get(weight.leaf)

    def gguf_places(self, weight: Weight) -> tuple[Place, ...]:
        if weight.leaf != "kv_b_proj":
            norm = weight.name.endswith("input_layernorm.weight")
            return (self.gguf_place(weight, Transform(AddOne()) if norm else Transform()),)
        head = self.keys + self.values
        return tuple(
            Place(
                f"blk.{weight.layer}.attn_{part}_b.weight",
                (self.heads * size, self.hidden),
                transform=Transform(rows=Every(start, size, head)),
            )
            for part, start, size in (("k", 0, self.keys), ("v", self.keys, self.values))
        )

    def gguf_keys(self, mtp_layers: int) -> tuple[list[Key], list[Key]]:
        kv_heads = (self.kv_heads, GGUFValueType.UINT32)
        return [(Keys.LLM.BLOCK_COUNT, self.layers, GGUFValueType.UINT32), *self.gguf_common_keys(kv_heads)], []


@dataclass(frozen=True, kw_only=True)
class Arrays(Source):
    """Weights as fp32 arrays."""

    arrays: Mapping[str, np.ndarray]
    side_files: Path

    def dtype(self, index: int) -> str:
        return "F32"

    def read(self, index: int, start: int, rows: int) -> Slab:
        weight = self.weights[index]
        values = self.arrays[weight.name]
        matrix = values.reshape(-1, weight.shape[-1] if len(weight.shape) > 1 else 1)[start : start + rows]
        return Slab(np.ascontiguousarray(matrix).view(np.uint8), "F32")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(self.arrays[weight.name].tobytes() for weight in self.weights)).hexdigest()

    @property
    def folder(self) -> Path:
        return self.side_files


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    tokenizer, settings = qwen_tokenizer()
    for name, content in (
        ("config.json", CONFIG), ("tokenizer.json", tokenizer), ("tokenizer_config.json", settings),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    model, random = architecture(CONFIG), np.random.RandomState(0)
    weights = tuple(model.weights(model.prefix, vision=False, mtp=False))
    arrays = {weight.name: random.standard_normal(weight.shape).astype(np.float32) / 8 for weight in weights}
    return Arrays(
        name="toy", config=CONFIG, architecture=model, weights=weights, arrays=arrays, side_files=folder
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(toy, tmp_path_factory):
    report = convert(toy, tmp_path_factory.mktemp("builds"), BUILDS)
    return {build.build: build.path for build in report.builds}


def stored(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a GGUF as the `gguf` package decodes them."""
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


def test_a_toy_becomes_every_kind_of_build(toy, built):
    assert built.keys() == set(BUILDS)
    for path in built.values():
        result = verify(path, toy)
        assert result.ok and result.roles.keys() >= {"attention", "mlp", "embedding", "norm"}, result.problems


def test_one_weight_lies_in_two_tensors(toy, built):
    """Head by head, keys before values in Hugging Face's tensor and apart in the GGUF; Q8_0 is within half a step."""
    found = stored(built["gguf:Q8_0"])
    for layer in range(2):
        heads = toy.arrays[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].reshape(4, 96, 256)
        for part, truth in (("k", heads[:, :32]), ("v", heads[:, 32:])):
            truth = truth.reshape(-1, 256)
            got = found.pop(f"blk.{layer}.attn_{part}_b.weight")
            assert got.shape == truth.shape and np.abs(got - truth).max() <= np.abs(truth).max() / 127
    norms = toy.arrays["model.layers.0.input_layernorm.weight"]
    assert np.array_equal(found["blk.0.attn_norm.weight"], norms + np.float32(1))
    assert not [name for name in found if "_b." in name]


def test_slabs_and_jobs_change_no_byte_of_a_part(toy, built, tmp_path, monkeypatch):
    """A slab has 128 rows at least: it begins within a head of 96."""
    monkeypatch.setattr(prepare, "MAX_SLAB_BYTES", 1)
    convert(toy, tmp_path, ["gguf:Q8_0"], jobs=2)
    assert (tmp_path / "toy-Q8_0.gguf").read_bytes() == built["gguf:Q8_0"].read_bytes()


def test_a_folder_gives_the_bytes_that_arrays_give(toy, built, tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    for file in toy.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(dict(toy.arrays), folder / "model.safetensors")
    report = convert(open_source(folder), tmp_path / "out", BUILDS)
    for build in report.builds:
        files = sorted(built[build.build].iterdir()) if build.path.is_dir() else [built[build.build]]
        for file in files:
            other = build.path / file.name if build.path.is_dir() else build.path
            assert other.read_bytes() == file.read_bytes(), (build.build, file.name)


def test_a_part_that_goes_nowhere_or_elsewhere_is_seen(toy, built):
    class Keys(Toy):
        MODEL_TYPES = ()

        def gguf_places(self, weight: Weight) -> tuple[Place, ...]:
            return super().gguf_places(weight)[:1]

    class Swapped(Toy):
        MODEL_TYPES = ()

        def gguf_places(self, weight: Weight) -> tuple[Place, ...]:
            places = super().gguf_places(weight)
            late = Transform(rows=Every(16, self.keys, self.keys + self.values))
            return tuple(replace(place, transform=late) if "attn_k_b" in place.name else place for place in places)

    for kind, sentence in ((Keys, "nowhere in the build"), (Swapped, "below the floor")):
        result = verify(built["gguf:Q8_0"], replace(toy, architecture=kind(CONFIG)))
        assert any(sentence in problem for problem in result.problems), result.problems


def test_fp8_blocks_are_named_after_weights(built):
    with safe_open(built["fp8-block"] / "model.safetensors", "np") as file:
        names = set(file.keys())
    assert "model.layers.0.self_attn.kv_b_proj.weight_scale_inv" in names
