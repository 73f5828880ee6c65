"""ggml's own quantizers, called through ctypes: the oracle for bytes, and a peer for speed.

Two builds by different hands: libggml-python's, and the llama.cpp in xllamacpp, which exports the same function.
"""

import ctypes
from functools import cache
from pathlib import Path

import gguf
import libggml
import numpy as np
import xllamacpp

BUILDS = {
    "libggml-python": Path(libggml.__file__).parent / "lib64" / "libggml-base.so.0",
    "xllamacpp": Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so",
}


@cache
def _library(build: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(BUILDS[build]))
    rows_of = [ctypes.c_int64] * 3  # first, how many, values in each
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *rows_of, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize(
    rows: np.ndarray, type_name: str, imatrix: np.ndarray | None = None, *, build: str = "libggml-python"
) -> np.ndarray:
    """fp32 [R, K] as ggml's C encodes it, uint8 [R, row_bytes]; imatrix is fp32 [K], the importance of each column."""
    kind, rows = gguf.GGMLQuantizationType[type_name], np.ascontiguousarray(rows, np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    encoded = np.empty((rows.shape[0], rows.shape[1] // block * size), np.uint8)
    if imatrix is not None:
        imatrix = np.ascontiguousarray(imatrix, np.float32)
        assert imatrix.shape == rows.shape[1:]
    written = _library(build).ggml_quantize_chunk(
        int(kind),
        rows.ctypes.data,
        encoded.ctypes.data,
        0,
        *rows.shape,
        None if imatrix is None else imatrix.ctypes.data,
    )
    assert written == encoded.nbytes
    return encoded
