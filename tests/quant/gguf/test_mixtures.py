"""Which type each tensor gets: ours against llama-quantize's own answer, for every tensor of six models.

Reference: `llama_quantize_types.json`, recorded from llama.cpp's `llama_model_quantize` in a dry run over GGUF files of
the models' full shapes (sparse files: it reads headers alone): three published Qwen3.5 models, Gemma 4, one with eight
experts and one whose columns do not divide, in every file type, with and without an importance matrix, and with lists
of tensor types. In the record, `rest` is the type of all tensors not named, "attn_qkv:0-4,8" means those layers, and
`vectors` are F32 in every file type. Not covered: architectures other than these.
"""

import json
from functools import cache
from importlib import resources
from pathlib import Path

import pytest

from ornith_moe.quant.gguf.mixtures import FILE_TYPES, tensor_types
from ornith_moe.quant.gguf.tensor_types import parse_asked_types
from ornith_moe.quant.source.weights import open_source, source_from_config

RECORD = json.loads(Path(__file__).with_name("llama_quantize_types.json").read_text("utf-8"))


@cache
def source_of(name):
    changes = {
        "eight-experts": ("ornith-1.0-35b", {"num_experts": 8}),
        "odd-columns": ("ornith-1.0-9b", {"intermediate_size": 12288 + 96, "hidden_size": 4096 - 160}),
    }
    if name not in changes:
        return open_source(name)
    preset, change = changes[name]
    config = json.loads(resources.files("ornith_moe.quant.source").joinpath(f"presets/{preset}.json").read_bytes())
    config["text_config"] |= change
    config.pop("vision_config")
    return source_from_config(config, name=name)


@cache
def shapes_of(name):
    source = source_of(name)
    model = source.architecture
    shapes = {place.name: place.shape for weight in source.weights for place in model.gguf_places(weight)}
    return shapes | {name: (len(values),) for name, values in model.gguf_constants().items()}


def decided(name, file_type, **options):
    source = source_of(name)
    model = source.architecture
    options |= {"layers": source.layers, "experts": model.experts, "gqa": model.heads // model.kv_heads}
    return tensor_types(shapes_of(name).items(), FILE_TYPES[file_type], **options)[0]


def expand(entry, names):
    """{tensor: type} of one line of the record."""
    types = dict.fromkeys(names, entry["rest"])
    for kind, places in entry.items():
        for place in places.split() if kind != "rest" else ():
            name, _, layers = place.partition(":")
            blocks = []
            for span in filter(None, layers.split(",")):
                first, _, last = span.partition("-")
                blocks += range(int(first), int(last or first) + 1)
            stems = [f"blk.{block}.{name}" for block in blocks] or [name]
            found = [full for stem in stems for full in (stem, f"{stem}.weight") if full in types]
            assert len(found) == len(stems), place
            types |= dict.fromkeys(found, kind)
    return types


@pytest.mark.parametrize("model", RECORD["models"])
def test_every_tensor_gets_what_llama_quantize_gives_it(model):
    record = RECORD["models"][model]
    for file_type in FILE_TYPES:
        for imatrix in (False, True):
            entry = (imatrix and record.get(f"{file_type} imatrix")) or record[file_type]
            entry = entry | {"F32": f"{entry.get('F32', '')} {record['vectors']}"}
            types = decided(model, file_type, imatrix=imatrix)
            assert types == expand(entry, types), (file_type, imatrix)


@pytest.mark.parametrize("number", range(len(RECORD["recipes"])))
def test_recipes_mean_what_llama_quantize_means_by_them(number):
    case = RECORD["recipes"][number]
    asked = parse_asked_types(
        case["patterns"],
        token_embedding_type=case["token_embedding_type"],
        output_tensor_type=case["output_tensor_type"],
    )
    types = decided(case["model"], case["file_type"], asked=asked)
    assert types == expand(case["types"], types)


def test_the_record_has_the_sensitive_cases():
    """A record of one type everywhere would prove nothing."""
    names = [f"{name}{with_}" for name in FILE_TYPES for with_ in ("", " imatrix")]
    models = RECORD["models"]
    assert all(set(record) <= {*names, "vectors"} for record in models.values())
    assert "Q4_0 imatrix" in models["ornith-1.0-9b"] and "IQ4_XS imatrix" in models["ornith-1.0-9b"]
    assert "attn_output" in models["eight-experts"]["Q3_K_S"]["Q5_K"]
    assert models["odd-columns"]["Q4_K_M"]["rest"] == "Q5_0"


def test_what_a_user_decides_does_not_count():
    """A value tensor with a type of its own passes its place among the first two to the next one."""
    plain = decided("ornith-1.0-9b", "Q3_K_M")
    asked = decided("ornith-1.0-9b", "Q3_K_M", asked=parse_asked_types([r"blk\.0\.attn_qkv=q8_0"]))
    changed = {name: kind for name, kind in asked.items() if plain[name] != kind}
    assert changed == {"blk.0.attn_qkv.weight": "Q8_0", "blk.2.attn_qkv.weight": "Q5_K"}


@pytest.mark.parametrize("name", FILE_TYPES)
def test_file_types_have_llama_cpps_numbers(name):
    assert FILE_TYPES[name].id in range(0, 64)
    assert FILE_TYPES["Q4_K_M"].id == 15 and FILE_TYPES["MXFP4_MOE"].id == 38
