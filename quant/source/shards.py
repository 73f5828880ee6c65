"""Which files of a folder are the model: what transformers would load, and what lies beside it.

    model.safetensors, else the shards that model.safetensors.index.json names, else the only file that can be the model

transformers takes `model.safetensors` whenever it is there and never looks at an index beside it (its
`_get_resolved_checkpoint_files`), so a folder saved twice, in shards and then whole, means the whole file. Other
safetensors files are told and never read as weights: an adapter, training state, another copy, files no index names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.source.accounts import bare, some
from ornith_moe.quant.source.tensor_names import is_mtp

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MTP_ADVICE = "; --mtp drop leaves multi-token prediction out"
UNNAMED = "not of the model that transformers would load"
_OTHER = (  # file names that are never the model -> what they are
    (re.compile(r"^(adapters?|(pytorch_)?lora(_weights)?)[._-]", re.I), "an adapter, which is not applied"),
    (re.compile(r"^(optim|scheduler|scaler|rng|random_states|train)", re.I), "training state, not the model"),
    (re.compile(r"^consolidated[._-]", re.I), "the publisher's own copy of the model"),
)
_PART = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of the model, and the other safetensors files of its folder with what they are."""

    names: Mapping[str, frozenset[str] | None]  # file -> its tensors by the index; None: its header is the only table
    others: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def model_files(
    folder: Path, read_index: Callable[[], Mapping[str, str] | None], *, drop_mtp: bool = False
) -> ModelFiles:
    """Choose the files of the model in `folder`; no header is read.

    Args:
        drop_mtp: shards that hold multi-token prediction alone need not be there.
        read_index: the checked weight_map of the folder, {tensor: file}; None if it has no index.
    Raises:
        CheckpointError: no weights, several files and no index, shards missing; what `read_index` raises, unless there
            is a `model.safetensors`, for which the index does not matter.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    whole = WHOLE in present
    notes: list[str] = []
    shards: dict[str, frozenset[str]] | None = None
    try:
        if (weight_map := read_index()) is not None:
            shards = _by_file(weight_map)
    except CheckpointError as error:
        if not whole:
            raise
        notes.append(f"{WHOLE} is read, as by transformers; the index beside it is no index: {error}")
    if shards and whole and not (WHOLE in shards and shards.keys() <= set(present)):
        missing = sorted(shards.keys() - set(present))
        why = f"{some('file', missing)}, not there" if missing else f"{some('other file', sorted(shards))}"
        notes.append(f"{WHOLE} is read, as by transformers; {INDEX} beside it is stale: it names {why}")
        shards = None
    if shards is None:
        only = WHOLE if whole else _only_file(folder, present)
        if not whole:
            notes.append(f"{only} is taken for the model: there is no {WHOLE} and no index")
        return ModelFiles({only: None}, _others(present, [only]), tuple(notes))
    if missing := sorted(shards.keys() - set(present)):
        only_mtp = all(is_mtp(name) for file in missing for name in shards[file])
        if only_mtp and drop_mtp:
            notes.append(f"{some('file', missing)}, not there: it is of the multi-token prediction that is dropped")
            shards = {file: names for file, names in shards.items() if file not in missing}
            return ModelFiles(shards, _others(present, shards), tuple(notes))
        unnamed = [name for name in present if name not in shards]
        beside = f"; {some('file', unnamed)}, not in the index, so it may be of another save" if unnamed else ""
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards named by the index are missing ("
            f"{', '.join(map(brief, missing[:3]))}{', ...' if len(missing) > 3 else ''}){beside}; fetch or save "
            f"shards and index of one model{MTP_ADVICE if only_mtp else ''}"
        )
    return ModelFiles(shards, _others(present, shards), tuple(notes))


def is_adapter_alone(folder: Path) -> bool:
    """Whether a folder holds an adapter (PEFT's) and no model."""
    names = {path.name for path in folder.iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"} & names
    model = any(name.endswith(".safetensors") and not _what(name) for name in names) or INDEX in names
    return bool(adapter) and not model and not any(name.startswith("pytorch_model") for name in names)


def _others(present: list[str], shards: Container[str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _what(name) or UNNAMED) for name in present if name not in shards)


def _by_file(weight_map: Mapping[str, str]) -> dict[str, frozenset[str]]:
    names: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        names.setdefault(file, set()).add(tensor)
    return {file: frozenset(names[file]) for file in sorted(names)}


def _only_file(folder: Path, present: list[str]) -> str:
    candidates = [name for name in present if not _what(name)] or [name for name in present if "onsolidated" in name]
    if len(candidates) == 1:
        part = _PART.search(candidates[0])
        if part and int(part[2]) != 1:
            raise CheckpointError(
                f"{folder}: holds {bare(candidates[0])} alone, one of {int(part[2])} shards, and no {INDEX}; fetch "
                "them all and the index"
            )
        return candidates[0]
    if candidates:
        raise CheckpointError(
            f"{folder}: {len(candidates)} safetensors files, the first {bare(candidates[0])}, and neither {WHOLE} nor "
            f"{INDEX}, which tell which of them are the model; fetch the index too"
        )
    others = [pattern for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") if any(folder.glob(pattern))]
    hint = f"; {others[0]} files are not read, convert them to safetensors first" if others else ""
    beside = f" but {present[0]}, {_what(present[0])}" if present else ""
    raise CheckpointError(f"{folder}: no safetensors weights here{beside}{hint}")


def _what(name: str) -> str | None:
    return next((what for pattern, what in _OTHER if pattern.search(name)), None)
