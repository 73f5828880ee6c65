"""Part a: whether the kernels compute on this device what they compute everywhere else.

- casts, encoders, plan, routing: the bits that the interpreter gave (`bits.json`)
- forward and backward of every recipe: the recipe's reference in float64, by relative RMS and cosine difference
- the same bits again and again, in memory that is full of NaN before each launch

FP8 products cannot give the bits of the CPU: an H100 adds them in 14 bits before they are promoted. An emulation of its
accumulator predicts, for an expert of the 35B on normal data, the cosine difference, the SQNR against unquantized
operands and the share of BF16 outputs that differ in PREDICTED; the row of y tells what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ornith_moe.backend.reference import moe_mlp_reference
from ornith_moe.bench.cases import OUTPUTS, Case, make_case
from ornith_moe.bench.day import bits
from ornith_moe.bench.day.machine import Machine
from ornith_moe.bench.day.parts import Journal, Task
from ornith_moe.bench.numeric import TOLERANCE, cosine_difference, relative_rms, sqnr_db
from ornith_moe.bench.rows import Row
from ornith_moe.kernels.moe import moe_backward, moe_forward
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import RECIPES, Recipe

PREDICTED = "predicted: cosine difference 1.3e-4 to 1.7e-4, 24.1 to 24.3 dB, 82 % of BF16 outputs differ"
FP8_COSINE = 1e-3  # the tests' limit, six times the prediction
FP8_SQNR_DB = 22.0  # likewise: below it something but the casts is wrong
QUICK = ("block, fp32, of bfloat16", "tokens, fp32, of bfloat16", "Q8_0")  # what a dry run takes of casts and encoders

Layer = Callable[[], tuple[torch.Tensor, ...]]


def tasks(machine: Machine, journal: Journal) -> Iterator[Task]:
    known = bits.recorded()
    for suite, name, run in bits.cases():
        if machine.dry and suite in ("casts", "encoders") and name not in QUICK:
            continue
        expected = known.get(f"{suite}: {name}")
        yield Task(suite, name, partial(_bits, machine, journal, suite, name, run, expected))
    for recipe in RECIPES.values():
        if not machine.dry or recipe.name in machine.sizes.recipes:
            yield Task("layer", recipe.name, partial(_layer, machine, journal, recipe))
    for recipe in RECIPES.values():
        if not machine.dry or recipe.name in machine.sizes.recipes[:1]:
            yield Task("same bits", recipe.name, partial(_repeated, machine, journal, recipe))


def _bits(
    machine: Machine, journal: Journal, suite: str, name: str, run: Callable[[str], bits.Tensors], expected: str | None
) -> Iterator[Row]:
    with nan_memory():
        got = bits.digest(run(machine.device))
    row = Row(suite, suite, name, False, status="red", why="other bits than the interpreter's", device=machine.device)
    if got != expected:
        yield row
        return
    times = machine.time({"ours": lambda: run(machine.device)})["ours"]
    note = "the interpreter's bits; with the copy to the device"
    yield machine.timed(Row(suite, suite, name, False, median_s=0.0, error=0.0, note=note), times, journal)


def _case(machine: Machine) -> Case:
    torch.manual_seed(0)
    tokens = 4 if machine.dry else 512
    return make_case(machine.sizes.whole, tokens, "uniform", torch.bfloat16, machine.device)


def layer_of(case: Case, recipe: Recipe) -> Layer:
    """y and the four gradients of a case by the kernels, on operands that are quantized before."""
    with torch.no_grad():
        sides = [Operand.quantized(w.detach(), recipe) for w in (case.gate_up_proj, case.down_proj)]
        sides = [side.with_transposed() if recipe.input_gradient else side for side in sides]
        given = case.x.detach(), case.indices, case.weights.detach().float()

    def run() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            y, saved = moe_forward(*given, *sides, recipe=recipe, save=True)
            assert saved is not None
            gradients = moe_backward(case.dy, saved, *sides, recipe=recipe)
        return y, *(gradient for gradient in gradients if gradient is not None)

    return run


def _layer(machine: Machine, journal: Journal, recipe: Recipe) -> Iterator[Row]:
    """A row for each of y and the gradients."""
    case = _case(machine)
    run = layer_of(case, recipe)
    with nan_memory():
        got = run()
    expected = _reference(case, recipe.name)
    exact = expected if not recipe.is_fp8 else _reference(case, "bf16")
    times = machine.time({"ours": run})["ours"]
    for name, a, b, unquantized in zip(OUTPUTS, got, expected, exact, strict=True):
        error, cosine = relative_rms(a, b), cosine_difference(a, b)
        sqnr = sqnr_db(a, unquantized)
        note = f"cosine difference {cosine:.2e}, {sqnr:.1f} dB against unquantized operands"
        if name == "y":
            differ = (a != b.to(a.dtype)).double().mean().item()
            note += f", {differ:.0%} of outputs differ from the rounded reference"
            note += f"; {PREDICTED}" if recipe.is_fp8 else ""
        right = cosine < FP8_COSINE and sqnr > FP8_SQNR_DB if recipe.is_fp8 else error < TOLERANCE[torch.bfloat16]
        found: dict[str, Any] = {
            "group": "layer, forward+backward",
            "name": f"{recipe.name}: {name}",
            "peer": False,
            "error": error,
        }
        if right:
            yield machine.timed(Row("correct", **found, median_s=0.0, note=note), times, journal)
        else:
            why = f"{name} is too far from the reference in float64: relative RMS error {error:.2e}, {note}"
            yield Row("correct", **found, status="red", why=why, device=machine.device)


def _reference(case: Case, recipe: str) -> list[torch.Tensor]:
    """y and the gradients of the recipe's reference, in float64."""
    leaves = [t.detach().requires_grad_() for t in case.leaves]
    x, weights, *sides = leaves
    y = moe_mlp_reference(x, case.indices, weights, *sides, recipe=recipe, dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, leaves, case.dy.double())]


def _repeated(machine: Machine, journal: Journal, recipe: Recipe) -> Iterator[Row]:
    run = layer_of(_case(machine), recipe)
    first = run()  # in whatever memory there is
    found: dict[str, Any] = {"group": "same bits", "name": recipe.name, "peer": False}
    for number in range(machine.sizes.repeats):
        with nan_memory():
            again = run()
        for name, a, b in zip(OUTPUTS, first, again, strict=True):
            if not torch.equal(a, b):
                differ = int((a != b).sum())
                why = f"run {number + 1}: {differ} of {a.numel()} values of {name} are others than in the first run"
                yield Row("correct", **found, status="red", why=why, device=machine.device)
                return
    note = f"{machine.sizes.repeats} runs in memory full of NaN, equal to the first"
    times = machine.time({"ours": run})["ours"]
    yield machine.timed(Row("correct", **found, median_s=0.0, error=0.0, note=note), times, journal)


@contextmanager
def nan_memory() -> Iterator[None]:
    """torch fills what `empty` gives with NaN, integers with their maximum: no unwritten output can pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
