"""Record which experts a model visits, and make it visit the same ones again.

    with replay.record(model) as trace:                 # R2: a forward pass of the trainer's own
        model(**batch)
    with replay.replay(model, trace) as report:         # or rows that vLLM or SGLang returned (R3), see `pack`
        model(**batch).loss.backward()

Only ids are replayed. Weights are computed afresh from the router's own logits, gathered from the scores of *all*
experts by that router's rule, so the router learns as always:

    weights = rule(logits, where(recorded == -1, chosen, recorded))

It works by forward hooks on the routers: transformers' router modules, which return (logits, weights, ids), and
`ornith_moe.MoE`. Nothing is replaced, the three return values keep their meaning and dtypes, and the hooks go when they
are no longer needed. The first time a router is met, its rule is compared with the weights it computed itself.

Micro-batches. Each forward pass is one: they are numbered from 0, the next begins when a router runs again, and replay
takes them in that order. `with replay.micro_batch(key):` names one instead, for schedules that change the order.

Recomputation. A layer that runs again in the backward pass (gradient checkpointing) gets the ids of its first run and
is recorded and counted once. Outputs are marked with their micro-batch, so this holds for pipelined schedules, and when
`backward` is called after the block has ended.

A model compiled before the block keeps its old graph without hooks; a block in which no router ran is an error.

Sources: Ma et al. 2025 (rollout routing replay); NVIDIA/Megatron-LM#4168, verl-project/verl#5392 (the need),
ISEEKYAN/Megatron-LM#79 (scores of all experts, recomputation), google/tunix#2046 (-1 for missing positions).

Letters: T tokens of one micro-batch, L routers, E experts.
"""

import contextlib
import re
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ornith_moe.layer import MoE
from ornith_moe.routing_records import MISSING, Trace, check, decode, encode, expert_load, pack, unpack

__all__ = [
    "Report",
    "Trace",
    "decode",
    "encode",
    "micro_batch",
    "pack",
    "record",
    "register_router",
    "replay",
    "unpack",
]

_TINY = torch.finfo(torch.float32).tiny
_FOREIGN = object()  # key of a pass that this session does not serve
_micro_batch: ContextVar[Hashable | None] = ContextVar("micro_batch", default=None)


def softmax_of_all(router, logits, ids):
    """Qwen, OLMoE, Mixtral: softmax over all experts in fp32, renormalized unless the router says no."""
    scores = logits.softmax(-1, dtype=torch.float32).gather(-1, ids)
    if not getattr(router, "norm_topk_prob", True):
        return scores
    return scores / scores.sum(-1, keepdim=True).clamp_min(_TINY)  # replayed experts may all have underflowed


def softmax_of_chosen(router, logits, ids):
    """gpt-oss, Granite: softmax over the chosen logits, the same as the above with renormalization."""
    return logits.gather(-1, ids).softmax(-1)


def sigmoid_of_all(router, logits, ids):
    """DeepSeek-V3, GLM-4.5: sigmoid per expert, optionally renormalized, times a factor; the bias only selects."""
    scores = logits.sigmoid().gather(-1, ids)
    if router.norm_topk_prob:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return scores * router.routed_scaling_factor


# class name -> rule(router, logits [T, E], ids [T, top_k]) -> weights [T, top_k]; names also match subclasses, which is
# what FSDP2 makes of a module
_RULES: dict[str, Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    **dict.fromkeys(
        [
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3_5MoeTopKRouter",
            "Qwen3VLMoeTextTopKRouter",
            "OlmoeTopKRouter",
            "FlexOlmoTopKRouter",
            "MixtralTopKRouter",
        ],
        softmax_of_all,
    ),
    **dict.fromkeys(["GptOssTopKRouter", "GraniteMoeTopKRouter"], softmax_of_chosen),
    **dict.fromkeys(["DeepseekV3TopkRouter", "Glm4MoeTopkRouter"], sigmoid_of_all),
}
_agreed: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # routers whose weights their rule has reproduced


def register_router(class_name: str, rule: Callable) -> None:
    """Teach `record` and `replay` another router class whose forward returns (logits [T, E], weights, ids).

    Args:
        class_name: of the router module. rule: (router, logits, ids [T, top_k]) -> weights [T, top_k], differentiable.
    Example:
        >>> register_router("MyTopKRouter", softmax_of_all)
    """
    _RULES[class_name] = rule


@dataclass
class Report:
    """What a replay did, so far. "Flipped" is a recorded expert that the router would not have chosen now.

    Attributes:
        layers: names of the routers. Tensors have one entry per layer and live on the model's device until read.
    """

    layers: tuple[str, ...]
    _replayed: list[torch.Tensor | int]  # per layer: rows with a record
    _flipped: list[torch.Tensor | int]  # per layer: flipped slots
    _load: list[torch.Tensor | None]  # per layer: [E] tokens per expert, as visited
    _tokens: dict[Hashable, tuple[torch.Tensor, torch.Tensor]]  # per micro-batch: [T] with a record, with a flip
    _top_k: int

    @property
    def tokens(self) -> int:
        """Tokens with a record in any layer, each micro-batch counted once."""
        return sum(int(recorded.sum()) for recorded, _ in self._tokens.values())

    @property
    def flipped_share(self) -> float:
        """Share of all recorded (token, layer, slot) whose expert flipped."""
        slots = sum(int(count) for count in self._replayed) * self._top_k
        return sum(int(count) for count in self._flipped) / slots if slots else 0.0

    @property
    def touched_share(self) -> float:
        """Share of recorded tokens with a flip in any layer."""
        touched = sum(int(flipped.sum()) for _, flipped in self._tokens.values())
        return touched / self.tokens if self.tokens else 0.0

    @property
    def overlap(self) -> list[float]:
        """Per layer, the share of recorded experts that the router would have chosen too; NaN without records."""
        pairs = zip(self._flipped, self._replayed, strict=True)
        return [1 - int(f) / (int(r) * self._top_k) if int(r) else float("nan") for f, r in pairs]

    @property
    def load(self) -> torch.Tensor:
        """[L, E] int64: tokens per expert as visited, recomputed passes not counted again."""
        experts = max((len(load) for load in self._load if load is not None), default=0)
        rows = [torch.zeros(experts, dtype=torch.int64) if load is None else load.cpu() for load in self._load]
        return torch.stack(rows)


@contextlib.contextmanager
def micro_batch(key: Hashable) -> Iterator[None]:
    """Name the forward passes inside: the key under which they are recorded, or looked up by a replay."""
    token = _micro_batch.set(key)
    try:
        yield
    finally:
        _micro_batch.reset(token)


@contextlib.contextmanager
def record(model: torch.nn.Module) -> Iterator[Trace]:
    """Record the experts of every forward pass inside the block.

    Args:
        model: any module that contains routers known to `register_router`, or `ornith_moe.MoE` layers.
    Returns:
        Trace, filled as the passes run; int16, on the device of the model. Reading it later costs no pass anything.
    Raises:
        ValueError: no known router in the model, or a micro-batch named twice. RuntimeError: no router ran.
    Numerics: outputs keep their bits. With gradients enabled, weights are computed by the rule even here, so that a
        recomputed layer cannot choose differently.
    Example:
        >>> import ornith_moe as om
        >>> moe = om.MoE(om.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2))
        >>> with record(moe) as trace:
        ...     y = moe(torch.randn(5, 16))
        >>> trace[0].shape
        torch.Size([5, 1, 2])
    """
    routers = _routers(model)
    trace = Trace(routers, _common(routers, "num_experts"))
    with _hooked(_Recorder(trace), routers, model), trace._steps.watch(model):
        yield trace


@contextlib.contextmanager
def replay(
    model: torch.nn.Module,
    records: Trace | torch.Tensor | Sequence[torch.Tensor] | Mapping[Hashable, torch.Tensor],
) -> Iterator[Report]:
    """Let every forward pass inside the block visit recorded experts.

    Args:
        model: as in `record`.
        records: a Trace, or rows [T, layers, top_k] of one micro-batch or, in a list or dict, of several. T counts
            every position of the batch, padding included (`pack`); a row of -1 lets the router choose. Layers are the
            routers of the model in order, or all decoder layers by number.
    Returns:
        Report of what flipped and which experts were visited.
    Raises:
        ValueError: no known router; ids out of range or twice in a row, or another number of layers, at the start; a
            micro-batch without record or of another length, when it runs. RuntimeError: no router ran, or a router
            computes other weights than its rule.
    Numerics: a pass that replays its own record gives the same bits. Nothing synchronizes with the device except the
        checks at the start and one comparison per router in the life of a process.
    Example:
        >>> import ornith_moe as om
        >>> moe = om.MoE(om.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2))
        >>> with replay(moe, torch.tensor([[[3, 1]]] * 5)) as report:
        ...     y = moe(torch.randn(5, 16))
        >>> report.load.tolist()
        [[0, 5, 0, 5]]
    """
    routers = _routers(model)
    top_k = _common(routers, "top_k")
    rows = {key: _fitted(key, record, routers, top_k) for key, record in _by_key(records).items()}
    layers = tuple(routers)
    report = Report(layers, [0] * len(layers), [0] * len(layers), [None] * len(layers), {}, top_k)
    with _hooked(_Replayer(rows, report, _common(routers, "num_experts")), routers, model):
        yield report


class _Session:
    """Decides which micro-batch a pass of a router belongs to, and with `choose` which experts it visits."""

    def __init__(self):
        self.open = True
        self.turn = 0  # number of the current micro-batch, if it has no name
        self.ran: set[int] = set()  # routers that ran in it
        self.any_ran = False
        self.recompute: tuple[int, Hashable] = (-1, None)  # backward pass (graph task), its micro-batch at present

    def choose(self, layer: int, chosen: torch.Tensor) -> torch.Tensor | None:
        """The ids [T, top_k] for a router that chose `chosen`, in its dtype; None to leave the router alone."""
        task = torch._C._current_graph_task_id()  # -1 outside of a backward pass, as torch.utils.checkpoint uses it
        if task != -1:
            owner, key = self.recompute
            return self.again(key, layer, chosen) if owner == task else None
        if not self.open:
            return None
        self.any_ran = True
        return self.first(self._next_key(layer), layer, chosen)

    def _next_key(self, layer):
        key = _micro_batch.get()
        if key is None:
            if layer in self.ran:
                self.ran.clear()
                self.turn += 1
            self.ran.add(layer)
            key = self.turn
        self.key = key
        return key

    def mark(self, output: Any) -> None:
        """Let the backward pass through `output` tell us its micro-batch before it recomputes anything."""
        if torch._C._current_graph_task_id() != -1 or not self.open or not self.any_ran:
            return
        key = self.key

        def before_backward(_, session=self):  # keeps the session alive for as long as the graph
            session.recompute = (torch._C._current_graph_task_id(), key)

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(before_backward)


class _Recorder(_Session):
    def __init__(self, trace):
        super().__init__()
        self.trace = trace

    def first(self, key, layer, chosen):
        self.trace.add(key, layer, chosen)
        return self.again(key, layer, chosen)

    def again(self, key, layer, chosen):
        # without gradients nothing is recomputed from saved tensors, and the router's own weights are as good
        return self.trace.row(key, layer).to(chosen.dtype) if torch.is_grad_enabled() else None


class _Replayer(_Session):
    def __init__(self, rows, report, num_experts):
        super().__init__()
        self.rows, self.report, self.num_experts = rows, report, num_experts

    def first(self, key, layer, chosen):
        recorded = self._recorded(key, layer, chosen)
        ids = chosen.where(recorded == MISSING, recorded)
        report = self.report
        with torch.no_grad():
            present = recorded[:, 0] != MISSING
            kept = (recorded.unsqueeze(2) == chosen.unsqueeze(1)).any(2)  # [T, top_k]
            flipped = ~kept & present.unsqueeze(1)
            report._replayed[layer] = report._replayed[layer] + present.sum()
            report._flipped[layer] = report._flipped[layer] + flipped.sum()
            flags = present, flipped.any(1)
            before = report._tokens.get(key, flags)
            report._tokens[key] = tuple(old | new.to(old.device) for old, new in zip(before, flags, strict=True))
            load = expert_load(ids.unsqueeze(1), self.num_experts)[0]
            report._load[layer] = load if report._load[layer] is None else report._load[layer] + load
        return ids

    def again(self, key, layer, chosen):
        recorded = self._recorded(key, layer, chosen)
        return chosen.where(recorded == MISSING, recorded)

    def _recorded(self, key, layer, chosen):
        if key not in self.rows:
            raise ValueError(
                f"records: expected micro-batches {', '.join(map(repr, self.rows))}, got a forward pass for {key!r}; "
                "open a new block for a second round, or name passes with micro_batch"
            )
        rows = self.rows[key]
        if len(rows) != len(chosen):
            raise ValueError(
                f"records[{key!r}]: expected {len(chosen)} rows for the {len(chosen)} positions of this batch, padding "
                f"included, got {len(rows)}; arrange records with pack"
            )
        if rows.device != chosen.device:
            rows = self.rows[key] = rows.to(chosen.device, non_blocking=True)
        return rows[:, layer].to(chosen.dtype)


@contextlib.contextmanager
def _hooked(session, routers, model):
    """Hooks for the block. They hold the session weakly: it lives as long as the block and graphs made in it."""
    reference = weakref.ref(session)
    # a replay goes first, so that a recorder sees the experts that were visited
    order = {"prepend": isinstance(session, _Replayer)}
    handles = []
    for layer, router in enumerate(routers.values()):
        if isinstance(router, MoE):
            hook = _steer_layer(reference, layer)
            handles.append(router.register_forward_pre_hook(hook, with_kwargs=True, **order))
        else:
            handles.append(router.register_forward_hook(_steer_router(reference, layer), **order))
    for module in _ancestors(model, routers):
        handles.append(module.register_forward_hook(_mark_output(reference)))
    weakref.finalize(session, _remove, handles)
    try:
        yield
        if not session.any_ran:
            raise RuntimeError(
                "replay: no router of the model ran inside the block; call the model in it, and compile a model inside "
                "the block or call torch.compiler.reset() first, since compiled graphs keep no hooks that came later"
            )
    finally:
        session.open = False


def _steer_router(reference, layer):
    @torch.compiler.disable
    def hook(router, _, output):
        session = reference()
        if session is None:
            return None
        logits, weights, chosen = output
        ids = session.choose(layer, chosen)
        if ids is None:
            return None
        rule = _rule(router)
        if router not in _agreed and len(chosen):
            _compare(router, rule(router, logits.detach(), chosen), weights.detach())
        return logits, rule(router, logits, ids).to(weights.dtype), ids

    return hook


def _steer_layer(reference, layer):
    @torch.compiler.disable
    def hook(moe, args, kwargs):
        session = reference()
        if session is None:
            return None
        chosen = kwargs.get("replay")  # from a replay around this one
        if chosen is None:
            with torch.no_grad():
                chosen = moe.route(args[0].reshape(-1, args[0].shape[-1])).indices
        ids = session.choose(layer, chosen)
        return None if ids is None else (args, {**kwargs, "replay": ids})

    return hook


def _mark_output(reference):
    def hook(_module, _args, output):
        session = reference()
        if session is not None:
            session.mark(output)

    return hook


def _remove(handles):
    for handle in handles:
        handle.remove()


def _compare(router, mine, theirs):
    """Once per router: the rule must give the weights that the router gave, or replay would train another model."""
    # bf16 rounds to 2^-9, and two orders of rounding may differ by two steps
    tolerance = max(1e-5, 4 * torch.finfo(theirs.dtype).eps)
    if not torch.allclose(mine.float(), theirs.float(), rtol=tolerance, atol=tolerance):
        raise RuntimeError(
            f"replay: {type(router).__name__} computes other weights than the rule {_rule(router).__name__}, by up to "
            f"{(mine.float() - theirs.float()).abs().max():.1e}; register its own rule with register_router"
        )
    _agreed.add(router)


def _rule(router):
    return next((_RULES[cls.__name__] for cls in type(router).__mro__ if cls.__name__ in _RULES), None)


def _routers(model) -> dict[str, torch.nn.Module]:
    found = {name or "model": m for name, m in model.named_modules() if isinstance(m, MoE) or _rule(m) is not None}
    if not found:
        raise ValueError(
            f"model: expected a router of a known class in {type(model).__name__}, found none; "
            f"known are ornith_moe.MoE, {', '.join(sorted(_RULES))}; add yours with register_router"
        )
    return found


def _common(routers, name):
    values = {getattr(router.config if isinstance(router, MoE) else router, name) for router in routers.values()}
    if len(values) != 1:
        raise ValueError(f"model: expected the same {name} in all routers, got {sorted(values)}; replay them apart")
    return values.pop()


def _ancestors(model, routers):
    """Every module around a router: a recomputed region lies inside one of those, or is one."""
    prefixes = {""}
    for name in routers:
        parts = name.split(".")
        prefixes.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return [module for name, module in model.named_modules() if name in prefixes]


def _by_key(records) -> dict[Hashable, torch.Tensor]:
    if isinstance(records, torch.Tensor):
        return {0: records}
    return dict(records if isinstance(records, Mapping) else enumerate(records))


def _fitted(key, record, routers, top_k):
    """The record with one layer per router, checked."""
    name = f"records[{key!r}]"
    if not isinstance(record, torch.Tensor) or record.is_floating_point() or record.dtype == torch.bool:
        kind = record.dtype if isinstance(record, torch.Tensor) else type(record).__name__
        raise TypeError(f"{name}: expected an integer tensor [T, layers, top_k], got {kind}; see decode and pack")
    if record.dim() != 3 or record.shape[2] != top_k:
        raise ValueError(f"{name}: expected [T, layers, top_k] with top_k = {top_k}, got {list(record.shape)}")
    if record.shape[1] != len(routers):
        numbers = [re.search(r"(?:^|\.)layers\.(\d+)\.", router) for router in routers]
        if not all(numbers) or record.shape[1] <= max(int(number[1]) for number in numbers):
            raise ValueError(
                f"{name}: expected {len(routers)} layers, one per router, or one per decoder layer, "
                f"got {record.shape[1]}"
            )
        record = record[:, [int(number[1]) for number in numbers]]
    check(record, _common(routers, "num_experts"), name)
    return record


def _tensors(output) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
