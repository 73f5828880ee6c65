"""Options that several commands share, as typer reads them."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ornith_moe.quant.errors import brief

if TYPE_CHECKING:
    from ornith_moe.quant.builds.build import AskedNvfp4
    from ornith_moe.quant.fitting.sensitivity import Sensitivity
    from ornith_moe.quant.gguf.imatrix import Imatrix
    from ornith_moe.quant.gguf.splits import Split
    from ornith_moe.quant.gguf.tensor_types import AskedTypes


class NonFinite(StrEnum):
    """What to do with a weight that holds a NaN or an infinity."""

    error = "error"
    keep_bf16 = "keep-bf16"


class Rest(StrEnum):
    """What becomes of attention beside weights in NVFP4."""

    bf16 = "bf16"
    fp8 = "fp8"


class KvCache(StrEnum):
    """How engines are asked to keep keys and values."""

    bf16 = "bf16"
    fp8 = "fp8"


class Mtp(StrEnum):
    """What to do with multi-token-prediction tensors."""

    keep = "keep"
    drop = "drop"


class Executor(StrEnum):
    """On what a conversion encodes; the bytes are the same."""

    local = "local"
    ray = "ray"


class Device(StrEnum):
    """Where a conversion encodes; the bytes are the same."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def parse_size(text: str | int) -> int:
    """Bytes of "2GiB", "500 MB" or "1000000"; typer.BadParameter otherwise."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]i?)?B?\s*", str(text), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"expected a size such as 2GiB or 500MB, got {brief(str(text))}")
    unit = (found[2] or "").upper()
    power = " KMGT".index(unit[0]) if unit else 0
    return int(float(found[1]) * (1024 if unit.endswith("I") else 1000) ** power)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
To = Annotated[
    list[str],
    typer.Option(
        "--to",
        metavar="BUILD",
        help="One of those that doctor lists, as fp8-channel or gguf:Q4_K_M, or gguf:fit=16GB; repeat for more.",
    ),
]
ToOrFor = Annotated[
    list[str] | None,
    typer.Option("--to", metavar="BUILD", help="As of convert, or gguf:fit=16GB; repeat for more. --for finds some."),
]
MtpOption = Annotated[Mtp | None, typer.Option(help="Insist on the MTP tensors, or leave them out. Default: as found.")]
MtpFrom = Annotated[
    str | None,
    typer.Option("--mtp-from", metavar="SRC", help="Take the MTP tensors of this folder or hf://, not SRC's own."),
]
Lora = Annotated[
    str | None, typer.Option("--lora", metavar="ADAPTER", help="Merge this adapter of PEFT, folder or hf://, in fp32.")
]
Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Of the model, in file names and metadata. Default: SRC's.")
]
SourceArgument = Annotated[
    str, typer.Argument(metavar="SRC", help="Checkpoint folder, hf://org/name[@revision] or .gguf.")
]
DEFAULT_MEMORY: Any = "2GiB"  # read by `parse_size`, as what a user types is
MaxShard = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE", parser=parse_size, help="Largest safetensors shard. Default: 5GB, for MLX 5GiB as mlx-lm's."
    ),
]
SplitSize = Annotated[
    int | None,
    typer.Option(
        "--split-max-size", metavar="SIZE", parser=parse_size, help="Cut text GGUFs into files of at most this."
    ),
]
SplitTensors = Annotated[
    int | None,
    typer.Option("--split-max-tensors", metavar="N", help="Cut text GGUFs into files of at most N tensors."),
]
TokenizerPre = Annotated[
    str | None, typer.Option(metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where it is not recognized.")
]
ImatrixOption = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="Importance of columns of a GGUF; input scales of nvfp4-w4a4."),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        "--keep",
        metavar="REGEX=TYPE",
        help="GGUF type of the tensors whose name it fits; the first that fits.",
    ),
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="What types do to tensors, by 'sensitivity'; for builds of fit= and bpw=.",
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="More REGEX=TYPE, one a line, after those above.")
]
EmbeddingType = Annotated[str | None, typer.Option(metavar="TYPE", help="GGUF type of the token embedding.")]
OutputType = Annotated[str | None, typer.Option(metavar="TYPE", help="GGUF type of the output head.")]

Nvfp4Head = Annotated[bool, typer.Option("--nvfp4-head", help="Builds of NVFP4: the output head in NVFP4 too.")]
Nvfp4Rest = Annotated[
    Rest, typer.Option("--nvfp4-rest", help="Builds of NVFP4: attention as in the source, or FP8, one scale a matrix.")
]
KvCacheOption = Annotated[
    KvCache,
    typer.Option("--kv-cache", help="Ask vLLM and SGLang to keep keys and values in FP8, with scales of 1.0."),
]


def asked_of_nvfp4(to: list[str], head: bool, rest: Rest) -> AskedNvfp4:
    """What the options ask of builds of NVFP4; PlanError if `to` has none that heeds them."""
    from ornith_moe.quant.builds.build import AskedNvfp4, Options, refuse_unheard

    asked = AskedNvfp4(head, rest.value)
    refuse_unheard(to, Options(nvfp4=asked))
    return asked


def split_of(max_bytes: int | None, max_tensors: int | None) -> Split | None:
    """Where the options cut a GGUF, if anywhere."""
    from ornith_moe.quant.gguf.splits import Split

    return None if max_bytes is None and max_tensors is None else Split(max_bytes, max_tensors)


def asked_of_gguf(
    imatrix: Path | None, tensor_type: list[str] | None, recipe: Path | None, embedding: str | None, output: str | None
) -> tuple[AskedTypes, Imatrix | None]:
    """What the options ask of a GGUF: a recipe and an importance matrix, or None."""
    from ornith_moe.quant.gguf.imatrix import open_imatrix
    from ornith_moe.quant.gguf.tensor_types import parse_asked_types

    asked = parse_asked_types(tensor_type or (), file=recipe, token_embedding_type=embedding, output_tensor_type=output)
    return asked, open_imatrix(imatrix) if imatrix else None


def sensitivity_of(file: Path | None) -> Sensitivity | None:
    """What a file of `ornith-moe sensitivity` says, if one is named."""
    from ornith_moe.quant.fitting.sensitivity import read_sensitivity

    return read_sensitivity(file) if file else None
