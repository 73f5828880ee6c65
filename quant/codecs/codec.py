"""What a codec is: one small class per GGUF storage type.

A `BlockCodec` sees finite values only, in chunks of whole rows that stay in cache, and answers for the bytes of blocks.
This file refuses what it may not see, and what it made that no reader could use: a scale beyond fp16.
"""

from __future__ import annotations

import numpy as np

from ornith_moe.quant.codecs.sizes import block_shape, row_bytes
from ornith_moe.quant.errors import UnstorableError
from ornith_moe.quant.simd.compiled import compiled

CHUNK = 1 << 17  # values at a time: half a MB of input, so that checks and stages find it in cache
DECODED = 1 << 20  # as many when decoding: it has few stages, and threads wait for the interpreter's lock between calls
INFINITE, BEYOND = (int(np.float32(v).view(np.uint32)) for v in (np.inf, 2**29))  # 2^29: no fp16 * 128 * 32 is as large
NO_COLUMNS = np.empty(0, np.float32)
NO_COLUMNS.flags.writeable = False


class GgufCodec:
    """One storage type; contiguous rows [R, K] to uint8 [R, row_bytes] and back, K a multiple of the block.

    Rows are fp32, or uint16 as the bits of BF16. Any bytes decode to something: files are not ours. NaN stays NaN, of
    whatever payload.
    """

    name: str
    important = False  # uses importance
    needs_importance = False

    def encode(self, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        raise NotImplementedError

    def decode(self, rows: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class BlockCodec(GgufCodec):
    """A type that stores blocks; `halves` are the offsets of a block's fp16 scales."""

    halves: tuple[int, ...] = ()

    def encode_blocks(self, x: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        """Flat values of whole rows into uint8 [blocks, bytes]; `columns` is one row of importance, or empty."""
        raise NotImplementedError

    def decode_blocks(self, blocks: np.ndarray, out: np.ndarray) -> None:
        """Flat read-only bytes of whole blocks into flat values."""
        raise NotImplementedError

    def decode(self, rows: np.ndarray) -> np.ndarray:
        block, size = block_shape(self.name)
        out = np.empty((rows.shape[0], rows.shape[1] // size * block), np.float32)
        blocks, values, step = frozen(rows), out.reshape(-1), DECODED // block
        for start in range(0, out.size // block, step):
            stop = start + step
            self.decode_blocks(blocks[size * start : size * stop], values[block * start : block * stop])
        return out

    def encode(self, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        block, size = block_shape(self.name)
        out = np.empty((rows.shape[0], row_bytes(self.name, rows.shape[1])), np.uint8)
        columns = frozen(imatrix) if self.important and imatrix is not None else NO_COLUMNS
        step = max(1, CHUNK // max(1, rows.shape[1]))
        wide = np.empty((step, rows.shape[1]) if rows.dtype == np.uint16 else 0, np.float32)
        for start in range(0, rows.shape[0], step):
            some, encoded = rows[start : start + step], out[start : start + step].reshape(-1, size)
            if wide.size:
                largest = _widened(frozen(some), wide.reshape(-1))
                some = wide[: len(some)]
            else:
                largest = _largest(frozen(some).view(np.uint32))
            if largest >= INFINITE:
                row, column = divmod(int(np.argmin(np.isfinite(some))), rows.shape[1])
                raise not_finite(some[row, column], start + row, column)
            if self.halves and largest >= BEYOND:
                row, column = divmod(int(np.abs(some).argmax()), rows.shape[1])
                raise beyond_half(some[row, column], start + row, column)
            x = frozen(some)
            self.encode_blocks(x, columns, encoded)
            for offset in self.halves:
                beyond = _first_infinite(encoded, offset)
                if beyond < len(encoded):
                    first = beyond * block
                    row, column = divmod(first + int(np.abs(x[first : first + block]).argmax()), rows.shape[1])
                    raise beyond_half(some[row, column], start + row, column)
        return out


def not_finite(value: np.float32, row: int, column: int) -> UnstorableError:
    return UnstorableError(
        f"row {row}, column {column} is {value}; expected finite weights, so mend the checkpoint first"
    )


def beyond_half(value: np.float32, row: int, column: int) -> UnstorableError:
    return UnstorableError(
        f"row {row}, column {column}: {value:.4g} is beyond fp16, which this type stores its scale or "
        "values in, as BF16 does not"
    )


def as_float32(rows: np.ndarray) -> np.ndarray:
    """Contiguous fp32 of rows that are fp32 or the bits of BF16."""
    if rows.dtype != np.uint16:
        return np.ascontiguousarray(rows, np.float32)
    values = np.empty(rows.shape, np.float32)
    _widened(frozen(rows), values.reshape(-1))
    return values


def frozen(rows: np.ndarray) -> np.ndarray:
    """Flat and read-only: a kernel is compiled once for each kind of array, and checkpoints are mapped read-only."""
    flat = rows.reshape(-1).view()
    flat.flags.writeable = False
    return flat


@compiled
def _first_infinite(encoded, offset):
    """The first block whose fp16 at `offset` is infinite, or their number."""
    for block in range(encoded.shape[0]):
        if encoded[block, offset + 1] & 0x7C == 0x7C:
            return block
    return encoded.shape[0]


@compiled
def _largest(bits):
    """The bits of the largest magnitude: those of floats have their order, and NaN comes last."""
    largest = np.uint32(0)
    for b in bits:
        largest = max(largest, b & np.uint32(0x7FFFFFFF))
    return largest


@compiled
def _widened(bits, values):
    """BF16 as fp32, and the bits of the largest magnitude."""
    largest = np.uint32(0)
    for i in range(bits.size):
        wide = np.uint32(np.uint32(bits[i]) << np.uint32(16))
        largest = max(largest, np.uint32(wide & np.uint32(0x7FFFFFFF)))
        values[i] = wide.view(np.float32)
    return largest
