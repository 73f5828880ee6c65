"""Hostile inputs, made from sound ones: each class takes a valid structure, changes it in a few places, and writes it
back in one of the ways in which files are broken.

An input is named by (seed, class, number) and made by `make`, in an empty folder, with nothing from outside: the same
three give the same files and the same arguments on every machine.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from fixtures import QWEN_TEMPLATE, qwen_tokenizer
from fuzz.change import NAMES, NUMBERS, change, damaged, written
from gguf import GGUFValueType as Type

from ornith_moe.quant.conversion.convert import PARTIAL
from ornith_moe.quant.gguf.header import Entry, gguf_header, padded
from ornith_moe.quant.source.weights import source_from_config

CONFIG = {
    "model_type": "qwen3_5_moe_text",
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "vocab_size": 520,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "mtp_num_hidden_layers": 0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
GEMMA = {
    "model_type": "gemma4_text",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 520,
    "head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "per_layer_config": {"00001": {"head_dim": 64, "num_key_value_heads": 1}},
}
VISION = {"model_type": "qwen3_5_moe", "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2}}
TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen2TokenizerFast",
    "bos_token": None,
    "eos_token": {"content": "<|im_end|>"},
    "pad_token": "<|endoftext|>",
    "add_bos_token": False,
    "model_max_length": 10**30,
    "chat_template": QWEN_TEMPLATE,
    "added_tokens_decoder": {"515": {"content": "<extra>", "special": True}},
}
BUILDS = ("fp8-block", "fp8-channel", "bf16", "gguf:Q4_K_M", "gguf:Q8_0", "gguf:BF16", "gguf:IQ2_XXS", "gguf:F32")


class Inputs:
    """Makes inputs in `root`/case; `root`/base holds the sound checkpoint, whole and in three shards, and a build."""

    def __init__(self, root: Path, run: Callable[[list[str]], dict]):
        self.base, self.folder = root / "base", root / "case"
        _write_base(self.base)
        builds = ("--to", "bf16", "--to", "gguf:BF16", "--to", "fp8-channel")
        built = run(["convert", str(self.base / "m"), str(self.base / "out"), *builds, "--jobs", "1"])
        assert built["outcome"] == "ok", built

    def make(self, seed: int, kind: str, number: int) -> list[str]:
        """Write input `number` of class `kind` into the folder and give the arguments of the command."""
        random = Random(f"{seed} {kind} {number}")
        self.empty()
        return [str(word).replace("\0", "0") for word in CLASSES[kind](self, random)]

    def empty(self) -> Path:
        """The folder of inputs, with nothing but the sound checkpoint `m`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.m = self.folder / "in" / "m"
        shutil.copytree(self.base / "m", self.m)
        return self.m.parent

    # One method for each class

    def headers(self, random: Random) -> list:
        path = self.m / "model.safetensors"
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        text, payload = written(change(header, random), random), raw[8 + length :]
        length = random.choice([len(text)] * 8 + [0, len(text) + 1, 2**63, 10**8, 2**64 - 1])
        if random.random() < 0.1:
            payload = payload[: random.randrange(len(payload))] + b"x" * random.randrange(3)
        path.write_bytes(struct.pack("<Q", length) + text + payload)
        return random.choice(
            [["inspect", path], ["inspect", self.m], ["plan", self.m, "--to", "bf16"], ["verify", self.m]]
        )

    def configs(self, random: Random) -> list:
        config = random.choice([CONFIG, CONFIG, GEMMA, VISION | {"text_config": CONFIG}])
        path = self.m / "config.json"
        path.write_bytes(written(change(config, random), random))
        mtp = random.choice([[], [], ["--mtp", "keep"], ["--mtp", "drop"]])
        return random.choice(
            [
                ["plan", path, "--to", random.choice(BUILDS), *mtp],
                ["plan", self.m, "--to", random.choice(BUILDS), *mtp],
                ["inspect", self.m, "--json"],
                ["verify", self.m],
            ]
        )

    def quantized(self, random: Random) -> list:
        """An FP8 source with its config, its header or one scale changed."""
        folder = shutil.copytree(self.base / "out" / "fp8-channel", self.folder / "in" / "q")
        shutil.copy(self.m / "tokenizer.json", folder)
        config, path = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
        if random.random() < 0.5:
            section = change(config["quantization_config"], random)
            (folder / "config.json").write_bytes(written(config | {"quantization_config": section}, random))
        else:
            raw = bytearray(path.read_bytes())
            length = struct.unpack("<Q", raw[:8])[0]
            header = json.loads(raw[8 : 8 + length])
            name = random.choice([name for name in header if name.endswith("_scale")])
            if random.random() < 0.5:
                entry = header.pop(name)
                header[random.choice([name, f"{name}_inv", "x_scale", name.replace("weight", "input")])] = {
                    **entry,
                    "dtype": random.choice(["BF16", "F16", "I16", "F32", "U8"]),
                    "shape": random.choice([entry["shape"], entry["shape"][:1], [], [1], [2, *entry["shape"]]]),
                }
                text = json.dumps(header).encode()
                path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
            else:
                start = 8 + length + random.choice([0, *header[name]["data_offsets"][:1]])
                raw[start : start + 2] = random.choice([b"\0\0", b"\x80\xbf", b"\xff\xff", b"\x80\x7f", b"\x7f\x7f"])
                path.write_bytes(raw)
        build = random.choice(BUILDS)
        return random.choice(
            [
                ["plan", folder / "config.json", "--to", build],
                ["convert", folder, self.folder / "out", "--to", random.choice(["bf16", "fp8-channel"]), "--jobs", "1"],
            ]
        )

    def additions(self, random: Random) -> list:
        """`--lora` and `--mtp-from`: an adapter, or a donor, with its config or its header changed."""
        folder = self.folder / "in" / "a"
        folder.mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"q_proj": 2}, "bias": "none"}
        config |= {"init_lora_weights": True, "use_dora": False, "peft_version": "0.21.2", "use_rslora": False}
        shapes = {"self_attn.q_proj": ((2, 64), (128, 2)), "mlp.experts": ((4, 64), (64, 4))}
        header, offset = {}, 0
        for module, pair in shapes.items():
            for half, shape in zip("AB", pair, strict=True):
                size = 4 * shape[0] * shape[1]
                name = f"base_model.model.model.layers.1.{module}.lora_{half}.weight"
                header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
                offset += size
        if random.random() < 0.5:
            config = change(config, random)
        else:
            header = change(header, random)
        text = written(header, random) if random.random() < 0.3 else json.dumps(header).encode()
        (folder / "adapter_config.json").write_bytes(written(config, random))
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
        donor = random.choice([self.m, folder, self.base / "out" / "bf16", *NAMES])
        asked = random.choice([["--lora", folder]] * 3 + [["--mtp-from", donor], ["--lora", donor]])
        return random.choice(
            [
                ["plan", self.m, "--to", random.choice(BUILDS), *asked],
                ["convert", self.m, self.folder / "out", "--to", "bf16", "--jobs", "1", *asked],
            ]
        )

    def indices(self, random: Random) -> list:
        shutil.rmtree(self.m)
        shutil.copytree(self.base / "sharded", self.m)
        path = self.m / "model.safetensors.index.json"
        path.write_bytes(written(change(json.loads(path.read_text()), random), random))
        return random.choice([["plan", self.m, "--to", "bf16"], ["inspect", self.m], ["verify", self.m]])

    def tokenizers(self, random: Random) -> list:
        name = random.choice(
            ["tokenizer.json"] * 3
            + ["tokenizer_config.json", "generation_config.json", "added_tokens.json", "special_tokens_map.json"]
        )
        path = self.m / name
        value = json.loads(path.read_text()) if path.exists() else {"<extra>": 515, "eos_token": "<|im_end|>"}
        path.write_bytes(written(change(value, random), random))
        return ["convert", self.m, self.folder / "out", "--to", "gguf:Q8_0", "--jobs", "1"]

    def templates(self, random: Random) -> list:
        name = random.choice(["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
        text = random.choice([QWEN_TEMPLATE, *NAMES, "{{" * 2000, "x" * (5 << 20)])
        if name == "chat_template.jinja":
            raw = damaged(text.encode(), random)
        else:
            named = [{"name": random.choice(["default", "tool_use", *NAMES]), "template": text} for _ in range(2)]
            (self.m / "chat_template.jinja").unlink()
            raw = written(change({"chat_template": random.choice([text, named])}, random, 1), random)
        (self.m / name).write_bytes(raw)
        if random.random() < 0.2:
            (self.m / "additional_chat_templates").mkdir()
            (self.m / "additional_chat_templates" / "a.jinja").write_bytes(damaged(text.encode(), random))
        return ["convert", self.m, self.folder / "out", "--to", random.choice(["gguf:BF16", "bf16"]), "--jobs", "1"]

    def ggufs(self, random: Random) -> list:
        if random.random() < 0.4:
            return self._gguf_source(random)
        path = self.folder / "in" / "x.gguf"
        tensors = [("token_embd.weight", "Q8_0", (8, 64), 544), ("output_norm.weight", "F32", (64,), 256)]
        keys = [
            Entry("general.architecture", "qwen35moe", Type.STRING),
            Entry("general.file_type", random.choice([7, 0, 1, 2**31]), Type.UINT32),
            Entry("general.alignment", random.choice([32, 32, 32, 0, 1, 3, 2**16]), Type.UINT32),
            Entry("tokenizer.ggml.tokens", ["a", *NAMES[:2]], Type.ARRAY, Type.STRING),
            Entry("a.list", list(range(random.randrange(40))), Type.ARRAY, Type.INT32),
        ]
        header = bytearray(gguf_header(random.sample(keys, random.randrange(6)), tensors))
        for _ in range(random.choice([0, 1, 1, 2, 4])):
            place = random.randrange(len(header) - 8)
            header[place : place + 8] = struct.pack("<Q", random.choice([0, 1, 2, 8, 9, 2**31, 2**40, 2**64 - 1]))
        raw = bytes(header) + bytes(sum(padded(tensor[3]) for tensor in tensors))
        path.write_bytes(damaged(raw, random))
        if random.random() < 0.2:
            os.truncate(path, random.choice([1 << 33, 1 << 41]))
        manifest = {
            "build": "gguf:Q8_0",
            "tensors": 2,
            "files": {"x.gguf": {"bytes": path.stat().st_size, "sha256": ""}},
        }
        if random.random() < 0.3:
            (self.folder / "in" / "x.gguf.manifest.json").write_bytes(written(change(manifest, random), random))
        return random.choice(
            [["inspect", path], ["inspect", path, "--json"], ["plan", self.m, "--to", "gguf:Q4_K_M", "--imatrix", path]]
        )

    def _gguf_source(self, random: Random) -> list:
        """A sound GGUF as a source, with its header or the config beside it changed."""
        path = self.m / "m.gguf"
        raw = bytearray((self.base / "out" / "m-BF16.gguf").read_bytes())
        for _ in range(random.choice([0, 1, 1, 3])):
            place = random.randrange(min(len(raw), 60_000))
            raw[place : place + 8] = struct.pack("<Q", random.choice([0, 1, 8, 9, 30, 2**31, 2**40, 2**64 - 1]))
        path.write_bytes(damaged(bytes(raw), random) if random.random() < 0.3 else bytes(raw))
        if random.random() < 0.3:
            (self.m / "config.json").write_bytes(written(change(CONFIG, random), random))
        return random.choice(
            [
                ["plan", path, "--to", random.choice(BUILDS)],
                ["convert", path, self.folder / "out", "--to", "bf16", "--jobs", "1"],
            ]
        )

    def imatrices(self, random: Random) -> list:
        path = self.folder / "in" / random.choice(["i.gguf", "i.dat"])
        name = random.choice(["blk.1.attn_q.weight", "blk.0.ffn_down_exps.weight"] * 5 + [*NAMES])
        rows, columns = random.choice([(1, 64), (1, 64), (2, 64), (2, 64), (1, 1), (3, 7), (0, 0)])
        values = np.full(
            max(rows * columns, 1), random.choice([1.0, 1.0, 1.0, 0.0, -1.0, np.nan, np.inf, 1e38]), "<f4"
        ).tobytes()
        if path.suffix == ".gguf":
            tensors = [
                (name + ".in_sum2", "F32", (rows, columns), 4 * rows * columns),
                (name + ".counts", "F32", (rows, 1), 4 * rows),
            ]
            keys = [
                Entry("general.type", random.choice(["imatrix", "imatrix", "imatrix", "model"]), Type.STRING),
                Entry("imatrix.chunk_count", random.choice(NUMBERS[:6]) % 2**32, Type.UINT32),
            ]
            raw = gguf_header(keys, random.sample(tensors, random.choice([2, 2, 2, 1]))) + values + bytes(64)
        else:
            text = name.encode()
            count = random.choice([1, 1, 1, 0, -1, 2**31 - 1])
            raw = struct.pack("<ii", count, len(text)) + text + struct.pack("<ii", 5, len(values) // 4) + values
            raw += struct.pack("<ii", 3, 4) + b"text"
        path.write_bytes(damaged(raw, random))
        if random.random() < 0.1:
            os.truncate(path, random.choice([1 << 31, 1 << 41]))
        return ["plan", self.m, "--to", random.choice(["gguf:Q4_K_M", "gguf:IQ2_XXS"]), "--imatrix", path]

    def recipes(self, random: Random) -> list:
        atoms = (
            "a",
            ".",
            "ffn_",
            "[a-z_]",
            r"\w",
            "(a|ab)",
            "(?:x)",
            "^",
            "$",
            r"\1",
            "(?=a)",
            "(?<=a)",
            "[[:alpha:]]",
            "é",
            "\\",
            "(",
            "[",
        )
        repeats = ("", "", "*", "+", "?", "{2}", "{1000}", "{,65535}", "{0,99}", "*?", "++", "{99999999999}")

        def pattern(depth: int) -> str:
            parts = random.choices(atoms, k=random.randrange(1, 5))
            if depth:
                parts.append(f"(?:{pattern(depth - 1)})" + random.choice(repeats))
            return "".join(part + random.choice(repeats) for part in parts)

        lines = [
            f"{pattern(random.randrange(4))}={random.choice(['q6_k', 'Q8_0', 'f32', 'q9', '', 'iq2_xxs'])}"
            for _ in range(random.choice([1, 1, 1, 3, 300]))
        ]
        path = self.folder / "in" / "recipe.txt"
        path.write_bytes(damaged("\n".join(lines).encode(), random))
        asked = ["--recipe", path] if random.random() < 0.7 else ["--tensor-type", lines[0]]
        return ["plan", random.choice([self.m / "config.json", "qwen3.5-9b"]), "--to", "gguf:Q4_K_M", *asked]

    def manifests(self, random: Random) -> list:
        out = self.folder / "out"
        shutil.copytree(self.base / "out", out)
        if random.random() < 0.6:
            build = out / "bf16"
            path = build / random.choice(["ornith_manifest.json"] * 3 + ["config.json"])
            path.write_bytes(written(change(json.loads(path.read_text()), random), random))
            return ["verify", build, *random.choice([[], ["--against", self.m]])]
        shutil.rmtree(out / "bf16")
        staging = out / PARTIAL
        staging.mkdir()
        entries = [{"identity": "x", "slab_bytes": 1 << 20}, [0, [[0, 100, 20, "ff"]]], {"checked": True}]
        lines = [written(change(entry, random, 1), random) for entry in entries[: random.randrange(4)]]
        (staging / "journal").write_bytes(damaged(b"\n".join(lines) + b"\n", random))
        again = random.choice([[], ["--resume"], ["--restart"]])
        return ["convert", self.m, out, "--to", "bf16", "--jobs", "1", *again]

    def names(self, random: Random) -> list:
        word = random.choice(
            [
                "hf://org/name",
                "hf://",
                "hf://a",
                "hf://a/b/c",
                "hf://a/b@",
                "hf://a/b@main",
                "hf:/a",
                "qwen3.5-9b",
                "qwen",
                "org/name",
                str(self.m),
                *NAMES,
            ]
        )
        for _ in range(random.randrange(3)):
            place = random.randrange(len(word) + 1)
            word = (
                word[:place]
                + random.choice(["./", "..", "@", "%2e", "\x1b", "\u202e", "\udcff", "é", "~", "*", " "])
                + word[place:]
            )
        if random.random() < 0.2:
            word = word[:1] + "a" * random.choice([300, 5000])
        return random.choice(
            [
                ["plan", word, "--to", "bf16"],
                ["inspect", word],
                ["verify", word],
                ["convert", word, self.folder / "out", "--to", "bf16"],
            ]
        )

    def options(self, random: Random) -> list:
        def value() -> str:
            words = (
                "1",
                "0",
                "-1",
                "2GiB",
                "1e9GB",
                "9" * 400 + "B",
                "nan",
                "inf",
                "1.5",
                "keep",
                "drop",
                "Q4_K",
                "q4_k",
                *NAMES,
            )
            return random.choice([*words, str(random.choice(NUMBERS[:-1]))])

        names = (
            "--jobs",
            "--max-memory",
            "--max-shard-size",
            "--mtp",
            "--tokenizer-pre",
            "--recipe",
            "--imatrix",
            "--tensor-type",
            "--token-embedding-type",
            "--output-tensor-type",
            "--non-finite",
            "--name",
        )
        asked = [word for name in random.sample(names, random.choice([1, 1, 2])) for word in (name, value())]
        build = random.choice([*BUILDS, value(), "gguf:" + value()])
        if random.random() < 0.6:
            return ["plan", self.m, "--to", build, *asked]
        return ["convert", self.m, self.folder / "out", "--to", build, *asked]

    def links(self, random: Random) -> list:
        secret = self.folder / "in" / "secret"
        secret.write_text('{"private": "hunter2"}')
        name = random.choice(
            [
                *sorted(os.listdir(self.m)),
                "LICENSE",
                "vocab.json",
                "chat_template.json",
                "tokenizer.model",
                "model.safetensors.index.json",
                "added_tokens.json",
                "LICENSE.safetensors",
                "LICENSE.pt",
            ]
        )
        path = self.m / name
        path.unlink(missing_ok=True)
        random.choice(
            [
                lambda: path.symlink_to(secret),
                lambda: path.symlink_to("../secret"),
                lambda: path.symlink_to(name),
                lambda: path.symlink_to("/dev/zero"),
                lambda: path.mkdir(),
                lambda: os.mkfifo(path),
                lambda: path.symlink_to(".."),
                lambda: (path.touch(), os.truncate(path, 1 << 40)),
                lambda: path.touch(),
                lambda: path.write_bytes(os.urandom(0) + b"\xff" * 100),
                lambda: path.symlink_to("/proc/self/environ"),
            ]
        )()
        out = self.folder / "out"
        if random.random() < 0.2:
            out.mkdir()
            (out / random.choice([PARTIAL, "bf16", "m-Q8_0.gguf"])).symlink_to(self.folder / "in")
        build = random.choice(["bf16", "gguf:Q8_0"])
        return random.choice(
            [
                ["convert", self.m, out, "--to", build, "--jobs", "1"],
                ["inspect", self.m],
                ["verify", self.m],
                ["plan", self.m, "--to", build],
            ]
        )

    def texts(self, random: Random) -> list:
        """`imatrix`: a sound model and a text, or a sound text and a model with one changed file."""
        text = self.folder / "in" / "text"
        words = random.choice(
            ["The quick brown fox. " * 40, *NAMES, "\0" * 300, "a" * 3000, "é𝔘\u202e" * 200, "9 " * 500]
        )
        text.write_bytes(damaged(words.encode(errors="surrogatepass"), random))
        if random.random() < 0.5:
            text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
            self._change_one(self.m, random)
        out = self.folder / "out.gguf"
        random.choice([lambda: None, lambda: None, lambda: out.symlink_to("in"), lambda: out.mkdir(), out.touch])()
        count, ctx = (
            random.choice(["1"] * 8 + ["2", "0", "99999999999"]),
            random.choice(["8"] * 8 + ["16", "512", "131072"]),
        )
        return ["imatrix", self.m, "--text", text, "--output", out, "--chunks", count, "--ctx", ctx]

    def comparisons(self, random: Random) -> list:
        """`compare`: of a folder with one changed file and a sound one, or of a sound one and a damaged GGUF."""
        text = self.folder / "in" / "text"
        text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
        if random.random() < 0.3:
            text.write_bytes(damaged(random.choice([*NAMES, "a" * 3000]).encode(), random))
        pair = [self.m, self.base / "out" / "bf16"]
        if random.random() < 0.5:
            self._change_one(self.m, random)
        else:
            pair = [self.base / "m", self.folder / "in" / "b.gguf"]
            raw = bytearray((self.base / "out" / "m-BF16.gguf").read_bytes())
            for _ in range(random.choice([0, 1, 1, 3])):
                place = random.randrange(min(len(raw), 60_000))
                raw[place : place + 8] = struct.pack("<Q", random.choice([0, 1, 8, 9, 2**31, 2**40, 2**64 - 1]))
            pair[1].write_bytes(damaged(bytes(raw), random))
        random.shuffle(pair)
        way = random.choice([["--client"], ["--state", self.folder / "s"]])
        return ["compare", *pair, "--windows", "1", "--text", text, *way]

    def _change_one(self, folder: Path, random: Random) -> None:
        path = folder / random.choice(
            ["config.json"] * 3 + ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
        )
        path.write_bytes(written(change(json.loads(path.read_text()), random), random))


CLASSES: dict[str, Callable] = {
    name: getattr(Inputs, name)
    for name in (
        "headers",
        "configs",
        "quantized",
        "additions",
        "indices",
        "tokenizers",
        "templates",
        "ggufs",
        "imatrices",
        "recipes",
        "manifests",
        "names",
        "options",
        "links",
        "texts",
        "comparisons",
    )
}


def _write_base(base: Path) -> None:
    """The sound checkpoint, in one file and in three."""
    generator = np.random.default_rng(0)
    weights = source_from_config(CONFIG, name="m").weights
    values = {
        w.name: (generator.standard_normal(w.shape).astype("<f4").view("<u4") >> 16).astype("<u2") for w in weights
    }
    for folder, shards in ((base / "m", 1), (base / "sharded", 3)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        weight_map = {}
        for number in range(shards):
            name = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
            chosen = list(values)[number::shards]
            weight_map |= dict.fromkeys(chosen, name)
            header, position = {}, 0
            for tensor in chosen:
                end = position + values[tensor].nbytes
                header[tensor] = {"dtype": "BF16", "shape": values[tensor].shape, "data_offsets": [position, end]}
                position = end
            text = json.dumps(header).encode()
            payload = b"".join(values[tensor].tobytes() for tensor in chosen)
            (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + payload)
        if shards > 1:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "tokenizer.json").write_text(qwen_tokenizer().to_str())
        (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
        (folder / "generation_config.json").write_text(
            json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": [1]})
        )
        (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
