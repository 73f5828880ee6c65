"""Rotary parameters of a config whose rotation is stretched over a longer context, as llama.cpp reads them.

    linear   every angle divided by `factor`
    yarn     low frequencies divided by `factor`, high ones as they were, a mixture of both between 32 turns and 1 over
             the original context; cosines and sines times 0.1 ln(factor) + 1

Configs say it in `rope_parameters`, older ones in `rope_scaling`, which goes before where both are there, as in
transformers. What llama.cpp computes otherwise than transformers is refused: it takes no other magnitude, and reads no
other turns out of a file of this family, whatever the keys say.
Sources: transformers' `modeling_rope_utils.py`; llama.cpp's converter for the keys, `llama-context.cpp` for what it
makes of them; both run on one model (tests/quant/gguf/test_rope.py). YaRN: arXiv 2309.00071.
"""

from __future__ import annotations

import math
from typing import Any

from gguf import GGUFValueType as Type
from gguf import Keys, RopeScalingType

from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.source.architectures.architecture import MAX_CONTEXT, Key
from ornith_moe.quant.source.architectures.weight import Settings

SCALED = ("yarn", "linear")
_TURNS = {  # key of a config: of a GGUF, and the only value that llama.cpp computes with
    "beta_fast": (Keys.Rope.SCALING_YARN_BETA_FAST, 32.0),
    "beta_slow": (Keys.Rope.SCALING_YARN_BETA_SLOW, 1.0),
}


def rope_of(text: Settings) -> Settings:
    """The rotary parameters of a text config, in one section."""
    values: dict[str, Any] = {"rope_type": "default"}
    where = "rope_parameters"
    for name in ("rope_parameters", "rope_scaling"):
        section = text.section(name)
        if section:
            kind = section.values.get("rope_type", section.values.get("type", values["rope_type"]))
            values, where = values | section.values | {"rope_type": kind}, name
    return Settings(values, f"{text.where}.{where}")


def scaling_keys(rope: Settings, context: int) -> list[Key]:
    """The keys of a stretched rotation; none of a plain one.

    Args:
        context: of the model, which is the original one where the section does not say.
    Raises:
        CheckpointError: a value missing or damaged. PlanError: one that llama.cpp has no way to compute.
    """
    kind = rope.values["rope_type"]
    if kind not in SCALED:
        return []
    factor = rope.number("factor", None)
    keys: list[Key] = [
        (Keys.Rope.SCALING_TYPE, RopeScalingType(kind).value, Type.STRING),
        (Keys.Rope.SCALING_FACTOR, factor, Type.FLOAT32),
    ]
    if kind == "linear":
        return keys
    original = rope.integer("original_max_position_embeddings", context, high=MAX_CONTEXT)
    keys.append((Keys.Rope.SCALING_ORIG_CTX_LEN, original, Type.UINT32))
    plain = round(0.1 * math.log(max(factor, 1)) + 1, 4)
    known: dict[str, Any] = {"attention_factor": plain, "truncate": True, "mscale": None, "mscale_all_dim": None}
    known |= {name: only for name, (_, only) in _TURNS.items()}
    for name, only in known.items():
        value = rope.values.get(name)
        if isinstance(value, int | float) and isinstance(only, float):
            value = only if math.isclose(value, only, rel_tol=1e-3) else value
        if value is not None and value is not only:
            takes = f"{only} alone for a factor of {factor:g}" if only else "none"
            raise PlanError(
                f"{rope.where}: {name} is {brief(value)}, llama.cpp takes {takes}; make a build that is no GGUF"
            )
    return keys + [
        (key, only, Type.FLOAT32) for name, (key, only) in _TURNS.items() if rope.values.get(name) is not None
    ]
