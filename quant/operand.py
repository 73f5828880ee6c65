"""A weight of all experts as a product reads it, from the public function down to the launch: value * scale.

    Operand(w)                             as it is
    Operand(q, scale)                      FP8, with a scale per block or per row (`ornith_moe.quant.fp8`)
    Operand(q, scale, value_t, scale_t)    the same, and transposed beside it, for a product that contracts the rows

N rows (output channels), K contraction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ornith_moe.quant import fp8
from ornith_moe.quant.recipes import Recipe


class Operand(NamedTuple):
    """One weight of all experts.

    value: [E, N, K], in the dtype of the activations, or in float8_e4m3fn.
    scale: [E, ceil(N / 128), ceil(K / 128)] or [E, N, 1], float32, bfloat16 or float8_e8m0fnu; None: value is
        the weight.
    value_t, scale_t: both transposed, [E, K, N], and contiguous, for a matrix unit that takes FP8 only with the
        contraction contiguous; None where no product asks for it.
    """

    value: torch.Tensor
    scale: torch.Tensor | None = None
    value_t: torch.Tensor | None = None
    scale_t: torch.Tensor | None = None

    @classmethod
    def quantized(cls, w: torch.Tensor, recipe: Recipe, scale: str = "fp32") -> Operand:
        """`w` as `recipe` stores weights; `scale` as in `Recipe.scale_of_weights`.

        Example:
            >>> from ornith_moe.quant.recipes import recipe_of
            >>> Operand.quantized(torch.ones(2, 256, 300), recipe_of("fp8")).scale.shape
            torch.Size([2, 2, 3])
        """
        if recipe.weights is None:
            return cls(w)
        kind, (rows, columns) = recipe.scale_of_weights(scale), recipe.weights
        if columns is None:
            return cls(*fp8.quantize_fp8_channel(w, scale=kind))
        return cls(*fp8.quantize_fp8_block(w, block=(rows, columns), scale=kind))

    @property
    def transposed(self) -> Operand:
        """[E, K, N]: the contiguous pair where there is one, else views."""
        if self.value_t is not None:
            return Operand(self.value_t, self.scale_t, self.value, self.scale)
        return Operand(self.value.mT, None if self.scale is None else self.scale.mT)

    def with_transposed(self) -> Operand:
        """The same with its transposed pair, which is made if it is not there: bytes that a GPU reads and writes."""
        if self.scale is None or self.value_t is not None:
            return self
        return Operand(self.value, self.scale, self.value.mT.contiguous(), self.scale.mT.contiguous())

    @property
    def per_row(self) -> bool:
        """Whether a row of the weight, or of what it is the transpose of, has one scale."""
        n, k = self.value.shape[1:]
        return self.scale is not None and tuple(self.scale.shape[1:]) in ((n, 1), (1, k))

    @property
    def is_ue8m0(self) -> bool:
        return self.scale is not None and self.scale.dtype == torch.float8_e8m0fnu

    @property
    def scale_of_activations(self) -> str:
        """What scales the activations beside this weight get: powers of two where its own are."""
        return "ue8m0" if self.is_ue8m0 else "fp32"

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[E, N, K]: the stored numbers in `dtype`; a weight without scale as it is."""
        return self.value if self.scale is None else fp8.dequantize_fp8(self.value, self.scale, dtype=dtype)
