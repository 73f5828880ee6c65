"""Which weights of a checkpoint hold a NaN or an infinity: one reading of it before anything is planned.

A conversion meets such a weight when files, headers and skip lists are long decided. So leave to keep it unquantized
costs a reading of its own, in slabs and on a few threads like the conversion itself.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor

from ornith_moe.quant.conversion.pipeline import Progress
from ornith_moe.quant.conversion.stream import Unit, read_unit, units
from ornith_moe.quant.source.weights import Source, weight_matrix


def non_finite_weights(
    source: Source, *, slab_bytes: int, jobs: int = 1, progress: Progress | None = None
) -> dict[int, str]:
    """{index into source.weights: where its first NaN or infinity is}, in the order of `source.weights`.

    Args:
        slab_bytes: of source read at a time by each of `jobs` threads. progress: called with phase "scan" and bytes.
    """
    work = units(source, slab_bytes)
    sizes = [unit.rows * weight_matrix(source.weights[unit.weight])[1] for unit in work]
    found: dict[int, tuple[int, str]] = {}
    done = 0

    def look(unit: Unit) -> tuple[int, int, float] | None:
        return read_unit(source, unit).first_non_finite()

    with ThreadPoolExecutor(jobs) as pool:
        pending: deque = deque()
        for number, unit in enumerate(work):
            pending.append((number, pool.submit(look, unit)))
            while pending and (len(pending) >= 2 * jobs or number + 1 == len(work)):
                index, future = pending.popleft()
                place, unit_done = future.result(), work[index]
                done += sizes[index]
                if progress:
                    progress("scan", done, sum(sizes))
                if place:
                    row, column, value = unit_done.start + place[0], place[1], place[2]
                    sentence = f"row {row}, column {column} is {value}"
                    found[unit_done.weight] = min(found.get(unit_done.weight, (row, sentence)), (row, sentence))
    return {index: found[index][1] for index in sorted(found)}
