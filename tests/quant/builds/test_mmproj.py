"""gguf:mmproj: what it takes and refuses, and an image that llama.cpp sees as transformers does.

Reference: transformers in fp32 on the same image, with patches cut here. Bytes and keys against llama.cpp's converter:
tests/quant/gguf/test_converter.py; sizes of published files: test_planning.py. Not covered: images that are resized.
"""

import base64
import json
import secrets
import shutil
import struct
import zlib

import fixtures
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from ornith_moe.clients import open_client, quiet_transformers
from ornith_moe.quant.builds.build import BUILDS
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.conversion import prepare
from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.errors import CheckpointError, OrnithError, PlanError
from ornith_moe.quant.source.architectures.weight import Settings
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.inspect import inspect
from ornith_moe.quant.verification.verify import verify

MEAN, STD = [0.5, 0.25, 0.375], [0.5, 0.625, 0.75]
ALL = [name for name in BUILDS if "mmproj" in name]
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def with_tower(folder, make=fixtures.qwen35moe, **options):
    """A checkpoint that has seen images: a tower, its preprocessor, and the tokens around an image."""
    make(folder, vision=True, **options)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    tokenizer = fixtures.qwen_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in VISION_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_tower(tmp_path_factory.mktemp("model") / "model", experts=4, mtp=True)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    report = convert(open_source(model), tmp_path_factory.mktemp("out"), [*ALL, "gguf:Q8_0"])
    return {build.build: build for build in report.builds}


def test_it_is_verified_inspected_and_recognized(model, made, tmp_path):
    source = open_source(model)
    for name in ALL:
        path = made[name].path
        assert path.name == f"mmproj-model-{name.partition('-')[2] or 'BF16'}.gguf"
        result = verify(path, source)
        assert result.ok and result.build == name and result.roles.keys() == {"vision"}, result.problems
        (left_out,) = result.left_out
        assert len(left_out.names) == len(source.tensor_sizes()) - 33 and "mmproj" in left_out.reason
        alone = shutil.copy(path, tmp_path)
        assert verify(alone, source).build == name and verify(alone).ok, "without its manifest"
        assert inspect(path)["tensors"] == 34 and inspect(path)["metadata"]["clip.vision.image_std"] == STD
    text = made["gguf:Q8_0"]
    assert verify(text.path, source).build == "gguf:Q8_0"
    assert any("gguf:mmproj makes" in note for note in text.notes)


def test_a_frame_of_the_convolution_is_a_tensor(model, made):
    weight = load_file(model / "model.safetensors")["model.visual.patch_embed.proj.weight"]
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(made["gguf:mmproj"].path).tensors}
    for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        assert np.array_equal(stored[name].reshape(64, 3, 4, 4), weight[:, :, frame].float().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_slabs_and_jobs_change_no_byte_of_any_source(tmp_path, monkeypatch, dtype):
    source = open_source(with_tower(tmp_path / "model", fixtures.qwen35, dtype=dtype))
    first = convert(source, tmp_path / "first", ALL)
    monkeypatch.setattr(prepare, "MAX_SLAB_BYTES", 1)
    second = convert(source, tmp_path / "second", ALL, jobs=3)
    for one, other in zip(first.builds, second.builds, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes() and verify(one.path, source).ok, one.build


def test_alone_it_reads_the_tower_alone(model, tmp_path):
    source = open_source(model)
    tower = sum(2 * np.prod(weight.shape) for weight in source.weights if weight.role == "vision")
    assert convert(source, tmp_path, ["gguf:mmproj"]).bytes_read == tower


def test_what_f16_cannot_hold_is_said_and_a_nan_may_stay(tmp_path):
    folder = with_tower(tmp_path / "model", fixtures.qwen35)
    tensors = load_file(folder / "model.safetensors")
    name = "model.visual.blocks.1.attn.qkv.weight"
    save_file(tensors | {name: tensors[name].index_fill(0, torch.tensor([5]), 1e6)}, folder / "model.safetensors")
    with pytest.raises(OrnithError, match=r"F16.*make gguf:mmproj or gguf:mmproj-F32 of it") as failed:
        convert(open_source(folder), tmp_path / "large", ["gguf:mmproj-F16", "gguf:mmproj", "gguf:mmproj-F32"])
    assert [build.build for build in failed.value.report.builds] == ["gguf:mmproj", "gguf:mmproj-F32"]
    save_file(tensors | {name: tensors[name].index_fill(0, torch.tensor([5]), torch.nan)}, folder / "model.safetensors")
    for build in convert(open_source(folder), tmp_path / "nan", ALL, non_finite="keep-bf16").builds:
        result = verify(build.path, open_source(folder))
        assert result.ok and any("v.blk.1.attn_qkv.weight holds a NaN" in note for note in result.notes), build.build


def test_what_has_no_mmproj_says_so(tmp_path, monkeypatch):
    with pytest.raises(PlanError, match="has no vision tower, of which gguf:mmproj is made; leave gguf:mmproj out"):
        plan_build(open_source(fixtures.qwen35(tmp_path / "text")), "gguf:mmproj")
    source = open_source("gemma-4-31b")
    monkeypatch.setattr(type(source.architecture), "HAS_MMPROJ", False)
    with pytest.raises(PlanError, match="model_type gemma4 is none that is written as an mmproj yet; leave"):
        plan_build(source, "gguf:mmproj")
    assert not any("mmproj" in note for note in plan_build(source, "gguf:Q8_0").notes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pooling_kernel_size": 4}, r"vision_config: pooling_kernel_size is 4, and 3 alone is known to llama\.cpp"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu', and 'gelu_pytorch_tanh' alone"),
        ({"rope_parameters": {"rope_theta": 1e4}}, r"rope_parameters: rope_theta is 10000\.0, and 100 alone"),
    ],
)
def test_what_clip_has_no_key_for_must_be_as_published(change, sentence):
    """Of Gemma 4; sizes are those of the 31B."""
    model = open_source("gemma-4-31b").architecture
    assert ("clip.vision.block_count", 27) in [key[:2] for key in model.mmproj_keys(model.vision, MEAN, STD)]
    vision = Settings(model.vision.values | change, model.vision.where)
    with pytest.raises(PlanError, match=sentence):
        model.mmproj_keys(vision, MEAN, STD)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temporal_patch_size": 3}, "temporal_patch_size is 3"),
        ({"num_position_embeddings": 63}, "num_position_embeddings to be a square, got 63"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not gelu"),
        ({"deepstack_visual_indexes": [1]}, "deepstack_visual_indexes name blocks"),
        ({"num_heads": None}, "num_heads to be an integer"),
    ],
)
def test_a_tower_that_llama_cpp_does_not_know_is_refused(model, tmp_path, change, sentence):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for key, rows in (
        ("patch_embed.proj.weight", None),
        ("pos_embed.weight", config["vision_config"]["num_position_embeddings"]),
    ):
        name = f"model.visual.{key}"
        whole = tensors[name][:rows]
        tensors[name] = (
            whole[:, :, :1].repeat(1, 1, 3, 1, 1) if "temporal_patch_size" in change and rows is None else whole
        )
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(OrnithError, match=sentence):
        convert(open_source(folder), tmp_path / "out", ["gguf:mmproj"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        None, "[]", "{}", '{"image_mean": [0.5, 0.5, 0.5]}', '{"image_mean": 0.5, "image_std": 0.5}',
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0]}',
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5]}',
        '{"image_mean": [0.5, 0.5, true], "image_std": [1, 1, 1]}',
        '{"image_mean": [0.5, 0.5, 1e400], "image_std": [1, 1, 1]}', '{"image_mean": ' * 99,
    ],
)  # fmt: skip
def test_a_preprocessor_that_says_no_mean_is_one_sentence(model, tmp_path, content):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    if content is not None:
        (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json") as refused:
        convert(open_source(folder), tmp_path / "out", ["gguf:mmproj"])
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_the_processor_goes_before_the_preprocessor(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    inner = {"image_processor": {"image_mean": [1, 2, 3], "image_std": STD}}
    (folder / "processor_config.json").write_text(json.dumps(inner))
    (build,) = convert(open_source(folder), tmp_path / "out", ["gguf:mmproj"]).builds
    assert inspect(build.path)["metadata"]["clip.vision.image_mean"] == [1, 2, 3]


def png(image: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*one) for one in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def llama_cpp_sees(text, tower, image) -> np.ndarray:
    """log P of the next token after an image and a word, of every token."""
    llama = pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp's Python binding")
    settings = llama.CommonParams()
    settings.model.path, settings.mmproj.path, settings.mmproj_use_gpu = str(text), str(tower), False
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 512, 1, 0
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup = settings.fit_params = False
    settings.verbosity, settings.api_keys = -1, [secrets.token_hex(16)]
    url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    answer = llama.Server(settings).handle_chat_completions(
        {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "logprobs": True, "top_logprobs": 9999}
    )
    listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return np.array([one["logprob"] for one in sorted(listed, key=lambda one: one["id"])])


def transformers_sees(folder, image) -> np.ndarray:
    from transformers import Qwen3_5ForConditionalGeneration

    with quiet_transformers():
        model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = fixtures.qwen_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in VISION_TOKENS])
    model.model.config.image_token_id = pad = tokenizer.token_to_id("<|image_pad|>")
    height, width = image.shape[0] // 4, image.shape[1] // 4
    pixels = (torch.from_numpy(image).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    patches = pixels.permute(2, 0, 1).expand(2, 3, *image.shape[:2])  # a picture is a film of two equal frames
    patches = patches.reshape(1, 2, 3, height // 2, 2, 4, width // 2, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    seen = "<|vision_start|>" + "<|image_pad|>" * (height * width // 4) + "<|vision_end|>"
    tokens = tokenizer.encode(f"<|im_start|>user\n{seen}what?<|im_end|>\n<|im_start|>assistant\n<think>\n").ids
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([tokens]),
            pixel_values=patches.reshape(height * width, -1),
            image_grid_thw=torch.tensor([[1, height, width]]),
            mm_token_type_ids=(torch.tensor([tokens]) == pad).int(),
        ).logits
    return torch.log_softmax(logits[0, -1].double(), -1).numpy()


def test_llama_cpp_sees_what_transformers_sees(tmp_path):
    """Measured: 0.015 between the two, 17 between two images."""
    folder = with_tower(tmp_path / "model", fixtures.qwen35)
    text, tower = (build.path for build in convert(open_source(folder), tmp_path, ["gguf:F32", "gguf:mmproj"]).builds)
    image, other = np.random.RandomState(0).randint(0, 256, (2, 32, 48, 3), np.uint8)
    p, q = transformers_sees(folder, image), llama_cpp_sees(text, tower, image)
    assert np.abs(p - q).max() < 0.1 and p.argmax() == q.argmax()
    assert np.abs(p - transformers_sees(folder, other)).max() > 1, "images that differ, or the comparison shows nothing"
    with pytest.raises(CheckpointError, match="is the vision tower of a model, which answers nothing by itself"):
        open_client(tower)
