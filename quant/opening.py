"""What a user names as a source, opened: a folder, a config, a preset, `hf://org/name`, a GGUF; and what is added."""

from __future__ import annotations

from pathlib import Path

from ornith_moe.quant.budget import budgeted
from ornith_moe.quant.builds.gguf_source import open_gguf
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.source import hub
from ornith_moe.quant.source.lora import with_adapter
from ornith_moe.quant.source.mtp_from import with_mtp_from
from ornith_moe.quant.source.source import Source


@budgeted
def open_any(
    source: str | Path,
    *,
    mtp: str | None = None,
    name: str | None = None,
    config_only: bool = False,
    ranges: bool = False,
    mtp_from: str | Path | None = None,
    lora: str | Path | None = None,
) -> Source:
    """`open_source`, `hf://org/name[@revision]` and a .gguf file too.

    Args:
        mtp, name, config_only, ranges: as `hub.open_any`.
        mtp_from: another checkpoint, a folder or hf://, whose multi-token prediction it gets instead of its own.
        lora: an adapter of PEFT, a folder or hf://, merged into it.
    Raises:
        CheckpointError: as `hub.open_any`, `open_gguf`, `with_mtp_from` and `with_adapter`.
    Example:
        open_any("hf://Qwen/Qwen3.6-35B-A3B-FP8", mtp_from="hf://Qwen/Qwen3.6-35B-A3B")
    """
    if mtp_from is not None and mtp == "drop":
        raise CheckpointError("--mtp drop leaves out what --mtp-from would add; leave one of them out")
    own = "drop" if mtp_from is not None else mtp
    if str(source).endswith(".gguf") and Path(source).is_file():
        found: Source = open_gguf(Path(source), mtp=own, name=name)
    else:
        found = hub.open_any(source, mtp=own, name=name, config_only=config_only, ranges=ranges)
    if mtp_from is not None:
        found = with_mtp_from(found, hub.open_weights(mtp_from))
    return found if lora is None else with_adapter(found, hub.folder_of(lora))
