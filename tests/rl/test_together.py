"""The parts together, without a trainer: tables as a policy, six categories, 50 batches of two updates.

A table gives the operation that the policy names as scaffold for a category, another what it does under a scaffold in
that category. Only one operation earns the reward of a category. The start: scaffolds even, the executor obeys in 95 %.

Reference: what must come out of two-level credit, and cannot without a loss on scaffolds. Not covered: real policies.
"""

import pytest
import torch

from ornith_moe.rl.credit import CREDITS
from ornith_moe.rl.loss import fold, grpo_loss, staleness_weights
from ornith_moe.rl.monitor import Monitor
from ornith_moe.rl.scaffolds import ScaffoldMemory, Stages

K = 6  # categories, and operations
S, R = 6, 2
NAMES = [f"do {chr(ord('a') + k)}" for k in range(K)]
STAGES = Stages("{task}:", "", "{task}: {scaffold}:", ("", ""), ("", ""))


def train(arm, seed, steps=50):
    """(share of right scaffolds, share of obedience) after training, and the memory."""
    random = torch.Generator().manual_seed(seed)
    right = torch.randperm(K, generator=random)
    scaffold = torch.zeros(K, K, requires_grad=True)  # [category, operation]
    obey = torch.eye(K) * torch.tensor(0.95 / 0.05 * (K - 1)).log()
    solve = obey.repeat(K, 1, 1).requires_grad_()  # [category, scaffold, operation]
    optimizer = torch.optim.Adam([scaffold, solve], 0.1)
    memory, monitor = ScaffoldMemory(), Monitor()
    for step in range(steps):
        with torch.no_grad():
            named = scaffold.softmax(-1).multinomial(S, replacement=True, generator=random)  # [K, S]
            context = solve[torch.arange(K)[:, None], named].softmax(-1)
            done = context.view(K * S, K).multinomial(R, replacement=True, generator=random).view(K, S, R)
        texts = [[STAGES.read_scaffold(f" {NAMES[k]}\n") for k in row] for row in named.tolist()]
        scaffold_valid = torch.tensor([[not monitor.judge(scaffold=text).struck for text in row] for row in texts])
        rewards = (done == right[:, None, None]).float()
        credit = CREDITS[arm](rewards, scaffold_valid=scaffold_valid)
        for category, row in enumerate(texts):
            for text, value in zip(row, rewards[category].mean(-1).tolist(), strict=True):
                memory.offer(f"task {category}", text, value, step)
        advantages = torch.cat([credit.scaffold.flatten(), credit.solution.flatten()])
        trained = torch.cat([credit.scaffold_trained.flatten(), credit.solution_trained.flatten()])

        def logps(named=named, done=done):
            first = scaffold.log_softmax(-1).gather(1, named)
            second = solve[torch.arange(K)[:, None], named].log_softmax(-1).gather(2, done)
            return torch.cat([first.flatten(), second.flatten()])[:, None]

        old = logps().detach()
        for update in range(2):
            weights = staleness_weights(torch.full_like(old, update, dtype=torch.int64), k1=1, k2=2)
            made = grpo_loss(logps(), old, fold(advantages, weights), trained[:, None])
            assert update or (made.ratio_min == made.ratio_max == 1 and made.clipped_low == made.clipped_high == 0)
            optimizer.zero_grad()
            made.loss.backward()
            optimizer.step()
    share = scaffold.softmax(-1).gather(1, right[:, None]).mean().item()
    obeys = solve.softmax(-1).diagonal(dim1=1, dim2=2).mean().item()
    return share, obeys, memory, right


@pytest.mark.parametrize("seed", range(3))
def test_two_levels_find_the_scaffold_and_keep_the_executor(seed):
    """One shared advantage finds it too, and wears the executor down, which is blamed for having obeyed."""
    share, obeys, memory, right = train("two_level", seed)
    assert share > 0.9 and obeys > 0.9  # measured 0.99 and 0.95
    for category in range(K):
        assert memory.in_use(f"task {category}") == NAMES[right[category]]
    assert train("shared", seed)[1] < 0.7  # measured 0.52 to 0.57
    assert train("solution_only", seed)[0] == pytest.approx(1 / K)
