"""GGUF storage types: how many bytes a row takes and how its values become those bytes.

    F32, F16, BF16   one value, rounded to nearest even
    Q8_0             blocks of 32: d = amax / 127 in fp32, q = round(x * (1 / d)) half away from zero;
                     stored as fp16(d), then q as int8

A type is a small class that states encode; block size and bytes come from the `gguf` package, and so does decode, which
makes every decoded value an independent check of ours. Q8_0 follows ggml's C order of operations in IEEE fp32 without
contraction, so the bytes equal ggml's (tests/quant/test_gguf_codecs.py). Types without an encoder here can be planned,
sized and decoded, not yet written. Source: ggml-quants.c (`quantize_row_q8_0_ref`).

Letters: R rows, K values in a row.
"""

from __future__ import annotations

import gguf
import numpy as np
from numba import njit

from ornith_moe.quant.errors import ConversionError
from ornith_moe.quant.gguf_types import block_shape, row_bytes


class GgufCodec:
    """One storage type; encode works on rows [R, K], K a multiple of `block`."""

    name: str

    def __init_subclass__(cls) -> None:
        ENCODERS[cls.name] = cls()

    def encode(self, rows: np.ndarray) -> np.ndarray:
        raise NotImplementedError


ENCODERS: dict[str, GgufCodec] = {}


def _compiled(function):
    """numba, cached on disk where there is a writable place for it (a read-only container has none)."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


class F32(GgufCodec):
    name = "F32"

    def encode(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(rows, np.float32).view(np.uint8)


class F16(GgufCodec):
    name = "F16"

    def encode(self, rows: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return _finite_half(rows, rows).view(np.uint8)


class BF16(GgufCodec):
    name = "BF16"

    def encode(self, rows: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
        codes = np.empty(bits.shape, np.uint16)
        _bf16(bits.reshape(-1), codes.reshape(-1))
        return codes.view(np.uint8)


@_compiled
def _bf16(bits, codes):
    for i in range(bits.size):
        b = bits[i]
        rounded = (b + (np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        quiet = (b >> np.uint32(16)) | np.uint32(64)
        codes[i] = quiet if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded


class Q8_0(GgufCodec):
    name = "Q8_0"

    def encode(self, rows: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(rows, np.float32)
        blocks = rows.shape[1] // 32
        codes = np.empty((rows.shape[0], blocks, 34), np.uint8)
        scale = np.empty((rows.shape[0], blocks), np.float32)
        _q8_0(rows, codes, scale)
        with np.errstate(over="ignore"):
            codes[:, :, :2] = _finite_half(scale, rows)[:, :, None].view(np.uint8)
        return codes.reshape(rows.shape[0], blocks * 34)


@_compiled
def _q8_0(rows, codes, scale):
    for r in range(rows.shape[0]):
        for b in range(rows.shape[1] // 32):
            amax = np.float32(0)
            for i in range(32):
                amax = max(amax, abs(rows[r, b * 32 + i]))
            d = amax / np.float32(127)
            inverse = np.float32(1) / d if d != 0 else np.float32(0)
            if np.isinf(inverse):  # d is subnormal and stored as fp16 zero; C's cast of an infinity gives 0 as well
                inverse = np.float32(0)
            scale[r, b] = d
            for i in range(32):
                value = rows[r, b * 32 + i] * inverse
                whole = np.trunc(value)
                if abs(value - whole) >= np.float32(0.5):  # half away from zero; exact, unlike adding a half first
                    whole += np.copysign(np.float32(1), value)
                codes[r, b, 2 + i] = np.uint8(np.int8(whole))


def _finite_half(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    half = np.ascontiguousarray(values, np.float32).astype(np.float16)
    if not np.isfinite(half).all():
        where = np.unravel_index(np.abs(rows).argmax(), rows.shape)
        raise ConversionError(
            f"row {where[0]}, column {where[1]}: {rows[where]:.4g} is beyond fp16, which this type stores its scale or "
            "values in; use BF16 for this tensor"
        )
    return half


def quantize_gguf(array: np.ndarray, type_name: str, *, imatrix: np.ndarray | None = None) -> np.ndarray:
    """Encode fp32 rows as GGUF blocks.

    Args:
        array: ([..., K], float32), K a multiple of the type's block.
        type_name: "F32", "F16", "BF16" or "Q8_0"; further types come with their encoders.
        imatrix: ([K], float32) importance of each column; the types above have no use for it.
    Returns:
        ([..., row_bytes], uint8), the bytes ggml's C writes.
    Raises:
        ValueError: unknown type, no encoder for it, or K does not fill whole blocks.
        ConversionError: a value or scale beyond fp16.
    Numerics: IEEE fp32 without contraction in C evaluation order; deterministic, independent of how rows are grouped.
    Source: ggml-quants.c.
    Example:
        >>> import numpy as np, ornith_moe as om
        >>> om.quantize_gguf(np.ones((2, 64), np.float32), "Q8_0").shape
        (2, 68)
    """
    if type_name not in ENCODERS:
        block_shape(type_name)
        raise ValueError(f"type_name: no encoder for {type_name} in this version; have {', '.join(ENCODERS)}")
    if array.dtype != np.float32:
        raise TypeError(f"array: expected float32, got {array.dtype}")
    width = row_bytes(type_name, array.shape[-1])
    rows = ENCODERS[type_name].encode(array.reshape(-1, array.shape[-1]))
    return rows.reshape(*array.shape[:-1], width)


def dequantize_gguf(rows: np.ndarray, type_name: str) -> np.ndarray:
    """Decode GGUF blocks to fp32 with the `gguf` package.

    Args:
        rows: ([..., row_bytes], uint8).
        type_name: any type the installed `gguf` decodes, K-quants and IQ types included.
    Returns:
        ([..., K], float32).
    Raises:
        ValueError: unknown type, or rows that are not whole blocks.
    Example:
        >>> import numpy as np, ornith_moe as om
        >>> om.dequantize_gguf(om.quantize_gguf(np.ones((1, 32), np.float32), "BF16"), "BF16")[0, 0]
        np.float32(1.0)
    """
    _, size = block_shape(type_name)
    if rows.dtype != np.uint8 or rows.shape[-1] % size:
        raise ValueError(
            f"rows: expected uint8 rows of whole {size}-byte {type_name} blocks, got {rows.dtype} {rows.shape}"
        )
    return gguf.quants.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType[type_name])
