"""Routing record and replay on transformers' routers and on our own layer.

References: the router's own forward (bits), the ids that were asked for, plain training without recomputation. Models
are tiny and random, and on the GPU where there is one for every family. Not covered: engines that return records (their
payloads: test_routing_records).
"""

import doctest
import gc
import importlib
from typing import ClassVar

import hf_models
import pytest
import torch
import transformers
from hf_models import FAMILIES, IDS, loss_and_gradients
from moe_cases import DEVICE
from numeric import assert_same_bits

import ornith_moe as om
import ornith_moe.hf
from ornith_moe import replay, routing_rules

TOKENS = IDS.numel()


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request):
    torch.manual_seed(0)
    return hf_models.model(request.param, device=DEVICE)


@pytest.fixture
def model():
    return hf_models.model("mixtral")


def random_record(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    layers = model.config.num_hidden_layers
    return torch.rand(TOKENS, layers, 7, generator=generator).topk(3).indices.short()


def assert_same_gradients(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_same_bits(name, gradient, expected[name])


def routers(model):
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


@pytest.mark.device
class TestEveryFamily:
    def test_a_replayed_pass_is_the_recorded_one(self, any_model):
        expected = loss_and_gradients(any_model)
        with replay.record(any_model) as trace:
            recorded = loss_and_gradients(any_model)
        with replay.replay(any_model, trace) as report, replay.record(any_model) as visited:
            replayed = loss_and_gradients(any_model)
        layers = any_model.config.num_hidden_layers
        assert trace[0].shape == (TOKENS, layers, 3) and trace[0].dtype == torch.int16 and len(trace) == 1
        assert_same_bits("ids", visited[0], trace[0])
        for loss, gradients in (recorded, replayed):
            assert_same_bits("loss", loss, expected[0])
            assert_same_gradients(gradients, expected[1])
        assert report.flipped_share == report.touched_share == 0 and report.overlap == [1.0] * layers
        assert report.tokens == TOKENS and torch.equal(report.load, trace.load().cpu())

    def test_another_choice_is_visited_and_the_router_learns(self, any_model):
        """After the parameters have moved, the recorded experts are still the ones that compute and get gradients."""
        record = random_record(any_model).to(DEVICE)
        with replay.replay(any_model, record) as report, replay.record(any_model) as visited:
            _, gradients = loss_and_gradients(any_model)
        assert_same_bits("ids", visited[0], record)
        assert 0.3 < report.flipped_share < 0.8 and report.touched_share > 0.95
        router_gradients = [g for name, g in gradients.items() if name.endswith((".gate.weight", ".router.weight"))]
        assert len(router_gradients) == any_model.config.num_hidden_layers
        assert all(gradient.norm() > 1e-4 for gradient in router_gradients)

    def test_recomputation_replays_and_counts_once(self, any_model):
        """Both forms of checkpointing, inside the block and with the backward pass after it."""
        record = random_record(any_model).to(DEVICE)
        with replay.replay(any_model, record) as plain:
            expected_loss, expected = loss_and_gradients(any_model)
        any_model.train()
        try:
            for reentrant in (False, True):
                hf_models.checkpoint_activations(any_model, use_reentrant=reentrant)
                with replay.replay(any_model, record) as report, replay.record(any_model) as trace:
                    loss, gradients = loss_and_gradients(any_model)
                assert_same_bits("loss", loss, expected_loss)
                assert_same_gradients(gradients, expected)
                assert torch.equal(report.load, plain.load) and report.flipped_share == plain.flipped_share
                assert_same_bits("ids", trace[0], record)

                any_model.zero_grad()
                with replay.replay(any_model, record):
                    ids = IDS.to(DEVICE)
                    loss = any_model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                assert_same_gradients({n: p.grad for n, p in any_model.named_parameters()}, expected)
        finally:
            hf_models.keep_activations(any_model)
            any_model.eval()


def test_training_with_replayed_routing_lowers_the_loss():
    model = hf_models.model("qwen3_5_moe")
    with replay.record(model) as trace, torch.no_grad():
        model(input_ids=IDS)
    gates = [router.weight.detach().clone() for router in routers(model)]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        with replay.replay(model, trace) as report, replay.record(model) as visited:
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        assert_same_bits("ids", visited[0], trace[0])
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert report.flipped_share > 0  # by now the router itself would choose otherwise
    assert all((router.weight - gate).abs().max() > 1e-3 for router, gate in zip(routers(model), gates, strict=True))


class TestMicroBatches:
    def batches(self):
        return [torch.randint(0, 97, shape) for shape in ((2, 9), (1, 5), (3, 4))]

    def test_numbered_in_order(self, model):
        batches = self.batches()
        with replay.record(model) as trace, torch.no_grad():
            for batch in batches:
                model(batch)
        assert list(trace) == [0, 1, 2] and [len(trace[key]) for key in trace] == [18, 5, 12]
        with replay.replay(model, trace) as report, torch.no_grad():
            for batch in batches:
                model(batch)
        assert report.flipped_share == 0 and report.tokens == 35

    def test_named_in_any_order(self, model):
        batches = dict(zip("abc", self.batches(), strict=True))
        with replay.record(model) as trace, torch.no_grad():
            for key, batch in batches.items():
                with replay.micro_batch(key):
                    model(batch)
        assert list(trace) == ["a", "b", "c"]
        with replay.replay(model, trace) as report, torch.no_grad():
            for key in "cab":
                with replay.micro_batch(key):
                    model(batches[key])
        assert report.flipped_share == 0 and report.tokens == 35

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_pipelined_backward_passes_recompute_their_own(self, model, reentrant):
        """All forward passes first, then the backward passes in another order, as pipeline schedules do."""
        records = [random_record(model, seed) for seed in range(3)]
        expected = []
        for record in records:
            with replay.replay(model, record):
                expected.append(loss_and_gradients(model)[1])
        model.train()
        hf_models.checkpoint_activations(model, use_reentrant=reentrant)
        with replay.replay(model, records) as report:
            losses = [model(input_ids=IDS, labels=IDS, use_cache=False).loss for _ in records]
            for index in (1, 0, 2):
                model.zero_grad()
                losses[index].backward()
                assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected[index])
        assert report.load.sum() == 3 * TOKENS * 3 * len(report.layers)

    def test_a_block_leaves_older_graphs_alone(self, model):
        """A pass from before the block is recomputed inside it without being steered."""
        _, expected = loss_and_gradients(model)
        model.train()
        hf_models.checkpoint_activations(model, use_reentrant=True)
        model.zero_grad()
        old = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        with replay.replay(model, random_record(model)), torch.no_grad():
            model(input_ids=IDS)
            with torch.enable_grad():
                old.backward()
        assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected)


def test_rows_without_record_get_the_fresh_choice(model):
    with replay.record(model) as own, torch.no_grad():
        model(IDS)
    record = own[0].clone()
    record[::2] = -1
    record[1] = (record[1] + 1) % 7
    with replay.replay(model, record) as report, replay.record(model) as visited, torch.no_grad():
        model(IDS)
    assert_same_bits("first layer", visited[0][::2, 0], own[0][::2, 0])  # what is before any replayed choice
    assert_same_bits("recorded", visited[0][1::2], record[1::2])
    assert report.tokens == TOKENS // 2 and report.load.sum() == TOKENS * 2 * 3
    assert 0 < report.touched_share < 1


def test_a_record_of_all_decoder_layers_is_read_by_their_numbers():
    model = hf_models.model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[0, 2])
    record = torch.full((TOKENS, 3, 3), -1)
    record[:, 1] = torch.tensor([6, 2, 4])
    with replay.replay(model, record) as report, torch.no_grad():
        model(IDS)
    assert report.layers == ("model.layers.1.mlp.gate",)
    assert report.load.tolist() == [[0, 0, TOKENS, 0, TOKENS, 0, TOKENS]]


def test_generation_is_recorded_step_by_step_and_replayed_at_once():
    """A rollout by `generate` on left-padded prompts, then one training pass over the whole sequences."""
    model = hf_models.model("qwen3_moe")
    prompt, mask = IDS[:, :6], torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    with replay.record(model) as trace:
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        full = model.generate(prompt, attention_mask=mask, **options)
    rows = trace.by_sequence(2)
    assert rows.shape == (2, 6 + 5 - 1, 2, 3)
    whole = torch.cat((mask, torch.ones(2, 5, dtype=torch.int64)), 1)
    records = [row[real == 1] for row, real in zip(rows, whole[:, :-1], strict=True)]
    packed = replay.pack(records, attention_mask=whole)
    with replay.replay(model, packed) as report, torch.no_grad():
        model(full, attention_mask=whole)
    assert report.tokens == 2 * 10 - 2
    assert report.flipped_share < 0.01  # the same model; only the order of sums differs


class TestRowsOfTheKeptTokens:
    """`by_sequence` after each way to generate, against a plain forward pass over what generate returned."""

    OPTIONS: ClassVar = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    PROMPT = torch.tensor([[5, 6, 7, 5, 6, 7], [9, 8, 9, 8, 9, 8]])

    def recorded(self, model, prompt=PROMPT, **options):
        with replay.record(model) as trace, torch.no_grad():
            full = model.generate(prompt, attention_mask=torch.ones_like(prompt), **self.OPTIONS | options)
        return trace, full

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "num_return_sequences": 2},
            {"use_cache": False},
            {"prefill_chunk_size": 4},
            {"prompt_lookup_num_tokens": 3, "eos_token_id": 96},  # older releases want one
        ],
        ids=str,
    )
    def test_are_returned(self, options):
        model = hf_models.model("qwen3_moe").eval()
        one = "prompt_lookup_num_tokens" in options
        trace, full = self.recorded(model, self.PROMPT[:1] if one else self.PROMPT, **options)
        with replay.record(model) as plain, torch.no_grad():
            model(full)
        rows = trace.by_sequence(len(full))
        assert rows.shape[1] == full.shape[1] - 1
        expected = plain[0].unflatten(0, tuple(full.shape))[:, :-1]
        assert (rows.sort(-1).values == expected.sort(-1).values).float().mean() > 0.99  # sums in another order

    @pytest.mark.parametrize(
        ("batch", "says"), [(2, "expected passes of 2 sequences, got 6 x 6 tokens"), (6, "reordered, as beam search")]
    )
    def test_of_beams_cannot_be_told(self, batch, says):
        trace, _ = self.recorded(hf_models.model("qwen3_moe").eval(), num_beams=3)
        with pytest.raises(ValueError, match=rf"{says}.* record a plain forward pass"):
            trace.by_sequence(batch)

    def test_of_unrelated_passes_cannot_be_joined(self, model):
        with replay.record(model) as trace, torch.no_grad():
            model(IDS)
            model(IDS.flip(1))
        with pytest.raises(ValueError, match=r"expected a pass over the tokens of the one before and more, got other"):
            trace.by_sequence(len(IDS))


def test_nothing_is_left_behind(model):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model(IDS)  # transformers installs its own at the first pass
    before = hooks()
    with replay.record(model):
        loss = model(IDS, labels=IDS).loss
        assert hooks() > before
    assert hooks() > before  # a backward pass may still come
    loss.backward()
    del loss
    gc.collect()
    assert hooks() == before
    with pytest.raises(ValueError, match="boom"), replay.record(model), torch.no_grad():
        raise ValueError("boom")
    assert hooks() == before


class TestCompiled:
    """Hooks break the graph, so the model compiles, though not with fullgraph=True."""

    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def test_compiled_inside_the_block(self):
        router, x = make_router("mixtral"), torch.randn(5, 40)
        expected = router(x)
        compiled = torch.compile(router, backend="eager")
        record = torch.tensor([[[7, 3]]] * 5)
        with replay.record(router) as trace:
            compiled(x)
        with replay.replay(router, record):
            assert compiled(x)[2].tolist() == [[7, 3]] * 5
        assert_same_bits("recorded", trace[0][:, 0].long(), expected[2])
        assert_same_bits("weights", compiled(x)[1], expected[1])

    def test_compiled_before_the_block_is_an_error_and_not_silence(self):
        router, x = torch.nn.Sequential(make_router("mixtral")), torch.randn(5, 40)
        compiled = torch.compile(router, backend="eager")
        compiled(x)
        with pytest.raises(RuntimeError, match="no router of the model ran"), replay.record(router):
            compiled(x)


class TestOwnLayer:
    CONFIG = om.MoEConfig(hidden_size=40, intermediate_size=24, num_experts=7, top_k=3, shared_intermediate_size=20)

    def test_record_replay_and_train(self):
        moe, x = om.MoE(self.CONFIG), torch.randn(2, 9, 40)
        moe.reset_parameters(0.3)
        with replay.record(moe) as trace:
            y = moe(x)
        assert trace[0].shape == (18, 1, 3)
        with replay.replay(moe, trace) as report:
            assert_same_bits("y", moe(x), y)
        assert report.flipped_share == 0
        record = torch.rand(18, 1, 7).topk(3).indices
        with replay.replay(moe, record) as report, replay.record(moe) as visited:
            moe(x).square().sum().backward()
        assert_same_bits("ids", visited[0], record.short())
        assert report.flipped_share > 0.2 and moe.gate.weight.grad.norm() > 1e-3
        assert_same_bits("y", moe(x), y)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputed(self, reentrant):
        moe, x = om.MoE(self.CONFIG), torch.randn(18, 40, requires_grad=True)
        moe.reset_parameters(0.3)
        outer = torch.nn.Sequential(moe)
        outer.forward = lambda x: torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=reentrant)
        record = torch.rand(18, 1, 7).topk(3).indices
        with replay.replay(outer, record):
            moe(x).square().sum().backward()
        expected = {name: p.grad.clone() for name, p in moe.named_parameters()}
        moe.zero_grad()
        with replay.replay(outer, record) as report:
            outer(x).square().sum().backward()
        assert_same_gradients({name: p.grad for name, p in moe.named_parameters()}, expected)
        assert report.load.sum() == 18 * 3


ROUTERS = {  # model: (configuration, router, what the configuration needs)
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeTopKRouter", {"num_experts": 9}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeTopKRouter", {"num_experts": 9}),
    "qwen3_moe:normalized": ("Qwen3MoeConfig", "Qwen3MoeTopKRouter", {"num_experts": 9, "norm_topk_prob": True}),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextTopKRouter", {"num_experts": 9, "num_experts_per_tok": 3}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeTopKRouter", {"num_experts": 9}),
    "qwen3_vl_moe": ("Qwen3VLMoeTextConfig", "Qwen3VLMoeTextTopKRouter", {"num_experts": 9}),
    "olmoe": ("OlmoeConfig", "OlmoeTopKRouter", {"num_experts": 9}),
    "flex_olmo": ("FlexOlmoConfig", "FlexOlmoTopKRouter", {"num_experts": 9}),
    "mixtral": ("MixtralConfig", "MixtralTopKRouter", {"num_local_experts": 9}),
    "gpt_oss": ("GptOssConfig", "GptOssTopKRouter", {"num_local_experts": 9}),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeTopKRouter", {"num_local_experts": 9, "num_experts_per_tok": 3}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3TopkRouter", {"num_local_experts": 16, "n_group": 4}),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeTopkRouter", {"num_local_experts": 9, "n_group": 1, "topk_group": 1}),
}


def make_router(name):
    config_class, router_class, options = ROUTERS[name]
    package = name.partition(":")[0]
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    if not hasattr(module, router_class):
        pytest.skip(f"transformers {transformers.__version__} has no {router_class}")
    router = getattr(module, router_class)(getattr(transformers, config_class)(hidden_size=40, **options))
    hf_models.randomize(router)
    return router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ROUTERS)
def test_rules_give_the_bits_of_the_router(name, dtype):
    router = make_router(name).to(dtype)
    x = torch.randn(33, 40).to(dtype)
    if isinstance(router(x), torch.Tensor):
        record = torch.arange(getattr(router, "top_k", 3)).expand(33, 1, -1)
        with pytest.raises((RuntimeError, ValueError), match="the block around it chooses the experts"):
            with replay.replay(router, record):
                router(x)
        return
    logits, weights, ids = router(x)
    with replay.replay(router, ids.unsqueeze(1)) as report:
        mine = router(x)
    assert_same_bits("logits", mine[0], logits)
    assert_same_bits("ids", mine[2], ids)
    assert_same_bits("weights", mine[1], weights)
    assert report.flipped_share == 0
    with replay.replay(router, ids.unsqueeze(1).flip(2)):
        assert_same_bits("order of the record", router(x)[2], ids.flip(1))


def test_every_listed_router_is_tested():
    assert set(routing_rules.RULES) == {router for _, router, _ in ROUTERS.values()}


def test_docstrings_run(monkeypatch):
    monkeypatch.setattr(routing_rules, "RULES", dict(routing_rules.RULES))
    ran = [doctest.testmod(module, extraglobs={"torch": torch}) for module in (replay, routing_rules)]
    assert sum(each.attempted for each in ran) >= 9 and not any(each.failed for each in ran)


class TestRefusals:
    def test_a_rule_that_is_not_the_routers_own(self, monkeypatch):
        monkeypatch.setitem(routing_rules.RULES, "MixtralTopKRouter", routing_rules.sigmoid_of_all)
        router = make_router("mixtral")
        router.norm_topk_prob, router.routed_scaling_factor = True, 1.0
        with (
            pytest.raises(RuntimeError, match="MixtralTopKRouter computes other weights than the rule sigmoid_of_all"),
            replay.replay(router, torch.tensor([[[0, 1]]] * 5)),
        ):
            router(torch.randn(5, 40))

    def test_a_model_without_known_router(self):
        with pytest.raises(ValueError, match=r"found none; known are ornith_moe.MoE, .*register_router"):
            replay.record(torch.nn.Linear(3, 3)).__enter__()

    def test_a_router_can_be_taught(self, monkeypatch):
        monkeypatch.setattr(routing_rules, "RULES", dict(routing_rules.RULES))

        class OwnRouter(torch.nn.Linear):
            top_k, num_experts = 2, 9

            def forward(self, x):
                logits = super().forward(x)
                top = logits.sigmoid().topk(2)
                return logits, top.values, top.indices

        replay.register_router("OwnRouter", lambda router, logits, ids: logits.sigmoid().gather(-1, ids))
        with replay.replay(router := OwnRouter(40, 9), torch.tensor([[[3, 1]]] * 5)):
            assert router(torch.randn(5, 40))[2].tolist() == [[3, 1]] * 5

    @pytest.mark.parametrize(
        ("change", "error", "says"),
        [
            (lambda r: r[:, :1], ValueError, r"records\[0\]: expected 2 layers, one per router, or .* got 1"),
            (lambda r: r[:, :, :2], ValueError, r"expected \[T, layers, top_k\] with top_k = 3, got \[46, 2, 2\]"),
            (lambda r: r.float(), TypeError, "expected an integer tensor"),
            (lambda r: r.numpy(), TypeError, "see decode and pack"),
            (lambda r: r + 4, ValueError, r"records\[0\]\[\d+, 0, \d\]: expected an expert id in \[0, 7\)"),
            (lambda r: r * 0, ValueError, r"records\[0\]\[0, 0\]: expected 3 different experts, got \[0, 0, 0\]"),
        ],
        ids=["layers", "top_k", "float", "numpy", "range", "twice"],
    )
    def test_records_before_anything_runs(self, model, change, error, says):
        with pytest.raises(error, match=says), replay.replay(model, [change(random_record(model))]):
            raise AssertionError("entered")

    def test_lengths_and_keys_when_they_run(self, model):
        record = random_record(model)
        with replay.replay(model, record), torch.no_grad():
            with pytest.raises(ValueError, match=r"expected 23 rows for the 23 positions .* got 46"):
                model(IDS[:1])
        with replay.replay(model, record), torch.no_grad():
            model(IDS)
            with pytest.raises(ValueError, match="expected micro-batches 0, got a forward pass for 1"):
                model(IDS)
        with replay.record(model), torch.no_grad(), replay.micro_batch("a"):
            model(IDS)
            with pytest.raises(ValueError, match=r"trace\['a'\]: .* is recorded already"):
                model(IDS)

    def test_a_block_without_a_pass(self, model):
        with pytest.raises(RuntimeError, match="no router of the model ran inside the block"), replay.record(model):
            pass
