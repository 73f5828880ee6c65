"""What a served model needs besides weights and config, copied from the source into a build."""

from __future__ import annotations

from ornith_moe.quant.budget import Budget
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.files import is_utf8, read_bytes
from ornith_moe.quant.source.chat_templates import FOLDER as TEMPLATES
from ornith_moe.quant.source.chat_templates import MAX_TEMPLATE_BYTES, named_templates
from ornith_moe.quant.source.source import Source

SIDE_FILES = (
    "*token*.json", "vocab.json", "merges.txt", "*.model", "generation_config.json", "chat_template.*",
    "*processor_config.json", "LICENSE*",
)  # fmt: skip
WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".npz", ".onnx"}
MAX_SIDE_FILE_BYTES, MAX_SIDE_FILES_BYTES = 64 << 20, 256 << 20


def copied_files(source: Source) -> dict[str, bytes]:
    """{name: bytes} of tokenizer, templates, processors and licence of the source's folder.

    Raises:
        CheckpointError: one of them is a link that leaves its folder, has a name that is not UTF-8, or all together are
            too large.
    """
    sides, copied = {}, Budget(MAX_SIDE_FILES_BYTES)
    for path in source.files(SIDE_FILES):
        if path.suffix.lower() not in WEIGHTS and path.is_file() and path.stat().st_size <= MAX_SIDE_FILE_BYTES:
            if not is_utf8(path.name):
                raise CheckpointError(f"{path}: its name is not UTF-8, which no manifest can hold; rename it")
            copied.take(path.stat().st_size, f"{path}: one of the side files that a build copies")
            sides[path.name] = read_bytes(path, what="a side file", limit=MAX_SIDE_FILE_BYTES)
    for path in named_templates(source.folder):
        sides[f"{TEMPLATES}/{path.name}"] = read_bytes(path, what="a chat template", limit=MAX_TEMPLATE_BYTES)
    return sides
