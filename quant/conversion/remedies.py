"""Why builds failed by their values, and what to ask for instead: one sentence per build, which works as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.conversion.journal import Failure
from ornith_moe.quant.source.weights import Source

NAMED = 3  # tensors that a pattern names one by one; of more it names the kinds


def why_failed(source: Source, plans: Sequence[BuildPlan], failures: Iterable[Failure]) -> dict[str, str]:
    """{build: what it cannot store, and an option with which it can be made} of the builds that failed."""
    by_build: dict[str, list[Failure]] = {}
    for failure in failures:
        by_build.setdefault(failure.build, []).append(failure)
    return {
        plan.build: _sentence(source, plan, sorted(by_build[plan.build], key=lambda f: (not f.final, f.weight)))
        for plan in plans
        if plan.build in by_build
    }


def _sentence(source: Source, plan: BuildPlan, failures: list[Failure]) -> str:
    first = f"{plan.build}: {failures[0].reason}"
    if failures[0].final:
        return first
    weights = {failure.weight for failure in failures}
    steps = [step for step in plan.steps if step.weight in weights]
    if not plan.is_gguf or not all(step.transform.exact for step in steps):
        return f"{first}; mend the checkpoint first"
    kind = "F32" if any(source.dtype(weight) == "F32" for weight in weights) else "BF16"
    names = list(dict.fromkeys(plan.tensors[step.tensors[0]].name for step in steps))
    return (
        f"{first}, {len(names)} of its tensors being so; make it alone, with --to {plan.build} --tensor-type "
        f"'{_pattern(names)}={kind}'"
    )


def _pattern(names: list[str]) -> str:
    """A regular expression for these tensors, or for all of their kinds where they are many."""
    if len(names) > NAMED:
        kinds = dict.fromkeys(re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight") for name in names)
        return rf"(^|\.)({'|'.join(map(re.escape, kinds))})\.weight$"
    return f"^({'|'.join(map(re.escape, names))})$" if len(names) > 1 else f"^{re.escape(names[0])}$"
