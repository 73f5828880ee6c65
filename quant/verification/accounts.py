"""Every tensor of a source is in a build, or left out of it for a reason.

values in the build + values left out for a reason = values of the folder's tensors
"""

from __future__ import annotations

from collections import Counter

from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.source.accounts import LeftOut
from ornith_moe.quant.source.source import Source, weight_matrix


def account(source: Source, plan: BuildPlan) -> tuple[list[LeftOut], list[str]]:
    """What `plan` leaves out of `source` for a reason, and the tensors that it loses without one.

    Args:
        source: an opened checkpoint. plan: of one build of it.
    """
    values: Counter[str] = Counter()
    for step in plan.steps:
        rows, columns = weight_matrix(source.weights[step.weight])
        taken = rows if step.transform.rows is None else len(step.transform.rows.source_index(rows))
        values[source.tensor_of(step.weight)] += taken * columns
    left_out = [*source.left_out, *plan.build.left_out(source)]
    known = {name for entry in left_out if entry.what == "tensor" for name in entry.names}
    lost = [name for name, size in source.tensor_sizes().items() if name not in known and values[name] != size]
    return left_out, lost
