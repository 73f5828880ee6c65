"""The journal of a conversion: what it holds in memory, and what it gives back from its lines.

Reference: what was recorded. Crashes, damage and other versions of it are in test_convert.py.
"""

import gc
import tracemalloc

from ornith_moe.quant.conversion.journal import Head, Journal

UNITS, EXTENTS = 2000, 10


def extents_of(unit, shift=0):
    return [(file, unit << 20, 1 << 20, f"{unit:016x}{file + shift:016x}") for file in range(EXTENTS)]


def test_units_take_little_memory_and_are_read_from_their_lines(tmp_path):
    """Measured: 94 bytes a unit; 2,192 where extents are kept, and the 397B in four builds has 190,000 units."""
    with Journal(tmp_path) as journal:
        gc.collect()
        tracemalloc.start()
        for unit in range(UNITS):
            journal.record(unit, extents_of(unit), [])
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held / UNITS < 300, held / UNITS
        journal.record(7, extents_of(7, shift=1), [(0, 1, 2)])
        assert journal.extents(7) == extents_of(7, shift=1) and journal.extents(8) == extents_of(8)
        journal.forget(9)
        journal.record(UNITS, extents_of(UNITS), [])  # after a line was read, still at the end


def test_the_last_line_of_a_unit_counts(tmp_path):
    """A unit that was mended has two: what the first says of it is not what is there."""
    with Journal(tmp_path) as journal:
        journal.begin(Head("x", {}, 1))
        journal.record(0, extents_of(0), [(0, 0, 5)])
        journal.record(1, extents_of(1), [])
        journal.record(0, extents_of(0, shift=3), [])
    with Journal(tmp_path) as again:
        assert sorted(again.written) == [0, 1] and not again.lost
        assert again.extents(0) == extents_of(0, shift=3) and again.extents(1) == extents_of(1)
