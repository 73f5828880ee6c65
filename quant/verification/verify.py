"""Verify a build: is it whole, is it what its manifest says, and how far is it from its source.

Three questions, each answerable without the one after it:

1. Whole: headers tile their files, the index fits, every FP8 tensor has a scale of the right shape, no value decodes to
   NaN or Inf, no scale is zero or negative.
2. Unchanged: every file has the size and sha256 of the manifest the conversion left.
3. True (`against` a source): the tensors are those the plan names, and hold all of the source but what is left out for
   a reason (quant/verification/accounts.py); every weight, decoded by our codecs and carried back through renames, head
   order and norm shift, is compared with the source, slab by slab. Kept weights must be equal; others must reach a
   floor that only damage falls below, well under what each format gives, where the range of its scales gives it at all
   (quant/verification/measure.py, quant/builds/underflow.py).

What is wrong both ways would hide here. The transforms themselves are therefore tested on logits, and our decoders
against ggml's C and the `gguf` package; the start of every slab of a GGUF is decoded by that package too.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.builds.plan import BuildPlan, Step
from ornith_moe.quant.builds.planning import plan_build
from ornith_moe.quant.builds.underflow import floor_db, underflow_notes
from ornith_moe.quant.codecs.sizes import block_shape
from ornith_moe.quant.conversion.publish import MANIFEST
from ornith_moe.quant.conversion.stream import Unit, read_unit, runs, units
from ornith_moe.quant.errors import CheckpointError, OrnithError, PlanError
from ornith_moe.quant.files import open_file, read_json
from ornith_moe.quant.gguf.mixtures import FILE_TYPES
from ornith_moe.quant.gguf.reader import read_gguf_header
from ornith_moe.quant.source.accounts import LeftOut, bare, some
from ornith_moe.quant.source.chat_templates import FOLDER as TEMPLATES
from ornith_moe.quant.source.checkpoint import read_tables
from ornith_moe.quant.source.hub import open_any
from ornith_moe.quant.source.reconcile import mtp_of
from ornith_moe.quant.source.slab import matrix_shape, to_float32
from ornith_moe.quant.source.weights import Source, weight_matrix
from ornith_moe.quant.verification.accounts import account
from ornith_moe.quant.verification.measure import Error, unit_error

SLAB_BYTES = 8 << 20
SECOND_BYTES = 16 << 10  # of each slab, decoded twice: the `gguf` package takes twenty times as long
MAX_PROBLEMS = 50
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """A tensor of a build as its file describes it; `shape` in Hugging Face order."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    named: bool = False  # the user named this very file


@dataclass
class Verification:
    build: str
    tensors: int = 0
    roles: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)  # of the source, for a reason

    @property
    def ok(self) -> bool:
        return not self.problems

    def problem(self, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)

    def note(self, text: str) -> None:
        if len(self.notes) < MAX_PROBLEMS:
            self.notes.append(text)


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
        CheckpointError: there is no build at that path.
    """
    path, progress = Path(build), progress or (lambda phase, done, total: None)
    manifest = _manifest(path)
    try:
        found = _read_tensors(path)
    except OrnithError as error:
        result = Verification(str((manifest or {}).get("build", "unknown")))
        result.problem(str(error))
        return result
    named = (manifest or {}).get("build")
    result = Verification(named if isinstance(named, str) else _guess(path), len(found))
    allowed: set[str] = set()
    if manifest is None:
        result.note("no manifest beside it: nothing to hold its bytes against")
    else:
        _check_manifest(path, manifest, result, progress)
        allowed = _non_finite(manifest, found, result)
        _note_underflow(manifest, found, result)
    from ornith_moe.quant.simd.compiled import compiling  # not at import: numba is heavy

    with compiling(lambda function: progress("compile", 0, 0)):
        _check_values(found, result, progress, allowed)
        if source is not None and result.ok:
            _compare(path, found, source, result, progress)
    return result


def read_safetensors_build(folder: Path) -> dict[str, FoundTensor]:
    """Tensors of a safetensors folder, quantized or not; CheckpointError if it is not whole."""
    _, tensors = read_tables(folder)
    return {n: FoundTensor(t.dtype, t.shape, t.path, t.offset, t.nbytes) for n, t in tensors.items()}


def read_gguf_tensors(path: Path) -> dict[str, FoundTensor]:
    """Tensors of a GGUF; CheckpointError if it is none or not whole."""
    _, tensors = read_gguf_header(path)
    return {t.name: FoundTensor(t.dtype, t.shape, path, t.offset, t.nbytes, named=True) for t in tensors}


def build_has_mtp(build: str | Path) -> bool:
    """Whether a build holds MTP tensors, by their names; True of one that cannot be read, as `verify` says why."""
    try:
        names = _read_tensors(Path(build))
    except OrnithError:
        return True
    return any(name.startswith("mtp.") or ".nextn." in name for name in names)


@budgeted
def open_against(build: str | Path, against: str | Path) -> Source:
    """What `build` is to be held against: the source, with MTP tensors if the build or its manifest has them."""
    manifest = _manifest(Path(build)) or {}
    if not build_has_mtp(build) and manifest.get("mtp") is not True:
        return open_any(against, mtp="drop")
    opened = open_any(against)
    beside = opened.checkpoint.others.values() if opened.checkpoint and not opened.has_mtp else ()
    kept = any(mtp_of(table, opened.checkpoint.tensors) for table in beside)
    return open_any(against, mtp="keep") if kept else opened


def _read_tensors(path: Path) -> dict[str, FoundTensor]:
    return read_gguf_tensors(path) if path.is_file() else read_safetensors_build(path)


def _manifest(path: Path) -> dict[str, Any] | None:
    if not (path.is_dir() or path.is_file()):
        found = "something that is neither" if path.exists() else "nothing"
        raise CheckpointError(f"{path}: no build here; expected a folder of safetensors or a .gguf file, found {found}")
    manifest = path / MANIFEST if path.is_dir() else path.with_name(path.name + ".manifest.json")
    return read_json(manifest) if manifest.is_file() else None


def _guess(path: Path) -> str:
    """The build a path holds, by its own description."""
    if path.is_dir():
        quantization = read_json(path / "config.json").get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        return {"compressed-tensors": "fp8-channel", "fp8": "fp8-block"}.get(str(method), "bf16")
    number = read_gguf_header(path)[0].get("general.file_type")
    names = {kind.id: name for name, kind in FILE_TYPES.items()}
    return "gguf:" + (names.get(number, "unknown") if type(number) is int else "unknown")


def _check_manifest(path: Path, manifest: dict[str, Any], result: Verification, progress: Progress) -> None:
    folder = path if path.is_dir() else path.parent
    files = manifest.get("files")
    listed = isinstance(files, dict) and all(_is_file_entry(*item) for item in files.items())
    if not listed or not isinstance(manifest.get("build"), str):
        result.problem(f"{path.name}: the manifest does not name a build with bytes and sha256 of its files")
        return
    held = [p.name for p in folder.iterdir() if p.suffix == ".safetensors"] if path.is_dir() else [path.name]
    unlisted = sorted(set(held) - files.keys())
    if unlisted:
        result.problem(f"{path.name}: the manifest does not list {unlisted[0]}; it is not of this build")
    if manifest.get("tensors") != result.tensors:
        result.problem(
            f"{path.name}: the manifest counts {manifest.get('tensors')} tensors, the files {result.tensors}"
        )
        return
    total, done = sum(entry["bytes"] for entry in files.values()), 0
    for name, entry in files.items():
        file = folder / name
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


def _non_finite(manifest: dict[str, Any], found: dict[str, FoundTensor], result: Verification) -> set[str]:
    """Unquantized tensors that hold a NaN or an infinity by leave of who made the build."""
    listed = manifest.get("non_finite", [])
    plain = {name for name, tensor in found.items() if tensor.dtype in ("BF16", "F16", "F32")}
    if not isinstance(listed, list) or not all(isinstance(name, str) and name in plain for name in listed):
        result.problem("the manifest lists non_finite tensors that are not unquantized tensors of this build")
        return set()
    for name in listed:
        result.note(f"tensor {bare(name)} holds a NaN or an infinity, as its source does, and is kept unquantized")
    return set(listed)


def _note_underflow(manifest: dict[str, Any], found: dict[str, FoundTensor], result: Verification) -> None:
    """What the maker of a build counted of weights too small for its types."""
    counts = manifest.get("underflow", {})
    sound = isinstance(counts, dict) and all(name in found and type(n) is int and n > 0 for name, n in counts.items())
    if not sound:
        result.problem("the manifest counts lost weights of tensors that are not of this build")
    for line in underflow_notes({name: found[name].dtype for name in counts}, counts) if sound else ():
        result.note(line)


def _check_values(found: dict[str, FoundTensor], result: Verification, progress: Progress, allowed: set[str]) -> None:
    """Every stored number decodes to a finite one, and every FP8 tensor can be decoded at all."""
    total, done = sum(tensor.nbytes for tensor in found.values()), 0
    for name, tensor in found.items():
        if tensor.dtype == "F8_E4M3":
            _check_scale(name, tensor, found, result)
        if name in allowed:
            pass
        elif _is_decoded(tensor.dtype):
            for start, codes in _slabs(tensor):
                bad = _first_bad(codes, tensor.dtype)
                if bad is not None:
                    row = (start + bad) // matrix_shape(tensor.shape)[1]
                    result.problem(f"{tensor.path.name}: tensor {name}, row {row} holds a NaN or an infinity")
                    break
                if not _decodes_alike(codes, tensor.dtype):
                    row = start // matrix_shape(tensor.shape)[1]
                    result.problem(
                        f"{tensor.path.name}: tensor {name}, {tensor.dtype} from row {row} on decodes to other values "
                        "with the gguf package than with ours; please report it, and trust neither until then"
                    )
                    break
        else:
            result.note(f"tensor {bare(name)}: {tensor.dtype} is not decoded here, its values are unchecked")
        done += tensor.nbytes
        progress("read", done, total)


def _check_scale(name: str, tensor: FoundTensor, found: dict[str, FoundTensor], result: Verification) -> None:
    rows, columns = matrix_shape(tensor.shape)
    channel, block = found.get(f"{name}_scale"), found.get(f"{name}_scale_inv")
    scale = channel or block
    expected = (rows, 1) if channel else (-(-rows // 128), -(-columns // 128))
    if scale is None or scale.shape != expected or scale.dtype not in ("BF16", "F32"):
        got = f"{scale.dtype} {list(scale.shape)}" if scale else "none"
        result.problem(f"{tensor.path.name}: tensor {bare(name)} is FP8 and needs a scale {list(expected)}, got {got}")
        return
    for _, values in _slabs(scale):
        if not (to_float32(values, scale.dtype) > 0).all():
            result.problem(f"{scale.path.name}: the scale of {name} is not positive everywhere")
            return


def _is_decoded(dtype: str) -> bool:
    if dtype == "F8_E4M3":
        return True
    from ornith_moe.quant.codecs.gguf import DECODERS

    return dtype in DECODERS


def _first_bad(codes: np.ndarray, dtype: str) -> int | None:
    """Index of the first value that is a NaN or an infinity."""
    if dtype == "F8_E4M3":
        bad = (codes & 0x7F) == 0x7F
    elif dtype in ("BF16", "F16", "F32"):
        bad = ~np.isfinite(to_float32(codes, dtype))
    else:
        bad = ~np.isfinite(_decode(codes, dtype))
    return int(bad.argmax()) if bad.any() else None


def _decode(codes: np.ndarray, dtype: str) -> np.ndarray:
    from ornith_moe.quant.codecs.gguf import dequantize_gguf

    return dequantize_gguf(codes, dtype)


def _decodes_alike(codes: np.ndarray, dtype: str) -> bool:
    """Whether the first of these codes mean to the `gguf` package what they mean to us."""
    if dtype == "F8_E4M3":
        return True
    size = block_shape(dtype)[1]
    codes = codes[: SECOND_BYTES // size * size]
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[dtype])
    return np.array_equal(_decode(codes, dtype), theirs, equal_nan=True)


def _slabs(tensor: FoundTensor) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first value, uint8 [n]) of a tensor in whole blocks, a slab at a time whatever its shape."""
    block, block_bytes = (1, 1) if tensor.dtype == "F8_E4M3" else block_shape(tensor.dtype)
    slab = SLAB_BYTES // block_bytes * block_bytes
    for start in range(0, tensor.nbytes, slab):
        yield start // block_bytes * block, _read(tensor, start, min(slab, tensor.nbytes - start))


def _read(tensor: FoundTensor, start: int, length: int) -> np.ndarray:
    with open_file(tensor.path, what="a file of the build", named=tensor.named) as file:
        data = np.frombuffer(os.pread(file.fileno(), length, tensor.offset + start), np.uint8)
    if data.size != length:
        raise CheckpointError(f"{tensor.path.name}: ends early, at byte {tensor.offset + start + data.size}")
    return data


def _as_stored(path: Path, source: Source, build: str, found: dict[str, FoundTensor]) -> BuildPlan:
    """The plan of `build` with what its maker decided: types of a GGUF, weights that an FP8 build keeps.

    Raises:
        PlanError: the build is unknown, or keeps a weight that its own config does not skip.
    """
    plain = plan_build(source, build)
    plan = plan_build(source, build, stored={name: tensor.dtype for name, tensor in found.items()})
    plan.notes = [note for note in plan.notes if note not in plain.notes]
    quantized = [step for step in plan.steps if len(step.parts) > 1]

    def is_kept(step: Step) -> bool:
        tensor = found.get(plan.tensors[step.tensors[0]].name)
        return tensor is not None and tensor.dtype == source.dtype(step.weight)

    kept = {step.weight: "stored unquantized" for step in quantized if is_kept(step)}
    if not kept:
        return plan
    plan = plan_build(source, build, kept=kept)
    config = read_json(path / "config.json").get("quantization_config")
    listed = [config.get(key) for key in ("ignore", "modules_to_not_convert")] if isinstance(config, dict) else []
    names = {str(name) for one in listed if isinstance(one, list) for name in one}
    wanted = [name for key in ("ignore", "modules_to_not_convert") for name in plan.config.get(key, ())]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise PlanError(f"config.json: {len(missing)} unquantized modules are not on its skip list, first {missing[0]}")
    plan.notes = [f"{len(kept)} weights, the first {source.weights[min(kept)].name}, are stored unquantized"]
    return plan


def _compare(
    path: Path, found: dict[str, FoundTensor], source: Source, result: Verification, progress: Progress
) -> None:
    try:
        plan = _as_stored(path, source, result.build, found)
    except OrnithError as error:
        result.problem(str(error))
        return
    for note in plan.notes:
        result.note(note)
    result.left_out, lost = account(source, plan)
    if lost:
        result.problem(f"{some('tensor', lost)}, of the source and nowhere in the build, for no reason known")
    if not _compare_tables(plan, found, result):
        return
    numbers: dict[int, list[int]] = {}  # of the steps of each weight
    for number, step in enumerate(plan.steps):
        numbers.setdefault(step.weight, []).append(number)
    work = [(unit, number) for unit in units(source, SLAB_BYTES) for number in numbers.get(unit.weight, ())]
    errors = [Error() for _ in plan.steps]
    with ThreadPoolExecutor() as pool:
        measured = pool.map(lambda one: _unit_error(source, plan, plan.steps[one[1]], one[0], found), work)
        for done, ((_, number), error) in enumerate(zip(work, measured, strict=True), 1):
            errors[number].add(error)
            progress("compare", done, len(work))
    roles: dict[str, Error] = {}
    for step, error in zip(plan.steps, errors, strict=True):
        weight = source.weights[step.weight]
        roles.setdefault(weight.role, Error()).add(error)
        floor = _floor_db(step, source.dtype(step.weight))
        if error.judged_db is not None and not error.judged_db >= floor:
            result.problem(
                f"{weight.name}: SQNR {error.judged_db:.1f} dB as {step.storage.name}, below the floor of {floor} dB"
            )
    for role, error in roles.items():
        sqnr = error.sqnr_db
        result.roles[role] = {
            "sqnr_db": None if sqnr is None or math.isinf(sqnr) else round(sqnr, 3),
            "max_abs_error": error.largest,
            "exact": sqnr is None,
        }


def _floor_db(step: Step, dtype: str) -> float:
    return math.inf if step.transform.exact and step.storage.name == dtype else floor_db(step.storage.name)


def _compare_tables(plan: BuildPlan, found: dict[str, FoundTensor], result: Verification) -> bool:
    planned = {tensor.name: tensor for tensor in plan.tensors}
    for name in sorted(planned.keys() - found.keys()):
        result.problem(f"tensor {bare(name)} is missing from the build")
    for name in sorted(found.keys() - planned.keys()):
        result.problem(f"tensor {bare(name)} belongs to no weight of the source")
    for name in planned.keys() & found.keys():
        want, got = planned[name], found[name]
        if (want.dtype, tuple(want.shape), want.nbytes) != (got.dtype, got.shape, got.nbytes):
            result.problem(
                f"tensor {bare(name)}: expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
            )
        elif want.constant and not np.array_equal(
            _read(got, 0, got.nbytes).view("<f4"), np.array(want.constant, "<f4")
        ):
            result.problem(f"tensor {bare(name)}: its values are not the constants the architecture asks for")
    return result.ok


def _unit_error(source: Source, plan: BuildPlan, step: Step, unit: Unit, found: dict[str, FoundTensor]) -> Error:
    rows = weight_matrix(source.weights[unit.weight])[0]
    slab = step.transform.taken(read_unit(source, unit), unit.start, rows)
    parts = [np.empty((len(slab.raw) // part.rows, part.row_bytes), np.uint8) for part in step.parts]
    for run in runs(step, unit, rows):
        part, tensor = step.parts[run.part], found[plan.tensors[step.tensors[run.part]].name]
        stored = _read(tensor, run.target * part.row_bytes, run.count * part.row_bytes)
        parts[run.part][run.rows] = stored.reshape(run.count, part.row_bytes)
    return unit_error(step, slab, tuple(parts))


def verification_json(result: Verification) -> dict[str, Any]:
    """A verification as `ornith-moe verify --json` prints it."""
    return {
        "ok": result.ok,
        "build": result.build,
        "tensors": result.tensors,
        "roles": result.roles,
        "problems": result.problems,
        "notes": result.notes,
        "left_out": [entry.json() for entry in result.left_out],
    }
