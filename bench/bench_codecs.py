"""Codecs on one thread, against what a user would write or install instead.

FP8 (encode from BF16, decode to BF16): machine code for slabs (`codecs/fp8_slabs.py`) and the functions of tensors that
run it (`quant/fp8.py`), against the rule on the whole tensor at once in plain torch, and the same function under
torch.compile. GGUF (encode from FP32, with and without importance; decode to FP32): ggml's C, and gguf-py where it has
the type. What a second thread adds: two_threads.py; the encoders of a GPU: bench_gpu_encode.py.

Before it is timed, each row must give the bytes of a reference: the plain formulation for FP8, ggml's C for GGUF, or
gguf-py where ggml is not installed, and gguf-py where values are decoded. Where neither has the type, the error is that
of the decoded weights.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import gguf
import numpy as np
import torch

import ornith_moe as om
from ornith_moe.bench import ggml
from ornith_moe.bench.numeric import relative_rms
from ornith_moe.bench.peers import Unable
from ornith_moe.bench.shapes import MATRICES, SEARCHED
from ornith_moe.bench.tasks import Settings, Side, Task, Work
from ornith_moe.quant.codecs.fp8_slabs import decode_fp8, encode_fp8
from ornith_moe.quant.codecs.gguf import DECODERS, ENCODERS
from ornith_moe.quant.codecs.grids import GridCodec
from ornith_moe.quant.codecs.sizes import row_bytes

BLOCK = 128
SCALES = {"block": torch.float32, "channel": torch.bfloat16}  # as each recipe's files store them
BLOCKS = {"block": (BLOCK, BLOCK), "channel": (1, None)}
FP8_CODERS = {"ours": False, "ours, for tensors": False, "torch": True, "torch.compile": True}
GGUF_CODERS = {"ours": False, "gguf-py": True, "ggml": True}
GGUF_PY = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0")  # gguf-py 0.19 encodes
PLAIN = ("F32", "F16", "BF16")  # no symbols of ggml's C
QUICK_ENCODED, QUICK_DECODED = ("BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"), ("Q8_0", "Q4_K", "Q6_K")
LOSSY = 0.5  # a decoded weight's relative error where no reference has the type; Q2_K's is 0.3


def tasks(settings: Settings) -> list[Task]:
    """FP8, then GGUF types as they are encoded and decoded."""
    if settings.quick:
        made = [_fp8(way, recipe, "1024x2048") for way in ("encode", "decode") for recipe in SCALES]
        made += [_encode(name, searched(name)) for name in QUICK_ENCODED]
        made += [_encode("Q4_K", "1024x2048", importance=True)]
        return made + [_decode(name, "1024x2048") for name in QUICK_DECODED]
    made = [_fp8(way, recipe, matrix) for way in ("encode", "decode") for recipe in SCALES for matrix in MATRICES]
    made += [_encode(name, matrix) for name in ("F16", "BF16", "Q8_0") for matrix in MATRICES]
    searches = [name for name, codec in ENCODERS.items() if name not in (*PLAIN, "Q8_0") and not codec.needs_importance]
    made += [_encode(name, searched(name)) for name in searches]
    made += [_encode(name, searched(name), importance=True) for name, codec in ENCODERS.items() if codec.important]
    made += [_decode(name, "1024x2048") for name in DECODERS if name != "F32"]
    return made + [_decode(name, "4096x4096") for name in ("BF16", "Q8_0", "Q4_K", "Q6_K")]


def searched(name: str) -> str:
    """The searches are bound by arithmetic, and ggml's take seconds on a large matrix."""
    return "256x2048" if isinstance(ENCODERS[name], GridCodec) else "1024x2048"


def _fp8(way: str, recipe: str, matrix: str) -> Task:
    case = {"type": f"FP8 {recipe}", "way": way, "matrix": matrix, "threads": 1}
    group = f"FP8 {recipe} {way}, {matrix} {'from' if way == 'encode' else 'to'} BF16"
    prepare = partial(_prepare_fp8_encode if way == "encode" else _prepare_fp8_decode, recipe, matrix)
    return Task("codecs", group, case, FP8_CODERS, prepare, threads=1)


def plain_encode(w: torch.Tensor, recipe: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [N/bn, bn, K/bk, bk] of the whole matrix, one scale each."""
    rows, columns = w.shape
    bn, bk = (BLOCK, BLOCK) if recipe == "block" else (1, columns)
    blocks = w.float().view(rows // bn, bn, columns // bk, bk)
    scale = (blocks.abs().amax(dim=(1, 3)) / 448).to(SCALES[recipe])
    q = (blocks / scale.float()[:, None, :, None]).to(torch.float8_e4m3fn)
    return q.view(rows, columns), scale


def plain_decode(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    (rows, columns), (gn, gk) = q.shape, scale.shape
    blocks = q.float().view(gn, rows // gn, gk, columns // gk) * scale.float()[:, None, :, None]
    return blocks.view(rows, columns).bfloat16()


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if not (shutil.which("c++") or shutil.which("g++")):
        raise Unable("missing", "torch.compile needs a C++ compiler; install g++")
    return torch.compile(function, dynamic=False)


def as_arrays(q: torch.Tensor, scale: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    bits = scale.view(torch.uint16) if scale.dtype == torch.bfloat16 else scale
    return q.view(torch.uint8).numpy(), bits.numpy()


def same_bytes(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """0.0, or AssertionError where a byte differs; a NaN equals itself."""
    for a, b in zip(found, expected, strict=True):
        different = int((a.view(np.uint8) != b.view(np.uint8)).sum()) if a.shape == b.shape else a.size
        assert not different, f"{different} of {b.nbytes} bytes differ from the reference's"
    return 0.0


def nbytes(*parts: Any) -> int:
    return sum(part.nbytes for part in parts)


def _prepare_fp8_encode(recipe: str, matrix: str) -> Work:
    w = torch.randn(MATRICES[matrix]).bfloat16()
    q, scale = plain_encode(w, recipe)
    assert relative_rms(plain_decode(q, scale), w) < 0.03
    expected = as_arrays(q, scale)

    def side(name: str) -> Side:
        if name == "ours":
            kind, rows = "fp32" if SCALES[recipe] == torch.float32 else "bf16", w.view(torch.uint16).numpy()
            return Side(partial(encode_fp8, rows, BLOCKS[recipe], scale=kind), partial(same_bytes, expected))
        tensors = om.quantize_fp8_block if recipe == "block" else om.quantize_fp8_channel
        plain = {"torch": lambda: plain_encode, "torch.compile": lambda: compiled(plain_encode)}
        call = partial(tensors, w) if name == "ours, for tensors" else partial(plain[name](), w, recipe)
        return Side(call, lambda pair: same_bytes(expected, as_arrays(*pair)))

    return Work({name: partial(side, name) for name in FP8_CODERS}, nbytes(w, q, scale))


def _prepare_fp8_decode(recipe: str, matrix: str) -> Work:
    q, scale = plain_encode(torch.randn(MATRICES[matrix]).bfloat16(), recipe)
    expected = plain_decode(q, scale).view(torch.uint16).numpy()

    def side(name: str) -> Side:
        if name == "ours":
            call = partial(decode_fp8, *as_arrays(q, scale), BLOCKS[recipe], dtype="bf16")
            return Side(call, lambda decoded: same_bytes([expected], [decoded]))
        plain = {"ours, for tensors": lambda: om.dequantize_fp8, "torch": lambda: plain_decode}
        decode = plain.get(name, lambda: compiled(plain_decode))()
        return Side(partial(decode, q, scale), lambda w: same_bytes([expected], [w.view(torch.uint16).numpy()]))

    return Work({name: partial(side, name) for name in FP8_CODERS}, nbytes(q, scale, expected))


def _encode(name: str, matrix: str, importance: bool = False) -> Task:
    case = {"type": name, "way": "encode", "matrix": matrix, "threads": 1} | (
        {"importance": True} if importance else {}
    )
    coders = {k: v for k, v in GGUF_CODERS.items() if k != "gguf-py" or (name in GGUF_PY and not importance)}
    group = f"{name} encode{' with importance' * importance}, {matrix} from FP32"
    return Task("codecs", group, case, coders, partial(_prepare_encode, name, matrix, importance, coders), threads=1)


def _ggml() -> str:
    """The build of ggml that is installed."""
    for build in ("libggml-python", "xllamacpp"):
        if find_spec(ggml.PACKAGES[build]):
            return build
    raise Unable("missing", "ggml is not installed; pip install libggml-python")


def _prepare_encode(name: str, matrix: str, importance: bool, coders: dict[str, bool]) -> Work:
    rows = np.random.default_rng(0).standard_normal(SEARCHED[matrix], np.float32)
    drawn = np.random.default_rng(1).random((1, rows.shape[1]), np.float32)[0]
    imatrix = drawn if importance else None
    size = SEARCHED[matrix][0] * row_bytes(name, rows.shape[1])

    def call(coder: str) -> Callable[[], np.ndarray]:
        if coder == "ours":
            return lambda: om.quantize_gguf(rows, name, imatrix=imatrix)
        if coder == "ggml":
            build = _ggml()
            return lambda: ggml.quantize(rows, name, imatrix, build=build)
        return lambda: gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name]).view(np.uint8)  # F16 are halves

    @cache
    def reference() -> np.ndarray | None:
        try:
            return call("ggml")()
        except Unable:
            return call("gguf-py")() if "gguf-py" in coders else None

    def check(encoded: np.ndarray) -> float:
        expected = reference()
        if expected is not None:
            return same_bytes([expected], [encoded])
        decoded = gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[name])
        error = relative_rms(torch.from_numpy(decoded), torch.from_numpy(rows))
        assert error < LOSSY, f"decoded: relative RMS error {error:.2e}, allowed {LOSSY}"
        return error

    sides = {coder: partial(lambda coder: Side(call(coder), check), coder) for coder in coders}
    return Work(sides, rows.nbytes + size, note=lambda _, times: f"{rows.size / times.median_s / 1e6:.1f} Mweights/s")


def _decode(name: str, matrix: str) -> Task:
    case = {"type": name, "way": "decode", "matrix": matrix, "threads": 1}
    coders = {k: v for k, v in GGUF_CODERS.items() if k != "ggml" or name not in PLAIN}
    group = f"{name} decode, {matrix} to FP32"
    return Task("codecs", group, case, coders, partial(_prepare_decode, name, matrix, coders), threads=1)


def _prepare_decode(name: str, matrix: str, coders: dict[str, bool]) -> Work:
    """Random bytes below 0x70, so that no scale is infinite. Every call makes its result: new pages in the larger."""
    rows, columns = MATRICES[matrix]
    encoded = np.random.default_rng(0).integers(0, 0x70, (rows, row_bytes(name, columns)), np.uint8)
    kind = gguf.GGMLQuantizationType[name]
    expected = gguf.quants.dequantize(encoded, kind)

    def side(coder: str) -> Side:
        if coder == "ggml":
            call: Callable[[], np.ndarray] = partial(ggml.dequantize, encoded, name, build=_ggml())
        elif coder == "gguf-py":
            call = partial(gguf.quants.dequantize, encoded, kind)
        else:
            call = partial(om.dequantize_gguf, encoded, name)
        return Side(call, lambda decoded: same_bytes([expected], [decoded]))

    rate = lambda _, times: f"{expected.size / times.median_s / 1e6:.1f} Mweights/s"  # noqa: E731
    return Work({coder: partial(side, coder) for coder in coders}, nbytes(encoded, expected), note=rate)


def test_codecs(measure: Callable[[Task, str], None], task: Task, name: str) -> None:
    measure(task, name)
