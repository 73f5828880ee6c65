"""Whether a build on disk is a live policy: by one digest per file, or tensor by tensor.

    file_digests(model, "fp8-channel") == digests_of(folder)     sha256 of files that were never written
    differences(model, folder)                                   the first tensors that differ, or nothing

A file's digest needs its bytes in their order, so of a layer of experts both fused tensors are held at once; everything
else is `served_weights`.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import torch

from ornith_moe.quant.builds.build import Options, recognize
from ornith_moe.quant.builds.stored import StoredBuild
from ornith_moe.quant.errors import CheckpointError
from ornith_moe.quant.files import read_json
from ornith_moe.sync.served import TORCH, named_tensors, plan_sync


def file_digests(
    model: torch.nn.Module,
    build: str = "FP8",
    *,
    saved_as: torch.dtype | None = torch.bfloat16,
    max_shard_bytes: int | None = None,
) -> dict[str, str]:
    """{file: sha256} of the safetensors files that `convert` would write of the policy's checkpoint.

    Args:
        model, build, saved_as: as `served_weights`. max_shard_bytes: as `convert`; it decides what files there are.
    """
    sync = plan_sync(model, build, saved_as=saved_as)
    layout = sync.plan.build.lay_out(sync.policy, sync.plan, Options(max_shard_bytes=max_shard_bytes))
    digests = [hashlib.sha256(file.header) for file in layout.files]
    numbers = {tensor.name: file for tensor, (file, _) in zip(sync.plan.tensors, layout.places, strict=True)}
    for name, tensor in named_tensors(sync.walk(sync.plan.steps)):
        digests[numbers[name]].update(_bytes(tensor))
    return {file.name: digest.hexdigest() for file, digest in zip(layout.files, digests, strict=True)}


def stored_digests(folder: str | Path) -> dict[str, str]:
    """{file: sha256} of the safetensors files of a build, as its manifest has them; no weight is read.

    Raises:
        CheckpointError: there is no build, or no manifest of ours in it.
    """
    stored = StoredBuild(Path(folder))
    if not stored.manifest.is_file():
        raise CheckpointError(f"{folder}: no {stored.manifest.name} here; compare with differences(model, folder)")
    files = read_json(stored.manifest).get("files", {})
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@torch.no_grad()
def differences(
    model: torch.nn.Module, folder: str | Path, *, saved_as: torch.dtype | None = torch.bfloat16, most: int = 10
) -> list[str]:
    """How the build in `folder` differs from the policy: at most `most` sentences, none if every byte is equal.

    Args:
        folder: of fp8-channel, fp8-block or bf16. saved_as: as `served_weights`.
    Raises:
        CheckpointError: there is no build. PlanError: as `served_weights`.
    """
    stored = StoredBuild(Path(folder))
    found, sync = dict(stored.tensors), plan_sync(model, recognize(stored), saved_as=saved_as)
    told = []
    for name, tensor in named_tensors(sync):
        there = found.pop(name, None)
        if there is None:
            told.append(f"{name}: is in the policy and not in the build")
        elif (TORCH.get(there.dtype), there.shape) != (tensor.dtype, tuple(tensor.shape)):
            told.append(
                f"{name}: is {there.dtype} {list(there.shape)} in the build, {tensor.dtype} {list(tensor.shape)} "
                "in the policy"
            )
        elif there.read(0, there.nbytes).tobytes() != bytes(_bytes(tensor)):
            told.append(f"{name}: holds other values in the build than in the policy")
    return [*told, *(f"{name}: is in the build and not in the policy" for name in found)][:most]


def _bytes(tensor: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a tensor; not by `numpy()`, which would pin a storage that FSDP has to free."""
    held = tensor.cpu().contiguous()
    view = (ctypes.c_char * held.nbytes).from_address(held.data_ptr())
    view.memory_of = held  # type: ignore[attr-defined]
    return view
