"""A Hugging Face checkpoint as a table of headers and a way to read rows.

Opening reads `config.json`, the index and the header of every shard, and nothing else; the payload is read later, a
slab of rows at a time, straight from the file. Nothing is unpickled, executed or followed out of the folder. Which
files are the model, and what lies beside it, is quant/source/shards.py's to say.

A checkpoint is hostile input until it is checked. All of this happens before the first weight is read:

- the index names plain files of this folder, each file holds just the tensors the index gives it, and none is missing;
- a header is at most 100 MB of JSON without duplicate keys, and its tensors tile the payload: no hole, no overlap, no
  unknown dtype, byte counts that follow from dtype and shape, and a file that ends where the header says it ends;
- a source that is quantized in any way but FP8 with scales (quant/source/quantized.py) is refused; its tensors tell,
  since a config may keep the `quantization_config` of a training run whose weights were merged and saved in BF16.

Format: https://github.com/huggingface/safetensors (format section of its README).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ornith_moe.quant.budget import budget, budgeted
from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import OpenFiles, Payload, kind, open_file, parse_json, read_json
from ornith_moe.quant.recipes import BLOCK
from ornith_moe.quant.source.accounts import LeftOut, bare
from ornith_moe.quant.source.quantized import READ, block_of, describes_fp8, describes_nvfp4
from ornith_moe.quant.source.shards import INDEX, UNNAMED, ModelFiles, is_adapter_alone, model_files
from ornith_moe.quant.source.slab import matrix_shape
from ornith_moe.quant.source.tensor_names import is_buffer, is_quantization, is_spare

CONFIG = "config.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
OTHER_DTYPES = {  # known to the format, but not weights we convert
    "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
A_SHARD = "a shard of the checkpoint"
RANGES_MARK = "ornith-ranges.json"  # in a folder whose shards are headers (quant/source/ranges.py)
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
MOST_OTHERS, MOST_OTHER_TENSORS = 16, 1 << 18  # files beside the model whose headers are read, and what they may hold
INFO_MEMORY = 600  # the most that a TensorInfo with its name takes
_KNOWN_BYTES = {**ITEM_BYTES, **OTHER_DTYPES}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of one safetensors file: where its bytes lie. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _KNOWN_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """Config and tensor table of a checkpoint folder; `read_rows` is the only way to its payload."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    fingerprint: str  # of config, headers, sizes and modification times: a changed source is not resumed
    notes: tuple[str, ...] = ()
    others: Mapping[str, Mapping[str, TensorInfo]] = field(default_factory=dict)  # files that may hold more of it
    left_out: tuple[LeftOut, ...] = ()  # files
    block: tuple[int, int] = BLOCK  # rows and columns that share a scale in FP8 tensors of that layout
    config_name: str = CONFIG
    opened: Payload = field(default_factory=lambda: OpenFiles(A_SHARD), compare=False, repr=False)

    def read_rows(self, tensor: TensorInfo, start: int, rows: int) -> np.ndarray:
        """Bytes of rows [start, start + rows) of `tensor` as uint8 [rows, row_bytes]; one positioned read, no mapping.

        A mapped file that shrinks kills the process and one with a hole reads as zeros; a short read is an error here.
        """
        total, columns = matrix_shape(tensor.shape)
        assert 0 <= start and start + rows <= total, (tensor.name, start, rows, total)
        row_bytes = columns * _KNOWN_BYTES[tensor.dtype]
        buffer = np.empty((rows, row_bytes), np.uint8)
        view = buffer.data.cast("B") if buffer.size else memoryview(b"")
        done = self.opened.read_into(tensor.path, view, tensor.offset + start * row_bytes)
        if done < buffer.size:
            raise CheckpointError(
                f"{tensor.path.name}: tensor {bare(tensor.name)} ends {buffer.size - done} bytes early; "
                "the file was cut short while it was read, so fetch it again"
            )
        return buffer

    def including(self, files: Mapping[str, Mapping[str, TensorInfo]]) -> Checkpoint:
        """This checkpoint with some of its `others`, or some of their tensors, as part of the model."""
        tensors = {**self.tensors, **{name: info for table in files.values() for name, info in table.items()}}
        paths = tuple(sorted({*self.files, *(info.path for table in files.values() for info in table.values())}))
        left_out = tuple(
            replace(entry, names=names)
            for entry in self.left_out
            if (names := tuple(name for name in entry.names if name not in files))
        )
        fingerprint = _fingerprint(self.folder / self.config_name, self.config, paths, tensors)
        return replace(self, tensors=tensors, files=paths, left_out=left_out, fingerprint=fingerprint)

    def changed(self) -> bool:
        """Whether a file of the source was replaced or written to since it was opened."""
        config = self.folder / self.config_name
        return _fingerprint(config, self.config, self.files, self.tensors) != self.fingerprint

    def modified_ns(self) -> int:
        """When one of its files was last written to, in nanoseconds since 1970."""
        return max(path.stat().st_mtime_ns for path in (self.folder / self.config_name, *self.files))


@budgeted
def open_checkpoint(folder: str | Path, *, drop_mtp: bool = False, payload: Payload | None = None) -> Checkpoint:
    """Read config and headers of the checkpoint in `folder` and check them.

    Args:
        folder: a directory with `config.json` and `*.safetensors`, with `model.safetensors.index.json` when sharded.
        drop_mtp: shards of multi-token prediction that the index names need not be there.
        payload: where the bytes of shards are, if the folder holds only their headers (quant/source/ranges.py).
    Returns:
        Checkpoint: its table of tensors; no payload has been read.
    Raises:
        CheckpointError: whatever is missing, damaged, hostile or already quantized, in one sentence.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a checkpoint folder, found {_found(folder)}")
    if is_adapter_alone(folder):
        raise CheckpointError(_adapter_sentence(folder))
    if (folder / "snapshots").is_dir() and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: is a repository of a Hub cache; give one of the folders in its snapshots/")
    if (folder / RANGES_MARK).exists() and payload is None:
        raise CheckpointError(
            f"{folder}: holds the headers of a repository whose weights are read from the Hub; give its name, hf://org/name"
        )
    config = read_json(folder / "config.json", what="a checkpoint folder with a config.json")
    found = model_files(folder, lambda: _weight_map(folder), drop_mtp=drop_mtp)
    files, tensors = _read_tables(folder, found)
    config, section, stale = without_quantization(config, folder / "config.json", tensors)
    others, left_out = _read_others(folder, found)
    return Checkpoint(
        folder,
        config,
        tensors,
        files,
        _fingerprint(folder / CONFIG, config, files, tensors),
        (*found.notes, *stale),
        others,
        left_out,
        block_of(section),
        opened=payload or OpenFiles(A_SHARD),
    )


def opened(folder: Path, config: dict[str, Any], config_name: str, file: str) -> Checkpoint:
    """The tensors of one file of a folder, beside a config that says what they are.

    Raises:
        CheckpointError: as `read_header`.
    """
    tensors = read_header(folder / file)
    budget().take(INFO_MEMORY * len(tensors), f"{file}: its tensors")
    fingerprint = _fingerprint(folder / config_name, config, (folder / file,), tensors)
    return Checkpoint(folder, config, tensors, (folder / file,), fingerprint, config_name=config_name)


@budgeted
def read_tables(folder: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """Files and tensors of a folder of safetensors, each header checked and held against the index.

    Raises:
        CheckpointError: a shard missing, damaged, outside the folder, or not what the index says it is.
    """
    return _read_tables(folder, model_files(folder, lambda: _weight_map(folder)))


def _read_tables(folder: Path, found: ModelFiles) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    files = tuple(folder / name for name in found.names)
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        header = read_header(path)
        budget().take(INFO_MEMORY * len(header), f"{path.name}: its tensors beside those of other shards")
        indexed = found.names[path.name]
        wanted = header.keys() if indexed is None else indexed
        stray = [name for name in header.keys() - wanted if not is_spare(name)]
        lost = [name for name in wanted - header.keys() if not is_spare(name)]
        if stray:
            raise CheckpointError(
                f"{path.name}: holds tensor {bare(min(stray))}, which the index does not place there; "
                "index and shards are not of one checkpoint"
            )
        if lost:
            raise CheckpointError(
                f"{path.name}: the index places tensor {bare(min(lost))} here (and {len(lost) - 1} more) "
                "but the shard does not hold it; fetch or save shards and index of one model"
            )
        if twice := tensors.keys() & header.keys():
            holder = tensors[min(twice)].path.name
            raise CheckpointError(f"{path.name}: holds tensor {bare(min(twice))}, as {holder} does; keep one of them")
        tensors |= header
    return files, tensors


def read_header(path: Path, *, named: bool = False) -> dict[str, TensorInfo]:
    """The checked header of one safetensors file: {name: TensorInfo}, in file order.

    Args:
        named: as `open_file`.
    Raises:
        CheckpointError: not a safetensors file, truncated, trailing bytes, holes, overlaps, wrong byte counts.
    """
    with open_file(path, what="a safetensors file", named=named) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start.startswith(b"version "):
            raise CheckpointError(f"{path.name}: is a Git LFS pointer of {size} bytes, not weights; run 'git lfs pull'")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(MAX_HEADER_BYTES, max(size - 8, 0)):
            raise CheckpointError(
                f"{path.name}: not a whole safetensors file: header of {length} bytes in a file of {size} "
                f"(limit {MAX_HEADER_BYTES}); fetch it again"
            )
        raw = file.read(length)
    header = parse_json(raw, path.name)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: the header is {type(header).__name__}, expected a JSON object")
    header.pop("__metadata__", None)

    infos, payload = [], 8 + length
    for name, entry in header.items():
        infos.append(_tensor_info(path, name, entry, payload))
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    position = payload
    for info in infos:
        if info.offset != position:
            kind = "a hole before" if info.offset > position else "an overlap at"
            raise CheckpointError(
                f"{path.name}: {kind} tensor {bare(info.name)} at byte {info.offset}; the header is damaged"
            )
        position += info.nbytes
    if position != size:
        short = "truncated, fetch it again" if size < position else "it has bytes that no tensor owns"
        raise CheckpointError(f"{path.name}: the header describes {position} bytes and the file has {size}: {short}")
    return {info.name: info for info in infos}


def without_quantization(
    config: dict[str, Any], path: Path, tensors: Mapping[str, TensorInfo] | None
) -> tuple[dict[str, Any], Mapping[str, Any], tuple[str, ...]]:
    """`config` without its quantization section, that section where it is of FP8 weights, {} otherwise, and notes.

    A section that the tensors do not bear out is stale.

    Args:
        path: of the config, for messages. tensors: of the checkpoint; None if only the config is known.
    Raises:
        CheckpointError: the tensors are quantized, or may be, in a way that is not read.
    """
    sections = [(where, key) for where in (config, _text(config)) for key in QUANTIZATION_KEYS if where.get(key)]
    if not sections:
        return config, {}, ()
    section, key = sections[0][0][sections[0][1]], sections[0][1]
    method = brief(section.get("quant_method", "unknown") if isinstance(section, dict) else section)
    odd = None if tensors is None else _quantized_tensor(tensors)
    clean = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(config.get("text_config"), dict):
        clean["text_config"] = {k: v for k, v in config["text_config"].items() if k not in QUANTIZATION_KEYS}
    if tensors is not None and odd is None:
        stale = f"config.json has a stale {key} (quant_method {method}): no tensor is quantized, so it is left out"
        return clean, {}, (stale,)
    if describes_fp8(section) or (tensors is not None and describes_nvfp4(section)):
        return clean, section, ()
    if tensors is None:
        raise CheckpointError(
            f"{path}: says that the source is already quantized (quant_method {method}), which a config alone cannot "
            "refute; give its checkpoint folder, whose tensors can, or the BF16 original"
        )
    raise CheckpointError(
        f"{path}: the source is already quantized (quant_method {method}; tensor {bare(odd or '')} is "
        f"{tensors[odd or ''].dtype}), and of quantized weights only FP8 is read, {READ}, and NVFP4; convert from "
        "its BF16 original, or from an FP8 one"
    )


def _quantized_tensor(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor that no unquantized checkpoint has."""
    plain = (name for name, info in tensors.items() if info.dtype in ITEM_BYTES and not is_quantization(name))
    return next(iter(sorted(tensors.keys() - set(plain) - {name for name in tensors if is_buffer(name)})), None)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """{tensor name: file name} of the index; None without one."""
    index = folder / INDEX
    if not index.is_file():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: expected weight_map to map tensor names to file names")
    if not weight_map:
        raise CheckpointError(f"{index}: weight_map is empty; the index is damaged")
    for name in set(weight_map.values()):
        if not name.endswith(".safetensors") or Path(name).name != name or "\0" in name or "\\" in name:
            raise CheckpointError(
                f"{folder}: the index names {brief(name)}, which is not a plain .safetensors file of this folder"
            )
    return weight_map


def _read_others(folder: Path, found: ModelFiles) -> tuple[dict[str, dict[str, TensorInfo]], tuple[LeftOut, ...]]:
    """Tables of the files beside the model that may hold more of it, and all files that are left out."""
    tables: dict[str, dict[str, TensorInfo]] = {}
    reasons: dict[str, list[str]] = {}
    for name, what in sorted(found.others, key=lambda other: "mtp" not in other[0]):  # what --mtp keep may want first
        room = len(tables) < MOST_OTHERS and sum(map(len, tables.values())) < MOST_OTHER_TENSORS
        if what == UNNAMED and room:
            try:
                tables[name] = read_header(folder / name)
            except CheckpointError:
                what = "not of the model, and no sound safetensors file"
        reasons.setdefault(what, []).append(name)
    return tables, tuple(LeftOut(what, tuple(sorted(names)), "file") for what, names in reasons.items())


def _adapter_sentence(folder: Path) -> str:
    try:
        found = read_json(folder / "adapter_config.json", limit=1 << 20)
    except CheckpointError:
        found = {}
    base = found.get("base_model_name_or_path") or found.get("model")  # PEFT; MLX
    of = f" of {brief(base)}" if base else ""
    return (
        f"{folder}: is an adapter{of}, not a model; convert its base model with --lora {folder}, or load it on that "
        "model with peft, merge_and_unload(), save_pretrained(), and convert that folder"
    )


def _tensor_info(path: Path, name: str, entry: Any, payload: int) -> TensorInfo:
    def bad(expected: str) -> CheckpointError:
        return CheckpointError(f"{path.name}: tensor {brief(name)}: expected {expected}, got {brief(entry)}")

    if not isinstance(entry, dict):
        raise bad("a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _KNOWN_BYTES:
        raise bad("a known dtype")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise bad("a shape of at most 8 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise bad("two data_offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * _KNOWN_BYTES[dtype]:
        raise bad(f"{math.prod(shape) * _KNOWN_BYTES[dtype]} bytes from dtype and shape")
    return TensorInfo(name, dtype, tuple(shape), path, payload + offsets[0])


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def _fingerprint(
    config_path: Path, config: Mapping[str, Any], files: tuple[Path, ...], tensors: Mapping[str, TensorInfo]
) -> str:
    digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode())
    for path in (config_path, *files):
        state = path.stat()
        digest.update(os.fsencode(path.name) + f"\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    for info in tensors.values():
        digest.update(f"{info.name}\0{info.dtype}\0{info.shape}\0{info.offset}\n".encode())
    return digest.hexdigest()


def _found(path: Path) -> str:
    try:
        return kind(path.stat().st_mode)
    except (OSError, ValueError):
        return "nothing"
