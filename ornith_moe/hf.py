"""transformers adapter: `import ornith_moe.hf`, then `experts_implementation="ornith"`, `"ornith_fp8"`, ...

transformers calls a registered *experts function* on every forward of an experts module: (module, tokens [T, H], ids
[T, top_k], weights [T, top_k]) -> [T, H]. Importing this file registers a word for each row of
`ornith_moe.quant.recipes` in both of its registries:

                          ALL_EXPERTS_FUNCTIONS           ALL_FP8_EXPERTS_FUNCTIONS, weights stored as (q, scale)
    "ornith"              recipe bf16                     weight-only: dequantized, activations as they are
    "ornith_fp8"          recipe fp8, from masters        recipe fp8 on the stored q and scale per 128 x 128 block
    "ornith_fp8_full"     recipe fp8_full, from masters   recipe fp8_full on the same
    "ornith_fp8_channel"  recipe fp8_channel, masters     recipe fp8_channel on the stored q and scale per row

Select one with `from_pretrained(..., experts_implementation=...)`, `model.set_experts_implementation(...)` or, where
only the config can be reached, with the attribute `config._experts_implementation`. transformers does not save the
choice in config.json.

Fused is plain SwiGLU: gated, gate rows before up rows, no bias, no norm after the expert, SiLU, and a gate function
that does no more. Transposed weights are read through a view. The rest still runs, and `why` says how and why:

    tensor subclasses, "ornith" the module's own loop, its `eager`: torchao and others know how to multiply themselves
    unquantized, "ornith"       transformers' own `grouped_mm`, or its `batched_mm` for a few tokens on an accelerator
    stored FP8                  a loop over experts around the module's own gate or activation
    other scales, or FP8 of unquantized experts
                                an error, since another path would train with other numbers than was asked for

Expert parallelism: the module then holds only its local experts, and ids >= that count are sentinels. They reach no
GEMM, add nothing to the output and get a zero gradient. T = 0 works and keeps every trained parameter in the graph.

FP8 weights are frozen until `weight_gradients` asks for gradients or `master_weights` replaces them.

Letters: T tokens, E experts of this module, H hidden, I expert intermediate, R valid slots.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.activations import SiLUActivation
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, use_experts_implementation

from ornith_moe.backend.choice import choose_backend
from ornith_moe.functional import moe_mlp
from ornith_moe.ops import is_opaque
from ornith_moe.quant.fp8 import dequantize_fp8, roundtrip_fp8_tokens
from ornith_moe.quant.recipes import BLOCK, RECIPES, ROW, Cast, Recipe

Module = Any  # an experts module of transformers: what its attributes are, its own class does not say
WORDS = {f"ornith_{recipe.name}" if recipe.is_fp8 else "ornith": recipe for recipe in RECIPES.values()}
_DECODE_TOKENS = 64  # at most this many go to `batched_mm`, which copies the weights of every slot
_logger = logging.getLogger(__name__)
_said: set[str] = set()


def experts_function(word: str) -> Callable[..., torch.Tensor]:
    """The experts function registered as `word`, one of WORDS, for unquantized and for FP8 experts.

    Its arguments:
        self: an experts module decorated by transformers' `use_experts_implementation`; FP8Experts among them, with
            `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] in float8_e4m3fn and `*_scale_inv` [E, rows, columns]
            in float32, bfloat16 or UE8M0: per block, per row, or one per matrix.
        hidden_states: [T, H]. top_k_index: [T, top_k] integers. top_k_weights: [T, top_k].

    It returns:
        [T, H] in the dtype of hidden_states. Under "ornith" unquantized experts compute in the dtype of their weights,
        as in transformers' `grouped_mm`, so a float32 input under autocast is cast first. Under an FP8 word weights in
        float32 or BF16 are masters: rounded to BF16 and quantized once per optimizer step, with BF16 scales, so to the
        bits of the FP8 build that `convert` writes of them, and trained by gradients of their own dtype; stored FP8
        weights are used as they are.

    It raises:
        ValueError: FP4-packed experts, or scales whose shape does not tile the weight. Under an FP8 word also: experts
            that are neither plain SwiGLU nor stored in FP8, an I that the recipe does not take, static activation
            scales, or scales that do not reach as far as the recipe's.

    Numerics: those of `moe_mlp` with the recipe; deterministic, so gradient checkpointing recomputes the same bits.
    """

    def experts(
        self: Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return _experts(self, hidden_states, top_k_index, top_k_weights, word)

    experts.__name__ = experts.__qualname__ = f"{word}_experts"
    return experts


def why(experts: Module, implementation: str | None = None) -> str:
    """How an experts module is computed, and why: "fused: ...", "grouped_mm: ...", "eager: ...", "loop: ...",
    "refused: ...", or "replaced: ..." where another library has put its own function in the place of ours.

    Args:
        experts: the module. implementation: one of WORDS; None for the one its config has chosen.
    Raises:
        TypeError: not an experts module of transformers. ValueError: it has chosen another implementation.
    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> why(MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=8)), "ornith")
        'fused: plain SwiGLU, recipe bf16, cpu backend'
    """
    if not hasattr(experts, "is_transposed") or not hasattr(experts, "down_proj"):
        raise TypeError(f"experts: expected an experts module of transformers, got {type(experts).__name__}")
    name = implementation or experts.config._experts_implementation
    if name not in WORDS:
        raise ValueError(f"implementation: expected one of {', '.join(WORDS)}, got {name!r}; select it first")
    path, reason = _path(experts, name, gathered=True)
    other = _replaced_by(experts, name)
    if other:
        return f"replaced: {other} runs instead"
    if path == "fused" and experts.down_proj.is_meta:
        reason += ", shapes only: the weights are on meta"
    elif path == "fused":
        try:
            reason += f", {choose_backend(None, experts.down_proj.device, WORDS[name].name)} backend"
        except ValueError as error:
            path, reason = "refused", str(error)
    return f"{path}: {reason}"


def explain(model: torch.nn.Module) -> dict[str, str]:
    """`why` for every experts module of a model, by name; those that use another implementation say which.

    Example:
        >>> from transformers import AutoModelForCausalLM, MixtralConfig
        >>> config = MixtralConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
        >>> explain(AutoModelForCausalLM.from_config(config, experts_implementation="eager"))
        {'model.layers.0.mlp.experts': 'not ours: eager'}
    """
    found = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not (hasattr(module, "is_transposed") and hasattr(module, "down_proj")):
            if _holds_experts(module):
                found[name] = f"replaced: {_name(_forward(module))} runs instead"
            continue
        chosen = module.config._experts_implementation
        found[name] = why(module) if chosen in WORDS else f"not ours: {chosen}"
        block = modules[name.rpartition(".")[0]] if name else module
        runs = _forward(block)
        if _is_foreign(runs, type(block)) and not found[name].startswith("replaced"):
            found[name] = f"replaced: {_name(runs)} runs in {type(block).__name__}, around the experts"
    return found


def weight_gradients(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Ask for gradients of the stored FP8 experts: `.grad` of each q in `dtype`, that of the dequantized weight.

    dL/dW for W = q * scale, scales constant. An FP8 number cannot take a small step, so this is for optimizers that
    keep masters of their own, for statistics and for merging; to train with a usual optimizer, use `master_weights`.
    Uses `Tensor.grad_dtype`; fused experts only, outside of `torch.compile`, which forgets it.

    Returns:
        The parameters, which now require gradients.
    Raises:
        RuntimeError: this torch has no `Tensor.grad_dtype`; 2.10 and later do.
    """
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise RuntimeError(f"weight_gradients: needs Tensor.grad_dtype, torch {torch.__version__} has none; upgrade it")
    weights = [getattr(experts, name) for experts in _fp8_experts(model) for name in _projections(experts)]
    weights = [weight for weight in weights if weight.dtype == torch.float8_e4m3fn]
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad_dtype = dtype
    return weights


@torch.no_grad()
def master_weights(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Replace the stored FP8 experts of a model by trainable dequantized weights W = q * scale.

    With "ornith_fp8" they are quantized again once per optimizer step, by the quantizer that writes FP8 builds, with
    scales of the kind that was stored. Before the first step that gives back every q bit for bit, with scales that
    differ by no more than BF16 rounding, 2^-8 (UE8M0: every q * scale): training starts from the policy that is served.
    One module at a time is held twice; whether fp32 scales are BF16 numbers is read back once.

    Args:
        model: loaded from an FP8 checkpoint. dtype: float32, or bfloat16 for half the memory.
    Returns:
        The new parameters, for the optimizer.
    """
    masters = []
    for experts in _fp8_experts(model):
        kinds = set()
        for name in _projections(experts):
            if getattr(experts, name).element_size() > 1:
                continue
            weight, scale, block = _stored(experts, name)
            master = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            for expert in range(len(weight)):
                master[expert] = dequantize_fp8(weight[expert], scale[expert], block=block, dtype=dtype)
            setattr(experts, name, torch.nn.Parameter(master))
            setattr(experts, f"{name}_scale_inv", None)
            masters.append(getattr(experts, name))
            kinds.add(_kind_of(scale))
        if kinds:
            experts._ornith_scale = kinds.pop() if len(kinds) == 1 else "fp32"
    return masters


def _experts(
    module: Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
    name: str,
) -> torch.Tensor:  # fmt: skip
    path, reason = _path(module, name)
    operands, recipe = (hidden_states, top_k_index, top_k_weights), WORDS[name]
    if path == "refused":
        raise ValueError(f"{type(module).__name__}: experts_implementation={name!r} cannot compute {reason}")
    if path != "fused":
        _say_once(f"{type(module).__name__} takes the path {path!r} under {name!r}: {reason}")
    if path == "eager":
        return _forward(module).__wrapped__(module, *operands)
    if path == "loop":
        return _loop_over_experts(module, *operands, recipe.activations)
    if path != "fused":
        decode = len(hidden_states) <= _DECODE_TOKENS and not torch.is_grad_enabled()
        few = decode and hidden_states.device.type != "cpu"
        return ALL_EXPERTS_FUNCTIONS["batched_mm" if few else "grouped_mm"](module, *operands)

    gate_up, down = module.gate_up_proj, module.down_proj
    x = hidden_states
    if gate_up.element_size() == 1:
        gate_up, down = ((_trained(w), s) for w, s in zip((gate_up, down), _scales(module), strict=True))
    else:
        if module.is_transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        if not recipe.is_fp8:
            x = x.to(gate_up.dtype)
    y = moe_mlp(x, top_k_index, top_k_weights, gate_up, down, recipe=recipe.name, scale=_scale_of_masters(module))
    return y.to(hidden_states.dtype)


def _path(module: Module, name: str, gathered: bool = False) -> tuple[str, str]:
    """("fused", "eager", "grouped_mm", "loop" or "refused", why); `gathered`: as it is when FSDP2 calls the module."""
    obstacle, recipe = _obstacle(module), WORDS[name]
    kinds = {type(w) for w in (getattr(module, p) for p in _projections(module)) if is_opaque(w)}
    if any(kind.__module__.startswith("torch.distributed") for kind in kinds):  # DTensor
        if not gathered:
            return "refused", "DTensor weights; shard the module by fully_shard, which gathers them, or use to_local()"
    elif kinds:
        subclass = f"weights of the subclass {_name(kinds.pop())}"
        if recipe.is_fp8:
            return "refused", f"{subclass}; choose 'ornith', which lets them compute, or dequantize them"
        return "eager", subclass
    if not obstacle and recipe.weights and not recipe.takes(_inner(module)):
        obstacle = f"an expert intermediate size of {_inner(module)}, no multiple of {recipe.weights[0]}"
    if module.down_proj.element_size() == 1:
        return _path_of_stored(module, recipe, obstacle)
    if not obstacle:
        return "fused", f"plain SwiGLU, recipe {recipe.name}"
    if recipe.is_fp8:
        return "refused", f"{obstacle}; choose 'ornith' for unquantized experts"
    return "grouped_mm", obstacle


def _path_of_stored(module: Module, recipe: Recipe, obstacle: str | None) -> tuple[str, str]:
    """`_path` of experts whose weights are (q, scale)."""
    if module.down_proj.dtype != torch.float8_e4m3fn:
        return "refused", f"{module.down_proj.dtype} weights (FP4); choose 'grouped_mm'"
    if not all(hasattr(module, f"{name}_scale_inv") for name in _projections(module)):
        return "refused", "FP8 weights without scales, which this transformers did not load; upgrade it"
    reach = _reach(module)
    if recipe.is_fp8 and module.activation_scheme == "static":
        return "refused", "static activation scales; choose 'ornith' for weight-only"
    if recipe.weights == BLOCK and tuple(module.block_size or ()) != BLOCK:
        return "refused", f"scales per {module.block_size or 'matrix'}, not per 128 x 128; choose 'ornith'"
    if recipe.weights == ROW and reach != ROW:
        return "refused", f"scales per {module.block_size or 'matrix'}, not per row; choose 'ornith' for weight-only"
    if recipe.weights == ROW and module.down_proj_scale_inv.dtype == torch.float8_e8m0fnu:
        return "refused", "UE8M0 scales per row; choose 'ornith' for weight-only"
    if not obstacle and reach not in ((recipe.weights,) if recipe.weights else (BLOCK, ROW)):
        obstacle = "scales that are not one per 128 x 128 block"
    if not obstacle:
        numbers = f"recipe {recipe.name}" if recipe.is_fp8 else "weight-only"
        return "fused", f"plain SwiGLU, stored FP8, {numbers}"
    if recipe.input_gradient:  # which the loop does not cast
        return "refused", f"{obstacle}; choose 'ornith' for weight-only"
    return "loop", obstacle


def _obstacle(module: Module) -> str | None:
    """What makes the module more than plain SwiGLU, or None. Older releases name only what they can do."""
    if not module.has_gate:
        return "experts without a gate"
    if module.has_bias:
        return "biases"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm after each expert"
    gate = type(module)._apply_gate
    if gate is FP8Experts._apply_gate:
        if any(getattr(module, option, None) is not None for option in ("gate_softcap", "swiglu_alpha", "limit")):
            return "a clamped or capped gate"
    elif gate is not _default_apply_gate:
        return f"its own gate function, {gate.__qualname__}"
    if not getattr(module, "is_concatenated", True):
        return "interleaved gate and up rows"
    if not (isinstance(module.act_fn, torch.nn.SiLU | SiLUActivation) or module.act_fn is F.silu):
        return f"the activation {getattr(module.act_fn, '__name__', type(module.act_fn).__name__)}"
    return None


class _Probe(torch.nn.Module):
    def forward(self) -> None: ...


_DISPATCH = use_experts_implementation(_Probe).forward.__code__  # of the forward that transformers gives experts


def _forward(module: Module) -> Any:
    """The function that `module(...)` runs, seen through accelerate, torch.compile and transformers' parallelism."""
    runs = getattr(module, "_old_forward", module.forward) if hasattr(module, "_hf_hook") else module.forward
    if (getattr(runs, "__module__", None) or "").startswith("transformers.distributed."):
        runs = type(module).forward  # which these wrappers run, between moving tokens to ranks and back
    runs = getattr(runs, "_torchdynamo_orig_callable", runs)
    runs = getattr(runs, "__func__", runs)
    return getattr(runs, "func", runs)  # of a partial


def _replaced_by(module: Module, name: str) -> str | None:
    """Name and module of what runs in our place: another forward, or another entry of the registry; None."""
    runs = _forward(module)
    if getattr(runs, "__code__", None) is not _DISPATCH:
        return _name(runs)
    registry = inspect.getclosurevars(runs).nonlocals["experts_interface"]
    entry = registry.get(name)
    return None if entry in _FUNCTIONS.values() else f"{_name(entry)}, registered as {name!r},"


def _is_foreign(runs: Any, owner: type) -> bool:
    """Whether a class of transformers runs a function that is from elsewhere."""
    home = getattr(runs, "__module__", None) or ""
    return owner.__module__.startswith("transformers.") and not home.startswith(("transformers.", "torch."))


def _holds_experts(module: torch.nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3 and "gate_up_proj" in module._parameters


def _name(thing: Any) -> str:
    home = getattr(thing, "__module__", None) or type(thing).__module__
    return f"{home}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _say_once(text: str) -> None:
    if not torch.compiler.is_compiling() and text not in _said:
        _said.add(text)
        _logger.warning(text)


def _inner(module: Module) -> int:
    return module.down_proj.shape[1 if module.is_transposed else 2]


def _fp8_experts(model: torch.nn.Module) -> list[Module]:
    return [module for module in model.modules() if isinstance(module, FP8Experts)]


def _projections(module: Module) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _scales(module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    return module.gate_up_proj_scale_inv.detach(), module.down_proj_scale_inv.detach()


def _kind_of(scale: torch.Tensor) -> str:
    """Which scales a weight was stored with; transformers widens the BF16 ones of a file."""
    if scale.dtype == torch.float8_e8m0fnu:
        return "ue8m0"
    return "bf16" if torch.equal(scale, scale.bfloat16().to(scale.dtype)) else "fp32"


def _scale_of_masters(module: Module) -> str:
    """Scales of blocks that masters get: as they were stored, else as `convert` stores them in FP8 builds."""
    return getattr(module, "_ornith_scale", "bf16")


def _reach(module: Module) -> Cast | None:
    """Over what a scale of both stored weights reaches: BLOCK, ROW, or something else."""
    for rows, columns in (BLOCK, ROW):
        fits = (
            tuple(getattr(module, f"{name}_scale_inv").shape[1:]) == (-(-n // rows), -(-k // (columns or k)))
            for name in _projections(module)
            for n, k in (getattr(module, name).shape[1:],)
        )
        if all(fits):
            return rows, columns
    return None


def _trained(weight: torch.Tensor) -> torch.Tensor:
    """The weight, or without its gradient where that would be an FP8 number: transformers sets requires_grad on it."""
    return weight if _is_trained(weight) else weight.detach()


def _is_trained(weight: torch.Tensor) -> bool:
    return weight.requires_grad and getattr(weight, "grad_dtype", weight.dtype) != weight.dtype


def _stored(module: Module, name: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """(weight [E, N, K], scale [E, ., .], block): block is the (rows, columns) of the weight that share a scale."""
    weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv").detach()
    if _is_trained(weight):
        raise ValueError(f"{name}: the gradient of a stored FP8 weight needs fused experts; use master_weights")
    block = []
    declared_block = module.block_size or (None, None)
    for size, scales, declared in zip(weight.shape[1:], scale.shape[1:], declared_block, strict=True):
        # transformers keeps two row scales for a gate_up that is smaller than a block, and for one without blocks
        block.append(declared if declared and -(-size // declared) == scales else -(-size // scales))
    rows, columns = block
    return weight.detach(), scale, (rows, columns)


def _loop_over_experts(
    module: Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor,
    activations: Cast | None,
) -> torch.Tensor:  # fmt: skip
    """y[t] = sum over k, in order, of weights[t, k] * expert(x[t]) with FP8 weights and the module's own activation."""
    up_name, down_name = _projections(module)
    up, down = _stored(module, up_name), _stored(module, down_name)

    def linear(
        rows: torch.Tensor, expert: int, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
    ) -> torch.Tensor:
        return _FrozenFP8Linear.apply(rows, weight[expert], scale[expert], block, activations)

    (tokens, top_k), experts = top_k_index.shape, module.down_proj.shape[0]
    ids = top_k_index.reshape(-1)
    keys = torch.where((ids >= 0) & (ids < experts), ids, experts)  # sentinels sort to the end
    slots = keys.argsort(stable=True)
    outputs, start = [], 0
    # host sync: the loop needs the counts; this path is for layouts that no kernel serves
    # (on meta there are none: one expert gets every row, which costs what any routing costs)
    counts = [len(keys)] if keys.is_meta else keys.bincount(minlength=experts + 1)[:experts].tolist()
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = linear(hidden_states[slots[start : start + count] // top_k], expert, *up)
        outputs.append(linear(module._apply_gate(rows) if module.has_gate else module.act_fn(rows), expert, *down))
        start += count
    outputs.append(hidden_states.new_zeros(slots.numel() - start, hidden_states.shape[1]))  # rows of the sentinels
    by_slot = torch.cat(outputs)[slots.argsort()].unflatten(0, (tokens, top_k))  # [T, top_k, H]
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    weights = top_k_weights.to(dtype).masked_fill((keys == experts).view(tokens, top_k), 0)
    y = (by_slot.to(dtype) * weights.unsqueeze(-1)).sum(1)
    return (y + hidden_states[:0].sum()).to(hidden_states.dtype)  # x stays in the graph when no expert was active


class _FrozenFP8Linear(torch.autograd.Function):
    """x @ dequantize(q, scale)^T; keeps q, not the dequantized weight, for the gradient of x."""

    @staticmethod
    def forward(
        x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], activations: Cast | None
    ) -> torch.Tensor:
        if activations:
            ue8m0 = scale.dtype == torch.float8_e8m0fnu
            x = roundtrip_fp8_tokens(x, group=activations[1], scale="ue8m0" if ue8m0 else "fp32")
        return x @ dequantize_fp8(q, scale, block=block, dtype=x.dtype).T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, q, scale, ctx.block, _ = inputs
        ctx.save_for_backward(q, scale)
        ctx.save_for_forward(q, scale)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, scale = ctx.saved_tensors
        return dy @ dequantize_fp8(q, scale, block=ctx.block, dtype=dy.dtype), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: torch.Tensor, *_: None) -> torch.Tensor:
        q, scale = ctx.saved_tensors
        return dx @ dequantize_fp8(q, scale, block=ctx.block, dtype=dx.dtype).T


_FUNCTIONS = {word: experts_function(word) for word in WORDS}
for _registry in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
    for _word, _function in _FUNCTIONS.items():
        _registry.register(_word, _function)
