"""FP8 (e4m3fn): the one definition that the training GEMM, the weight sync and the file on disk share, bit for bit.

    amax  = max |x| over the block's real elements
    scale = max(amax / 448, 2^-126)         1 for a block of zeros, NaN for a block that holds NaN or Inf
    scale = round(scale)                    to the dtype it is stored in: fp32, BF16 (nearest), UE8M0 (up)
    q     = e4m3fn(x / scale)               nearest, ties to even
    x'    = q * scale

`scale` is what stored values are multiplied by, also where a file calls it `weight_scale_inv`. Each choice is frozen:

- Division, in IEEE fp32, twice. Multiplying by 448 / amax changes 0.02-0.05 % of the codes and half of the scales.
- The scale is rounded *before* the values are divided by it. Rounding a UE8M0 scale afterwards leaves 9 dB of 31.
- UE8M0 is 2^ceil(log2(amax / 448)), found on the exponent bits; a logarithm in fp32 is wrong beside powers of two.
- 2^-126 is the smallest normal number of all three scale dtypes, so no scale underflows to 0 and none is subnormal.
- No clamp is needed: a rounded scale is at most 2^-9 too small, x / scale stays below 449, and e4m3fn rounds to 448
  up to 464. A block with NaN or Inf gets code 0x7f throughout, whatever the sign; the converter refuses it earlier.
- Weights (block, channel) are rounded to BF16 first, whatever they come in: an fp32 master quantized directly would
  not be the policy that a BF16 weight sync serves (xtuner#2044). Activations (tokens) are quantized as given.
- Edge blocks are partial: the grid is ceil(N / block) and no padding is seen.

N rows (output channels or tokens), K contraction. `_quantize_rows` and `_dequantize_rows` are the rule in torch. On a
CPU its twin in machine code does the work, `ornith_moe.quant.codecs.fp8_slabs`, four times as fast, a few rows at a
time on as many threads as torch has; the twin on a GPU is `ornith_moe.kernels.fp8_cast`. torch.compile breaks its graph
here: what it makes of the rule fuses roundings away and divides approximately on a GPU.
Sources: OCP 8-bit floating point specification (e4m3fn), DeepSeek-V3 section 3.3 (1x128 and 128x128), OCP MX (UE8M0).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from types import SimpleNamespace

import numpy as np
import torch

from ornith_moe.quant.errors import brief

E4M3_MAX = 448.0
MIN_SCALE = 2.0**-126
_TILE_ELEMENTS = 1 << 21  # that a thread takes at a time on a CPU; calls for fewer would cost as much as their work
SCALES = {  # name: dtype, the integer that carries it, how far its bits lie below those of fp32
    "fp32": (torch.float32, torch.int32, 0),
    "bf16": (torch.bfloat16, torch.int16, 16),
    "ue8m0": (torch.float8_e8m0fnu, torch.uint8, 23),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Block = tuple[int, int | None]  # rows and columns that share a scale; None: all columns
_Tile = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # rows of a matrix, their scales, rows of the result
_TYPES = {  # numpy's
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "<u2",
    torch.float8_e4m3fn: "|u1",
    torch.float8_e8m0fnu: "|u1",
}


@torch.no_grad()
def quantize_fp8_block(
    w: torch.Tensor, *, block: tuple[int, int] = (128, 128), scale: str = "fp32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """q[i, j] = e4m3fn(w[i, j] / s) with one scale s per `block` of a weight matrix.

    Args:
        w: [..., N, K], fp32, fp16 or BF16, any strides; rounded to BF16 first. N and K need not divide into blocks.
        block: rows and columns that share a scale.
        scale: dtype of the scale, "fp32", "bf16" or "ue8m0".
    Returns:
        q: [..., N, K], torch.float8_e4m3fn, contiguous.
        scale: [..., ceil(N / block[0]), ceil(K / block[1])], float32, bfloat16 or float8_e8m0fnu (what transformers and
            safetensors store for `scale_fmt: ue8m0`).
    Raises:
        TypeError: `w` is not a floating tensor of those dtypes. ValueError: fewer than two dimensions, a block below 1
            or an unknown `scale`.
    Numerics: the module's rule; bitwise equal on every device and for every tiling. SQNR on normal weights 31.5 dB.
    Source: DeepSeek-V3 section 3.3; Qwen's FP8 checkpoints with scale="bf16".
    Example:
        >>> q, s = quantize_fp8_block(torch.randn(200, 300))
        >>> q.shape, s.shape
        (torch.Size([200, 300]), torch.Size([2, 3]))
    """
    _check("w", w, 2)
    if min(block) < 1:
        raise ValueError(f"block: expected two sizes of at least 1, got {tuple(block)}; the usual block is (128, 128)")
    _check_scale(scale, ("fp32", "bf16", "ue8m0"))
    return _quantize(w, *block, scale, torch.bfloat16)


@torch.no_grad()
def quantize_fp8_block_both(
    w: torch.Tensor, *, block: tuple[int, int] = (128, 128), scale: str = "fp32"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize_fp8_block` of w and of w transposed, whose codes and scales are the same numbers.

    A matrix unit that takes FP8 only with the contraction contiguous needs both: y = x @ w^T contracts K, dx = dy @ w
    contracts N.

    Args: as `quantize_fp8_block`.
    Returns:
        q, scale: as `quantize_fp8_block`.
        q_t: [..., K, N], torch.float8_e4m3fn, contiguous; q_t[k, n] = q[n, k].
        scale_t: [..., ceil(K / block[1]), ceil(N / block[0])], contiguous; scale_t[j, i] = scale[i, j].
    Raises, Numerics: as `quantize_fp8_block`.
    Example:
        >>> q, s, q_t, s_t = quantize_fp8_block_both(torch.randn(200, 300))
        >>> q_t.shape, s_t.shape
        (torch.Size([300, 200]), torch.Size([3, 2]))
    """
    q, s = quantize_fp8_block(w, block=block, scale=scale)
    return q, s, q.mT.contiguous(), s.mT.contiguous()


@torch.no_grad()
def quantize_fp8_channel(w: torch.Tensor, *, scale: str = "bf16") -> tuple[torch.Tensor, torch.Tensor]:
    """q[i, j] = e4m3fn(w[i, j] / s[i]) with one scale per output row of a weight matrix.

    Args:
        w: [..., N, K], fp32, fp16 or BF16, any strides; rounded to BF16 first.
        scale: dtype of the scale, "bf16" (compressed-tensors files) or "fp32".
    Returns:
        q: [..., N, K], torch.float8_e4m3fn, contiguous.
        scale: [..., N, 1], bfloat16 or float32.
    Raises, Numerics: as `quantize_fp8_block`.
    Source: compressed-tensors "float-quantized", strategy "channel".
    Example:
        >>> q, s = quantize_fp8_channel(torch.randn(3, 200, 300))
        >>> s.shape, s.dtype
        (torch.Size([3, 200, 1]), torch.bfloat16)
    """
    _check("w", w, 2)
    _check_scale(scale, ("bf16", "fp32"))
    return _quantize(w, 1, None, scale, torch.bfloat16)


@torch.no_grad()
def quantize_fp8_experts(
    w: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    experts: Iterable[int],
    *,
    block: Block = (128, 128),
) -> None:
    """`quantize_fp8_block` of w[e], or with block (1, None) `quantize_fp8_channel`, into q[e] and scale[e].

    Args:
        w: [E, N, K], fp32, fp16 or BF16; rounded to BF16 first.
        q, scale: what those functions gave for w or for another weight of its shape; written to.
        experts: which e. The others are neither read nor written.
    Raises:
        TypeError: the dtype of w.
    Numerics: as `quantize_fp8_block`.
    Example:
        >>> w = torch.ones(3, 128, 128)
        >>> q, s = quantize_fp8_block(w)
        >>> quantize_fp8_experts(2 * w, q, s, [1])
        >>> dequantize_fp8(q, s)[:, 0, 0]
        tensor([1., 2., 1.], dtype=torch.bfloat16)
    """
    _check("w", w, 3)
    kind = next(name for name, (dtype, _, _) in SCALES.items() if dtype == scale.dtype)
    _quantize(w, *block, kind, torch.bfloat16, (q, scale), experts)


@torch.no_grad()
def quantize_fp8_tokens(
    x: torch.Tensor, *, group: int | None = 128, scale: str = "fp32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """q[t, k] = e4m3fn(x[t, k] / s[t, k // group]) with one scale per token and group of `group` columns.

    Args:
        x: [..., K], fp32, fp16 or BF16, any strides; quantized as given.
        group: columns that share a scale; None for one scale per token (the channel recipe).
        scale: dtype of the scale, "fp32" or "ue8m0".
    Returns:
        q: [..., K], torch.float8_e4m3fn, contiguous.
        scale: [..., ceil(K / group)] (or [..., 1]), float32 or float8_e8m0fnu.
    Raises, Numerics: as `quantize_fp8_block`; a token's bits do not depend on the other tokens.
    Source: DeepSeek-V3 section 3.3.
    Example:
        >>> q, s = quantize_fp8_tokens(torch.randn(5, 300))
        >>> s.shape
        torch.Size([5, 3])
    """
    _check("x", x, 1)
    if group is not None and group < 1:
        raise ValueError(f"group: expected at least 1 or None, got {group}; the usual group is 128")
    _check_scale(scale, ("fp32", "ue8m0"))
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    q, s = _quantize(rows, 1, group, scale, torch.float32)
    return q.view(x.shape), s.view(*x.shape[:-1], s.shape[-1])


@torch.no_grad()
def dequantize_fp8(
    q: torch.Tensor, scale: torch.Tensor, *, block: Block | None = None, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """x'[i, j] = q[i, j] * scale[i // block[0], j // block[1]], the inverse of the three functions above.

    Args:
        q: [..., N, K] (or [K] with `scale` [ceil(K / group)]), torch.float8_e4m3fn.
        scale: [..., ceil(N / block[0]), ceil(K / block[1])], float32, bfloat16 or float8_e8m0fnu.
        block: rows and columns that share a scale, (1, None) for whole rows. None finds it from the shapes among whole
            rows, 1x128 and 128x128, which never contradict each other; any other block must be named.
        dtype: of the result.
    Returns: [..., N, K] in `dtype`.
    Raises:
        TypeError: `q` is not e4m3fn. ValueError: the scale's shape belongs to no block, or not to the named one.
    Numerics: one fp32 product, then one rounding to `dtype`. It may overflow where |x| was within 1/16 of the largest
        number of `dtype`.
    Example:
        >>> q, s = quantize_fp8_channel(torch.ones(4, 8))
        >>> dequantize_fp8(q, s).unique()
        tensor([1.], dtype=torch.bfloat16)
    """
    if q.dtype != torch.float8_e4m3fn:
        raise TypeError(f"q: expected torch.float8_e4m3fn, got {q.dtype}; view raw bytes as torch.float8_e4m3fn first")
    if q.dim() == 1 and scale.dim() == 1:
        return dequantize_fp8(q[None], scale[None], block=block, dtype=dtype)[0]
    if q.dim() < 2:
        raise ValueError(f"q: expected a matrix, or one row with a scale of one dimension, got shape {list(q.shape)}")
    *lead, n, k = q.shape
    candidates: list[Block] = [block] if block is not None else [(1, None), (1, 128), (128, 128)]
    shapes = [(*lead, *_grid(n, k, bn, bk)) for bn, bk in candidates]
    if tuple(scale.shape) not in shapes:
        expected = " or ".join(f"{list(s)} for {bn}x{bk or k}" for s, (bn, bk) in zip(shapes, candidates, strict=True))
        raise ValueError(
            f"scale: expected shape {expected} with q of shape {list(q.shape)}, got {list(scale.shape)};"
            " name any other block as block=(rows, columns)"
        )
    bn, bk = candidates[shapes.index(tuple(scale.shape))]
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    stored = scale.dtype in [dtype for dtype, _, _ in SCALES.values()]
    in_machine_code = stored and _has_machine_code(bk, q, scale)
    rows = _dequantize_rows_in_machine_code if in_machine_code else _dequantize_rows
    _each(lambda x, s, y: rows(x, s, y, bn, bk), _row_tiles(bn, q, scale, out), in_machine_code)
    return out


def roundtrip_fp8_tokens(x: torch.Tensor, *, group: int | None = 128, scale: str = "fp32") -> torch.Tensor:
    """x' = q * scale with q and scale of `quantize_fp8_tokens`: what an FP8 GEMM saw of x.

    Args: as `quantize_fp8_tokens`.
    Returns: [..., K] in the dtype of x.
    Raises, Numerics: as `quantize_fp8_tokens` and `dequantize_fp8`, which it joins.
    Example:
        >>> roundtrip_fp8_tokens(torch.tensor([448.0, 101.0]))
        tensor([448., 104.])
    """
    return dequantize_fp8(*quantize_fp8_tokens(x, group=group, scale=scale), block=(1, group), dtype=x.dtype)


def _quantize(
    x: torch.Tensor,
    bn: int,
    bk: int | None,
    kind: str,
    through: torch.dtype,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    experts: Iterable[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `x` [..., N, K] for blocks of bn x bk (None: the whole row), rounded to `through` first.

    Into `out`, where it is given, and then of some `experts` alone.
    """
    dtype, carrier, _ = SCALES[kind]
    if out is None:
        *lead, n, k = x.shape
        q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(*lead, *_grid(n, k, bn, bk), dtype=carrier, device=x.device)
    else:
        q, scale = out[0], out[1].view(carrier)
    parts = [(x, scale, q)] if experts is None else [(x[e], scale[e], q[e]) for e in experts]
    in_machine_code = _has_machine_code(bk, x)
    rows = _quantize_rows_in_machine_code if in_machine_code else _quantize_rows
    tiles = chain.from_iterable(_row_tiles(bn, *part) for part in parts)
    _each(lambda x, s, q: rows(x, s, q, bn, bk, kind, through), tiles, in_machine_code)
    return q, scale.view(dtype)


def _quantize_rows(
    x: torch.Tensor,
    scale: torch.Tensor,
    q: torch.Tensor,
    bn: int,
    bk: int | None,
    kind: str,
    through: torch.dtype,
) -> None:
    """The rule of the module docstring, for whole blocks of rows of a matrix."""
    blocks = _as_blocks(x.to(through).float(), scale, bn, bk)
    s = _scale_of(blocks.abs().amax(dim=3).amax(dim=1), kind)
    shift = SCALES[kind][2]
    scale.copy_(s.view(torch.int32) >> shift)  # exact, NaN included; torch casts NaN to BF16 as 0x7fc0 or 0xffff
    s = s[:, None, :, None]
    q.copy_(_from_blocks(blocks / s, q))
    if s.isnan().any():  # a GPU waits here; a CPU division keeps the sign of a NaN, so the code is set by hand
        q.view(torch.uint8).masked_fill_(_from_blocks(s.isnan().expand(blocks.shape), q), 0x7F)


def _quantize_rows_in_machine_code(
    x: torch.Tensor,
    scale: torch.Tensor,
    q: torch.Tensor,
    bn: int,
    bk: int | None,
    kind: str,
    through: torch.dtype,
) -> None:
    from ornith_moe.quant.codecs.fp8_slabs import encode_fp8  # not at import: numba takes most of a second

    rows, weights = _as_array(x.contiguous()), through == torch.bfloat16
    _, bits = encode_fp8(rows, (bn, bk), scale=kind, bf16_first=weights, out=_as_array(q))
    _as_array(scale.view(SCALES[kind][0]))[...] = bits


def _dequantize_rows(q: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, bn: int, bk: int | None) -> None:
    """codes * scale, for whole blocks of rows of a matrix."""
    blocks = _as_blocks(q.float(), scale, bn, bk)
    out.copy_(_from_blocks(blocks * scale.float()[:, None, :, None], out))


def _dequantize_rows_in_machine_code(
    q: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, bn: int, bk: int | None
) -> None:
    from ornith_moe.quant.codecs.fp8_slabs import decode_fp8

    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    decoded = out if out.dtype in names else torch.empty_like(out, dtype=torch.float32)
    decode_fp8(_as_array(q), _as_array(scale), (bn, bk), dtype=names[decoded.dtype], out=_as_array(decoded))
    if decoded is not out:
        out.copy_(decoded)


def _has_machine_code(bk: int | None, *tensors: torch.Tensor) -> bool:
    """Whether the memory of all is there to be read: not on a GPU or behind a subclass."""
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_cpu and t.numel() > 0 for t in tensors)
    return plain and (bk is None or bk % 16 == 0)


def _as_array(t: torch.Tensor) -> np.ndarray:
    """The memory of a tensor as numpy sees it, BF16 and FP8 as their bits.

    Not by `numpy()`: torch never again resizes a storage that was lent so, and FSDP frees its parameters by resizing.
    """
    strides = tuple(stride * t.itemsize for stride in t.stride())
    interface = {"data": (t.data_ptr(), False), "shape": tuple(t.shape), "strides": strides, "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface | {"typestr": _TYPES[t.dtype]}, memory_of=t))


def _each(
    work: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None], tiles: Iterable[_Tile], in_machine_code: bool
) -> None:
    """work(*tile) for every tile, on torch's number of threads where torch itself does not share the work out."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_each)(work, tiles, in_machine_code)
    tiles = list(tiles)
    threads = min(torch.get_num_threads(), len(tiles)) if in_machine_code else 1
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, *zip(*tiles, strict=True)))
    else:
        for tile in tiles:
            work(*tile)


def _scale_of(amax: torch.Tensor, kind: str) -> torch.Tensor:
    """The scale that goes with `amax`, already rounded to the dtype that `kind` names, as fp32."""
    # A tensor divisor: torch's CUDA division by a Python number multiplies by the reciprocal instead.
    s = (amax / torch.full_like(amax, E4M3_MAX)).clamp_min(MIN_SCALE)
    if kind == "bf16":
        s = s.bfloat16().float()
    elif kind == "ue8m0":  # up to the next power of two: carry any mantissa bit into the exponent
        s = ((s.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    s = torch.where(amax == 0, 1.0, s)
    return torch.where(amax.isfinite(), s, torch.nan)


def _grid(n: int, k: int, bn: int, bk: int | None) -> tuple[int, int]:
    """Rows and columns of the scale of an n x k matrix."""
    return -(-n // bn), 1 if bk is None else -(-k // bk)


def _row_tiles(bn: int, x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> Iterator[_Tile]:
    """Matching row ranges of x [..., N, K], scale [..., ceil(N / bn), .] and out [..., N, K], as matrices."""
    n, k = x.shape[-2:]
    tile = max(1, _TILE_ELEMENTS // (bn * max(k, 1)) if x.device.type == "cpu" else _grid(n, k, bn, None)[0])
    flat = (t.flatten(0, -3) if t.dim() > 2 else t[None] for t in (x, scale, out))
    for x_m, s_m, out_m in zip(*flat, strict=True):
        for i in range(0, s_m.shape[0], tile):
            rows = slice(i * bn, (i + tile) * bn)
            yield x_m[rows], s_m[i : i + tile], out_m[rows]


def _as_blocks(tile: torch.Tensor, s: torch.Tensor, bn: int, bk: int | None) -> torch.Tensor:
    """fp32 [rows, K] to [block rows, bn, block columns, bk], padded with zeros where the last blocks are partial."""
    rows, k = tile.shape
    bk = bk or max(k, 1)
    pad = (0, s.shape[1] * bk - k, 0, s.shape[0] * bn - rows)
    tile = torch.nn.functional.pad(tile, pad) if any(pad) else tile
    return tile.view(s.shape[0], bn, s.shape[1], bk)


def _from_blocks(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Inverse of `_as_blocks`, cut to the rows and columns of `like`."""
    gn, bn, gk, bk = blocks.shape
    return blocks.reshape(gn * bn, gk * bk)[: like.shape[0], : like.shape[1]]


def _check(name: str, x: object, dims: int) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a tensor of float32, float16 or bfloat16, got {got}; convert it first")
    if x.dim() < dims:
        raise ValueError(f"{name}: expected at least {dims} dimension(s), got shape {list(x.shape)}; add one")


def _check_scale(scale: str, allowed: tuple[str, ...]) -> None:
    if scale not in allowed:
        raise ValueError(f"scale: expected one of {', '.join(allowed)}, got {brief(scale)}")
