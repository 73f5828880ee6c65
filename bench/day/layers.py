"""Parts b and f: a whole layer of experts beside everything that one would use instead, on the same inputs.

Each group is one model, number of tokens, recipe and direction. Whoever takes part is checked first against the truth
of `bench.cases`, a loop over experts in FP32, and then they take turns between two events, L2 overwritten before each.
`graph` is our forward replayed from a CUDA graph: what the kernels take when no launch waits for Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import ornith_moe as om
from ornith_moe.bench.cases import Case, allowed_error, make_case, outputs_of, true_outputs, worst
from ornith_moe.bench.day.machine import Machine
from ornith_moe.bench.day.parts import Journal, Task, sentence
from ornith_moe.bench.limits import FP8
from ornith_moe.bench.peers import Unable, moe_peers
from ornith_moe.bench.rows import Row
from ornith_moe.bench.timing import Call, peak_bytes
from ornith_moe.fp8_weights import unchanged

DIRECTIONS = ("forward", "forward+backward")


def tasks(machine: Machine, journal: Journal, *, large: bool = False) -> Iterator[Task]:
    sizes = machine.sizes
    model = sizes.large if large else sizes.layer
    for tokens in sizes.large_tokens if large else sizes.tokens:
        for recipe in sizes.large_recipes if large else sizes.layer_recipes:
            for direction in DIRECTIONS:
                told = {"model": model, "tokens": tokens, "routing": "uniform", "dtype": "bf16", "recipe": recipe}
                told["pass"] = direction
                group = f"{model} {recipe}, T = {tokens}, {direction}"
                yield Task(group, "ours", partial(_group, machine, journal, group, told), told)


def _group(machine: Machine, journal: Journal, group: str, told: dict[str, Any]) -> Iterator[Row]:
    torch.manual_seed(0)
    shape, backward, recipe = machine.experts(told["model"]), told["pass"] != "forward", told["recipe"]
    case = make_case(shape, told["tokens"], told["routing"], torch.bfloat16, machine.device)
    with unchanged():  # copies in FP8 are made by the first call and not compared with their masters after it
        yield from _beside_one_another(machine, journal, group, told, case, backward, recipe)
    del case
    if not machine.dry:
        torch.cuda.empty_cache()


def _beside_one_another(
    machine: Machine, journal: Journal, group: str, told: dict[str, Any], case: Case, backward: bool, recipe: str
) -> Iterator[Row]:
    truth = true_outputs(case, backward)
    weight_bytes = 1 if recipe != "bf16" else 2
    amounts: dict[str, Any] = {"bytes": case.least_bytes(backward, weight_bytes), "flops": case.flops(backward)}
    steps: dict[str, Call] = {}
    errors: dict[str, float] = {}
    base: dict[str, Any] = {"case": told, "device": machine.device}
    for name, peer, make in _implementations(machine, case, backward, recipe):
        try:
            forward = make()
            outputs = outputs_of(forward, case, backward)
            errors[name] = worst(truth.errors(outputs), allowed_error(torch.bfloat16, recipe, peer))
            del outputs
            steps[name] = _captured(forward) if name == "graph" else partial(outputs_of, forward, case, backward)
        except Unable as why:
            yield Row("moe", group, name, peer, status=why.status, why=why.why, **base)
        except AssertionError as wrong:
            yield Row("moe", group, name, peer, status="red", why=str(wrong), **base)
        except Exception as error:  # a peer's own, or ours
            yield Row("moe", group, name, peer, status="red", why=sentence(error), **base)
            if not machine.answers():
                raise
    for name, times in machine.time(steps).items():
        peak = None if machine.dry or name == "graph" else peak_bytes(steps[name], machine.device)
        note = ", ".join(f"{key} {value:g}" for key, value in machine.clock.state().items())
        found: dict[str, Any] = {"median_s": 0.0, "error": errors[name], "peak_bytes": peak, "note": note}
        row = Row("moe", group, name, name not in ("ours", "graph"), **found, **base, **amounts)
        yield machine.timed(row, times, journal, torch.bfloat16 if recipe == "bf16" else FP8)


def _implementations(
    machine: Machine, case: Case, backward: bool, recipe: str
) -> Iterator[tuple[str, bool, Callable[[], Callable[[], torch.Tensor]]]]:
    """(name, whether a peer, what gives its forward or raises Unable)."""

    def ours() -> Callable[[], torch.Tensor]:
        backend = "triton"
        return lambda: om.moe_mlp(*case[:5], recipe=recipe, backend=backend)

    yield "ours", False, ours
    if not backward and not machine.dry:
        yield "graph", False, ours
    for peer in moe_peers(recipe):

        def theirs(peer: Any = peer) -> Callable[[], torch.Tensor]:
            peer.check(case, backward)
            return peer.forward(case)

        yield peer.name, True, theirs


def _captured(forward: Callable[[], torch.Tensor]) -> Call:
    """A replay of `forward`, which has been called before, and in a stream of its own as capture asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        forward()
    return graph.replay
