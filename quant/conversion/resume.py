"""What a folder of builds already holds: finished builds, an unfinished conversion, and whether they are this one's.

A build is made of its source, its headers and side files, and the importance of its columns: one digest of all that is
in its manifest (`made_from`) and in the journal of the run that makes it. So the same command goes on where it was,
says that it is finished where it is, and refuses to mix two conversions, whatever a run died of.

The digest knows the source by its config and a sample of its weights, not by dates, paths or how tensors are packed:
equal sources give equal manifests. What was written to the source after a build was made is told by its dates.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash

from ornith_moe.quant.conversion.journal import Head, Journal
from ornith_moe.quant.conversion.publish import final_paths, manifest_path
from ornith_moe.quant.conversion.workers import PlacedBuild
from ornith_moe.quant.errors import ConversionError, OrnithError, PlanError
from ornith_moe.quant.files import follow, read_json
from ornith_moe.quant.gguf.imatrix import Imatrix
from ornith_moe.quant.source.checkpoint import ITEM_BYTES
from ornith_moe.quant.source.source import Source, weight_matrix

ENCODING = 2  # raised when a storage gives other bytes, so that two versions never share a conversion
SAMPLED_WEIGHTS, SAMPLE_BYTES = 4096, 4096


def sample(source: Source) -> str:
    """Digest of the first rows of each weight of `source`, or of as many of them as a second allows.

    Of one that lies elsewhere, of what stands for its bytes: rows from everywhere would be all blocks of it.
    """
    digest = xxhash.xxh3_128(json.dumps(source.config, sort_keys=True).encode())
    if source.identity:
        digest.update("\n".join([source.identity, *(weight.name for weight in source.weights)]).encode())
    step = -(-len(source.weights) // SAMPLED_WEIGHTS)
    for index in range(0, len(source.weights), step):
        if source.identity and source.is_remote(index):
            continue
        dtype, (rows, columns) = source.dtype(index), weight_matrix(source.weights[index])
        wanted = max(SAMPLE_BYTES // max(columns * ITEM_BYTES[dtype], 1), 1)
        codes = source.codes(index)
        digest.update(f"{source.weights[index].name}\0{dtype}\0{f'{codes}' if codes else ''}".encode())
        digest.update(source.read(index, 0, min(wanted, rows)).raw.tobytes())
    return digest.hexdigest()


def made_from(sampled: str, build: PlacedBuild, imatrix: Imatrix | None = None) -> str:
    """Digest of all that determines the bytes of a build; `sampled` is the source's `sample`."""
    importance = imatrix.digest if imatrix and (build.plan.coverage or build.plan.measured) else ""
    digest = xxhash.xxh3_128(json.dumps([ENCODING, sampled, importance, build.plan.name]).encode())
    for payload in [*(file.header for file in build.layout.files), *build.sides.values()]:
        digest.update(f"{len(payload)}\0".encode() + payload)
    return digest.hexdigest()


def is_finished(source: Source, build: PlacedBuild, digest: str) -> bool:
    """Whether `build` has its final name, is whole by size, was made of all that `digest` stands for, and since."""
    manifest = manifest_path(build)
    if any(os.path.islink(final) or not final.exists() for _, final in final_paths(build)):
        return False
    try:
        made = read_json(manifest)
        if made.get("made_from") != digest or source.modified_ns() > manifest.stat().st_mtime_ns:
            return False
        return all((manifest.parent / name).stat().st_size == entry["bytes"] for name, entry in made["files"].items())
    except (OrnithError, OSError, AttributeError, KeyError, TypeError):
        return False


def refuse_taken(placed: Sequence[PlacedBuild]) -> None:
    """Refuse to begin what would have to replace a file, a folder or a link at the end."""
    for build in placed:
        for _, final in final_paths(build):
            if os.path.lexists(final):
                raise PlanError(
                    f"{final}: exists already and is not what this command makes; leave {build.plan.build} out, move "
                    "the file away or choose another folder"
                )


def goes_on(head: Head, source: Source, digests: Mapping[str, str], finished: set[str], staging: Path) -> list[str]:
    """The builds, in their order, of an unfinished conversion that this command goes on with.

    Args:
        digests: {build: `made_from`} of the builds this command asks for; `finished`: those that exist.
    Raises:
        PlanError: it was begun for something else.
    """
    if head.source != source.fingerprint:
        what = "from another source, or before this one was changed,"
    elif head.builds.keys() - digests.keys() or digests.keys() - head.builds.keys() - finished:
        what = f"for other builds ({', '.join(head.builds)})"
    elif any(digests[build] != digest for build, digest in head.builds.items()):
        what = "with other options, or beside other side files,"
    else:
        return list(head.builds)
    raise PlanError(
        f"{staging}: a conversion that was begun {what} is unfinished; run its own command again to finish it, or add "
        "--restart to this one to drop it and begin anew"
    )


def drop(staging: Path, journal: Journal | None = None) -> None:
    """Remove the partial folder, the journal last: until then a run that dies here goes on."""
    with journal or Journal(staging):  # nobody else is writing there
        for path in staging.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        shutil.rmtree(staging)


def check_out(source: Source, out: Path, staging: Path) -> None:
    """Whether `out` can be the folder for builds of `source`."""
    try:
        target = follow(out)
    except OSError:
        raise PlanError(f"{out}: is a link that leads nowhere; choose another folder for the builds") from None
    if os.path.lexists(out) and not out.is_dir():
        raise PlanError(f"{out}: expected a folder for the builds, found something else")
    if target == source.folder.resolve():
        raise PlanError(f"{out}: is the source itself; choose another folder for the builds")
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        raise ConversionError(f"{staging}: expected the folder of an unfinished conversion or nothing; move it away")
