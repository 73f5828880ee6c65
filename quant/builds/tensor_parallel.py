"""Over how many ranks an engine can cut a build.

    rows of a part per rank = max(heads / ranks, 1) * size       whole blocks of 128 where a block has a scale

vLLM and SGLang concatenate q k v, gate up and the parts of in_proj_qkvz at load, and each rank gets its piece of every
part: a piece of half a block has no scale of its own. Heads of keys and values are replicated when there are fewer than
ranks; everything else must divide. Powers of two only, as machines are built. Source: vLLM's
`validate_fp8_block_shape` and `adjust_block_scale_shard` (quantization/utils/fp8_utils.py, layers/linear.py),
`Fp8MoEMethod.create_weights`, `QKVParallelLinear`, models/qwen3_next.py, mamba/gdn/qwen_gdn_linear_attn.py, gemma4.py.
"""

from __future__ import annotations

from collections.abc import Collection

from ornith_moe.quant.recipes import FP8_BLOCK
from ornith_moe.quant.source.architectures.weight import Cut, Weight
from ornith_moe.quant.source.source import Source

MOST_RANKS = 1 << 12


def max_tensor_parallel(
    source: Source, in_blocks: Collection[int] = (), in_groups: Collection[int] = (), group: int = 16
) -> int:
    """Largest power of two of ranks that `source`'s weights can be cut over.

    Args:
        in_blocks: indices of the weights that have one scale per 128 x 128 block.
        in_groups: of those that have one for every `group` columns of a row.
    """
    model = source.architecture
    cuts: set[tuple[Cut, int]] = set()  # and what the pieces of each must be a multiple of
    for index, weight in enumerate(source.weights):
        if weight.role != "vision" and not weight.expert and (cut := model.cut(weight)):
            columns = group if index in in_groups and cut.by_columns else 1
            cuts.add((cut, FP8_BLOCK if index in in_blocks else columns))

    def possible(ranks: int) -> bool:
        pieces = [(cut.per_rank(ranks), whole) for cut, whole in cuts]
        return all(sizes and not any(n % whole for n in sizes) for sizes, whole in pieces)

    ranks = 1
    while 2 * ranks <= (model.experts or MOST_RANKS) and possible(2 * ranks):
        ranks *= 2
    return ranks


def whole_blocks(source: Source, weight: Weight) -> bool:
    """Whether a matrix, and each part an engine takes of it, is whole 128 x 128 blocks."""
    cut = source.architecture.cut(weight)
    return not any(n % FP8_BLOCK for n in (*weight.shape, *((cut.per_rank(1) or ()) if cut else ())))
