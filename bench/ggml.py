"""ggml's own quantizers, called through ctypes: the oracle for bytes, and a peer for speed.

Three builds by different hands: libggml-python's, the llama.cpp in xllamacpp, which exports the same functions, and
libgguf, which compiles ggml's quantizers behind an interface of its own. Each is imported when it is first asked.
"""

import ctypes
from functools import cache
from importlib import import_module
from pathlib import Path

import gguf
import numpy as np

PACKAGES = {"libggml-python": "libggml", "xllamacpp": "xllamacpp", "libgguf": "libgguf"}  # what is imported of a build
LIBRARIES = {"libggml-python": "lib64/libggml-base.so.0", "xllamacpp": "xllamacpp.abi3.so"}  # in that package
BUILDS = tuple(PACKAGES)


@cache
def _library(build: str) -> ctypes.CDLL:
    package = Path(import_module(PACKAGES[build]).__file__ or "").parent
    library = ctypes.CDLL(str(package / LIBRARIES[build]))
    rows_of = [ctypes.c_int64] * 3  # first, how many, values in each
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *rows_of, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize(
    rows: np.ndarray, type_name: str, imatrix: np.ndarray | None = None, *, build: str = "libggml-python"
) -> np.ndarray:
    """fp32 [R, K] as ggml's C encodes it, uint8 [R, row_bytes]; imatrix is fp32 [K], the importance of each column."""
    kind, rows = gguf.GGMLQuantizationType[type_name], np.ascontiguousarray(rows, np.float32)
    if imatrix is not None:
        imatrix = np.ascontiguousarray(imatrix, np.float32)
        assert imatrix.shape == rows.shape[1:]
    if build == "libgguf":
        return import_module("libgguf").quantize_rows(rows, int(kind), imatrix).view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    encoded = np.empty((rows.shape[0], rows.shape[1] // block * size), np.uint8)
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


def dequantize(encoded: np.ndarray, type_name: str, *, build: str = "libggml-python") -> np.ndarray:
    """uint8 [R, row_bytes] of a block type as ggml's C decodes it, fp32 [R, K]."""
    kind, encoded = gguf.GGMLQuantizationType[type_name], np.ascontiguousarray(encoded)
    if build == "libgguf":
        return import_module("libgguf").dequantize_rows(encoded, int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.empty((encoded.shape[0], encoded.shape[1] // size * block), np.float32)
    decode = getattr(_library(build), "dequantize_row_" + type_name.lower().replace("_k", "_K"))
    decode.argtypes, decode.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    decode(encoded.ctypes.data, rows.ctypes.data, rows.size)
    return rows
