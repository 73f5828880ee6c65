"""What the process of test_verl runs: verl's FSDP2 engine on a CPU, made and found through its public registries alone.

`run` writes what happened to `results.pt`; the tests ask of it. A process of its own, since verl reads VERL_PLATFORM
once, and torch has one default process group.
"""

import contextlib
import os
from functools import partial

import torch
import torch.distributed as dist

PROMPT, RESPONSE, LAYERS, EXPERTS, TOP_K = 5, 7, 4, 16, 4  # of the checkpoint that `fixtures.qwen35moe` writes
LENGTHS = [(5, 7), (3, 6), (4, 2), (5, 5)]  # of prompt and response, per sequence
WORDS = {"_experts_implementation": "ornith", "attn_implementation": "sdpa"}


def run(rank, world_size, source, folder):
    os.environ |= {"VERL_PLATFORM": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    register_cpu()
    try:
        torch.save(results(source, folder), f"{folder}/results-{rank}.pt")
    finally:
        dist.destroy_process_group()


def register_cpu():
    """A CPU for verl, which brings none: by the registry that it has for platforms."""
    from verl.plugin.platform import PlatformBase, PlatformRegistry

    answers = {
        "communication_backend_name": "gloo",
        "current_device": "cpu",
        "device_count": 1,
        "get_device_capability": (None, None),
        "is_available": True,
        "is_ipc_supported": False,
        "is_platform_available": True,
        "nvtx_range": contextlib.nullcontext(),
        "ray_noset_envvars": [],
        "ray_resource_name": "CPU",
        "visible_devices_envvar": "CUDA_VISIBLE_DEVICES",
    }
    names = {"device_name": "cpu", "vendor_name": "cpu", "device_module": torch.cpu}

    def answering(answer):
        return lambda *_, **__: answer

    methods = {name: answering(answers.get(name)) for name in PlatformBase.__abstractmethods__ - names.keys()}
    PlatformRegistry.register(platform="cpu")(type("CPU", (PlatformBase,), names | methods))


def make_engine(source, param_dtype="bf16", pad_to=None, **overrides):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    model = HFModelConfig(
        path=str(source),
        external_lib="ornith_moe.rl.verl",
        override_config=WORDS | overrides,
        use_remove_padding=False,
        enable_gradient_checkpointing=True,
    )
    engine = EngineRegistry.new(
        "language_model",
        "fsdp2",
        model_config=model,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            mixed_precision={"param_dtype": param_dtype},
            use_torch_compile=False,
            pad_to_length=pad_to is not None,
            pad_to_length_bucket=pad_to or 1,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(save_contents=["hf_model"]),
    )
    engine.initialize()
    return engine


def make_batch(tensors, **options):
    """Four sequences in verl's layout, prompts padded on the left and responses on the right, then without padding."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    rows = len(LENGTHS)
    mask = torch.zeros(rows, PROMPT + RESPONSE, dtype=torch.int64)
    for row, (prompt, response) in enumerate(LENGTHS):
        mask[row, PROMPT - prompt : PROMPT + response] = 1
    ids = (torch.arange(mask.numel()).view_as(mask) * 37 % 91 + 3) * mask
    data = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "response_mask": mask[:, PROMPT:],
    }
    options = {
        "use_remove_padding": False,
        "temperature": 1.0,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
        "global_batch_size": rows,
        "calculate_entropy": False,
        "pad_token_id": 0,
        **options,
    }
    return left_right_2_no_padding(tu.get_tensordict(data | tensors, options))


def records():
    """[B, S, layers, top_k]: random experts where the engine ran a token, zeros elsewhere, as verl pads them."""
    made = torch.rand(len(LENGTHS), PROMPT + RESPONSE, LAYERS, EXPERTS).topk(TOP_K).indices
    for row, (prompt, response) in enumerate(LENGTHS):
        made[row, : PROMPT - prompt] = 0
        made[row, PROMPT + response - 1 :] = 0  # the last token of a rollout is never run
    return made.to(torch.int16)


@contextlib.contextmanager
def visited():
    """A list that fills with the ids [T, top_k] of every call of our experts."""
    import ornith_moe.hf

    calls, ours = [], ornith_moe.hf.moe_mlp
    ornith_moe.hf.moe_mlp = lambda x, ids, *rest, **options: calls.append(ids.clone()) or ours(x, ids, *rest, **options)
    try:
        yield calls
    finally:
        ornith_moe.hf.moe_mlp = ours


def ppo(engine, data, updates):
    """Metrics of `updates` calls of `train_batch` with verl's own loss on one batch, and the experts of the first."""
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, ppo_mini_batch_size=4, use_torch_compile=False
    )
    told, first = [], []
    with engine.train_mode():
        for _ in range(updates):
            with visited() as calls:
                told.append(engine.train_batch(data.clone(), partial(ppo_loss, config))["metrics"])
            first = first or calls
    return told, first


def log_probs(engine, tensors, **options):
    """[B, response] by `infer_batch`, and its metrics."""
    from verl.workers.utils.padding import no_padding_2_padding

    data = make_batch(tensors, **options)
    with engine.eval_mode():
        output = engine.infer_batch(data.clone())
    return no_padding_2_padding(output["model_output"]["log_probs"], data), output["metrics"]


def results(source, folder):
    import ornith_moe.hf

    found = {"records": records()}
    replayed = {"routed_experts": found["records"]}
    engine = make_engine(source, param_dtype="fp32", served_build="FP8")
    found["engine"], found["explain"] = type(engine).__qualname__, ornith_moe.hf.explain(engine.module)
    found["free"], found["free_metrics"] = log_probs(engine, {})
    found["old"], _ = log_probs(engine, replayed)
    batch = {"old_log_probs": found["old"], "advantages": torch.randn_like(found["old"])}
    found["metrics"], found["visited"] = ppo(engine, make_batch(replayed | batch), updates=2)
    found["served, fp32"] = dict(engine.get_per_tensor_param()[0])
    engine.save_checkpoint(f"{folder}/fp32")

    engine = make_engine(source, served_build="FP8", _experts_implementation="ornith_fp8")
    found["explain, bf16"] = ornith_moe.hf.explain(engine.module)
    found["metrics, bf16"], _ = ppo(engine, make_batch(batch), updates=1)
    found["served, bf16"] = dict(engine.get_per_tensor_param()[0])
    engine.save_checkpoint(f"{folder}/bf16")

    engine = make_engine(source, param_dtype="fp32", pad_to=16)
    found["plain"] = {name: tensor.dtype for name, tensor in engine.get_per_tensor_param()[0]}
    with visited() as found["packed, visited"]:
        packed = {"use_remove_padding": True, "micro_batch_size_per_gpu": 1}
        found["packed"], found["packed, metrics"] = log_probs(engine, replayed, **packed)
    return found
