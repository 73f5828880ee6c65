"""gguf:mmproj: the vision tower as the GGUF that llama.cpp loads beside a text model.

    llama-server -m NAME-Q4_K_M.gguf --mmproj mmproj-NAME-BF16.gguf

BF16, which is what is published, and F16, F32 and Q8_0 as `gguf:mmproj-TYPE`. Vectors and positions are F32 whatever
the type, and so is the convolution over patches, but in F16; rows that are no whole blocks of Q8_0 are F16. Bytes and
keys are those of llama.cpp's `convert_hf_to_gguf.py --mmproj` (tests/quant/gguf/test_converter.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from ornith_moe.quant.builds.build import Options, register
from ornith_moe.quant.builds.gguf_file import GgufFile
from ornith_moe.quant.builds.layout import Layout, gguf_layout
from ornith_moe.quant.builds.plan import BuildPlan, Step
from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.errors import PlanError
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.gguf.metadata import MMPROJ, mmproj_metadata
from ornith_moe.quant.gguf.mixtures import FILE_TYPES, fit
from ornith_moe.quant.source.accounts import LeftOut
from ornith_moe.quant.source.architectures.architecture import Cached
from ornith_moe.quant.source.architectures.weight import Place
from ornith_moe.quant.source.source import Source

DEFAULT = "BF16"
TEXT = "only the vision tower has a place in an mmproj; a text GGUF holds the rest"


class MmprojBuild(GgufFile):
    """The vision tower in matrices of one type."""

    engines = ("llama.cpp, beside a text GGUF",)

    def __init__(self, file_type: str):
        self.name = f"gguf:{MMPROJ}" if file_type == DEFAULT else f"gguf:{MMPROJ}-{file_type}"
        self.kind = FILE_TYPES[file_type]

    def decide(self, source: Source, options: Options) -> BuildPlan:
        plan, model = BuildPlan(self), source.architecture
        tower = [index for index, weight in enumerate(source.weights) if weight.role == "vision"]
        if not tower:
            raise PlanError(f"{source.name}: has no vision tower, of which {self.name} is made; leave {self.name} out")
        if not model.HAS_MMPROJ:
            raise PlanError(
                f"{source.name}: the vision tower of model_type {source.config['model_type']} is none that is written "
                f"as an mmproj yet; leave {self.name} out"
            )
        for index in tower:
            for place in model.mmproj_places(source.weights[index]):
                storage = Gguf(self._type(place, options, plan, kept=index in options.kept))
                plan.add(source, index, storage, place)
        return plan

    def _type(self, place: Place, options: Options, plan: BuildPlan, *, kept: bool) -> str:
        """The type of one tensor; a fallback is noted in `plan`."""
        base = self.kind.base
        is_patch, columns = "patch_embd" in place.name, place.shape[-1]
        if len(place.shape) < 2 or "position_embd" in place.name or (is_patch and base != "F16"):
            return "F32"
        wanted = "BF16" if kept else fit(base, columns)
        if not kept and wanted != base:
            what = f"{columns} columns are not whole {base} blocks, stored as {wanted}"
            plan.fallbacks.append(Fallback(place.name, what))
        return options.stored.get(place.name, wanted)

    def as_stored(self, source: Source, found: StoredBuild) -> BuildPlan:
        return self.plan(source, Options(stored={name: tensor.dtype for name, tensor in found.tensors.items()}))

    def lay_out(self, source: Source, plan: BuildPlan, options: Options) -> Layout:
        card = self.card(source, options)
        metadata = mmproj_metadata(
            source.architecture,
            source.folder,
            name=source.name,
            file_type=self.kind.id,
            shapes={tensor.name: tensor.shape for tensor in plan.tensors},
            card=card.values,
        )
        return gguf_layout(plan, self.file(source), metadata, card.notes)

    def recognize(self, found: StoredBuild) -> bool:
        return self.is_of_type(found, self.kind) and found.metadata.get("general.type") == MMPROJ

    def cached(self, source: Source, context: int) -> Cached:
        """Nothing: what the tower sees becomes tokens of the text model."""
        return Cached(0, 0)

    def left_out(self, source: Source) -> list[LeftOut]:
        rest = {source.tensor_of(index): None for index, w in enumerate(source.weights) if w.role != "vision"}
        return [LeftOut(TEXT, tuple(rest))] if rest else []

    def remedy(self, problem: str, source: Source, plan: BuildPlan, steps: Sequence[Step]) -> str:
        return f"{problem}; make gguf:mmproj or gguf:mmproj-F32 of it, whose range is that of the source"

    def file(self, source: Source) -> str:
        return f"{MMPROJ}-{source.name}-{self.kind.name}.gguf"


register(*map(MmprojBuild, (DEFAULT, "F16", "F32", "Q8_0")))
