"""How routers make weights of their logits: the rule of every known class of transformers, and others that are taught.

    weights = rule(router, logits [T, E], ids [T, top_k])         differentiable, for any ids, not only the router's own

A replay computes weights by these rules, so a rule is believed only once it has given what its router gave.

Letters: T tokens, E experts.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch

Rule = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]

_TINY = torch.finfo(torch.float32).tiny


def softmax_of_all(router: torch.nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Qwen, OLMoE, Mixtral: softmax over all experts in fp32, renormalized unless the router says no."""
    scores = logits.softmax(-1, dtype=torch.float32).gather(-1, ids)
    if not getattr(router, "norm_topk_prob", True):
        return scores
    return scores / scores.sum(-1, keepdim=True).clamp_min(_TINY)  # replayed experts may all have underflowed


def softmax_of_chosen(router: torch.nn.Module, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """gpt-oss, Granite: softmax over the chosen logits, the same as the above with renormalization."""
    return logits.gather(-1, ids).softmax(-1)


def sigmoid_of_all(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3, GLM-4.5: sigmoid per expert, optionally renormalized, times a factor; the bias only selects."""
    scores = logits.sigmoid().gather(-1, ids)
    if router.norm_topk_prob:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return scores * router.routed_scaling_factor


# by class name, which also matches subclasses: FSDP2 makes one of a module
RULES: dict[str, Rule] = {
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


def register_router(class_name: str, rule: Rule) -> None:
    """Teach `record` and `replay` another router class whose forward returns (logits [T, E], weights, ids).

    Args:
        class_name: of the router module. rule: (router, logits, ids [T, top_k]) -> weights [T, top_k], differentiable.
    Example:
        >>> register_router("MyTopKRouter", softmax_of_all)
    """
    RULES[class_name] = rule


def rule_of(router: torch.nn.Module) -> Rule | None:
    """The rule of a router's class or of one above it; None: it is no router that we know."""
    return next((RULES[cls.__name__] for cls in type(router).__mro__ if cls.__name__ in RULES), None)


def compare_once(
    router: torch.nn.Module, rule: Rule, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> None:
    """Once per router: the rule must give the weights that the router gave, or replay would train another model.

    Raises:
        RuntimeError: it gives others.
    """
    if router in _agreed:
        return
    mine = rule(router, logits, ids)
    # bf16 rounds to 2^-9, and two orders of rounding may differ by two steps
    tolerance = max(1e-5, 4 * torch.finfo(weights.dtype).eps)
    if not torch.allclose(mine.float(), weights.float(), rtol=tolerance, atol=tolerance):
        raise RuntimeError(
            f"replay: {type(router).__name__} computes other weights than the rule {rule.__name__}, by up to "
            f"{(mine.float() - weights.float()).abs().max():.1e}; register its own rule with register_router"
        )
    _agreed.add(router)
