"""Whether a build is whole and unchanged: what its manifest and its stored numbers say, without its source."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ornith_moe.quant.builds.build import storage_of
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.builds.underflow import underflow_notes
from ornith_moe.quant.files import open_file
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.chat_templates import FOLDER as TEMPLATES
from ornith_moe.quant.verification.result import Progress, Verification


def check_manifest(stored: StoredBuild, manifest: dict[str, Any], result: Verification, progress: Progress) -> None:
    """Every file has the size and sha256 of the manifest, and no file is beside it."""
    path = stored.path
    files = manifest.get("files")
    sound = isinstance(files, dict) and all(_is_file_entry(*item) for item in files.items())
    if not isinstance(files, dict) or not sound or not isinstance(manifest.get("build"), str):
        result.problem(f"{path.name}: the manifest does not name a build with bytes and sha256 of its files")
        return
    unlisted = sorted(set(stored.files) - files.keys())
    if unlisted:
        result.problem(f"{path.name}: the manifest does not list {unlisted[0]}; it is not of this build")
    if manifest.get("tensors") != result.tensors:
        result.problem(
            f"{path.name}: the manifest counts {manifest.get('tensors')} tensors, the files {result.tensors}"
        )
        return
    total, done = sum(entry["bytes"] for entry in files.values()), 0
    for name, entry in files.items():
        file = stored.folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            size = file.stat().st_size if file.is_file() else "no"
            result.problem(
                f"{name}: expected {entry['bytes']} bytes by the manifest, got {size}; move the build away and convert "
                "again"
            )
            continue
        with open_file(file, what="a file of the build", named=file == path) as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                result.problem(f"{name}: its sha256 is not the manifest's; the file was changed or damaged")
        done += entry["bytes"]
        progress("hash", done, total)


def _is_file_entry(name: str, entry: Any) -> bool:
    """A plain file name, or that of a chat template in its folder, with its size and digest."""
    if Path(name).name != name.removeprefix(f"{TEMPLATES}/") or not isinstance(entry, dict):
        return False
    return type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def allowed_non_finite(stored: StoredBuild, manifest: dict[str, Any], result: Verification) -> set[str]:
    """Unquantized tensors that hold a NaN or an infinity by leave of who made the build."""
    listed = manifest.get("non_finite", [])
    plain = {name for name, tensor in stored.tensors.items() if tensor.dtype in ("BF16", "F16", "F32")}
    if not isinstance(listed, list) or not all(isinstance(name, str) and name in plain for name in listed):
        result.problem("the manifest lists non_finite tensors that are not unquantized tensors of this build")
        return set()
    for name in listed:
        result.note(f"tensor {bare(name)} holds a NaN or an infinity, as its source does, and is kept unquantized")
    return set(listed)


def note_underflow(stored: StoredBuild, manifest: dict[str, Any], result: Verification) -> None:
    """What the maker of a build counted of weights too small for its types."""
    counts, found = manifest.get("underflow", {}), stored.tensors
    sound = isinstance(counts, dict) and all(name in found and type(n) is int and n > 0 for name, n in counts.items())
    if not sound:
        result.problem("the manifest counts lost weights of tensors that are not of this build")
    for line in underflow_notes({name: found[name].dtype for name in counts}, counts) if sound else ():
        result.note(line)


def check_values(stored: StoredBuild, allowed: set[str], result: Verification, progress: Progress) -> None:
    """Every stored number decodes to a finite one, and every tensor can be decoded at all, as its storage says."""
    found = stored.tensors
    total, done = sum(tensor.nbytes for tensor in found.values()), 0
    for name, tensor in found.items():
        storage = storage_of(name, found)
        if storage is None:
            result.note(f"tensor {bare(name)}: {tensor.dtype} is not decoded here, its values are unchecked")
        elif name not in allowed:
            for problem in storage.problems(name, found):
                result.problem(problem)
        done += tensor.nbytes
        progress("read", done, total)
