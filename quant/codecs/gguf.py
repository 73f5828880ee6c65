"""GGUF storage types: how values become the bytes of a row, and back.

Codecs are in `codecs/`, one small class per type, which states encode and decode; block size and bytes come from the
`gguf` package. In IEEE fp32 without contraction, with and without an importance matrix, encoded bytes equal those of
ggml's C (tests/quant/codecs/test_gguf.py), and whatever the bytes, decoded values equal those of ggml's C and of the
`gguf` package (tests/quant/codecs/test_decode.py). Types without an encoder can be planned, sized and decoded.

    codecs/plain.py      F32, F16, BF16
    codecs/blocks32.py   Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
    codecs/k_quants.py   Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
    codecs/codebooks.py  IQ4_NL, IQ4_XS, MXFP4, NVFP4
    codecs/grids.py      IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S (codecs/grid_decoders.py; IQ1_S, IQ1_M decode only)
    codecs/ternary.py    TQ1_0, TQ2_0
    codecs/search.py     the searches for scales, on sixteen blocks at a time (simd/lanes.py, codecs/block_tiles.py)

Letters: R rows, K values in a row.
"""

from __future__ import annotations

import math

import numpy as np

from ornith_moe.quant.codecs.blocks32 import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from ornith_moe.quant.codecs.codebooks import IQ4_NL, IQ4_XS, MXFP4, NVFP4
from ornith_moe.quant.codecs.codec import GgufCodec
from ornith_moe.quant.codecs.grid_decoders import IQ1_M, IQ1_S
from ornith_moe.quant.codecs.grids import IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from ornith_moe.quant.codecs.k_quants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from ornith_moe.quant.codecs.plain import BF16, F16, F32
from ornith_moe.quant.codecs.sizes import block_shape, row_bytes
from ornith_moe.quant.codecs.ternary import TQ1_0, TQ2_0

CODECS = (
    F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S,
    IQ4_NL, IQ4_XS, MXFP4, NVFP4, TQ1_0, TQ2_0,
)  # fmt: skip
ENCODERS: dict[str, GgufCodec] = {codec.name: codec() for codec in CODECS}
DECODERS: dict[str, GgufCodec] = ENCODERS | {codec.name: codec() for codec in (IQ1_S, IQ1_M)}


def quantize_gguf(array: np.ndarray, type_name: str, *, imatrix: np.ndarray | None = None) -> np.ndarray:
    """Encode rows as GGUF blocks.

    Args:
        array: ([..., K], float32, or uint16 as the bits of BF16), K a multiple of the type's block.
        type_name: a key of `ENCODERS`, for example "Q4_K".
        imatrix: ([K], float32) importance of each column, at least 0; or one for every matrix of a stack: array
            [E, R, K] and imatrix [E, K]. Types whose ggml encoder ignores it ignore it; IQ2_XXS and IQ2_XS need it.
    Returns:
        ([..., row_bytes], uint8), the bytes ggml's C writes.
    Raises:
        ValueError: unknown type, no encoder for it, K does not fill whole blocks, or an imatrix that is missing, of
            another shape, not finite or negative.
        ConversionError: a value that is not finite (F32 and BF16 store it), or a value or scale beyond fp16.
    Numerics: IEEE fp32 without contraction in C evaluation order; deterministic, independent of how rows are grouped.
    Source: ggml-quants.c.
    Example:
        >>> import numpy as np, ornith_moe as om
        >>> om.quantize_gguf(np.ones((2, 512), np.float32), "Q4_K").shape
        (2, 288)
    """
    if type_name not in ENCODERS:
        block_shape(type_name)
        raise ValueError(f"type_name: no encoder for {type_name} in this version; have {', '.join(ENCODERS)}")
    if array.dtype not in (np.float32, np.uint16):
        raise TypeError(f"array: expected float32, or uint16 as the bits of BF16, got {array.dtype}")
    columns = array.shape[-1]
    width = row_bytes(type_name, columns)
    rows = np.ascontiguousarray(array).reshape(-1, columns)
    if imatrix is None:
        if ENCODERS[type_name].needs_importance:
            raise ValueError(f"imatrix: {type_name} is not encoded without one, nor by ggml; pass float32 [{columns}]")
        encoded = ENCODERS[type_name].encode(rows)
    else:
        importance = checked_imatrix(imatrix, array.shape)
        stack = rows.reshape(len(importance), -1, columns)
        encoded = np.concatenate([ENCODERS[type_name].encode(*pair) for pair in zip(stack, importance, strict=True)])
    return encoded.reshape(*array.shape[:-1], width)


def checked_imatrix(imatrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The importance of each matrix of a stack of this shape, [E, K]; ValueError if it cannot be that."""
    if imatrix.dtype != np.float32 or imatrix.shape not in (shape[-1:], (*shape[:-2], shape[-1])):
        raise ValueError(
            f"imatrix: expected float32 {shape[-1:]} or one row for each matrix of {shape}, got {imatrix.dtype} "
            f"{imatrix.shape}"
        )
    if not (np.isfinite(imatrix) & (imatrix >= 0)).all():
        where = tuple(map(int, np.argwhere(~(np.isfinite(imatrix) & (imatrix >= 0)))[0]))
        raise ValueError(f"imatrix: expected finite numbers of at least 0, got {imatrix[where]} at {where}")
    return np.ascontiguousarray(imatrix).reshape(-1, shape[-1])


def dequantize_gguf(rows: np.ndarray, type_name: str) -> np.ndarray:
    """Decode GGUF blocks to fp32.

    Args:
        rows: ([..., row_bytes], uint8), any bytes.
        type_name: a type with an encoder, IQ1_S or IQ1_M.
    Returns:
        ([..., K], float32); of F32, the same memory where that is contiguous and aligned.
    Raises:
        ValueError: unknown type, no decoder for it, or rows that are not whole blocks.
    Numerics: IEEE fp32 without contraction in C evaluation order, for infinite and NaN scales too (the payload of a NaN
        is not C's); deterministic. Threads decode side by side: the interpreter's lock is free meanwhile.
    Source: ggml-quants.c (`dequantize_row_*`).
    Example:
        >>> import numpy as np, ornith_moe as om
        >>> om.dequantize_gguf(om.quantize_gguf(np.ones((1, 32), np.float32), "BF16"), "BF16")[0, 0]
        np.float32(1.0)
    """
    block, size = block_shape(type_name)
    if type_name not in DECODERS:
        raise ValueError(f"type_name: no decoder for {type_name} in this version; have {', '.join(DECODERS)}")
    if rows.dtype != np.uint8 or rows.ndim == 0 or rows.shape[-1] % size:
        raise ValueError(
            f"rows: expected uint8 rows of whole {size}-byte {type_name} blocks, got {rows.dtype} {rows.shape}"
        )
    matrix = np.ascontiguousarray(rows).reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    return DECODERS[type_name].decode(matrix).reshape(*rows.shape[:-1], rows.shape[-1] // size * block)
