"""Builds that are a GGUF: one file, or several of which a client is given the first; the manifest beside it."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from ornith_moe.quant.builds.build import Build, Options
from ornith_moe.quant.builds.layout import Layout
from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.builds.storages.gguf import Gguf
from ornith_moe.quant.builds.storages.storage import Storage
from ornith_moe.quant.builds.stored import MANIFEST, StoredBuild, manifest_of_file
from ornith_moe.quant.gguf.mixtures import FileType
from ornith_moe.quant.source.model_card import Card, read_card
from ornith_moe.quant.source.source import Source


class GgufFile(Build):
    """What they have in common; one of them says `decide`, `lay_out` and `file`."""

    library = "gguf"
    engines: tuple[str, ...] = ("llama.cpp", "Ollama")
    storages: tuple[type[Storage], ...] = (Gguf,)

    @abstractmethod
    def file(self, source: Source) -> str:
        """Its name in the folder of the builds."""

    def files(self, plan: BuildPlan, options: Options) -> int:
        return 1

    def path(self, out: Path, layout: Layout) -> Path:
        return out / layout.files[0].name

    def manifest(self, path: Path) -> Path:
        return manifest_of_file(path)

    def names(self, staging: Path, final: Path, layout: Layout) -> list[tuple[Path, Path]]:
        """The manifest before the file, without which it promises nothing, and last what a client is given."""
        files = [(staging / file.name, final.with_name(file.name)) for file in reversed(layout.files)]
        return [(staging / MANIFEST, self.manifest(final)), *files]

    @staticmethod
    def card(source: Source, options: Options) -> Card:
        """The model card of the source."""
        return options.once("model card", lambda: read_card(source.folder))

    @staticmethod
    def is_of_type(found: StoredBuild, kind: FileType) -> bool:
        """Whether it is a GGUF that says it is of this file type."""
        number = None if found.is_folder else found.metadata.get("general.file_type")
        return type(number) is int and number == kind.id
