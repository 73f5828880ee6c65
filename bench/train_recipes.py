"""What a recipe costs in learning: one nano trained per recipe on equal batches, and its loss on held-out text.

    python bench/train_recipes.py [--recipes bf16 fp8 ...] [--replay] [--seeds 0 1] [--steps 300] [--json]

The model is that of demo/nano.py, narrower (hidden 128, 8 experts of width 128, top-4, 4 layers), on the same text and
by the same training loop; only the experts differ. They compute as in mixed-precision training: activations in BF16,
fp32 masters. Recipe `bf16` rounds the masters to BF16, the FP8 recipes quantize them, once per step. Everything else
of the model is fp32, and equal seeds mean equal initial weights and batches.

`--replay` adds a run of recipe fp8 with router replay: before every step the model visits the batch as a rollout engine
would, served by recipe `fp8_channel` and without gradients, and the step revisits the experts chosen there. Held-out
loss is measured as always, with the router's own choice. Per step and layer the replayed choice must equal the record.

Reported per run: held-out loss before and after, its ratio to that of bf16 at the same seed, seconds; with replay also
the share of recorded choices that training would have made otherwise, and how far the routers moved from their start.
The model that bf16 trained then tells what each recipe loses on weights and activations that are not noise: the SQNR in
dB of y and of the four gradients against the same experts in fp32, least of the layers, on held-out text and its loss.
Exit code 3 if a loss is more than 1 % above that of bf16, or a replayed choice differs.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_path = Path(__file__).resolve().parent.parent / "demo" / "nano.py"  # of a checkout: a wheel has no demo/
_loader = SourceFileLoader("demo_nano", str(_path))
nano: Any = ModuleType("demo_nano")
sys.modules["demo_nano"] = nano
nano.__file__ = str(_path)
_loader.exec_module(nano)  # before torch: it sets how OpenMP waits

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

import ornith_moe as om  # noqa: E402
from ornith_moe.quant.recipes import RECIPES, recipe_of  # noqa: E402

SETTINGS = nano.Settings(
    steps=300,
    batch=8,
    length=64,
    vocab_size=2048,
    hidden_size=128,
    experts=8,
    expert_size=128,
    text_bytes=4_000_000,
    heldout_tokens=8192,
)
ALLOWED = 1.01  # loss relative to bf16
ROLLOUT = "fp8_channel"


def experts(
    recipe: str, self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts function: BF16 activations, fp32 masters."""
    masters = [self.gate_up_proj, self.down_proj]
    if not recipe_of(recipe).is_fp8:
        masters = [w.bfloat16() for w in masters]
    y = om.moe_mlp(hidden_states.bfloat16(), top_k_index, top_k_weights, *masters, recipe=recipe)
    return y.to(hidden_states.dtype)


for _recipe in RECIPES:
    ALL_EXPERTS_FUNCTIONS.register(f"recipe_{_recipe}", partial(experts, _recipe))


OUTPUTS = ("y", "dx", "dweights", "dgate_up", "ddown")
SQNR_WINDOWS = 32


def least_sqnr(model: Any, heldout: torch.Tensor, length: int, recipes: Sequence[str]) -> dict[str, dict[str, float]]:
    """{recipe: {output: dB}}: signal over error of a trained model's experts, of the layer where it is least."""
    calls: list[Any] = []

    def spy(
        self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        y = experts("bf16", self, hidden_states, top_k_index, top_k_weights)
        y.retain_grad()
        routed = hidden_states.detach(), top_k_index, top_k_weights.detach()
        calls.append((y, *routed, self.gate_up_proj, self.down_proj))
        return y

    def outputs(
        dtype: torch.dtype, recipe: str, dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor,
        weights: torch.Tensor, *masters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        leaves = [t.detach().clone().requires_grad_() for t in (x.to(dtype), weights.float(), *masters)]
        y = om.moe_mlp(leaves[0], indices, *leaves[1:], recipe=recipe)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

    ALL_EXPERTS_FUNCTIONS.register("recipe_spy", spy)
    trained_with = model.config._experts_implementation
    model.set_experts_implementation("recipe_spy")
    tokens = heldout[: len(heldout) // length * length].view(-1, length)[:SQNR_WINDOWS]
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    model.set_experts_implementation(trained_with)
    model.zero_grad(set_to_none=True)
    found = {recipe: dict.fromkeys(OUTPUTS, math.inf) for recipe in recipes}
    for y, *operands in calls:
        exact = outputs(torch.float32, "bf16", y.grad, *operands)  # fp32 operands: nothing is rounded
        for recipe, least in found.items():
            rounded = outputs(torch.bfloat16, recipe, y.grad, *operands)
            for name, ours, true in zip(OUTPUTS, rounded, exact, strict=True):
                signal, noise = true.double().square().sum(), (ours.double() - true.double()).square().sum()
                least[name] = min(least[name], round(10 * math.log10(signal / noise), 1))
    return found


class Replay:
    """Routers that record their choice, or visit a recorded one again; one entry of `record` per layer."""

    def __init__(self, model: Any):
        self.model, self.replaying = model, False
        self.record: list[torch.Tensor] = []
        self.choices = self.flipped = self.wrong = 0
        self.routers = [layer.mlp.gate for layer in model.model.layers]
        self.start = [router.weight.detach().clone() for router in self.routers]
        for layer, router in enumerate(self.routers):
            router.forward = partial(self._route, layer, router)

    def _route(
        self, layer: int, router: Any, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden_states.reshape(-1, router.hidden_dim), router.weight)
        recorded = self.record[layer] if self.replaying else None
        routing = om.route(logits, router.top_k, replay=recorded)
        if recorded is not None:
            own = om.route(logits.detach(), router.top_k).indices
            self.wrong += int(routing.indices.ne(recorded).sum())
            self.flipped += int((own.unsqueeze(-1) != recorded.unsqueeze(-2)).all(-1).sum())
            self.choices += own.numel()
        elif len(self.record) < len(self.routers):
            self.record.append(routing.indices)
        return logits, routing.weights.to(logits.dtype), routing.indices.long()

    def before_forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A rollout of the batch about to be trained on."""
        if not model.training or self.replaying:
            return
        trained_with = model.config._experts_implementation
        self.record, self.replaying = [], False
        model.set_experts_implementation(f"recipe_{ROLLOUT}")
        with torch.no_grad():
            model.model(input_ids=kwargs["input_ids"], use_cache=False)
        model.set_experts_implementation(trained_with)
        self.replaying = True

    def after_forward(self, *_: Any) -> None:
        self.replaying = False

    def report(self) -> dict[str, Any]:
        pairs = zip((router.weight.detach() for router in self.routers), self.start, strict=True)
        moved = [(weight - start).norm() / start.norm() for weight, start in pairs]
        return {
            "replayed_choices": self.choices,
            "replayed_wrongly": self.wrong,
            "flipped_share": self.flipped / self.choices,
            "routers_moved": [round(m.item(), 4) for m in moved],
        }


def train(
    recipe: str, seed: int, replayed: bool, text: Any, settings: Any = SETTINGS, progress: Any = None
) -> dict[str, Any]:
    """One run: {recipe, replay, seed, steps, loss_before, loss_after, seconds, ...}."""
    tokenizer, stream, heldout = text
    settings = replace(settings, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = nano._config(settings, tokenizer)
        model = AutoModelForCausalLM.from_config(config, experts_implementation=f"recipe_{recipe}")
        replay = Replay(model) if replayed else None
        if replay:
            model.register_forward_pre_hook(replay.before_forward, with_kwargs=True)
            model.register_forward_hook(replay.after_forward)
        before = math.log(nano.perplexity(model, heldout, settings.length))
        started = time.monotonic()
        nano._train(model, stream, settings, progress)
        seconds = time.monotonic() - started
        after = math.log(nano.perplexity(model, heldout, settings.length))
        lost = (
            least_sqnr(model, heldout, settings.length, [name for name in RECIPES if recipe_of(name).is_fp8])
            if recipe == "bf16"
            else None
        )
    run = {"recipe": recipe, "replay": bool(replay), "seed": seed, "steps": settings.steps, "loss_before": before,
           "loss_after": after, "seconds": round(seconds, 1)}  # fmt: skip
    return run | (replay.report() if replay else {}) | ({"least_sqnr_db": lost} if lost else {})


def read_text(settings: Any = SETTINGS) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(tokenizer, training tokens, held-out tokens) of the library of this Python, as in demo/nano.py."""
    training = [text for name, text in nano._read_library(settings.text_bytes) if not nano._is_heldout(name)]
    tokenizer = nano.train_tokenizer(training, settings.vocab_size)
    return (
        tokenizer,
        nano._encode(tokenizer, training),
        torch.tensor(nano.heldout_tokens(tokenizer, settings.heldout_tokens)),
    )


def compare(
    recipes: Sequence[str], seeds: Sequence[int], replayed: bool, settings: Any = SETTINGS, progress: Any = None
) -> dict[str, Any]:
    """{"settings", "runs", "ok"}: each recipe after bf16, each with the ratio of its loss to bf16's."""
    text = read_text(settings)
    runs: list[dict[str, Any]] = []
    wanted = [("bf16", False), *((recipe, False) for recipe in recipes if recipe != "bf16")]
    wanted += [("fp8", True)] if replayed else []
    for seed in seeds:
        for recipe, replay in wanted:
            run = train(recipe, seed, replay, text, settings, progress)
            base = next((one for one in runs if one["recipe"] == "bf16" and one["seed"] == seed), run)
            runs.append(run | {"ratio_to_bf16": run["loss_after"] / base["loss_after"]})
    ok = all(run["ratio_to_bf16"] <= ALLOWED and not run.get("replayed_wrongly") for run in runs)
    return {"settings": asdict(settings), "allowed_ratio": ALLOWED, "runs": runs, "ok": ok}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a nano per recipe and compare the losses on held-out text.")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES], help="besides bf16 (default all)")
    parser.add_argument("--replay", action="store_true", help="also fp8 with router replay")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights and batches (default 0)")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="optimizer steps (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    nano.quiet()
    settings = replace(SETTINGS, steps=arguments.steps)
    result = compare(arguments.recipes, arguments.seeds, arguments.replay, settings)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for run in result["runs"]:
            name = run["recipe"] + (" with replay" if run["replay"] else "")
            print(f"{name:16} seed {run['seed']}  loss {run['loss_before']:.3f} -> {run['loss_after']:.4f}"
                  f"  {run['ratio_to_bf16']:.4f} of bf16  {run['seconds']:.0f} s")  # fmt: skip
            for recipe, least in run.get("least_sqnr_db", {}).items():
                print(f"    SQNR of {recipe} in its layers:", ", ".join(f"{o} {db:.1f} dB" for o, db in least.items()))
    return 0 if result["ok"] else 3


if __name__ == "__main__":
    sys.exit(main())
