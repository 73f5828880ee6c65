"""`ornith-moe plan`: what each build will be, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ornith_moe.command.coverage import print_coverage
from ornith_moe.command.options import (
    EmbeddingType,
    ImatrixOption,
    Json,
    KvCache,
    KvCacheOption,
    Lora,
    MaxShard,
    MtpFrom,
    MtpOption,
    Name,
    Nvfp4Head,
    Nvfp4Rest,
    OutputType,
    RecipeFile,
    Rest,
    SensitivityFile,
    SplitSize,
    SplitTensors,
    TensorType,
    ToOrFor,
    asked_of_gguf,
    asked_of_nvfp4,
    parse_size,
    sensitivity_of,
    split_of,
)
from ornith_moe.command.terminal import out, print_json, progress_bar, say
from ornith_moe.quant.fallbacks import by_kind

if TYPE_CHECKING:
    from ornith_moe.quant.builds.build import Alternative
    from ornith_moe.quant.builds.plan import BuildPlan
    from ornith_moe.quant.builds.serving import Serving
    from ornith_moe.quant.source.source import Source


def plan(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Checkpoint folder, config .json, preset or hf://org/name.")
    ],
    to: ToOrFor = None,
    mtp: MtpOption = None,
    mtp_from: MtpFrom = None,
    lora: Lora = None,
    name: Name = None,
    max_shard_size: MaxShard = None,
    split_max_size: SplitSize = None,
    split_max_tensors: SplitTensors = None,
    imatrix: ImatrixOption = None,
    sensitivity: SensitivityFile = None,
    tensor_type: TensorType = None,
    recipe: RecipeFile = None,
    token_embedding_type: EmbeddingType = None,
    output_tensor_type: OutputType = None,
    nvfp4_head: Nvfp4Head = False,
    nvfp4_rest: Nvfp4Rest = Rest.bf16,
    kv_cache: KvCacheOption = KvCache.bf16,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            "--ctx",
            min=1,
            max=1 << 31,
            metavar="TOKENS",
            help="Of the sequence to serve; default the model's.",
        ),
    ] = None,
    card: Annotated[
        int | None,
        typer.Option("--for", metavar="SIZE", parser=parse_size, help="Find GGUFs for a card of this memory, as 24GB."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="OUT.html", help="Draw predicted KL against size here too, and as a PNG beside it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Exact tensors and bytes of each build, from headers or a config alone, before anything is written."""
    from dataclasses import replace

    from ornith_moe.quant.builds.build import Options, find_build, refuse_unheard
    from ornith_moe.quant.builds.gguf_fit import builds_within
    from ornith_moe.quant.builds.plan import plan_json
    from ornith_moe.quant.builds.planning import plan_build
    from ornith_moe.quant.builds.serving import room, serving
    from ornith_moe.quant.errors import PlanError
    from ornith_moe.quant.opening import open_any

    if not to and card is None:
        raise typer.BadParameter("name a build with --to, or the memory of a card with --for")
    to = to or []
    nvfp4 = asked_of_nvfp4(to, nvfp4_head, nvfp4_rest)
    measured = sensitivity_of(sensitivity)
    cut = Options(
        max_shard_bytes=max_shard_size,
        split=split_of(split_max_size, split_max_tensors),
        kv_cache=kv_cache.value,
        sensitivity=measured,
    )
    if card is None:
        refuse_unheard(to, cut)
    opened = open_any(source, mtp=mtp, name=name, config_only=True, mtp_from=mtp_from, lora=lora)
    asked, importance = asked_of_gguf(imatrix, tensor_type, recipe, token_embedding_type, output_tensor_type)
    left = room(opened, card, context) if card is not None else None
    if left:
        to = [*to, *builds_within(opened, left.weights_bytes, replace(cut, imatrix=importance))]
    plans: list[BuildPlan] = []
    failed: dict[str, PlanError] = {}
    for build in [find_build(each).name for each in to]:
        try:
            found = plan_build(
                opened,
                build,
                asked=asked,
                imatrix=importance,
                nvfp4=nvfp4,
                kv_cache=kv_cache.value,
                sensitivity=measured,
            )
            plans.append(found)
        except PlanError as error:
            failed[build] = error
    files = [plan.build.files(plan, cut) for plan in plans]
    needed = [serving(opened, plan, context) for plan in plans]
    options = replace(cut, asked=asked, imatrix=importance)
    with progress_bar(counted=True) as progress:
        others = [find_build(plan.name).alternatives(opened, plan, options, progress) for plan in plans]
    if report:
        _draw(report, opened.name, plans, others)
    if as_json:
        builds = [plan_json(*each) for each in zip(plans, files, needed, others, strict=True)]
        reasons = {build: str(error) for build, error in failed.items()}
        print_json({"builds": builds, "failed": reasons, "notes": list(opened.notes), "room": left and left.json()})
    elif plans:
        print_plans(opened, plans, files, needed)
        if left:
            say(f"- {left}")
        for each in filter(None, others):
            print_alternatives(each)
    for first in failed.values():
        raise first


def _draw(path: Path, source: str, plans: Sequence[BuildPlan], others: Sequence[Sequence[Alternative]]) -> None:
    from ornith_moe.quant.errors import PlanError

    curves = [list(each) for each in others if each]
    if not curves:
        raise PlanError("plan: --report draws builds that are fitted to a size; ask for one, as --to gguf:fit=16GB")
    try:
        from ornith_moe.bench.curve import write
    except ImportError as error:
        raise PlanError(f"plan: --report needs {error.name}; pip install 'ornith-moe[bench]'") from None
    write(path, source, curves, {plan.name for plan in plans})


def print_alternatives(alternatives: Sequence[Alternative]) -> None:
    """What else could be asked for, by size."""
    table = Table("build", "bytes", "predicted KL")
    for each in alternatives:
        table.add_row(each.build, f"{each.nbytes:,}", f"{each.kl:.5f}")
    out.print(table)


def print_plans(
    opened: Source, plans: Sequence[BuildPlan], files: Sequence[int], needed: Sequence[Serving | None]
) -> None:
    """A table of the builds planned of `opened`, with `files` and memory each, and what a user should know of them."""
    from ornith_moe.quant.builds.plan import iterate_dtypes

    table = Table()
    for column in ("build", "tensors", "bytes", "files", "bits/weight", "GiB to serve", "max TP"):
        table.add_column(column, no_wrap=True, justify="left" if column == "build" else "right")
    table.add_column("stored as")
    sizes_of = [math.prod(weight.shape) for weight in opened.weights]
    for plan, count, memory in zip(plans, files, needed, strict=True):
        kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, _, size in iterate_dtypes(plan))
        bits = f"{8 * plan.tensor_bytes / sum(sizes_of[index] for index in {step.weight for step in plan.steps}):.2f}"
        ranks = str(plan.max_tensor_parallel or "-")
        gib = f"{memory.gib:.2f}" if memory else "-"
        sizes = f"{len(plan.tensors):,}", f"{plan.tensor_bytes:,}", str(count)
        table.add_row(plan.name, *sizes, bits, gib, ranks, kinds)
    for warning in filter(None, (plan.warning for plan in plans)):
        say(warning)
    say(opened.name)
    out.print(table)
    print_coverage(plan.coverage for plan in plans)
    told = [note for plan in plans for note in [*plan.notes, *by_kind(plan.fallbacks)]]
    told += list(map(str, filter(None, needed)))
    for note in dict.fromkeys([*opened.notes, *told]):
        say(f"- {note}")
