"""Verify a build: is it whole, is it what its manifest says, and how far is it from its source.

Three questions, each answerable without the one after it:

1. Whole: headers tile their files, the index fits, every FP8 tensor has a scale of the right shape, no value decodes to
   NaN or Inf, no scale is zero or negative.
2. Unchanged: every file has the size and sha256 of the manifest the conversion left.
3. True (`against` a source): the tensors are those the plan names, and hold all of the source but what is left out for
   a reason (quant/verification/accounts.py); every weight, decoded by our codecs and carried back through renames, head
   order and norm shift, is compared with the source, slab by slab. Kept weights must be equal; others must reach a
   floor that only damage falls below, well under what each format gives, where the range of its scales gives it at all
   (quant/verification/measure.py, quant/builds/storages/).

What is wrong both ways would hide here. The transforms themselves are therefore tested on logits, and our decoders
against ggml's C and the `gguf` package; the start of every slab of a GGUF is decoded by that package too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.builds.build import recognize
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.errors import CheckpointError, OrnithError, brief
from ornith_moe.quant.files import read_json
from ornith_moe.quant.opening import open_any
from ornith_moe.quant.source.architectures import holds_mtp
from ornith_moe.quant.source.source import Source
from ornith_moe.quant.verification.checks import allowed_non_finite, check_manifest, check_values, note_underflow
from ornith_moe.quant.verification.comparison import compare
from ornith_moe.quant.verification.result import Progress, Verification


@budgeted
def verify(build: str | Path, source: Source | None = None, *, progress: Progress | None = None) -> Verification:
    """Verify the build at `build`, a folder of safetensors or a `.gguf` file, against `source` if given.

    Args:
        build: path that `convert` reported.
        source: what it was made from, `open_source(folder)`.
        progress: called with phase ("hash", "read", "compare"), bytes done and bytes in all; with ("compile", 0, 0)
            from any thread when machine code is made, once on a machine.
    Returns:
        Verification: `ok`, number of tensors, per role `sqnr_db` (None when exact) and `max_abs_error`, problems found.
    Raises:
        CheckpointError: there is no build at that path. PlanError: `source` is a config without weights.
    """
    if source is not None:
        source.require("a comparison")
    stored, progress = StoredBuild(Path(build)), progress or (lambda phase, done, total: None)
    manifest = _manifest(stored)
    named = (manifest or {}).get("build")
    try:
        count = len(stored.tensors)
    except OrnithError as error:
        result = Verification(str((manifest or {}).get("build", "unknown")))
        result.problem(str(error))
        return result
    result = Verification(named if isinstance(named, str) else recognize(stored), count)
    allowed: set[str] = set()
    if manifest is None:
        result.note("no manifest beside it: nothing to hold its bytes against")
    else:
        check_manifest(stored, manifest, result, progress)
        allowed = allowed_non_finite(stored, manifest, result)
        note_underflow(stored, manifest, result)
    from ornith_moe.quant.simd.compiled import compiling  # not at import: numba is heavy

    with compiling(lambda function: progress("compile", 0, 0)):
        check_values(stored, allowed, result, progress)
        if source is not None and result.ok:
            compare(stored, source, result, progress)
    return result


def build_has_mtp(build: str | Path) -> bool:
    """Whether a build holds MTP tensors, by their names; True of one that cannot be read, as `verify` says why."""
    try:
        names = StoredBuild(Path(build)).tensors
    except OrnithError:
        return True
    return holds_mtp(names)


@budgeted
def open_against(
    build: str | Path, against: str | Path, *, mtp_from: str | Path | None = None, lora: str | Path | None = None
) -> Source:
    """What `build` is to be held against: the source, with MTP tensors if the build or its manifest has them.

    Args:
        mtp_from, lora: as `open_any`; what the build was made with.
    Raises:
        CheckpointError: as `open_any`; the manifest names what was added to the source, and it is not given here.
    """
    manifest = _manifest(StoredBuild(Path(build))) or {}
    for key, given in {"mtp_from": mtp_from, "lora": lora}.items():
        if manifest.get(key) and given is None:
            option = f"--{key.replace('_', '-')}"
            raise CheckpointError(
                f"{build}: was made with {option} {brief(manifest[key])}; give the same with {option}"
            )
    if mtp_from is not None:
        return open_any(against, ranges=True, mtp_from=mtp_from, lora=lora)
    if not build_has_mtp(build) and manifest.get("mtp") is not True:
        return open_any(against, mtp="drop", ranges=True, lora=lora)
    opened = open_any(against, ranges=True, lora=lora)
    keep = opened.offers_mtp and not opened.has_mtp
    return open_any(against, mtp="keep", ranges=True, lora=lora) if keep else opened


def _manifest(stored: StoredBuild) -> dict[str, Any] | None:
    return read_json(stored.manifest) if stored.manifest.is_file() else None
