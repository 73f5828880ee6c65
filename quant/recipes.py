"""Recipes: which operands of a product of experts are FP8, and over what their scales reach.

    x, a' (activations)   weights   |   dy, dpre (the input of the gradient of x)

One row per recipe; kernels, CPU experts, reference and adapters ask the row, and nothing compares its name. A cast is
the block of values that shares a scale, in the words of `quant.fp8`: (rows, columns), None for all columns.

| recipe | weights | activations | input gradient |
|---|---|---|---|
| bf16 | as they are | as they are | as it is |
| fp8 | 128 x 128 | 1 x 128 | as it is |
| fp8_full | 128 x 128 | 1 x 128 | 1 x 128 |
| fp8_channel | a row | a token | as it is |

What is not cast is computed in the dtype of x, backward too, on the dequantized operands of the forward pass. Source:
DeepSeek-V3 (block scales), compressed-tensors (a scale per row and token, as official Ornith FP8 builds are served).
"""

from __future__ import annotations

from dataclasses import dataclass

from ornith_moe.quant.errors import brief

FP8_BLOCK = 128  # values that share a scale along the contraction, and rows of a weight's block

Cast = tuple[int, int | None]
BLOCK = (FP8_BLOCK, FP8_BLOCK)
GROUP: Cast = (1, FP8_BLOCK)
ROW: Cast = (1, None)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One row of the table; None: that operand is not cast."""

    name: str
    weights: Cast | None = None
    activations: Cast | None = None
    input_gradient: Cast | None = None

    @property
    def is_fp8(self) -> bool:
        return self.weights is not None

    @property
    def group(self) -> int | None:
        """Values of an activation that share a scale; None: the whole row."""
        return self.activations[1] if self.activations else None

    def scale_of_weights(self, scale: str) -> str:
        """Dtype of the scales that weights get: of blocks the one asked for, of rows BF16, as in their files."""
        return "bf16" if self.weights == ROW else scale

    def takes(self, inner: int) -> bool:
        """Whether no block holds rows of gate and of up, with an expert intermediate size of `inner`."""
        return self.weights is None or inner % self.weights[0] == 0

    def check(self, inner: int) -> None:
        """Refuse an expert intermediate size that the recipe does not take.

        Raises:
            ValueError: weights are cast in blocks of rows, and `inner` is no multiple of their height.
        """
        if self.weights and not self.takes(inner):
            raise ValueError(
                f"recipe: {brief(self.name)} needs an expert intermediate size in multiples of {self.weights[0]}, or a "
                f"block would hold rows of gate and of up, got I = {inner}; use recipe='fp8_channel' or 'bf16'"
            )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("bf16"),
        Recipe("fp8", BLOCK, GROUP),
        Recipe("fp8_full", BLOCK, GROUP, GROUP),
        Recipe("fp8_channel", ROW, ROW),
    )
}


def recipe_of(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: there is none.
    Example:
        >>> recipe_of("fp8").weights
        (128, 128)
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {brief(name)}")
    return RECIPES[name]
