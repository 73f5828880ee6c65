"""What a file or folder holds, told from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.builds.stored import read_gguf_build, read_safetensors_build, read_safetensors_file
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.files import read_json
from ornith_moe.quant.gguf.splits import COUNT

CONFIG_KEYS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_experts",
    "num_experts_per_tok",
    "vocab_size",
    "dtype",
)
QUANTIZATION_KEYS = ("quant_method", "mode", "bits", "group_size")  # the last three of a folder for MLX
LONGEST_VALUE = 120
MOST_ITEMS = 16


@budgeted
def inspect(path: str | Path) -> dict[str, Any]:
    """Kind, tensors, bytes per dtype, and the metadata worth a line each.

    Args:
        path: a checkpoint or build folder, a `.safetensors` file or a `.gguf` file; of a split GGUF any part.
    Returns:
        {"kind", "tensors", "tensor_bytes", "dtypes": {dtype: {"tensors", "bytes"}}, "metadata": {key: value}}.
    Raises:
        CheckpointError: none of these, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        found, kind = read_safetensors_build(path), "safetensors folder"
        metadata = _config_summary(read_json(path / "config.json")) if (path / "config.json").is_file() else {}
    elif path.suffix == ".gguf" and path.is_file():
        keys, found = read_gguf_build(path)
        parts = keys.get(COUNT, 1)
        kind = "GGUF file" if parts == 1 else f"GGUF in {parts} files"
        metadata = {name: _short(value) for name, value in keys.items()}
    elif path.suffix == ".safetensors" and path.is_file():
        found, kind, metadata = read_safetensors_file(path), "safetensors file", {}
    else:
        raise CheckpointError(f"{path}: expected a folder, a .safetensors or a .gguf file")
    dtypes: dict[str, dict[str, int]] = {}
    for tensor in found.values():
        entry = dtypes.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return {
        "kind": kind,
        "tensors": len(found),
        "tensor_bytes": sum(tensor.nbytes for tensor in found.values()),
        "dtypes": dict(sorted(dtypes.items(), key=lambda item: -item[1]["bytes"])),
        "metadata": metadata,
    }


def _config_summary(config: dict[str, Any]) -> dict[str, Any]:
    section = config.get("text_config")
    text: dict[str, Any] = section if isinstance(section, dict) else config
    summary = {key: text[key] for key in CONFIG_KEYS if key in text}
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        summary |= {key: quantization[key] for key in QUANTIZATION_KEYS if key in quantization}
    return summary


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= LONGEST_VALUE else value[:LONGEST_VALUE] + "..."
    if isinstance(value, np.ndarray | list):
        items = value.tolist() if isinstance(value, np.ndarray) else value
        return [_short(item) for item in items] if len(items) <= MOST_ITEMS else f"[{len(items)} values]"
    return value
