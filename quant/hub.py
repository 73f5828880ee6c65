"""Sources on the Hugging Face Hub: `hf://org/name[@revision]` becomes a local folder, or only its config for a plan.

Downloads are huggingface_hub's own: resumable, hashed, in its cache. Only weights in safetensors, JSON and tokenizer
files are fetched; code and pickles of a repository never reach the disk.
"""

from __future__ import annotations

import re
from pathlib import Path

from ornith_moe.quant.checkpoint import open_checkpoint, refuse_quantized
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.files import read_json
from ornith_moe.quant.source import Source, open_source, source_from_checkpoint, source_from_config

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
INDEX = "model.safetensors.index.json"


def open_any(source: str | Path, *, mtp: str | None = None, config_only: bool = False) -> Source:
    """`open_source`, and `hf://org/name[@revision]` too.

    Args:
        config_only: for a Hub source, fetch config and index instead of the weights: enough for a plan.
    Raises:
        CheckpointError: as `open_source`; the Hub cannot be reached or has no such repository.
    """
    if not str(source).startswith("hf://"):
        return open_source(source, mtp=mtp)
    repository, revision = _parse(str(source))
    name = repository.split("/")[1]
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(f"{source}: needs huggingface_hub; pip install 'ornith-moe[hub]'") from None
    try:
        if not config_only:
            folder = snapshot_download(repository, revision=revision, allow_patterns=list(WANTED))
            return source_from_checkpoint(open_checkpoint(folder), name=name, mtp=mtp)
        path = Path(hf_hub_download(repository, "config.json", revision=revision))
        config = read_json(path)
        refuse_quantized(config, path)
        try:
            names = read_json(Path(hf_hub_download(repository, INDEX, revision=revision))).get("weight_map")
            known = "keep" if any(str(name).startswith("mtp.") for name in names or ()) else "drop"
        except LocalEntryNotFoundError:  # not reached, which says nothing about the repository
            raise
        except EntryNotFoundError:  # one file, no index
            known = None
        return source_from_config(config, name=name, mtp=mtp or known)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: could not be fetched from the Hub ({reason[:200]})") from None


def _parse(source: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not found:
        raise CheckpointError(f"{source}: expected hf://org/name or hf://org/name@revision")
    return found[1], found[2]
