"""Self-scaffolding RL on TRL: a `GRPOTrainer` whose batch holds both stages of each task.

    from ornith_moe.rl.trl import SelfScaffoldConfig, SelfScaffoldTrainer

    args = SelfScaffoldConfig(out, scaffolds=6, rollouts=2, model_init_kwargs={"experts_implementation": "ornith"})
    SelfScaffoldTrainer(model, reward_funcs=verifier, args=args, train_dataset=tasks).train()

A task of the dataset takes S * (1 + R) rows of a batch, each with its own context and its own advantages:

    S scaffolds        propose(task, scaffold in use)  ->  scaffold       A[s]      of `ornith_moe.rl.credit`
    S * R solutions    solve(task, scaffold)           ->  solution       A[s, r]

That is TRL's `num_generations`, so its batch sizes count rows as always. Generation (transformers or vLLM), the loss,
checkpoints and logs are TRL's. One method is replaced, `_generate_and_score_completions`; others call `super()`. All
are private to TRL, and were run with 1.16 alone.

The first update of a batch. Log-probs of the policy that generated, and the experts it visited, are taken from the very
micro-batches that the loss will see, not before they are shuffled. So in the first update the ratio is exactly 1: no
token is clipped and no expert flips, bit for bit; later updates of the same batch replay those experts (R2).

Resume. A checkpoint holds the scaffolds in use, and between two updates of one batch the batch itself (safetensors), so
a run that was killed goes on with the numbers of one that was not.

Logged beside TRL's own: `reward`, `reward/scaffold_best` (the best scaffold's mean), `struck/scaffolds`,
`struck/solutions`, `scaffold/repeated` (share of a task's scaffolds that are copies), `scaffold/age` (updates since the
one in use was last measured), `entropy/scaffold`, `entropy/solution`, `replay/flipped_share`, `policy/age` (updates
since the batch was generated).

Not here: routed experts returned by vLLM (R3): TRL's client does not carry them; `ornith_moe.rl.verl` does.

Sources: TRL 1.16; credit and stages as `ornith_moe.rl.credit` says; replay, Ma et al. 2025.
Letters: S scaffolds per task, R rollouts per scaffold, B rows, C completion tokens, L routers.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

try:
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import pad, use_adapter
except ImportError as error:
    raise ImportError(f"ornith_moe.rl.trl needs TRL 1.16 or later ({error}); pip install 'ornith-moe[trl]'") from None
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_peft_available

from ornith_moe import hf, replay
from ornith_moe.rl.credit import CREDITS, Credit, mean_of_valid
from ornith_moe.rl.curve import draw_curve
from ornith_moe.rl.loss import mismatch_weights
from ornith_moe.rl.monitor import Monitor
from ornith_moe.rl.scaffolds import ScaffoldMemory, Stages

SCAFFOLD, SOLUTION = 0, 1  # a row's stage
STATE_FILE, BATCH_FILE = "self_scaffold.json", "self_scaffold_batch_{rank}.safetensors"

Rows = dict[str, Any]  # of one batch or micro-batch: tensors with B rows, or scalars


@dataclass
class SelfScaffoldConfig(GRPOConfig):
    """TRL's `GRPOConfig` and what the two stages need; `num_generations` follows from S and R.

    Attributes:
        scaffolds: S. rollouts: R.
        credit: the arm, a name of `ornith_moe.rl.credit.CREDITS`.
        struck: "drop" or "punish", what a struck row gets. Under "drop" nothing pushes down what cannot be read, so its
            share may grow (`struck/scaffolds`); "punish" does.
        min_valid: valid rollouts a scaffold needs for a value.
        scaffold_scale, solution_scale: "none", or "std" to divide by the group's standard deviation.
        max_scaffold_length: tokens of a scaffold at most; None: `max_completion_length`.
        router_replay: visit in every update the experts that the generating policy chose.
        curve: draw `curve.png` in the output folder at the end.
    """

    scaffolds: int = field(default=4, metadata={"help": "Scaffolds per task, S."})
    rollouts: int = field(default=2, metadata={"help": "Solutions per scaffold, R."})
    credit: str = field(default="two_level", metadata={"help": f"One of {', '.join(CREDITS)}."})
    struck: str = field(default="drop", metadata={"help": "What a struck row gets: drop or punish."})
    min_valid: int = field(default=1, metadata={"help": "Valid rollouts a scaffold needs for a value."})
    scaffold_scale: str = field(default="none", metadata={"help": "none or std."})
    solution_scale: str = field(default="none", metadata={"help": "none or std."})
    max_scaffold_length: int | None = field(default=None, metadata={"help": "Tokens of a scaffold at most."})
    router_replay: bool = field(default=True, metadata={"help": "Replay the experts of the generating policy."})
    curve: bool = field(default=True, metadata={"help": "Draw curve.png in the output folder at the end."})
    num_generations: int | None = field(default=None, metadata={"help": "Rows per task; follows from S and R."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip, asymmetric as in DAPO."})

    def __post_init__(self) -> None:
        rows = self.scaffolds * (1 + self.rollouts)
        if self.scaffolds < 1 or self.rollouts < 1:
            raise ValueError(f"scaffolds, rollouts: expected at least 1, got {self.scaffolds} and {self.rollouts}")
        if self.credit not in CREDITS:
            raise ValueError(f"credit: expected one of {', '.join(CREDITS)}, got {self.credit!r}")
        if self.num_generations not in (None, rows):
            raise ValueError(
                f"num_generations: it follows from the stages, scaffolds * (1 + rollouts) = {rows}, got "
                f"{self.num_generations}; leave it out"
            )
        self.num_generations = self.num_generations_eval = rows
        super().__post_init__()
        here = self.generation_batch_size // self.world_size
        if here % rows:
            raise ValueError(
                f"per_device_train_batch_size * steps_per_generation: expected a multiple of a task's rows, "
                f"{self.scaffolds} * (1 + {self.rollouts}) = {rows}, so that no task is split between processes, "
                f"got {here}"
            )


class SelfScaffoldTrainer(GRPOTrainer):
    """GRPO over scaffolds and solutions.

    Args:
        model, args, train_dataset, ...: as TRL's `GRPOTrainer`. Rows of a dataset hold `prompt` (the task: text, or
            messages whose last one is the task), `category` (whose scaffolds it shares; default all tasks one
            category) and whatever the verifier reads.
        reward_funcs: TRL's reward functions, called with one entry per solution: `completions`, `scaffolds`, `answers`
            (the solution's text without its thoughts) and every column of the dataset. None strikes the solution out.
        stages: prompts of both stages and how their completions are read; default `Stages()`.
        memory: scaffolds in use per category; default `ScaffoldMemory()`.
        monitor: strikes scaffolds and solutions out; default none.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: SelfScaffoldConfig,
        train_dataset: Any,
        *,
        stages: Stages | None = None,
        memory: ScaffoldMemory | None = None,
        monitor: Monitor | None = None,
        **options: Any,
    ):
        super().__init__(model, reward_funcs, args, train_dataset, **options)
        self.stages, self.memory, self.monitor = stages or Stages(), memory or ScaffoldMemory(), monitor
        self._replays = args.router_replay and bool(hf.explain(self.accelerator.unwrap_model(self.model)))
        self._generated_at = 0  # the optimizer step whose policy wrote the batch
        self._entropies: torch.Tensor | None = None

    # Rollouts: from tasks to rows

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Rows:
        args, mode = self.args, "train" if self.model.training else "eval"
        S, R = args.scaffolds, args.rollouts
        tasks = inputs[:: S * (1 + R)]  # TRL repeats a task once per row
        self._generated_at = self.state.global_step
        in_use = [self.memory.in_use(task.get("category", "")) for task in tasks]

        proposing = [
            _with_text(task["prompt"], self.stages.propose_prompt, now) for task, now in zip(tasks, in_use, strict=True)
        ]
        drafts = self._complete([prompt for prompt in proposing for _ in range(S)], S, args.max_scaffold_length)
        scaffolds = [self.stages.read_scaffold(text) for text in drafts.texts]
        of_task = [task for task in tasks for _ in range(S)]
        scaffold_valid = [
            scaffold is not None and not self._strikes(scaffold, None, task)
            for scaffold, task in zip(scaffolds, of_task, strict=True)
        ]
        # a struck scaffold is never carried out: its rows are made without it, and carry no loss
        carried = [s if ok else "" for s, ok in zip(scaffolds, scaffold_valid, strict=True)]

        solving = [
            _with_text(task["prompt"], self.stages.solve_prompt, s) for task, s in zip(of_task, carried, strict=True)
        ]
        solutions = self._complete([prompt for prompt in solving for _ in range(R)], R, None)
        answers = [self.stages.read_answer(text) for text in solutions.texts]
        rows = [task | {"scaffolds": s} for task, s in zip(of_task, carried, strict=True) for _ in range(R)]
        rewards, valid = self._judge(rows, solutions, answers)

        shape = (len(tasks), S, R)
        scaffold_ok = torch.tensor(scaffold_valid).view(shape[:2])
        credit = CREDITS[args.credit](
            rewards.view(shape), valid.view(shape), struck=args.struck, min_valid=args.min_valid,
            scaffold_scale=args.scaffold_scale, solution_scale=args.solution_scale, scaffold_valid=scaffold_ok,
        )  # fmt: skip
        batch = self._rows(drafts, solutions, credit)
        valid = valid.view(shape) & scaffold_ok[..., None]
        if mode == "train":
            self._remember(tasks, scaffolds, rewards.view(shape), valid)
        self._log_rollouts(mode, rewards.view(shape), valid, scaffold_ok, scaffolds)
        self._log_table(drafts, solutions, credit, rewards, mean_of_valid(rewards.view(shape), valid))
        return batch

    def _complete(self, prompts: Sequence[Any], copies: int, max_length: int | None) -> _Completions:
        """One completion per prompt, by whatever TRL generates with; each prompt stands `copies` times."""
        prompt_ids, images, fields = self._tokenize_prompts(list(prompts))
        if images is not None:
            raise ValueError("train_dataset: a prompt holds images, which the two stages do not carry; leave them out")
        with self._at_most(max_length):
            ids, logps = self._generate_single_turn(prompt_ids, None, fields, copies)
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        return _Completions(list(prompts), prompt_ids, ids, texts, logps)

    @contextlib.contextmanager
    def _at_most(self, tokens: int | None) -> Iterator[None]:
        """Generate no more than `tokens` inside the block."""
        engine = getattr(self, "vllm_generation", None)
        holder, name = (
            (engine, "max_completion_length") if self.use_vllm else (self.generation_config, "max_new_tokens")
        )
        before = getattr(holder, name)
        setattr(holder, name, min(before, tokens or before))
        try:
            yield
        finally:
            setattr(holder, name, before)

    def _judge(
        self, rows: list[dict[str, Any]], solutions: _Completions, answers: list[str | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward of every solution of this process, and which ones count: [T * S * R] float32 and bool."""
        prompts = solutions.prompts
        completions = [_like(prompt, text) for prompt, text in zip(prompts, solutions.texts, strict=True)]
        asked = [row | {"answers": answer} for row, answer in zip(rows, answers, strict=True)]
        every = self._calculate_rewards(asked, prompts, completions, solutions.ids)  # of all processes
        mine = every[self.accelerator.process_index * len(rows) :][: len(rows)].cpu()
        rewards = (mine * self.reward_weights.cpu()).nansum(dim=1)
        judged = ~mine.isnan().all(dim=1)
        allowed = [
            answer is not None and not self._strikes(row["scaffolds"], text, row)
            for row, text, answer in zip(rows, solutions.texts, answers, strict=True)
        ]
        for name, column in zip(self.reward_func_names, mine.unbind(1), strict=True):
            self._note(f"rewards/{name}/mean", column.nanmean().item())
        return rewards, judged & torch.tensor(allowed)

    def _strikes(self, scaffold: str | None, solution: str | None, task: dict[str, Any]) -> bool:
        return self.monitor is not None and self.monitor.judge(scaffold=scaffold, solution=solution, task=task).struck

    def _rows(self, drafts: _Completions, solutions: _Completions, credit: Credit) -> Rows:
        """The batch in TRL's keys. The attention of a struck row stays; its loss goes, by `tool_mask`."""
        device, pad_id = self.accelerator.device, self._tokenizer.pad_token_id
        prompts, completions = (
            [torch.tensor(ids) for ids in (*a, *b)]
            for a, b in ((drafts.prompt_ids, solutions.prompt_ids), (drafts.ids, solutions.ids))
        )
        multiple: Any = self.pad_to_multiple_of  # TRL has resolved "auto"

        def padded(rows: list[torch.Tensor], value: int, side: str) -> torch.Tensor:
            return pad(rows, padding_value=value, padding_side=side, pad_to_multiple_of=multiple).to(device)

        advantages = torch.cat([credit.scaffold.flatten(), credit.solution.flatten()]).to(device)
        trained = torch.cat([credit.scaffold_trained.flatten(), credit.solution_trained.flatten()]).to(device)
        stage = torch.tensor([SCAFFOLD] * len(drafts.ids) + [SOLUTION] * len(solutions.ids), device=device)
        completion_mask = padded([torch.ones_like(row) for row in completions], 0, "right")
        rows: Rows = {
            "prompt_ids": padded(prompts, pad_id, "left"),
            "prompt_mask": padded([torch.ones_like(row) for row in prompts], 0, "left"),
            "completion_ids": padded(completions, pad_id, "right"),
            "completion_mask": completion_mask,
            "tool_mask": trained[:, None].expand_as(completion_mask).to(completion_mask.dtype),
            "advantages": advantages[:, None].expand(completion_mask.shape).contiguous(),
            "stage": stage,
        }
        if drafts.logps is not None and solutions.logps is not None:
            rows["sampling_per_token_logps"] = padded(
                [torch.tensor([math.nan if p is None else p for p in row]) for row in drafts.logps + solutions.logps],
                0,
                "right",
            )
        counted = (rows["completion_mask"] * rows["tool_mask"]).sum()
        rows["num_items_in_batch"] = self.accelerator.gather(counted).sum()
        return rows

    # Updates: the same rows, the same experts

    def _prepare_inputs(self, generation_batch: Any) -> Rows:
        before = self._buffered_inputs
        rows = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not before:
            for micro_batch in self._buffered_inputs:
                self._freeze(micro_batch)
        elif not self.model.training:
            self._freeze(rows)
        return rows

    @torch.no_grad()
    def _freeze(self, rows: Rows) -> None:
        """Add what the generating policy says of the rows: log-probs [B, C], experts [B, P + C, L, top_k]."""
        with replay.record(self.model) if self._replays else contextlib.nullcontext() as trace:
            old = self._log_probs(self.model, rows)
        rows["old_per_token_logps"] = old
        if trace is not None:
            rows["routed_experts"] = torch.cat(list(trace.values())).unflatten(0, (len(old), -1))
        if self.beta != 0.0:
            with self._reference() as reference:
                rows["ref_per_token_logps"] = self._log_probs(reference, rows)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            mask = rows["completion_mask"] * rows["tool_mask"]
            sampled = rows["sampling_per_token_logps"]  # NaN where vLLM has none: no correction there
            rows["importance_sampling_ratio"] = mismatch_weights(
                old,
                torch.where(sampled.isnan(), old, sampled),
                mask,
                level="sequence" if self.args.vllm_importance_sampling_mode.startswith("sequence") else "token",
                mode="mask" if self.args.vllm_importance_sampling_mode.endswith("mask") else "truncate",
                cap=self.args.vllm_importance_sampling_cap,
            )

    @contextlib.contextmanager
    def _reference(self) -> Iterator[Any]:
        """The policy that `beta` holds to: TRL's copy, or where it trains an adapter the model without it."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model

    def _log_probs(self, model: Any, rows: Rows) -> torch.Tensor:
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
        attention = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
        return super()._get_per_token_logps_and_entropies(model, ids, attention, rows["completion_ids"].size(1))[0]

    def _compute_loss(self, model: Any, inputs: Rows) -> torch.Tensor:
        if "routed_experts" not in inputs:
            loss = super()._compute_loss(model, inputs)
        else:
            with replay.replay(model, inputs["routed_experts"].flatten(0, 1)) as report:
                loss = super()._compute_loss(model, inputs)
            self._note("replay/flipped_share", report.flipped_share)
        self._note("policy/age", self.state.global_step - self._generated_at)
        trained = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        for name, stage in (("scaffold", SCAFFOLD), ("solution", SOLUTION)):
            tokens = trained & (inputs["stage"] == stage)[:, None]
            if self._entropies is not None:
                self._note(f"entropy/{name}", self._entropies[tokens].mean().item())
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **options)
        self._entropies = None if found[1] is None else found[1].detach()
        return found

    # Memory, logs, checkpoints

    def _remember(
        self, tasks: list[dict[str, Any]], scaffolds: list[str | None], rewards: torch.Tensor, valid: torch.Tensor
    ) -> None:
        """Offer every readable scaffold and its value to the memory, the same on every process."""
        values = mean_of_valid(rewards, valid)
        offers = [
            (tasks[t].get("category", ""), scaffolds[t * self.args.scaffolds + s], values[t, s].item())
            for t, s in valid.any(-1).nonzero().tolist()
        ]
        for category, scaffold, value in gather_object(offers):
            self.memory.offer(category, scaffold, value, self.state.global_step)

    def _log_rollouts(
        self,
        mode: str,
        rewards: torch.Tensor,
        valid: torch.Tensor,
        scaffold_ok: torch.Tensor,
        scaffolds: list[str | None],
    ) -> None:
        values = mean_of_valid(rewards, valid)
        known = valid.any(-1)
        S = self.args.scaffolds
        groups = [scaffolds[i : i + S] for i in range(0, len(scaffolds), S)]
        ages = [self.memory.age(category, self.state.global_step) for category in self.memory.categories]
        figures = {
            "reward": rewards[valid].mean().item(),
            "reward/scaffold_best": torch.where(known, values, -torch.inf).amax(-1)[known.any(-1)].mean().item(),
            "struck/scaffolds": 1 - scaffold_ok.float().mean().item(),
            "struck/solutions": 1 - valid.float().mean().item(),
            "scaffold/repeated": sum(S - len(set(group)) for group in groups) / len(scaffolds),
            "scaffold/age": sum(ages) / len(ages) if ages else math.nan,
        }
        for name, value in figures.items():
            self._note(name, value, mode)

    def _log_table(
        self, drafts: _Completions, solutions: _Completions, credit: Credit, rewards: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Both stages in TRL's table of completions (`log_completions=True`)."""
        logs: dict[str, Any] = self._logs
        for texts, of_stage, advantages in (
            (drafts, values, credit.scaffold),
            (solutions, rewards, credit.solution),
        ):
            logs["prompt"].extend(gather_object(texts.prompts))
            logs["completion"].extend(gather_object(texts.texts))
            logs["rewards"]["reward"].extend(gather_object(of_stage.flatten().tolist()))
            logs["advantages"].extend(gather_object(advantages.flatten().tolist()))

    def _note(self, name: str, value: float, mode: str | None = None) -> None:
        """One figure of this update: the mean over processes, averaged by TRL over a logging step."""
        every = self.accelerator.gather(torch.tensor([value], device=self.accelerator.device, dtype=torch.float32))
        self._metrics[mode or ("train" if self.model.training else "eval")][name].append(every.nanmean().item())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self._unfinished() and self._buffered_inputs is not None:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"{i}.{key}": t.contiguous() for i, rows in enumerate(self._buffered_inputs) for key, t in rows.items()
            }
            save_file(tensors, folder / BATCH_FILE.format(rank=self.accelerator.process_index))
        if self.args.should_save:
            state = {"memory": self.memory.state_dict(), "generated_at": self._generated_at, "step": self._step}
            (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """transformers 5.23 loads by name, without strictness, and a saved MoE names every expert by itself: its fused
        experts would stay what they were before training, with a warning. So the checkpoint is loaded as a model is."""
        model = model or self.model
        if self.is_fsdp_enabled or _is_peft(model):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(model).from_pretrained(resume_from_checkpoint, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if not Path(checkpoint, STATE_FILE).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} holds no {STATE_FILE}, so it was cut while it was written, or "
                "written by another trainer; resume from the one before, or begin anew with it as the model"
            )
        state = json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8"))
        self.memory.load_state_dict(state["memory"])
        self._generated_at, self._step = state["generated_at"], state["step"]
        batch = Path(checkpoint, BATCH_FILE.format(rank=self.accelerator.process_index))
        if batch.is_file():
            micro_batches: Any = [{} for _ in range(self.args.steps_per_generation)]
            for key, tensor in load_file(batch, device=str(self.accelerator.device)).items():
                index, _, name = key.partition(".")
                micro_batches[int(index)][name] = tensor
            self._buffered_inputs = micro_batches

    def _unfinished(self) -> bool:
        """Whether the batch that was generated last has updates left."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def train(self, *args: Any, **options: Any) -> Any:
        result = super().train(*args, **options)
        if self.args.curve and self.accelerator.is_main_process:
            draw_curve(self.state.log_history, Path(self.args.output_dir, "curve.png"))
        return result


@dataclass(frozen=True)
class _Completions:
    """Of one stage: prompts as the dataset has them, ids, texts, and the engine's log-probs where it gives them."""

    prompts: list[Any]
    prompt_ids: list[list[int]]
    ids: list[list[int]]
    texts: list[str]
    logps: list[list[float]] | None


def _is_peft(model: Any) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _with_text(prompt: Any, write: Callable[..., str], argument: str | None) -> Any:
    """A prompt of a stage in the form of the dataset's: text, or messages whose last one is rewritten."""
    if isinstance(prompt, str):
        return write(prompt, argument)
    messages = copy.deepcopy(prompt)
    messages[-1]["content"] = write(messages[-1]["content"], argument)
    return messages


def _like(prompt: Any, text: str) -> Any:
    """A completion in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
