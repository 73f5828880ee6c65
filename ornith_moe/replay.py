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
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ornith_moe.layer import MoE
from ornith_moe.routing_records import MISSING, Trace, check, decode, encode, expert_load, pack, unpack
from ornith_moe.routing_rules import RULES, compare_once, register_router, rule_of

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

_CHOSEN_AROUND_IT = "in this release of transformers the block around it chooses the experts, a newer one is needed"
_micro_batch: ContextVar[Hashable | None] = ContextVar("micro_batch", default=None)


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
    trace = Trace(tuple(routers), _common(routers, "num_experts"))
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

    key: Hashable  # of the micro-batch whose router ran last

    def __init__(self) -> None:
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

    def first(self, key: Hashable, layer: int, chosen: torch.Tensor) -> torch.Tensor | None:
        """As `choose`, for the pass of a router that counts."""
        raise NotImplementedError

    def again(self, key: Hashable, layer: int, chosen: torch.Tensor) -> torch.Tensor | None:
        """As `choose`, for a pass that a backward pass runs again."""
        raise NotImplementedError

    def _next_key(self, layer: int) -> Hashable:
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

        # its default keeps the session alive for as long as the graph
        def before_backward(_: torch.Tensor, session: _Session = self) -> None:
            session.recompute = (torch._C._current_graph_task_id(), key)

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(before_backward)


class _Recorder(_Session):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def first(self, key: Hashable, layer: int, chosen: torch.Tensor) -> torch.Tensor | None:
        self.trace.add(key, layer, chosen)
        return self.again(key, layer, chosen)

    def again(self, key: Hashable, layer: int, chosen: torch.Tensor) -> torch.Tensor | None:
        # without gradients nothing is recomputed from saved tensors, and the router's own weights are as good
        return self.trace.row(key, layer).to(chosen.dtype) if torch.is_grad_enabled() else None


class _Replayer(_Session):
    def __init__(self, rows: dict[Hashable, torch.Tensor], report: Report, num_experts: int):
        super().__init__()
        self.rows, self.report, self.num_experts = rows, report, num_experts

    def first(self, key: Hashable, layer: int, chosen: torch.Tensor) -> torch.Tensor | None:
        recorded = self._recorded(key, layer, chosen)
        ids = chosen.where(recorded == MISSING, recorded)
        report = self.report
        with torch.no_grad():
            present = recorded[:, 0] != MISSING
            kept = (recorded.unsqueeze(2) == chosen.unsqueeze(1)).any(2)  # [T, top_k]
            flipped = ~kept & present.unsqueeze(1)
            report._replayed[layer] = report._replayed[layer] + present.sum()
            report._flipped[layer] = report._flipped[layer] + flipped.sum()
            touched = flipped.any(1)
            old = report._tokens.get(key, (present, touched))
            report._tokens[key] = old[0] | present.to(old[0].device), old[1] | touched.to(old[1].device)
            load = expert_load(ids.unsqueeze(1), self.num_experts)[0]
            before = report._load[layer]
            report._load[layer] = load if before is None else before + load
        return ids

    def again(self, key: Hashable, layer: int, chosen: torch.Tensor) -> torch.Tensor | None:
        recorded = self._recorded(key, layer, chosen)
        return chosen.where(recorded == MISSING, recorded)

    def _recorded(self, key: Hashable, layer: int, chosen: torch.Tensor) -> torch.Tensor:
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
def _hooked(session: _Session, routers: dict[str, torch.nn.Module], model: torch.nn.Module) -> Iterator[None]:
    """Hooks for the block. They hold the session weakly: it lives as long as the block and graphs made in it."""
    reference = weakref.ref(session)
    # a replay goes first, so that a recorder sees the experts that were visited
    first = isinstance(session, _Replayer)
    handles = []
    for layer, router in enumerate(routers.values()):
        if isinstance(router, MoE):
            hook = _steer_layer(reference, layer)
            handles.append(router.register_forward_pre_hook(hook, with_kwargs=True, prepend=first))
        else:
            handles.append(router.register_forward_hook(_steer_router(reference, layer), prepend=first))
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


def _steer_router(reference: weakref.ref[_Session], layer: int) -> Callable[..., Any]:
    @torch.compiler.disable
    def hook(router: torch.nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        session = reference()
        if session is None:
            return None
        if not isinstance(output, tuple) or len(output) != 3:
            raise RuntimeError(
                f"replay: {type(router).__name__} returns no (logits, weights, ids); {_CHOSEN_AROUND_IT}"
            )
        logits, weights, chosen = output
        ids = session.choose(layer, chosen)
        if ids is None:
            return None
        rule = rule_of(router)
        assert rule is not None  # `_routers` takes no others
        if len(chosen):
            compare_once(router, rule, logits.detach(), weights.detach(), chosen)
        return logits, rule(router, logits, ids).to(weights.dtype), ids

    return hook


def _steer_layer(reference: weakref.ref[_Session], layer: int) -> Callable[..., Any]:
    @torch.compiler.disable
    def hook(moe: MoE, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
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


def _mark_output(reference: weakref.ref[_Session]) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
        session = reference()
        if session is not None:
            session.mark(output)

    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    found = {name or "model": m for name, m in model.named_modules() if isinstance(m, MoE) or rule_of(m) is not None}
    if not found:
        raise ValueError(
            f"model: expected a router of a known class in {type(model).__name__}, found none; "
            f"known are ornith_moe.MoE, {', '.join(sorted(RULES))}; add yours with register_router"
        )
    return found


def _common(routers: dict[str, torch.nn.Module], name: str) -> int:
    owners = [router.config if isinstance(router, MoE) else router for router in routers.values()]
    for owner in owners:
        if not hasattr(owner, name):
            raise ValueError(f"model: {type(owner).__name__} has no {name}; {_CHOSEN_AROUND_IT}")
    values = {getattr(owner, name) for owner in owners}
    if len(values) != 1:
        raise ValueError(f"model: expected the same {name} in all routers, got {sorted(values)}; replay them apart")
    return values.pop()


def _ancestors(model: torch.nn.Module, routers: Iterable[str]) -> list[torch.nn.Module]:
    """Every module around a router: a recomputed region lies inside one of those, or is one."""
    prefixes = {""}
    for name in routers:
        parts = name.split(".")
        prefixes.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return [module for name, module in model.named_modules() if name in prefixes]


def _by_key(
    records: torch.Tensor | Sequence[torch.Tensor] | Mapping[Hashable, torch.Tensor],
) -> dict[Hashable, torch.Tensor]:
    if isinstance(records, torch.Tensor):
        return {0: records}
    return dict(records if isinstance(records, Mapping) else enumerate(records))


def _fitted(key: Hashable, record: object, routers: dict[str, torch.nn.Module], top_k: int) -> torch.Tensor:
    """The record with one layer per router, checked."""
    name = f"records[{key!r}]"
    if not isinstance(record, torch.Tensor) or record.is_floating_point() or record.dtype == torch.bool:
        kind = record.dtype if isinstance(record, torch.Tensor) else type(record).__name__
        raise TypeError(f"{name}: expected an integer tensor [T, layers, top_k], got {kind}; see decode and pack")
    if record.dim() != 3 or record.shape[2] != top_k:
        raise ValueError(f"{name}: expected [T, layers, top_k] with top_k = {top_k}, got {list(record.shape)}")
    if record.shape[1] != len(routers):
        found = [re.search(r"(?:^|\.)layers\.(\d+)\.", router) for router in routers]
        numbers = [int(match[1]) for match in found if match is not None]
        if len(numbers) != len(routers) or record.shape[1] <= max(numbers):
            raise ValueError(
                f"{name}: expected {len(routers)} layers, one per router, or one per decoder layer, "
                f"got {record.shape[1]}"
            )
        record = record[:, numbers]
    check(record, _common(routers, "num_experts"), name)
    return record


def _tensors(output: object) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
