"""llama.cpp's own inputs of every matrix product, collected as llama-imatrix collects them.

xllamacpp's library exports llama.cpp's C functions. Its structs are version-bound, so offsets are asserted against the
defaults they must hold, and `VERSION` is the only version that is run.
"""

import ctypes
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xllamacpp

VERSION = "2026.10.11549"
INSTALLED = version("xllamacpp")
CB_EVAL, TYPE_K, TYPE_V, FLASH_ATTENTION = 88, 104, 108, 48  # offsets in llama_context_params
F32, F16 = 0, 1


class Opaque(ctypes.Structure):
    """A struct passed by value that is at least as large as the real one."""

    _fields_ = (("bytes", ctypes.c_uint64 * 64),)


class Batch(ctypes.Structure):
    _fields_ = (("tokens", ctypes.c_int32), ("rest", ctypes.c_void_p * 6))


class Tensor(ctypes.Structure):
    pass


Tensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
)
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Tensor), ctypes.c_bool, ctypes.c_void_p)
QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def array(tensor: Tensor, dtype) -> np.ndarray:
    """A view of a tensor in host memory, slowest dimension first."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * extent).from_address(tensor.data))
    return np.lib.stride_tricks.as_strided(raw[:4].view(dtype), shape, strides)


def open_library() -> ctypes.CDLL:
    """llama.cpp, quiet, with the types of what `collect` calls."""
    library = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    library.llama_log_set(QUIET, None)
    library.llama_backend_init()
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(library, name).restype = Opaque
    pointer = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes, library.llama_model_load_from_file.restype = (
        [ctypes.c_char_p, Opaque],
        pointer,
    )
    library.llama_init_from_model.argtypes, library.llama_init_from_model.restype = [pointer, Opaque], pointer
    library.llama_batch_get_one.argtypes, library.llama_batch_get_one.restype = [pointer, ctypes.c_int32], Batch
    library.llama_decode.argtypes = [pointer, Batch]
    library.llama_get_memory.argtypes, library.llama_get_memory.restype = [pointer], pointer
    library.llama_memory_clear.argtypes = [pointer, ctypes.c_bool]
    library.llama_set_n_threads.argtypes = [pointer, ctypes.c_int32, ctypes.c_int32]
    library.llama_free.argtypes = library.llama_model_free.argtypes = [pointer]
    library.ggml_op_name.argtypes, library.ggml_op_name.restype = [ctypes.c_int], ctypes.c_char_p
    return library


def context_parameters(library: ctypes.CDLL, length: int, watch: object) -> Opaque:
    """fp32 caches of `length` tokens and no flash attention, which has no rows to watch."""
    parameters = library.llama_context_default_params()
    raw = ctypes.addressof(parameters)
    assert ctypes.c_float.from_address(raw + CB_EVAL - 8).value in (0.0, -1.0)
    for offset in (TYPE_K, TYPE_V):
        assert ctypes.c_int.from_address(raw + offset).value == F16
        ctypes.c_int.from_address(raw + offset).value = F32
    assert ctypes.c_int.from_address(raw + FLASH_ATTENTION).value == -1  # auto
    ctypes.c_int.from_address(raw + FLASH_ATTENTION).value = 0
    assert ctypes.c_void_p.from_address(raw + CB_EVAL).value is None
    for word in range(3):  # n_ctx, n_batch, n_ubatch
        ctypes.c_uint32.from_address(raw + 4 * word).value = length
    ctypes.c_void_p.from_address(raw + CB_EVAL).value = ctypes.cast(watch, ctypes.c_void_p).value
    return parameters


def collect(path: Path, chunks: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{weight: (sums of squares fp64 [E, K], counts [E])} over chunks of token ids [C, T], each on its own."""
    library = open_library()
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(name, matrices, matrix, rows):
        sums, counts = found.setdefault(name, (np.zeros((matrices, rows.shape[-1])), np.zeros(matrices)))
        sums[matrix] += np.square(rows.astype(np.float64)).sum(0)
        counts[matrix] += len(rows)

    @CALLBACK
    def watch(tensor, ask, _):
        tensor = tensor.contents
        op = library.ggml_op_name(tensor.op)
        if op not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return not ask
        weight, x = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        wanted = name.endswith(".weight") and x.type == F32
        if ask:
            return wanted
        if wanted and op == b"MUL_MAT":
            rows = array(x, np.float32)
            add(name, 1, 0, rows.reshape(-1, rows.shape[-1]))
        elif wanted:
            rows, ids = array(x, np.float32)[0], array(tensor.src[2].contents, np.int32)[0, 0]  # [T, 1 or k, K], [T, k]
            for expert in np.unique(ids):
                tokens, slots = np.where(ids == expert)
                add(name, weight.ne[2], expert, rows[tokens, slots % rows.shape[1]])
        return True

    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    assert model, path
    parameters = context_parameters(library, chunks.shape[1], watch)
    context = library.llama_init_from_model(model, parameters)
    assert context
    library.llama_set_n_threads(context, 1, 1)  # four by default, which wait for one another by spinning
    try:
        for chunk in np.ascontiguousarray(chunks, np.int32):
            library.llama_memory_clear(library.llama_get_memory(context), True)
            batch, outputs = library.llama_batch_get_one(chunk.ctypes.data, len(chunk)), np.ones(len(chunk), np.int8)
            batch.rest[5] = outputs.ctypes.data  # of all tokens, or the last layer drops them
            assert library.llama_decode(context, batch) == 0
    finally:
        library.llama_free(context)
        library.llama_model_free(model)
    return found
