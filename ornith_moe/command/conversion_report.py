"""How plans, conversions and the coverage of an importance matrix are printed, for people and as JSON."""

from __future__ import annotations

import math
import re
from dataclasses import asdict

from rich.table import Table

from ornith_moe.command.terminal import out, say, shown
from ornith_moe.quant.builds.plan import iterate_dtypes
from ornith_moe.quant.fallbacks import by_kind


def print_plans(opened, plans, files) -> None:
    """A table of the builds planned of `opened`, with `files` each, and what a user should know of them."""
    table = Table()
    for column in ("build", "tensors", "bytes", "files", "bits/weight", "max TP"):
        table.add_column(column, no_wrap=True, justify="left" if column == "build" else "right")
    table.add_column("stored as")
    weights = sum(math.prod(weight.shape) for weight in opened.weights)
    for plan, count in zip(plans, files, strict=True):
        kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, _, size in iterate_dtypes(plan))
        bits = f"{8 * plan.tensor_bytes / weights:.2f}"
        ranks = str(plan.max_tensor_parallel or "-")
        table.add_row(plan.build, f"{len(plan.tensors):,}", f"{plan.tensor_bytes:,}", str(count), bits, ranks, kinds)
    for warning in filter(None, (plan.warning for plan in plans)):
        say(warning)
    say(opened.name)
    out.print(table)
    print_coverage(plan.coverage for plan in plans)
    told = [note for plan in plans for note in [*plan.notes, *by_kind(plan.fallbacks)]]
    for note in dict.fromkeys([*opened.notes, *told]):
        say(f"- {note}")


def conversion_json(report, where: str, notes) -> dict:
    """A `ConversionReport` as `ornith-moe convert --json` prints it."""
    builds = [
        {
            "build": build.build,
            "path": str(build.path),
            "files": build.files,
            "tensors": build.tensors,
            "tensor_bytes": build.tensor_bytes,
            "seconds": build.seconds,
            "was_finished": build.was_finished,
            "fallbacks": build.fallbacks,
            "notes": build.notes,
            "underflow": dict(build.underflow),
            "imatrix": [asdict(found) for found in build.coverage],
        }
        for build in report.builds
    ]
    return {
        "builds": builds,
        "failed": dict(report.failed),
        "device": where,
        "bytes_read": report.bytes_read,
        "peak_rss_bytes": report.peak_rss_bytes,
        "resumed_units": report.resumed_units,
        "notes": list(notes),
    }


def print_conversion(report, opened) -> None:
    """A `ConversionReport` for people."""
    made = [build for build in report.builds if not build.was_finished]
    if not made:
        if report.builds:
            names = ", ".join(f"{build.build} in {build.path}" for build in report.builds)
            say(f"{opened.name}: nothing to do, finished before: {names}")
        return
    for build in made:
        if build.warning:
            say(build.warning)
    say(f"{opened.name}: read {report.bytes_read:,} bytes once")
    table = Table("build", "path", "tensors", "bytes")
    for build in report.builds:
        where = f"{build.path} (finished before)" if build.was_finished else build.path
        table.add_row(build.build, shown(where), f"{build.tensors:,}", f"{build.tensor_bytes:,}")
    out.print(table)
    print_coverage(build.coverage for build in made)
    told = [note for build in made for note in [*build.notes, *by_kind(build.fallbacks)] if note != build.warning]
    for note in dict.fromkeys([*opened.notes, *told]):  # what is said of the tokenizer is said of every GGUF
        say(f"- {note}")
    seconds = max(build.seconds for build in made)
    out.print(f"{seconds:.1f} s, {report.bytes_read / 1e6 / max(seconds, 1e-9):.0f} MB/s of source, "
              f"peak memory {report.peak_rss_bytes / 2**20:.0f} MiB")  # fmt: skip


def print_coverage(coverages) -> None:
    """What an importance matrix knows of each kind of tensor, and each tensor that it knows only in part."""
    tensors = {found.tensor: found for coverage in coverages for found in coverage}
    if not tensors:
        return
    kinds: dict[str, list] = {}
    for found in tensors.values():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", found.tensor, count=1), []).append(found)
    table = Table("importance of", "tensors", "experts reached", "tokens of an expert")
    for kind, members in kinds.items():
        reached, of = (sum(getattr(found, what) for found in members) for what in ("covered", "matrices"))
        least, most = min(found.least for found in members), max(found.most for found in members)
        experts = f"{reached:,} of {of:,}" if of > len(members) else "-"
        table.add_row(shown(kind), f"{len(members):,}", experts, f"{least:,} to {most:,}")
    out.print(table)
    for found in tensors.values():
        if found.covered < found.matrices:
            say(f"- {found.tensor}: {found.matrices - found.covered} of {found.matrices} experts were never reached "
                "and count all columns alike")  # fmt: skip
