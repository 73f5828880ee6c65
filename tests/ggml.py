"""ggml's own quantizers, called through ctypes from libggml-python: the oracle for bytes, and a peer for speed."""

import ctypes
from functools import cache
from pathlib import Path

import gguf
import libggml
import numpy as np


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(libggml.__file__).parent / "lib64" / "libggml-base.so.0"))
    rows_of = [ctypes.c_int64] * 3  # first, how many, values in each
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *rows_of, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize(rows: np.ndarray, type_name: str) -> np.ndarray:
    """fp32 [R, K] as ggml's C encodes it, uint8 [R, row_bytes], without an importance matrix."""
    kind, rows = gguf.GGMLQuantizationType[type_name], np.ascontiguousarray(rows, np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    encoded = np.empty((rows.shape[0], rows.shape[1] // block * size), np.uint8)
    written = _library().ggml_quantize_chunk(int(kind), rows.ctypes.data, encoded.ctypes.data, 0, *rows.shape, None)
    assert written == encoded.nbytes
    return encoded
