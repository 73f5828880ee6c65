"""Tiny random models of the MoE families in transformers, in float32, large enough that every part matters."""

import torch
import transformers
from transformers import AutoModelForCausalLM

IDS = torch.arange(2 * 23).view(2, 23) * 7 % 97
_COMMON = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 3,
}
_HYBRID = {
    "num_hidden_layers": 4,
    "shared_expert_intermediate_size": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_ROPE = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.25,
    "mrope_section": [1, 1, 0],
    "mrope_interleaved": True,
}
_QWEN = {"num_experts": 7, "moe_intermediate_size": 24}
_FAMILIES = {
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", _QWEN | _HYBRID | {"rope_parameters": _ROPE}),
    "qwen3_moe": ("Qwen3MoeConfig", _QWEN | {"norm_topk_prob": False, "decoder_sparse_step": 1}),
    "qwen3_next": ("Qwen3NextConfig", _QWEN | _HYBRID | {"norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 7, "intermediate_size": 24}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 7, "intermediate_size": 24, "pad_token_id": 0}),
}
FAMILIES = tuple(_FAMILIES)


def config(family="qwen3_5_moe", **changes):
    name, own = _FAMILIES[family]
    return getattr(transformers, name)(**(_COMMON | own | changes))


def model(family="qwen3_5_moe", implementation="ornith", *, device="cpu", **changes):
    """A model in evaluation mode with weights of unit gain, the same on every device."""
    made = AutoModelForCausalLM.from_config(config(family, **changes), experts_implementation=implementation)
    randomize(made)
    return made.to(device).eval()


def randomize(module):
    """Unit gain, except in the token mixers: a delta rule at unit gain is so stiff that fp32 is 1e-4 from fp64."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "attn" in name:
                continue
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)


def checkpoint_activations(made, **options):
    """Recompute every layer in the backward pass; transformers renamed the method."""
    new = getattr(made, "activation_checkpointing_enable", None)
    (new or made.gradient_checkpointing_enable)(options)


def keep_activations(made):
    """Undo `checkpoint_activations`."""
    new = getattr(made, "activation_checkpointing_disable", None)
    (new or made.gradient_checkpointing_disable)()


def loss_and_gradients(made, implementation=None, **inputs):
    """loss [], {name: gradient} of next-token prediction on IDS."""
    if implementation is not None:
        made.set_experts_implementation(implementation)
    made.zero_grad()
    ids = IDS.to(made.device)
    loss = made(**{"input_ids": ids, "labels": ids, "use_cache": False} | inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def gradient_error(gradients, expected):
    """(largest relative error, its parameter). A gradient below 1e-3 of the whole is a difference of larger terms: its
    own norm is no scale for rounding, so it is measured against 1e-3 of the total norm."""
    assert gradients.keys() == expected.keys()
    total = sum(g.double().square().sum() for g in expected.values()).sqrt().item()
    errors = {}
    for name, gradient in gradients.items():
        truth = expected[name].double()
        errors[name] = (gradient.double() - truth).norm().item() / max(truth.norm().item(), 1e-3 * total)
    worst = max(errors, key=errors.get)
    return errors[worst], worst
