"""The sparse MoE block of Qwen3.5 and Ornith: router, routed experts and a gated shared expert.

    y = sum_k weights_k * expert_k(x) + sigmoid(x @ shared_expert_gate^T) * shared_expert(x)

Parameters have the names and shapes of transformers' Qwen3.5-MoE block, so its state dict loads as it is:

    gate.weight [E, H]                 shared_expert_gate.weight [1, H]
    experts.gate_up_proj [E, 2I, H]    shared_expert.{gate,up}_proj.weight [S, H]
    experts.down_proj [E, H, I]        shared_expert.down_proj.weight [H, S]

Router logits are computed in float32 from the stored weights, or, with `router_logits="model"`, in the dtype of the
model, as transformers and some serving engines do; a trainer should match the engine that generates its rollouts.

Letters: T tokens, E experts, H hidden, I expert intermediate, S shared intermediate, top_k experts per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ornith_moe.backend.protocol import NAMES
from ornith_moe.functional import moe_mlp
from ornith_moe.quant.fp8 import SCALES
from ornith_moe.quant.recipes import recipe_of
from ornith_moe.routing import Routing, fold_shared, route


@dataclass(frozen=True)
class MoEConfig:
    """Shape and semantics of one MoE block; a contradiction is a ValueError when it is made.

    Attributes:
        hidden_size: H. intermediate_size: I, of one routed expert. num_experts: E. top_k: experts per token.
        shared_intermediate_size: S of the shared expert; 0 for none.
        fold_shared: keep the shared expert, S = I, as expert E of the same two parameters, so that it rides in the
            launches of the routed ones instead of reading x and adding to y once more.
        score, norm_topk_prob, n_group, topk_group, scaling: as in `ornith_moe.route`.
        router_logits: "float32", or "model" for the dtype of the model.
        recipe, backend, scale, batch_invariant: as in `ornith_moe.moe_mlp`.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    shared_intermediate_size: int = 0
    fold_shared: bool = False
    score: str = "softmax"
    norm_topk_prob: bool = True
    n_group: int | None = None
    topk_group: int | None = None
    scaling: float = 1.0
    router_logits: str = "float32"
    recipe: str = "bf16"
    backend: str | None = None
    scale: str = "fp32"
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.shared_intermediate_size < 0:
            raise ValueError(f"shared_intermediate_size: expected 0 or more, got {self.shared_intermediate_size}")
        if self.fold_shared and self.shared_intermediate_size != self.intermediate_size:
            raise ValueError(
                "fold_shared: expected shared_intermediate_size equal to intermediate_size ="
                f" {self.intermediate_size}, got {self.shared_intermediate_size}; set fold_shared=False"
            )
        if self.router_logits not in ("float32", "model"):
            raise ValueError(f"router_logits: expected 'float32' or 'model', got {self.router_logits!r}")
        recipe_of(self.recipe).check(self.intermediate_size)
        if self.scale not in SCALES:
            raise ValueError(f"scale: expected 'fp32', 'bf16' or 'ue8m0', got {self.scale!r}")
        if self.backend is not None and self.backend not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)} or None, got {self.backend!r}")
        # an empty call: the rules about experts and groups stay where they are enforced
        route(torch.empty(0, self.num_experts, device="cpu"), self.top_k, **self.route_options)

    @property
    def route_options(self) -> dict:
        return {name: getattr(self, name) for name in ("score", "norm_topk_prob", "n_group", "topk_group", "scaling")}


class MoE(nn.Module):
    """y = routed experts + gated shared expert, for x [..., H].

    Args:
        config: MoEConfig. Parameters have torch's default dtype and device, like those of `nn.Linear`.

    Example:
        >>> import torch, ornith_moe as om
        >>> moe = om.MoE(om.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2,
        ...                           shared_intermediate_size=8))
        >>> moe(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        hidden, shared = config.hidden_size, config.shared_intermediate_size
        self.gate = nn.Linear(hidden, config.num_experts, bias=False)
        self.experts = _Experts(config)
        self.shared_expert: _SharedExpert | None
        self.shared_expert_gate: nn.Linear | None
        self.shared_expert = _SharedExpert(hidden, shared) if shared and not config.fold_shared else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if shared else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw every weight from N(0, std^2)."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def route(self, x: torch.Tensor, *, replay: torch.Tensor | None = None) -> Routing:
        """The routing of x [T, H]; its `indices` are what `replay` takes later."""
        if self.config.router_logits == "float32":
            logits = F.linear(x.float(), self.gate.weight.float())
        else:
            logits = self.gate(x)
        return route(logits, self.config.top_k, replay=replay, backend=self.config.backend, **self.config.route_options)

    def forward(self, x: torch.Tensor, *, replay: torch.Tensor | None = None) -> torch.Tensor:
        """y [..., H] for x [..., H]; `replay` [T, top_k] with T tokens in all fixes the choice of experts."""
        if x.shape[-1] != self.config.hidden_size:
            raise ValueError(f"x: expected [..., H] with H = {self.config.hidden_size}, got {list(x.shape)}")
        tokens = x.reshape(-1, x.shape[-1])
        return self.apply_routing(tokens, self.route(tokens, replay=replay)).view_as(x)

    def apply_routing(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """y [T, H] for x [T, H] and a routing at hand, for callers that also need its counts or record its choice."""
        weights = (self.experts.gate_up_proj, self.experts.down_proj)
        options = {name: getattr(self.config, name) for name in ("recipe", "backend", "scale", "batch_invariant")}
        indices, slot_weights = routing.indices, routing.weights
        if self.config.fold_shared and self.shared_expert_gate is not None:
            gate = self.shared_expert_gate(x).sigmoid()
            indices, slot_weights = fold_shared(indices, slot_weights, self.config.num_experts, gate)
        y = moe_mlp(x, indices, slot_weights, *weights, **options)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return y


class _Experts(nn.Module):
    """Holds the routed experts under transformers' names; `moe_mlp` computes with them."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        inner, hidden = config.intermediate_size, config.hidden_size
        experts = config.num_experts + config.fold_shared
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))


class _SharedExpert(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
