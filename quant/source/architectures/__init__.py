"""Checkpoint architectures: `architecture(config)` gives the shape model that knows a config's weights."""

from typing import Any

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.names import did_you_mean
from ornith_moe.quant.source.architectures.gemma4 import Gemma4
from ornith_moe.quant.source.architectures.qwen35 import Qwen35

ARCHITECTURES = (Qwen35, Gemma4)


def architecture(config: dict[str, Any]) -> Qwen35 | Gemma4:
    """The shape model of `config`, a parsed config.json.

    Raises:
        CheckpointError: an unknown model_type, or a value that no model of that architecture has.
    """
    model_type = config.get("model_type")
    for kind in ARCHITECTURES:
        if model_type in kind.MODEL_TYPES:
            return kind(config)
    known = [name for kind in ARCHITECTURES for name in kind.MODEL_TYPES]
    raise CheckpointError(
        f"config.json: model_type {brief(model_type)} is not one we convert{did_you_mean(str(model_type), known)}; "
        f"expected one of {', '.join(known)}"
    )
