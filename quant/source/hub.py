"""Sources on the Hugging Face Hub: `hf://org/name[@revision]` becomes a local folder, only its config for a plan, or
headers and side files for weights that are read by ranges (quant/source/ranges.py).

Downloads are huggingface_hub's own: resumable, hashed, in its cache. Only weights in safetensors, JSON and tokenizer
files are fetched; code and pickles of a repository never reach the disk.

The library waits and retries for minutes. One request with a short limit goes before it: where the Hub does not answer
that, a copy in the cache serves, or the failure is one sentence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.files import read_json
from ornith_moe.quant.source.architectures import architecture
from ornith_moe.quant.source.checkpoint import Checkpoint, TensorInfo, open_checkpoint, without_quantization
from ornith_moe.quant.source.quantized import planned_as_bf16
from ornith_moe.quant.source.ranges import SIDES, Ranges, Shard, fetch, stand_in
from ornith_moe.quant.source.reconcile import HEAD
from ornith_moe.quant.source.shards import INDEX
from ornith_moe.quant.source.source import Source
from ornith_moe.quant.source.weights import checked_name, open_source, source_from_checkpoint, source_from_config

ANSWER_SECONDS = 2.0  # for each of connecting and answering
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*")


@budgeted
def open_any(
    source: str | Path,
    *,
    mtp: str | None = None,
    name: str | None = None,
    config_only: bool = False,
    ranges: bool = False,
) -> Source:
    """`open_source`, and `hf://org/name[@revision]` too.

    Args:
        name: as `open_source`; default the repository's.
        config_only: for a Hub source, fetch config and index instead of the weights: enough for a plan.
        ranges: for a Hub source that is not in the cache, read weights as they are wanted and store none.
    Raises:
        CheckpointError: as `open_source`; the Hub cannot be reached or has no such repository.
    """
    if not is_remote(source):
        return open_source(source, mtp=mtp, name=name)
    with _asked(str(source)) as place:
        name = place.repository.split("/")[1] if name is None else checked_name(name)
        if config_only:
            return _planned(place, name, mtp)
        return source_from_checkpoint(_checkpoint(place, ranges), name=name, mtp=mtp)


def is_remote(source: str | Path) -> bool:
    return str(source).startswith("hf://")


def open_weights(source: str | Path) -> Checkpoint:
    """`open_checkpoint`; of hf://org/name[@revision] by ranges where it is not in the cache.

    Raises:
        CheckpointError: as either.
    """
    if not is_remote(source):
        return open_checkpoint(source)
    with _asked(str(source)) as place:
        return _checkpoint(place, ranges=True)


def folder_of(source: str | Path) -> Path:
    """A folder, as it is; what hf://org/name[@revision] holds, stored in the Hub's cache.

    Raises:
        CheckpointError: the Hub cannot be reached or has no such repository.
    """
    if not is_remote(source):
        return Path(source)
    with _asked(str(source)) as place:
        return _stored(place)


class _Place(NamedTuple):
    """What a user named, and why the Hub cannot be asked for it now, "" if it can."""

    source: str
    repository: str
    revision: str | None
    unreachable: str

    @property
    def found(self) -> dict[str, Any]:
        return {"revision": self.revision, "local_files_only": bool(self.unreachable)}


@contextmanager
def _asked(source: str) -> Iterator[_Place]:
    """The Hub is asked for `source` within: what it and its library raise becomes one sentence."""
    repository, revision = _parse(source)
    try:
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(f"{source}: needs huggingface_hub; pip install 'ornith-moe[hub]'") from None
    unreachable = _unreachable(repository)
    try:
        with _bars(sys.stderr is not None and sys.stderr.isatty()):
            yield _Place(source, repository, revision, unreachable)
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{source}: expected the Hub to answer or a copy in its cache, got neither "
            f"({unreachable or 'the connection was lost'}); check the network and HF_ENDPOINT, or pass a local folder"
        ) from None
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: could not be fetched from the Hub ({reason[:200]})") from None


def _checkpoint(place: _Place, ranges: bool) -> Checkpoint:
    by_ranges = _by_ranges(place) if ranges and not place.unreachable else None
    return by_ranges or open_checkpoint(_stored(place))


def _stored(place: _Place) -> Path:
    from huggingface_hub import snapshot_download

    with _offline(bool(place.unreachable)):
        return Path(snapshot_download(place.repository, allow_patterns=list(WANTED), **place.found))


def _planned(place: _Place, name: str, mtp: str | None) -> Source:
    """The source of a config, and of the names in the index where there is one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _offline(bool(place.unreachable)):
        path = Path(hf_hub_download(place.repository, "config.json", **place.found))
    config, names = read_json(path), None
    try:
        names = read_json(Path(hf_hub_download(place.repository, INDEX, **place.found))).get("weight_map")
    except LocalEntryNotFoundError:  # not reached, which says nothing about the repository
        if not (path.parent / "model.safetensors").exists():
            raise
    except EntryNotFoundError:  # one file, no index
        pass
    return _from_names(path, config, names if isinstance(names, dict) else None, name, mtp)


def _by_ranges(place: _Place) -> Checkpoint | None:
    """The checkpoint of a repository whose weights stay there; None if the cache has them all."""
    from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download, try_to_load_from_cache

    repository = place.repository
    info = HfApi().model_info(repository, revision=place.revision, files_metadata=True)
    shards = {
        found.rfilename: Shard(hf_hub_url(repository, found.rfilename, revision=info.sha), found.size)
        for found in info.siblings or ()
        if found.rfilename.endswith(".safetensors") and "/" not in found.rfilename and found.size is not None
    }
    if shards and all(
        isinstance(try_to_load_from_cache(repository, shard, revision=info.sha), str) for shard in shards
    ):
        return None
    cache = Path(constants.HF_HOME) / "ornith-moe" / f"models--{repository.replace('/', '--')}"
    folder = cache / "snapshots" / str(info.sha)  # as in the Hub's own, so that it says whose it is
    with _bars(False):  # a conversion draws its own
        snapshot_download(repository, revision=info.sha, allow_patterns=list(SIDES), local_dir=folder)
    stand_in(folder, place.source, shards, fetch)
    return open_checkpoint(folder, payload=Ranges(shards, fetch))


@contextmanager
def _offline(yes: bool) -> Iterator[None]:
    """The library as HF_HUB_OFFLINE has it; it asks the Hub who calls, for files of its cache too, and waits 3 s."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or yes
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """The library's bars of what it fetches, which it draws where there is no terminal too, only if `wanted`."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _unreachable(repository: str) -> str:
    """Why the Hub cannot be asked now, "" if it answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        url = f"{constants.ENDPOINT}/{repository}/resolve/main/config.json"
        status = get_session().head(url, timeout=ANSWER_SECONDS).status_code
        return f"{constants.ENDPOINT} answers with status {status}" if status >= 500 else ""
    except Exception as error:  # of whatever HTTP library it uses; offline mode too
        return f"{constants.ENDPOINT}: {brief(str(error).strip() or type(error).__name__)}"


def _from_names(path: Path, config: dict[str, Any], names: Iterable[str] | None, name: str, mtp: str | None) -> Source:
    """The source of a config and, if there is an index, of its names: those of scales tell quantized weights."""
    table = None if names is None else {tensor: TensorInfo(tensor, "BF16", (), path, 0) for tensor in names}
    config, section, notes = without_quantization(config, path, table)
    known = None if names is None else "keep" if any(map(architecture(config).is_mtp, names)) else "drop"
    found = source_from_config(config, name=name, mtp=mtp or known)
    if found.architecture.tied and names is not None and HEAD in names:
        notes += (f"the config ties the head and {HEAD} is there: it counts if its values are not the embedding's",)
    return replace(found, notes=(*notes, *planned_as_bf16(section), *found.notes))


def _parse(source: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not found:
        raise CheckpointError(f"{source}: expected hf://org/name or hf://org/name@revision")
    return found[1], found[2]
