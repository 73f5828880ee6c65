"""`SelfScaffoldTrainer` on the released TRL, unpatched: rows, advantages, replay, strike-outs, resume."""

import os
import signal

import processes
import pytest
import rl_policy as policy
import torch
import trl_worker
from datasets import Dataset
from torch.multiprocessing import ProcessExitedException
from transformers import TrainerCallback

from ornith_moe.rl.credit import two_level
from ornith_moe.rl.monitor import Monitor
from ornith_moe.rl.scaffolds import Stages
from ornith_moe.rl.trl import SCAFFOLD, SOLUTION, STATE_FILE, SelfScaffoldConfig, SelfScaffoldTrainer

S, R = 3, 2
STAGES = Stages("{task} plan :", "", "{task} plan : {scaffold} answer :", ("", ""), ("", ""))
ROWS = S * (1 + R)


@pytest.fixture
def one_thread():
    """Their number decides the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return policy.save(tmp_path_factory.mktemp("policy"))


def reward(completions, answer, **_):
    """Share of letters in place: rarely the same twice, with random weights."""
    return [
        sum(map(str.__eq__, text, right)) / 3 + len(set(text)) / 7
        for text, right in zip(completions, answer, strict=True)
    ]


def trainer(
    checkpoint, out, *, reward_funcs=reward, tasks=2, dataset=policy.TASKS, implementation="ornith", own=None, **options
):
    options = {
        "per_device_train_batch_size": tasks * ROWS,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "curve": False,
    } | options
    args = SelfScaffoldConfig(
        str(out), scaffolds=S, rollouts=R, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1,
        lr_scheduler_type="constant", max_completion_length=4, seed=1, save_strategy=options.pop("save_strategy", "no"),
        model_init_kwargs={"experts_implementation": implementation, "dtype": "float32"}, **options,
    )  # fmt: skip
    made = SelfScaffoldTrainer(
        checkpoint, reward_funcs, args, Dataset.from_list(dataset * 4), processing_class=policy.tokenizer(),
        **({"stages": STAGES} | (own or {})),
    )  # fmt: skip
    made.model.train()
    return made


def figures(made, key):
    return [row[key] for row in made.state.log_history if key in row]


def test_a_task_takes_rows_of_both_stages(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path)
    seen = []

    def keep(completions, scaffolds, **columns):
        seen.extend(scaffolds)
        return reward(completions, **columns)

    keep.__name__ = "keep"
    made.reward_funcs[0] = keep
    rows = made._generate_and_score_completions([task for task in policy.TASKS for _ in range(ROWS)])
    assert (rows["stage"] == SCAFFOLD).sum() == 2 * S and (rows["stage"] == SOLUTION).sum() == 2 * S * R
    words = made.processing_class
    prompts = [
        words.decode(ids[mask.bool()]) for ids, mask in zip(rows["prompt_ids"], rows["prompt_mask"], strict=True)
    ]
    drafts = [words.decode(ids, skip_special_tokens=True) for ids in rows["completion_ids"][: 2 * S]]
    for i, prompt in enumerate(prompts[2 * S :]):
        scaffold = made.stages.read_scaffold(drafts[i // R])
        assert scaffold == seen[i]
        assert prompt.replace(" ", "").count(scaffold.replace(" ", "")) >= 1
    # every token of a row has the row's advantage, and padding is no item
    assert torch.equal(rows["advantages"], rows["advantages"][:, :1].expand_as(rows["advantages"]))
    assert rows["num_items_in_batch"] == (rows["completion_mask"] * rows["tool_mask"]).sum()


def test_advantages_are_those_of_credit(checkpoint, tmp_path):
    given = []

    def remembered(**columns):
        given.extend(reward(**columns))
        return given[-len(columns["completions"]) :]

    made = trainer(checkpoint, tmp_path, reward_funcs=remembered)
    rows = made._generate_and_score_completions([task for task in policy.TASKS for _ in range(ROWS)])
    expected = two_level(torch.tensor(given).view(2, S, R))
    assert expected.scaffold.abs().max() > 0.01 and expected.solution.abs().max() > 0.01
    assert torch.equal(rows["advantages"][:, 0], torch.cat([expected.scaffold.flatten(), expected.solution.flatten()]))


@pytest.mark.parametrize("split", ["one micro-batch", "three micro-batches"])
def test_the_first_update_of_a_batch_is_exact(checkpoint, tmp_path, split):
    """The loss sees the log-probs of the generating policy bit for bit, and no expert flips, until weights move."""
    steps = 1 if split == "one micro-batch" else 3
    made = trainer(
        checkpoint, tmp_path, num_iterations=2, max_steps=4, gradient_accumulation_steps=steps,
        per_device_train_batch_size=2 * ROWS // steps,
    )  # fmt: skip
    equal, compute = [], type(made)._compute_loss

    def compare(model, inputs):
        loss = compute(made, model, inputs)
        mask = inputs["completion_mask"].bool()
        equal.append(torch.equal(compare.logps[mask], inputs["old_per_token_logps"][mask]))
        return loss

    per_token = made._get_per_token_logps_and_entropies

    def keep(*args, **options):
        found = per_token(*args, **options)
        compare.logps = found[0].detach()
        return found

    made._compute_loss, made._get_per_token_logps_and_entropies = compare, keep
    made.train()
    first, second = [True] * steps, [False] * steps
    assert equal == (first + second) * 2
    flips, clips = figures(made, "replay/flipped_share"), figures(made, "clip_ratio/region_mean")
    assert flips[0] == flips[2] == 0 and clips[0] == clips[2] == 0
    assert flips[1] > 0  # so the first zero is no accident: one update of this size moves the router
    assert figures(made, "policy/age") == [0, 1, 0, 1]


def test_without_replay_experts_flip(checkpoint, tmp_path):
    made = trainer(checkpoint, tmp_path, router_replay=False, num_iterations=2, max_steps=2)
    made.train()
    assert "replay/flipped_share" not in made.state.log_history[0]
    assert made._buffered_inputs[0].keys().isdisjoint({"routed_experts"})


def test_struck_rows_carry_no_loss_and_no_neighbour_changes(checkpoint, tmp_path):
    """A verifier without an answer, and a scaffold that the monitor refuses."""
    made = trainer(checkpoint, tmp_path)
    inputs = [task for task in policy.TASKS for _ in range(ROWS)]
    torch.manual_seed(5)
    whole = made._generate_and_score_completions(inputs)
    scaffold = made.stages.read_scaffold(
        made.processing_class.decode(whole["completion_ids"][1], skip_special_tokens=True)
    )

    def silent(completions, **columns):
        return [None, *reward(completions, **columns)[1:]]

    made.reward_funcs[0] = silent
    made.monitor = Monitor(veto=lambda attempt: "refused" if attempt.scaffold == scaffold else None)
    torch.manual_seed(5)
    struck = made._generate_and_score_completions(inputs)
    trained = struck["tool_mask"][:, 0].bool()
    assert not trained[1] and not trained[2 * S + R : 2 * S + 2 * R].any()  # the scaffold and its rollouts
    assert not trained[2 * S]  # the unanswered one
    assert torch.equal(struck["advantages"][~trained], torch.zeros_like(struck["advantages"][~trained]))
    other = slice(2 * S + S * R, None)  # the second task's solutions
    assert torch.equal(struck["advantages"][other], whole["advantages"][other])
    assert made._metrics["train"]["struck/scaffolds"][-1] == pytest.approx(1 / (2 * S))


def test_messages_are_a_prompt_too(checkpoint, tmp_path):
    words = policy.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    dataset = [task | {"prompt": [{"role": "user", "content": task["prompt"]}]} for task in policy.TASKS]
    seen = []

    def keep(completions, **columns):
        seen.extend(completions)
        return reward([c[0]["content"] for c in completions], columns["answer"])

    made = trainer(checkpoint, tmp_path, reward_funcs=keep, dataset=dataset)
    made.processing_class.chat_template = words.chat_template
    made.train()
    assert len(seen) == 2 * S * R and seen[0][0]["role"] == "assistant"
    assert figures(made, "reward")[0] > 0


@pytest.mark.parametrize("implementation", ["ornith_fp8", "ornith_fp8_full", "ornith_fp8_channel"])
def test_fp8_experts_train(tmp_path, implementation):
    torch.manual_seed(0)
    path = policy.save(
        tmp_path / "policy", hidden_size=128, moe_intermediate_size=128, shared_expert_intermediate_size=128
    )
    made = trainer(path, tmp_path / "out", implementation=implementation, num_iterations=2, max_steps=2)
    before = made.model.model.layers[0].mlp.experts.down_proj.detach().clone()
    made.train()
    assert figures(made, "replay/flipped_share")[0] == 0 and figures(made, "clip_ratio/region_mean")[0] == 0
    assert not torch.equal(before, made.model.model.layers[0].mlp.experts.down_proj)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_reference_holds_the_policy_in_training_and_evaluation(checkpoint, tmp_path, adapter):
    """With an adapter the reference is the model without it; at first both are the policy, so KL is 0 and then not."""
    from peft import LoraConfig

    own = (
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")} if adapter else {}
    )
    own["eval_dataset"] = Dataset.from_list(policy.TASKS)
    made = trainer(
        checkpoint, tmp_path, beta=0.1, num_iterations=2, max_steps=4, own=own, per_device_eval_batch_size=2 * ROWS
    )
    before = made.evaluate()
    made.train()
    kl = figures(made, "kl")
    assert kl[0] == 0 and all(later > 0 for later in kl[1:])
    assert before["eval_kl"] == 0 < made.evaluate()["eval_kl"]


def test_the_curve_is_drawn(checkpoint, tmp_path):
    trainer(checkpoint, tmp_path, max_steps=2, curve=True).train()
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaffolds": 0}, "at least 1"),
        ({"credit": "three_level"}, "expected one of two_level, shared, solution_only"),
        ({"num_generations": 4}, "leave it out"),
        ({"per_device_train_batch_size": 10}, r"4 \* \(1 \+ 2\) = 12|divisible by num_generations"),
    ],
)
def test_a_config_that_cannot_work_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SelfScaffoldConfig(str(tmp_path), use_cpu=True, bf16=False, **({"per_device_train_batch_size": 12} | options))


KEYS = (
    "loss",
    "grad_norm",
    "reward",
    "reward/scaffold_best",
    "entropy/scaffold",
    "entropy/solution",
    "replay/flipped_share",
)


def curve(made):
    return [tuple(row.get(key) for key in KEYS) for row in made.state.log_history if "grad_norm" in row]


def run(checkpoint, out, **options):
    """Three batches of two updates each, a checkpoint after every update: half of them in the middle of a batch."""
    return trainer(checkpoint, out, num_iterations=2, max_steps=5, save_strategy="steps", save_steps=1, **options)


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(checkpoint, out):
    made = run(checkpoint, out)
    made.add_callback(Kill())
    made.train()


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(checkpoint, tmp_path, one_thread):
    """Killed in the middle of a batch, so that its other update and a whole new batch follow."""
    undisturbed = run(checkpoint, tmp_path / "whole")
    undisturbed.train()
    (tmp_path / "policy").symlink_to(checkpoint)
    with pytest.raises(ProcessExitedException) as ended:
        processes.run(trl_worker.killed, tmp_path, count=1)
    assert ended.value.signal_name == "SIGKILL"
    resumed = run(checkpoint, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    (cut := tmp_path / "killed" / "checkpoint-2" / STATE_FILE).unlink()  # as if it had been killed while it wrote that
    with pytest.raises(ValueError, match=f"checkpoint-2 holds no {STATE_FILE}, so it was cut"):
        run(checkpoint, tmp_path / "killed").train(resume_from_checkpoint=str(cut.parent))
    assert curve(resumed) == curve(undisturbed) and len(curve(resumed)) == 5
    assert resumed.memory.state_dict() == undisturbed.memory.state_dict() != {"step": 0, "kept": {}}
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), undisturbed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
