"""The end of a conversion: side files, manifest, and the one rename that gives a checked build its final name.

A build of safetensors is a folder and appears in one rename. A GGUF is one file beside its manifest, which goes first:
without the file it promises nothing; of a split one the part that clients are given comes last. Nothing that exists is
ever replaced, and a run that died between two renames is finished by the next.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ornith_moe.quant.builds.stored import MANIFEST
from ornith_moe.quant.conversion.workers import PlacedBuild
from ornith_moe.quant.errors import ConversionError
from ornith_moe.quant.files import json_bytes, own_folder, read_json, sync_folder, write_file
from ornith_moe.quant.source.source import Source


def finish(source: Source, placed: PlacedBuild, sha256: Sequence[str], more: Mapping[str, Any]) -> None:
    """Write side files and the manifest, with `more`, of a checked build, still in its staging folder.

    Args:
        sha256: of each file of all builds.
    """
    plan, layout = placed.plan, placed.layout
    files = {
        file.name: {"bytes": file.size, "sha256": sha256[placed.first_file + i]} for i, file in enumerate(layout.files)
    }
    for name, payload in placed.sides.items():
        own_folder((placed.staging / name).parent)
        write_file(placed.staging / name, payload)
        files[name] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    manifest = {
        "build": plan.name,
        "source": source.name,
        "mtp": source.has_mtp,
        **source.added,
        "tensors": len(plan.tensors),
        "tensor_bytes": plan.tensor_bytes,
        **more,
        "files": files,
    }
    if plan.copied:
        manifest["copied"] = plan.copied  # weights that keep the codes and scales of the source
    if plan.non_finite:
        manifest["non_finite"] = plan.non_finite
    write_file(placed.staging / MANIFEST, json_bytes(manifest))
    sync_folder(placed.staging)


def final_paths(placed: PlacedBuild) -> list[tuple[Path, Path]]:
    """(staged, final) of what a build is made of, in the order in which it gets its names."""
    return placed.plan.build.names(placed.staging, placed.final, placed.layout)


def manifest_path(placed: PlacedBuild) -> Path:
    """Where the manifest of a finished build lies."""
    return placed.plan.build.manifest(placed.final)


def underflow(placed: PlacedBuild) -> dict[str, int]:
    """{tensor: weights that were too small for its scales} of a finished build, as its manifest counts them."""
    return read_json(manifest_path(placed)).get("underflow", {})


def publish(placed: PlacedBuild) -> None:
    """Give a checked build its final name, unless a run that died has done so.

    Raises:
        ConversionError: something else has that name, or the build is in neither place.
    """
    for staged, final in final_paths(placed):
        if staged.exists():
            if os.path.lexists(final):
                raise ConversionError(f"{final}: exists already; move it away and run the same command again")
            os.rename(staged, final)
        elif not final.exists():
            partial = placed.staging.parent
            raise ConversionError(f"{final}: is neither there nor in {partial}; run the command again with --restart")
    sync_folder(placed.final.parent)
