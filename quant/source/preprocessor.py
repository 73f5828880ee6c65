"""What the image processor of a checkpoint does to pixels: (pixel / 255 - mean) / std, per channel.

preprocessor_config.json holds both; newer checkpoints have processor_config.json, in which the image processor is a
section, and which goes before.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.source.tokenizer_files import read_optional

FILES = ("preprocessor_config.json", "processor_config.json")
CHANNELS = 3
LARGEST = 1e6


class Normalization(NamedTuple):
    """Of the channels red, green and blue."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_normalization(folder: Path) -> Normalization:
    """Mean and standard deviation of the pixels that the vision tower in `folder` was trained on.

    Raises:
        CheckpointError: in no file, or no three numbers each.
    """
    found: dict[str, Any] = {}
    for name in FILES:
        section = read_optional(folder, name)
        inner = section.get("image_processor")
        found |= section | (inner if isinstance(inner, dict) else {})
    mean, std = (_numbers(found.get(key)) for key in ("image_mean", "image_std"))
    if mean is None or std is None or min(std) <= 0:
        got = f"{brief(found.get('image_mean'))} and {brief(found.get('image_std'))}" if found else "no such file"
        raise CheckpointError(
            f"{folder}: expected image_mean and image_std, {CHANNELS} numbers each, the second above 0, in {FILES[0]}, "
            f"got {got}; copy the file from where the model was published"
        )
    return Normalization(mean, std)


def _numbers(values: Any) -> tuple[float, ...] | None:
    """`values`, if they are one number for each channel."""
    if not isinstance(values, list) or len(values) != CHANNELS:
        return None
    sound = all(type(value) in (int, float) and math.isfinite(value) and abs(value) < LARGEST for value in values)
    return tuple(map(float, values)) if sound else None
