"""Every kernel of a layer at the shapes of our models: what it compiles to on each target, and what it is modelled at.

    rows, layers = catalog(["sm90"])        the tables of `ornith-moe kernels`

The launches are recorded from `route_forward`, `moe_forward`, `moe_backward`, the casts of the weights and the GGUF
encoders, with meta tensors: nobody keeps a list of them. Launches that specialize alike are compiled once, whatever
asks for them. The encoders' searches are bound by instructions in loops that the model does not count, so they have no
modelled time.

A row is one kernel of one pass: if the pass starts it several times (strips of the down projection), bytes and time are
those of all its launches. Two passes that differ in nothing for a kernel share its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ornith_moe.kernels import fp8_cast, gguf_encode, moe, routing
from ornith_moe.kernels.examine.compile import PROCESSORS, Report, compile_requests, specialize
from ornith_moe.kernels.examine.model import DEVICES, Estimate, Shape, bound_us, estimate, routing_counts, total
from ornith_moe.kernels.launch import Launch, recording
from ornith_moe.kernels.tiles import Tiles
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import RECIPES, ROW, Cast, Recipe

SHAPES = {
    "35B": Shape("Qwen3.5 35B", experts=256, top_k=8, hidden=2048, inner=512),
    "397B": Shape("Qwen3.5 397B", experts=512, top_k=10, hidden=4096, inner=1024),
}
ARCHS = tuple(PROCESSORS)


@dataclass(frozen=True)
class Pass:
    """One direction of one layer ("forward", "backward") or the casts of its weights ("weights") by a recipe, or the
    encoding of its gate_up ("encode") as a GGUF type."""

    model: str
    tokens: int
    direction: str
    recipe: Recipe | None = None
    gguf_type: str | None = None

    @property
    def name(self) -> str:
        """Of the recipe or type."""
        return self.recipe.name if self.recipe else self.gguf_type or ""

    @property
    def shape(self) -> str:
        s = SHAPES[self.model]
        tokens = f"T={self.tokens} " if self.tokens else ""
        return f"{s.name}: {tokens}E={s.experts} top_k={s.top_k} H={s.hidden} I={s.inner}"


def passes() -> list[Pass]:
    """What `ornith-moe kernels` shows: all recipes at 8192 tokens, and the sizes that take other tiles."""
    found = [Pass("35B", 0, "weights", RECIPES[name]) for name in ("fp8_full", "fp8_channel")]
    found += [Pass("35B", 0, "encode", gguf_type=name) for name in gguf_encode.ENCODED]
    for model, tokens, recipes in (
        ("35B", 8192, ("fp8", "bf16", "fp8_full", "fp8_channel")),
        ("35B", 64, ("fp8", "bf16")),
        ("35B", 32768, ("fp8", "bf16")),
        ("397B", 8192, ("fp8", "bf16")),
    ):
        found += [Pass(model, tokens, way, RECIPES[name]) for name in recipes for way in ("forward", "backward")]
    return found


def record(arch: str, which: Pass, tiles: Tiles | None = None) -> list[Launch]:
    """The launches of a pass, in order; of its products with `tiles` instead of those of the table."""
    shape, recipe = SHAPES[which.model], which.recipe
    with recording(arch) as launches:
        if recipe is None:
            _record_encode(shape, which.name)
        elif which.direction == "weights":
            _record_weights(shape, recipe)
        else:
            _record_layer(which, recipe, tiles, launches)
    return launches


def _record_weights(s: Shape, recipe: Recipe) -> None:
    for n, k in ((2 * s.inner, s.hidden), (s.hidden, s.inner)):
        weight = torch.empty(s.experts, n, k, dtype=torch.bfloat16, device="meta")
        if recipe.weights is None or recipe.weights == ROW:
            _kept(weight, ROW, fp8_cast.quantize_fp8_channel(weight))
        else:
            _kept(weight, recipe.weights, fp8_cast.quantize_fp8_block(weight))
            _kept(weight, recipe.weights, fp8_cast.quantize_fp8_block_both(weight))


def _record_encode(s: Shape, gguf_type: str) -> None:
    rows = torch.empty(s.experts * 2 * s.inner, s.hidden, dtype=torch.bfloat16, device="meta")
    gguf_encode.encode(rows, gguf_type)
    if gguf_type != "Q8_0":  # which knows no importance
        gguf_encode.encode(rows, gguf_type, torch.empty(s.experts, s.hidden, device="meta"))


def _record_layer(which: Pass, recipe: Recipe, tiles: Tiles | None, launches: list[Launch]) -> None:
    s = SHAPES[which.model]

    def experts(n: int, k: int) -> Operand:
        if recipe.weights is None:
            return Operand(torch.empty(s.experts, n, k, dtype=torch.bfloat16, device="meta"))
        rows, columns = recipe.weights
        value = torch.empty(s.experts, n, k, dtype=torch.float8_e4m3fn, device="meta")
        w = Operand(value, torch.empty(s.experts, -(-n // rows), -(-k // (columns or k)), device="meta"))
        return w.with_transposed() if recipe.input_gradient else w

    x = torch.empty(which.tokens, s.hidden, dtype=torch.bfloat16, device="meta")
    logits = torch.empty(which.tokens, s.experts, device="meta")
    indices, weights, *_ = routing.route_forward(logits, s.top_k)
    layer = experts(2 * s.inner, s.hidden), experts(s.hidden, s.inner)
    _, saved = moe.moe_forward(x, indices, weights, *layer, recipe=recipe, save=True, tiles=tiles)
    if which.direction == "backward":
        launches.clear()
        assert saved is not None
        _, dweights, *_ = moe.moe_backward(torch.empty_like(x), saved, *layer, recipe=recipe, tiles=tiles)
        assert dweights is not None
        routing.route_backward(logits, indices, weights, dweights)


def _kept(weight: torch.Tensor, block: Cast, copy: tuple[torch.Tensor, ...]) -> None:
    """The check of a copy that is kept; its model is that of a weight which has changed throughout."""
    experts = torch.empty(len(weight), dtype=torch.bool, device="meta")
    q, scale, *both = copy
    q_t, scale_t = both or (None, None)
    digests = fp8_cast.new_digests(weight, block)
    fp8_cast.quantize_fp8_experts(weight, q, scale, q_t, scale_t, experts, digests, block=block)


@dataclass(frozen=True)
class Row:
    """A kernel of a pass on one target: compiled and modelled."""

    arch: str
    which: Pass
    kernel: str
    launch: Launch
    report: Report
    estimate: Estimate


def compiled(
    pairs: Sequence[tuple[str, Pass]], progress: Callable[[str, int, int], None] | None = None, *, workers: int = 2
) -> dict[tuple[str, Pass], list[tuple[Launch, Report]]]:
    """The launches of each (arch, pass) with their reports."""
    recorded = {pair: record(*pair) for pair in pairs}
    requests = {pair: [specialize(pair[0], launch) for launch in launches] for pair, launches in recorded.items()}
    every = [request for found in requests.values() for request in found]
    reports = iter(compile_requests(every, workers=workers, progress=progress))
    return {pair: [(launch, next(reports)) for launch in launches] for pair, launches in recorded.items()}


@dataclass(frozen=True)
class Layer:
    """Forward and backward of a layer on one target, modelled, beside the least time that a forward can take."""

    arch: str
    which: Pass
    forward: Estimate
    backward: Estimate
    bound_us: float

    @property
    def flops(self) -> int:
        """Of forward and backward, without recomputation or padding."""
        s = SHAPES[self.which.model]
        return 18 * self.which.tokens * s.top_k * s.hidden * s.inner


def catalog(
    archs: Sequence[str], progress: Callable[[str, int, int], None] | None = None, *, workers: int = 2
) -> tuple[list[Row], list[Layer]]:
    """A row for each kernel of `passes()` on each target, and the sums of each layer; `workers` processes compile."""
    rows, layers, seen, forward = [], [], set(), {}
    pairs = [(arch, which) for arch in archs for which in passes()]
    for (arch, which), launches in compiled(pairs, progress, workers=workers).items():
        shape = SHAPES[which.model]
        estimates = estimate(arch, launches, routing_counts(shape, which.tokens))
        groups: dict[tuple[str, int], list[int]] = {}
        for i, (launch, report) in enumerate(launches):
            groups.setdefault((launch.label, id(report)), []).append(i)
        for (label, code), members in groups.items():
            sum_of = total([estimates[i] for i in members])
            key = arch, which.model, which.tokens, label, code, sum_of.bytes
            if key not in seen:
                seen.add(key)
                rows.append(Row(arch, which, label, *launches[members[0]], sum_of))
        layer = arch, which.model, which.tokens, which.name
        if which.direction == "forward":
            forward[layer] = total(estimates)
        elif which.direction == "backward":
            bound = bound_us(DEVICES[arch], shape, which.tokens, fp8=which.recipe is not None and which.recipe.is_fp8)
            layers.append(Layer(arch, which, forward[layer], total(estimates), bound))
    return rows, layers


def row_json(row: Row) -> dict[str, Any]:
    """A row of `ornith-moe kernels --json`."""
    report, e = row.report, row.estimate
    modelled = row.which.direction != "encode"
    return {
        "kernel": row.kernel,
        "shape": row.which.shape,
        "arch": row.arch,
        "device": DEVICES[row.arch].name,
        "recipe": row.which.name,
        "pass": row.which.direction,
        "registers": report.registers,
        "spills": report.spills,
        "shared_bytes": report.shared_bytes,
        "matrix_instructions": report.matrix_instructions,
        "tma": report.tma,
        "occupancy": report.occupancy,
        "hot_loop_instructions": report.loop.instructions if report.loop else None,
        "launches": e.launches,
        "modelled_us": e.us if modelled else None,
        "bound": e.bound if modelled else "instructions",
        "bytes": e.bytes,
        "share_of_limit": e.share_of_limit if modelled else None,
    }


def layer_json(layer: Layer) -> dict[str, Any]:
    """One of the `layers` of `ornith-moe kernels --json`: a whole forward and backward, router and plan included."""
    both = layer.forward.us + layer.backward.us
    return {
        "arch": layer.arch,
        "device": DEVICES[layer.arch].name,
        "shape": layer.which.shape,
        "recipe": layer.which.name,
        "modelled_forward_us": layer.forward.us,
        "modelled_backward_us": layer.backward.us,
        "optimistic_forward_us": layer.forward.optimistic_us,
        "bound_forward_us": layer.bound_us,
        "share_of_bound": layer.bound_us / layer.forward.us,
        "modelled_tflop_s": layer.flops / both / 1e6,
    }
