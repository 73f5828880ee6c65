"""Why builds failed by their values, and what to ask for instead: one sentence per build, which works as it stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ornith_moe.quant.builds.plan import BuildPlan
from ornith_moe.quant.conversion.journal import Failure
from ornith_moe.quant.source.source import Source


def why_failed(source: Source, plans: Sequence[BuildPlan], failures: Iterable[Failure]) -> dict[str, str]:
    """{build: what it cannot store, and an option with which it can be made} of the builds that failed."""
    by_build: dict[str, list[Failure]] = {}
    for failure in failures:
        by_build.setdefault(failure.build, []).append(failure)
    return {
        plan.name: _sentence(source, plan, sorted(by_build[plan.name], key=lambda f: (not f.final, f.weight)))
        for plan in plans
        if plan.name in by_build
    }


def _sentence(source: Source, plan: BuildPlan, failures: list[Failure]) -> str:
    first = f"{plan.name}: {failures[0].reason}"
    if failures[0].final:
        return first
    weights = {failure.weight for failure in failures}
    return plan.build.remedy(first, source, plan, [step for step in plan.steps if step.weight in weights])
