"""Expert parallelism and FSDP2 of transformers with our experts, on two gloo processes and a CPU.

Reference: the same model in one process, on the batches of both ranks. transformers' own plans are used, unchanged:
`all_reduce` and `all_to_all` expert parallelism (with a tensor-parallel rest on a shared batch, and with FSDP2 on a
batch per rank), and FSDP2 alone. Not covered: GPUs, more than two processes.
"""

import copy

import hf_models
import parallel_worker
import processes
import pytest
import torch
import transformers
from hf_models import gradient_error
from numeric import assert_close
from parallel_worker import BATCHES, EXTRA, LAYOUTS
from transformers.distributed import DistributedConfig

from ornith_moe import replay

EXPERTS = 8
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo"),
    pytest.mark.skipif(
        not hasattr(DistributedConfig, "fsdp_size"),
        reason=f"transformers {transformers.__version__} has no plans for FSDP2 and EP by DistributedConfig",
    ),
]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    plain = hf_models.model("qwen3_5_moe", num_experts=EXPERTS)
    fp8 = hf_models.model("qwen3_moe", "ornith_fp8", num_experts=EXPERTS, moe_intermediate_size=128)
    return {"ornith": plain, "ornith_fp8": fp8}


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Of both ranks, for every case; the two processes start once."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    processes.run(parallel_worker.run, folder)
    return [torch.load(folder / f"results-{rank}.pt", weights_only=False) for rank in range(2)]


def single(model, own_batch, record=None):
    """Losses per rank and the gradient of their mean, in one process."""
    losses, mean = [], {}
    for rank in range(2 if own_batch else 1):
        batch = parallel_worker.batch_of(rank, own_batch)
        if record is None:
            loss, gradients = hf_models.loss_and_gradients(model, **batch)
        else:
            with replay.replay(model, record):
                loss, gradients = hf_models.loss_and_gradients(model, **batch)
        losses.append(loss)
        for name, gradient in gradients.items():
            mean[name] = mean.get(name, 0) + gradient / (2 if own_batch else 1)
    return losses, mean


def assert_equals_single(results, losses, gradients):
    for rank, result in enumerate(results):
        assert_close(f"loss of rank {rank}", result["loss"], losses[rank % len(losses)], 1e-6)
        error, name = gradient_error(result["gradients"], gradients)
        assert error < 1e-5, f"rank {rank}, {name}: {error:.2e}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_every_gradient(models, results, name):
    found = [result[name] for result in results]
    assert_equals_single(found, *single(models["ornith"], LAYOUTS[name][1]))
    for result in found:
        assert result["why"] == {"fused: plain SwiGLU, recipe bf16, cpu backend"}


@pytest.mark.parametrize("name", [name for name, case in EXTRA if case is parallel_worker.recomputed_replay])
def test_replay_with_an_idle_rank_and_recomputation(models, results, name):
    """One rank's experts get no row at all; the other's get every one."""
    found = [result[f"{name}, recomputed_replay"] for result in results]
    tokens, layers = BATCHES[0].numel(), models["ornith"].config.num_hidden_layers
    record = torch.tensor([2, 0, 1]).expand(tokens, layers, 3)
    assert_equals_single(found, *single(models["ornith"], LAYOUTS[name][1], record))
    for result in found:
        assert result["load"].tolist() == [[tokens] * 3 + [0] * (EXPERTS - 3)] * layers


@pytest.mark.parametrize("name", [name for name, case in EXTRA if case is parallel_worker.two_fp8_steps])
def test_fp8_training_quantizes_again_after_a_step(models, results, name):
    """Losses over two optimizer steps on shards; a stale quantized copy would repeat the first."""
    for rank, result in enumerate(results):
        model = copy.deepcopy(models["ornith_fp8"])
        mine, other = (parallel_worker.batch_of(r, True) for r in (rank, 1 - rank))
        expected = parallel_worker.sgd(model, mine, [other])
        # an FP8 code that rounds the other way moves the third loss by 5e-4 of itself
        assert result[f"{name}, two_fp8_steps"]["losses"] == pytest.approx(expected, rel=2e-3)
        assert expected[2] < 0.5 * expected[0]
