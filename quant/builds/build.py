"""What a build is: how it is planned, laid out, named, recognized and told of; and the builds that there are.

    Build.plan(source, options) -> BuildPlan -> Build.lay_out -> Layout -> a conversion -> Build.names, Build.side_files

One object per name that can be asked for; one file per family of them (fp8_channel.py, fp8_block.py, bf16.py, gguf.py),
which registers its own. Whoever plans, writes, verifies or lists builds asks the object, so a build of another package
is one as soon as it is registered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ornith_moe.quant.builds.layout import Layout
from ornith_moe.quant.builds.plan import BuildPlan, Step
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.builds.stored import FoundTensor, StoredBuild
from ornith_moe.quant.errors import PlanError, brief
from ornith_moe.quant.fitting.sensitivity import Sensitivity
from ornith_moe.quant.gguf.imatrix import Imatrix
from ornith_moe.quant.gguf.splits import Split
from ornith_moe.quant.gguf.tensor_types import AskedTypes
from ornith_moe.quant.names import did_you_mean, plain_name
from ornith_moe.quant.source.accounts import LeftOut
from ornith_moe.quant.source.architectures.architecture import Cached
from ornith_moe.quant.source.source import Source

T = TypeVar("T")
KV_CACHES = ("bf16", "fp8")
_ASKED_BY = {  # field of `Options` that not every build heeds: options of the command line
    "kv_cache": ("--kv-cache",),
    "nvfp4": ("--nvfp4-head", "--nvfp4-rest"),
    "sensitivity": ("--sensitivity",),
    "split": ("--split-max-size", "--split-max-tensors"),
}


def quiet(phase: str, done: int, total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class AskedNvfp4:
    """What is asked of builds of NVFP4 beyond their names."""

    head: bool = False  # the output head is NVFP4 too
    rest: str = "bf16"  # attention: as in the source, or "fp8"
    held: frozenset[str] | None = None  # modules that a build which exists has in NVFP4; None: those of the source


@dataclass(frozen=True)
class Options:
    """What decides the bytes of builds besides their source; see `plan_build` and `convert`."""

    asked: AskedTypes | None = None
    imatrix: Imatrix | None = None
    max_shard_bytes: int | None = None  # None: as the library of a build has it
    tokenizer_pre: str | None = None
    nvfp4: AskedNvfp4 = AskedNvfp4()
    kv_cache: str = KV_CACHES[0]  # as engines keep keys and values by themselves, or "fp8", with scales of 1.0
    split: Split | None = None  # of GGUFs
    sensitivity: Sensitivity | None = None  # of what is fitted
    kept: Mapping[int, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what `once` has made

    def __post_init__(self) -> None:
        if self.kv_cache not in KV_CACHES:
            raise ValueError(f"kv_cache: expected one of {', '.join(KV_CACHES)}, got {brief(self.kv_cache)}")

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all builds of these options."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


@dataclass(frozen=True, slots=True)
class Alternative:
    """A build by its name, the bytes of its files, and the KL to its source that is predicted of it."""

    build: str
    nbytes: int
    kl: float


class Build(ABC):
    """One build that can be asked for by `name`.

    To add one: derive from `SafetensorsBuild` (folder.py) or from this, and `register` it.
    """

    name: str
    library = "vllm"  # of those that the Hub knows: whose format it is
    engines: tuple[str, ...] = ()  # of ENGINES (card.py): what serves it
    storages: tuple[type[Storage], ...]  # that its weights may have, the more particular first
    hears: frozenset[str] = frozenset()  # fields of `Options` that not every build heeds

    def plan(self, source: Source, options: Options) -> BuildPlan:
        """Tensors, storages and names of this build of `source`, from headers alone; see `plan_build`."""
        plan = self.decide(source, options)
        if not options.stored:
            plan.warn_of_fallbacks(source)
        plan.keep(source, options.kept)
        if plan.copied:
            plan.notes.append(
                f"{self.name}: {plan.copied:,} weights keep the codes and scales of the source, untouched"
            )
        return plan

    @abstractmethod
    def decide(self, source: Source, options: Options) -> BuildPlan:
        """The plan of every weight; what `kept` weights mean to notes and to the manifest is not its business."""

    @abstractmethod
    def as_stored(self, source: Source, found: StoredBuild) -> BuildPlan:
        """The plan of a build that exists, with what its maker decided.

        Raises:
            PlanError: it cannot be one of `source`.
        """

    @abstractmethod
    def lay_out(self, source: Source, plan: BuildPlan, options: Options) -> Layout:
        """Files, headers and the place of every tensor.

        Raises:
            CheckpointError, PlanError: the source lacks what a header needs, or the plan what an encoder needs.
        """

    @abstractmethod
    def files(self, plan: BuildPlan, options: Options) -> int:
        """How many files hold its tensors."""

    @abstractmethod
    def path(self, out: Path, layout: Layout) -> Path:
        """Its final path in the folder `out`: what a client is given."""

    @abstractmethod
    def manifest(self, path: Path) -> Path:
        """Where its manifest lies when it is at `path`."""

    @abstractmethod
    def names(self, staging: Path, final: Path, layout: Layout) -> list[tuple[Path, Path]]:
        """(staged, final) of what it is made of, in the order in which it gets its names."""

    @abstractmethod
    def recognize(self, found: StoredBuild) -> bool:
        """Whether what lies there is this build, by its own description."""

    @property
    def is_written(self) -> bool:
        """Whether this version has the encoders; it plans the build all the same."""
        return True

    def side_files(self, source: Source, plan: BuildPlan, layout: Layout) -> dict[str, bytes]:
        """{name: bytes} of what lies beside its tensors."""
        return {}

    def cached(self, source: Source, context: int) -> Cached | None:
        """What whoever serves it keeps of a sequence of `context` tokens."""
        return source.architecture.cached(context)

    def alternatives(
        self, source: Source, plan: BuildPlan, options: Options, progress: Callable[[str, int, int], None] = quiet
    ) -> list[Alternative]:
        """What else could be asked for, and what each would lose; [] of a build that predicts nothing.

        `progress` is called with phase "solve", sizes solved and in all.
        """
        return []

    def left_out(self, source: Source) -> list[LeftOut]:
        """What of `source` has no place in it, and why."""
        return []

    def instead(self, source: Source) -> str:
        """What to ask for where most weights fall back."""
        return "ask for another build"

    def remedy(self, problem: str, source: Source, plan: BuildPlan, steps: Sequence[Step]) -> str:
        """`problem`, that its storages cannot hold the weights of `steps`, with what to do about it: one sentence."""
        return f"{problem}; mend the checkpoint first"

    def __str__(self) -> str:
        return self.name


class Family(Protocol):
    """Builds whose names hold a value, such as gguf:fit=16GB."""

    form: str  # of the names, as people are told it
    hears: frozenset[str]

    def build(self, name: str) -> Build | None:
        """The build that `name` means, None if it is of another family.

        Raises:
            PlanError: of this one, with a value that cannot be.
        """


BUILDS: dict[str, Build] = {}  # by name, in the order in which they are listed
FAMILIES: list[Family] = []


def register(*builds: Build) -> None:
    """Make builds known to every command.

    Raises:
        ValueError: there is one of that name.
    """
    for build in builds:
        if plain_name(build.name) in map(plain_name, BUILDS):
            raise ValueError(f"build: {brief(build.name)} is registered already; choose another name")
        BUILDS[build.name] = build


def register_family(family: Family) -> None:
    """Make builds known to every command whose names are of a form, rather than in a list."""
    FAMILIES.append(family)


def find_build(name: str) -> Build:
    """The build that `name` means, in any case, with `_` for `-`.

    Raises:
        PlanError: no build is called that; the sentence suggests the nearest.
    Example:
        >>> find_build("GGUF:q4_k_m").name, find_build("fp8_block").name
        ('gguf:Q4_K_M', 'fp8-block')
    """
    found = {plain_name(known): build for known, build in BUILDS.items()}.get(plain_name(name))
    found = found or next(filter(None, (family.build(name) for family in FAMILIES)), None)
    if found is None:
        known = [*BUILDS, *(family.form for family in FAMILIES)]
        raise PlanError(
            f"build {brief(name)} is unknown{did_you_mean(name, known)}; expected one of {', '.join(known)}"
        )
    return found


def refuse_unheard(names: Iterable[str], options: Options) -> None:
    """Refuse options that no build of `names` heeds.

    Raises:
        PlanError: so it is.
    """
    asked = [find_build(name) for name in names]
    for heard, asked_by in _ASKED_BY.items():
        if getattr(options, heard) != getattr(Options(), heard) and not any(heard in build.hears for build in asked):
            heeding = [name for name, build in BUILDS.items() if heard in build.hears]
            heeding += [family.form for family in FAMILIES if heard in family.hears]
            these = ", ".join(heeding) if len(heeding) < 9 else f"{heeding[0]} and {len(heeding) - 1} builds like it"
            raise PlanError(f"{' and '.join(asked_by)} are for {these}; leave them out, or ask for one")


def recognize(found: StoredBuild) -> str:
    """The name of the build that lies there, by its own description."""
    return next((name for name, build in BUILDS.items() if build.recognize(found)), "gguf:unknown")


def storage_of(name: str, found: Mapping[str, FoundTensor]) -> Storage | None:
    """How tensor `name` of a build is stored, `found` being all of its tensors; None: in no way that is known here."""
    storages = dict.fromkeys(storage for build in BUILDS.values() for storage in build.storages)
    return next(filter(None, (storage.of(name, found) for storage in storages)), None)
