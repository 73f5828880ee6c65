"""What a tensor may be stored as in a fit, by name: types of a GGUF, bits of MLX's groups, ModelOpt's algorithms."""

from __future__ import annotations

from ornith_moe.quant.gguf.mixtures import fit
from ornith_moe.quant.gguf.tensor_types import parse_type

MLX = {f"MLX{bits}": 64 for bits in (2, 3, 4, 5, 6, 8)}  # affine; columns that share a scale
MODELOPT = {"W4A16_NVFP4": 16, "FP8": 1}  # FP8 with one scale for a matrix
OTHERS = MLX | MODELOPT  # than those of a GGUF
GGUF = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
SETS = {"gguf": GGUF, "mlx": tuple(MLX), "nvfp4": tuple(MODELOPT)}  # by the builds that choose out of them
PLAIN = ("F32", "F16", "BF16")  # hold a tensor as it was


def parse_kind(name: str, where: str) -> str:
    """The type of `name`, in any case."""
    known = {kind.lower(): kind for kind in OTHERS}
    return known.get(name.strip().lower()) or parse_type(name, where)


def standing(kind: str, columns: int) -> str:
    """`kind`, or what stands for it in rows of so many columns that are not whole groups."""
    if kind in OTHERS:
        return kind if columns % OTHERS[kind] == 0 else "BF16"
    return fit(kind, columns)
