"""Remedies of messages about a checkpoint: its files, tensors, config and multi-token prediction."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from remedies import NORM, edit, follows, made, refused, say, tiny
from safetensors.torch import load_file, save_file

from ornith_moe.quant.conversion.convert import convert
from ornith_moe.quant.opening import open_any
from ornith_moe.quant.source.weights import open_source
from ornith_moe.quant.verification.verify import open_against, verify

HEAD = "lm_head.weight"


@pytest.fixture
def m(tmp_path):
    return tiny(tmp_path / "m")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@follows("so mend the checkpoint first")
def test_a_nan_is_mended(m, out):
    before = edit(m, lambda t: t.update({NORM: torch.full_like(t[NORM], float("nan"))}))
    refused("expected finite weights, so mend the checkpoint first", made, m, out)
    save_file(before, m / "model.safetensors")
    made(m, out)


@follows("{}; mend the checkpoint first")
def test_a_value_beyond_bf16_is_mended(tmp_path, out):
    m = tiny(tmp_path / "m", torch.float32)
    before = edit(m, lambda t: t.update({NORM: torch.full_like(t[NORM], 3.4e38)}))
    refused("is beyond BF16; mend the checkpoint first", made, m, out)
    save_file(before, m / "model.safetensors")
    made(m, out)


@follows("is a link that leaves the folder; copy the file into it")
def test_a_linked_file_is_copied(m, out):
    (m / "tokenizer.json").rename(m.parent / "t.json")
    (m / "tokenizer.json").symlink_to("../t.json")
    refused("copy the file into it", made, m, out)
    (m / "tokenizer.json").unlink()
    shutil.copy(m.parent / "t.json", m / "tokenizer.json")
    made(m, out, ["bf16", "gguf:BF16"])


@follows("{}: is a link; copy the folder into its place")
def test_a_linked_folder_is_copied(m, out):
    (m.parent / "t").mkdir()
    (m.parent / "t" / "rag.jinja").write_text("{{ messages }}")
    (m / "additional_chat_templates").symlink_to("../t")
    refused("copy the folder into its place", made, m, out)
    (m / "additional_chat_templates").unlink()
    shutil.copytree(m.parent / "t", m / "additional_chat_templates")
    made(m, out)


@follows("its name is not UTF-8, which no manifest can hold; rename it")
def test_a_file_is_renamed(m, out):
    path = Path(os.fsdecode(bytes(m) + b"/LICENSE\xff"))
    path.write_text("x")
    refused("rename it", made, m, out)
    path.rename(m / "LICENSE")
    made(m, out)


@follows(
    "merge_and_unload(), save_pretrained(), and convert that folder",
    "convert its base model with --lora {}",
    "; merge it with peft and convert the merged folder",
    "; give the base model that the adapter was trained on",
)
@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_merged(tmp_path, out, whole):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = tiny(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    folder = tmp_path / "adapter"
    if whole:  # saved without merging
        folder = Path(shutil.copytree(base, folder))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    else:
        model.save_pretrained(folder)
    refused("merge_and_unload(), save_pretrained(), and convert that folder", open_source, folder)
    if not whole:
        refused("convert its base model with --lora", open_source, folder)
        convert(open_any(base, lora=folder), tmp_path / "with", ["bf16"])
        larger = tiny(tmp_path / "larger", hidden_size=128)
        refused("give the base model that the adapter was trained on", open_any, larger, lora=folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
        refused("merge it with peft and convert the merged folder", open_any, base, lora=folder)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    made(tmp_path / "merged", out)


@follows("give one of the folders in its snapshots/")
def test_a_snapshot_is_given(m, tmp_path, out):
    repository = tmp_path / "models--org--name"
    shutil.copytree(m, repository / "snapshots" / "abc")
    refused("give one of the folders in its snapshots/", open_source, repository)
    made(repository / "snapshots" / "abc", out)


@follows(
    "truncated, fetch it again", "not a whole safetensors file", "not a whole GGUF: {} (near byte {}); fetch it again"
)
def test_a_damaged_file_is_fetched_again(m, out):
    from ornith_moe.quant.verification.inspect import inspect

    whole = (m / "model.safetensors").read_bytes()
    for cut, words in ((-9, "truncated, fetch it again"), (40, "; fetch it again")):
        (m / "model.safetensors").write_bytes(whole[:cut])
        refused(words, open_source, m)
    (m / "model.safetensors").write_bytes(whole)
    path = made(m, out, ["gguf:BF16"]).builds[0].path
    whole = path.read_bytes()
    path.write_bytes(whole[:999])
    refused("; fetch it again", inspect, path)
    path.write_bytes(whole)
    assert inspect(path)["tensors"] > 10


@follows("give its checkpoint folder, whose tensors can, or the BF16 original")
def test_the_folder_of_a_stale_quantization_is_given(m, out):
    say(m, quantization_config={"quant_method": "awq"})
    refused("give its checkpoint folder", open_source, m / "config.json")
    made(m, out)


@follows("convert from its BF16 original", "use its BF16 original")
def test_the_original_is_converted(m, out, tmp_path):
    built = made(m, out, ["fp8-channel"]).builds[0].path
    scale = "model.layers.1.self_attn.q_proj.weight_scale"
    edit(built, lambda t: t.pop(scale))
    refused("use its BF16 original", open_source, built)
    edit(built, lambda t: t.update({"x_scale": t["lm_head.weight"].clone()}))
    say(built, quantization_config={"quant_method": "awq"})
    refused("convert from its BF16 original", open_source, built)
    packed = Path(shutil.copytree(m, tmp_path / "packed"))
    edit(packed, lambda t: t.update({NORM: t[NORM].to(torch.float8_e5m2)}))
    refused("use its BF16 original", open_source, packed)
    made(m, out, ["bf16"])


@follows("expected a positive number, so fetch the checkpoint again")
def test_a_damaged_scale_is_fetched_again(m, out, tmp_path):
    built = made(m, out, ["fp8-channel"]).builds[0].path
    scale = "model.layers.1.self_attn.q_proj.weight_scale"
    before = edit(built, lambda t: t.update({scale: t[scale] * 0}))
    refused("so fetch the checkpoint again", made, built, tmp_path / "bf16")
    save_file(before, built / "model.safetensors")
    made(built, tmp_path / "bf16")


@follows(
    "fetch or save shards and index of one model",
    "fetch them all and the index",
    "which tell which of them are the model; fetch the index too",
)
def test_shards_and_their_index_are_fetched(tmp_path, out):
    sound = tiny(tmp_path / "m", shards=3)

    def spoilt(change):
        folder = tmp_path / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        change(folder)
        return folder

    first, second, third = (f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3))
    lost = spoilt(lambda f: edit(f, lambda t: t.pop(min(t)), first))
    refused("but the shard does not hold it; fetch or save shards and index of one model", open_source, lost)
    refused("fetch or save shards and index of one model", open_source, spoilt(lambda f: (f / second).unlink()))
    index = "model.safetensors.index.json"
    refused("fetch the index too", open_source, spoilt(lambda f: (f / index).unlink()))
    alone = spoilt(lambda f: [(f / name).unlink() for name in (index, second, third)])
    refused("fetch them all and the index", open_source, alone)
    for file in (index, first, second, third):
        shutil.copy(sound / file, alone)
    made(alone, out)


@follows("as {} does; keep one of them", "are both {}; keep one of them")
def test_one_of_two_tensors_is_kept(tmp_path, m, out):
    sharded, buffer = tiny(tmp_path / "s", shards=2), "model.rotary_emb.inv_freq"
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        edit(sharded, lambda t: t.update({buffer: torch.ones(4)}), name)
    refused("does; keep one of them", open_source, sharded)
    edit(sharded, lambda t: t.pop(buffer), names[0])
    made(sharded, out)
    edit(m, lambda t: t.update({f"module.{NORM}": t[NORM].clone()}))
    refused("; keep one of them", open_source, m)
    edit(m, lambda t: t.pop(f"module.{NORM}"))
    made(m, out / "m")


@follows("is there on its own and inside {}; keep one")
def test_one_form_of_an_expert_is_kept(m, out):
    weight = next(w for w in open_source(m).weights if w.packed)
    edit(m, lambda t: t.update({weight.packed.name: torch.zeros(weight.packed.shape, dtype=torch.bfloat16)}))
    refused("; keep one", open_source, m)
    edit(m, lambda t: t.pop(weight.packed.name))
    made(m, out)


@follows("says tie_word_embeddings false, so transformers would begin")
def test_the_head_is_said_to_be_tied(m, out):
    edit(m, lambda t: t.pop(HEAD))
    refused("say tie_word_embeddings true in config.json", open_source, m)
    say(m, tie_word_embeddings=True)
    made(m, out)


@follows("move away the files that are not of the model")
def test_the_files_of_another_save_are_moved_away(tmp_path, out):
    m = tiny(tmp_path / "m", shards=2)
    part = load_file(m / "model-00001-of-00002.safetensors")
    rest = load_file(m / "model-00002-of-00002.safetensors")
    save_file({name: t for name, t in (part | rest).items() if name != NORM}, m / "model.safetensors")
    refused("move away the files that are not of the model", open_source, m)
    (m / "model.safetensors").unlink()
    made(m, out)


@follows("{} files are not read, convert them to safetensors first")
def test_a_pickle_is_converted(m, out):
    torch.save(load_file(m / "model.safetensors"), m / "pytorch_model.bin")
    (m / "model.safetensors").unlink()
    refused("convert them to safetensors first", open_source, m)
    save_file(torch.load(m / "pytorch_model.bin", weights_only=True), m / "model.safetensors")
    made(m, out)


@follows("--name {}: expected 1 to {} bytes")
def test_another_name_is_given(m):
    refused("expected 1 to 200 bytes of printable characters without /", open_any, m, name="a/b")
    assert open_any(m, name="a-b").name == "a-b"


# Multi-token prediction


@pytest.fixture
def with_mtp(tmp_path):
    return tiny(tmp_path / "m", mtp="keep", mtp_num_hidden_layers=1)


@follows(
    "; --mtp drop leaves multi-token prediction out",
    "config.json says {} 0; --mtp drop leaves them out",
    "; --mtp keep takes it from {}",
)
def test_mtp_is_dropped_or_taken_from_where_it_is(with_mtp, out):
    whole = edit(with_mtp, lambda t: t.update({"mtp.norm.weight": t["mtp.norm.weight"][:3]}))
    refused("--mtp drop leaves multi-token prediction out", open_source, with_mtp)
    made(with_mtp, out / "a", mtp="drop")
    norm = {"mtp.norm.weight": whole.pop("mtp.norm.weight")}
    save_file(whole, with_mtp / "model.safetensors")
    save_file(norm, with_mtp / "extra.safetensors")
    refused("--mtp keep takes it from extra.safetensors; --mtp drop", open_source, with_mtp)
    made(with_mtp, out / "b", mtp="keep")
    made(with_mtp, out / "c", mtp="drop")
    save_file(whole | norm, with_mtp / "model.safetensors")
    say(with_mtp, mtp_num_hidden_layers=0)
    refused("--mtp drop leaves them out", open_source, with_mtp)
    made(with_mtp, out / "d", mtp="drop")


@follows("no tensor named {}* is here; leave the option out", "announces no MTP layer; leave the option out")
def test_the_option_is_left_out(m, out):
    for source in (m, m / "config.json"):
        refused("leave the option out", open_source, source, mtp="keep")
        assert not open_source(source).has_mtp


@follows("and no index says which counts; move one of them away")
def test_one_of_two_files_is_moved_away(with_mtp, out):
    whole = edit(with_mtp, lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")])
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: t for name, t in whole.items() if name.startswith("mtp.")}, with_mtp / file)
    refused("move one of them away", open_source, with_mtp, mtp="keep")
    (with_mtp / "a.safetensors").unlink()
    made(with_mtp, out, mtp="keep")


@follows("llama.cpp reads one MTP layer and the config has {}; pass --mtp drop")
def test_two_layers_of_mtp_are_dropped(tmp_path, out):
    m = tiny(tmp_path / "m", mtp="keep", mtp_num_hidden_layers=2)
    refused("pass --mtp drop", made, m, out, ["gguf:BF16"])
    made(m, out, ["gguf:BF16"], mtp="drop")


@follows("whose tensors may not exist: left out, --mtp keep counts them")
def test_layers_that_a_config_announces_are_counted(with_mtp):
    with_config = with_mtp / "config.json"
    assert any("--mtp keep counts them" in note for note in open_source(with_config).notes)
    assert open_source(with_config, mtp="keep").has_mtp


@follows(
    "leave one of them out",
    "give a checkpoint that has multi-token prediction",
    "; give a checkpoint of the same architecture and size",
    "give the same with {}",
)
def test_another_donor_is_given(m, out, tmp_path):
    donor = tiny(tmp_path / "donor", mtp="keep", mtp_num_hidden_layers=1)
    larger = tiny(tmp_path / "larger", mtp="keep", mtp_num_hidden_layers=1, num_experts=4)
    refused("leave one of them out", open_any, m, mtp="drop", mtp_from=donor)
    refused("give a checkpoint that has multi-token prediction", open_any, m, mtp_from=m)
    refused("give a checkpoint of the same architecture and size", open_any, m, mtp_from=larger)
    path = convert(open_any(m, mtp_from=donor), out, ["bf16"]).builds[0].path
    refused("give the same with --mtp-from", open_against, path, m)
    assert verify(path, open_against(path, m, mtp_from=donor)).ok


@follows(
    "copy config.json and the tokenizer's files of its model there",
    "copy the config.json of its model there",
    "so copy the config.json of its ",
    "; give a GGUF of BF16, F16, F32 or Q8_0",
)
def test_what_a_gguf_lacks_is_copied_beside_it(m, out):
    path, coarse = (build.path for build in made(m, out, ["gguf:BF16", "gguf:Q4_0"]).builds)
    refused("copy config.json and the tokenizer's files of its model there", open_any, path)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(m / name, out)
    refused("give a GGUF of BF16, F16, F32 or Q8_0", open_any, coarse)
    for other in (
        {"model_type": "qwen3_5_text", "intermediate_size": 64},
        {"num_experts": 3},
        {"num_hidden_layers": 1, "layer_types": None},
    ):
        say(out, **other)
        refused("copy the config.json of its model there", open_any, path)
        shutil.copy(m / "config.json", out)
    convert(open_any(path), out / "more", ["bf16"])
