"""What the trainer's layer costs beside what one would write: a weight sync, the loss, a replayed forward.

    weight sync   every tensor of a policy as an engine loads it, against a BF16 copy of its state_dict
    loss          advantages among siblings, the clipped loss per token and its gradient, against TRL's lines
    replay        a forward that visits recorded experts, against the plain one, whose bits it must give

TRL 1.16 has its loss in a method of its trainer, which cannot be called without one; its lines (`_compute_loss`, loss
type "dapo", and `_generate_and_score_completions` for the advantages) are repeated here.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ornith_moe.bench.numeric import relative_rms
from ornith_moe.bench.tasks import Settings, Side, Task, Work
from ornith_moe.replay import record, replay
from ornith_moe.rl.credit import relative_to_siblings
from ornith_moe.rl.loss import grpo_loss
from ornith_moe.sync.served import Served, plan_sync

TOY = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_hidden_layers": 2}
SMALL = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 4}
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
SYNCED = {"ours, bf16": "bf16", "ours, fp8-channel": "fp8-channel"}
FP8_TOLERANCE = 0.03  # of weights with a scale per row


def tasks(settings: Settings) -> list[Task]:
    """One task of each kind, at a toy size or at a small one."""
    sizes, (rows, tokens) = (TOY, (16, 128)) if settings.quick else (SMALL, (64, 1024))
    model = f"H {sizes['hidden_size']}, E {sizes['num_experts']}, {sizes['num_hidden_layers']} layers"
    case = {"model": model}
    sync = {**dict.fromkeys(SYNCED, False), "state_dict copy": True}
    return [
        Task("rl", f"weight sync, {model}", case | {"what": "sync"}, sync, partial(_sync, sizes, settings.device)),
        Task("rl", f"loss and advantages, {rows} x {tokens}", {"what": "loss", "rows": rows, "tokens": tokens},
             {"ours": False, "TRL's lines": True}, partial(_loss, rows, tokens, settings.device)),
        Task("rl", f"replayed forward, {model}, T = {tokens}", case | {"what": "replay", "tokens": tokens},
             {"ours": False, "plain": True}, partial(_replay, sizes, tokens, settings.device)),
    ]  # fmt: skip


def policy(sizes: dict[str, int], device: str) -> Any:
    """A Qwen3.5-MoE with FP32 masters, in evaluation mode."""
    from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig

    import ornith_moe.hf  # noqa: F401, which registers the implementation

    kinds = ["linear_attention", "full_attention"] * (sizes["num_hidden_layers"] // 2)
    config = Qwen3_5MoeTextConfig(**sizes, vocab_size=512, layer_types=kinds, num_experts_per_tok=2)
    return AutoModelForCausalLM.from_config(config, experts_implementation="ornith").eval().to(device)


def _sync(sizes: dict[str, int], device: str) -> Work:
    model = policy(sizes, device)
    plain = [one.tensor.clone() for one in plan_sync(model, "bf16")]

    def copied() -> list[torch.Tensor]:
        return [tensor.detach().to(torch.bfloat16, copy=True) for tensor in model.state_dict().values()]

    def same_values(tensors: list[torch.Tensor]) -> float:
        """Experts are cut out of fused tensors: as many numbers, and their bits have the same sum."""
        sums = [sum(int(t.view(torch.int16).long().sum()) for t in each) for each in (tensors, copied())]
        counts = [sum(t.numel() for t in each) for each in (tensors, copied())]
        assert sums[0] == sums[1] and counts[0] == counts[1], f"{counts[0]} values served, {counts[1]} in the model"
        return 0.0

    def near(served: list[Served]) -> float:
        wide = [one.tensor.float() * (1 if one.scale is None else one.scale.float()) for one in served]
        error = max(relative_rms(a, b) for a, b in zip(wide, plain, strict=True))
        assert error < FP8_TOLERANCE, f"relative RMS error {error:.2e}, allowed {FP8_TOLERANCE}"
        return error

    def ours(build: str) -> Side:
        sync = plan_sync(model, build)
        if build == "bf16":
            return Side(lambda: [one.tensor for one in sync], same_values)
        return Side(lambda: list(sync), near)

    sides: dict[str, Callable[[], Side]] = {name: partial(ours, build) for name, build in SYNCED.items()}
    sides["state_dict copy"] = lambda: Side(copied, same_values)
    masters = sum(tensor.nbytes for tensor in model.state_dict().values())
    return Work(sides, masters + masters // 2)


def _loss(rows: int, tokens: int, device: str) -> Work:
    """Groups of eight siblings, and completions of different length."""
    rewards = torch.rand(rows // 8, 8, device=device)
    old = -3 * torch.rand(rows, tokens, device=device)
    logps = (old + 0.1 * torch.randn_like(old)).requires_grad_()
    mask = torch.arange(tokens, device=device) < torch.randint(1, tokens + 1, (rows, 1), device=device)

    def ours() -> torch.Tensor:
        advantages, _ = relative_to_siblings(rewards, torch.ones_like(rewards, dtype=torch.bool), scale="std")
        loss = grpo_loss(logps, old, advantages.flatten(), mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH).loss
        return torch.autograd.grad(loss, logps)[0]

    def trls() -> torch.Tensor:
        mean, std = rewards.mean(1).repeat_interleave(8), rewards.std(1).repeat_interleave(8)
        advantages = ((rewards.flatten() - mean) / (std + 1e-4)).unsqueeze(1)
        ratio = torch.exp(logps - old)
        clipped = torch.clamp(ratio, 1 - CLIP_LOW, 1 + CLIP_HIGH)
        per_token = -torch.min(ratio * advantages, clipped * advantages)
        loss = (per_token * mask).sum() / mask.sum().clamp(min=1.0)
        return torch.autograd.grad(loss, logps)[0]

    expected = trls()

    def check(gradient: torch.Tensor) -> float:
        error = relative_rms(gradient, expected)
        assert error < 1e-5, f"gradient: relative RMS error {error:.2e}, allowed 1e-05"
        return error

    sides = {"ours": lambda: Side(ours, check), "TRL's lines": lambda: Side(trls, check)}
    rate = lambda name, times: f"{rows * tokens / times.median_s / 1e6:.1f} Mtokens/s"  # noqa: E731
    return Work(sides, 3 * old.nbytes + mask.nbytes, note=rate)


def _replay(sizes: dict[str, int], tokens: int, device: str) -> Work:
    model, ids = policy(sizes, device), torch.randint(0, 512, (1, tokens), device=device)
    with torch.no_grad(), record(model) as trace:
        expected = model(ids).logits
    rows = trace[0]

    def forward(replayed: bool) -> torch.Tensor:
        with torch.no_grad(), ExitStack() as recorded:
            if replayed:
                recorded.enter_context(replay(model, rows))
            return model(ids).logits

    def check(logits: torch.Tensor) -> float:
        assert torch.equal(logits, expected), "the logits differ from those of the recorded forward"
        return 0.0

    weights = sum(parameter.nbytes for parameter in model.parameters())
    names = {"ours": True, "plain": False}
    return Work({name: partial(Side, partial(forward, way), check) for name, way in names.items()}, weights)


def test_rl(measure: Callable[[Task, str], None], task: Task, name: str) -> None:
    measure(task, name)
