"""The end of a conversion: side files, manifest, and the one rename that gives a checked build its final name.

A build of safetensors is a folder and appears in one rename. A GGUF is one file beside its manifest, which goes first:
without the file it promises nothing. Nothing that exists is ever replaced, and a run that died between two renames is
finished by the next.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ornith_moe.quant.budget import Budget
from ornith_moe.quant.builds.layout import safetensors_index
from ornith_moe.quant.conversion.pipeline import PlacedBuild
from ornith_moe.quant.errors import CheckpointError, ConversionError
from ornith_moe.quant.files import is_utf8, own_folder, read_bytes, read_json, sync_folder, write_file
from ornith_moe.quant.source.chat_templates import FOLDER as TEMPLATES
from ornith_moe.quant.source.chat_templates import MAX_TEMPLATE_BYTES, named_templates
from ornith_moe.quant.source.weights import DROPPED_MTP, Source

MANIFEST = "ornith_manifest.json"
SIDE_FILES = (  # what a served model needs besides weights and config
    "*token*.json", "vocab.json", "merges.txt", "*.model", "generation_config.json", "chat_template.*",
    "*processor_config.json", "LICENSE*",
)  # fmt: skip
WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".npz", ".onnx"}
MAX_SIDE_FILE_BYTES, MAX_SIDE_FILES_BYTES = 64 << 20, 256 << 20


def side_files(source: Source, build: PlacedBuild) -> dict[str, bytes]:
    """What lies beside the weights of a safetensors build: config with its quantization, index, tokenizer. {} for GGUF.

    Raises:
        CheckpointError: one of the source's files is a link that leaves its folder, has a name that is not UTF-8, or
            all together are too large.
    """
    if build.plan.is_gguf:
        return {}
    sides, copied = {}, Budget(MAX_SIDE_FILES_BYTES)
    for path in sorted(source.folder.iterdir()):
        wanted = any(path.match(pattern) for pattern in SIDE_FILES) and path.suffix.lower() not in WEIGHTS
        if wanted and path.is_file() and path.stat().st_size <= MAX_SIDE_FILE_BYTES:
            if not is_utf8(path.name):
                raise CheckpointError(f"{path}: its name is not UTF-8, which no manifest can hold; rename it")
            copied.take(path.stat().st_size, f"{path}: one of the side files that a build copies")
            sides[path.name] = read_bytes(path, what="a side file", limit=MAX_SIDE_FILE_BYTES)
    for path in named_templates(source.folder):
        sides[f"{TEMPLATES}/{path.name}"] = read_bytes(path, what="a chat template", limit=MAX_TEMPLATE_BYTES)
    config = json.loads(json.dumps(source.config))
    text = config.get("text_config", config)
    if build.plan.config:
        config["quantization_config"] = build.plan.config
    elif build.plan.build == "bf16":
        config["dtype"] = text["dtype"] = "bfloat16"
    if any(entry.reason == DROPPED_MTP for entry in source.left_out):
        text["mtp_num_hidden_layers"] = 0  # do not announce it
    sides["config.json"] = _json_bytes(config)
    index = safetensors_index(build.plan, build.layout)
    if index:
        sides["model.safetensors.index.json"] = _json_bytes(index)
    return sides


def finish(
    source: Source, build: PlacedBuild, sides: dict[str, bytes], digests: list[str], more: Mapping[str, Any]
) -> None:
    """Write side files and the manifest, with `more`, of a checked build, still in its staging folder."""
    files = {
        file.name: {"bytes": file.size, "sha256": digests[build.first_file + i]}
        for i, file in enumerate(build.layout.files)
    }
    for name, payload in sides.items():
        own_folder((build.staging / name).parent)
        write_file(build.staging / name, payload)
        files[name] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    manifest = {
        "build": build.plan.build,
        "source": source.name,
        "mtp": source.has_mtp,
        "tensors": len(build.plan.tensors),
        "tensor_bytes": build.plan.tensor_bytes,
        **more,
        "files": files,
    }
    if build.plan.non_finite:
        manifest["non_finite"] = build.plan.non_finite
    write_file(build.staging / MANIFEST, _json_bytes(manifest))
    sync_folder(build.staging)


def final_paths(build: PlacedBuild) -> list[tuple[Path, Path]]:
    """(staged, final) of what a build is made of, in the order in which it gets its names."""
    if not build.plan.is_gguf:
        return [(build.staging, build.final)]
    return [(build.staging / MANIFEST, manifest_path(build.final)), (build.staging / build.final.name, build.final)]


def manifest_path(build: Path) -> Path:
    """Where the manifest of a build lies: in its folder, or beside its file."""
    return build / MANIFEST if build.suffix != ".gguf" else build.with_name(build.name + ".manifest.json")


def underflow(build: Path) -> dict[str, int]:
    """{tensor: weights that were too small for its scales} of a finished build, as its manifest counts them."""
    return read_json(manifest_path(build)).get("underflow", {})


def publish(build: PlacedBuild) -> None:
    """Give a checked build its final name, unless a run that died has done so.

    Raises:
        ConversionError: something else has that name, or the build is in neither place.
    """
    for staged, final in final_paths(build):
        if staged.exists():
            if os.path.lexists(final):
                raise ConversionError(f"{final}: exists already; move it away and run the same command again")
            os.rename(staged, final)
        elif not final.exists():
            partial = build.staging.parent
            raise ConversionError(f"{final}: is neither there nor in {partial}; run the command again with --restart")
    sync_folder(build.final.parent)


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
