"""gguf:NVFP4: the codes and scales of nvfp4 as llama.cpp's converter repacks them, without a detour.

Experts, or the MLP of a dense model, are NVFP4, each stack with a scale for every expert beside it (`.scale`); the rest
is BF16 and F32. The bytes are those of `convert_hf_to_gguf.py --outtype bf16` on our nvfp4 build. llama-quantize's own
NVFP4, which has no such scale, is what `--tensor-type` makes of tensors in other files. A source that is NVFP4 itself
decides what is: its codes and scales are repacked, as by that converter.
"""

from __future__ import annotations

from collections.abc import Sequence

from ornith_moe.quant.builds.build import register
from ornith_moe.quant.builds.gguf import GgufBuild
from ornith_moe.quant.builds.modelopt import MLP
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.nvfp4 import NVFP4, NVFP4Blocks, is_nvfp4
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.gguf.mixtures import FileType
from ornith_moe.quant.source.architectures.weight import Place
from ornith_moe.quant.source.source import Source


class GgufNvfp4(GgufBuild):
    """One file of llama.cpp's type for what was NVFP4 before."""

    def retype(self, source: Source, places: Sequence[Sequence[Place]], types: dict[str, str], plan: BuildPlan) -> None:
        block = block_shape(NVFP4.name)[0]
        fell: dict[str, Fallback] = {}
        held = {index for index in range(len(source.weights)) if is_nvfp4(source, index)}
        for index, (weight, each) in enumerate(zip(source.weights, places, strict=True)):
            for place in each if (index in held if held else weight.role in MLP) else ():
                columns = place.shape[-1]
                if columns % block == 0:
                    types[place.name] = NVFP4.name
                else:
                    kind = f"{columns} columns fill no blocks of {block}, stored as {types[place.name]}"
                    fell[place.name] = Fallback(place.name, kind)
        plan.fallbacks += fell.values()

    def storage(self, type_name: str, place: Place) -> Storage | None:
        return NVFP4Blocks(stacked=len(place.shape) > 2) if type_name == NVFP4.name else None


register(GgufNvfp4(FileType("NVFP4", "BF16", head="BF16")))
