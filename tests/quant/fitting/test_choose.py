"""The integer program.

Reference: every combination of options, one by one. Not covered: how long it takes for a large model.
"""

import itertools
import math
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ornith_moe.quant.fitting.choose import Choice, choose

pytest.importorskip("scipy", reason="scipy, the extra `fit`, is not installed")
OPTION = st.builds(Choice, st.integers(1, 10**11), st.floats(0, 1, allow_subnormal=False))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5), st.floats(-0.1, 1.1))
@example([[Choice(32, 0.0)]], 0.0)
@example([[Choice(10, 1e-9), Choice(20, 1e-12)], [Choice(10, 1.0), Choice(11, 0.5)]], 0.95)
@example([[Choice(10**11, 1e-3), Choice(10**11 + 1, 1e-4)]] * 2, 0.5)
def test_no_combination_is_better(groups, share):
    least, most = (sum(f(option.nbytes for option in options) for options in groups) for f in (min, max))
    limit = math.floor(least + share * (most - least))
    fitting = [c for c in itertools.product(*groups) if sum(option.nbytes for option in c) <= limit]
    found = choose(groups, limit)
    if not fitting:
        assert found is None
        return
    best = min(sum(option.loss for option in c) for c in fitting)
    picked = [options[i] for options, i in zip(groups, found.options, strict=True)]
    assert found.nbytes == sum(option.nbytes for option in picked) <= limit
    assert found.loss == sum(option.loss for option in picked)
    assert found.loss == pytest.approx(best, rel=2e-6, abs=1e-12)
    assert found.bound <= best * (1 + 1e-6) + 1e-12


def test_nothing_is_printed(capfd):
    """HiGHS does, at C's level, on some programs."""
    groups = [[Choice(32 * (i % 7 + b), 2.0 ** -(b + i % 5)) for b in range(1, 9)] for i in range(40)]
    assert choose(groups, 32 * 40 * 7)
    os.write(1, b"")
    assert capfd.readouterr().out == ""
