"""quant/conversion/pool.py: results in order, a bounded queue, and a failure that stops the rest.

Reference: the builtin map. Not covered: which thread does what.
"""

import time

import pytest

from ornith_moe.quant.conversion.pool import AHEAD, in_order


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_order(jobs, count):
    assert list(in_order(lambda n: n * n, range(count), jobs)) == [(n, n * n) for n in range(count)]


def test_no_more_is_taken_than_a_few_for_each_thread():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    for done, _ in in_order(lambda n: n, items(), 2):
        assert len(taken) <= done + 2 * AHEAD


def test_a_failure_stops_the_rest():
    began = []

    def work(number):
        began.append(number)
        if number == 0:
            raise ValueError("zero")
        time.sleep(0.2)

    with pytest.raises(ValueError, match="zero"):
        next(in_order(work, range(100), 2))
    assert len(began) <= 2 * AHEAD
