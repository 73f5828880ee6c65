"""Weights that a checkpoint holds in FP8: which checkpoints those are, and where the scales of a tensor lie.

    w[i, j] = code[i, j] * scale[i // rows, j // columns]          e4m3 times fp32, one product in fp32

| scales of X              | shape                        | written by                                              |
|--------------------------|------------------------------|---------------------------------------------------------|
| X_scale                  | [N, 1]                       | compressed-tensors float-quantized: Ornith's FP8 builds |
| X_scale_inv, or X_scale  | [ceil(N/128), ceil(K/128)]   | transformers, Qwen's FP8 builds; BF16 or F32            |
| X_scale                  | [] or [1]                    | ModelOpt FP8                                            |

All of them multiply, whatever they are called. Stacked experts [E, N, K] have stacked scales [E, ...]. Which layout it
is follows from the shapes; the config says whether the checkpoint is FP8 at all, and how large a block is. The product
is never rounded to BF16 on the way: builds round it, once.

Scales of activations and of the KV cache are no weights, and no build holds them.
Sources: headers of the published builds; transformers' integrations/finegrained_fp8.py; modelopt's export.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ornith_moe.quant.errors import CheckpointError, brief
from ornith_moe.quant.recipes import BLOCK, ROW, Cast
from ornith_moe.quant.source.accounts import bare
from ornith_moe.quant.source.slab import QuantizedSlab, matrix_shape, to_float32

if TYPE_CHECKING:
    from ornith_moe.quant.source.checkpoint import Checkpoint, TensorInfo

E4M3, E4M3_MAX = "F8_E4M3", 448
SUFFIXES = ("_scale_inv", "_scale")
SCALE_DTYPES = ("BF16", "F16", "F32")
READ = "per channel (compressed-tensors float-quantized), per block (fp8) and per tensor (modelopt FP8)"
LARGEST_BLOCK = 1 << 16
_OF_ACTIVATIONS = re.compile(r"(?:^|\.)(?:(?:input|output)(?:_global)?_scale|[qkv]_scale|kv_scale|prob_output_scale)$")
ACTIVATIONS = "scales of activations or of the KV cache, of which builds hold none"


class Codes(NamedTuple):
    """How a weight lies as codes with scales: rows and columns that share one (None: all), and the scales' dtype.

    `kind` is F8_E4M3, or of NVFP4 (nvfp4.py). `whole`: whether its scales are its own, and lie row by row of blocks as
    those of a tensor of its own would.
    """

    kind: str
    block: tuple[int | None, int | None]
    scale_dtype: str
    whole: bool

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.kind == E4M3 else 4


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of one FP8 tensor."""

    tensor: TensorInfo
    block: tuple[int | None, int | None]

    def rows_of(self, shape: tuple[int, ...], rows: np.ndarray) -> np.ndarray:
        """Row of the scales, as a matrix, of each of these rows of the tensor of `shape`, as a matrix."""
        if self.block[0] is None:
            return np.zeros_like(rows)
        height = shape[-2]
        return rows // height * -(-height // self.block[0]) + rows % height // self.block[0]


def describes_fp8(section: Any) -> bool:
    """Whether a quantization_config is of one of the FP8 layouts that are read."""
    if not isinstance(section, dict):
        return False
    method = section.get("quant_method")
    if method == "compressed-tensors":
        return set(_kinds_of_weights(section)) == {(8, "float")}
    return method == "fp8" or (method == "modelopt" and section.get("quant_algo") == "FP8")


def describes_nvfp4(section: Any) -> bool:
    """Whether a quantization_config may be of NVFP4, FP8 beside it or not; the tensors tell."""
    if not isinstance(section, dict):
        return False
    if section.get("quant_method") == "compressed-tensors":
        kinds = set(_kinds_of_weights(section))
        return (4, "float") in kinds and kinds <= {(4, "float"), (8, "float")}
    algorithms = ("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
    return section.get("quant_method") == "modelopt" and section.get("quant_algo") in algorithms


def block_of(section: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, as a quantization_config says."""
    found = section.get("weight_block_size")
    for group in _values(section.get("config_groups")):
        weights = group.get("weights") if isinstance(group, dict) else None
        found = (weights.get("block_structure") if isinstance(weights, dict) else None) or found
    if found is None:
        return BLOCK
    sound = isinstance(found, list) and len(found) == 2
    if not sound or not all(type(size) is int and 0 < size <= LARGEST_BLOCK for size in found):
        raise CheckpointError(f"config.json: expected blocks of two sizes up to {LARGEST_BLOCK}, got {brief(found)}")
    return found[0], found[1]


def planned_as_bf16(section: Mapping[str, Any]) -> tuple[str, ...]:
    """What is to be said of a plan without tensors, `section` being the quantization_config."""
    method = brief(section.get("quant_method"))
    said = f"the config is of a quantized checkpoint (quant_method {method}), whose builds are planned as of a BF16 one"
    return (said,) if section else ()


def layout_name(block: tuple[int | None, int | None]) -> str:
    """In sentences."""
    rows, columns = block
    return "per tensor" if rows is None else "per channel" if columns is None else f"per {rows}x{columns} block"


def is_of_activations(name: str) -> bool:
    """Whether a tensor is a scale of activations or of the KV cache."""
    return _OF_ACTIVATIONS.search(name) is not None


def scales_of(key: str, tensor: TensorInfo, tensors: Mapping[str, TensorInfo], block: Cast) -> tuple[str, Scales]:
    """(key, scales) of the FP8 tensor `key` among `tensors`, all by their canonical names.

    Raises:
        CheckpointError: it has none, or none of a layout that is known.
    """
    found = [key + suffix for suffix in SUFFIXES if key + suffix in tensors]
    if len(found) != 1:
        held = f"both {bare(found[0])} and {bare(found[1])} are here" if found else f"no {bare(key)}_scale is here"
        raise CheckpointError(
            f"{tensor.path.name}: tensor {bare(tensor.name)} is {E4M3} and needs one scale, but {held}; fetch the "
            "checkpoint again, or use its BF16 original"
        )
    scale = tensors[found[0]]
    rows, columns = tensor.shape[-2:] if len(tensor.shape) > 1 else (*tensor.shape, 1)
    lead = tensor.shape[:-2]
    down, across = -(-rows // block[0]), -(-columns // (block[1] or columns))
    layouts: dict[tuple[int, ...], tuple[int | None, int | None]] = {(*lead, down, across): block}
    layouts |= {(*lead, rows, 1): ROW, (*lead, rows): ROW}
    if not lead:
        layouts |= {(): (None, None), (1,): (None, None)}
    if scale.shape not in layouts or scale.dtype not in SCALE_DTYPES or len(tensor.shape) < 2:
        raise CheckpointError(
            f"{scale.path.name}: the scale {bare(scale.name)} is {scale.dtype} {list(scale.shape)}, and tensor "
            f"{bare(tensor.name)} is {list(tensor.shape)}; expected BF16 or F32 {READ}, so use its BF16 original"
        )
    return found[0], Scales(scale, layouts[scale.shape])


def read_quantized(checkpoint: Checkpoint, tensor: TensorInfo, scales: Scales, start: int, rows: int) -> QuantizedSlab:
    """Rows [start, start + rows) of an FP8 tensor, with the scales that they have.

    Raises:
        CheckpointError: a scale that is not positive, or so large that a weight would overflow.
    """
    codes = checkpoint.read_rows(tensor, start, rows)
    of_rows = scales.rows_of(tensor.shape, np.arange(start, start + rows))
    first, count = (int(of_rows[0]), int(of_rows[-1] - of_rows[0]) + 1) if rows else (0, 0)
    raw = checkpoint.read_rows(scales.tensor, first, count)
    factors = to_float32(raw, scales.tensor.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        sound = (factors > 0) & (factors * np.float32(E4M3_MAX) < np.inf)
    if not sound.all():
        row, column = map(int, np.argwhere(~sound)[0])
        raise CheckpointError(
            f"{scales.tensor.path.name}: the scale {bare(scales.tensor.name)}, row {first + row}, column {column} is "
            f"{factors[row, column]:.4g}; expected a positive number, so fetch the checkpoint again"
        )
    return QuantizedSlab((codes, raw), factors[of_rows - first], scales.block[1] or matrix_shape(tensor.shape)[1])


def _kinds_of_weights(section: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """(bits, type) of the weights of each group, (None, None) of what has none."""
    groups = _values(section.get("config_groups"))
    weights = [group.get("weights") if isinstance(group, dict) else None for group in groups]
    return [(one.get("num_bits"), one.get("type")) if isinstance(one, dict) else (None, None) for one in weights]


def _values(groups: Any) -> list[Any]:
    return list(groups.values()) if isinstance(groups, dict) else []
