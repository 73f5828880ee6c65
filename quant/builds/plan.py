"""What a build is before anything is written: its tensors, how weights become them, and what a user should know."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ornith_moe.quant.builds.serving import KV_BYTES, Serving
from ornith_moe.quant.builds.storages.storage import Part, Storage
from ornith_moe.quant.fallbacks import Fallback
from ornith_moe.quant.gguf.imatrix import Coverage
from ornith_moe.quant.source.architectures.weight import Place
from ornith_moe.quant.source.source import Source
from ornith_moe.quant.source.transforms import UNCHANGED, Transform

if TYPE_CHECKING:
    from ornith_moe.quant.builds.build import Alternative, Build


@dataclass(frozen=True, slots=True)
class Step:
    """A weight, or rows of it, into a build: how it is stored, the output tensor of each part, its first row there."""

    weight: int  # index into the source's weights
    storage: Storage
    parts: tuple[Part, ...]
    tensors: tuple[int, ...]  # index of each part's tensor in `BuildPlan.tensors`
    row: int = 0  # first row of this weight in the first tensor, in weight rows
    transform: Transform = UNCHANGED  # on the way
    group: str = ""  # weights whose storage is given one measure together; "": this one alone


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of a build. `dtype` is a safetensors dtype or a GGUF type; `shape` in Hugging Face order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    constant: tuple[float, ...] = ()  # F32 values of a tensor that no weight gives

    @property
    def quantized(self) -> bool:
        return self.dtype not in ("F32", "F16", "BF16")


@dataclass
class BuildPlan:
    """Everything about a build that headers alone decide."""

    build: Build
    tensors: list[OutputTensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)  # weights without the storage the build is named after
    notes: list[str] = field(default_factory=list)
    warning: str = ""  # what a user must know before all else
    max_tensor_parallel: int | None = None
    config: dict[str, Any] = field(default_factory=dict)  # quantization_config of a safetensors build
    kv_bytes: int = KV_BYTES  # of a key or value in the cache of an engine that does as the build says
    measured: bool = False  # scales of activations are those that an importance matrix tells
    coverage: list[Coverage] = field(default_factory=list)  # of the tensors encoded with importance
    metadata: dict[str, str | int] = field(default_factory=dict)  # more keys of a GGUF
    kept: frozenset[int] = frozenset()  # weights that hold a NaN or an infinity and may
    non_finite: list[str] = field(default_factory=list)  # the tensors these are in
    needs_imatrix: list[str] = field(default_factory=list)  # tensors of a type that is noise without importance
    _indices: dict[str, int] = field(default_factory=dict, repr=False, compare=False)  # of `tensors` that weights fill

    def add(
        self, source: Source, index: int, storage: Storage, place: Place | None = None, group: str | None = None
    ) -> None:
        """Plan weight `index` in `storage` at `place`, whose tensor may hold other weights too; None: at its own name.

        Where the storage needs a measure, `group` has one together; None: all that is fused with the weight.

        What belongs to a weight is named after it: `suffix` behind its name, or, if that begins with a point, instead
        of `.weight`.
        """
        weight, storage = source.weights[index], storage.taking(source, index)
        place = place or Place(weight.name, weight.shape)
        parts = storage.parts(weight.shape, source.dtype(index))
        tensors = tuple(self._tensor(part, place, weight.shape) for part in parts)
        if group is None or not storage.needs:
            group = source.architecture.fused_group(weight) if storage.needs else ""
        self.steps.append(Step(index, storage, parts, tensors, place.row, place.transform, group))

    def _tensor(self, part: Part, place: Place, shape: tuple[int, ...]) -> int:
        """Index of the tensor of `part` of a weight of `shape`: new, unless another weight at `place` has it."""
        base = place.name.removesuffix(".weight") if part.suffix.startswith(".") else place.name
        name = base + part.suffix
        if name not in self._indices:
            plain = math.prod(part.shape) == math.prod(shape)
            whole = place.shape if plain else (*place.shape[: len(place.shape) - len(shape)], *part.shape)
            nbytes = part.nbytes * math.prod(place.shape) // math.prod(shape)
            self._indices[name] = len(self.tensors)
            self.tensors.append(OutputTensor(name, part.dtype, whole, nbytes))
        return self._indices[name]

    @property
    def name(self) -> str:
        """Of the build."""
        return self.build.name

    @property
    def all_notes(self) -> list[str]:
        return [*filter(None, [self.warning]), *self.notes]

    @property
    def types(self) -> dict[str, str]:
        """{tensor: dtype}"""
        return {tensor.name: tensor.dtype for tensor in self.tensors}

    @property
    def copied(self) -> int:
        """How many weights keep the codes and scales of the source."""
        return sum(step.storage.copies for step in self.steps)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def keep_cache_in_fp8(self, scheme: dict[str, Any]) -> None:
        """Ask engines to keep keys and values in FP8, in the words of the config's `scheme`."""
        self.config["kv_cache_scheme"] = scheme
        self.kv_bytes = 1
        self.notes.append(
            f"{self.name}: engines are asked to keep keys and values in FP8, with scales of 1.0, unless told otherwise"
        )

    def warn_of_fallbacks(self, source: Source) -> None:
        """Warn where most weights fell back: how many bits the build takes, and what to ask for instead."""
        if not self.fallbacks:
            return
        fell = {fallback.tensor for fallback in self.fallbacks}
        sizes: dict[str, int] = {}  # in weights: words of packed codes hold several
        for step in self.steps:
            tensor = self.tensors[step.tensors[0]]
            if tensor.name in fell or tensor.quantized:
                sizes[tensor.name] = sizes.get(tensor.name, 0) + math.prod(source.weights[step.weight].shape)
        fallen = sum(sizes[name] for name in fell)
        if 2 * fallen <= sum(sizes.values()):
            return
        bits = 8 * self.tensor_bytes / sum(math.prod(source.weights[step.weight].shape) for step in self.steps)
        self.warning = (
            f"{self.name}: is hardly one: {fallen / sum(sizes.values()):.0%} of the weights that it should quantize do "
            f"not fit its blocks, and it takes {bits:.2f} bits per weight; {self.build.instead(source)}"
        )

    def keep(self, source: Source, kept: Mapping[int, str]) -> None:
        """Note that weights hold a NaN or an infinity and may; `kept` says where, by index."""
        self.kept = frozenset(kept)
        held = {self.tensors[step.tensors[0]].name: step.weight for step in self.steps if step.weight in kept}
        self.non_finite = list(held)
        types = self.types if held else {}
        self.fallbacks += [
            Fallback(
                source.weights[index].name,
                "holds a NaN or an infinity, so its tensor is stored unquantized",
                f"{kept[index]}; tensor {tensor} is stored as {types[tensor]}",
            )
            for tensor, index in held.items()
        ]


def plan_json(
    plan: BuildPlan, files: int, needed: Serving | None = None, others: Sequence[Alternative] = ()
) -> dict[str, Any]:
    """A plan as `ornith-moe plan --json` prints it; `needed` to serve it, `others` to ask for instead."""
    return {
        "build": plan.name,
        "tensors": len(plan.tensors),
        "tensor_bytes": plan.tensor_bytes,
        "files": files,
        "fallbacks": plan.fallbacks,
        "max_tensor_parallel": plan.max_tensor_parallel,
        "notes": plan.all_notes,
        "imatrix": [asdict(found) for found in plan.coverage],
        "serving": needed and needed.json(),
        "alternatives": [{"build": each.build, "bytes": each.nbytes, "predicted_kl": each.kl} for each in others],
    }


def iterate_dtypes(plan: BuildPlan) -> Iterator[tuple[str, int, int]]:
    """(dtype, tensors, bytes) of a build, largest first."""
    totals: dict[str, list[int]] = {}
    for tensor in plan.tensors:
        count = totals.setdefault(tensor.dtype, [0, 0])
        count[0] += 1
        count[1] += tensor.nbytes
    for dtype, (tensors, size) in sorted(totals.items(), key=lambda item: -item[1][1]):
        yield dtype, tensors, size
