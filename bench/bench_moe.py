"""The routed-experts MLP, against what transformers, torch and others compute with the same weights.

Forward without autograd; forward + backward with the gradients of x, weights, gate_up_proj and down_proj, all made anew
in each step. FP8 recipes are served from stored pairs in a forward and train on masters; between steps the masters do
not change, so what is timed is a step of gradient accumulation. "masters" and "unchanged masters" are the forward that
compares BF16 masters with the digests of their FP8 copies, and the one inside `unchanged()`.

`stored` tasks compute in BF16 on the weights of an FP8 checkpoint, against what torch offers: cast each active expert,
scale it, torch.mm.

Every row is checked first, output and all gradients, against a loop over experts in FP32 (`cases`).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

import ornith_moe as om
from ornith_moe.bench.cases import (
    DTYPES,
    RECIPE_TOLERANCE,
    Case,
    Truth,
    allowed_error,
    make_case,
    outputs_of,
    true_outputs,
    worst,
)
from ornith_moe.bench.limits import FP8
from ornith_moe.bench.peers import MOE_PEERS, Forward, Unable, moe_peers
from ornith_moe.bench.shapes import TOKENS, TOKENS_GPU, Experts, experts_of, fitting
from ornith_moe.bench.tasks import Settings, Side, Task, Work
from ornith_moe.fp8_weights import unchanged
from ornith_moe.quant.operand import Operand
from ornith_moe.quant.recipes import RECIPES, recipe_of

QUANTIZERS = {"block": om.quantize_fp8_block, "channel": om.quantize_fp8_channel}
MASTERS = ("masters", "unchanged masters")
PASSES = {"forward": False, "forward+backward": True}
MEMORY_SHARE = 0.4  # of what is free, for weights and their gradients
Point = tuple[str, int, str, str, str, str]  # model, tokens, routing, dtype, recipe, pass


def tasks(settings: Settings) -> list[Task]:
    """The grid that `settings` ask for."""
    points = list(dict.fromkeys(_asked(settings) if settings.models else _usual(settings)))
    made = [_task(*point, settings.device) for point in points]
    if not settings.models:
        one = _task("ornith-35b/8", 64 if settings.quick else 1024, "uniform", "bf16", "bf16", "forward", "cpu", 1)
        made += [one] if settings.device == "cpu" and torch.get_num_threads() > 1 else []
        made += [_stored(scales, settings.device) for scales in QUANTIZERS]
    return made


def _usual(settings: Settings) -> Iterator[Point]:
    """Tokens, passes, routings, dtypes, recipes and numbers of experts, each varied around one point."""
    tokens: dict[str, tuple[int, ...]]
    if settings.device == "cuda":
        main, middle, tokens = "ornith-35b", 8192, {"ornith-35b": TOKENS_GPU}
    elif settings.quick:
        main, middle, tokens = "ornith-35b/8", 64, {"nano": (1, 16, 64), "ornith-35b/8": (1, 64)}
    else:
        main, middle, tokens = "ornith-35b/8", 128, {"nano": TOKENS, "ornith-35b/8": TOKENS}
    for model, counts in tokens.items():
        for count in counts:
            for which in PASSES:
                yield model, count, settings.routing, "bf16", "bf16", which
    for routing in ("zipf", "one-hot"):
        yield main, middle, routing, "bf16", "bf16", "forward"
        if not settings.quick:
            yield main, middle, routing, "bf16", "bf16", "forward+backward"
    for recipe in (name for name in RECIPES if name != "bf16"):
        for count in (middle,) if settings.quick else (1, middle, 1024):
            yield main, count, settings.routing, "bf16", recipe, "forward"
        if recipe == "fp8" or not settings.quick:
            yield main, middle, settings.routing, "bf16", recipe, "forward+backward"
    if settings.device == "cpu":
        yield main, middle, settings.routing, "fp32", "bf16", "forward"
        for ranks in () if settings.quick else (32, 16, 4):
            yield f"ornith-35b/{ranks}", middle, settings.routing, "bf16", "bf16", "forward"


def _asked(settings: Settings) -> Iterator[Point]:
    """Models by name, at a few numbers of tokens, cut to what fits in memory with gradients."""
    tokens = TOKENS_GPU if settings.device == "cuda" else TOKENS
    free = _free_bytes(settings.device) * MEMORY_SHARE
    for name in settings.models:
        model = fitting(name, int(free), 8)  # BF16 weights, as many gradients, and some experts in FP32
        for count in tokens[:3] if settings.quick else tokens:
            for which in PASSES:
                yield model, count, settings.routing, "bf16", "bf16", which
        for recipe in (recipe for recipe in RECIPES if recipe != "bf16"):
            yield model, tokens[2], settings.routing, "bf16", recipe, "forward"


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _task(
    model: str, tokens: int, routing: str, dtype: str, recipe: str, which: str, device: str, threads: int | None = None
) -> Task:
    shape, backward = experts_of(model), PASSES[which]
    case: dict[str, Any] = {"model": model, "tokens": tokens, "routing": routing, "dtype": dtype, "recipe": recipe}
    case |= {"pass": which} | ({"threads": threads} if threads else {})
    names = {"ours": False} | (dict.fromkeys(MASTERS, False) if recipe == "fp8" and not backward else {})
    names |= {peer.name: True for peer in moe_peers(recipe)}
    group = f"moe {model} {dtype}{'' if recipe == 'bf16' else f' {recipe}'}, T = {tokens}, {routing}, {which}"
    group += f", {threads} thread" if threads else ""
    prepare = partial(_prepare, shape, tokens, routing, dtype, recipe, backward, device, _cut_note(model))
    return Task("moe", group, case, names, prepare, threads)


def _cut_note(model: str) -> str:
    if "/" not in model:
        return ""
    shape, whole = experts_of(model), experts_of(model.partition("/")[0])
    return f"{shape.experts} of {whole.experts} experts, top_k {shape.top_k} of {whole.top_k}"


def _prepare(
    shape: Experts, tokens: int, routing: str, dtype: str, recipe: str, backward: bool, device: str, note: str
) -> Work:
    case = make_case(shape, tokens, routing, DTYPES[dtype], device)
    truth = true_outputs(case, backward)
    sides: dict[str, Callable[[], Side]] = {}
    for name in ("ours", *MASTERS):
        sides[name] = partial(_ours, name, case, truth, recipe, backward)
    for peer in moe_peers(recipe):
        sides[peer.name] = partial(_theirs, peer.name, case, truth, recipe, backward)
    weight_bytes = case.down_proj.itemsize if recipe == "bf16" else 1
    multiplied = FP8 if recipe != "bf16" else DTYPES[dtype]
    return Work(
        sides, case.least_bytes(backward, weight_bytes), case.flops(backward), multiplied, note=lambda name, times: note
    )


def _ours(name: str, case: Case, truth: Truth, recipe: str, backward: bool) -> Side:
    row, inner = recipe_of(recipe), case.down_proj.shape[2]
    if not row.takes(inner):
        raise Unable("skipped", f"recipe {recipe} takes an expert size that is a multiple of 128, not {inner}")
    weights: list[Any] = [case.gate_up_proj, case.down_proj]
    if row.is_fp8 and not backward and name == "ours":
        weights = [Operand.quantized(w.detach(), row, "fp32")[:2] for w in weights]

    def forward() -> torch.Tensor:
        with ExitStack() as promised:
            if name == "unchanged masters":
                promised.enter_context(unchanged())
            return om.moe_mlp(case.x, case.indices, case.weights, *weights, recipe=recipe)

    checks = [(truth, allowed_error(case.x.dtype, recipe, peer=False))]
    if row.is_fp8 and not backward:
        checks.append((true_outputs(case, backward, recipe=recipe), RECIPE_TOLERANCE))
    return _side(forward, case, backward, checks)


def _theirs(name: str, case: Case, truth: Truth, recipe: str, backward: bool) -> Side:
    peer = MOE_PEERS[name]
    peer.check(case, backward)
    return _side(peer.forward(case), case, backward, [(truth, allowed_error(case.x.dtype, recipe, peer=True))])


def _side(forward: Forward, case: Case, backward: bool, checks: list[tuple[Truth, float]]) -> Side:
    """A step that frees what it made, as a training step does; its error is that to the first of `checks`."""

    def check(outputs: tuple[torch.Tensor, ...]) -> float:
        errors = [worst(truth.errors(outputs), allowed) for truth, allowed in checks]
        return errors[0]

    return Side(lambda: outputs_of(forward, case, backward), check)


def _stored(scales: str, device: str) -> Task:
    case = {"model": "ornith-35b/8", "tokens": 1, "routing": "uniform", "dtype": "bf16", "weights": f"FP8 {scales}"}
    group = f"moe ornith-35b/8 bf16 on stored FP8 {scales}, T = 1, uniform, forward"
    names = {"ours": False, "cast + mm": True}
    return Task("moe", group, case | {"pass": "forward"}, names, partial(_prepare_stored, scales, device))


def _prepare_stored(scales: str, device: str) -> Work:
    whole = make_case(experts_of("ornith-35b/8")._replace(top_k=8), 1, "uniform", torch.bfloat16, device)
    sides = [Operand(*QUANTIZERS[scales](w.detach())) for w in (whole.gate_up_proj, whole.down_proj)]
    case = whole._replace(
        gate_up_proj=sides[0].dequantized(torch.float32), down_proj=sides[1].dequantized(torch.float32)
    )
    truth = true_outputs(case, backward=False)

    def expert(side: Operand, e: int) -> torch.Tensor:
        assert side.scale is not None
        q, scale = side.value[e].to(torch.bfloat16), side.scale[e].to(torch.bfloat16)
        if scales == "channel":
            return q * scale
        blocks = q.view(scale.shape[0], 128, scale.shape[1], 128) * scale[:, None, :, None]
        return blocks.view(q.shape)

    def cast_and_mm() -> torch.Tensor:
        y = torch.zeros(1, case.x.shape[1], device=device)
        for k, e in enumerate(case.indices[0].tolist()):
            gate, up = torch.mm(case.x, expert(sides[0], e).T).chunk(2, -1)
            y += case.weights[0, k] * torch.mm(torch.nn.functional.silu(gate) * up, expert(sides[1], e).T)
        return y.bfloat16()

    pairs: Any = [side[:2] for side in sides]
    forwards: dict[str, Forward] = {
        "ours": lambda: om.moe_mlp(case.x, case.indices, case.weights, *pairs, recipe="bf16"),
        "cast + mm": cast_and_mm,
    }
    made = {
        name: partial(_side, forward, case, False, [(truth, allowed_error(torch.bfloat16, "bf16", name != "ours"))])
        for name, forward in forwards.items()
    }
    cut = _cut_note("ornith-35b/8")
    nbytes = case.indices.numel() * sum(part[0].nbytes for pair in pairs for part in pair)
    return Work(made, nbytes, case.flops(False), torch.bfloat16, note=lambda name, times: cut)


def test_moe(measure: Callable[[Task, str], None], task: Task, name: str) -> None:
    measure(task, name)
