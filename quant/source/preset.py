"""Configs of published models, for plans without a checkpoint: quant/source/presets/NAME.json.

Each is the published config.json, and one key more that says what a config cannot: whether the multi-token prediction
it announces was published. Ornith-1.0 has none, Qwen3.5 has. A model whose config is that of another but for a few keys
names the other (`config_of`) and these keys. presets/README.md says what was published and what is inferred.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

HAS_MTP, CONFIG_OF = "mtp_was_published", "config_of"


@cache
def preset_names() -> tuple[str, ...]:
    """Names of all presets."""
    folder = resources.files("ornith_moe.quant.source").joinpath("presets")
    return tuple(sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")))


def read_preset(name: str) -> tuple[dict[str, Any], bool]:
    """The published config, and whether its MTP was published.

    Args:
        name: one of `preset_names()`.
    """
    file = resources.files("ornith_moe.quant.source").joinpath(f"presets/{name}.json")
    config = json.loads(file.read_bytes())
    if other := config.pop(CONFIG_OF, None):
        config = _over(read_preset(other)[0], config)
    return config, config.pop(HAS_MTP)


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes`, section by section."""
    return base | {k: _over(base.get(k, {}), v) if isinstance(v, dict) else v for k, v in changes.items()}
