"""The comparisons that benchmarks make too: `ornith_moe.bench.numeric`."""

from ornith_moe.bench.numeric import (  # noqa: F401
    TOLERANCE,
    assert_close,
    assert_same_bits,
    bits_at_the_edges_of_bf16,
    cosine_difference,
    relative_rms,
    sqnr_db,
)
