"""Self-scaffolding RL, whole: `make rl`.

    warm start             supervised, until the policy obeys a scaffold that it is given
    three arms of RL       two_level, shared, solution_only, from the same weights, on TRL with our experts and replay
    serve the winner       BF16 checkpoint -> FP8 and GGUF builds -> transformers and llama.cpp answer held-out tasks

The policy is a small Qwen3.5-MoE whose experts our backend computes. It has to learn which scaffold its own executor
needs: the names of categories in `word_tasks.py` are nonsense, so only the reward can tell.

Held-out tasks are evaluated with both stages *sampled* at temperature 1; greedy decoding would hide the scaffold
policy. `right`: share of scaffolds that name the task's operation. `named`: that name any, which the monitor asks for.
`obeys`: of these, the share whose solution does what they say. Costs are CPU seconds of this process. The script fails
unless two_level is 0.3 above solution_only.

Results in --out: `rl.json` (every curve and figure), `rl.png` (three arms), the policy, its builds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Read when torch loads its OpenMP: waiting threads spin for long by default, which beside a busy process costs most.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3_5MoeTextConfig, TrainerCallback, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from word_tasks import CATEGORIES, HELD_OUT, OPERATIONS, TRAINED, demonstrations, obeys, task, tasks, verifier

import ornith_moe.hf  # registers experts_implementation="ornith"
from ornith_moe.rl.monitor import RULES, Attempt, Monitor, Surface
from ornith_moe.rl.scaffolds import Stages
from ornith_moe.rl.trl import SelfScaffoldConfig, SelfScaffoldTrainer

ROOT = Path(__file__).resolve().parent.parent

ARMS = ("two_level", "shared", "solution_only")
S, R, TASKS = 6, 2, 12  # scaffolds a task, rollouts a scaffold, tasks a batch: 216 rows
UPDATES, LEARNING_RATE, WARMUP = 300, 3e-4, 10  # at 5e-4 one seed of two stopped at a reward of 0.5
WARM_ROUND, WARM_ROUNDS, OBEYS = 200, 8, 0.99
HINT = 0.1  # how much more often a demonstration's scaffold is the right one
STAGES = Stages("{task}\nplan:", "", "{task}\nplan: {scaffold}\nanswer:", ("", ""), ("", ""))
BUILDS = ("fp8-block", "gguf:Q8_0")

console = Console(stderr=True)


def names_an_operation(_: Surface, attempt: Attempt) -> Iterable[str]:
    """Strikes scaffolds that say nothing. Without it they grow: what pushes the wrong ones down lifts all the rest, and
    an executor that is rewarded under them learns to do without a scaffold."""
    if attempt.scaffold not in OPERATIONS:
        yield "scaffold: names no operation"


MONITOR = Monitor(rules=(*RULES, names_an_operation))


def make_policy(out: Path, seed: int) -> PreTrainedTokenizerFast:
    """A random policy with its tokenizer in `out`: 1.1 M parameters, a gated-delta and an attention layer of 8 experts,
    top-2. (llama.cpp aborts on a model of this architecture without a gated-delta layer.)
    """
    sys.path.append(str(ROOT / "demo"))  # nano's tokenizer is one that llama.cpp has the rules of
    from nano import train_tokenizer

    words = train_tokenizer([STAGES.solve_prompt(t, s) + f" {y}" for t, s, y in demonstrations(4000, 0, 0)], 420)
    config = Qwen3_5MoeTextConfig(
        vocab_size=len(words), hidden_size=128, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        full_attention_interval=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=128, shared_expert_intermediate_size=128,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
        max_position_embeddings=512, mtp_num_hidden_layers=0, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5, "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
    )  # fmt: skip
    set_seed(seed)
    AutoModelForCausalLM.from_config(config, experts_implementation="ornith").save_pretrained(out)
    words.save_pretrained(out)
    return words


def warm_start(policy: Path, words: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Teach `policy` both forms, in rounds, until it obeys a given scaffold; its own stay near chance. One that an
    earlier run has taught is taken as it is."""
    done = policy / "warm_start.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    seconds, rounds, obeyed = time.process_time(), 0, 0.0
    while obeyed < OBEYS:
        if rounds == WARM_ROUNDS:
            raise SystemExit(
                f"warm start: the policy obeys {obeyed:.2f} after {rounds} rounds, expected {OBEYS}; RL was not begun"
            )
        rows = [
            {"prompt": prompt, "completion": f" {completion}{words.eos_token}"}
            for t, s, y in demonstrations(WARM_ROUND * 32, 1000 * seed + rounds, HINT)
            for prompt, completion in ((STAGES.propose_prompt(t, None), s), (STAGES.solve_prompt(t, s), y))
        ]
        args = SFTConfig(
            str(policy), per_device_train_batch_size=64, max_steps=WARM_ROUND, seed=seed + rounds, use_cpu=True,
            bf16=False, learning_rate=3e-3 * 0.7**rounds, warmup_steps=20, adam_beta2=0.95, lr_scheduler_type="cosine",
            report_to=[], save_strategy="no", completion_only_loss=True, max_length=64, logging_steps=50,
            model_init_kwargs={"experts_implementation": "ornith", "dtype": "float32"}, router_aux_loss_coef=0.0,
        )  # fmt: skip
        trainer = SFTTrainer(str(policy), args, train_dataset=Dataset.from_list(rows), processing_class=words)
        trainer.train()
        trainer.save_model(str(policy))
        rounds += 1
        given = [(scaffold, query) for query in HELD_OUT[::3] for scaffold in OPERATIONS]
        prompts = [STAGES.solve_prompt(task("zorp", query)["prompt"], scaffold) for scaffold, query in given]
        said = transformers_sampler(trainer.model, words)(prompts)
        obeyed = sum(text == obeys(s, q) for text, (s, q) in zip(said, given, strict=True)) / len(given)
    figures = {"obeys": obeyed, "rounds": rounds, "cpu_seconds": round(time.process_time() - seconds, 1)}
    done.write_text(json.dumps(figures), encoding="utf-8")
    return figures


Sampler = Callable[[Sequence[str]], list[str]]  # prompts -> one sampled completion each, as text


def transformers_sampler(model: Any, words: PreTrainedTokenizerFast) -> Sampler:
    def sample(prompts: Sequence[str]) -> list[str]:
        batch = words(list(prompts), padding=True, padding_side="left", return_tensors="pt")
        training = model.training
        model.eval()
        ids = model.generate(
            **batch,
            max_new_tokens=5,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=words.pad_token_id,
        )
        model.train(training)
        return [t.strip() for t in words.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)]

    return sample


def client_sampler(path: Path, words: PreTrainedTokenizerFast, seed: int) -> Sampler:
    """Sampling from whatever runs a build or a checkpoint: transformers for a folder, llama.cpp for a GGUF."""
    from ornith_moe.clients import open_client

    generator = torch.Generator().manual_seed(seed)

    def sample(prompts: Sequence[str]) -> list[str]:
        texts = []
        with open_client(path) as client:
            for prompt in prompts:
                ids, said = words(prompt)["input_ids"], []
                while len(said) < 5:
                    logps = torch.from_numpy(client.log_probs(ids + said, [len(ids) + len(said) - 1])[0])
                    said.append(int(torch.multinomial(logps.exp().nan_to_num(0.0), 1, generator=generator)))
                    if said[-1] == words.eos_token_id:
                        break
                texts.append(words.decode(said, skip_special_tokens=True).strip())
        return texts

    return sample


def evaluate(sample: Sampler, count: int) -> dict[str, float]:
    """Both stages, sampled, on held-out queries; the standard error of a reward near 0.8 over 400 tasks is 0.02."""
    rows = tasks(HELD_OUT, count, seed=10**6)
    scaffolds = sample([STAGES.propose_prompt(row["prompt"], None) for row in rows])
    answers = sample([STAGES.solve_prompt(row["prompt"], s) for row, s in zip(rows, scaffolds, strict=True)])
    asked = [obeys(scaffold, row["query"]) for row, scaffold in zip(rows, scaffolds, strict=True)]
    named = sum(answer is not None for answer in asked)
    return {
        "reward": sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True)) / count,
        "right": sum(s == CATEGORIES[row["category"]] for s, row in zip(scaffolds, rows, strict=True)) / count,
        "named": named / count,
        "obeys": sum(answer == want for answer, want in zip(answers, asked, strict=True)) / max(named, 1),
    }


class HeldOut(TrainerCallback):
    """Evaluates every `every` updates, without moving the run's own random numbers, and keeps the curve."""

    def __init__(self, words: PreTrainedTokenizerFast, every: int, tell: Callable[[int, dict[str, float]], None]):
        self.words, self.every, self.tell, self.curve = words, every, tell, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.begun, self.elsewhere = time.process_time(), 0.0
        self.measure(state.global_step, given["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step % self.every == 0:
            self.measure(state.global_step, given["model"])

    def measure(self, step: int, model: Any) -> None:
        begun = time.process_time()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(step)
            figures = evaluate(transformers_sampler(model, self.words), 400)
        spent = begun - self.begun - self.elsewhere
        self.elsewhere += time.process_time() - begun
        self.curve.append({"step": step, "cpu_seconds": round(spent, 1)} | figures)
        self.tell(step, figures)


def train_arm(
    arm: str, warm: Path, out: Path, words: PreTrainedTokenizerFast, seed: int, updates: int
) -> dict[str, Any]:
    """RL of one arm from the warm policy; the trained one is saved in `out`. Its curve, and what replay reported."""
    args = SelfScaffoldConfig(
        str(out), scaffolds=S, rollouts=R, credit=arm, struck="punish", per_device_train_batch_size=S * (1 + R) * TASKS,
        max_steps=updates, num_iterations=2, learning_rate=LEARNING_RATE, lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP, adam_beta2=0.95,
        max_completion_length=5, router_aux_loss_coef=0.0, seed=seed, use_cpu=True, bf16=False, report_to=[],
        logging_steps=1, save_strategy="no", gradient_checkpointing=False,
        model_init_kwargs={"experts_implementation": "ornith", "dtype": "float32"},
    )  # fmt: skip
    held_out = HeldOut(
        words, max(updates // 10, 1), lambda step, f: console.print(f"  {arm} seed {seed} update {step}: {f}")
    )
    trainer = SelfScaffoldTrainer(
        str(warm), verifier, args, Dataset.from_list(tasks(TRAINED, TASKS * updates, seed)),
        stages=STAGES, monitor=MONITOR, processing_class=words, callbacks=[held_out],
    )  # fmt: skip
    assert all(how.startswith("fused") for how in ornith_moe.hf.explain(trainer.model).values()), "experts are not ours"
    trainer.train()
    trainer.save_model(str(out))
    log = [row for row in trainer.state.log_history if "replay/flipped_share" in row]
    first, later = ([row for row in log if row["policy/age"] == age] for age in (0, 1))
    return {
        "seed": seed,
        "curve": held_out.curve,
        "rewards": [row["reward"] for row in log if "reward" in row],
        "first_update": {k: max(row[k] for row in first) for k in ("replay/flipped_share", "clip_ratio/region_mean")},
        "second_update": {k: max(row[k] for row in later) for k in ("replay/flipped_share", "clip_ratio/region_mean")},
    }


def serve(policy: Path, out: Path, words: PreTrainedTokenizerFast, count: int) -> list[dict[str, Any]]:
    """Save in BF16, convert by the command a user types, and let two programs answer the same held-out tasks."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)
    model.save_pretrained(out / "bf16")
    words.save_pretrained(out / "bf16")
    to = [argument for build in BUILDS for argument in ("--to", build)]
    command = [sys.executable, "-m", "ornith_moe", "convert", str(out / "bf16"), str(out / "builds"), *to, "--json"]
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    served = []
    for path in (out / "bf16", *(Path(build["path"]) for build in done["builds"])):
        with torch.random.fork_rng(devices=[]):
            figures = evaluate(client_sampler(path, words, seed=0), count)
        served.append(
            {"what": path.name, "client": "llama.cpp" if path.suffix == ".gguf" else "transformers"} | figures
        )
        console.print(f"  served: {served[-1]}")
    return served


def draw(result: dict[str, Any], path: Path) -> None:
    """Held-out reward and the right scaffold's share of every arm and seed, over CPU seconds of RL."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (key, title) in zip(
        panels,
        {"reward": "held-out reward, sampled", "right": "right scaffold", "obeys": "obeys its scaffold"}.items(),
        strict=True,
    ):
        for arm, colour in zip(ARMS, ("tab:blue", "tab:orange", "tab:grey"), strict=True):
            for index, run in enumerate(result["arms"].get(arm, [])):
                points = [(row["step"], row[key]) for row in run["curve"]]
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=None if index else arm)
        axes.set(title=title, xlabel="update", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def print_table(result: dict[str, Any]) -> None:
    table = Table(
        "arm", "seed", "reward", "right scaffold", "obeys", "CPU s", title="held-out tasks, both stages sampled"
    )
    for arm, runs in result["arms"].items():
        for run in runs:
            first, last = run["curve"][0], run["curve"][-1]
            moved = [f"{first[key]:.2f} -> {last[key]:.2f}" for key in ("reward", "right", "obeys")]
            table.add_row(arm, str(run["seed"]), *moved, f"{last['cpu_seconds']:.0f}")
    console.print(table)
    for row in result.get("served", []):
        console.print(
            f"{row['what']:24} {row['client']:14} reward {row['reward']:.3f}, right {row['right']:.3f}", highlight=False
        )


def failures(result: dict[str, Any]) -> list[str]:
    """What the example promises and this run did not show, a sentence each."""
    last = {arm: [run["curve"][-1] for run in runs] for arm, runs in result["arms"].items()}
    found = []
    for row, run in zip(last.get("two_level", []), result["arms"].get("two_level", []), strict=True):
        for key, least in (("reward", 0.6), ("right", 0.8), ("obeys", 0.85)):
            if row[key] < least:
                found.append(f"two_level seed {run['seed']}: {key} {row[key]:.2f}, expected at least {least}")
    for ours, theirs, run in zip(
        last.get("two_level", []), last.get("solution_only", []), result["arms"].get("solution_only", []), strict=True
    ):
        if ours["reward"] - theirs["reward"] < 0.3:
            both = f"two_level {ours['reward']:.2f} is not 0.3 above solution_only {theirs['reward']:.2f}"
            found.append(f"seed {run['seed']}: {both}")
    for arm, runs in result["arms"].items():
        for run in runs:
            if any(run["first_update"].values()):
                found.append(f"{arm} seed {run['seed']}: a first update clips or flips: {run['first_update']}")
    if result.get("served"):
        source = result["served"][0]["reward"]
        noise = 3 * (2 * source * (1 - source) / result["served_tasks"]) ** 0.5 + 0.01
        for row in result["served"][1:]:
            if abs(row["reward"] - source) > noise:
                where = f"{row['what']}: reward {row['reward']:.3f} in {row['client']}"
                found.append(f"{where}, {source:.3f} before it was converted, noise {noise:.3f}")
    return found


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Self-scaffolding RL of a small MoE policy, three arms, then served.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / ".demo" / "rl", help="folder of results (default %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of every arm each (default 0)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--updates", type=int, default=UPDATES, help="of each arm (default %(default)s)")
    parser.add_argument("--serve-tasks", type=int, default=120, help="tasks that each build answers; 0: serve nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else on stdout")
    options = parser.parse_args(None if argv is None else list(argv))
    logging.set_verbosity_error()
    torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 stays one
    options.out.mkdir(parents=True, exist_ok=True)

    result: dict[str, Any] = {
        "settings": {"S": S, "R": R, "tasks": TASKS, "updates": options.updates, "lr": LEARNING_RATE}
    }
    result |= {"warm_start": [], "arms": {arm: [] for arm in options.arms}}
    for seed in options.seeds:
        warm = options.out / f"warm-{seed}"
        taught = (warm / "warm_start.json").is_file()
        words = PreTrainedTokenizerFast.from_pretrained(warm) if taught else make_policy(warm, seed)
        result["warm_start"].append({"seed": seed} | warm_start(warm, words, seed))
        console.print(f"warm start seed {seed}: {result['warm_start'][-1]}")
        for arm in options.arms:
            out = options.out / f"{arm}-{seed}"
            result["arms"][arm].append(train_arm(arm, warm, out, words, seed, options.updates))
    runs = [run for of_arm in result["arms"].values() for run in of_arm]
    result["rl_cpu_seconds"] = round(sum(run["curve"][-1]["cpu_seconds"] for run in runs), 1)
    if options.serve_tasks:
        result["served_tasks"] = options.serve_tasks
        policy = options.out / f"{options.arms[0]}-{options.seeds[-1]}"
        result["served"] = serve(policy, options.out / "served", words, options.serve_tasks)
    result["failures"] = failures(result)
    (options.out / "rl.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, options.out / "rl.png")
    print_table(result)
    if options.json:
        print(json.dumps(result))
    for sentence in result["failures"]:
        console.print(sentence, style="red", highlight=False)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
